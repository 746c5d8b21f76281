"""Leases: dead workers, stale ones, poison, and the races between a claim and whoever takes its leases away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import arrays
from dramatiq_durable.leases import Membership
from tests.support import wait_until

from .conftest import Record, Rows


class Caller:
    """A worker of its own, procedure by procedure."""

    def __init__(self, url: str) -> None:
        self.conn = psycopg.connect(url, autocommit=True)
        arrays.register(self.conn)
        self.token: Any = None
        self.worker_id = 0

    def __call__(self, name: str, *arguments: Any) -> list[tuple[Any, ...]]:
        marks = ", ".join(["%s"] * len(arguments))
        return self.conn.execute(f"SELECT * FROM durable.{name}({marks})".encode(), arguments, binary=True).fetchall()

    def register(self, stream: int, *, delay: int = 1000, count: int = 3) -> None:
        [(token, self.worker_id)] = self("register_worker", "host", 1, 1, arrays.Ints([stream]), delay, count)
        self.token = arrays.Uuid(token)

    def claim(self, stream: int, limit: int = 10) -> list[tuple[Any, ...]]:
        none = arrays.Uuids([])
        rows = self("claim", self.token, none, none, arrays.Ints([stream]), arrays.Ints([limit]), limit, none, 0)
        return rows[:-1]

    def beat_of(self, worker_id: int) -> int:
        return int(
            self.conn.execute("SELECT beat FROM durable.worker WHERE worker_id = %s", [worker_id]).fetchall()[0][0]
        )


@pytest.fixture
def caller(database_url: str) -> Iterator[Callable[[], Caller]]:
    made: list[Caller] = []

    def make() -> Caller:
        made.append(Caller(database_url))
        return made[-1]

    yield make
    for each in made:
        each.conn.close()


@pytest.fixture
def numbers(broker: durable.DurableBroker) -> Any:
    @dramatiq.actor(broker=broker, queue_name="numbers")
    def numbers(n: int) -> None: ...

    return numbers


def in_the_background(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(function())
        except Exception as e:
            answers.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def free_or_held_by_a_live_worker(rows: Rows) -> bool:
    """Every leased message is in the list of a worker that is there: else nobody would ever take it back."""
    return rows(
        "SELECT count(*) FROM durable.message m WHERE m.lease_token IS NOT NULL AND NOT EXISTS ("
        " SELECT 1 FROM durable.worker w WHERE w.worker_id = m.worker_id AND m.message_id = ANY (w.held))"
    ) == [(0,)]


def test_a_claim_during_a_reclaim_leaves_no_lease_behind(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, caller: Callable[[], Caller]
) -> None:
    """A stopped worker goes on in the very moment in which another one declares it dead."""
    numbers.send(1)
    stream = broker.stream_id("numbers")
    stopped, peer = caller(), caller()
    stopped.register(stream)
    peer.register(stream)
    rows("UPDATE durable.worker SET beat_at = beat_at - interval '1 hour' WHERE worker_id = %s", stopped.worker_id)
    beat = peer.beat_of(stopped.worker_id)
    with rows.conn.transaction():
        # The server has just come up in the peer's eyes, or not: what is tested is the race, so the check is met.
        peer.conn.execute("BEGIN")
        peer("reclaim", peer.token, stopped.worker_id, beat)
        gone = peer.conn.execute("SELECT count(*) FROM durable.worker").fetchall() == [(1,)]
        thread, answers = in_the_background(lambda: stopped.claim(stream))
        wait_until(lambda: answers or rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        peer.conn.execute("COMMIT")
    thread.join(20)
    if gone:
        assert isinstance(answers[0], psycopg.Error)
        assert answers[0].sqlstate == "DD002"
    assert free_or_held_by_a_live_worker(rows)


def test_a_claim_during_a_resync_leaves_no_lease_behind(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, caller: Callable[[], Caller]
) -> None:
    """The network broke: the claim still runs in its old backend while the worker, on a new connection, says what it
    holds."""
    numbers.send(1)
    stream = broker.stream_id("numbers")
    old, new = caller(), caller()
    old.register(stream)
    old.conn.execute("BEGIN")
    assert len(old.claim(stream)) == 1
    thread, answers = in_the_background(lambda: new("resync", old.token, arrays.Uuids([])))
    wait_until(lambda: answers or rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
    old.conn.execute("COMMIT")
    thread.join(20)
    assert free_or_held_by_a_live_worker(rows)
    assert [m[2] for m in rows.messages()] == [False]


def test_a_claim_after_the_resync_that_replaced_it_is_undone(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, caller: Callable[[], Caller]
) -> None:
    numbers.send(1)
    stream = broker.stream_id("numbers")
    old, new = caller(), caller()
    old.register(stream)
    [(token,)] = new("resync", old.token, arrays.Uuids([]))
    with pytest.raises(psycopg.Error) as caught:
        old.claim(stream)
    assert caught.value.sqlstate == "DD002"
    old.token = arrays.Uuid(token)
    assert len(old.claim(stream)) == 1


def test_resync_frees_what_is_not_named_and_nothing_else(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, caller: Callable[[], Caller]
) -> None:
    for n in range(3):
        numbers.send(n)
    stream = broker.stream_id("numbers")
    worker, other = caller(), caller()
    worker.register(stream)
    other.register(stream)
    [kept, *_] = worker.claim(stream, 2)
    [foreign] = other.claim(stream, 1)
    # A foreign message that is named is not taken into possession.
    worker("resync", worker.token, arrays.Uuids([kept[0], foreign[0]]))
    assert rows("SELECT message_id FROM durable.message WHERE worker_id = %s", worker.worker_id) == [
        (rows("SELECT %s::uuid", kept[0].hex())[0][0],)
    ]
    assert free_or_held_by_a_live_worker(rows)
    other("unregister_worker", other.token)
    assert sorted(m[2] for m in rows.messages()) == [False, False, True]


def kill_workers(rows: Rows, count: int) -> None:
    """What a worker's death looks like to the others: no more heartbeat."""
    rows("UPDATE durable.worker SET beat_at = beat_at - interval '1 hour'")
    assert rows("SELECT count(*) FROM durable.worker") == [(count,)]


def dead_worker(caller: Callable[[], Caller], stream: int, limit: int = 10, *, count: int = 3) -> list[tuple[Any, ...]]:
    """A worker that claims and is never heard of again."""
    dead = caller()
    dead.register(stream, count=count)
    return dead.claim(stream, limit)


def test_the_messages_of_a_dead_worker_are_handed_out_again(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows, caller: Callable[[], Caller]
) -> None:
    got = Record()
    broker = make_broker(reclaim_delay=1)

    @dramatiq.actor(broker=broker, queue_name="numbers")
    def numbers(n: int) -> None:
        from dramatiq_durable.delivery import current_delivery

        delivery = current_delivery.get()
        assert delivery is not None
        got((n, delivery.attempt, delivery.reclaimed))

    for n in range(5):
        numbers.send(n)
    began = time.monotonic()
    assert len(dead_worker(caller, broker.stream_id("numbers"), 3)) == 3
    start_worker(broker)
    assert sorted(got.wait(2)) == [(3, 1, False), (4, 1, False)]
    # Only prefetched, as far as anybody knows: the attempt is not counted.
    assert sorted(got.wait(5)) == [(n, 1, n < 3) for n in range(5)]
    assert time.monotonic() - began > 1
    rows.drained()


def test_poison_is_dead_lettered_and_what_was_prefetched_beside_it_is_not(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, caller: Callable[[], Caller]
) -> None:
    for n in range(2):
        numbers.send(n)
    stream = broker.stream_id("numbers")
    watcher = caller()
    watcher.register(stream)
    for turn in range(4):
        victim = caller()
        victim.register(stream, count=3)
        poison, _prefetched = victim.claim(stream)
        # The first death is not counted: nobody knows whether it had begun.
        assert poison[7] is (turn > 0)
        if poison[7]:
            assert (
                victim("mark_started", victim.token, arrays.Uuids([poison[0]]), arrays.Uuids([poison[1]]))[0][0] == []
            )
        rows("UPDATE durable.worker SET beat_at = '2000-01-01' WHERE worker_id = %s", victim.worker_id)
        beat = watcher.beat_of(victim.worker_id)
        wait_until(lambda v=victim, b=beat: watcher("reclaim", watcher.token, v.worker_id, b) != [(0, 0)])  # type: ignore[misc]
    assert [(d[0], d[2]) for d in rows.dead_letters()] == [("numbers", "poison")]
    assert [m[:3] for m in rows.messages()] == [("numbers", 1, False)]


def test_a_reclaimed_message_that_was_taken_again_does_not_begin_here(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    """Its lease went to somebody else between the claim and the thread: refused before the actor, and no place lost."""
    broker, got, skipped = make_broker(), Record(), Record()

    class Steal(dramatiq.Middleware):
        def after_skip_message(self, broker: Any, message: Any) -> None:
            skipped(message.args[0])

    broker.add_middleware(Steal())

    @dramatiq.actor(broker=broker, queue_name="numbers")
    def numbers(n: int) -> None:
        got(n)

    begun, go = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker, queue_name="numbers", priority=-1)
    def block() -> None:
        begun.set()
        go.wait(20)

    numbers.send(0)
    rows("UPDATE durable.message SET reclaimed = true")
    claimer = broker._ensure_claimer()
    deliver = claimer.deliver

    def stolen(row: Any) -> Any:
        if row[7] and not skipped.values:
            rows("UPDATE durable.message SET lease_token = gen_random_uuid()")
        return deliver(row)

    claimer.deliver = stolen
    start_worker(broker, threads=1)
    assert skipped.wait(1) == [0]
    wait_until(lambda: not claimer.held)
    numbers.send(1)
    assert got.wait(1) == [1]


def test_an_outage_ages_no_lease(broker: durable.DurableBroker, numbers: Any, caller: Callable[[], Caller]) -> None:
    """A worker is dead when somebody saw its heartbeat unmoved for the whole delay, and the server was up as long."""
    from dramatiq_durable.leases import Membership

    numbers.send(1)
    stream = broker.stream_id("numbers")
    silent, watcher = caller(), caller()
    silent.register(stream, delay=1000)
    silent.claim(stream)
    clock = [100.0]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("dramatiq_durable.leases.time.monotonic", lambda: clock[0])
        membership = Membership(broker.procedures, 1.0, 3)
        membership.register(watcher.conn, [stream], 1)
        reclaimed = []
        m.setattr(broker.procedures, "reclaim", lambda *a: (reclaimed.append(a), (0, 0))[1])
        membership.beat(watcher.conn, [])
        clock[0] += 0.9
        membership.beat(watcher.conn, [])
        membership.forget_peers()  # the connection was lost
        clock[0] += 0.9
        membership.beat(watcher.conn, [])
        clock[0] += 0.9
        membership.beat(watcher.conn, [])
        assert reclaimed == []
        clock[0] += 0.2
        membership.beat(watcher.conn, [])
        assert len(reclaimed) == 1


def test_a_worker_that_was_declared_dead_registers_again(
    make_broker: Callable[..., durable.DurableBroker],
    start_worker: Any,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker, got = make_broker(), Record()
    begun, go = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker, queue_name="numbers")
    def numbers(n: int) -> None:
        got(n)
        if n == 0 and got.values.count(0) == 1:
            begun.set()
            go.wait(20)

    start_worker(broker)
    numbers.send(0)
    assert begun.wait(10)
    with rows.conn.transaction():
        # What a reclaim does.
        rows("DELETE FROM durable.worker")
        rows("UPDATE durable.message SET lease_token = NULL, worker_id = NULL, reclaimed = true")
    numbers.send(1)
    assert sorted(got.wait(3)) == [0, 0, 1]
    assert "declared dead" in caplog.text
    go.set()
    wait_until(lambda: "the lease on" in caplog.text)
    rows.drained()
    assert len(got.values) == 3


@pytest.mark.administrator
def test_what_expires_faster_than_a_sweep_forgets_takes_several(broker: durable.DurableBroker, rows: Rows) -> None:
    """A worker stores thousands of results a second: all of them have to go again."""
    broker.stream_id("default")
    rows("ALTER TABLE durable.result SET (autovacuum_enabled = false)")
    rows(
        "INSERT INTO durable.result SELECT 'r' || n, 0, now() - interval '1 hour', '' FROM generate_series(1, 40000) n"
    )
    membership = Membership(broker.procedures, 60.0, 3)
    with broker.database.connection() as conn:
        membership.register(conn, [broker.stream_id("default")], 8)
        membership._next_sweep = 0.0  # due
        for _ in range(7):
            membership.beat(conn, [])
            if rows("SELECT count(*) FROM durable.result") == [(0,)]:
                break
            assert membership._next_sweep <= time.monotonic(), "the next heartbeat goes on"
        else:
            pytest.fail("as many heartbeats as sweeps are needed")
        membership.beat(conn, [])
        assert membership._next_sweep > time.monotonic(), "nothing is left"
