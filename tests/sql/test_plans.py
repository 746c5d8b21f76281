"""Hot calls stay on their indexes, also where the statistics say that a table is empty or where most rows are of no
interest.  Counted in rows and scans by the server itself: times would say little on a busy machine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dramatiq_durable.arrays import Texts, Uuid
from dramatiq_durable.operations import Result

from .api import Session, new_id, send_activity, send_timer, step
from .test_advance import begin

#: Rows of the table that a call has no business with.
MANY = 20_000

#: How many rows a call for one message may look at.
FEW = 30


class Counted:
    """What a transaction did to a table."""

    seq_scans = rows = updates = hot = 0

    @property
    def cheap(self) -> bool:
        return self.seq_scans == 0 and self.rows < FEW

    def __repr__(self) -> str:
        return f"{self.seq_scans} scans, {self.rows} rows read, {self.updates} updates, {self.hot} of them HOT"


def read(db: Session) -> dict[str, list[int]]:
    """The session's own counters.

    They also have what earlier transactions did not yet hand to the statistics, so it is their difference that counts.
    """
    rows = db.sql(
        "SELECT relname::text, seq_scan::int, (seq_tup_read + idx_tup_fetch)::int, n_tup_upd::int, n_tup_hot_upd::int "
        "FROM pg_stat_xact_user_tables WHERE schemaname = 'durable'"
    )
    return {row[0]: list(row[1:]) for row in rows}


@contextmanager
def counting(db: Session, *tables: str) -> Iterator[dict[str, Counted]]:
    """Runs its block as one transaction, and counts what that did, by table."""
    counted = {table: Counted() for table in tables or ("message", "run", "event", "inbox")}
    db.begin()
    before = read(db)
    yield counted
    after = read(db)
    db.commit()
    for table, counts in counted.items():
        difference = [b - a for a, b in zip(before.get(table, [0] * 4), after[table], strict=True)]
        counts.seq_scans, counts.rows, counts.updates, counts.hot = difference


def fill(db: Session, stream: int, *, delay: str = "1 day", priority: str = "0", leased: bool = False) -> None:
    lease = "gen_random_uuid(), 999999" if leased else "NULL, NULL"
    db.sql(
        "INSERT INTO durable.message "
        "(message_id, stream_id, priority, due_at, enqueued_at, actor, payload, lease_token, worker_id) "
        f"SELECT gen_random_uuid(), %s, {priority}, clock_timestamp() + interval '{delay}', "
        f"clock_timestamp(), 'a', '', {lease} "
        "FROM generate_series(1, %s)",
        stream,
        MANY,
    )


@pytest.fixture(params=["analysed", "believed empty"])
def statistics(request: pytest.FixtureRequest, db: Session) -> Callable[[], None]:
    """Call it when the table has its rows."""
    for table in ("message", "run", "event", "inbox"):
        db.sql(f"ALTER TABLE durable.{table} SET (autovacuum_enabled = false)")
    if request.param == "believed empty":
        db.sql("ANALYZE durable.message, durable.run, durable.event, durable.inbox")
        return lambda: None
    return lambda: db.sql("ANALYZE durable.message, durable.run, durable.event, durable.inbox") and None


def test_a_claim_does_not_look_at_delayed_messages(db: Session, statistics: Callable[[], None]) -> None:
    stream = db.stream()
    fill(db, stream)
    fill(db, stream, priority="-1")
    db.enqueue(stream, b"1", b"2", b"3")
    statistics()
    worker = db.register(stream)
    with counting(db) as counted:
        assert len(worker.claim(10)) == 3
    assert counted["message"].cheap, counted
    assert (counted["message"].updates, counted["message"].hot) == (3, 3), "a claim is a HOT update"
    with counting(db) as counted:
        claimed, next_due = worker.look(10)
        assert claimed == []
        assert next_due is not None
    assert counted["message"].cheap, counted


def test_a_claim_passes_by_very_many_priorities(db: Session, statistics: Callable[[], None]) -> None:
    stream = db.stream()
    db.sql("SELECT setseed(0.5)")
    fill(db, stream, priority="(random() * 1000000000)::int")
    last = [db.enqueue(stream, b"%d" % n, priority=2_000_000_000 + n) for n in range(3)]
    assert last == [[1]] * 3
    statistics()
    worker = db.register(stream)
    with counting(db) as counted:
        claimed, next_due = worker.look(2)
    assert [c.payload for c in claimed] == [b"0", b"1"]
    assert counted["message"].seq_scans == 0
    assert counted["message"].rows < 500, counted
    claimed, next_due = worker.look(2)
    assert [c.payload for c in claimed] == [b"2"]
    assert next_due is not None
    assert next_due <= 1000


def test_a_claim_takes_no_more_from_a_long_queue_than_it_hands_out(db: Session, statistics: Callable[[], None]) -> None:
    stream, other = db.stream(), db.stream("other")
    fill(db, stream, delay="-1 second")
    fill(db, other, delay="-1 second")
    statistics()
    worker = db.register(stream)
    with counting(db) as counted:
        assert len(worker.claim(5)) == 5
    assert counted["message"].cheap, counted


@pytest.mark.parametrize("call", ["ack", "reschedule", "release", "bury", "mark_started"])
def test_settling_finds_its_messages(db: Session, statistics: Callable[[], None], call: str) -> None:
    stream = db.stream()
    fill(db, stream)
    db.enqueue(stream, b"1", b"2")
    statistics()
    worker = db.register(stream)
    claimed = worker.claim()
    with counting(db) as counted:
        assert getattr(worker, call)(*claimed) == []
    assert counted["message"].cheap, counted


def test_a_step_finds_what_it_needs(db: Session, statistics: Callable[[], None]) -> None:
    begun = begin(db)
    stream = begun.stream
    fill(db, stream)
    db.sql(
        "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, started_at, last_event) "
        "SELECT gen_random_uuid(), 'w' || n, %s, 'wf', now(), 1 FROM generate_series(1, %s) n",
        stream,
        MANY,
    )
    db.sql(
        "INSERT INTO durable.event (run_id, event_id, type, at) SELECT run_id, 1, 'x', now() FROM durable.run "
        "ON CONFLICT DO NOTHING"
    )
    db.sql("INSERT INTO durable.inbox (run_id, type) SELECT run_id, 'x' FROM durable.run WHERE workflow_id <> 'w'")
    statistics()
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"), ("TimerStarted", 2))
    advance.sends = [send_activity(stream, 1, eager=False), send_timer(stream, 2)]
    with counting(db) as counted:
        assert begun.worker.advance(advance) == ["ok"]
    assert counted["message"].cheap, counted
    activity = begun.worker.one()
    with counting(db) as counted:
        ending = step(activity, 3, ("ActivityCompleted", 1, "a"), ("TimerStarted", 3), drops=[2])
        ending.sends = [send_timer(stream, 3)]
        assert begun.worker.advance(ending) == ["ok"]
    assert all(counts.cheap for counts in counted.values()), counted
    assert (counted["run"].updates, counted["run"].hot) == (1, 1), "a step is a HOT update of its run"
    db.post(begun.run, type="CancelRequested")
    (task,) = begun.worker.claim()
    closing = step(task, 5, ("WorkflowCancelled", None), close="cancelled", inbox=[db.inbox(begun.run)[0][0]])
    with counting(db) as counted:
        assert begun.worker.advance(closing) == ["ok"]
    assert all(counts.cheap for counts in counted.values()), counted


def test_an_enqueue_reads_no_queue(db: Session, statistics: Callable[[], None]) -> None:
    stream = db.stream()
    fill(db, stream)
    statistics()
    with counting(db) as counted:
        assert db.enqueue(stream, b"1", b"2") == [1, 1]
    assert (counted["message"].seq_scans, counted["message"].rows) == (0, 0)


def test_a_reclaim_looks_only_at_what_was_held(db: Session, statistics: Callable[[], None]) -> None:
    stream = db.stream()
    fill(db, stream, leased=True)
    db.enqueue(stream, b"1", b"2")
    statistics()
    worker, peer = db.register(stream), db.register(stream)
    worker.claim()
    db.silence(worker)
    with counting(db) as counted:
        assert peer.reclaim(worker) == (2, 0)
    assert counted["message"].cheap, counted


@pytest.mark.parametrize("conflict", ["skip", "fail", "replace"])
def test_a_unique_key_that_is_taken_is_found(db: Session, statistics: Callable[[], None], conflict: str) -> None:
    stream = db.stream()
    fill(db, stream)
    db.enqueue_keyed(stream, "key")
    statistics()
    with counting(db) as counted:
        assert db.enqueue_keyed(stream, "key", conflict)[0] == (conflict == "replace")
        assert db.enqueue_keyed(stream, "another", conflict)[0] == 1
    assert counted["message"].cheap, counted


def test_results_are_stored_and_found_by_their_keys(db: Session, statistics: Callable[[], None]) -> None:
    stream = db.stream()
    db.sql("INSERT INTO durable.stream (name) SELECT 'other ' || n FROM generate_series(1, 300) n")
    tables = ("result", "result_waiter", "limiter", "stream")
    for table in tables:
        db.sql(f"ALTER TABLE durable.{table} SET (autovacuum_enabled = false)")
    for table, columns in (
        ("result", "'r' || n, %s, now() + interval '1 day', ''"),
        ("result_waiter", "'r' || n, gen_random_uuid(), now() + interval '1 day'"),
        ("limiter", "'r' || n, %s, 1, now() + interval '1 day'"),
    ):
        arguments = [stream] if "%s" in columns else []
        db.sql(f"INSERT INTO durable.{table} SELECT {columns} FROM generate_series(1, {MANY}) n", *arguments)
    group = uuid.uuid4()
    db.call("limiter_add", str(group), 2, 60_000)
    db.enqueue_keyed(stream, None, group=group.bytes)
    worker = db.register(stream)
    member = worker.one()
    statistics()
    with counting(db, *tables) as counted:
        assert worker.leave(member, results=[Result("key", b"v", 60_000), Result("r1", b"v", 60_000)], member=True) == [
            1
        ]
    assert all(counted[table].cheap for table in tables), counted
    with counting(db, *tables) as counted:
        found = db.call("get_results", Texts(["key", "r1", "no"]), Texts(["s", "s", None]), Uuid(new_id()), 1000)
    assert [n for n, _ in found] == [1, 2]
    assert all(counted[table].cheap for table in tables), counted
