from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Uuid

from .api import Claimed, Session, Worker, new_id, send_activity, step

CALLS = ("ack", "reschedule", "release", "bury", "mark_started", "fail_settling")


@pytest.mark.parametrize("call", CALLS)
def test_only_the_live_lease_works(db: Session, call: str) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2", b"3")
    worker = db.register(stream)
    stale = worker.claim(1)[0]
    worker.release(stale)
    first, second, third = worker.claim()
    assert first.message_id == stale.message_id
    forged = second._replace(lease=new_id())
    before = db.sql("SELECT * FROM durable.message WHERE message_id <> %s ORDER BY due_at", Uuid(third.message_id))
    assert getattr(worker, call)(stale, third, forged) == [1, 3], "one bad item fails alone"
    after = db.sql("SELECT * FROM durable.message WHERE message_id <> %s ORDER BY due_at", Uuid(third.message_id))
    assert before == after
    assert db.value("SELECT count(*) FROM durable.dead_letter") == (1 if call == "bury" else 0)


@pytest.mark.parametrize("call", CALLS)
def test_another_worker_cannot_use_a_lease(db: Session, call: str) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker, other = db.register(stream), db.register(stream)
    claimed = worker.one()
    assert getattr(other, call)(claimed) == [1]
    assert worker.ack(claimed) == []


@pytest.mark.parametrize("call", ["ack", "reschedule", "release", "bury", "fail_settling"])
def test_a_repeated_call_changes_nothing(db: Session, call: str) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    claimed = worker.claim()
    assert getattr(worker, call)(*claimed) == []
    before = db.sql("SELECT * FROM durable.message"), db.sql("SELECT * FROM durable.dead_letter")
    assert getattr(worker, call)(*claimed) == [1, 2]
    assert (db.sql("SELECT * FROM durable.message"), db.sql("SELECT * FROM durable.dead_letter")) == before


def test_an_ack_deletes_the_message(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    first, second = worker.claim()
    assert worker.ack(first) == []
    assert db.messages(stream) == 1
    assert worker.ack(second) == []
    assert db.messages(stream) == 0


def test_a_reschedule_is_the_same_row_later(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker = db.register(stream)
    claimed = worker.one()
    assert worker.reschedule(claimed, delay=60_000, payload=b"again") == []
    assert worker.look() == ([], pytest.approx(60_000, abs=5_000))
    db.sql("UPDATE durable.message SET due_at = clock_timestamp()")
    again = worker.one()
    assert (again.message_id, again.payload, again.attempt) == (claimed.message_id, b"again", 2)
    assert worker.reschedule(again) == []
    last = worker.one()
    assert last.payload == b"again", "no new payload: the old one is kept"
    assert worker.reschedule(last, counted=False) == []
    assert worker.one().attempt == last.attempt == 3


def test_a_release_counts_no_attempt(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    first, _ = worker.claim()
    assert worker.release(first) == []
    again = worker.one()
    assert (again.message_id, again.attempt, again.reclaimed) == (first.message_id, 1, False)


def test_a_rejected_message_is_a_dead_letter(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2", actor="a")
    worker = db.register(stream)
    first, second = worker.claim()
    assert worker.bury(first) == []
    assert worker.bury(second, payload=b"new") == []
    assert db.messages(stream) == 0
    dead = db.sql("SELECT message_id, stream_id, actor, reason, failure, payload FROM durable.dead_letter ORDER BY 1")
    assert sorted(dead) == sorted(
        [
            (first.message_id, stream, "a", "rejected", "no", b"1"),
            (second.message_id, stream, "a", "rejected", "no", b"new"),
        ]
    )


def test_what_belongs_to_a_run_is_never_rejected(db: Session) -> None:
    stream = db.stream()
    db.start(stream, "w")
    worker = db.register(stream)
    task = worker.one()
    assert worker.bury(task) == [1]
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 0
    assert worker.release(task) == []


@pytest.mark.parametrize("call", [*CALLS, "claim", "heartbeat", "resync"])
def test_a_forged_worker_is_refused(db: Session, call: str) -> None:
    stream = db.stream()
    worker = Worker(db, new_id(), 1, [stream])
    calls: dict[str, Callable[[], Any]] = {
        "claim": worker.claim,
        "heartbeat": worker.heartbeat,
        "resync": worker.resync,
    }
    with pytest.raises(psycopg.Error) as error:
        calls.get(call, lambda: getattr(worker, call)(_claimed()))()
    assert error.value.sqlstate == "DD002"


def _claimed() -> Claimed:
    return Claimed(new_id(), new_id(), 1, "m", None, None, 1, False, "a", b"", 0.0)


def test_what_can_never_be_settled_ends_in_the_dead_letters(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker = db.register(stream)
    for time in range(1, 5):
        assert worker.fail_settling(worker.one()) == []
        [(attempt, failure, due)] = db.sql(
            "SELECT attempt, last_failure, round(extract(epoch FROM due_at - clock_timestamp()))::int "
            "FROM durable.message"
        )
        assert (attempt, failure, due) == (time + 1, f"no (time {time} of 5)", 15 * 2**time)
        db.sql("UPDATE durable.message SET due_at = clock_timestamp()")
    assert worker.fail_settling(worker.one()) == []
    assert db.sql("SELECT reason, attempt, failure, payload FROM durable.dead_letter") == [
        ("unsettled", 5, "no (5 times)", b"1")
    ]
    assert db.sql("SELECT 1 FROM durable.message") == []


def test_only_times_in_a_row_count(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker = db.register(stream)
    for _ in range(8):
        assert worker.fail_settling(worker.one()) == []
        db.sql("UPDATE durable.message SET due_at = clock_timestamp()")
        worker.reschedule(worker.one())
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 0


def test_an_activity_that_can_never_be_settled_fails_in_its_run(db: Session) -> None:
    stream, activities = db.stream(), db.stream("activities")
    _, run = db.start(stream, "w")
    runner, worker = db.register(stream), db.register(activities)
    advance = step(runner.one(), 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(activities, 1)]
    assert runner.advance(advance) == ["ok"]
    db.sql("UPDATE durable.message SET unsettled = 4")
    assert worker.fail_settling(worker.one()) == []
    ((_, type, seq, _, _, attributes),) = db.inbox(run)
    assert (type, seq) == ("ActivityFailed", 1)
    assert attributes["failure"] == {"type": "NotSettled", "message": "no (5 times)", "retryable": False, "attempt": 1}
    assert runner.one().kind == "t"
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 0


def test_a_task_of_a_run_is_never_given_up(db: Session) -> None:
    stream = db.stream()
    db.start(stream, "w")
    runner = db.register(stream)
    assert runner.fail_settling(runner.one()) == [1]
