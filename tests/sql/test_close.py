"""What follows from the end of a run."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from dramatiq_durable.arrays import Uuid

from .api import Session, derived, new_id, send_activity, send_timer, start_child, step
from .test_advance import begin


@pytest.mark.parametrize("close", ["completed", "failed", "cancelled"])
def test_a_closed_run_leaves_nothing_queued(db: Session, close: str) -> None:
    begun = begin(db)
    _, neighbour = db.start(begun.stream, "neighbour")
    advance = step(begun.task, 1, ("TimerStarted", 1), ("ActivityScheduled", 2, "a"), ("ActivityScheduled", 3, "a"))
    advance.sends = [
        send_timer(begun.stream, 1),
        send_activity(begun.stream, 2),
        send_activity(begun.stream, 3, eager=True),
    ]
    begun.worker.advance(advance)
    db.post(begun.run, type="CancelRequested")
    task = next(c for c in begun.worker.claim() if c.kind == "t")
    assert db.post(neighbour) == "ok"
    assert begun.worker.advance(step(task, 4, ("WorkflowClosed", None), close=close)) == ["ok"]
    assert db.run(begun.run) == (close, 5)
    assert db.inbox(begun.run) == []
    assert len(db.inbox(neighbour)) == 1
    left = db.sql("SELECT seq FROM durable.message WHERE run_id = %s AND seq IS NOT NULL", Uuid(begun.run))
    assert (3,) in left, "what is leased is left to its worker"
    assert (1,) not in left
    assert db.post(begun.run) == "closed"
    assert db.terminate(begun.run) == "closed"


@pytest.mark.parametrize(
    ("parent_close", "status", "inbox"),
    [("terminate", "terminated", []), ("cancel", "running", ["CancelRequested"]), ("abandon", "running", [])],
)
@pytest.mark.parametrize("how", ["advance", "terminate"])
def test_children_of_a_closed_run(db: Session, parent_close: str, status: str, inbox: list[str], how: str) -> None:
    begun, other = begin(db), db.stream("other")
    advance = step(begun.task, 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(other, 1, "c", parent_close=parent_close)]
    begun.worker.advance(advance)
    if how == "terminate":
        assert db.terminate(begun.run) == "ok"
    else:
        db.post(begun.run, type="CancelRequested")
        task = begun.worker.one()
        assert begun.worker.advance(step(task, 2, ("WorkflowCompleted", None), close="completed")) == ["ok"]
    child = derived(begun.run, 1)
    assert db.run(child)[0] == status
    assert [row[1] for row in db.inbox(child)] == inbox


def test_grandchildren_end_too(db: Session) -> None:
    begun = begin(db)
    advance = step(begun.task, 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(begun.stream, 1, "c")]
    begun.worker.advance(advance)
    advance = step(begun.worker.one(), 1, ("ChildStarted", 4, "child"))
    advance.children = [start_child(begun.stream, 4, "g")]
    begun.worker.advance(advance)
    db.terminate(begun.run)
    assert db.value("SELECT count(*) FROM durable.run WHERE status = 'terminated'") == 3
    assert db.run(derived(derived(begun.run, 1), 4))[0] == "terminated"


def test_a_run_does_not_close_while_somebody_signals_a_child_that_ends_with_it(connect: Callable[..., Session]) -> None:
    """It is refused, not waited for: the wait would hold up everything in the same commit."""
    db, sender = connect(), connect()
    begun = begin(db)
    advance = step(begun.task, 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(begun.stream, 1, "c")]
    begun.worker.advance(advance)
    child = derived(begun.run, 1)
    db.post(begun.run, type="CancelRequested")
    task = next(c for c in begun.worker.claim() if c.run_id == begun.run)
    sender.begin()
    assert sender.post(child) == "ok"
    db.sql("SET statement_timeout = '1s'")
    closing = step(task, 2, ("WorkflowCompleted", None), close="completed")
    assert begun.worker.advance(closing) == ["refused"]
    sender.commit()
    assert begun.worker.advance(closing) == ["ok"]
    assert db.run(child)[0] == "terminated"


def test_a_close_does_not_wait_for_a_claim_under_way(connect: Callable[..., Session]) -> None:
    db, other = connect(), connect()
    begun = begin(db)
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"))
    advance.sends = [send_activity(begun.stream, 1)]
    begun.worker.advance(advance)
    claimer = other.register(begun.stream)
    other.begin()
    claimed = claimer.one()
    db.sql("SET statement_timeout = '1s'")
    assert db.terminate(begun.run) == "ok"
    other.commit()
    assert claimer.complete(claimed) == []
    assert db.inbox(begun.run) == []


def test_a_run_does_not_close_over_an_unread_signal(db: Session) -> None:
    begun = begin(db)
    db.post(begun.run)
    closing = step(begun.task, 1, ("WorkflowCompleted", None), close="completed")
    assert begun.worker.advance(closing) == ["refused"]
    assert db.run(begun.run) == ("running", 1)
    closing.inbox = [db.inbox(begun.run)[0][0]]
    assert begun.worker.advance(closing) == ["ok"]


def test_an_unread_cancel_does_not_keep_a_run_open(db: Session) -> None:
    begun = begin(db)
    db.post(begun.run, type="CancelRequested")
    assert begun.worker.advance(step(begun.task, 1, ("WorkflowCompleted", None), close="completed")) == ["ok"]


@pytest.mark.parametrize("close", ["running", "nonsense", ""])
def test_a_run_closes_only_in_a_status_of_ours(db: Session, close: str) -> None:
    begun = begin(db)
    closing = step(begun.task, 1, ("WorkflowCompleted", None), close=close)
    if close == "running":
        assert begun.worker.advance(closing) == ["refused"]
    else:
        with pytest.raises(Exception, match="run_status_check"):
            begun.worker.advance(closing)
    assert db.run(begun.run) == ("running", 1)


def test_who_waits_for_a_run_is_told(connect: Callable[..., Session]) -> None:
    db, listener = connect(), connect()
    begun = begin(db)
    channel = new_id()
    listener.sql(f'LISTEN "durable:c{uuid.UUID(bytes=channel)}"')
    assert db.call("await_run", Uuid(begun.run), Uuid(channel)) == [("running",)]
    db.terminate(begun.run)
    assert len(list(listener.conn.notifies(timeout=10, stop_after=1))) == 1
    assert db.call("await_run", Uuid(begun.run), Uuid(channel)) == [("terminated",)]
    assert db.value("SELECT count(*) FROM durable.waiter") == 0


def test_a_child_tells_its_parent_how_it_ended(db: Session) -> None:
    begun = begin(db)
    advance = step(begun.task, 1, *[("ChildStarted", n, "child") for n in (1, 2, 3)])
    advance.children = [start_child(begun.stream, n, f"c-{n}") for n in (1, 2, 3)]
    begun.worker.advance(advance)
    for task, close in zip(begun.worker.claim(), ("failed", "cancelled", None), strict=True):
        assert task.run_id is not None
        if close is None:
            assert db.terminate(task.run_id) == "ok"
        else:
            assert begun.worker.advance(step(task, 1, ("WorkflowClosed", None), close=close)) == ["ok"]
    assert [row[1:3] for row in db.inbox(begun.run)] == [
        ("ChildFailed", 1),
        ("ChildCancelled", 2),
        ("ChildTerminated", 3),
    ]
