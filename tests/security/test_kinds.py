"""What each kind of principal may do with the streams that it was granted: a kind takes away, it never adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
import pytest

from dramatiq_durable.arrays import Texts, Uuid, Uuids
from tests.sql.api import Claimed, Session, send_activity, start_child, step

from .conftest import Grant
from .scene import ONE_TEXT, refusal
from .test_catalogue import MONITOR, WORKER

NOBODY = ("error", "DD001", ONE_TEXT, None, None)


class Mixed(NamedTuple):
    """A stream with one of each: messages, a run's task, an activity, a timer, a tick, a query, an alarm."""

    db: Session
    stream: int
    run: bytes


@pytest.fixture
def mixed(db: Session) -> Mixed:
    stream = db.stream("mine")
    _, run = db.start(stream, "theirs")
    worker = db.register(stream)
    advance = step(worker.one(), 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(stream, 1)]
    assert worker.advance(advance) == ["ok"]
    worker.call("unregister_worker")
    db.enqueue(stream, b"message")
    db.start(stream, "another")
    db.post(run)
    db.ask(run)
    db.schedule("tick", stream)
    return Mixed(db, stream, run)


def kinds(claimed: list[Claimed]) -> set[str]:
    return {c.kind for c in claimed}


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("application", {"m", "a", "s", "t", "q", "c"}),
        ("worker", {"m", "a", "s", "t", "q", "c"}),
        ("activity", {"m", "a", "c"}),
        ("workflow", {"s", "t", "q", "c"}),
    ],
)
def test_each_kind_claims_its_own(mixed: Mixed, grant: Grant, kind: str, taken: set[str]) -> None:
    worker = grant(consume=("mine",), kind=kind).register(mixed.stream)
    assert kinds(worker.claim()) == taken
    assert worker.claim() == []
    # What is left is there for others.
    everything = {"m", "a", "s", "t", "q", "c"}
    assert kinds(mixed.db.register(mixed.stream).claim()) == everything - taken


@pytest.mark.parametrize("kind", ["activity", "workflow"])
def test_behind_a_hundred_priorities_of_another_kind(db: Session, grant: Grant, kind: str) -> None:
    stream = db.stream("mine")
    count = 130
    if kind == "workflow":
        db.enqueue(stream, *[b""] * count, priority=list(range(-count, 0)))
        db.start(stream, "w")
    else:
        for n in range(count):
            db.start(stream, f"w{n}")
        db.sql("UPDATE durable.message SET priority = -2 - (random() * 1000000)::int WHERE kind = 's'")
        db.enqueue(stream, b"1")
    worker = grant(consume=("mine",), kind=kind).register(stream)
    assert kinds(worker.claim()) == {"s" if kind == "workflow" else "m"}


def look_into(session: Session, run: bytes | None, workflow_id: str | None) -> dict[str, Any]:
    """What shows something of a run, or ends it.  By workflow id where the procedure takes one."""
    ids = (None if workflow_id else Uuid(run or bytes(16)), workflow_id)
    calls: dict[str, Callable[[], Any]] = {
        "get_run": lambda: session.call("get_run", *ids),
        "list_children": lambda: session.call("list_children", *ids),
        "reset_run": lambda: session.call("reset_run", *session.batch(), *ids, 1, Uuid(bytes(16)), Texts(["x"])),
        "terminate_run": lambda: session.call("terminate_run", *session.batch(), *ids, "no"),
    }
    if run is not None:
        calls |= {
            "get_history": lambda: session.call("get_history", Uuid(run), 0),
            "await_run": lambda: session.call("await_run", Uuid(run), Uuid(bytes(16))),
            "pending_of": lambda: session.call("pending_of", Uuid(run)),
            "get_state": lambda: session.call("get_state", Uuid(run)),
            "read_output": lambda: session.call("read_output", Uuid(run), 0, 10, None, 0),
        }
    return {name: refusal(call) for name, call in calls.items()}


@pytest.mark.parametrize(
    ("kind", "grants"),
    [
        ("activity", {"consume": ("mine",)}),
        ("activity", {"consume": ("mine",), "produce": ("mine",)}),
        ("producer", {"produce": ("mine",)}),
        ("application", {"produce": ("mine",)}),
        ("worker", {"produce": ("mine",)}),
    ],
)
def test_whoever_does_not_run_a_workflow_sees_nothing_of_it(
    mixed: Mixed, grant: Grant, kind: str, grants: dict[str, tuple[str, ...]]
) -> None:
    session = grant(**grants, kind=kind)
    before = mixed.db.sql("SELECT * FROM durable.run ORDER BY 1"), mixed.db.sql("SELECT * FROM durable.waiter")
    missing = look_into(session, bytes(15) + b"\x01", None)
    assert look_into(session, mixed.run, None) == missing
    assert look_into(session, None, "theirs") == look_into(session, None, "none")
    assert session.call("list_workflows", "{}", False, True, None, None, 100) == []
    assert session.call("count_workflows", "{}", None, None) == []
    assert (
        mixed.db.sql("SELECT * FROM durable.run ORDER BY 1"),
        mixed.db.sql("SELECT * FROM durable.waiter"),
    ) == before


@pytest.mark.parametrize("kind", ["worker", "workflow", "application"])
def test_whoever_runs_a_workflow_sees_it(mixed: Mixed, grant: Grant, kind: str) -> None:
    session = grant(consume=("mine",), kind=kind)
    assert session.call("get_run", None, "theirs")[0][0] == mixed.run
    assert len(session.call("get_history", Uuid(mixed.run), 0)) == 2
    assert len(session.call("list_workflows", "{}", False, True, None, None, 100)) == 2
    assert session.terminate(mixed.run) == "ok"


@pytest.mark.parametrize("kind", ["producer", "application", "activity"])
def test_a_producer_sees_what_it_started_and_no_more(mixed: Mixed, grant: Grant, kind: str) -> None:
    session, other = (grant(produce=("mine",), kind=kind) for _ in range(2))
    assert session.start(mixed.stream, "own")[0] == "started"
    run = session.call("get_run", None, "own")[0][0]
    assert [r[1] for r in session.call("list_workflows", "{}", False, True, None, None, 100)] == ["own"]
    assert session.call("await_run", Uuid(run), Uuid(bytes(16))) == [("running",)]
    assert look_into(other, run, None) == look_into(other, bytes(15) + b"\x01", None)
    # Also what goes on for it; and no longer, once the grant is gone.
    mixed.db.sql("UPDATE durable.run SET principal_id = NULL WHERE run_id = %s", mixed.run.hex())
    assert session.terminate(run) == "ok"
    assert session.call("get_run", Uuid(run), None)[0][4] == "terminated"
    mixed.db.sql("DELETE FROM durable.stream_grant")
    assert session.call("get_run", Uuid(run), None) == []


def test_what_goes_on_for_a_run_is_its_starters_too(db: Session, grant: Grant) -> None:
    stream = db.stream("mine")
    session = grant(produce=("mine",), kind="producer")
    _, run = session.start(stream, "own")
    worker = db.register(stream)
    advance = step(worker.one(), 1, ("WorkflowContinuedAsNew", None, "wf", None, {"facts": {}}))
    advance.close = "continued_as_new"
    assert worker.advance(advance) == ["ok"]
    (row,) = session.call("get_run", None, "own")
    assert row[0] != run
    assert row[4] == "running"
    new = bytes(6) + b"\x40" + bytes(8) + b"\x05"
    assert session.call("reset_run", *session.batch(), Uuid(row[0]), None, 1, Uuid(new), Texts(["WorkflowStarted"]))[0][
        0
    ] in ("ok", "invalid")


def test_speaking_to_a_run_needs_one_of_the_two_rights(mixed: Mixed, grant: Grant) -> None:
    for kind, grants, may in (
        ("producer", {"produce": ("mine",)}, True),
        ("workflow", {"consume": ("mine",)}, True),
        ("activity", {"consume": ("mine",)}, False),
        ("activity", {"consume": ("mine",), "produce": ("mine",)}, True),
    ):
        session = grant(**grants, kind=kind)
        for run, workflow_id in ((mixed.run, None), (None, "theirs")):
            assert session.post(run, workflow_id=workflow_id) == ("ok" if may else "missing")
            assert session.update(run, f"u{kind}{may}{run is None}", workflow_id=workflow_id) == (
                "ok" if may else "missing"
            )
            assert session.ask(run, workflow_id=workflow_id)[1] is may


@pytest.mark.parametrize("kind", ["worker", "workflow", "activity", "application"])
def test_starting_needs_the_right_to_produce(mixed: Mixed, grant: Grant, kind: str) -> None:
    session = grant(consume=("mine",), kind=kind)
    before = mixed.db.sql("SELECT count(*) FROM durable.run")
    assert session.start(mixed.stream, "new")[0] == "denied"
    assert session.start_with(mixed.stream, "new", "SignalReceived", "k")[0] == "denied"
    assert refusal(lambda: session.sql("SELECT durable.start_workflow('mine', 'w')")) == NOBODY
    assert session.enqueue(mixed.stream, b"x") == [-1]
    assert mixed.db.sql("SELECT count(*) FROM durable.run") == before


def test_a_start_ends_no_run_that_the_starter_may_not_end(mixed: Mixed, grant: Grant) -> None:
    session, reader = grant(produce=("mine",)), grant(consume=("mine",), produce=("mine",))
    end = "terminate_existing"
    assert session.start(mixed.stream, "theirs", conflict=end)[0] == "denied"
    assert (
        refusal(
            lambda: session.sql(
                "SELECT durable.start_workflow('mine', 'w', '[]', '{}', 'theirs', 'terminate_existing')"
            )
        )
        == NOBODY
    )
    assert mixed.db.run(mixed.run)[0] == "running"
    assert session.start(mixed.stream, "own")[0] == "started"
    assert session.start(mixed.stream, "own", conflict=end)[0] == "started"
    assert reader.start(mixed.stream, "theirs", conflict=end)[0] == "started"
    assert mixed.db.run(mixed.run)[0] == "terminated"


@pytest.mark.parametrize("conflict", ["terminate_existing", "use_existing"])
def test_a_child_neither_ends_nor_follows_what_its_parents_worker_may_not_see(
    db: Session, grant: Grant, conflict: str
) -> None:
    mine, out = db.stream("mine"), db.stream("out")
    _, victim = db.start(out, "order")
    session = grant(consume=("mine",), produce=("out",), kind="worker")
    db.start(mine, "parent")
    worker = session.register(mine)
    advance = step(worker.one(), 1, ("ChildStarted", 1, "wf"))
    advance.children = [start_child(out, 1, "order", id_conflict=conflict)]
    assert worker.advance(advance) == ["ok"]
    assert db.run(victim)[0] == "running"
    assert db.sql("SELECT count(*) FROM durable.follower") == [(0,)]
    assert [c.kind for c in worker.claim()] == ["t"]
    assert db.value("SELECT type FROM durable.inbox WHERE seq = 1") == "ChildStartFailed"


def test_an_activitys_worker_takes_no_step_of_its_run(mixed: Mixed, grant: Grant) -> None:
    worker = grant(consume=("mine",), produce=("mine",), kind="activity").register(mixed.stream)
    (activity,) = (c for c in worker.claim() if c.kind == "a")
    lease = Uuid(activity.message_id), Uuid(activity.lease)
    assert worker.call("run_of_lease", *lease) == []
    assert worker.call("history_of_lease", *lease, 0) == []
    before = mixed.db.events(mixed.run)
    assert worker.advance(step(activity, mixed.db.run(mixed.run)[1], ("ActivityCompleted", 1))) == ["refused"]
    assert mixed.db.events(mixed.run) == before
    assert worker.complete(activity) == []


def test_a_workflows_worker_is_handed_no_activity(mixed: Mixed, grant: Grant) -> None:
    worker = grant(consume=("mine",), kind="workflow").register(mixed.stream)
    (task,) = (c for c in worker.claim() if c.kind == "s")
    advance = step(task, 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(mixed.stream, 1, eager=True)]
    assert worker.advance(advance) == ["ok"]
    row = mixed.db.sql("SELECT worker_id FROM durable.message WHERE kind = 'a' AND run_id = %s", task.run_id.hex())
    assert row == [(None,)]


def test_an_activitys_worker_aborts_nothing(mixed: Mixed, grant: Grant) -> None:
    (message,) = mixed.db.sql("SELECT message_id FROM durable.message WHERE kind = 'm'")[0]
    session = grant(consume=("mine",), kind="activity")
    assert session.call("abort_message", Uuids([message]), True) == [("missing",)]


def test_a_tick_of_runs_does_not_show_their_input(db: Session, grant: Grant) -> None:
    stream = db.stream("mine")
    db.schedule("tick", stream, kind="s", template=b"secret")
    worker = grant(consume=("mine",), kind="activity").register(stream)
    (tick,) = worker.claim()
    assert b"secret" not in repr(worker.look_up(tick)).encode()


# --- monitors ---------------------------------------------------------------------------------------------


def test_a_monitor_counts(mixed: Mixed, grant: Grant) -> None:
    session = grant(kind="monitor")
    (row,) = session.call("stream_counts")
    assert row[0] == "mine"
    assert session.call("list_workers") == []
    assert ("stream_paused", "mine", None, 0.0) in session.call("read_gauges", 100)
    assert [row[:2] for row in session.call("stream_rates", 10.0, 100)] == [("mine", 0.0)]
    assert session.call("stream_is_empty", mixed.stream) == [(False,)]
    assert session.call("queue_counts", mixed.stream)[0][0] > 0


def test_a_monitor_may_do_nothing_else(mixed: Mixed, grant: Grant) -> None:
    session = grant(kind="monitor")
    functions = session.sql(
        "SELECT p.proname::text, (SELECT coalesce(array_agg(format_type(t, NULL) ORDER BY n), '{}') "
        "FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY u (t, n)) "
        "FROM pg_proc p WHERE p.pronamespace = 'durable'::regnamespace"
    )
    harmless = {"schema_version", "namespace_identity", "batch_outcome", "count_escalations"}
    for name, types in functions:
        if name in WORKER - MONITOR - harmless:
            arguments = ", ".join(f"'{{}}'::{t}" if t.endswith("[]") else f"NULL::{t}" for t in types)
            try:
                answer = session.sql(f"SELECT * FROM durable.{name}({arguments})")
            except psycopg.Error:
                continue
            assert all(value in (None, -1, False, "missing") for row in answer for value in row), (name, answer)
    for call in (
        lambda: session.stream("mine"),
        lambda: session.register(mixed.stream),
        lambda: session.register(),
        lambda: session.post(mixed.run),
        lambda: session.call("get_run", Uuid(mixed.run), None),
        lambda: session.enqueue(mixed.stream, b"x"),
        lambda: session.start(mixed.stream, "x"),
        lambda: session.call("list_escalations", None, None, None, None, None, None, 10),
        lambda: session.call("list_workflows", "{}", False, True, None, None, 100),
        lambda: session.call("open_streams", Texts([])),
    ):
        assert refusal(call) == NOBODY
    assert session.enqueue_one(mixed.stream) == -1


@pytest.mark.parametrize("kind", ["worker", "activity", "workflow", "producer", "application"])
def test_others_are_no_monitors(mixed: Mixed, grant: Grant, kind: str) -> None:
    session = grant(consume=() if kind == "producer" else ("mine",), produce=("mine",), kind=kind)
    foreign = mixed.db.stream("foreign")
    for call in (
        lambda: session.call("stream_counts"),
        lambda: session.call("list_workers"),
        lambda: session.call("read_gauges", 100),
        lambda: session.call("stream_rates", 10.0, 100),
        lambda: session.call("stream_is_empty", foreign),
        lambda: session.call("queue_counts", foreign),
        lambda: session.call("stream_is_empty", 2**31 - 1),
        lambda: session.call("queue_counts", 2**31 - 1),
    ):
        assert refusal(call)[1] == "DD001"
    if kind != "producer":
        # Whoever consumes a stream may count what is there.
        assert session.call("stream_is_empty", mixed.stream) == [(False,)]
        assert session.call("queue_counts", mixed.stream)[0][0] > 0


@pytest.mark.parametrize("kind", ["producer", "monitor"])
def test_who_takes_nothing_is_no_worker(mixed: Mixed, grant: Grant, kind: str) -> None:
    session = grant(produce=("mine",), kind=kind)
    assert refusal(lambda: session.register(mixed.stream)) == NOBODY
    assert refusal(lambda: session.register()) == NOBODY
    assert mixed.db.sql("SELECT count(*) FROM durable.worker") == [(0,)]
