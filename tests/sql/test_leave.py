"""What a message leaves behind: under its live lease, with its end, within what its worker may do."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import psycopg
import pytest

from dramatiq_durable.arrays import Texts, Uuid
from dramatiq_durable.operations import Enqueue, EnqueueKeyed, Result

from .api import Claimed, Session, Worker, in_background, new_id


def send(stream: int, id: bytes | None = None, *, group: bytes | None = None, key: str | None = None) -> Enqueue:
    return EnqueueKeyed(stream, id or new_id(), "next", 0, 0, b"next", group, key, "skip")


def actors(db: Session) -> list[str]:
    return sorted(actor for (actor,) in db.sql("SELECT actor FROM durable.message"))


def result(db: Session, key: str, stream: str | None = "s") -> bytes | None:
    found = db.call("get_results", Texts([key]), Texts([stream]), None, 0)
    return found[0][1] if found else None


@pytest.fixture
def stream(db: Session) -> int:
    return db.stream()


@pytest.fixture
def worker(db: Session, stream: int) -> Worker:
    return db.register(stream)


def claim(db: Session, worker: Worker, *payloads: bytes) -> list[Claimed]:
    db.enqueue(worker.streams[0], *payloads)
    return worker.claim()


def test_only_under_the_live_lease(db: Session, worker: Worker, stream: int) -> None:
    other = db.register(stream)
    one, two, three = claim(db, worker, b"1", b"2", b"3")
    forged = two._replace(lease=new_id())
    worker.release(three)
    answers = worker.leave(one, forged, three, results=[Result("key", b"v", 60_000)], sends=[send(stream)])
    assert answers == [1, 0, 0]
    assert other.leave(two, results=[Result("foreign", b"v", 60_000)]) == [0]
    assert actors(db) == ["actor", "actor", "actor", "next"]
    assert result(db, "key") == b"v"
    assert result(db, "foreign") is None


def test_it_stands_or_falls_with_the_end(db: Session, worker: Worker, stream: int) -> None:
    [one] = claim(db, worker, b"1")
    db.begin()
    assert worker.leave(one, results=[Result("key", b"v", 60_000)], sends=[send(stream)]) == [1]
    assert worker.ack(one) == []
    db.rollback()
    assert result(db, "key") is None
    assert actors(db) == ["actor"]
    # Again, and again after it was committed: the second finds no lease.
    for expected in ([1], [0]):
        assert worker.leave(one, results=[Result("key", str(expected).encode(), 60_000)]) == expected
        worker.ack(one)
    assert result(db, "key") == b"[1]"


def test_a_stream_that_is_missing_sends_the_message_back(db: Session, worker: Worker, stream: int) -> None:
    one, two = claim(db, worker, b"1", b"2")
    assert worker.leave(one, results=[Result("key", b"v", 60_000)], sends=[send(stream + 1000)]) == [-1]
    assert worker.leave(two, sends=[send(stream)], callbacks=[send(stream + 1000)], member=True) == [-1]
    assert worker.ack(one, two) == [1, 2]  # it is no longer leased
    assert result(db, "key") is None
    assert actors(db) == ["actor", "actor"]
    rows = db.sql(
        "SELECT attempt, lease_token, due_at > now() + interval '20 seconds', last_failure FROM durable.message"
    )
    assert [row[:3] for row in rows] == [(2, None, True)] * 2
    assert "may not send" in rows[0][3]


def test_a_stream_that_stays_missing_ends_in_a_dead_letter(db: Session, worker: Worker, stream: int) -> None:
    db.enqueue(stream, b"1", b"good")
    for time in range(5):
        one, *others = worker.claim()
        answer = [-1, *[1] * len(others)]
        assert worker.leave(one, sends=[send(stream + 1000)]) + worker.leave(*others) == answer
        assert worker.ack(one, *others) == [1]
        assert db.value("SELECT count(*) FROM durable.dead_letter") == (time == 4)
        db.sql("UPDATE durable.message SET due_at = clock_timestamp()")
    [(reason, attempt, failure)] = db.sql("SELECT reason, attempt, failure FROM durable.dead_letter")
    assert (reason, attempt) == ("unsettled", 5)
    assert "may not send to it (5 times)" in failure
    assert actors(db) == []


def test_ids_of_the_databases_own_are_refused(db: Session, worker: Worker, stream: int) -> None:
    [one] = claim(db, worker, b"1")
    forged = bytearray(new_id())
    forged[6] = 0x80 | (forged[6] & 0x0F)
    assert worker.leave(one, sends=[send(stream, bytes(forged))]) == [-1]


def test_members_of_one_batch_count_each_for_itself(db: Session, worker: Worker, stream: int) -> None:
    """The callbacks come once, from one of them, and other members' callbacks do not."""
    group, other = uuid.uuid4(), uuid.uuid4()
    for each, count in ((group, 3), (other, 2)):
        db.call("limiter_add", str(each), count, 60_000)
    for each in (group, group, group, other):
        db.enqueue_keyed(stream, None, group=each.bytes)
    claimed = worker.claim()
    callback, foreign = new_id(), new_id()
    of_group = db.sql("SELECT message_id FROM durable.message WHERE group_id = %s", group)
    members = [c for c in claimed if (c.message_id,) in of_group]
    others = [c for c in claimed if c not in members]
    assert worker.leave(*members, callbacks=[send(stream, callback)], member=True) == [1, 1, 1]
    assert worker.leave(*others, callbacks=[send(stream, foreign)], member=True) == [1]
    assert worker.ack(*claimed) == []
    assert db.sql("SELECT message_id FROM durable.message") == [(callback,)]
    assert db.sql("SELECT value FROM durable.limiter ORDER BY value") == [(0,), (1,)]


def test_a_member_counts_by_its_row_not_by_what_its_worker_says(db: Session, worker: Worker, stream: int) -> None:
    group = uuid.uuid4()
    db.call("limiter_add", str(group), 1, 60_000)
    [one] = claim(db, worker, b"1")
    assert worker.leave(one, callbacks=[send(stream)], member=True) == [1]
    assert db.value("SELECT value FROM durable.limiter") == 1
    assert actors(db) == ["actor"]


def test_a_group_in_somebody_elses_hands_is_waited_for_briefly(
    db: Session, worker: Worker, stream: int, connect: Callable[..., Session]
) -> None:
    group = uuid.uuid4()
    db.call("limiter_add", str(group), 1, 60_000)
    db.enqueue_keyed(stream, None, group=group.bytes)
    one = worker.one()
    hostile = connect()
    hostile.begin()
    hostile.sql("SELECT 1 FROM durable.limiter FOR UPDATE")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        in_background(lambda: worker.leave(one, member=True))()
    hostile.rollback()
    assert worker.leave(one, member=True) == [1]


def test_two_batches_with_results_and_groups_in_opposite_orders(
    db: Session, connect: Callable[..., Session], stream: int
) -> None:
    """Locks are taken in one order: neither waits for the other for ever."""
    groups = [uuid.uuid4() for _ in range(10)]
    for group in groups:
        db.call("limiter_add", str(group), 100, 60_000)
    sessions = [connect(), connect()]
    workers = []
    for session in sessions:
        for group in groups:
            session.enqueue_keyed(stream, None, group=group.bytes)
        made = session.register(stream)
        workers.append((made, made.claim(10)))
    keys = [Result(f"key {n}", b"v", 60_000) for n in range(20)]

    def leave(n: int) -> list[int]:
        made, claimed = workers[n]
        answers: list[int] = []
        for _ in range(20):
            ordered, results = (claimed, keys) if n else (claimed[::-1], keys[::-1])
            answers = made.leave(*ordered, results=results, member=True)
        return answers

    joins = [in_background(lambda n=n: leave(n)) for n in range(2)]  # type: ignore[misc]
    assert [join() for join in joins] == [[1] * 10] * 2
    assert db.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0


def test_of_two_results_with_one_key_the_later_counts(db: Session, worker: Worker) -> None:
    [one] = claim(db, worker, b"1")
    assert worker.leave(one, results=[Result("key", b"first", 60_000), Result("key", b"second", 60_000)]) == [1]
    assert result(db, "key") == b"second"


def test_a_sweep_forgets_what_is_over_and_waits_for_nobody(
    db: Session, worker: Worker, connect: Callable[..., Session]
) -> None:
    for n in range(4):
        db.call("store_result", f"gone {n}", b"v", 0)
        db.call("limiter_add", f"window@{n}", 1, 0)
    db.call("store_result", "kept", b"v", 60_000)
    db.call("get_results", Texts(["gone 0", "nobody"]), Texts([None] * 2), Uuid(new_id()), 0)
    group = str(uuid.uuid4())
    db.call("limiter_add", group, 1, 0)
    db.sql("UPDATE durable.limiter SET expires_at = expires_at - interval '2 hours'")
    hostile = connect()
    hostile.begin()
    hostile.sql("SELECT 1 FROM durable.result WHERE key = 'gone 0' FOR UPDATE")
    assert db.call("sweep", Uuid(worker.token))[0][0] == 3 + 2 + 4
    hostile.rollback()
    assert db.call("sweep", Uuid(worker.token))[0][0] == 1
    assert db.sql("SELECT key FROM durable.result") == [("kept",)]
    # A group may outlive its barrier, by a week.
    assert db.sql("SELECT key FROM durable.limiter") == [(group,)]
    db.sql("UPDATE durable.limiter SET expires_at = expires_at - interval '7 days'")
    assert db.call("sweep", Uuid(worker.token))[0][0] == 1
