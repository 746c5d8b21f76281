"""Many callers, one commit; one bad item fails alone; after a lost connection the outcome is exact."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.errors import QueueNotFound

import dramatiq_durable as durable
from dramatiq_durable import group_commit
from dramatiq_durable.errors import DatabaseUnavailable, NotPermitted, OutcomeUnknown
from dramatiq_durable.group_commit import GroupCommit
from dramatiq_durable.operations import Ack, Enqueue, Leave, Post, Result, Together
from dramatiq_durable.outgoing import operation_of
from tests.support import wait_until
from tests.support.stored import message_in

from .conftest import Record, Rows, at_once


@pytest.fixture
def numbers(broker: durable.DurableBroker) -> Any:
    @dramatiq.actor(broker=broker, queue_name="numbers")
    def numbers(n: int) -> None: ...

    return numbers


def numbers_in(rows: Rows) -> list[int]:
    payloads = rows("SELECT payload FROM durable.message ORDER BY due_at")
    return [message_in(payload).args[0] for (payload,) in payloads]


def transactions(rows: Rows) -> int:
    """How many transactions stored the messages that are there."""
    return int(rows("SELECT count(DISTINCT xmin::text) FROM durable.message")[0][0])


def end_connections(rows: Rows) -> None:
    """End all connections to this test's database but the test's own."""
    rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


def test_many_threads_share_commits(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    numbers.send(-1)
    at_once(20, lambda n: [numbers.send(20 * k + n) for k in range(20)])
    assert sorted(numbers_in(rows)) == list(range(-1, 400))
    assert transactions(rows) < 250


def test_a_lone_caller_leads_on_its_own_thread(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    numbers.send(0)
    threads = threading.active_count()
    for n in range(1, 6):
        numbers.send(n)
    assert threading.active_count() == threads
    assert transactions(rows) == 6
    assert numbers_in(rows) == list(range(6))


def test_enqueue_many_is_few_commits(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    numbers.send(0)
    sent = broker.enqueue_many([numbers.message(n) for n in range(1, 1500)])
    assert transactions(rows) <= 4
    assert len(sent) == 1499
    assert numbers_in(rows) == list(range(1500))
    assert broker.enqueue_many([]) == []


def test_enqueue_many_checks_all_before_it_stores_any(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    good = numbers.message(1)
    with pytest.raises(QueueNotFound):
        broker.enqueue_many([good, good.copy(queue_name="undeclared")])
    with pytest.raises(ValueError, match="a delay"):
        broker.enqueue_many([good], delay=-1)
    with pytest.raises(durable.NotEncodable, match="argument 1"):
        broker.enqueue_many([good, numbers.message(object())])
    assert rows.count() == 0
    assert rows("SELECT count(*) FROM durable.stream WHERE name = 'undeclared'") == [(0,)]


def test_enqueue_many_with_a_delay(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    broker.enqueue_many([numbers.message(n) for n in range(3)], delay=60_000)
    assert all(50_000 < m[3] <= 60_001 for m in rows.messages())


@pytest.mark.parametrize("spoil", ["stream", "actor", "type"])
def test_one_bad_item_fails_alone(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    """Whatever slips through the checks of the caller: its neighbours in the batch are stored."""
    stream_id = broker.stream_id("numbers")

    def operation(n: int) -> Enqueue:
        made: Enqueue = operation_of(broker, numbers.message(n))
        if n == 3:
            assert made.stream_id == stream_id
            if spoil == "stream":
                made.stream_id = 1_000_000
            elif spoil == "actor":
                made.actor = "with a \0"
            else:
                made.priority = "high"  # type: ignore[assignment]
        return made

    operations = [operation(n) for n in range(6)]
    broker.commit.submit_many(operations)
    assert numbers_in(rows) == [0, 1, 2, 4, 5]
    assert [o.error is not None for o in operations] == [n == 3 for n in range(6)]
    if spoil == "stream":
        assert isinstance(operations[3].error, NotPermitted)
    numbers.send(6)  # and nothing of it stays behind
    assert numbers_in(rows)[-1] == 6


def test_a_busy_item_does_not_hold_up_its_neighbours(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, database_url: str
) -> None:
    """Somebody's open transaction has inserted the same message: the others are stored, this one answers in time."""
    numbers.send(0)
    message = numbers.message(1)
    made = operation_of(broker, message)
    with psycopg.connect(database_url) as other:
        other.execute(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)"
            " VALUES (%s, %s, 0, now(), now(), 'numbers', '')",
            [message.message_id, made.stream_id],
        )
        began = time.monotonic()
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(at_once(1, lambda n: broker.enqueue(message))))
        thread.start()
        wait_until(lambda: rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        numbers.send(2)
        assert time.monotonic() - began < 20
        assert numbers_in(rows) == [0, 2]
        other.rollback()
    thread.join(30)
    assert not thread.is_alive()
    assert sorted(numbers_in(rows)) in ([0, 1, 2], [0, 2])
    if numbers_in(rows) == [0, 2]:
        assert isinstance(answers[0][0], DatabaseUnavailable)


# --- lost connections --------------------------------------------------------------------------------------


def lose_answer(monkeypatch: pytest.MonkeyPatch, *, committed: bool, meanwhile: Callable[[], None]) -> list[int]:
    """The next batch's connection breaks, before or after the commit; returns a list that has an item then."""
    execute = GroupCommit._execute
    lost: list[int] = []

    def broken(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        if lost or not any(isinstance(o, Enqueue) for o in batch):
            return execute(self, conn, batch)
        lost.append(len(batch))
        if committed:
            execute(self, conn, batch)
        else:
            # The number was given out and may have reached the server: it must be looked up.
            Enqueue.arguments([o for o in batch if isinstance(o, Enqueue)], self.context)
        for operation in batch:
            operation.answer = None
        meanwhile()
        conn.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(GroupCommit, "_execute", broken)
    return lost


@pytest.mark.parametrize("committed", [True, False])
def test_after_a_lost_answer_the_message_is_there_once(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    numbers.send(0)
    lost = lose_answer(monkeypatch, committed=committed, meanwhile=lambda: None)
    numbers.send(1)
    numbers.send(2)
    assert lost == [1]
    assert numbers_in(rows) == [0, 1, 2]


def test_what_was_consumed_before_the_outcome_was_known_is_not_stored_again(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers.send(0)
    lost = lose_answer(monkeypatch, committed=True, meanwhile=lambda: rows("DELETE FROM durable.message") and None)
    numbers.send(1)
    assert lost == [1]
    assert rows.count() == 0


def test_an_ended_connection_is_replaced(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    for n in range(3):
        numbers.send(n)
        end_connections(rows)
    assert numbers_in(rows) == [0, 1, 2]


def test_a_connection_lost_among_single_items_repeats_none_that_was_done(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is run one by one because of a bad item; the connection breaks at the third, the first was consumed."""
    numbers.send(-1)
    operations = [operation_of(broker, numbers.message(n)) for n in range(4)]
    operations[0].actor = "with a \0"
    told = Record()
    for operation in operations:
        operation.then = told
    execute = GroupCommit._execute
    singles: list[Any] = []

    def broken(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        if len(batch) == 1:
            singles.append(batch[0])
            if len(singles) == 3:
                rows("DELETE FROM durable.message")
                self.context.last_batch = 0  # as where nothing numbered was under way
                conn.close()
                raise psycopg.OperationalError("server closed the connection unexpectedly")
        execute(self, conn, batch)

    monkeypatch.setattr(GroupCommit, "_execute", broken)
    broker.commit.submit_many(operations)
    assert numbers_in(rows) == [2, 3]
    assert [operations.index(o) for o in told.values] == [0, 1, 2, 3]


def test_an_error_among_the_arguments_leaves_no_half_batch(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kinds of operations go as a pipeline, which would commit what went before the error."""
    numbers.send(0)
    spoilt = Post(None, "x", "SignalReceived", object(), None, "key")  # type: ignore[arg-type]
    good = operation_of(broker, numbers.message(1))
    execute, stored = GroupCommit._execute, Record()

    def look(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        try:
            execute(self, conn, batch)
        finally:
            stored((len(batch), numbers_in(rows)))

    monkeypatch.setattr(GroupCommit, "_execute", look)
    broker.commit.submit_many([good, spoilt])
    assert stored.values == [(2, [0]), (1, [0, 1]), (1, [0, 1])]
    assert good.error is None
    assert spoilt.error is not None


def test_a_database_that_stays_away_is_an_error_in_time(
    broker: durable.DurableBroker,
    numbers: Any,
    monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    numbers.send(0)
    monkeypatch.setattr(group_commit, "PATIENCE", 0.5)

    def away() -> Any:
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as m:
        m.setattr(broker.database, "connect", away)
        end_connections(rows)
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown, match="repeat the call"):
            numbers.send(1)
        waiting = [m for m in caplog.messages if "to learn what became of a commit" in m]
        assert len(waiting) == 1, "a caller that waits does not wait in silence"
        with pytest.raises(DatabaseUnavailable) as caught:
            numbers.send(2)
        assert not isinstance(caught.value, OutcomeUnknown)  # it never left this process
        assert time.monotonic() - began < 10
    numbers.send(3)
    assert numbers_in(rows) == [0, 3]


def test_callers_behind_a_leader_are_not_forgotten(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's own operation fails: whoever waits behind it takes the lead."""
    numbers.send(-1)
    rows(
        "ALTER TABLE durable.message ADD CONSTRAINT payload_odd"
        " CHECK (actor <> 'numbers' OR octet_length(payload) < 400)"
    )
    answers = at_once(12, lambda n: numbers.send("x" * 500 if n % 4 == 0 else n))
    assert sorted(n for n in numbers_in(rows) if n != -1) == [n for n in range(12) if n % 4]
    assert [isinstance(a, durable.PayloadTooLarge) for a in answers] == [n % 4 == 0 for n in range(12)]


def test_a_broker_whose_worker_stopped_too_early_still_sends(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    """An actor outlives its worker: what it did is not recorded, the message is there, and sending goes on."""
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    class End(dramatiq.Middleware):
        def after_ack(self, broker: Any, message: Any) -> None:
            ended.set()

    broker.add_middleware(End())

    @dramatiq.actor(broker=broker)
    def slow() -> None:
        begun.set()
        go.wait(20)

    worker = start_worker(broker, threads=1)
    slow.send()
    assert begun.wait(10)
    worker.stop(timeout=100)
    assert [m[:3] for m in rows.messages()] == [("slow", 1, False)]
    go.set()
    assert ended.wait(10)
    slow.send()
    assert [m[:3] for m in rows.messages()] == [("slow", 1, False)] * 2


def test_results_count_for_the_size_of_a_batch(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What messages leave behind may be far larger than they were: not all of it goes into one transaction."""
    monkeypatch.setattr(group_commit, "MAX_BATCH_BYTES", 100_000)
    sizes: list[int] = []

    def noted(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        sizes.append(len(batch))
        for unit in batch:
            unit.parts.clear()

    monkeypatch.setattr(GroupCommit, "_execute", noted)
    for _ in range(10):
        leave = Leave(b"", b"")
        leave.results.append(Result("key", b"x" * 60_000, 1))
        broker.commit.post(Together([leave, Ack(b"", b"")]))
    while broker.commit.pending:
        broker.commit.run_batch(give_up=lambda: True)
    assert sizes == [2, 2, 2, 2, 2]


def test_a_batch_in_doubt_is_answered_also_when_the_database_stays_away() -> None:
    """Its leader was interrupted; whoever waits for it must not wait for ever."""
    broker = durable.DurableBroker("postgresql://127.0.0.1:1/nowhere", middleware=[])
    operation = Enqueue(1, bytes(16), "actor", 0, 0, b"x")
    operation.gate = gate = threading.Lock()
    gate.acquire()
    broker.commit._doubt.leave([operation], 1)
    broker.commit.run_batch(give_up=lambda: True)
    assert gate.acquire(timeout=1)
    assert isinstance(operation.error, durable.OutcomeUnknown)


def test_what_met_a_lock_waits_until_no_batch_is_in_doubt() -> None:
    """One batch can be in doubt, no more: an interrupt in the middle of a second would make the first be forgotten."""
    broker = durable.DurableBroker("postgresql://127.0.0.1:1/nowhere", middleware=[])
    doubtful, aside = Enqueue(1, bytes(16), "actor", 0, 0, b"x"), Ack(bytes(16), bytes(16))
    broker.commit._doubt.leave([doubtful], 1)
    broker.commit._later.append((0.0, aside))
    broker.commit.run_batch(give_up=lambda: True)
    assert isinstance(doubtful.error, durable.OutcomeUnknown)
    assert not aside.finished
    broker.commit.run_batch(give_up=lambda: True)
    assert aside.finished
    assert broker.commit.pending == 0
