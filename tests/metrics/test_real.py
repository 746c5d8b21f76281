"""A real workload with failures, in real `dramatiq` processes: what the catalogue names is shown, and nothing else."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import dramatiq_durable as durable
from dramatiq_durable import escalations, schedules
from dramatiq_durable.metrics import catalogue
from dramatiq_durable.metrics.catalogue import COUNTED, EXPORTER, GAUGES, PREFIX
from dramatiq_durable.watchdog import Watchdog
from tests.support import free_port, wait_until

MODULE = "tests.metrics.application"


class Samples:
    """Samples as they are exposed, of ours only."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self.all = [s for family in families for s in family.samples if s.name.startswith(PREFIX)]

    @classmethod
    def at(cls, port: int) -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return cls(iter(list(text_string_to_metric_families(answer.read().decode()))))

    def __call__(self, metric: catalogue.Metric | str, suffix: str = "", **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        name = (metric if isinstance(metric, str) else metric.name) + suffix
        return sum(s.value for s in self.all if s.name == name and labels.items() <= s.labels.items())

    def shapes(self) -> set[tuple[str, tuple[str, ...]]]:
        """The name and the labels of everything that is there, without what makes a histogram."""
        found = set()
        for s in self.all:
            name = s.name.removesuffix("_created")
            for suffix in ("_bucket", "_count", "_sum"):
                name = name.removesuffix(suffix)
            found.add((name, tuple(sorted(set(s.labels) - {"le"}))))
        return found


def shapes(metrics: tuple[catalogue.Metric, ...]) -> set[tuple[str, tuple[str, ...]]]:
    return {(m.name, tuple(sorted(("namespace", *m.labels)))) for m in metrics}


@pytest.fixture
def broker(database_url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(database_url, middleware=[])
    for queue in ("default", "counted", "flows"):
        broker.declare_queue(queue)
    yield broker
    broker.close()


@pytest.fixture
def sql(database_url: str) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    with psycopg.connect(database_url, autocommit=True) as conn:

        def sql(query: str, *arguments: Any) -> list[tuple[Any, ...]]:
            cursor = conn.execute(query.encode(), arguments)
            return cursor.fetchall() if cursor.description else []

        yield sql


@pytest.mark.timeout(240)
def test_all_of_the_catalogue_and_nothing_else(
    run_process: Any, database_url: str, broker: durable.DurableBroker, sql: Any, tmp_path: Path
) -> None:
    port = free_port()
    env = {
        "TEST_URL": database_url,
        "dramatiq_prom_port": str(port),
        "dramatiq_prom_host": "127.0.0.1",
        "dramatiq_prom_db": str(tmp_path),
        # A worker has more than it runs, and gives that back.
        "dramatiq_queue_prefetch": "8",
    }

    def start(*options: str) -> Any:
        process = run_process.dramatiq(f"{MODULE}:broker", "--threads", "2", *options, env=env)
        process.wait_for("_run_exposition_server' is ready")
        return process

    def send(actor: str, *args: Any) -> None:
        broker.enqueue(dramatiq.Message("default", actor, args, {}, {}))

    def begin(workflow: str, *args: Any) -> Any:
        stub = durable.workflow_stub(workflow, queue_name="flows", broker=broker)
        return stub.options(workflow_id=f"{workflow}-1").start(*args)

    # The first worker is killed: with a run that the next has to replay, and a message in its hands.
    first = start("--processes", "1")
    drifting = begin("drifts")
    wait_until(lambda: sql("SELECT 1 FROM durable.event WHERE type = 'ActivityCompleted'"))
    end = tmp_path / "end"
    send("until", str(end))
    first.wait_for("until begins")
    first.kill()

    # The next one makes up for it.
    second = start("--processes", "2")
    broker.enqueue_many([dramatiq.Message("counted", "count", (n,), {}, {}) for n in range(200)])
    second.wait_for("until begins", timeout=60)
    drifting.signal("go")
    handle = begin("order", 4)
    begin("breaks")
    send("fail")
    send("nobody's")
    schedules.create("often", cron="* * * * * *", target=durable.activity_stub("double"), args=(1,), broker=broker)
    assert handle.update("add", 3) == 3
    handle.signal("go")
    (escalation,) = wait_until(lambda: escalations.list(broker=broker))
    escalations.resolve(escalation.id, "done", broker=broker)
    assert handle.result(timeout=30) == 11

    # A lease that is lost, connections that are, and messages that are given back.
    sql("UPDATE durable.message SET lease_token = gen_random_uuid() WHERE actor = 'until'")
    end.touch()
    wait_until(lambda: Samples.at(port)(catalogue.STALE) == 1)
    sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'dramatiq_durable'")
    wait_until(lambda: Samples.at(port)(catalogue.ERRORS) > 0, timeout=30)
    wait_until(lambda: Samples.at(port)(catalogue.NONDETERMINISM, workflow="drifts") > 0, timeout=30)
    wait_until(lambda: Samples.at(port)(catalogue.SCHEDULES, "_count") > 0, timeout=30)
    wait_until(lambda: sql("SELECT count(*) FROM durable.message WHERE actor = 'until'") == [(0,)], timeout=30)
    end.unlink()
    slow = [dramatiq.Message("default", "until", (str(end),), {}, {}) for _ in range(20)]
    broker.enqueue_many(slow)
    leased = "SELECT count(*) FROM durable.message WHERE lease_token IS NOT NULL"
    wait_until(lambda: sql(leased)[0][0] >= 12, timeout=30)
    seen = Samples.at(port)
    second.signal(15)
    wait_until(lambda: sql(leased)[0][0] <= 4)
    end.touch()
    assert second.wait() == 0

    # What the processes wrote last is there as well.
    last = Samples(iter(MultiProcessCollector(CollectorRegistry(), str(tmp_path)).collect()))
    assert last.shapes() == shapes(COUNTED)
    assert {s.labels["namespace"] for s in last.all} == {"durable"}

    for samples in (seen, last):
        for metric, labels in (
            (catalogue.CLAIMED, {"stream": "counted", "kind": "message"}),
            (catalogue.ACKED, {"stream": "counted", "kind": "message"}),
        ):
            assert samples(metric, **labels) == 200
        assert samples(catalogue.WAIT, "_count", stream="counted", kind="message") == 200
        assert samples(catalogue.PROCESSING, "_count", stream="counted", actor="count") == 200
        assert samples(catalogue.PROCESSING, "_bucket", stream="counted", actor="count", le="+Inf") == 200
        assert samples(catalogue.PROCESSING, "_count", actor="nobody's") == 0
        assert samples(catalogue.RETRIED, stream="default", kind="message") >= 1
        assert samples(catalogue.DEAD_LETTERED, stream="default") == 2
        assert samples(catalogue.STARTED, workflow="order") == samples(catalogue.STARTED, workflow="breaks") == 1
        assert samples(catalogue.CLOSED, workflow="order", status="completed") == 1
        assert samples(catalogue.CLOSED, workflow="breaks", status="failed") == 1
        assert samples(catalogue.LIFE, "_count", workflow="order") == 1
        assert samples(catalogue.EVENTS, workflow="order", type="SignalReceived") == 1
        assert samples(catalogue.EVENTS, workflow="order", type="UpdateAccepted") == 1
        assert samples(catalogue.EVENTS, workflow="order", type="EscalationOpened") == 1
        assert samples(catalogue.TIMERS, "_count", stream="flows") >= 1
        assert samples(catalogue.RECLAIMED, outcome="returned") >= 1
        assert samples(catalogue.REPLAYED, workflow="drifts") >= 1
        assert samples(catalogue.CACHE, workflow="drifts", result="miss") >= 2
        assert samples(catalogue.TRIPS, kind="group_commit") == samples(catalogue.COMMIT, "_count")
        assert samples(catalogue.TRIPS, kind="call") == samples(catalogue.CALL, "_count")
    assert last(catalogue.RELEASED, stream="default") > seen(catalogue.RELEASED, stream="default")


@pytest.mark.timeout(240)
def test_the_exporter_shows_all_gauges_and_nothing_else(
    run_process: Any, database_url: str, broker: durable.DurableBroker, sql: Any, tmp_path: Path
) -> None:
    worker = run_process.dramatiq(
        f"{MODULE}:broker", "--processes", "1", "--threads", "2", env={"TEST_URL": database_url}
    )
    handle = durable.workflow_stub("order", queue_name="flows", broker=broker).options(workflow_id="o").start(1)
    handle.signal("go")
    wait_until(lambda: escalations.list(broker=broker), timeout=30)
    end = tmp_path / "end"
    broker.enqueue(dramatiq.Message("default", "fail", (), {}, {}))
    wait_until(lambda: sql("SELECT count(*) FROM durable.dead_letter") == [(1,)])
    for name, args in (("until", (str(end),)), ("until", (str(end),)), *[("count", (1,))] * 5):
        broker.enqueue(dramatiq.Message("default", name, args, {}, {}))
    broker.enqueue(dramatiq.Message("default", "count", (1,), {}, {}), delay=3_600_000)
    worker.wait_for("until begins", count=2)
    with_watchdog = Watchdog(broker.database)
    with_watchdog.look()
    with_watchdog.close()
    made = durable.provision_worker_role(database_url, name="watching", kind="monitor", expires="1 day")
    command = ["-m", "dramatiq_durable.cli", "--url", made.url, "exporter", "--listen", "127.0.0.1:0"]
    exporter = run_process(sys.executable, *command, "--interval", "0.2s")
    port = int(exporter.wait_for("listening on").rpartition(":")[2].partition("/")[0])
    seen = wait_until(lambda: (s := Samples.at(port))("dramatiq_durable_stream_leased_messages") >= 2 and s)
    assert seen.shapes() == shapes((*EXPORTER, *GAUGES))

    def gauge(name: str, **labels: str) -> float:
        return seen(PREFIX + name, **labels)

    assert gauge("up") == 1
    assert gauge("stream_dead_letters", stream="default", reason="rejected") == 1
    assert gauge("stream_delayed_messages", stream="default") == 1
    # Prefetched ones are leased, or given back.
    assert gauge("stream_ready_messages", stream="default") + gauge("stream_leased_messages", stream="default") == 7
    assert gauge("workflow_runs", status="running") == gauge("escalations", role="clerk", status="waiting") == 1
    assert gauge("workers", state="live") == gauge("stream_workers", stream="flows") == 1
    assert gauge("worker_threads") == 2
    assert gauge("table_bytes", table="message") > 8192
    assert gauge("notification_queue_ratio") < 0.5

    worker.kill()
    wait_until(lambda: Samples.at(port)("dramatiq_durable_workers", state="silent") == 1)
    sql("UPDATE durable.login SET expires_at = now() - interval '1 second' WHERE principal_id IN"
        " (SELECT principal_id FROM durable.principal WHERE name = 'watching')")  # fmt: skip
    # Without an answer there are no old figures.
    seen = wait_until(lambda: (s := Samples.at(port))("dramatiq_durable_up") == 0 and s)
    assert seen.shapes() == shapes(EXPORTER)
    assert exporter.stop() == 0
