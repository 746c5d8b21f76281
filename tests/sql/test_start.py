from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.support import wait_until

from .api import Session, derived, in_background, new_id, step


def complete(db: Session, stream: int, run: bytes) -> None:
    worker = db.register(stream)
    task = next(c for c in worker.claim() if c.run_id == run)
    assert worker.advance(step(task, db.run(run)[1], ("WorkflowCompleted", None), close="completed")) == ["ok"]
    worker.call("unregister_worker")


def test_a_start_stores_run_event_and_task(db: Session) -> None:
    stream, run = db.stream(), new_id()
    assert db.start(stream, "order-1", run=run, name="order") == ("started", run)
    assert db.run(run) == ("running", 1)
    assert db.events(run) == ["WorkflowStarted"]
    task = db.register(stream).one()
    assert (task.message_id, task.kind, task.run_id, task.actor, task.payload) == (run, "s", run, "order", b"")


def test_a_delayed_start(db: Session) -> None:
    stream = db.stream()
    db.start(stream, "w", delay=60_000)
    assert db.register(stream).claim() == []


def test_the_same_run_id_is_the_same_run(db: Session) -> None:
    stream, run = db.stream(), new_id()
    for reuse in ("allow", "reject", "allow_failed"):
        assert db.start(stream, "w", run=run, reuse=reuse) == ("started", run)
    complete(db, stream, run)
    assert db.start(stream, "w", run=run, reuse="reject") == ("started", run)
    assert db.value("SELECT count(*) FROM durable.run") == 1
    assert db.messages(stream) == 0


@pytest.mark.parametrize("conflict", ["fail", "use_existing"])
def test_a_live_run_keeps_its_workflow_id(db: Session, conflict: str) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    assert db.start(stream, "w", conflict=conflict) == ("exists", run)
    assert db.value("SELECT count(*) FROM durable.run") == db.messages(stream) == 1


def test_terminate_existing(db: Session) -> None:
    stream = db.stream()
    _, first = db.start(stream, "w")
    status, second = db.start(stream, "w", conflict="terminate_existing")
    assert status == "started"
    assert db.run(first) == ("terminated", 2)
    assert db.run(second) == ("running", 1)
    assert [c.run_id for c in db.register(stream).claim()] == [second], "what was queued of the first is gone"


def test_workflow_ids_are_a_streams_own(db: Session) -> None:
    assert db.start(db.stream(), "w")[0] == "started"
    assert db.start(db.stream("other"), "w")[0] == "started"


@pytest.mark.parametrize(
    ("reuse", "closed", "expected"),
    [
        ("allow", "completed", "started"),
        ("allow", "terminated", "started"),
        ("allow_failed", "completed", "used"),
        ("allow_failed", "terminated", "started"),
        ("reject", "completed", "used"),
        ("reject", "terminated", "used"),
    ],
)
def test_reuse_of_a_closed_runs_id(db: Session, reuse: str, closed: str, expected: str) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    if closed == "completed":
        complete(db, stream, run)
    else:
        assert db.terminate(run) == "ok"
    assert db.start(stream, "w", reuse=reuse)[0] == expected
    assert db.start(stream, "w", reuse=reuse, conflict="use_existing")[0] == (
        "used" if expected == "used" else "exists"
    )


def test_only_the_latest_run_forbids_reuse_and_no_live_one(db: Session) -> None:
    stream = db.stream()
    _, first = db.start(stream, "w")
    complete(db, stream, first)
    _, second = db.start(stream, "w")
    for reuse in ("allow_failed", "reject"):
        assert db.start(stream, "w", reuse=reuse, conflict="use_existing") == ("exists", second)
    status, third = db.start(stream, "w", reuse="reject", conflict="terminate_existing")
    assert status == "started"
    assert db.terminate(third) == "ok"
    assert db.start(stream, "w", reuse="reject")[0] == "used"
    assert db.start(stream, "w", reuse="allow_failed")[0] == "started"


def test_two_sessions_start_the_same_id_at_once(connect: Callable[..., Session]) -> None:
    one, other, watcher = connect(), connect(), connect()
    stream = one.stream()
    one.begin()
    _, first = one.start(stream, "w")
    second = in_background(lambda: other.start(stream, "w"))
    wait_until(lambda: watcher.is_blocked(other), message="the second start waits")
    one.commit()
    assert second() == ("exists", first)
    assert watcher.value("SELECT count(*) FROM durable.run") == watcher.messages(stream) == 1


def test_the_second_starts_when_the_first_is_rolled_back(connect: Callable[..., Session]) -> None:
    one, other, watcher = connect(), connect(), connect()
    stream = one.stream()
    one.begin()
    _, first = one.start(stream, "w")
    second = in_background(lambda: other.start(stream, "w"))
    wait_until(lambda: watcher.is_blocked(other), message="the second start waits")
    one.rollback()
    status, run = second()
    assert status == "started"
    assert run != first


def test_a_start_waits_for_an_open_one_no_longer_than_its_lock_timeout(connect: Callable[..., Session]) -> None:
    one, other = connect(), connect()
    stream = one.stream()
    one.begin()
    one.start(stream, "w")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        other.start(stream, "w")
    one.rollback()
    assert other.start(stream, "w")[0] == "started"


def test_reject_also_sees_a_run_that_closes_meanwhile(connect: Callable[..., Session]) -> None:
    one, other, watcher = connect(), connect(), connect()
    stream = one.stream()
    _, first = one.start(stream, "w")
    one.begin()
    assert one.terminate(first) == "ok"
    second = in_background(lambda: other.start(stream, "w", reuse="reject"))
    wait_until(lambda: watcher.is_blocked(other), message="the second start waits")
    one.commit()
    assert second()[0] == "used"
    assert watcher.value("SELECT count(*) FROM durable.run") == 1
    assert watcher.messages(stream) == 0


def test_nobody_may_choose_an_id_that_the_database_derives(db: Session) -> None:
    """Else whoever knows a run's id could take the ids of its children and activities before it does."""
    stream = db.stream()
    _, run = db.start(stream, "w")
    taken = derived(run, 3)
    assert db.start(stream, "other", run=taken)[0] == "denied"
    assert db.enqueue(stream, b"1", b"2", ids=[taken, new_id()]) == [-1, 1]


@pytest.mark.parametrize("field", ["workflow_id", "name"])
@pytest.mark.parametrize("value", ["", "x" * 201])
def test_names_have_1_to_200_characters(db: Session, field: str, value: str) -> None:
    stream = db.stream()
    names = {"workflow_id": "w", "name": "wf", field: value}
    with pytest.raises(psycopg.errors.CheckViolation):
        db.start(stream, **names)
    assert db.messages(stream) == 0


def test_a_missing_stream_is_denied(db: Session) -> None:
    assert db.start(2**31 - 1, "w") == ("denied", None)
