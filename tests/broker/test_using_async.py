"""using() on connections that are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from dramatiq import group

import dramatiq_durable as durable
from tests.support.callers import AWAITED, AsyncCaller
from tests.support.stored import message_in

from .conftest import Rows

Open = Callable[..., Any]


class UndoError(Exception):
    """Raised by a test to have a transaction rolled back."""


@pytest.fixture
def open_caller(database_url: str, rows: Rows) -> Open:
    rows("CREATE TABLE shop (n int)")

    @asynccontextmanager
    async def open_one(kind: str = "psycopg autocommit") -> AsyncIterator[AsyncCaller]:
        caller = await AsyncCaller.open(kind, database_url)
        try:
            yield caller
        finally:
            await caller.close()

    return open_one


@pytest.fixture
def run(open_caller: Open, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a test's coroutine function with a caller's connection."""

    def run(scenario: Callable[[AsyncCaller], Awaitable[Any]], kind: str = "psycopg autocommit") -> Any:
        async def main() -> Any:
            async with open_caller(kind) as caller:
                return await scenario(caller)

        return asyncio.run(main())

    return run


@pytest.fixture
def take(broker: durable.DurableBroker) -> Any:
    @durable.activity(broker=broker)
    def take(value: Any = None) -> None: ...

    return take


@pytest.fixture
def order(broker: durable.DurableBroker) -> Any:
    @durable.workflow(queue_name="orders", broker=broker)
    async def order(name: str) -> Any:
        return [name, await durable.wait_for_signal("go")]

    return order


def sent(rows: Rows) -> list[str]:
    """The first arguments of the messages that are stored, in the order in which they are handed out."""
    stored = rows("SELECT payload FROM durable.message WHERE actor = 'take' ORDER BY due_at")
    return [message_in(payload).args[0] for (payload,) in stored]


every = pytest.mark.parametrize("kind", AWAITED)


@every
def test_what_is_sent_commits_in_order(run: Any, kind: str, take: Any, broker: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        async with caller.transaction():
            await caller.execute("INSERT INTO shop VALUES (1)")
            async with durable.using(caller.connection):
                take.send("a")
                broker.enqueue_many([take.message("b"), take.message("c")])
                message = await take.asend("d")
                group([take.message("e")], broker=broker).run()
                await take.asend_with_options(args=("f",), max_retries=1)
                take.send("g")
            assert rows.count() == 0
            assert message.args == ("d",)
        same = "SELECT DISTINCT xmin::text FROM shop UNION SELECT xmin::text FROM durable.message"
        assert len(rows(same)) == 1

    run(scenario, kind)
    assert sent(rows) == ["a", "b", "c", "d", "e", "f", "g"]


@every
def test_what_is_sent_vanishes(run: Any, kind: str, take: Any, order: Any, rows: Rows) -> None:
    running = order.options(workflow_id="o-1").start("first")

    async def scenario(caller: AsyncCaller) -> None:
        with suppress(UndoError):
            async with caller.transaction(), durable.using(caller.connection):
                take.send("a")
                await take.asend("b")
                await order.astart("x")
                await running.asignal("go")
                await running.aterminate()
                raise UndoError
        await take.asend("not in a block")
        async with caller.transaction(), durable.using(caller.connection):
            take.send("another transaction")

    run(scenario, kind)
    assert sent(rows) == ["not in a block", "another transaction"]
    assert rows("SELECT workflow_id, status FROM durable.run") == [("o-1", "running")]
    assert rows("SELECT * FROM durable.inbox") == []


@every
def test_savepoints(run: Any, kind: str, take: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        async with caller.transaction(), durable.using(caller.connection):
            await take.asend("before")
            with suppress(UndoError):
                async with caller.savepoint():
                    await take.asend("undone")
                    raise UndoError
            with suppress(UndoError):
                async with caller.savepoint(), durable.using(caller.connection):
                    take.send("undone, plainly")
                    raise UndoError
            async with caller.savepoint(), durable.using(caller.connection):
                take.send("kept")
            take.send("after")

    run(scenario, kind)
    assert sent(rows) == ["before", "kept", "after"]


@every
def test_a_plain_send_that_could_only_be_stored_too_late_is_refused(run: Any, kind: str, take: Any, rows: Rows) -> None:
    async def inside(caller: AsyncCaller) -> None:
        async with caller.transaction(), durable.using(caller.connection):
            async with caller.savepoint():
                with pytest.raises(durable.DurableError, match="asend"):
                    take.send("in a savepoint that is over when the block ends")
                await take.asend("kept")

    async def around(caller: AsyncCaller) -> None:
        async with durable.using(caller.connection), caller.transaction():
            await caller.execute("INSERT INTO shop VALUES (1)")
            take.send("in a transaction that is over when the block ends")

    run(inside, kind)
    with pytest.raises(durable.DurableError, match="asend"):
        run(around, kind)
    assert sent(rows) == ["kept"]


@pytest.mark.parametrize("kind", [kind for kind in AWAITED if kind != "psycopg autocommit"])
def test_a_commit_before_the_end_of_the_block_is_refused(run: Any, kind: str, take: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        async with durable.using(caller.connection):
            await caller.execute("INSERT INTO shop VALUES (1)")
            take.send("too late")
            await caller.connection.commit()

    async def right(caller: AsyncCaller) -> None:
        async with durable.using(caller.connection):
            await caller.execute("INSERT INTO shop VALUES (2)")
            await take.asend("in time")
            await caller.connection.commit()
            take.send("in the next one")
        await caller.connection.commit()

    with pytest.raises(durable.DurableError, match="has ended"):
        run(scenario, kind)
    run(right, kind)
    assert sent(rows) == ["in time", "in the next one"]


@every
def test_an_exception_that_is_caught_undoes_nothing(run: Any, kind: str, take: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        async with caller.transaction():
            with suppress(UndoError):
                async with durable.using(caller.connection):
                    take.send("a")
                    raise UndoError
            await caller.execute("INSERT INTO shop VALUES (1)")

    run(scenario, kind)
    assert sent(rows) == ["a"]


@every
def test_an_error_of_the_database_stays_what_it_is(run: Any, kind: str, take: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        async with caller.transaction(), durable.using(caller.connection):
            take.send("a")
            await caller.execute("SELECT 1/0")

    with pytest.raises(Exception, match="division by zero") as caught:
        run(scenario, kind)
    assert ["not stored" in note for note in caught.value.__notes__] == [True]
    assert rows.count() == 0


@every
def test_runs_and_their_signals(
    run: Any, kind: str, order: Any, broker: durable.DurableBroker, rows: Rows, start_worker: Any
) -> None:
    live = order.options(workflow_id="live").start("x")

    async def scenario(caller: AsyncCaller) -> list[Any]:
        async with caller.transaction(), durable.using(caller.connection):
            plain = order.options(workflow_id="plain").start("plain")
            plain.signal("go", 1)
            awaited = await order.options(workflow_id="awaited").astart("awaited")
            await awaited.asignal("go", 2)
            existing = await order.options(workflow_id="live", id_conflict="use_existing").astart("x")
            later = order.options(workflow_id="live", id_conflict="use_existing").start("x")
            assert (existing.run_id, later.run_id) == (live.run_id, None)
            with pytest.raises(durable.WorkflowAlreadyStarted, match="'live'"):
                await order.options(workflow_id="live").astart("x")
            with pytest.raises(durable.WorkflowNotFound, match="'nothing'"):
                await durable.get_handle("nothing", broker=broker).asignal("go")
        assert later.run_id == live.run_id
        return [plain, awaited]

    handles = run(scenario, kind)
    start_worker(broker)
    assert [handle.result(timeout=15) for handle in handles] == [["plain", 1], ["awaited", 2]]


def test_what_a_plain_call_could_not_say_is_raised_at_the_end(run: Any, order: Any, take: Any, rows: Rows) -> None:
    order.options(workflow_id="live").start("x")

    async def scenario(caller: AsyncCaller) -> None:
        async with caller.transaction(), durable.using(caller.connection):
            take.send("a")
            order.options(workflow_id="live").start("x")

    with pytest.raises(durable.WorkflowAlreadyStarted, match="'live'"):
        run(scenario)
    assert sent(rows) == []


def test_tasks_of_the_block_share_it(run: Any, take: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        async with caller.transaction(), durable.using(caller.connection):
            await asyncio.gather(*(take.asend(n) for n in range(20)))
            assert rows.count() == 0

    run(scenario)
    assert sorted(sent(rows)) == list(range(20))


def test_other_tasks_send_by_themselves(open_caller: Open, take: Any, rows: Rows) -> None:
    async def main() -> None:
        inside, done = asyncio.Event(), asyncio.Event()

        async def other() -> None:
            await inside.wait()
            await take.asend("by itself")
            done.set()

        task = asyncio.create_task(other())
        async with open_caller() as caller:
            with suppress(UndoError):
                async with caller.transaction(), durable.using(caller.connection):
                    inside.set()
                    await take.asend("undone")
                    await done.wait()
                    raise UndoError
        await task

    asyncio.run(main())
    assert sent(rows) == ["by itself"]


def test_a_task_that_outlives_the_block_is_refused(run: Any, take: Any, rows: Rows) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        over = asyncio.Event()

        async def later() -> None:
            await over.wait()
            with pytest.raises(durable.DurableError, match="has ended"):
                take.send("plainly")
            with pytest.raises(durable.DurableError, match="has ended"):
                await take.asend("awaited")

        async with caller.transaction(), durable.using(caller.connection):
            task = asyncio.create_task(later())
        over.set()
        await task

    run(scenario)
    assert sent(rows) == []


def test_a_send_that_is_cancelled_leaves_the_transaction_to_its_owner(
    run: Any, take: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(caller: AsyncCaller) -> None:
        from dramatiq_durable.carriers import AsyncPsycopgCarrier

        asked = asyncio.Event()

        async def never(self: Any, call: Any) -> str:
            asked.set()
            await asyncio.Event().wait()
            return ""

        async def work() -> None:
            async with caller.transaction(), durable.using(caller.connection):
                take.send("before")
                await take.asend("cancelled")

        monkeypatch.setattr(AsyncPsycopgCarrier, "ask", never)
        task = asyncio.create_task(work())
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()
        await caller.execute("INSERT INTO shop VALUES (1)")

    run(scenario)
    assert rows.count() == 0
    assert rows("SELECT n FROM shop") == [(1,)]


def test_the_innermost_block_counts(open_caller: Open, take: Any, rows: Rows) -> None:
    async def main() -> None:
        async with open_caller() as one, open_caller("sqlalchemy session asyncpg") as other:
            async with one.transaction(), durable.using(one.connection):
                take.send("one")
                with suppress(UndoError):
                    async with other.transaction(), durable.using(other.connection):
                        take.send("undone")
                        raise UndoError
                async with other.transaction(), durable.using(other.connection):
                    take.send("other")
                async with durable.using(one.connection):
                    take.send("one again")
                take.send("one at last")
                assert sent(rows) == ["other"]

    asyncio.run(main())
    assert sent(rows) == ["one", "other", "one again", "one at last"]
