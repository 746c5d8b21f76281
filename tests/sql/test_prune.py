"""Pruning: what is over for long goes, what somebody still needs stays, and a sweep scans no table."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import timedelta

import pytest

from dramatiq_durable.arrays import Texts, Uuid

from .api import Session, new_id, start_child, step

DAY = timedelta(days=1)


def close(db: Session, run: bytes, *, days: float = 2) -> None:
    db.sql(
        "UPDATE durable.run SET status = 'completed', closed_at = clock_timestamp() - %s WHERE run_id = %s",
        timedelta(days=days),
        Uuid(run),
    )


def prune(db: Session, age: timedelta = DAY, *, limit: int = 2) -> int:
    """In as many calls as it takes; answers how many runs are gone."""
    [(before,)] = db.sql("SELECT runs_before FROM durable.count_prunable(%s, NULL)", age)
    pruned, at, more = 0, (None, None), True
    while more:
        [(runs, _, closed, run, more)] = db.sql(
            "SELECT * FROM durable.prune_runs(%s, %s, %s, %s::int)", before, *at, limit
        )
        pruned += runs
        at = (closed, run and Uuid(run))
    return pruned


def runs(db: Session) -> set[bytes]:
    return {uuid.UUID(str(id)).bytes for (id,) in db.sql("SELECT run_id::text FROM durable.run")}


def counted(db: Session, age: timedelta | None = DAY) -> tuple[int, int]:
    """How many runs would go, and how many are needed."""
    [(prunable, kept)] = db.sql("SELECT runs, kept FROM durable.count_prunable(%s, NULL)", age)
    return prunable, kept


def test_old_runs_go_with_all_that_is_theirs(db: Session) -> None:
    stream = db.stream()
    old, recent, live = (db.start(stream, f"w-{n}")[1] for n in range(3))
    for run in (old, recent, live):
        db.call("await_run", Uuid(run), Uuid(new_id()))
        db.post(run, key="once")
    close(db, old)
    close(db, recent, days=0.5)
    assert counted(db) == (1, 0)
    assert prune(db) == 1
    assert runs(db) == {recent, live}
    for table in ("event", "inbox", "signal_key", "waiter"):
        left = db.sql(f"SELECT DISTINCT run_id::text FROM durable.{table}")
        assert {uuid.UUID(str(id)).bytes for (id,) in left} == {recent, live}, table
    assert (counted(db), prune(db)) == ((0, 0), 0)
    # A task of it that nobody had claimed yet finds nothing to do.
    worker = db.register(stream)
    [task, *_] = [c for c in worker.claim() if c.run_id == old]
    assert db.call("run_of_lease", Uuid(worker.token), Uuid(task.message_id), Uuid(task.lease)) == []


def with_child(db: Session) -> tuple[bytes, bytes]:
    """A run, and its child."""
    stream = db.stream()
    _, parent = db.start(stream, f"parent-{new_id().hex()}")
    worker = db.register(stream)
    advance = step(next(c for c in worker.claim() if c.run_id == parent), 1, ("ChildStarted", 1, "c"))
    advance.children = [start_child(stream, 1, f"child-{new_id().hex()}", parent_close="abandon")]
    assert worker.advance(advance) == ["ok"]
    [(child,)] = db.sql("SELECT run_id::text FROM durable.run WHERE parent_run_id = %s", Uuid(parent))
    return parent, uuid.UUID(str(child)).bytes


def test_a_child_stays_as_long_as_its_parent_runs(db: Session) -> None:
    parent, child = with_child(db)
    close(db, child)
    assert (counted(db), prune(db)) == ((0, 1), 0)
    close(db, parent)
    assert (counted(db), prune(db)) == ((2, 0), 2)
    assert runs(db) == set()


def test_a_parent_stays_as_long_as_a_child_runs(db: Session) -> None:
    """The child is told its parent's workflow id, whenever it is loaded again."""
    parent, child = with_child(db)
    close(db, parent)
    assert (counted(db), prune(db)) == ((0, 1), 0)
    close(db, child, days=0.5)
    assert prune(db) == 1
    assert runs(db) == {child}


def test_what_is_kept_does_not_stand_in_the_way(db: Session) -> None:
    kept = [with_child(db) for _ in range(3)]
    for _, child in kept:
        close(db, child, days=9)
    stream = db.stream()
    for n in range(5):
        close(db, db.start(stream, f"w-{n}")[1])
    assert counted(db) == (5, 3)
    assert prune(db) == 5
    assert runs(db) == {run for pair in kept for run in pair}


def test_long_histories_make_short_transactions(db: Session) -> None:
    stream = db.stream()
    for n in range(3):
        run = db.start(stream, f"w-{n}")[1]
        close(db, run)
        db.sql("UPDATE durable.run SET last_event = 15000 WHERE run_id = %s", Uuid(run))
    [(gone, more)] = db.sql("SELECT runs, more FROM durable.prune_runs(clock_timestamp(), NULL, NULL, 100)")
    assert (gone, more) == (2, True)
    assert prune(db, limit=100) == 1


def test_nobody_is_waited_for(db: Session, connect: Callable[..., Session]) -> None:
    stream = db.stream()
    held, free = (db.start(stream, f"w-{n}")[1] for n in range(2))
    close(db, held)
    close(db, free)
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    plain = [c for c in worker.claim() if c.kind == "m"]
    worker.bury(*plain)
    other = connect()
    other.begin()
    other.sql("SELECT 1 FROM durable.run WHERE run_id = %s FOR UPDATE", Uuid(held))
    other.sql("SELECT 1 FROM durable.dead_letter WHERE message_id = %s FOR UPDATE", Uuid(plain[0].message_id))
    db.sql("SET statement_timeout = '1s'")
    assert prune(db) == 1
    assert db.value("SELECT durable.prune_dead_letters(clock_timestamp(), 10)") == 1
    other.rollback()
    assert prune(db) == 1


def test_dead_letters_go_by_age_and_in_batches(db: Session) -> None:
    for name in ("one", "two"):
        stream = db.stream(name)
        db.enqueue(stream, *[b"x"] * 4)
        worker = db.register(stream)
        worker.bury(*worker.claim())
    db.sql("UPDATE durable.dead_letter SET died_at = died_at - interval '2 days' WHERE dead_letter_id %% 4 <> 0")
    assert db.value("SELECT dead_letters FROM durable.count_prunable(NULL, %s)", DAY) == 6
    before = "clock_timestamp() - interval '1 day'"
    assert [db.value(f"SELECT durable.prune_dead_letters({before}, 4)") for _ in range(3)] == [4, 2, 0]
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 2


def test_what_has_expired_goes_whatever_the_ages(db: Session) -> None:
    for n in range(3):
        db.call("store_result", f"gone {n}", b"v", 0)
        db.call("limiter_add", f"window@{n}", 1, 0)
    db.call("store_result", "kept", b"v", 60_000)
    db.call("get_results", Texts(["nobody"]), Texts([None]), Uuid(new_id()), 0)
    db.enqueue(db.stream(), b"1")
    db.sql("UPDATE durable.limiter SET expires_at = expires_at - interval '2 hours'")
    db.sql("UPDATE durable.sender SET at = at - interval '8 days'")
    found = "results, waiters, limiters, senders"
    assert db.sql(f"SELECT {found} FROM durable.count_prunable(NULL, NULL)") == [(3, 1, 3, 1)]
    assert db.sql(f"SELECT {found}, windows FROM durable.prune_expired(0)") == [(3, 1, 3, 1, 1)]
    assert db.sql(f"SELECT {found} FROM durable.count_prunable(NULL, NULL)") == [(0, 0, 0, 0)]
    assert db.sql("SELECT key FROM durable.result") == [("kept",)]


@pytest.fixture
def large(db: Session) -> int:
    """Tables of several pieces: what is over lies in the last of them.  Answers the number of pieces."""
    db.sql(
        "INSERT INTO durable.limiter (key, space, value, expires_at) SELECT 'k' || n, 0, 1, "
        "  clock_timestamp() + CASE WHEN n > 49000 THEN interval '-2 hours' ELSE interval '1 hour' END "
        "FROM generate_series(1, 50000) n"
    )
    db.sql(
        "INSERT INTO durable.sender (sender, login, batch, at) "
        "SELECT gen_random_uuid(), session_user, 1, clock_timestamp() FROM generate_series(1, 20000)"
    )
    pages = db.value(
        "SELECT max(pg_relation_size(t) / 8192) FROM unnest('{durable.limiter,durable.sender}'::regclass[]) t"
    )
    return -(-int(pages) // 500)


def test_a_large_table_is_looked_at_a_piece_at_a_time(db: Session, large: int) -> None:
    assert large > 1
    pieces = [db.sql("SELECT limiters, windows FROM durable.prune_expired(%s)", n)[0] for n in range(large)]
    assert {windows for _, windows in pieces} == {large}
    assert sum(limiters for limiters, _ in pieces) == 1000
    assert db.value("SELECT count(*) FROM durable.limiter") == 49_000


def test_a_sweep_scans_no_table(db: Session, large: int) -> None:
    worker = db.register(db.stream())
    scans = (
        "SELECT sum(seq_scan)::int FROM pg_stat_xact_user_tables WHERE schemaname = 'durable' "
        "AND relname IN ('limiter', 'sender', 'waiter', 'result_waiter')"
    )
    for _ in range(8):  # the plans that are made once and for all as well
        db.begin()
        before = db.value(scans)
        db.call("sweep", Uuid(worker.token))
        assert db.value(scans) == before
        db.commit()
