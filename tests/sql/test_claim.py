from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import psycopg
import pytest

from tests.support import wait_until

from .api import Claimed, Session, in_background


def test_never_more_than_the_limit(db: Session) -> None:
    stream, other = db.stream(), db.stream("other")
    db.enqueue(stream, *[b""] * 20)
    db.enqueue(other, *[b""] * 20)
    worker = db.register(stream, other)
    claimed = worker.claim(12, limits=[5, 10])
    assert Counter(c.stream_id for c in claimed) == {stream: 5, other: 7}
    assert worker.claim(3, limits=[0, 0]) == []
    assert len(worker.claim(3, limits=[10, 10])) == 3


def test_every_delivery_has_a_lease_of_its_own(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, *[b""] * 50)
    worker = db.register(stream)
    claimed = worker.claim()
    assert len({c.lease for c in claimed}) == 50
    first = claimed[0]
    worker.release(first)
    again = worker.one()
    assert again.message_id == first.message_id
    assert again.lease != first.lease
    assert worker.claim() == []


def test_concurrent_claimers_never_get_the_same_message(connect: Callable[..., Session]) -> None:
    db = connect()
    stream = db.stream()
    for _ in range(4):
        db.enqueue(stream, *[b""] * 100)
    workers = [connect().register(stream) for _ in range(4)]

    def drain(n: int) -> list[Claimed]:
        found: list[Claimed] = []
        while batch := workers[n].claim(7):
            found += batch
        return found

    joins = [in_background(lambda n=n: drain(n)) for n in range(4)]
    claimed = [c.message_id for join in joins for c in join()]
    assert len(claimed) == len(set(claimed)) == 400


def test_what_another_transaction_is_claiming_is_skipped(connect: Callable[..., Session]) -> None:
    one, other = connect(), connect()
    stream = one.stream()
    one.enqueue(stream, b"1", b"2", b"3")
    first, second = one.register(stream), other.register(stream)
    one.begin()
    assert [c.payload for c in first.claim(2)] == [b"1", b"2"]
    assert [c.payload for c in second.claim(2)] == [b"3"]
    one.rollback()
    assert [c.payload for c in second.claim()] == [b"1", b"2"]


def test_priorities_and_then_due_times(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"low", b"high", b"mid", b"high2", priority=[10, -5, 0, -5])
    db.enqueue(stream, b"mid2")
    assert [c.payload for c in db.register(stream).claim()] == [b"high", b"high2", b"mid", b"mid2", b"low"]


def test_a_delayed_message_of_a_better_priority_holds_nothing_up(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"later", b"now", priority=[-1, 7], delay=[30_000, 0])
    claimed, next_due = db.register(stream).look()
    assert [c.payload for c in claimed] == [b"now"]
    assert next_due is not None
    assert 20_000 < next_due <= 30_001


def test_next_due_is_the_earliest_of_all_streams_and_priorities(db: Session) -> None:
    stream, other = db.stream(), db.stream("other")
    worker = db.register(stream, other)
    assert worker.look() == ([], None)
    db.enqueue([stream, stream, other], b"", b"", b"", priority=[0, 1, 0], delay=[50_000, 40_000, 45_000])
    assert 39_000 < (worker.look()[1] or 0) <= 40_001


def test_a_paused_stream_hands_out_nothing(db: Session) -> None:
    stream, other = db.stream(), db.stream("other")
    db.enqueue([stream, other], b"", b"")
    db.sql("UPDATE durable.stream SET paused = true WHERE stream_id = %s", stream)
    worker = db.register(stream, other)
    assert [c.stream_id for c in worker.claim()] == [other]
    db.sql("UPDATE durable.stream SET paused = false WHERE stream_id = %s", stream)
    assert [c.stream_id for c in worker.claim()] == [stream]


def test_a_claim_notes_what_the_worker_holds(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2", b"3")
    worker = db.register(stream)
    first, second = worker.claim(2)
    assert db.held(worker) == {first.message_id, second.message_id}
    worker.ack(first)
    (third,) = worker.claim(2, done=[first.message_id])
    assert db.held(worker) == {second.message_id, third.message_id}


@pytest.mark.parametrize("lie", ["not finished", "null"])
def test_a_message_that_is_still_leased_stays_among_what_is_held(db: Session, lie: str) -> None:
    """Else nobody would find it when the worker dies, and it would be lost."""
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker, peer = db.register(stream), db.register(stream)
    (first,) = worker.claim(1)
    (second,) = worker.claim(1, done=[first.message_id] if lie == "not finished" else [None])
    db.silence(worker)
    assert peer.reclaim(worker) == (2, 0)
    assert {c.message_id for c in peer.claim()} == {first.message_id, second.message_id}


def test_a_sleeping_worker_is_woken_and_another_is_not(connect: Callable[..., Session]) -> None:
    db, listener = connect(), connect()
    stream, other = db.stream(), db.stream("other")
    sleeper = db.register(stream)
    db.register(other)
    listener.sql(f'LISTEN "durable:s{stream}"')
    listener.sql(f'LISTEN "durable:s{other}"')
    db.enqueue([stream, other], b"", b"")
    assert list(listener.conn.notifies(timeout=0.2, stop_after=1)) == [], "nobody waits: nobody pays for a NOTIFY"
    assert len(sleeper.claim()) == 1
    assert sleeper.claim(wait=10_000) == []
    db.enqueue([stream, other], b"", b"")
    heard = list(listener.conn.notifies(timeout=10, stop_after=1))
    assert [(n.channel, n.payload) for n in heard] == [(f"durable:s{stream}", "")]


def test_a_worker_that_was_taken_back_meanwhile_gets_nothing(connect: Callable[..., Session]) -> None:
    """Else its leases would belong to a worker that nobody knows any more, and their messages would be lost."""
    db, one, other = connect(), connect(), connect()
    stream = db.stream()
    worker, peer = one.register(stream), other.register(stream)
    beat = peer.heartbeat()[worker.id]
    db.silence(worker)
    db.enqueue(stream, b"1")
    other.begin()
    assert peer.reclaim(worker, beat) == (0, 0)
    claim = in_background(worker.claim)
    wait_until(lambda: db.is_blocked(one), message="the claim waits for the reclaim")
    other.commit()
    with pytest.raises(psycopg.Error) as error:
        claim()
    assert error.value.sqlstate == "DD002"
    assert [c.payload for c in peer.claim()] == [b"1"]


def test_a_worker_that_has_signed_off_claims_nothing(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    worker.claim(1)
    worker.call("unregister_worker")
    with pytest.raises(psycopg.Error) as error:
        worker.claim()
    assert error.value.sqlstate == "DD002"
    claimed = db.register(stream).claim()
    assert [(c.payload, c.attempt, c.reclaimed) for c in claimed] == [(b"1", 1, False), (b"2", 1, False)]


def test_a_claim_carries_acks(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2", b"3")
    worker, other = db.register(stream), db.register(stream)
    mine, theirs = worker.claim(1), other.claim(1)
    claimed, _ = worker.look(1, acks=[*theirs, *mine], done=[mine[0].message_id])
    assert [c.payload for c in claimed] == [b"3"]
    assert worker.refused == [1], "a lease of another worker's is none of its"
    assert db.messages(stream) == 2
    assert db.held(worker) == {claimed[0].message_id}
