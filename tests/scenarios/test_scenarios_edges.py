"""Edges: client calls where they may and may not be made, names, twins, and asyncio's rarer tools."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]
once = durable.RetryPolicy(maximum_attempts=1)


def test_activities_talk_to_runs_as_clients_do(start_worker: StartWorker) -> None:
    @durable.workflow
    async def other(n: int) -> int:
        return n + 1

    @durable.activity(retry=once)
    def act() -> int:
        info = durable.activity_info()
        assert info is not None
        handle = durable.get_handle(info.workflow_id)
        handle.signal("n", 1)
        assert handle.query("q") == "asked"
        assert handle.update("u", 4) == 5
        return other.start(1).result(timeout=10)

    @durable.activity(retry=once)
    async def aact() -> int:
        info = durable.activity_info()
        assert info is not None
        handle = durable.get_handle(info.workflow_id)
        await handle.asignal("n", 2)
        assert await handle.aquery("q") == "asked"
        assert await handle.aupdate("u", 5) == 6
        return await (await other.astart(2)).aresult(timeout=10)

    @durable.workflow
    async def flow() -> list[Any]:
        @durable.on_query("q")
        def q() -> str:
            return "asked"

        @durable.on_update("u")
        def u(n: int) -> int:
            return n + 1

        return [
            await act.execute(),
            await durable.wait_for_signal("n"),
            await aact.execute(),
            await durable.wait_for_signal("n"),
        ]

    start_worker()
    assert flow.start().result(timeout=20) == [2, 1, 3, 2]


def test_clients_are_refused_inside_a_workflow(start_worker: StartWorker) -> None:
    @dramatiq.actor
    def actor() -> None: ...

    @durable.activity
    def act() -> None: ...

    @durable.workflow
    async def other() -> None: ...

    handle = durable.get_handle("x")
    calls: dict[str, Callable[[], Any]] = {
        "signal": lambda: handle.signal("n"),
        "query": lambda: handle.query("n"),
        "update": lambda: handle.update("n"),
        "result": lambda: handle.result(timeout=1),
        "describe": handle.describe,
        "status": handle.status,
        "history": handle.history,
        "cancel": handle.cancel,
        "terminate": handle.terminate,
        "reset": lambda: handle.reset(1),
        "list": durable.list_workflows,
        "count": durable.count_workflows,
        "batch": lambda: durable.batch_cancel("name = 'x'"),
        "actor.send": actor.send,
        "act.send": act.send,
        "other.send": other.send,
        "escalations": durable.escalations.list,
        "schedules": durable.schedules.list,
        "complete": lambda: durable.complete_activity("x", 1),
    }
    acalls: dict[str, Callable[[], Any]] = {
        "asignal": lambda: handle.asignal("n"),
        "aresult": lambda: handle.aresult(timeout=1),
        "aquery": lambda: handle.aquery("n"),
        "astatus": handle.astatus,
        "alist": durable.alist_workflows,
        "asend": act.asend,
        "astart": other.astart,
        "other.asend": other.asend,
    }

    @durable.workflow
    async def flow() -> list[str]:
        went = []
        for name, call in calls.items():
            try:
                call()
                went.append(name)
            except durable.ForbiddenInWorkflow:
                pass
            except Exception as e:
                went.append(f"{name}: {e!r}")
        for name, call in acalls.items():
            try:
                await call()
                went.append(name)
            except durable.ForbiddenInWorkflow:
                pass
            except Exception as e:
                went.append(f"{name}: {e!r}")
        return went

    start_worker()
    assert flow.start().result(timeout=10) == []


def test_names_of_runs(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        return durable.info().workflow_id

    start_worker()
    for name in ("a/b c?&=%", "\u2603\U0001f600", "x" * 200, "'; DROP TABLE x --", "{a}", "%", "a\nb"):
        assert flow.options(workflow_id=name).start().result(timeout=10) == name
        where = "workflow_id = '{}'".format(name.replace("'", "''"))
        assert [r.workflow_id for r in durable.list_workflows(where)] == [name]
        assert durable.get_handle(name).status() == "completed"
    for wrong in ("", "x" * 201, "a\x00b", 5):
        with pytest.raises((durable.InvalidName, TypeError)):
            flow.options(workflow_id=wrong).start()  # type: ignore[arg-type]
    with pytest.raises(durable.InvalidName):
        durable.get_handle("x").signal("")


def test_every_blocking_call_has_its_twin() -> None:
    @durable.activity
    def act() -> None: ...

    @durable.workflow
    async def flow() -> None: ...

    handle = durable.get_handle("x")
    names = [
        "result",
        "status",
        "describe",
        "signal",
        "query",
        "update",
        "cancel",
        "terminate",
        "reset",
        "history",
        "children",
        "follow",
        "export",
    ]
    missing = [f"handle.a{n}" for n in names if not hasattr(handle, f"a{n}")]
    for what, call in (("complete", "activity"), ("fail", "activity"), ("heartbeat", "activity")):
        missing += [] if hasattr(durable, f"a{what}_{call}") else [f"a{what}_{call}"]
    for name in ("list_workflows", "count_workflows", "batch_signal", "batch_cancel", "batch_terminate", "batch_reset"):
        missing += [] if hasattr(durable, f"a{name}") else [f"a{name}"]
    for name in ["create", "pause", "resume", "trigger", "backfill", "delete", "list", "describe"]:
        missing += [] if hasattr(durable.schedules, f"a{name}") else [f"schedules.a{name}"]
    for name in ["list", "get", "claim", "release", "resolve", "cancel", "reassign", "stats"]:
        missing += [] if hasattr(durable.escalations, f"a{name}") else [f"escalations.a{name}"]
    missing += [n for n in ("astart", "asend") if not hasattr(flow, n)]
    missing += [n for n in ("asend",) if not hasattr(act, n)]
    missing += [n for n in ("aresult",) if not hasattr(handle.get_update("u"), n)]
    assert missing == []
    assert inspect.iscoroutinefunction(handle.aresult)


def test_a_run_is_sent_by_async_code(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int, *, m: int) -> int:
        return n + m

    start_worker()

    async def client() -> int:
        return await (await flow.options(workflow_id="sent").asend(1, m=2)).aresult(timeout=10)

    assert asyncio.run(client()) == 3
    assert durable.get_handle("sent").status() == "completed"


def test_rarer_tools_of_asyncio(start_worker: StartWorker) -> None:
    @durable.activity
    def double(n: int) -> int:
        return 2 * n

    @durable.workflow
    async def flow() -> list[Any]:
        out: list[Any] = []
        async with contextlib.AsyncExitStack() as stack:

            @contextlib.asynccontextmanager
            async def manager(name: str) -> Any:
                await durable.sleep(0.001)
                yield name
                out.append(f"left {name} {await double.execute(1)}")

            out.append(await stack.enter_async_context(manager("a")))
            stack.push_async_callback(durable.sleep, 0.001)
        out.append(await asyncio.ensure_future(double.start(3)))
        out.append(inspect.isawaitable(double.start(4)))
        out.append(await asyncio.gather(asyncio.shield(double.execute(5)), asyncio.ensure_future(double.execute(6))))
        out.append([await f for f in [asyncio.create_task(double.execute(n)) for n in range(2)]])
        results: list[int] = []
        task = asyncio.create_task(double.execute(7))
        task.add_done_callback(lambda t: results.append(t.result()))
        await task
        await asyncio.sleep(0)
        out.append(results)

        async def numbers() -> Any:
            try:
                for n in range(9):
                    yield await double.execute(n)
            finally:
                await durable.sleep(0.001)
                out.append("closed")

        async with contextlib.aclosing(numbers()) as ns:
            async for n in ns:
                if n == 4:
                    break
        out.append(asyncio.get_event_loop() is asyncio.get_running_loop())
        return out

    start_worker()
    handle = flow.start()
    assert handle.result(timeout=10) == [
        "a", "left a 2", 6, True, [10, 12], [0, 2], [14], "closed", True,
    ]  # fmt: skip
    Replayer([flow]).replay(handle.export())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nothing() is never awaited
def test_tools_that_leave_the_loop_are_refused(start_worker: StartWorker) -> None:
    async def nothing() -> None: ...

    calls: dict[str, Callable[[], Any]] = {
        "asyncio.run": lambda: asyncio.run(nothing()),
        "executor": lambda: ThreadPoolExecutor(1).submit(print),
        "run_until_complete": lambda: asyncio.get_running_loop().run_until_complete(nothing()),
        "lock": lambda: threading.Event().wait(1),
        "input": lambda: input(),
    }
    acalls: dict[str, Callable[[], Any]] = {
        "open_connection": lambda: asyncio.open_connection("127.0.0.1", 1),
        "subprocess": lambda: asyncio.create_subprocess_exec("true"),
        "server": lambda: asyncio.start_server(lambda r, w: None, "127.0.0.1", 0),
        "getaddrinfo": lambda: asyncio.get_running_loop().getaddrinfo("localhost", 80),
    }

    @durable.workflow
    async def flow() -> list[str]:
        went = []
        for name, call in calls.items():
            try:
                call()
                went.append(name)
            except (durable.ForbiddenInWorkflow, RuntimeError):
                pass
            except Exception as e:
                went.append(f"{name}: {e!r}")
        for name, call in acalls.items():
            try:
                await call()
                went.append(name)
            except durable.ForbiddenInWorkflow:
                pass
            except Exception as e:
                went.append(f"{name}: {e!r}")
        return went

    start_worker()
    assert flow.start().result(timeout=20) == []


def test_several_tasks_wait_for_one_signal_name(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        tasks = [asyncio.create_task(durable.wait_for_signal("n")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        return [g if isinstance(g, int) else "cancelled" for g in got]

    start_worker()
    handle = flow.start()
    handle.signal("n", 1)
    handle.signal("n", 2)
    assert handle.result(timeout=10) == [1, "cancelled", 2]


def test_iterating_signals_with_a_time_limit(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got: list[Any] = []
        try:
            async with asyncio.timeout(0.5):
                async for value in durable.signals("n"):
                    got.append(value)
        except TimeoutError:
            got.append("over")
        async for value in durable.signals("n"):
            got.append(value)
            break
        return got

    start_worker()
    handle = flow.start()
    handle.signal("n", 1)
    handle.signal("n", 2)
    wait_until(lambda: "TimerFired" in [e.type for e in handle.history()])
    handle.signal("n", 3)
    assert handle.result(timeout=10) == [1, 2, "over", 3]


def test_handlers_registered_in_helpers_and_tasks(start_worker: StartWorker) -> None:
    class Cart:
        def __init__(self) -> None:
            self.items: list[str] = []
            durable.on_signal("add")(self.add)
            durable.on_query("items")(self.show)
            durable.on_update("remove", validator=self.check)(self.remove)

        def add(self, item: str) -> None:
            self.items.append(item)

        def show(self) -> list[str]:
            return self.items

        def check(self, item: str) -> None:
            if item not in self.items:
                raise LookupError(item)

        async def remove(self, item: str) -> int:
            await durable.sleep(0.001)
            self.items.remove(item)
            return len(self.items)

    @durable.workflow
    async def flow() -> list[str]:
        cart = Cart()
        await durable.wait_for_signal("end")
        return cart.items

    start_worker()
    handle = flow.start()
    for item in "abc":
        handle.signal("add", item)
    assert handle.query("items") == ["a", "b", "c"]
    assert handle.update("remove", "b") == 2
    with pytest.raises(durable.UpdateRejected) as rejected:
        handle.update("remove", "z")
    assert rejected.value.type == "LookupError"
    handle.signal("end")
    assert handle.result(timeout=10) == ["a", "c"]


def test_counts_by_what_one_asks_for_and_orders(start_worker: StartWorker) -> None:
    @durable.workflow(name="alpha")
    async def alpha() -> None: ...

    @durable.workflow(name="beta", queue_name="other")
    async def beta() -> None: ...

    start_worker()
    for n, (wf, kind) in enumerate(((alpha, "x"), (beta, "y"), (alpha, "x"))):
        wf.options(workflow_id=f"w-{n}", search={"kind": kind}).start().result(timeout=10)
    assert durable.count_workflows(group_by="name") == {"alpha": 2, "beta": 1}
    assert durable.count_workflows(group_by="queue_name") == {"default": 2, "other": 1}
    assert durable.count_workflows(group_by="search.kind") == {"x": 2, "y": 1}
    assert durable.count_workflows("name = 'alpha'", group_by="search.kind") == {"x": 2}
    for order in ("started_at", "-started_at", "closed_at", "-closed_at"):
        found = [r.workflow_id for r in durable.list_workflows(order=order, limit=2)]
        assert len(found) == 2, order
    with pytest.raises((ValueError, durable.DurableError)):
        durable.list_workflows(order="nonsense")


def test_a_workflow_awaits_another_s_function(start_worker: StartWorker) -> None:
    """Plain helpers, generators and closures are workflow code as any other."""

    @durable.activity
    def act(n: int) -> int:
        return n + 1

    async def helper(n: int) -> int:
        return await act.execute(n)

    @durable.workflow
    async def flow() -> list[int]:
        return [await helper(n) for n in range(3)] + [n async for n in _doubles(helper)]

    async def _doubles(fn: Any) -> Any:
        for n in range(2):
            yield 2 * await fn(n)

    start_worker()
    assert flow.start().result(timeout=10) == [1, 2, 3, 2, 4]


def test_a_query_and_update_during_a_long_local(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        @durable.on_query("q")
        def q() -> int:
            return 1

        await durable.local(time.sleep, 1.0)
        return "done"

    start_worker()
    handle = flow.start()
    assert handle.query("q", timeout=15) == 1
    assert handle.result(timeout=10) == "done"
