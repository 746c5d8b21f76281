"""Runs that follow each other, at the boundaries: two transactions meet, and one of them wins."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Uuid
from dramatiq_durable.operations import Advance, ExpireRun, ResetRun
from tests.support import wait_until

from .api import Session, derived, in_background, new_id, send_activity, send_timer, start_child, step
from .test_advance import begin
from .test_plans import counting, fill

Connect = Callable[..., Session]


def following(run: bytes) -> bytes:
    """The id of the run that goes on for one."""
    return derived(run, "next")  # type: ignore[arg-type]


def continuing(task: Any, expected: int = 1, **facts: Any) -> Advance:
    event = ("WorkflowContinuedAsNew", None, "wf", b"[2]", {"facts": {"memo": {"a": 1}}, **facts})
    return step(task, expected, event, close="continued_as_new")


def blocked(db: Session, session: Session) -> bool:
    return bool(db.value("SELECT cardinality(pg_blocking_pids(%s)) > 0", session.pid))


def test_the_next_run_has_what_is_said_and_nothing_else(db: Session) -> None:
    begun = begin(db)
    assert begun.worker.advance(continuing(begun.task)) == ["ok"]
    nxt = following(begun.run)
    assert db.run(begun.run) == ("continued_as_new", 2)
    assert db.run(nxt) == ("running", 1)
    ((type, payload, attributes),) = db.sql(
        "SELECT type, payload, attributes FROM durable.event WHERE run_id = %s", Uuid(nxt)
    )
    assert (type, payload) == ("WorkflowStarted", b"[2]")
    before = str(uuid.UUID(bytes=begun.run))
    assert attributes == {"memo": {"a": 1}, "previous": before, "first": before}
    rows = db.sql("SELECT workflow_id, first_run_id, next_run_id FROM durable.run WHERE run_id = %s", Uuid(nxt))
    assert rows == [("w", begun.run, None)]
    (task,) = begun.worker.claim()
    assert (task.run_id, task.kind) == (nxt, "s")


def test_signals_that_were_not_given_go_over_in_order(db: Session) -> None:
    """Those that the code left unread come first, then those that only the inbox knew."""
    begun = begin(db)
    for n in (b"1", b"2", b"3"):
        db.post(begun.run, name="n", payload=n)
    taken = [row[0] for row in db.inbox(begun.run)]
    first = step(begun.task, 1, *[("SignalReceived", None, "n", n) for n in (b"1", b"2", b"3")], inbox=taken)
    assert begun.worker.advance(first) == ["ok"]
    db.post(begun.run, name="n", payload=b"4")
    db.post(begun.run, type="CancelRequested")
    task = begun.worker.claim()[-1]
    assert begun.worker.advance(continuing(task, 4, unread=[4, 3])) == ["ok"]
    assert [(row[1], row[4]) for row in db.inbox(following(begun.run))] == [
        ("SignalReceived", b"2"),
        ("SignalReceived", b"3"),
        ("SignalReceived", b"4"),
        ("CancelRequested", b"1"),
    ]
    assert db.inbox(begun.run) == []


@pytest.mark.parametrize("by", ["run id", "workflow id"])
def test_a_signal_that_commits_first_holds_the_turn_up(connect: Connect, by: str) -> None:
    db, sender = connect(), connect()
    begun = begin(db)
    sender.begin()
    run, name = (begun.run, None) if by == "run id" else (None, "w")
    assert sender.post(run, workflow_id=name, payload=b"7") == "ok"
    turn = continuing(begun.task)
    assert begun.worker.advance(turn) == ["refused"]
    sender.commit()
    assert begun.worker.advance(turn) == ["ok"]
    assert [row[4] for row in db.inbox(following(begun.run))] == [b"7"]


@pytest.mark.parametrize("by", ["run id", "workflow id"])
@pytest.mark.parametrize("what", ["signal", "cancel", "terminate", "start"])
def test_what_comes_at_the_turn_reaches_the_next_run(connect: Connect, by: str, what: str) -> None:
    db, other, watcher = connect(), connect(), connect()
    begun = begin(db)
    run, name = (begun.run, None) if by == "run id" else (None, "w")
    db.begin()
    assert begun.worker.advance(continuing(begun.task)) == ["ok"]
    if what == "terminate":
        answer = in_background(lambda: other.terminate(run, name))
    elif what == "start":
        answer = in_background(lambda: other.start(begun.stream, "w")[0])
    else:
        type = "SignalReceived" if what == "signal" else "CancelRequested"
        answer = in_background(lambda: other.post(run, workflow_id=name, type=type))
    wait_until(lambda: blocked(watcher, other))
    db.commit()
    assert answer() == ("exists" if what == "start" else "ok")
    status, _ = db.run(following(begun.run))
    assert status == ("terminated" if what == "terminate" else "running")
    assert len(db.inbox(following(begun.run))) == (what in ("signal", "cancel"))
    assert db.value("SELECT count(*) FROM durable.run WHERE status = 'running'") == (what != "terminate")


def test_the_same_key_is_one_signal_in_the_whole_chain(db: Session) -> None:
    begun = begin(db)
    assert db.post(begun.run, key="k") == "ok"
    assert begun.worker.advance(continuing(begun.task)) == ["ok"]
    assert db.post(begun.run, key="k") == "duplicate"
    assert db.post(None, workflow_id="w", key="k") == "duplicate"
    assert db.post(following(begun.run), key="other") == "ok"
    assert len(db.inbox(following(begun.run))) == 2


def test_a_cancel_of_a_child_at_its_turn_is_tried_again(connect: Connect) -> None:
    """The parent's step is not committed without it, and does not wait."""
    db, other = connect(), connect()
    begun = begin(db)
    first = step(begun.task, 1, ("ChildStarted", 1, "child"))
    first.children = [start_child(begun.stream, 1, "c")]
    begun.worker.advance(first)
    child_task = begun.worker.one()
    assert child_task.run_id is not None
    db.post(begun.run)
    task = begun.worker.one()
    child_worker = begun.worker.over(other)
    other.begin()
    assert child_worker.advance(continuing(child_task)) == ["ok"]
    cancel = step(task, 2, ("ChildCancelRequested", 1, "child"), cancels=[1])
    with pytest.raises(psycopg.errors.LockNotAvailable):
        begun.worker.advance(cancel)
    other.commit()
    assert begun.worker.advance(cancel) == ["ok"]
    assert [row[1] for row in db.inbox(following(child_task.run_id))] == ["CancelRequested"]


def test_the_parent_and_the_followers_hear_the_last_of_the_chain(db: Session) -> None:
    begun = begin(db)
    first = step(begun.task, 1, ("ChildStarted", 1, "child"))
    first.children = [start_child(begun.stream, 1, "c")]
    begun.worker.advance(first)
    child = begun.worker.one()
    _, follower = db.start(begun.stream, "follower")
    follows = step(begun.worker.one(), 1, ("ChildStarted", 7, "child"))
    follows.children = [start_child(begun.stream, 7, "c", id_conflict="use_existing")]
    assert begun.worker.advance(follows) == ["ok"]
    assert begun.worker.advance(continuing(child)) == ["ok"]
    assert db.inbox(begun.run) == db.inbox(follower) == []
    last = begun.worker.one()
    assert begun.worker.advance(step(last, 1, ("WorkflowCompleted", None, "c", b"1"), close="completed")) == ["ok"]
    assert [(*row[1:3], row[4]) for row in db.inbox(begun.run)] == [("ChildCompleted", 1, b"1")]
    assert [(*row[1:3], row[4]) for row in db.inbox(follower)] == [("ChildCompleted", 7, b"1")]
    assert db.value("SELECT count(*) FROM durable.follower") == 0


def test_who_asks_whether_its_child_was_started_is_told_in_the_same_step(db: Session) -> None:
    begun = begin(db)
    db.start(begun.stream, "taken")
    begun.worker.claim()
    asks = step(
        begun.task,
        1,
        ("ChildStarted", 1, "child"),
        ("ChildStartAwaited", 2, "child", None, {"child": 1}),
        ("ChildStarted", 3, "child"),
        ("ChildStartAwaited", 4, "child", None, {"child": 3}),
    )
    asks.children = [start_child(begun.stream, 1, "free"), start_child(begun.stream, 3, "taken")]
    assert begun.worker.advance(asks) == ["ok"]
    news = [(row[1], row[2], row[5]) for row in db.inbox(begun.run)]
    run_id = str(uuid.UUID(bytes=derived(begun.run, 1)))
    assert news == [
        ("ChildStartFailed", 3, {"workflow_id": "taken"}),
        ("ChildStartConfirmed", 2, {"child": 1, "run_id": run_id}),
    ]


# --- deadlines ------------------------------------------------------------------------------------------


def expire(begun: Any, deadline: Any) -> bool:
    return bool(begun.worker.operate(ExpireRun(deadline.message_id, deadline.lease)))


def test_a_deadline_meets_a_step(connect: Connect) -> None:
    db, other = connect(), connect()
    begun = begin(db)
    _, run = db.start(begun.stream, "short", options='{"run_timeout": 0}')
    deadline, task = sorted(begun.worker.claim(), key=lambda c: c.kind)
    assert (deadline.kind, task.kind) == ("e", "s")
    stepping = begun.worker.over(other)
    other.begin()
    assert stepping.advance(step(task, 1, ("TimerStarted", 1))) == ["ok"]
    assert expire(begun, deadline)
    assert db.run(run)[0] == "running"
    other.commit()
    (deadline,) = wait_until(begun.worker.claim)
    assert expire(begun, deadline)
    assert db.run(run) == ("timed_out", 3)
    assert db.value("SELECT count(*) FROM durable.message WHERE run_id = %s", Uuid(run)) == 0


@pytest.mark.parametrize("first", ["deadline", "close"])
def test_a_deadline_meets_the_end(db: Session, first: str) -> None:
    begun = begin(db)
    _, run = db.start(begun.stream, "short", options='{"run_timeout": 0}')
    deadline, task = sorted(begun.worker.claim(), key=lambda c: c.kind)
    closing = step(task, 1, ("WorkflowCompleted", None), close="completed")
    if first == "deadline":
        assert expire(begun, deadline)
        assert begun.worker.advance(closing) == ["refused"]
        assert db.run(run)[0] == "timed_out"
    else:
        assert begun.worker.advance(closing) == ["ok"]
        assert expire(begun, deadline)
        assert db.run(run)[0] == "completed"
    assert not expire(begun, deadline), "its lease is gone"


def test_children_end_with_the_deadline(db: Session) -> None:
    begun = begin(db)
    _, run = db.start(begun.stream, "short", options='{"run_timeout": 0}')
    deadline, task = sorted(begun.worker.claim(), key=lambda c: c.kind)
    first = step(task, 1, ("ChildStarted", 1, "child"))
    first.children = [start_child(begun.stream, 1, "c")]
    begun.worker.advance(first)
    assert expire(begun, deadline)
    assert db.run(derived(run, 1))[0] == "terminated"


@pytest.mark.parametrize(
    ("retry", "attempt"),
    [
        ('{"initial": 0, "coefficient": 2}', 2),
        ('{"initial": 0, "coefficient": 2, "attempts": 1}', None),
        ('{"initial": 1e300, "coefficient": 1000}', 2),
        ("null", None),
        ('"nonsense"', None),
    ],
)
def test_the_next_attempt(db: Session, retry: str, attempt: int | None) -> None:
    begun = begin(db)
    options = '{"memo": {"a": [1]}, "retry": ' + retry + "}"
    _, run = db.start(begun.stream, "r", options=options)
    task = begun.worker.one()
    # Postgres' operators take no json with a NUL or half of a surrogate pair, wherever it is.
    failure = {"message": "a\0b \\u0000 \\\0 \ud800 \ud83d\ude00", "retryable": True}
    closing = step(task, 1, ("WorkflowFailed", None, None, None, {"failure": failure}), close="failed")
    assert begun.worker.advance(closing) == ["ok"]
    rows = db.sql("SELECT attributes::text FROM durable.event WHERE run_id = %s", Uuid(following(run)))
    assert len(rows) == (attempt is not None)
    if attempt is not None:
        assert '"attempt" : 2' in rows[0][0]
        assert '"memo":{"a": [1]}' in rows[0][0].replace('"memo" : ', '"memo":')


# --- reset ----------------------------------------------------------------------------------------------


def test_two_resets_at_once_have_an_order(connect: Connect) -> None:
    db, other, watcher = connect(), connect(), connect()
    begun = begin(db)
    new = [new_id(), new_id()]
    db.begin()
    assert db.operate(ResetRun(begun.run, None, 1, new[0])) == new[0]
    answer = in_background(lambda: other.operate(ResetRun(begun.run, None, 1, new[1])))
    wait_until(lambda: blocked(watcher, other))
    db.commit()
    assert answer() == new[1]
    assert [db.run(run)[0] for run in (begun.run, *new)] == ["terminated", "terminated", "running"]


def test_a_reset_meets_a_step(connect: Connect) -> None:
    db, other, watcher = connect(), connect(), connect()
    begun = begin(db)
    new = new_id()
    db.begin()
    assert begun.worker.advance(step(begun.task, 1, ("TimerStarted", 1))) == ["ok"]
    answer = in_background(lambda: other.operate(ResetRun(begun.run, None, 1, new)))
    wait_until(lambda: blocked(watcher, other))
    db.commit()
    assert answer() == new
    assert db.run(begun.run)[0] == "terminated"
    # And the other way round: the step is the one that comes too late.
    task = next(c for c in begun.worker.claim() if c.kind == "s")
    assert other.operate(ResetRun(new, None, 1, new_id())) is not None
    assert begun.worker.advance(step(task, 1, ("TimerStarted", 1))) == ["refused"]


def test_a_reset_is_repeated_after_a_lost_answer(db: Session) -> None:
    begun = begin(db)
    new = new_id()
    for _ in range(2):
        assert db.operate(ResetRun(begun.run, None, 1, new)) == new
    assert db.value("SELECT count(*) FROM durable.run") == 2


@pytest.mark.parametrize("to_event", [0, -1, 99])
def test_a_reset_to_no_event_changes_nothing(db: Session, to_event: int) -> None:
    begun = begin(db)
    operation = ResetRun(begun.run, None, to_event, new_id())
    db.operate(operation)
    assert isinstance(operation.error, ValueError)
    assert db.run(begun.run) == ("running", 1)
    assert db.value("SELECT count(*) FROM durable.run") == 1


# --- plans ----------------------------------------------------------------------------------------------


def test_the_life_of_a_run_reads_few_rows(db: Session) -> None:
    begun = begin(db)
    db.sql(
        "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, parent_run_id, "
        "parent_seq) SELECT gen_random_uuid(), 'o-' || n, %s, 'wf', 'completed', now(), 1, gen_random_uuid(), n "
        "FROM generate_series(1, 20000) n",
        begun.stream,
    )
    fill(db, begun.stream)
    db.sql("ANALYZE durable.run, durable.message")
    first = step(begun.task, 1, ("ChildStarted", 1, "child"), ("TimerStarted", 2), ("ActivityScheduled", 3, "a"))
    first.children = [start_child(begun.stream, 1, "c", facts={"run_timeout": 60_000})]
    first.sends = [send_timer(begun.stream, 2), send_activity(begun.stream, 3)]
    with counting(db) as counted:
        assert begun.worker.advance(first) == ["ok"]
    assert all(table.cheap for table in counted.values()), counted
    db.post(begun.run, type="CancelRequested")
    task = next(c for c in begun.worker.claim() if c.kind == "t")
    with counting(db) as counted:
        cancel = step(task, 4, ("ChildCancelRequested", 1, "child"), cancels=[1])
        assert begun.worker.advance(cancel) == ["ok"]
    assert all(table.cheap for table in counted.values()), counted
    db.post(begun.run, type="CancelRequested")
    task = next(c for c in begun.worker.claim() if c.kind == "t" and c.run_id == begun.run)
    with counting(db) as counted:
        assert begun.worker.advance(continuing(task, 5)) == ["ok"]
    assert all(table.seq_scans == 0 and table.rows < 80 for table in counted.values()), counted


def test_the_first_run_of_a_live_chain_is_not_pruned(db: Session) -> None:
    """With it go the ids of the signals that the chain has had."""
    begun = begin(db)
    assert db.post(begun.run, key="k") == "ok"
    assert begun.worker.advance(continuing(begun.task)) == ["ok"]
    second = next(c for c in begun.worker.claim() if c.kind == "s")
    assert begun.worker.advance(continuing(second)) == ["ok"]
    third = following(following(begun.run))
    db.sql("UPDATE durable.run SET closed_at = closed_at - interval '9 days' WHERE status <> 'running'")
    prune = "SELECT runs FROM durable.prune_runs(clock_timestamp() - interval '1 day', NULL, NULL, 10)"
    assert db.value(prune) == 1, "the one in the middle"
    assert db.post(third, key="k") == "duplicate"
    assert db.terminate(third) == "ok"
    assert db.value(prune) == 1


def test_a_long_chain_is_not_followed_run_by_run(db: Session) -> None:
    begun = begin(db)
    first, task = begun.run, begun.task
    for _ in range(50):
        assert begun.worker.advance(continuing(task)) == ["ok"]
        task = begun.worker.one()
    with counting(db) as counted:
        assert db.call("get_run", Uuid(first), None)[0][-1] == task.run_id
        assert db.post(first) == "ok"
    assert all(table.cheap for table in counted.values()), counted
    assert len(db.inbox(task.run_id or b"")) == 1
