"""Results, limiters and what a sweep forgets: each login's own, whatever keys another one knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dramatiq_durable.arrays import Texts, Uuid
from dramatiq_durable.operations import Result
from tests.sql.api import Session, new_id

from .conftest import Grant

#: Milliseconds.
LONG, LONGEST = 60_000, 315_360_000_000


def found(session: Session, key: str, stream: str | None) -> bytes | None:
    rows = session.call("get_results", Texts([key]), Texts([stream]), None, 0)
    return rows[0][1] if rows else None


def leave_result(session: Session, stream: int, value: bytes, ttl: int = LONG) -> None:
    """A worker of this session's login stores a result with the key ``key``, with a message of a stream."""
    worker = session.register(stream)
    assert worker.leave(worker.one(), results=[Result("key", value, ttl)]) == [1]


@pytest.mark.parametrize("administrator", [True, False])
def test_a_result_cannot_be_forged_by_whoever_knows_its_key(db: Session, grant: Grant, administrator: bool) -> None:
    """The reader may use both streams; the forger only one of them, and what it stores lives longer."""
    forger = grant(consume=("mine",))
    victim = grant(consume=("theirs",))
    reader = db if administrator else grant(produce=("mine", "theirs"))
    db.enqueue([db.stream("mine"), db.stream("theirs")], b"1", b"2")
    leave_result(forger, db.stream("mine"), b"forged", LONGEST)
    forger.call("store_result", "key", b"forged", LONGEST)
    assert found(reader, "key", "theirs") is None
    leave_result(victim, db.stream("theirs"), b"true")
    assert found(reader, "key", "theirs") == b"true"
    assert found(reader, "key", "mine") == b"forged", "of its own stream it may say what it likes"


@pytest.mark.parametrize("administrator", [True, False])
def test_nobody_wakes_who_waits_for_his_own_event(db: Session, grant: Grant, administrator: bool) -> None:
    attacker = grant(consume=("mine",))
    waiting = db if administrator else grant(consume=("mine",))
    db.enqueue(db.stream("mine"), b"1")
    leave_result(attacker, db.stream("mine"), b"1")
    attacker.call("store_result", "key", b"1", LONG)
    assert found(waiting, "key", None) is None
    waiting.call("store_result", "key", b"2", LONG)
    assert found(waiting, "key", None) == b"2"


@pytest.mark.parametrize("stream", ["theirs", "missing", "", None])
def test_results_of_a_foreign_stream_look_like_missing_ones(db: Session, grant: Grant, stream: str | None) -> None:
    attacker = grant(consume=("mine",), produce=("mine",))
    victim = grant(consume=("theirs",))
    db.enqueue(db.stream("theirs"), b"1")
    leave_result(victim, db.stream("theirs"), b"secret")
    victim.call("store_result", "key", b"secret", LONG)
    db.call("store_result", "key", b"secret", LONG)
    assert found(attacker, "key", stream) is None


def test_limiters_of_others_are_neither_seen_nor_changed(db: Session, grant: Grant) -> None:
    one, other = grant(consume=("mine",)), grant(consume=("mine",))
    for session in (db, one, other):
        assert session.call("limiter_add", "mutex", 1, LONG) == [(True,)]
    assert one.call("limiter_change", "mutex", 10, None, None, LONG) == [(True,)]
    assert one.call("limiter_change_sum", "mutex@", "mutex", Texts(["mutex"]), 1, 100, LONG) == [(True,)]
    assert db.sql("SELECT value::int FROM durable.limiter WHERE key = 'mutex' ORDER BY value") == [(1,), (1,), (12,)]


#: What is over by so much could be swept by an administrator's worker.
OVER = "10 days"


@pytest.fixture
def over(db: Session, grant: Grant) -> Callable[[], dict[str, Callable[[], Any]]]:
    """Things of a victim that are over; what it does when it comes back to them."""
    victim = grant(consume=("theirs",), produce=("theirs",))
    stream = db.stream("theirs")
    victim.call("limiter_add", "mutex", 1, 0)
    victim.call("limiter_add", "window@", 1, 0)
    victim.call("store_result", "event", b"1", 0)
    victim.enqueue(stream, b"1")
    leave_result(victim, stream, b"1", 0)
    for table, column in (("limiter", "expires_at"), ("result", "expires_at"), ("sender", "at")):
        db.sql(f"UPDATE durable.{table} SET {column} = {column} - interval '{OVER}'")
    victim.sql("SET statement_timeout = '200ms'")
    return lambda: {
        "add": lambda: victim.call("limiter_add", "mutex", 1, LONG),
        "sum": lambda: victim.call("limiter_change_sum", "window@", "window@1", Texts(["window@1"]), 1, 9, LONG),
        "event": lambda: victim.call("store_result", "event", b"2", LONG),
        "send": lambda: victim.enqueue(stream, b"2"),
    }


def test_a_sweep_that_is_kept_open_holds_up_nobody_else(
    db: Session, grant: Grant, over: Callable[[], dict[str, Callable[[], Any]]]
) -> None:
    attacker = grant(consume=("mine",))
    worker = attacker.register(db.stream("mine"))
    attacker.begin()
    worker.call("sweep")
    for attempt in over().values():
        attempt()  # a wait would end in an error
    attacker.rollback()


def test_a_sweep_forgets_what_is_ones_own_and_in_the_end_everything(
    db: Session, grant: Grant, over: Callable[[], dict[str, Callable[[], Any]]]
) -> None:
    login = grant(consume=("mine",), produce=("mine",))
    stream = db.stream("mine")
    worker = login.register(stream)
    login.call("limiter_add", "mutex", 1, 0)
    login.call("store_result", "event", b"1", 0)
    login.enqueue(stream, b"1")
    leave_result(login, stream, b"1", 0)
    login.call("get_results", Texts(["nobody's"]), Texts([None]), Uuid(new_id()), 0)
    for table, column in (("limiter", "expires_at"), ("result", "expires_at"), ("sender", "at")):
        db.sql(f"UPDATE durable.{table} SET {column} = {column} - interval '{OVER}'")
    assert worker.call("sweep") == [(5,)]
    left = "SELECT " + " + ".join(f"(SELECT count(*) FROM durable.{t})" for t in ("limiter", "result", "sender"))
    assert db.value(left) == 2 + 2 + 1
    for table, column in (("limiter", "expires_at"), ("result", "expires_at"), ("sender", "at")):
        db.sql(f"UPDATE durable.{table} SET {column} = {column} - interval '30 days'")
    assert worker.call("sweep") == [(5,)]
    assert db.value(left) == 0


def test_an_event_for_which_very_many_wait_wakes_some(db: Session) -> None:
    """Whoever knows a key may wait for it: the one who stores it does not pay for all of them."""
    db.sql(
        "INSERT INTO durable.result_waiter SELECT 'event', gen_random_uuid(), now() + interval '1 hour' "
        "FROM generate_series(1, 30000)"
    )
    read = "SELECT idx_tup_fetch::int FROM pg_stat_xact_user_tables WHERE relname = 'result_waiter'"
    db.begin()
    before = db.value(read)
    db.call("store_result", "event", b"1", LONG)
    assert 0 < db.value(read) - before <= 10_000
    db.rollback()
