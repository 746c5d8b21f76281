"""What a login with limits may have in each table, however it comes there; nobody else pays for it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.numeric import Int4, Int8

from dramatiq_durable.arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from dramatiq_durable.database import translate
from dramatiq_durable.errors import LimitReached
from dramatiq_durable.operations import Enqueue
from tests.sql.api import Session, new_id, send_activity, step

from .conftest import Limited, Scoped

LIMIT = 5


def refused(call: Callable[[], Any]) -> str:
    """What a call says that is over the limit."""
    with pytest.raises(psycopg.Error) as info:
        call()
    assert info.value.sqlstate == "DD007", info.value
    error = translate(info.value)
    assert isinstance(error, LimitReached)
    assert "max_live" in str(error)
    return str(error)


def until_refused(call: Callable[[], Any], most: int) -> int:
    """How often a call succeeds before it is over the limit."""
    for n in range(most):
        try:
            call()
        except psycopg.Error as e:
            if e.sqlstate != "DD007":
                raise
            return n
    raise AssertionError(f"{most} calls were not refused")


def count(db: Session, table: str) -> int:
    return int(db.value(f"SELECT count(*) FROM durable.{table}"))


SENDERS: dict[str, Callable[[Scoped, int], Any]] = {
    "enqueue_message": lambda s, q: s.enqueue_one(q),
    "enqueue_messages": lambda s, q: s.enqueue(q, b"x"),
    "in a transaction": lambda s, q: s.call(
        "enqueue_messages", None, None, Ints([q]), Uuids([new_id()]), Texts(["a"]), Ints([0]), Longs([0]), Blobs([b"x"])
    ),
    "enqueue_keyed": lambda s, q: s.enqueue_keyed(q, uuid.uuid4().hex),
    "enqueue": lambda s, q: s.sql("SELECT durable.enqueue('s', 'actor')"),
}


@pytest.mark.parametrize("how", SENDERS)
def test_messages(db: Session, limited: Limited, how: str) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=LIMIT)
    for _ in range(LIMIT):
        SENDERS[how](session, stream)
    refused(lambda: SENDERS[how](session, stream))
    assert count(db, "message") == LIMIT
    # It says nothing of others, and others are not held up.
    db.enqueue(stream, *[b"x"] * LIMIT)
    assert count(db, "message") == 2 * LIMIT
    # There is room again once one is done.
    worker = session.register(stream)
    worker.ack(worker.claim(1)[0])
    SENDERS[how](session, stream)
    refused(lambda: SENDERS[how](session, stream))


def test_nothing_of_a_call_that_is_over_is_stored(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(produce=("s",), max_live=LIMIT)
    refused(lambda: session.enqueue(stream, *[os.urandom(1_000_000)] * (LIMIT + 1)))
    assert count(db, "message") == 0
    # What was written and rolled back would be there, dead.
    assert db.value("SELECT pg_table_size('durable.message')") < 1_000_000, "refused before it is written"
    assert session.enqueue(stream, *[b"x"] * LIMIT) == [1] * LIMIT


def test_starts_of_runs(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=LIMIT)
    assert until_refused(lambda: session.start(stream, uuid.uuid4().hex), 100) == LIMIT
    refused(lambda: session.sql("SELECT durable.start_workflow('s', 'w')"))
    # Those that wait for something have no message, and count all the same.
    db.sql("DELETE FROM durable.message")
    refused(lambda: session.start(stream, uuid.uuid4().hex))
    assert count(db, "run") == LIMIT
    db.sql("UPDATE durable.run SET status = 'completed', closed_at = now()")
    session.start(stream, "one-more")


def test_signals_and_updates(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=LIMIT)
    _, run = db.start(stream, "order-1")
    for n in range(LIMIT):
        if n % 2:
            session.post(run)
        else:
            session.update(run, str(n))
    refused(lambda: session.post(run))
    # Deleting the tasks, as a worker of its own could, makes no room.
    db.sql("DELETE FROM durable.message WHERE kind = 't'")
    refused(lambda: session.post(run))
    assert count(db, "inbox") == LIMIT
    db.post(run)
    db.sql("DELETE FROM durable.inbox")
    session.post(run)


def test_keys_of_signals(db: Session, limited: Limited) -> None:
    session = limited(consume=("s",), max_live=LIMIT)
    _, run = db.start(db.stream("s"), "order-1")

    def post(key: str) -> Any:
        db.sql("DELETE FROM durable.message WHERE kind = 't'")
        db.sql("DELETE FROM durable.inbox")
        return session.post(run, key=key)

    for n in range(LIMIT):
        post(str(n))
    refused(lambda: post("one more"))
    assert count(db, "signal_key") == LIMIT


def test_queries(db: Session, limited: Limited) -> None:
    session = limited(consume=("s",), max_live=LIMIT)
    _, run = db.start(db.stream("s"), "order-1")

    def ask() -> Any:
        db.sql("DELETE FROM durable.message WHERE kind = 'q'")
        return session.ask(run)

    for _ in range(LIMIT):
        ask()
    refused(ask)
    assert count(db, "run_query") == LIMIT


def test_a_step_sends_no_more(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), max_live=LIMIT)
    db.start(stream, "order-1")
    worker = session.register(stream)
    task = worker.one()
    advance = step(task, 1, *[("ActivityScheduled", n, "act") for n in range(1, LIMIT + 2)])
    advance.sends = [send_activity(stream, n) for n in range(1, LIMIT + 2)]
    refused(lambda: worker.advance(advance))
    assert count(db, "message") == 1, "the task is still there, for its failure to be shown and for another try"
    advance = step(task, 1, *[("ActivityScheduled", n, "act") for n in range(1, LIMIT + 1)])
    advance.sends = [send_activity(stream, n) for n in range(1, LIMIT + 1)]
    worker.advance(advance)
    assert count(db, "message") == LIMIT


def test_a_history_has_an_end(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), max_live=LIMIT)
    db.start(stream, "order-1")
    worker = session.register(stream)
    advance = step(worker.one(), 1, ("TimerStarted", 1, None))
    advance.last = 100_001
    refused(lambda: worker.advance(advance))


def test_what_a_message_leaves_behind(db: Session, limited: Limited) -> None:
    """The message goes back, to be tried again; nothing of what it would have left is stored."""
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=LIMIT)
    db.enqueue(stream, b"x")
    worker = session.register(stream)
    message = worker.one()
    session.enqueue(stream, *[b"x"] * LIMIT, delay=3_600_000)
    assert worker.leave(message, sends=[Enqueue(stream, new_id(), "actor", 0, 0, b"x")]) == [-2]
    assert count(db, "message") == LIMIT + 1
    assert db.value("SELECT last_failure LIKE '%%max_live%%' FROM durable.message WHERE unsettled = 1")


def test_what_follows_a_message_takes_its_place(db: Session, limited: Limited) -> None:
    """And of one message only one, however often it is named and left."""
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=LIMIT)
    session.enqueue(stream, *[b"x"] * LIMIT)
    worker = session.register(stream)
    first, second, *_ = worker.claim()

    def sends(count: int) -> list[Enqueue]:
        return [Enqueue(stream, new_id(), "actor", 0, 0, b"x") for _ in range(count)]

    assert worker.leave(first, first, sends=sends(1)) == [1, -2]
    assert count(db, "message") == LIMIT + 1
    assert worker.leave(second, sends=sends(1)) == [-2], "the first has not ended"
    assert count(db, "message") == LIMIT + 1


WAITS: dict[str, tuple[str, Callable[[Scoped, bytes], Any]]] = {
    "waiter": ("waiter", lambda s, run: s.call("await_run", Uuid(run), Uuid(new_id()))),
    "output": (
        "waiter",
        lambda s, run: s.call("read_output", Uuid(run), Int4(0), Int4(10), Uuid(new_id()), Int8(1000)),
    ),
    "result_waiter": (
        "result_waiter",
        lambda s, run: s.call("get_results", Texts([uuid.uuid4().hex]), Texts([None]), Uuid(new_id()), 1000),
    ),
}


@pytest.mark.parametrize("what", WAITS)
def test_whoever_waits_too_often_is_not_told(db: Session, limited: Limited, what: str) -> None:
    table, wait = WAITS[what]
    session = limited(consume=("s",), max_live=LIMIT)
    _, run = db.start(db.stream("s"), "order-1")
    for _ in range(2 * LIMIT):
        wait(session, run)
    assert count(db, table) == LIMIT


def limiter(procedure: str) -> Callable[[Scoped, str], Any]:
    if procedure == "limiter_add":
        return lambda s, key: s.call("limiter_add", key, 1, 60_000)
    if procedure == "limiter_change":
        return lambda s, key: s.call("limiter_change", key, 1, None, None, 60_000)
    return lambda s, key: s.call("limiter_change_sum", key, key, Texts([key]), 1, 10, 60_000)


@pytest.mark.parametrize("procedure", ["limiter_add", "limiter_change", "limiter_change_sum"])
def test_keys_of_limiters(db: Session, limited: Limited, procedure: str) -> None:
    call = limiter(procedure)
    session = limited(consume=("s",), max_live=LIMIT)
    for n in range(LIMIT):
        call(session, f"k{n}")
    refused(lambda: call(session, "one more"))
    call(session, "k0")
    assert count(db, "limiter") == LIMIT


def test_results(db: Session, limited: Limited) -> None:
    session = limited(consume=("s",), max_live=1)
    for n in range(10):
        session.call("store_result", f"k{n}", b"x", 60_000)
    refused(lambda: session.call("store_result", "one more", b"x", 60_000))
    assert count(db, "result") == 10


def test_dead_letters(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), max_live=1)
    worker = session.register(stream)

    def bury() -> Any:
        db.enqueue(stream, b"x")
        return worker.bury(worker.one())

    for _ in range(10):
        bury()
    refused(bury)
    assert count(db, "dead_letter") == 10


def test_workers_senders_schedules_and_subscriptions(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=1000)
    for _ in range(100):
        session.register(stream)
    refused(lambda: session.register(stream))

    def subscribe(n: int) -> Any:
        return session.call("subscribe", Texts(["t"]), Ints([stream]), Texts([f"a{n}"]), Ints([0]))

    for n in range(100):
        subscribe(n)
    refused(lambda: subscribe(100))
    assert subscribe(0)[0][0] == [False], "one that is there already may be repeated"
    for n in range(100):
        session.schedule(f"s{n}", stream)
    refused(lambda: session.schedule("one more", stream))
    db.sql(
        "INSERT INTO durable.sender (sender, login, batch, at, lot) "
        "SELECT gen_random_uuid(), %s::text, 1, now(), %s::text || '/' || lpad((n %% 64)::text, 2, '0') "
        "FROM generate_series(1, 10000) n",
        session.login, session.login,
    )  # fmt: skip
    other = Session(session.url)
    refused(lambda: other.enqueue(stream, b"x"))
    other.close()
    assert session.enqueue(stream, b"x") == [1], "a process that is known goes on"


def test_a_schedule_fires_for_whoever_made_it(db: Session, limited: Limited) -> None:
    """Also where an unlimited worker fires it."""
    stream = db.stream("s")
    session = limited(produce=("s",), max_live=LIMIT)
    session.schedule("s", stream)
    query = "SELECT durable.fire_one(s, 'w', gen_random_uuid(), 'x', now()) FROM durable.schedule s"
    assert [db.value(query) for _ in range(LIMIT + 1)] == [True] * (LIMIT - 1) + [False] * 2, "its tick counts as well"
    refused(lambda: session.enqueue(stream, b"x"))


def test_a_subscriber_falls_behind_no_further(db: Session, limited: Limited) -> None:
    session = limited(consume=("s",), max_live=LIMIT)
    stream = db.stream("s")
    session.call("subscribe", Texts(["t"]), Ints([stream]), Texts(["a"]), Ints([0]))
    _, run = db.start(stream, "order-1")
    for n in range(2 * LIMIT):
        db.sql("SELECT durable.emit_to_topic(%s::uuid, %s, 't')", str(uuid.UUID(bytes=run)), n)
    assert count(db, "topic_event") <= LIMIT


def test_many_are_counted_by_a_lot_of_them(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(produce=("s",), max_live=20_000)
    stored = 500 * until_refused(lambda: session.enqueue(stream, *[b"x"] * 500), 100)
    assert 15_000 <= stored <= 25_000
    # Whoever tries again and again gets in a little more, and no end of it.
    for _ in range(200):
        with contextlib.suppress(psycopg.Error):
            session.enqueue(stream, *[b"x"] * 500)
            stored += 500
    assert stored <= 30_000
    # The caller's seed decides nothing.
    lots = []
    for _ in range(8):
        session.sql("SELECT setseed(0.5)")
        db.sql("DELETE FROM durable.message")
        session.enqueue(stream, b"x")
        lots.append(db.value("SELECT lot FROM durable.message"))
    assert len(set(lots)) > 1


def test_a_look_reads_its_index_only(db: Session, limited: Limited) -> None:
    stream = db.stream("s")
    session = limited(consume=("s",), produce=("s",), max_live=500)
    db.enqueue(stream, *[b"x"] * 5000)
    session.enqueue(stream, *[b"x"] * 100)
    for table in ("message", "inbox", "run", "result", "limiter", "dead_letter", "waiter"):
        db.sql("SET enable_seqscan = off")
        db.sql("SET enable_bitmapscan = off")
        condition = " AND o.status = 'running'" if table == "run" else ""
        plan = db.sql(
            f"EXPLAIN SELECT 1 FROM durable.{table} o WHERE o.lot >= 'a/' AND o.lot < 'a0'{condition} OFFSET 5 LIMIT 1"
        )
        assert any(f"Index Only Scan using {table}_lot" in row[0] for row in plan), plan


def test_others_have_no_lot(db: Session, limited: Limited) -> None:
    """An administrator's rows and an application's are in none of these indexes."""
    stream = db.stream("s")
    db.enqueue(stream, *[b"x"] * 10)
    db.start(stream, "order-1")
    db.call("store_result", "k", b"x", 60_000)
    db.call("limiter_add", "k", 1, 60_000)
    for table in ("message", "run", "result", "limiter", "sender"):
        assert db.value(f"SELECT count(lot) FROM durable.{table}") == 0
        assert db.value(f"SELECT pg_relation_size('durable.{table}_lot')") == 8192, "nothing but its first page"
    session = limited(produce=("s",))
    session.enqueue(stream, b"x")
    assert db.value("SELECT count(lot) FROM durable.message") == 1
    for _ in range(3):
        assert session.enqueue(stream, *[b"x"] * 100) == [1] * 100, "no limit, where none was set"


def test_a_failure_is_no_larger_than_anybody_reads(db: Session, limited: Limited) -> None:
    session = limited(consume=("own",), produce=("own",))
    stream = session.stream("own")
    worker, large = session.register(stream), "x" * 20_000_000
    session.enqueue(stream, *[b"x"] * 4)
    again, dead, back, back_dead = worker.claim()
    assert worker.settle("reschedule", [again], Longs([3_600_000]), Blobs([None]), Texts([large])) == []
    assert worker.settle("bury", [dead], Blobs([None]), Texts([large])) == []
    db.sql("UPDATE durable.message SET unsettled = 4 WHERE message_id = %s", Uuid(back_dead.message_id))
    assert worker.settle("fail_settling", [back, back_dead], Texts([large, large])) == []
    session.start(stream, "w")
    task = worker.one()
    assert worker.call("fail_task", Uuid(task.message_id), Uuid(task.lease), large, 3_600_000) == [(True,)]
    session.start(stream, "v")
    assert worker.advance(step(worker.one(), 1, (large, 1, "x"))) == ["ok"]
    assert db.value("SELECT max(length(type)) FROM durable.event") == 200
    for column, table in (("last_failure", "message"), ("failure", "dead_letter"), ("task_failure", "run")):
        sizes = db.sql(f"SELECT length({column}) FROM durable.{table} WHERE {column} IS NOT NULL")
        assert sizes
        assert all(1_000_000 <= size <= 1_000_100 for (size,) in sizes), table
