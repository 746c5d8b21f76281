"""Actors and workflows that do all that is counted.

With the `dramatiq` command, Dramatiq's own Prometheus middleware shows it.  As a program it is one process, which
writes what it has counted to a file when it ends: `plain`, by prometheus_client; or `otel`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.middleware import AsyncIO, default_middleware
from dramatiq.middleware.prometheus import Prometheus

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from dramatiq_durable.workflow.cache import RunCache

broker = durable.DurableBroker(
    os.environ["TEST_URL"],
    middleware=[
        *([Prometheus()] if "dramatiq_prom_port" in os.environ else []),
        *(make() for make in default_middleware),
        AsyncIO(),
    ],
    reclaim_delay=2.0,
    settings=Settings(poll_interval=0.2),
)
# A few runs are in memory, and the others are replayed.
broker.runner.cache = RunCache(4)
dramatiq.set_broker(broker)

PID = os.getpid()


@dramatiq.actor(queue_name="counted")
def count(n: int) -> None:
    pass


@dramatiq.actor(queue_name="counted")
def nap(seconds: float) -> None:
    time.sleep(seconds)


@dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=5)
def fail() -> None:
    raise ValueError("as planned")


@dramatiq.actor
def first(n: int) -> int:
    return n


@dramatiq.actor
def until(path: str) -> None:
    os.write(1, b"until begins\n")
    while not Path(path).exists():
        time.sleep(0.02)


@durable.activity
def double(n: int) -> int:
    return 2 * n


@durable.activity(max_retries=3, min_backoff=1, max_backoff=5)
def flaky(path: str) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    raise ValueError("as planned, once")


@durable.workflow(queue_name="flows")
async def order(path: str) -> int:
    added: list[int] = []

    def check(m: int) -> None:
        if m < 0:
            raise ValueError("as planned")

    @durable.on_update("add", validator=check)
    def add(m: int) -> int:
        added.append(m)
        return sum(added)

    await flaky.execute(path)
    await durable.sleep(0.3)
    await durable.wait_for_signal("go")
    await durable.escalate(role="clerk", subject="an order")
    return sum(added)


@durable.workflow(queue_name="flows")
async def drifts() -> None:
    # What no workflow may do: it depends on the process that it is replayed in.
    await double.execute(PID)
    await durable.wait_for_signal("go")


@durable.workflow(queue_name="flows")
async def breaks() -> Any:
    raise ValueError("as planned")


@durable.workflow(queue_name="flows")
async def keeps(n: int) -> int:
    doubled = await double.execute(n)
    await durable.wait_for_signal("go")
    return doubled


@durable.workflow(queue_name="flows")
async def waits() -> None:
    await durable.wait_for_signal("what never comes")


@durable.workflow(queue_name="flows")
async def again(n: int) -> int:
    if n:
        durable.continue_as_new(n - 1)
    await keeps.options(workflow_id=f"child-{durable.info().run_id}").start(n)
    return n


def forked() -> int:
    """For ``--fork-function``: a process beside the workers, which sends."""
    for n in range(7):
        count.send(n)
    broker.close()
    signal.pause()
    return 0


def main(shown: str, path: str) -> None:
    """One process of its own, until a SIGTERM."""
    reader: Any = None
    if shown == "otel":
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    worker = dramatiq.Worker(broker, worker_threads=4, worker_timeout=50)
    worker.start()
    print("is ready", flush=True)
    over.wait()
    worker.stop()
    broker.close()
    Path(path).write_text(_otel(reader) if shown == "otel" else _plain())


def _plain() -> str:
    from prometheus_client import CollectorRegistry, generate_latest

    from dramatiq_durable.metrics.prometheus import register

    registry = CollectorRegistry()
    register(registry)
    return generate_latest(registry).decode()


def _otel(reader: Any) -> str:
    """Samples as Prometheus has them: name, labels, value."""
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    samples: list[tuple[str, dict[str, str], float]] = []
    for metric in scope.metrics:
        for point in metric.data.data_points:
            if hasattr(point, "bucket_counts"):
                samples.append((f"{metric.name}_count", point.attributes, point.count))
                samples.append((f"{metric.name}_sum", point.attributes, point.sum))
            else:
                samples.append((metric.name, point.attributes, point.value))
    return json.dumps([(name, dict(labels), value) for name, labels, value in samples])


if __name__ == "__main__":
    main(*sys.argv[1:])
