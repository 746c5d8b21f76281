"""What real workers count is what has happened, as the database and the test know it: each counter, in each way to show
them."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import dramatiq_durable as durable
from dramatiq_durable import escalations, schedules
from dramatiq_durable.metrics import catalogue
from dramatiq_durable.metrics.catalogue import COUNTED, Metric
from tests.support import free_port, wait_until

from .test_real import broker, sql  # noqa: F401

MODULE = "tests.metrics.busy"
MESSAGE, ACTIVITY, TASK = {"kind": "message"}, {"kind": "activity"}, {"kind": "task"}

#: What the database writes by itself when it closes a run.
NOT_OF_A_STEP = ("WorkflowTerminated", "WorkflowTimedOut")


class Seen:
    """Samples of any of the three ways, less what was seen before."""

    def __init__(self, samples: list[tuple[str, dict[str, str], float]], before: Seen | None = None) -> None:
        self.values: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()
        for name, labels, value in samples:
            self.values[name, frozenset(labels.items())] += value  # type: ignore[assignment]
        if before is not None:
            self.values.subtract(before.values)

    def __call__(self, metric: Metric, suffix: str = "", **labels: str) -> float:
        names = {metric.name + suffix, metric.otel_name + suffix}
        return sum(v for (n, found), v in self.values.items() if n in names and labels.items() <= dict(found).items())

    def by(self, metric: Metric, *labels: str, suffix: str = "") -> dict[Any, float]:
        """Its values by some of its labels, without those that are 0."""
        names, found = {metric.name + suffix, metric.otel_name + suffix}, Counter[Any]()
        for (name, all_labels), value in self.values.items():
            if name in names:
                given = dict(all_labels)
                found[tuple(given[label] for label in labels)] += value  # type: ignore[assignment]
        return {key: value for key, value in found.items() if value}


class Worker:
    """A worker, and what it has counted."""

    def __init__(self, run_process: Any, shown: str, url: str, folder: Path) -> None:
        self.shown, self.folder, self.last = shown, folder, folder.with_suffix(".last")
        env = {"TEST_URL": url}
        if shown == "prometheus":
            folder.mkdir(exist_ok=True)
            env |= {
                "dramatiq_prom_port": str(free_port()),
                "dramatiq_prom_host": "127.0.0.1",
                "dramatiq_prom_db": str(folder),
                # Of the processes that --fork-function begins, Dramatiq sets it in none.
                "PROMETHEUS_MULTIPROC_DIR": str(folder),
            }
            options = ("--processes", "2", "--threads", "4", "--fork-function", f"{MODULE}:forked")
            self.process = run_process.dramatiq(f"{MODULE}:broker", *options, env=env)
            self.process.wait_for("_run_exposition_server' is ready")
        else:
            self.process = run_process(sys.executable, "-m", MODULE, shown, self.last, env=env)
            self.process.wait_for("is ready")

    def now(self, before: Seen | None = None) -> Seen:
        """What it has written; of one that writes at its end, nothing before."""
        if self.shown == "prometheus":
            try:
                families = MultiProcessCollector(CollectorRegistry(), str(self.folder)).collect()
            except struct.error:
                # A file of prometheus_client's own metrics is empty in the moment in which it is made.
                return self.now(before)
        elif not self.last.exists():
            return Seen([], before)
        elif self.shown == "otel":
            return Seen([tuple(s) for s in json.loads(self.last.read_text())], before)
        else:
            families = iter(list(text_string_to_metric_families(self.last.read_text())))
        return Seen([(s.name, s.labels, s.value) for f in families for s in f.samples], before)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("shown", ["prometheus", "plain", "otel"])
def test_what_is_counted_is_what_has_happened(
    run_process: Any,
    database_url: str,
    broker: durable.DurableBroker,  # noqa: F811
    sql: Callable[..., list[tuple[Any, ...]]],  # noqa: F811
    tmp_path: Path,
    shown: str,
) -> None:
    def send(actor: str, *args: Any, queue: str = "default", delay: int | None = None, **options: Any) -> None:
        broker.enqueue(dramatiq.Message(queue, actor, args, {}, options), delay=delay)

    def begin(workflow: str, id: str, *args: Any, **options: Any) -> Any:
        stub = durable.workflow_stub(workflow, queue_name="flows", broker=broker)
        return stub.options(workflow_id=id, **options).start(*args)

    def number(query: str, *arguments: Any) -> int:
        return int(sql(query, *arguments)[0][0])

    forked = 7 if shown == "prometheus" else 0

    # The first worker is killed, with a message in its hands, and a run that it has in memory.
    folder = tmp_path / "metrics"
    first = Worker(run_process, shown, database_url, folder)
    if forked:
        wait_until(lambda: first.now()(catalogue.ACKED, stream="counted") == forked)
    drifting = begin("drifts", "drifting")
    wait_until(lambda: sql("SELECT 1 FROM durable.event WHERE type = 'ActivityCompleted'"))
    end = tmp_path / "end"
    send("until", str(end))
    first.process.wait_for("until begins")
    if forked:
        # It is written once a second.
        wait_until(lambda: first.now()(catalogue.CLAIMED, stream="default", kind="message") == 1)
        wait_until(lambda: first.now()(catalogue.STEPS, workflow="drifts", outcome="recorded") == 2)
    held = number("SELECT count(*) FROM durable.message WHERE lease_token IS NOT NULL")
    first.process.kill()
    before = first.now()
    if forked:
        assert before(catalogue.ENQUEUED, stream="counted", kind="message") == forked
        assert before.by(catalogue.STARTED, "workflow") == {("drifts",): 1}
        assert before(catalogue.ENQUEUED, stream="default", kind="activity") == 1

    # What waits for the second one is at least half a second old.
    broker.enqueue_many([dramatiq.Message("counted", "count", (n,), {}, {}) for n in range(300)])
    sent_at = time.time()
    time.sleep(0.5)  # a message has to get old
    started_at = time.time()
    second = Worker(run_process, shown, database_url, folder)
    second.process.wait_for("until begins", timeout=60)

    # A lease that is taken away, and given to it anew when it has found out.
    sql("UPDATE durable.message SET lease_token = gen_random_uuid() WHERE actor = 'until'")
    end.touch()
    for _ in range(20):
        send("fail")
    for n in range(5):
        pipe = dramatiq.Message("counted", "count", (n,), {}, {"pipe_ignore": True}).asdict()
        send("first", n, pipe_target=pipe)
    for n in range(10):
        send("count", n, queue="counted", delay=1000)
    for _ in range(3):
        send("nap", 0.2, queue="counted")
    send("nobody's")

    orders = [begin("order", f"order-{n}", str(tmp_path / f"flaky-{n}")) for n in range(6)]
    keeps = [begin("keeps", f"keeps-{n}", n) for n in range(12)]
    breaks = [begin("breaks", f"breaks-{n}") for n in range(3)]
    waits = [begin("waits", f"waits-{n}") for n in range(4)]
    timed = [begin("waits", f"timed-{n}", run_timeout=1) for n in range(2)]
    chain = begin("again", "again", 2)
    schedules.create("often", cron="* * * * * *", target=durable.activity_stub("double"), args=(1,), broker=broker)

    for order in orders:
        assert order.update("add", 3, timeout=30) == 3
        with pytest.raises(durable.UpdateRejected):
            order.update("add", -3, timeout=30)
        order.signal("go")
    opened = wait_until(lambda: (o := escalations.list(broker=broker)) and len(o) == len(orders) and o, timeout=30)
    for escalation in opened:
        escalations.resolve(escalation.id, "done", broker=broker)
    assert [order.result(timeout=30) for order in orders] == [3] * len(orders)
    # All are parked, and most of them not in memory any more.
    parked = (
        "SELECT count(*) FROM durable.run JOIN durable.event e USING (run_id) WHERE run.name = 'keeps' AND event_id = 3"
    )
    wait_until(lambda: number(parked) == len(keeps) + 1, timeout=30)
    children = [durable.get_handle(id, broker=broker) for (id,) in sql(
        "SELECT workflow_id FROM durable.run WHERE name = 'keeps' AND workflow_id LIKE 'child-%%'")]  # fmt: skip
    for handle in (*keeps, *children):
        handle.signal("go")
        handle.result(timeout=30)
    for handle in waits[:2]:
        handle.cancel()
    for handle in waits[2:]:
        wait_until(lambda h=handle: number(
            "SELECT count(*) FROM durable.message WHERE run_id = %s", h.describe().run_id) == 0)  # type: ignore[misc]  # fmt: skip
        handle.terminate()
    for handle in (*waits, *timed, *breaks):
        with pytest.raises(durable.DurableError):
            handle.result(timeout=30)
    assert chain.result(timeout=30) == 0
    drifting.signal("go")
    second.process.wait_for("is nondeterministic", timeout=30, count=2)
    wait_until(lambda: number("SELECT fired FROM durable.schedule") >= 3, timeout=30)
    schedules.pause("often", broker=broker)
    fired = number("SELECT fired FROM durable.schedule")
    # What remains is the task of the run that drifts.
    wait_until(lambda: number("SELECT count(*) FROM durable.message WHERE kind NOT IN ('c', 't')") == 0, timeout=30)
    drifting.terminate()
    assert second.process.stop() == 0
    seen = second.now(before)

    # --- messages ---
    drifted = second.process.output.count("is nondeterministic")
    scheduled = sql("SELECT e.name, count(*) FROM durable.event e JOIN durable.run r USING (run_id)"
                    " WHERE e.type = 'ActivityScheduled' AND r.name <> 'drifts' GROUP BY 1")  # fmt: skip
    activities = sum(count for _, count in scheduled)
    assert dict(scheduled) == {"double": len(keeps) + 1, "flaky": len(orders)}
    counted = 300 + 5 + 10 + 3 + forked
    truth: dict[Metric, dict[Any, float]] = {
        catalogue.ENQUEUED: {
            ("counted", "message"): 5 + forked,
            ("default", "message"): fired,
            ("default", "activity"): activities,
        },
        catalogue.RETRIED: {
            ("default", "message"): 20,
            ("default", "activity"): len(orders),
            ("flows", "task"): drifted,
        },
        catalogue.DEAD_LETTERED: {("default", "message"): 21},
        catalogue.STALE: {("default", "message"): 1},
    }
    # A step that met another one comes again.
    refused = seen(catalogue.RETRIED, stream="flows", kind="task") - drifted
    assert 0 <= refused <= seen(catalogue.STEPS, outcome="refused")
    truth[catalogue.RETRIED]["flows", "task"] += refused
    for metric, expected in truth.items():
        assert seen.by(metric, "stream", "kind") == expected, metric.name
    acked = seen.by(catalogue.ACKED, "stream", "kind")
    assert acked["counted", "message"] == counted
    assert acked["default", "message"] == 5 + 1 + fired
    assert acked["default", "activity"] == activities
    claimed = seen.by(catalogue.CLAIMED, "stream", "kind")
    ended: Counter[Any] = Counter(acked)
    for metric in (catalogue.RETRIED, catalogue.DEAD_LETTERED, catalogue.STALE, catalogue.RELEASED):
        ended.update(seen.by(metric, "stream", "kind"))
    assert claimed == dict(ended)
    assert seen.by(catalogue.WAIT, "stream", "kind", suffix="_count") == claimed
    assert seen.by(catalogue.RECLAIMED, "outcome") == {("returned",): held}
    waited = seen(catalogue.WAIT, "_sum", stream="counted", kind="message")
    assert 300 * (started_at - sent_at) < waited < 400 * (time.time() - sent_at)
    processed = seen.by(catalogue.PROCESSING, "stream", "actor", suffix="_count")
    assert processed == {
        ("counted", "count"): counted - 3,
        ("counted", "nap"): 3,
        ("default", "fail"): 40,
        ("default", "first"): 5,
        ("default", "until"): 2,
        ("default", "double"): fired + len(keeps) + 1,
        ("default", "flaky"): 2 * len(orders),
    }
    assert 0.6 < seen(catalogue.PROCESSING, "_sum", actor="nap") < 2

    # --- workflows ---
    of_steps = "FROM durable.event e JOIN durable.run r USING (run_id) WHERE r.name <> 'drifts'"
    events = sql(f"SELECT r.name, e.type, count(*) {of_steps} AND e.event_id > 1 AND e.type <> ALL (%s) GROUP BY 1, 2",
                 list(NOT_OF_A_STEP))  # fmt: skip
    recorded = {(name, type): float(count) for name, type, count in events}
    # What is rejected leaves no history.
    recorded["order", "UpdateRejected"] = len(orders)
    assert seen.by(catalogue.EVENTS, "workflow", "type") == recorded
    types = {type for _, type in recorded}
    assert {"SignalReceived", "UpdateAccepted", "TimerFired", "EscalationOpened", "ChildStarted"} <= types
    runs = {(n, s): float(c) for n, s, c in sql("SELECT name, status, count(*) FROM durable.run GROUP BY 1, 2")}
    assert runs == {
        ("order", "completed"): len(orders),
        ("keeps", "completed"): len(keeps) + 1,
        ("breaks", "failed"): 3,
        ("waits", "cancelled"): 2,
        ("waits", "terminated"): 2,
        ("waits", "timed_out"): 2,
        ("again", "continued_as_new"): 2,
        ("again", "completed"): 1,
        ("drifts", "terminated"): 1,
    }
    by_steps = {key: count for key, count in runs.items() if key[1] not in ("terminated", "timed_out")}
    assert seen.by(catalogue.CLOSED, "workflow", "status") == by_steps
    assert seen.by(catalogue.LIFE, "workflow", "status", suffix="_count") == by_steps
    for name, status, lived in sql(
        "SELECT name, status, sum(extract(epoch FROM closed_at - started_at)) FROM durable.run GROUP BY 1, 2"
    ):
        if (name, status) in by_steps:
            shows = seen(catalogue.LIFE, "_sum", workflow=name, status=status)
            assert abs(shows - float(lived)) < 0.1 * by_steps[name, status] + 0.05 * float(lived), (name, status)
    begun = {(name,): float(count) for name, count in sql("SELECT name, count(*) FROM durable.run GROUP BY 1")}
    assert seen.by(catalogue.STARTED, "workflow") == {key: n for key, n in begun.items() if key != ("drifts",)}
    assert seen.by(catalogue.NONDETERMINISM, "workflow") == {("drifts",): drifted}
    assert seen.by(catalogue.FAILURES, "workflow", "reason") == {("drifts", "nondeterminism"): drifted}
    # Each time, it was read anew: its first event, the activity, its end.
    assert seen(catalogue.REPLAYED, workflow="drifts") == 3 * drifted
    # The last look may have found it terminated.
    assert seen(catalogue.CACHE, workflow="drifts", result="miss") - drifted in (0, 1)
    evicted = seen(catalogue.CACHE, workflow="keeps", result="miss") - len(keeps) - 1
    assert evicted >= 8
    # When its activity ended, there were two events; when its signal came, three.
    assert 2 * evicted <= seen(catalogue.REPLAYED, workflow="keeps") <= 3 * evicted
    timers = number(f"SELECT count(*) {of_steps} AND e.type = 'TimerFired'")
    assert timers == len(orders)
    assert 0 <= seen(catalogue.TIMERS, "_count", stream="flows") - timers <= refused
    assert seen(catalogue.TIMERS, "_sum") < 5 * timers
    assert fired <= seen(catalogue.SCHEDULES, "_count", stream="default") <= 2 * fired + 5

    # --- the database ---
    commits = seen(catalogue.TRIPS, kind="group_commit")
    assert commits == seen(catalogue.COMMIT, "_count") == seen(catalogue.BATCH, "_count") > 0
    assert seen(catalogue.BATCH, "_sum") >= sum(claimed.values())
    assert seen(catalogue.TRIPS, kind="call") == seen(catalogue.CALL, "_count")
    for procedure, least in (("register_worker", 1), ("history_of_lease", drifted), ("reclaim", 1)):
        assert seen(catalogue.CALL, "_count", procedure=procedure) >= least
    assert 0 < seen(catalogue.COMMIT, "_sum") < 60
    assert not seen.by(catalogue.ERRORS, "sqlstate_class")
    shapes = {m.name for m in COUNTED} | {m.otel_name for m in COUNTED}
    names = {name.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket") for name, _ in seen.values}
    assert {n for n in names if n.startswith("dramatiq_durable") and not n.endswith("_created")} <= shapes
