"""using(): what is sent commits with the caller's own transaction, or vanishes with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq import group, pipeline
from dramatiq.middleware import GroupCallbacks

import dramatiq_durable as durable
from dramatiq_durable import carriers
from dramatiq_durable.delivery import Delivery
from dramatiq_durable.rate_limits import PostgresBackend
from dramatiq_durable.settings import Settings
from tests.support import wait_until
from tests.support.callers import BLOCKING, Caller
from tests.support.stored import message_in, stored_messages

from .conftest import Record, Rows


class UndoError(Exception):
    """Raised by a test to have a transaction rolled back."""


@pytest.fixture
def call(database_url: str, rows: Rows) -> Iterator[Callable[[str], Caller]]:
    """Opens an application's connections; they are closed before the database goes."""
    opened: list[Caller] = []
    rows("CREATE TABLE shop (n int)")

    def connect(kind: str) -> Caller:
        opened.append(Caller(kind, database_url))
        return opened[-1]

    yield connect
    for caller in opened:
        caller.close()


@pytest.fixture(params=BLOCKING)
def caller(call: Callable[[str], Caller], request: pytest.FixtureRequest) -> Caller:
    return call(request.param)


@pytest.fixture
def actor(broker: durable.DurableBroker) -> Any:
    got = Record()

    @dramatiq.actor(broker=broker, max_retries=0)
    def take(value: Any = None, *rest: Any) -> Any:
        got(value)
        return value

    take.options["got"] = got
    return take


@pytest.fixture
def order(broker: durable.DurableBroker) -> Any:
    @durable.workflow(queue_name="orders", broker=broker)
    async def order(name: str) -> Any:
        return [name, await durable.wait_for_signal("go")]

    return order


def sent(rows: Rows) -> list[str]:
    """The first arguments of the messages that are stored."""
    stored = rows("SELECT payload FROM durable.message WHERE actor = 'take'")
    return sorted(message_in(payload).args[0] for (payload,) in stored)


# --- every kind of connection --------------------------------------------------------------------------------


def test_a_message_commits_with_the_callers_rows(caller: Caller, actor: Any, rows: Rows) -> None:
    with caller.transaction():
        caller.execute("INSERT INTO shop VALUES (1)")
        with durable.using(caller.connection):
            actor.send("a")
        caller.execute("INSERT INTO shop VALUES (2)")
        assert rows.count() == 0
    assert sent(rows) == ["a"]
    same = "SELECT DISTINCT xmin::text FROM shop UNION SELECT xmin::text FROM durable.message"
    assert len(rows(same)) == 1


def test_a_message_vanishes_with_the_transaction(caller: Caller, actor: Any, rows: Rows) -> None:
    with suppress(UndoError), caller.transaction(), durable.using(caller.connection):
        actor.send("a")
        raise UndoError
    assert rows.count() == 0
    actor.send("not in a block")
    with caller.transaction(), durable.using(caller.connection):
        actor.send("another transaction")
    assert sent(rows) == ["another transaction", "not in a block"]


def test_a_message_vanishes_with_its_savepoint(caller: Caller, actor: Any, rows: Rows) -> None:
    with caller.transaction(), durable.using(caller.connection):
        actor.send("before")
        with suppress(UndoError), caller.savepoint():
            actor.send("inside")
            raise UndoError
        with caller.savepoint():
            actor.send("kept")
        actor.send("after")
    assert sent(rows) == ["after", "before", "kept"]


def test_an_exception_that_is_caught_undoes_nothing(caller: Caller, actor: Any, rows: Rows) -> None:
    with caller.transaction():
        with suppress(UndoError), durable.using(caller.connection):
            actor.send("a")
            raise UndoError
        caller.execute("INSERT INTO shop VALUES (1)")
    assert sent(rows) == ["a"]


def test_all_that_can_be_sent(
    caller: Caller, broker: durable.DurableBroker, actor: Any, order: Any, rows: Rows, start_worker: Any
) -> None:
    running = order.options(workflow_id="o-1").start("first")
    before = rows.count()
    with caller.transaction(), durable.using(caller.connection):
        actor.send("send")
        actor.send_with_options(args=("options",), delay=10)
        broker.enqueue(actor.message("enqueue"))
        broker.enqueue_many([actor.message(f"many {n}") for n in range(3)])
        group([actor.message("group 1"), actor.message("group 2")], broker=broker).run()
        pipeline([actor.message("pipeline"), actor.message()], broker=broker).run()
        running.signal("go", 1)
        new = order.options(workflow_id="o-2").start("second")
        durable.get_handle("o-2", broker=broker).signal("go", 2)
        third = order.send("third")
        third.signal("go", 3)
        assert rows.count() == before
        assert rows("SELECT workflow_id FROM durable.run") == [("o-1",)]
    start_worker(broker)
    rows.drained()
    assert sorted(map(str, actor.options["got"].values)) == [
        *("enqueue", "group 1", "group 2", "many 0", "many 1", "many 2", "options", "pipeline", "pipeline", "send")
    ]
    assert running.result(timeout=15) == ["first", 1]
    assert (new.run_id, new.result(timeout=15)) == (new.describe().run_id, ["second", 2])
    assert third.result(timeout=15) == ["third", 3]


def test_a_run_that_was_rolled_back_never_was(caller: Caller, order: Any, rows: Rows) -> None:
    running = order.options(workflow_id="o-1").start("first")
    with suppress(UndoError), caller.transaction(), durable.using(caller.connection):
        running.signal("go", 1)
        running.terminate()
        order.options(workflow_id="o-2").start("second")
        raise UndoError
    assert rows("SELECT workflow_id, status FROM durable.run") == [("o-1", "running")]
    assert rows("SELECT * FROM durable.inbox") == []
    assert len(rows("SELECT * FROM durable.signal_key")) == 0


def test_what_a_workflow_answers(caller: Caller, order: Any, broker: durable.DurableBroker, rows: Rows) -> None:
    """Each is refused where it is called, and the transaction goes on."""
    live = order.options(workflow_id="live").start("x")
    ended = order.options(workflow_id="ended").start("x")
    ended.terminate()
    with caller.transaction():
        caller.execute("INSERT INTO shop VALUES (1)")
        with durable.using(caller.connection):
            with pytest.raises(durable.WorkflowAlreadyStarted, match="'live'"):
                order.options(workflow_id="live").start("x")
            assert order.options(workflow_id="live", id_conflict="use_existing").start("x").run_id == live.run_id
            with pytest.raises(durable.WorkflowClosed, match="'ended'"):
                ended.signal("go")
            with pytest.raises(durable.WorkflowNotFound, match="'nothing'"):
                durable.get_handle("nothing", broker=broker).cancel()
            live.terminate('it\'s "over" \\ {now}')
    assert live.status() == "terminated"
    assert live.history()[-1].attributes["reason"] == 'it\'s "over" \\ {now}'
    assert rows("SELECT n FROM shop") == [(1,)]


@pytest.mark.parametrize(
    "value", ["", "\\x00", '{"quoted", NULL}', "'; --", "%s {} :p0", "\U0001f600\n", "\0", "\ud83d"]
)
def test_what_is_sent_arrives_as_it_is(caller: Caller, actor: Any, rows: Rows, value: str) -> None:
    with caller.transaction(), durable.using(caller.connection):
        message = actor.send(value)
    assert [found.encode() for found in stored_messages(rows)] == [message.encode()]


def test_names_arrive_as_they_are(caller: Caller, order: Any, rows: Rows) -> None:
    name = "a \\ \"b\" {c,NULL} '%s' :d \N{SNOWMAN}"
    with caller.transaction(), durable.using(caller.connection):
        order.options(workflow_id=name, memo={"note": name}).start("x")
        order.options(workflow_id="NULL").start("x")
    assert rows("SELECT workflow_id FROM durable.run ORDER BY 1") == [("NULL",), (name,)]
    assert order.options(workflow_id=name, id_conflict="use_existing").start("x").describe().memo == {"note": name}


def test_a_block_after_the_other_on_a_connection_that_is_kept(caller: Caller, actor: Any, rows: Rows) -> None:
    for n in range(3):
        with caller.transaction(), durable.using(caller.connection):
            actor.send(n)
    assert sent(rows) == [0, 1, 2]


def test_many_at_once_are_one_call(
    caller: Caller, broker: durable.DurableBroker, actor: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caller.transaction(), durable.using(caller.connection):
        actor.send(-1)
        asked = Record()
        for kind in (carriers.PsycopgCarrier, carriers.DjangoCarrier, carriers.SQLAlchemyCarrier):
            ask = kind.ask

            def counted(self: Any, call: Any, ask: Any = ask) -> str:
                asked(call.text)
                return str(ask(self, call))

            monkeypatch.setattr(kind, "ask", counted)
        broker.enqueue_many([actor.message(n) for n in range(1000)])
        assert len(asked.values) == 1
        assert "enqueue_messages" in asked.values[0]
        broker.enqueue_many([actor.message(n) for n in range(1001)])
        assert len(asked.values) == 3
    assert rows.count() == 2002
    due = rows("SELECT payload FROM durable.message ORDER BY due_at")
    order = [message_in(p).args[0] for (p,) in due]
    assert order == [-1, *range(1000), *range(1001)]


def test_unique_keys_and_groups(caller: Caller, broker: durable.DurableBroker, actor: Any, rows: Rows) -> None:
    first = actor.send_with_options(args=("first",), unique_key="k")
    with caller.transaction(), durable.using(caller.connection):
        assert actor.send_with_options(args=("second",), unique_key="k").message_id == first.message_id
        with pytest.raises(durable.MessageExists):
            actor.send_with_options(args=("third",), unique_key="k", unique_conflict="fail")
        actor.send_with_options(args=("other",), unique_key="l")
        actor.send_with_options(args=("replaced",), unique_key="l", unique_conflict="replace")
    assert sent(rows) == ["first", "replaced"]


def test_a_group_and_its_callback(
    caller: Caller, broker: durable.DurableBroker, actor: Any, rows: Rows, start_worker: Any
) -> None:
    broker.add_middleware(GroupCallbacks(PostgresBackend(broker=broker)))
    members = group([actor.message("one"), actor.message("two")], broker=broker)
    members.add_completion_callback(actor.message("both"))
    with suppress(UndoError), caller.transaction(), durable.using(caller.connection):
        members.run()
        raise UndoError
    assert rows.count() == 0
    with caller.transaction(), durable.using(caller.connection):
        members.run()
    start_worker(broker)
    rows.drained()
    got = actor.options["got"].values
    assert (sorted(got[:2]), got[2:]) == (["one", "two"], ["both"])


# --- blocks, threads, actors ---------------------------------------------------------------------------------


def test_the_innermost_block_counts(call: Callable[[str], Caller], actor: Any, rows: Rows) -> None:
    one, other = call("psycopg"), call("sqlalchemy session psycopg2")
    with one.transaction(), durable.using(one.connection):
        actor.send("one")
        with suppress(UndoError), other.transaction(), durable.using(other.connection):
            actor.send("other, undone")
            with durable.using(one.connection):
                actor.send("one again")
            raise UndoError
        with other.transaction(), durable.using(other.connection):
            actor.send("other")
        assert sent(rows) == ["other"]
        with durable.using(one.connection):
            actor.send("one, twice in it")
        actor.send("one at last")
    assert sent(rows) == ["one", "one again", "one at last", "one, twice in it", "other"]


def test_other_threads_send_by_themselves(call: Callable[[str], Caller], actor: Any, rows: Rows) -> None:
    caller = call("psycopg")
    with suppress(UndoError), caller.transaction(), durable.using(caller.connection):
        thread = threading.Thread(target=actor.send, args=("by itself",))
        thread.start()
        thread.join()
        assert sent(rows) == ["by itself"]
        raise UndoError
    assert sent(rows) == ["by itself"]


def test_each_thread_has_its_own_block(call: Callable[[str], Caller], actor: Any, rows: Rows) -> None:
    barrier = threading.Barrier(4)

    def run(n: int, caller: Caller) -> None:
        with suppress(UndoError), caller.transaction(), durable.using(caller.connection):
            barrier.wait(15)
            actor.send(n)
            barrier.wait(15)
            if n % 2:
                raise UndoError

    threads = [threading.Thread(target=run, args=(n, call("psycopg"))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sent(rows) == [0, 2]


def test_a_block_inside_of_an_actors_transaction(
    broker: durable.DurableBroker, rows: Rows, actor: Any, start_worker: Any
) -> None:
    """What is sent commits with the effect and the ack, and only once the attempt succeeds."""
    seen = Record()

    @dramatiq.actor(broker=broker, max_retries=1)
    def effect() -> None:
        with durable.transaction() as conn, durable.using(conn):
            actor.send("next")
            seen(sent(rows))
            if len(seen.values) == 1:
                raise ValueError("once")

    start_worker(broker)
    effect.send()
    assert seen.wait(2) == [[], []]
    assert actor.options["got"].wait(1) == ["next"]
    rows.drained()
    assert actor.options["got"].values == ["next"]


def test_a_block_inside_of_an_async_actors_transaction(
    broker: durable.DurableBroker, rows: Rows, actor: Any, start_worker: Any
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, max_retries=1)
    async def effect() -> None:
        async with durable.transaction() as conn:
            async with durable.using(conn):
                actor.send("next")
            seen(sent(rows))
            if len(seen.values) == 1:
                raise ValueError("once")

    start_worker(broker)
    effect.send()
    assert seen.wait(2) == [[], []]
    assert actor.options["got"].wait(1) == ["next"]
    rows.drained()
    assert actor.options["got"].values == ["next"]


def test_a_workers_own_work_does_not_ride(
    call: Callable[[str], Caller], broker: durable.DurableBroker, actor: Any, rows: Rows
) -> None:
    """A reclaimed delivery's start, and an ack, are recorded at once, wherever they are called from."""
    caller = call("psycopg")
    actor.send("a")
    consumer = broker.consume("default", timeout=1000)
    delivery = next(consumer)
    assert isinstance(delivery, Delivery)
    with suppress(UndoError), caller.transaction(), durable.using(caller.connection):
        broker._record_start(delivery)
        assert rows("SELECT started FROM durable.message") == [(True,)]
        consumer.ack(delivery)
        rows.drained()
        raise UndoError
    consumer.close()


def test_a_message_that_is_sent_in_a_transaction_starts_soon_after_its_commit(
    call: Callable[[str], Caller], make_broker: Any, start_worker: Any, database_url: str
) -> None:
    """The worker begins to wait only after the message was sent, and has nothing but the notification to wake it."""
    broker = make_broker(settings=Settings(poll_interval=30))
    started = Record()

    @dramatiq.actor(broker=broker)
    def take() -> None:
        started(time.monotonic())

    caller = call("psycopg")
    worker = start_worker(broker)
    watch = psycopg.connect(database_url, autocommit=True)
    waiting = "SELECT count(*) FROM durable.worker WHERE waiting_until > clock_timestamp()"
    late = []
    try:
        for n in range(5):
            # Not waiting when it is sent: as a worker is that has just been busy.
            wait_until(lambda: watch.execute(waiting).fetchone() == (1,), message="a worker that waits")
            with caller.transaction(), durable.using(caller.connection):
                watch.execute("UPDATE durable.worker SET waiting_until = NULL")
                take.send()
                watch.execute("UPDATE durable.worker SET waiting_until = clock_timestamp() + interval '30 seconds'")
            committed = time.monotonic()
            late.append(started.wait(n + 1, timeout=10)[n] - committed)
    finally:
        watch.close()
        worker.stop(timeout=5000)
    assert sorted(late)[2] < 0.1, late
