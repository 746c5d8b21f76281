"""Signals, queries and updates, told by the page of the API alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]


@dataclass
class Item:
    name: str
    count: int = 1


def test_signals_before_the_worker_come_in_order(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got = [await durable.wait_for_signal("n") for _ in range(3)]
        got.append(await durable.wait_for_signal("other"))
        return got

    handle = flow.start()
    handle.signal("other", {"a": None})
    for n in (1, 2, 3):
        handle.signal("n", n)
    start_worker()
    assert handle.result(timeout=10) == [1, 2, 3, {"a": None}]


def test_a_signal_s_payload_is_typed(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got: list[Any] = []

        @durable.on_signal("item")
        async def item(value: Item) -> None:
            await durable.sleep(0.001)
            got.append([type(value).__name__, value.name, value.count])

        await durable.wait_condition(lambda: len(got) == 2)
        return got

    start_worker()
    handle = flow.start()
    handle.signal("item", Item("tea", 2))
    handle.signal("item", {"name": "milk"})
    assert handle.result(timeout=10) == [["Item", "tea", 2], ["Item", "milk", 1]]


def test_signals_without_payload_and_with_lists(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got: list[Any] = []

        @durable.on_signal("none")
        def none() -> None:
            got.append("called")

        @durable.on_signal("list")
        def some(values: list[int]) -> None:
            got.append(values)

        @durable.on_signal("default")
        def default(value: int | None = 5) -> None:
            got.append(value)

        await durable.wait_condition(lambda: len(got) == 4)
        return got

    start_worker()
    handle = flow.start()
    handle.signal("none")
    handle.signal("list", [1, 2])
    handle.signal("default")
    handle.signal("default", 6)
    assert handle.result(timeout=10) == ["called", [1, 2], None, 6]


def test_iterating_signals_until_one_says_so(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got = []
        async for value in durable.signals("n"):
            if value == "end":
                break
            got.append(value)
        got.append(await durable.wait_for_signal("n"))
        return got

    start_worker()
    handle = flow.start()
    for value in (1, 2, "end", 3):
        handle.signal("n", value)
    assert handle.result(timeout=10) == [1, 2, 3]


def test_a_signal_with_an_id_counts_once(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> int:
        got = 0

        @durable.on_signal("n")
        def n(value: int) -> None:
            nonlocal got
            got += value

        await durable.wait_for_signal("end")
        return got

    start_worker()
    handle = flow.start()
    for _ in range(3):
        handle.signal("n", 1, id="same")
    handle.signal("n", 10, id="another")
    handle.signal("end")
    assert handle.result(timeout=10) == 11
    with pytest.raises(durable.WorkflowClosed):
        handle.signal("n", 1)
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle("nothing-like-it").signal("n", 1)


def test_queries(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        state = "begun"

        @durable.on_query("state")
        def show(prefix: str = "", item: Item | None = None) -> Any:
            return [prefix + state, item and item.name]

        @durable.on_query("breaks")
        def breaks() -> None:
            raise KeyError("broken")

        @durable.on_query("item")
        def item() -> Item:
            return Item("x")

        await durable.wait_for_signal("go")
        state = "done"
        return "result"

    start_worker()
    handle = flow.start()
    assert handle.query("state") == ["begun", None]
    assert handle.query("state", "is ", Item("tea")) == ["is begun", "tea"]
    assert handle.query("item") == {"name": "x", "count": 1}
    with pytest.raises(durable.QueryFailed) as failed:
        handle.query("breaks")
    assert (failed.value.type, "broken" in failed.value.message) == ("KeyError", True)
    with pytest.raises(durable.QueryFailed) as unknown:
        handle.query("unknown")
    assert "unknown" in str(unknown.value)
    assert "state" in str(unknown.value)
    length = handle.describe().history_length
    handle.signal("go")
    assert handle.result(timeout=10) == "result"
    assert handle.query("state", timeout=5) == ["done", None]
    assert handle.describe().history_length == length + 2


def test_a_query_must_not_await_or_change(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        @durable.on_query("starts")
        def starts() -> None:
            durable.sleep(1)

        @durable.on_query("task")
        def task() -> None:
            asyncio.create_task(asyncio.sleep(1))

        await durable.wait_for_signal("go")

    start_worker()
    handle = flow.start()
    for name in ("starts", "task"):
        with pytest.raises(durable.QueryFailed) as failed:
            handle.query(name)
        assert failed.value.type == "ForbiddenInWorkflow"
    handle.signal("go")
    handle.result(timeout=10)


def test_an_async_query_handler_is_refused(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        try:

            @durable.on_query("q")  # type: ignore[arg-type]
            async def q() -> int:
                return 1
        except durable.InvalidDefinition:
            return "refused"
        return "taken"

    start_worker()
    assert flow.start().result(timeout=10) == "refused"


def test_updates(start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity
    def slow(n: int) -> int:
        calls.append(n)
        return n * 10

    @durable.workflow
    async def flow() -> list[int]:
        total: list[int] = []

        def positive(n: int) -> None:
            if n <= 0:
                raise ValueError("only positive")

        @durable.on_update("add", validator=positive)
        async def add(n: int) -> int:
            value = await slow.execute(n)
            total.append(value)
            return value

        @durable.on_update("breaks")
        def breaks() -> None:
            raise KeyError("handler")

        await durable.wait_for_signal("end")
        await durable.wait_condition(durable.all_handlers_finished)
        return total

    start_worker()
    handle = flow.start()
    assert handle.update("add", 1) == 10
    before = handle.describe().history_length
    with pytest.raises(durable.UpdateRejected) as rejected:
        handle.update("add", 0, update_id="no")
    assert (rejected.value.type, rejected.value.message) == ("ValueError", "only positive")
    with pytest.raises(durable.UpdateRejected):
        handle.update("unknown")
    assert handle.describe().history_length == before
    with pytest.raises(durable.UpdateFailed) as failed:
        handle.update("breaks")
    assert (failed.value.type, failed.value.message) == ("KeyError", "'handler'")
    update = handle.update("add", 2, update_id="u-2", wait="accepted")
    assert update.update_id == "u-2"
    assert update.result(timeout=10) == 20
    assert handle.get_update("u-2").result(timeout=10) == 20
    assert handle.update("add", 2, update_id="u-2") == 20
    handle.signal("end")
    assert handle.result(timeout=10) == [10, 20]
    types = [e.type for e in handle.history()]
    assert types.count("UpdateAccepted") == 3
    assert types.count("UpdateCompleted") == 3
    assert calls == [1, 2]
    # Of a closed run, too.
    assert handle.get_update("u-2").result(timeout=5) == 20
    with pytest.raises(durable.WorkflowClosed):
        handle.update("add", 3)


def test_an_update_waits_with_a_timeout(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        @durable.on_update("wait")
        async def wait() -> str:
            await durable.wait_for_signal("go")
            return "went"

        await durable.wait_for_signal("end")

    start_worker()
    handle = flow.start()
    began = time.monotonic()
    with pytest.raises(durable.Timeout):
        handle.update("wait", update_id="u", timeout=0.5)
    assert time.monotonic() - began < 5
    handle.signal("go")
    assert handle.get_update("u").result(timeout=10) == "went"
    pending = handle.update("wait", wait="accepted")
    handle.signal("end")
    handle.result(timeout=10)
    with pytest.raises(durable.WorkflowClosed):
        pending.result(timeout=5)


def test_update_with_start(start_worker: StartWorker) -> None:
    @durable.workflow
    async def cart(owner: str) -> list[Any]:
        items: list[Any] = []

        @durable.on_update("add")
        def add(item: Item, times: int) -> int:
            items.append([item.name, times])
            return len(items)

        await durable.wait_for_signal("end")
        return [owner, items]

    start_worker()
    options: dict[str, Any] = {"workflow_id": "cart-1", "id_conflict": "use_existing"}
    first = cart.options(**options, with_update=("add", Item("a"), 1), update_id="one").start("me")
    second = cart.options(**options, with_update=("add", Item("b"), 2), update_id="two").start("me")
    assert first.run_id == second.run_id
    assert first.get_update("one").result(timeout=10) == 1
    assert second.get_update("two").result(timeout=10) == 2
    again = cart.options(**options, with_update=("add", Item("b"), 2), update_id="two").start("me")
    assert again.get_update("two").result(timeout=10) == 2
    first.signal("end")
    assert first.result(timeout=10) == ["me", [["a", 1], ["b", 2]]]


def test_signal_with_start(start_worker: StartWorker) -> None:
    @durable.workflow
    async def collect() -> list[Any]:
        return [await durable.wait_for_signal("n") for _ in range(3)]

    start_worker()
    options: dict[str, Any] = {"workflow_id": "c-1", "id_conflict": "use_existing"}
    handles = [collect.options(**options, with_signal=("n", n)).start() for n in range(3)]
    assert len({h.run_id for h in handles}) == 1
    assert handles[0].result(timeout=10) == [0, 1, 2]
    # A closed run makes room for a new one.
    fresh = collect.options(**options, with_signal=("n", 9)).start()
    assert fresh.run_id != handles[0].run_id
    fresh.terminate()


def test_handlers_and_main_see_each_other_in_one_order(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[str]:
        log: list[str] = []

        @durable.on_signal("s")
        async def s(n: int) -> None:
            log.append(f"s{n}-in")
            await asyncio.sleep(0)
            log.append(f"s{n}-out")

        @durable.on_update("u")
        async def u(n: int) -> None:
            log.append(f"u{n}-in")
            await asyncio.sleep(0)
            log.append(f"u{n}-out")

        await durable.wait_condition(lambda: len(log) >= 8)
        return log

    handle = flow.start()
    handle.signal("s", 1)
    handle.signal("s", 2)
    start_worker()
    handle.update("u", 1)
    handle.update("u", 2)
    assert handle.result(timeout=10) == [
        "s1-in", "s2-in", "s1-out", "s2-out", "u1-in", "u1-out", "u2-in", "u2-out",
    ]  # fmt: skip


def test_registered_later_and_replaced(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got: list[Any] = []
        await durable.wait_for_signal("begin")

        @durable.on_signal("n")
        def one(n: int) -> None:
            got.append(["one", n])

        await durable.wait_for_signal("change")

        @durable.on_signal("n")
        def two(n: int) -> None:
            got.append(["two", n])

        await durable.wait_condition(lambda: len(got) == 3)
        return got

    start_worker()
    handle = flow.start()
    handle.signal("n", 1)
    handle.signal("n", 2)
    handle.signal("begin")
    handle.signal("change")
    # What comes together is seen together: the next one is to find the other handler.
    wait_until(lambda: any(event.name == "change" for event in handle.history()))
    handle.signal("n", 3)
    assert handle.result(timeout=10) == [["one", 1], ["one", 2], ["two", 3]]


def test_unfinished_handlers_are_warned_of(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> bool:
        @durable.on_update("long")
        async def long() -> None:
            await durable.sleep("1 day")

        await durable.wait_for_signal("end")
        return durable.all_handlers_finished()

    start_worker()
    handle = flow.start()
    update = handle.update("long", wait="accepted")
    handle.signal("end")
    assert handle.result(timeout=10) is False
    with pytest.raises(durable.WorkflowClosed):
        update.result(timeout=5)


def test_a_safe_message_handler(start_worker: StartWorker) -> None:
    """A cluster manager: nodes are assigned under a lock while the run goes on as new."""

    @durable.activity
    def assign(nodes: list[str], job: str) -> None: ...

    @durable.workflow
    async def cluster(state: dict[str, str], rounds: int) -> dict[str, str]:
        lock = asyncio.Lock()
        down = False

        def is_up(job: str, count: int) -> None:
            if down:
                raise RuntimeError("the cluster is down")

        @durable.on_update("assign", validator=is_up)
        async def do(job: str, count: int) -> list[str]:
            async with lock:
                free = [n for n, j in sorted(state.items()) if not j][:count]
                if len(free) < count:
                    raise ValueError("not enough")
                await assign.execute(free, job)
                for n in free:
                    state[n] = job
                return free

        @durable.on_signal("shutdown")
        def shutdown() -> None:
            nonlocal down
            down = True

        try:
            await durable.wait_condition(lambda: down, timeout=1 if rounds else None)
        except TimeoutError:
            await durable.wait_condition(durable.all_handlers_finished)
            durable.continue_as_new(state, rounds - 1)
        await durable.wait_condition(durable.all_handlers_finished)
        return state

    start_worker()
    handle = cluster.options(workflow_id="cluster").start({f"n{i}": "" for i in range(6)}, 2)

    async def storm() -> list[Any]:
        any_run = durable.get_handle("cluster")
        return await asyncio.gather(
            *(any_run.aupdate("assign", f"j{i}", 2, update_id=f"j{i}", timeout=20) for i in range(4)),
            return_exceptions=True,
        )

    outcomes = asyncio.run(storm())
    assert sum(isinstance(o, list) for o in outcomes) == 3, outcomes
    (failed,) = [o for o in outcomes if not isinstance(o, list)]
    assert isinstance(failed, durable.UpdateFailed)
    assert failed.type == "ValueError"
    time.sleep(2.5)
    durable.get_handle("cluster").signal("shutdown")
    result = handle.result(timeout=15)
    assert all(result.values())


def test_wait_condition_and_its_argument(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        out: list[Any] = []
        await durable.wait_condition(lambda: True)
        ready = False

        async def later() -> None:
            nonlocal ready
            await durable.sleep(0.01)
            ready = True

        task = asyncio.create_task(later())
        await durable.wait_condition(lambda: ready, timeout=timedelta(seconds=60))
        out.append(task.done())

        def broken() -> bool:
            raise KeyError("broken")

        try:
            await durable.wait_condition(broken)
        except KeyError:
            out.append("raised")
        return out

    start_worker()
    handle = flow.start()
    out = handle.result(timeout=10)
    assert out[1] == "raised"
    types = [e.type for e in handle.history()]
    assert types.count("TimerStarted") == types.count("TimerFired") + types.count("TimerCancelled")


def test_signal_a_run_from_a_run(start_worker: StartWorker) -> None:
    @durable.workflow
    async def target() -> Any:
        return await durable.wait_for_signal("n")

    @durable.workflow
    async def source(id: str) -> list[str]:
        await durable.signal_workflow(id, "n", {"from": "source"})
        out = []
        for other in ("nobody", id):
            try:
                await durable.signal_workflow(other, "n", 1)
                out.append("sent")
            except durable.DurableError as e:
                out.append(type(e).__name__)
            await durable.sleep(0.3)
        try:
            await durable.cancel_workflow("nobody")
        except durable.DurableError as e:
            out.append(type(e).__name__)
        return out

    start_worker()
    there = target.options(workflow_id="t-1").start()
    assert source.start("t-1").result(timeout=10) == ["WorkflowNotFound", "WorkflowClosed", "WorkflowNotFound"]
    assert there.result(timeout=10) == {"from": "source"}


def test_a_worker_less_query_and_update_time_out() -> None:
    @durable.workflow(queue_name="nobody")
    async def flow() -> None: ...

    handle = flow.start()
    with pytest.raises(durable.QueryTimedOut):
        handle.query("x", timeout=0.3)
    with pytest.raises(durable.Timeout):
        handle.update("x", timeout=0.3)


def test_cancel_reaches_update_handlers_at_the_end(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        done: list[str] = []

        @durable.on_update("u")
        async def u() -> str:
            await durable.sleep(0.2)
            done.append("u")
            return "finished"

        try:
            await durable.wait_for_signal("never")
        except asyncio.CancelledError:
            await durable.wait_condition(durable.all_handlers_finished)
            return ",".join(done)
        return "?"

    start_worker()
    handle = flow.start()
    update = handle.update("u", wait="accepted")
    handle.cancel()
    assert update.result(timeout=10) == "finished"
    assert handle.result(timeout=10) == "u"


def test_an_update_that_starts_a_child_and_continues(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child(n: int) -> int:
        return n + 1

    @durable.workflow
    async def flow() -> int:
        last = 0

        @durable.on_update("next")
        async def step(n: int) -> int:
            nonlocal last
            last = await child.execute(n)
            return last

        await durable.wait_condition(lambda: last > 5)
        return last

    start_worker()
    handle = flow.start()
    assert handle.update("next", 1, timeout=10) == 2
    assert handle.update("next", 8, timeout=10) == 9
    assert handle.result(timeout=10) == 9


def test_continue_as_new_in_a_handler_is_refused(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int) -> int:
        @durable.on_update("again")
        async def again() -> None:
            durable.continue_as_new(n + 1)

        await durable.wait_for_signal("end")
        return n

    start_worker()
    handle = flow.start(0)
    with pytest.raises(durable.UpdateFailed) as failed:
        handle.update("again", timeout=10)
    assert "continue_as_new" in failed.value.message
    handle.signal("end")
    assert handle.result(timeout=10) == 0


def test_the_pending_and_the_stack_of_a_waiting_run(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def flow() -> None:
        await asyncio.gather(child.execute(), durable.sleep("1 day"), durable.wait_for_signal("never"))

    start_worker()
    handle = flow.start()
    wait_until(lambda: len(handle.describe().pending) == 2)
    kinds = {p.kind: p for p in handle.describe().pending}
    assert set(kinds) == {"child", "timer"}
    assert kinds["child"].name == "child"
    assert kinds["timer"].next_attempt_at is not None
    stack = handle.describe().stack
    assert stack is not None
    assert "flow" in stack
    handle.terminate("enough")
    assert handle.describe().pending == []
    with pytest.raises(durable.WorkflowTerminated) as ended:
        handle.result(timeout=10)
    assert "enough" in str(ended.value)
