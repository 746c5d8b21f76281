"""Abort: what is marked, who is told, and what the marks do to later deliveries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Longs, Uuid, Uuids

from .api import Claimed, Session, Worker, in_background, new_id, send_activity, step
from .test_advance import begin


def abort(db: Session, *ids: bytes, running: bool = True) -> str:
    return str(db.call("abort_message", Uuids(ids), running)[0][0])


def started(worker: Worker, *claimed: Claimed) -> tuple[Any, ...]:
    """(refused, aborted, anew)"""
    return worker.call("mark_started", Uuids([c.message_id for c in claimed]), Uuids([c.lease for c in claimed]))[0]


def aborts(worker: Worker) -> list[bytes]:
    return list(worker.call("report_running", Uuids([]), Longs([]))[0][0])


def test_what_waits_is_due_at_once_and_its_delivery_is_told(db: Session) -> None:
    stream = db.stream()
    other, target = new_id(), new_id()
    db.enqueue(stream, b"1", b"2", ids=[other, target], delay=[0, 3_600_000])
    assert abort(db, target) == "queued"
    worker = db.register(stream)
    first, second = worker.claim()
    assert (first.message_id, first.reclaimed, second.message_id, second.reclaimed) == (other, False, target, True)
    assert started(worker, first, second) == ([], [2], [])
    assert worker.bury(first, second) == []
    rows = db.sql("SELECT message_id, reason FROM durable.dead_letter ORDER BY dead_letter_id")
    assert dict(rows) == {other: "rejected", target: "aborted"}


@pytest.mark.parametrize("settle", ["release", "reschedule"])
def test_what_goes_back_meanwhile_is_aborted_at_its_next_delivery(db: Session, settle: str) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker = db.register(stream)
    claimed = worker.one()
    assert abort(db, claimed.message_id) == "running"
    more = {"delay": 3_600_000} if settle == "reschedule" else {}
    assert getattr(worker, settle)(claimed, **more) == []
    again = worker.one()
    assert started(worker, again) == ([], [1], [])


def test_its_worker_is_told_until_it_is_settled(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker, other = db.register(stream), db.register(stream)
    (first,) = worker.claim(1)
    (second,) = other.claim(1)
    db.sql(f'LISTEN "durable:w{worker.id}"')
    db.sql(f'LISTEN "durable:w{other.id}"')
    assert abort(db, first.message_id) == "running"
    assert [n.channel for n in db.conn.notifies(timeout=5, stop_after=1)] == [f"durable:w{worker.id}"]
    assert aborts(worker) == aborts(worker) == [first.lease]
    assert aborts(other) == []
    worker.ack(first)
    assert aborts(worker) == []
    assert other.ack(second) == []


def test_a_cancel_leaves_alone_what_a_worker_has(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    (taken,) = worker.claim(1)
    assert abort(db, taken.message_id, running=False) == "running"
    assert aborts(worker) == []
    (waiting,) = [row[0] for row in db.sql("SELECT message_id FROM durable.message WHERE lease_token IS NULL")]
    assert abort(db, waiting, running=False) == "queued"


def test_a_cancel_that_meets_a_claim_knows_who_was_first(db: Session, connect: Callable[..., Session]) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", ids=[message := new_id()])
    worker = db.register(stream)
    db.begin()
    worker.one()
    other = connect()
    answer = in_background(lambda: abort(other, message, running=False))
    while not connect().is_blocked(other):
        pass
    db.commit()
    assert answer() == "running"
    assert aborts(worker) == []


def test_tasks_of_runs_and_ticks_are_no_messages_to_abort(db: Session) -> None:
    stream = db.stream("s")
    _, run = db.start(stream, "w")
    assert abort(db, run) == "missing"
    db.enqueue(stream, b"", ids=[tick := new_id()], delay=60_000)
    db.sql("UPDATE durable.message SET kind = 'c' WHERE message_id = %s", Uuid(tick))
    assert abort(db, tick) == "missing"
    assert [row[3] for row in db.call("peek_messages", "s", None, None, 10)] == ["s"]
    assert db.value("SELECT count(*) FROM durable.message WHERE abort_at IS NOT NULL") == 0


def test_activities_can_be_aborted(db: Session) -> None:
    begun = begin(db)
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"))
    advance.sends = [send_activity(begun.stream, 1)]
    assert begun.worker.advance(advance) == ["ok"]
    activity = begun.worker.one()
    assert abort(db, activity.message_id) == "running"
    assert aborts(begun.worker) == [activity.lease]


def test_an_abort_is_bounded(db: Session) -> None:
    with pytest.raises(psycopg.errors.ProgramLimitExceeded):
        abort(db, *[new_id() for _ in range(11)])


def test_what_runs_is_written_only_when_it_changes(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    first, second = worker.claim()
    row = "SELECT xmin::text, running, running_since FROM durable.worker"

    def report(*claimed: Claimed) -> tuple[Any, ...]:
        worker.call("report_running", Uuids([c.message_id for c in claimed]), Longs([1000] * len(claimed)))
        return db.sql(row)[0]

    before = report(first, second)
    assert set(before[1]) == {first.message_id, second.message_id}
    assert report(second, first) == before
    assert report(first)[1] == [first.message_id]
    assert report()[1:] == ([], [])
