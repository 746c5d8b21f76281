"""A real OpenTelemetry SDK, whose spans are kept in memory, and a broker on a database of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from tests.support import wait_until


class Exported:
    """What was exported, in order."""

    def __init__(self, provider: TracerProvider) -> None:
        self.exporter = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("shop")

    def __iter__(self) -> Iterator[ReadableSpan]:
        return iter(self.exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self]

    def all(self, name: str) -> list[ReadableSpan]:
        return [span for span in self if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The only span of this name; waited for."""
        wait_until(lambda: self.all(name), message=f"a span {name!r}, not {self.names()}")
        (found,) = self.all(name)
        return found

    def trace(self) -> int:
        """The one trace that all spans belong to, in which each span's parent is a span of it, but for one root."""
        # A parent may end after its child: who sends is told of the commit when somebody processes it already.
        wait_until(lambda: not self._loose(), message=f"the parents of {self._loose()} among {self.names()}")
        traces = {span.context.trace_id for span in self}
        assert len(traces) == 1, [(span.name, hex(span.context.trace_id)) for span in self]
        assert len([span for span in self if span.parent is None]) == 1
        return traces.pop()

    def _loose(self) -> list[str]:
        ids = {span.context.span_id for span in self}
        return [span.name for span in self if span.parent is not None and span.parent.span_id not in ids]


def parent_of(exported: Exported, span: ReadableSpan) -> str | None:
    """The name of a span's parent."""
    names = {s.context.span_id: s.name for s in exported}
    return None if span.parent is None else names[span.parent.span_id]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    """The application's, for the time of the test."""
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield provider
    provider.shutdown()


@pytest.fixture
def exported(provider: TracerProvider) -> Exported:
    return Exported(provider)


@pytest.fixture
def make_broker(database_url: str) -> Iterator[Callable[..., durable.DurableBroker]]:
    """Makes brokers on the test's database; the latest is Dramatiq's global one."""
    made: list[durable.DurableBroker] = []
    before = dramatiq.broker.global_broker

    def make(level: Any = "info", **options: Any) -> durable.DurableBroker:
        settings = Settings(poll_interval=0.25, telemetry=level)
        broker = durable.DurableBroker(database_url, reclaim_delay=2, settings=settings, **options)
        made.append(broker)
        dramatiq.set_broker(broker)
        return broker

    yield make
    dramatiq.broker.global_broker = before
    for broker in made:
        broker.close()


@pytest.fixture
def rows(database_url: str) -> Iterator[Callable[..., list[Any]]]:
    """What is stored, as the superuser sees it."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield lambda query, *arguments: conn.execute(query, arguments).fetchall()


@pytest.fixture
def broker(make_broker: Callable[..., durable.DurableBroker]) -> durable.DurableBroker:
    return make_broker()


@pytest.fixture
def start_worker() -> Iterator[Callable[..., dramatiq.Worker]]:
    workers: list[dramatiq.Worker] = []

    def start(broker: durable.DurableBroker, *, queues: set[str] | None = None, threads: int = 4) -> dramatiq.Worker:
        broker.emit_after("process_boot")
        worker = dramatiq.Worker(broker, queues=queues, worker_timeout=50, worker_threads=threads)
        worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop(timeout=5000)
