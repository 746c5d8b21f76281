"""Signals, queries and updates on a real database and a real worker."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


@dataclass
class Item:
    name: str
    cents: int


def define_cart() -> durable.Workflow[..., Any]:
    @durable.workflow
    async def cart() -> list[str]:
        items: list[Item] = []
        done = False

        def positive(item: Item) -> None:
            if item.cents < 0:
                raise ValueError("a price is not negative")

        @durable.on_update("add", validator=positive)
        def add(item: Item) -> int:
            items.append(item)
            return len(items)

        @durable.on_update("fail")
        async def fail() -> None:
            raise KeyError("no such thing")

        @durable.on_query("names")
        def names(prefix: str = "") -> list[str]:
            return [i.name for i in items if i.name.startswith(prefix)]

        @durable.on_query("total")
        def total() -> int:
            return sum(i.cents for i in items)

        @durable.on_query("broken")
        def broken() -> None:
            raise LookupError("lost")

        @durable.on_signal("remove")
        def remove(name: str) -> None:
            items[:] = [i for i in items if i.name != name]

        @durable.on_signal("close")
        def close() -> None:
            nonlocal done
            done = True

        await durable.wait_condition(lambda: done)
        return [i.name for i in items]

    return cart


# --- queries ---------------------------------------------------------------------------------------------


def test_a_query_sees_what_was_said_before_it(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    cart = define_cart()
    start_worker()
    handle = cart.start()
    assert handle.update("add", Item("pen", 100)) == 1
    assert handle.query("names") == ["pen"]
    assert handle.update("add", {"name": "ink", "cents": 250}) == 2
    assert handle.query("total") == 350
    assert handle.query("names", "i") == ["ink"]
    for n in range(20):
        handle.update("add", Item(f"x{n}", 1))
        handle.signal("remove", f"x{n}")
        assert handle.query("total") == 350
    before = types(handle)
    assert handle.query("total") == 350
    assert types(handle) == before
    handle.signal("close")
    assert handle.result(timeout=10) == ["pen", "ink"]
    assert handle.query("names") == ["pen", "ink"]
    assert durable.get_handle(handle.workflow_id).query("total") == 350


def test_a_query_that_cannot_be_answered_says_why(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    cart = define_cart()
    start_worker()
    handle = cart.start()
    with pytest.raises(durable.QueryFailed, match="'broken', 'names', 'total'"):
        handle.query("nmaes")
    with pytest.raises(durable.QueryFailed, match="lost") as caught:
        handle.query("broken")
    assert caught.value.type == "LookupError"
    with pytest.raises(durable.QueryFailed, match=r"names\(\): too many"):
        handle.query("names", 1, 2)
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle("nobody").query("names")
    with pytest.raises(durable.InvalidName):
        handle.query("")


def test_a_query_without_a_worker_times_out_with_a_hint(broker: durable.DurableBroker) -> None:
    cart = define_cart()
    handle = cart.start()
    with pytest.raises(durable.QueryTimedOut, match=r"'total' within 0\.3 s.*'default'; no worker consumed it"):
        handle.query("total", timeout=0.3)
    with looking(broker) as conn:
        rows = conn.execute("SELECT count(*) FROM durable.message WHERE kind = 'q'").fetchone()
        assert rows is not None
        assert int(rows[0]) == 0
    assert handle.describe().stack is None


def test_an_early_query_waits_for_the_first_task(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    cart = define_cart()
    handle = cart.start()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(handle.query, "names", timeout=20)
        start_worker()
        assert asked.result() == []


def test_a_query_may_not_change_the_run(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def work() -> int:
        return 1

    @durable.workflow
    async def strict() -> str:
        event = asyncio.Event()
        attempts: dict[str, Callable[[], Any]] = {
            "activity": lambda: work.execute(),
            "sleep": lambda: durable.sleep(1),
            "asyncio_sleep": lambda: asyncio.get_running_loop().call_later(1, print),
            "task": lambda: asyncio.create_task(asyncio.sleep(1)),
            "event": event.set,
            "random": lambda: durable.random().random(),
            "uuid": lambda: str(durable.uuid4()),
            "signal": lambda: durable.signal_workflow("x", "y"),
            "patch": lambda: durable.patched("new"),
            "coroutine": lambda: durable.wait_for_signal("go"),
            "side_effect": lambda: durable.side_effect(lambda: 1),
            "child": lambda: strict.start(),
            "handler": lambda: durable.on_query("more"),
            "file": lambda: open("/dev/null").close(),
        }

        @durable.on_query("try")
        def attempt(name: str) -> Any:
            try:
                attempts[name]()
            except durable.ForbiddenInWorkflow:
                raise
            except BaseException as e:
                raise AssertionError(f"{name}: {e!r}") from e
            return "it did"

        @durable.on_query("look")
        def look() -> list[Any]:
            return [durable.now().year > 2000, durable.info().name, durable.is_replaying()]

        tried = list(attempts)

        @durable.on_query("names")
        def names() -> list[str]:
            return tried

        waiting = asyncio.create_task(event.wait())
        await durable.wait_for_signal("go")
        waiting.cancel()
        return str(durable.uuid4())

    start_worker()
    handle = strict.start()
    for name in handle.query("names"):
        with pytest.raises(durable.QueryFailed) as caught:
            handle.query("try", name)
        assert caught.value.type == "ForbiddenInWorkflow", (name, caught.value)
    assert handle.query("look")[:2] == [True, "strict"]
    assert types(handle) == ["WorkflowStarted"]
    handle.signal("go")
    assert handle.result(timeout=10)
    assert types(handle) == ["WorkflowStarted", "SignalReceived", "WorkflowCompleted"]


def test_queries_of_runs_that_ended_in_every_way(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def ends(how: str) -> None:
        @durable.on_query("how")
        def answer() -> str:
            return how

        if how == "fail":
            raise ValueError("so be it")
        await durable.wait_for_signal("never")

    start_worker()
    failed, cancelled, terminated = (ends.start(how) for how in ("fail", "cancel", "terminate"))
    assert terminated.query("how") == "terminate"
    cancelled.cancel()
    terminated.terminate("enough")
    for handle in (failed, cancelled, terminated):
        with pytest.raises(durable.DurableError):
            handle.result(timeout=10)
    assert [h.query("how") for h in (failed, cancelled, terminated)] == ["fail", "cancel", "terminate"]
    never = ends.options(delay=60_000).start("never")
    never.terminate()
    with pytest.raises(durable.QueryFailed, match="no handler for the query 'x'"):
        never.query("x")


def test_queries_are_answered_by_whichever_worker(database_url: str, broker: durable.DurableBroker) -> None:
    other = durable.DurableBroker(database_url)
    try:
        workers = []
        for each in (broker, other):

            @durable.workflow(broker=each)
            async def count() -> int:
                seen: list[int] = []
                durable.on_query("seen")(lambda: seen)
                async for n in durable.signals("n"):
                    seen.append(n)
                    if n < 0:
                        break
                return len(seen)

            worker = dramatiq.Worker(each, worker_timeout=50, worker_threads=3)
            worker.start()
            workers.append(worker)
        handle = broker.workflows["count"].start()
        for n in range(30):
            handle.signal("n", n)
            assert handle.query("seen") == list(range(n + 1))
        handle.signal("n", -1)
        assert handle.result(timeout=10) == 31
        for worker in workers:
            worker.stop()
    finally:
        other.close()


def test_the_stack_says_where_the_run_waits(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def waits() -> None:
        async def inner() -> None:
            await durable.wait_for_signal("go")

        await inner()

    start_worker()
    handle = waits.start()
    wait_until(lambda: "wait_for_signal" in (handle.describe().stack or ""), message="the stack is told")
    stack = handle.describe().stack
    assert stack is not None
    assert "main:" in stack
    assert "inner" in stack
    handle.signal("go")
    handle.result(timeout=10)
    assert handle.describe().stack is None


# --- updates ---------------------------------------------------------------------------------------------


def test_updates_are_validated_and_a_rejection_leaves_no_trace(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    cart = define_cart()
    start_worker()
    handle = cart.start()
    with pytest.raises(durable.UpdateRejected, match="a price is not negative") as caught:
        handle.update("add", Item("debt", -5))
    assert caught.value.type == "ValueError"
    with pytest.raises(durable.UpdateRejected, match="it has: 'add', 'fail'"):
        handle.update("ad", 1)
    with pytest.raises(durable.UpdateRejected, match="missing a required argument"):
        handle.update("add", wait="accepted")
    assert types(handle) == ["WorkflowStarted"]
    with pytest.raises(durable.UpdateFailed, match="no such thing") as failed:
        handle.update("fail", update_id="f")
    assert failed.value.type == "KeyError"
    assert failed.value.update_id == "f"
    assert handle.update("add", Item("pen", 5), update_id="one") == 1
    assert handle.update("add", Item("pen", 5), update_id="one") == 1
    assert handle.get_update("one").result(timeout=5) == 1
    events = handle.history()
    assert [e.type for e in events][1:] == ["UpdateAccepted", "UpdateCompleted"] * 2
    assert events[-2].attributes["update_id"] == events[-1].attributes["update_id"] == "one"
    assert events[-2].attributes["input"]["args"] == [{"name": "pen", "cents": 5}]
    assert events[-1].attributes["result"] == 1
    handle.signal("close")
    assert handle.result(timeout=10) == ["pen"]
    assert handle.update("add", Item("pen", 5), update_id="one") == 1
    with pytest.raises(durable.UpdateFailed):
        handle.get_update("f").result(timeout=5)
    with pytest.raises(durable.WorkflowClosed):
        handle.update("add", Item("pen", 5))
    with pytest.raises(durable.WorkflowNotFound, match="no update 'two'"):
        handle.get_update("two").result(timeout=5)


def test_accepted_then_completed(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    go = threading.Event()

    @durable.activity
    def slow(n: int) -> int:
        assert go.wait(20)
        return n * 2

    @durable.workflow
    async def doubles() -> str:
        @durable.on_update("double")
        async def double(n: int) -> int:
            assert durable.info().name == "doubles"
            return await slow.execute(n)

        await durable.wait_for_signal("end")
        await durable.wait_condition(durable.all_handlers_finished)
        return "ended"

    start_worker()
    handle = doubles.start()
    update = handle.update("double", 4, update_id="u", wait="accepted", timeout=10)
    assert isinstance(update, durable.UpdateHandle)
    with pytest.raises(durable.Timeout, match=r"was not completed within 0\.05 s"):
        update.result(timeout=0.05)
    handle.signal("end")
    go.set()
    assert update.result(timeout=10) == 8
    assert handle.result(timeout=10) == "ended"


def test_an_unanswered_update_of_a_run_that_ends(
    broker: durable.DurableBroker, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    @durable.workflow
    async def hasty() -> None:
        @durable.on_update("forever")
        async def forever() -> None:
            await durable.wait_for_signal("never")

        @durable.on_signal("also")
        async def also() -> None:
            await durable.sleep(100)

        await durable.wait_for_signal("end")

    start_worker()
    handle = hasty.start()
    handle.signal("also")
    update = handle.update("forever", update_id="u", wait="accepted", timeout=10)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(update.result, 20)
        with caplog.at_level(logging.WARNING):
            handle.signal("end")
            handle.result(timeout=10)
        with pytest.raises(durable.WorkflowClosed, match=r"'forever' \(u\) was answered.*all_handlers_finished"):
            waiting.result()
    wait_until(lambda: "while handlers were at work" in caplog.text, message="the warning is logged")
    (warning,) = [r.getMessage() for r in caplog.records if "while handlers" in r.getMessage()]
    assert "the signal 'also', the update 'forever' (u)" in warning


def test_no_run_ends_over_an_update_that_its_code_was_not_given(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def quick() -> int:
        total = 0

        @durable.on_update("add")
        async def add(n: int) -> int:
            nonlocal total
            total += n
            return total

        return total

    handles = [quick.options(with_update=("add", n), update_id="first").start() for n in range(5)]
    start_worker()
    for n, handle in enumerate(handles):
        assert handle.get_update().result(timeout=10) == n
        assert handle.result(timeout=10) == 0
        assert types(handle) == ["WorkflowStarted", "UpdateAccepted", "UpdateCompleted", "WorkflowCompleted"]
        assert handle.update("add", 99, update_id="first") == n


def test_update_with_start(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    cart = define_cart()
    start_worker()
    one = cart.options(workflow_id="c", with_update=("add", Item("pen", 1)), update_id="a").start()
    two = cart.options(workflow_id="c", with_update=("add", Item("ink", 1)), update_id="b").start()
    again = cart.options(workflow_id="c", with_update=("add", Item("ink", 1)), update_id="b").start()
    assert one.run_id == two.run_id == again.run_id
    assert [h.get_update().result(timeout=10) for h in (one, two, again)] == [1, 2, 2]
    with pytest.raises(durable.WorkflowAlreadyStarted):
        cart.options(workflow_id="c", with_update=("add", Item("ink", 1)), id_conflict="fail").start()
    with pytest.raises(ValueError, match="with_update"):
        cart.options(with_update=())
    with pytest.raises(ValueError, match="not with both"):
        cart.options(with_update=("a",), with_signal=("b", 1))
    with pytest.raises(ValueError, match="was not started by with_update"):
        durable.get_handle("c").get_update()
    rejected = cart.options(workflow_id="d", with_update=("add", Item("x", -1))).start()
    with pytest.raises(durable.UpdateRejected):
        rejected.get_update().result(timeout=10)
    assert rejected.status() == "running"


def test_a_storm_of_updates_each_once_in_one_order(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def check(n: int) -> int:
        return n

    @durable.workflow
    async def counter() -> list[int]:
        order: list[int] = []

        @durable.on_update("add")
        async def add(n: int) -> int:
            if n % 10 == 0:
                n = await check.execute(n)
            order.append(n)
            return len(order)

        await durable.wait_for_signal("end")
        await durable.wait_condition(durable.all_handlers_finished)
        return order

    start_worker(threads=8)
    handle = counter.start()

    async def storm() -> list[int]:
        return await asyncio.gather(*(handle.aupdate("add", n, update_id=f"u{n}", timeout=60) for n in range(200)))

    places = asyncio.run(storm())
    assert sorted(places) == list(range(1, 201))
    handle.signal("end")
    order = handle.result(timeout=20)
    assert sorted(order) == list(range(200))
    assert [order[place - 1] for place in places] == list(range(200))


def test_two_workers_fight_over_updates(database_url: str, broker: durable.DurableBroker) -> None:
    other = durable.DurableBroker(database_url)
    try:
        workers = []
        for each in (broker, other):

            @durable.workflow(broker=each)
            async def counter() -> int:
                count = 0

                @durable.on_update("add")
                def add(by: int) -> int:
                    nonlocal count
                    count += by
                    return count

                await durable.wait_for_signal("end")
                return count

            worker = dramatiq.Worker(each, worker_timeout=50, worker_threads=3)
            worker.start()
            workers.append(worker)
        handle = broker.workflows["counter"].start()
        with ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(lambda _: handle.update("add", 1, timeout=60), range(60)))
        assert sorted(counts) == list(range(1, 61))
        handle.signal("end")
        assert handle.result(timeout=20) == 60
        for worker in workers:
            worker.stop()
    finally:
        other.close()


def test_async_twins(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    cart = define_cart()
    start_worker()

    async def client() -> None:
        handle: Any = await cart.astart()
        assert await handle.aupdate("add", Item("pen", 5)) == 1
        update = await handle.aupdate("add", Item("ink", 5), wait="accepted", update_id="i")
        assert await update.aresult(timeout=10) == 2
        assert await (await handle.aget_update("i")).aresult() == 2
        assert await handle.aquery("names") == ["pen", "ink"]
        with pytest.raises(durable.UpdateRejected):
            await handle.aupdate("add", Item("x", -1))
        with pytest.raises(durable.QueryFailed):
            await handle.aquery("broken")
        await handle.asignal("close")
        assert await handle.aresult(timeout=10) == ["pen", "ink"]

    asyncio.run(client())
    late = cart.start()
    broker.close()

    async def alone() -> None:
        with pytest.raises(durable.QueryTimedOut):
            await late.aquery("names", timeout=0.2)
        with pytest.raises(durable.Timeout):
            await late.aupdate("add", Item("x", 1), timeout=0.2)

    asyncio.run(alone())


def test_updates_and_queries_do_not_ride_a_transaction(
    broker: durable.DurableBroker, start_worker: StartWorker, database_url: str
) -> None:
    cart = define_cart()
    start_worker()
    handle = cart.start()
    with psycopg.connect(database_url) as conn, durable.using(conn):
        with pytest.raises(durable.DurableError, match=r"using\(\) block you cannot ask the query 'names'"):
            handle.query("names")
        with pytest.raises(durable.DurableError, match=r"using\(\) block you cannot ask for the update 'add'"):
            handle.update("add", Item("pen", 1))
        with pytest.raises(durable.DurableError, match="cannot start a workflow with an update"):
            cart.options(with_update=("add", Item("pen", 1))).start()
        assert handle.describe().stack is None


# --- signals ---------------------------------------------------------------------------------------------


def test_handlers_get_earlier_signals_in_order(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def listens() -> list[Any]:
        got: list[Any] = []

        @durable.on_signal("item")
        def item(value: Item) -> None:
            got.append(value.name)

        early = list(got)
        await durable.wait_condition(lambda: len(got) >= 5)
        return [early, got]

    handle = listens.start()
    for n in range(3):
        handle.signal("item", Item(f"i{n}", n))
    start_worker()
    wait_until(lambda: len(types(handle)) >= 4, message="the early ones are there")
    handle.signal("item", "no item")
    for n in range(3, 5):
        handle.signal("item", Item(f"i{n}", n))
    assert handle.result(timeout=10)[1] == [f"i{n}" for n in range(5)]


def test_signal_with_start(broker: durable.DurableBroker, start_worker: StartWorker, database_url: str) -> None:
    @durable.workflow
    async def collect(n: int) -> list[Any]:
        return [await durable.wait_for_signal("item") for _ in range(n)]

    start = collect.options(workflow_id="c", with_signal=("item", 1)).start
    first = start(3)
    assert collect.options(workflow_id="c", with_signal=("item", None)).start(3).run_id == first.run_id
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            collect.options(workflow_id="c", with_signal=("item", 99)).start(3)
            collect.options(workflow_id="new", with_signal=("item", 99)).start(3)
        conn.rollback()
        with durable.using(conn):
            assert collect.options(workflow_id="c", with_signal=("item", 3)).start(3).run_id == first.run_id
        conn.commit()
    start_worker()
    assert first.result(timeout=10) == [1, None, 3]
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle("new").describe()
    with pytest.raises(durable.WorkflowAlreadyStarted):
        collect.options(workflow_id="c", id_reuse="reject", with_signal=("item", 1)).start(3)
    second = start(1)
    assert second.run_id != first.run_id
    assert second.result(timeout=10) == [1]
    third = start(2)
    fourth = collect.options(workflow_id="c", id_conflict="terminate_existing", with_signal=("item", 7)).start(1)
    assert fourth.result(timeout=10) == [7]
    assert third.status() == "terminated"
    with pytest.raises(ValueError, match=r"\(name, payload\)"):
        collect.options(with_signal=("item",))  # type: ignore[typeddict-item]


def test_runs_signal_and_cancel_each_other(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def listener() -> Any:
        return await durable.wait_for_signal("hello", type=Item)

    @durable.workflow
    async def speaker() -> list[str]:
        said = []
        await durable.signal_workflow("l1", "hello", Item("pen", 5))
        await durable.cancel_workflow("l2")
        child = listener.start()
        await child.signal("hello", Item("ink", 7))
        said.append((await child)["name"])
        for attempt in (durable.signal_workflow("nobody", "x"), child.signal("late"), durable.cancel_workflow("l3")):
            try:
                await attempt
            except durable.DurableError as e:
                said.append(type(e).__name__)
        # Not awaited, and sent all the same.
        durable.signal_workflow("l4", "hello", Item("nib", 1))
        return said

    l1, l2, l3, l4 = (listener.options(workflow_id=f"l{n}").start() for n in range(1, 5))
    l3.terminate()
    start_worker()
    handle = speaker.start()
    assert handle.result(timeout=10) == ["ink", "WorkflowNotFound", "WorkflowClosed", "WorkflowClosed"]
    assert l1.result(timeout=10) == {"name": "pen", "cents": 5}
    assert l4.result(timeout=10) == {"name": "nib", "cents": 1}
    with pytest.raises(durable.WorkflowCancelled):
        l2.result(timeout=10)
    assert types(handle).count("SignalSent") == 5
    assert types(handle).count("CancelSent") == 2


def test_a_signal_that_comes_while_the_last_timer_fires_is_given(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def naps() -> list[Any]:
        got: list[Any] = []
        durable.on_signal("s")(got.append)
        await durable.sleep(0.2)
        return got

    worker = start_worker()
    handle = naps.start()
    wait_until(lambda: "TimerStarted" in types(handle), message="it sleeps")
    worker.stop()
    for n in range(3):
        handle.signal("s", n)
    broker.runner.cache.clear()
    wait_until(lambda: durable.get_handle(handle.workflow_id).describe().started_at is not None, message="due")
    start_worker()
    assert handle.result(timeout=10) == [0, 1, 2]


def test_a_handler_that_fails_fails_the_run(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def fragile(kind: str) -> None:
        def bad(_: Any) -> None:
            raise ValueError("plain")

        async def worse(_: Any) -> None:
            await durable.sleep(0.01)
            raise ValueError("async")

        durable.on_signal("s")(bad if kind == "plain" else worse)
        await durable.wait_for_signal("never")

    start_worker()
    for kind in ("plain", "async"):
        handle = fragile.start(kind)
        handle.signal("s", 1)
        with pytest.raises(durable.WorkflowFailed, match=kind) as caught:
            handle.result(timeout=10)
        assert caught.value.type == "ValueError"
