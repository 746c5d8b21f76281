"""Ours, with everything on: leases, fencing, unique ids, delays, Dramatiq's default middleware."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import dramatiq_durable as durable
from benchmarks.systems.base import option, with_moment
from benchmarks.systems.dramatiq_based import DramatiqSystem


def declare_workflow() -> Any:
    """A workflow of ten steps that do nothing."""

    @durable.activity(queue_name="steps")
    def step(n: int) -> int:
        return n + 1

    @durable.workflow(queue_name="runs")
    async def ten_steps() -> int:
        n = 0
        for _ in range(10):
            n = await step.execute(n)
        return n

    return ten_steps


def set_up_opentelemetry(what: str) -> None:
    """What an application may have: the API alone, or an SDK whose exporter drops what it is given."""
    from opentelemetry import trace

    if what == "api":
        return
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

    class Dropping(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider(sampler=ALWAYS_OFF if what == "unsampled" else ALWAYS_ON)
    provider.add_span_processor(BatchSpanProcessor(Dropping()))
    trace.set_tracer_provider(provider)


class Contender(DramatiqSystem):
    def __init__(self, url: str, streams: int) -> None:
        if what := option("OPENTELEMETRY", ""):
            set_up_opentelemetry(what)
        super().__init__(url, streams)
        # Where they are not measured, their streams are not consumed either.
        self.ten_steps = declare_workflow() if option("WORKFLOWS", "") else None

    def connect(self, url: str) -> durable.DurableBroker:
        return durable.DurableBroker(url)

    def prepare(self) -> None:
        durable.migrate.migrate(self.url)

    def send_many(self, texts: Sequence[str]) -> None:
        self.broker.enqueue_many([self.actors[0].message(text) for text in texts])

    def send_later(self, delays: Sequence[int], size: int) -> None:
        """Send a message for each delay (milliseconds); its moment is when it is due."""
        for delay in delays:
            due = time.monotonic_ns() + delay * 1_000_000
            self.actors[0].send_with_options(args=(with_moment(due, size),), delay=delay)

    def send_backlog(self, n: int, size: int, delay: int) -> None:
        """Store messages that are due in the distant future (milliseconds)."""
        for _ in range(n // 1000):
            self.broker.enqueue_many([self.actors[0].message("x" * size) for _ in range(1000)], delay=delay)

    def start_runs(self, n: int) -> None:
        """Start workflows of ten steps each."""
        for _ in range(n):
            self.ten_steps.start()

    def runs_alone(self, n: int) -> list[float]:
        """Run one workflow after the other; milliseconds from start to result."""
        times = []
        for _ in range(n):
            began = time.perf_counter()
            self.ten_steps.start().result(timeout=30)
            times.append((time.perf_counter() - began) * 1000)
        return times

    def counts(self) -> dict[str, Any]:
        return {"round_trips": self.broker.commit.batches}

    def vacuum(self) -> None:
        """Clean up after all messages, as autovacuum does sooner or later."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute("VACUUM durable.message")
