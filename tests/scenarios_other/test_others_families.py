"""Children, continued runs, handlers as hooks, versions, combinations of these."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


# --- children --------------------------------------------------------------------------------------------


def test_nested_three_deep(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def leaf(path: str) -> str:
        return f"{path}!"

    @durable.workflow
    async def nested(depth: int, path: str) -> list[Any]:
        if depth == 0:
            return [await leaf.execute(path)]
        kids = [nested.start(depth - 1, f"{path}/{n}") for n in range(2)]
        return [await kid for kid in kids]

    start_worker()
    handle = nested.options(workflow_id="root").start(2, "")
    assert handle.result(timeout=30) == [[["/0/0!"], ["/0/1!"]], [["/1/0!"], ["/1/1!"]]]
    kids = handle.children()
    assert len(kids) == 2
    parent = durable.get_handle(kids[0].workflow_id).describe().parent
    assert parent is not None
    assert (parent.workflow_id, parent.run_id) == ("root", handle.run_id)
    by_id = durable.count_workflows("parent_id = 'root'")
    assert by_id == 2
    assert types(handle).count("ChildStarted") == types(handle).count("ChildCompleted") == 2


def test_how_children_end(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity(max_retries=0)
    def breaks() -> None:
        raise LookupError("deep")

    @durable.workflow
    async def kid(how: str) -> str:
        if how == "fail":
            await breaks.execute()
        await durable.sleep("1h")
        return how

    @durable.workflow
    async def parent() -> list[Any]:
        seen: list[Any] = []
        me = durable.info().workflow_id
        try:
            await kid.options(workflow_id=f"{me}-fail").execute("fail")
        except durable.ChildWorkflowFailed as e:
            first: Any = e.__cause__
            seen.append([e.workflow_id, e.type, e.message, first.type, type(first).__name__, first.message])
        for how, error in (("terminate", durable.WorkflowTerminated), ("timeout", durable.WorkflowTimedOut)):
            child = kid.options(workflow_id=f"{me}-{how}", run_timeout=0.2 if how == "timeout" else None).start(how)
            await child.started()
            try:
                await child
            except durable.ChildWorkflowFailed as e:
                cause: Any = e.__cause__
                seen.append([how, type(e).__name__, e.type, type(cause).__name__])
            except error as e:
                seen.append([how, type(e).__name__])
        child = kid.start("cancel")
        await child.started()
        await child.cancel()
        try:
            await child
        except (durable.WorkflowCancelled, durable.ChildWorkflowFailed, asyncio.CancelledError) as e:
            seen.append(["cancel", type(e).__name__])
        twice = kid.options(workflow_id=me).start("x")
        try:
            await twice.started()
        except durable.WorkflowAlreadyStarted:
            seen.append("taken")
        return seen

    start_worker()
    handle = parent.options(workflow_id="p").start()
    wait_until(lambda: any(k.workflow_id == "p-terminate" for k in handle.children()))
    durable.get_handle("p-terminate").terminate("off")
    result = handle.result(timeout=30)
    assert result[0][:2] == ["p-fail", "ActivityFailed"]
    assert result[0][3] == "LookupError"
    assert result[0][5] == "deep"
    assert result[1][0] == "terminate"
    assert result[2][0] == "timeout"
    assert result[3][0] == "cancel"
    assert result[4] == "taken"
    seen = types(handle)
    for type_ in ("ChildFailed", "ChildTerminated", "ChildTimedOut", "ChildCancelled", "ChildStartFailed"):
        assert type_ in seen, type_


def test_a_child_is_told_and_answers(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> int:
        total = 0
        async for n in durable.signals("add"):
            if n is None:
                return total
            total += n
        return -1

    @durable.workflow
    async def parent() -> int:
        child = kid.start()
        for n in (1, 2, 3, None):
            await child.signal("add", n)
        return await child

    start_worker()
    assert parent.start().result(timeout=20) == 6


def test_a_cancel_goes_down_the_tree(broker: Any, start_worker: StartWorker) -> None:
    cleaned: list[str] = []

    @durable.activity
    def clean(who: str) -> None:
        cleaned.append(who)

    @durable.workflow
    async def kid() -> None:
        try:
            await durable.sleep("1h")
        finally:
            await clean.execute("kid")

    @durable.workflow
    async def parent() -> None:
        try:
            await kid.options(workflow_id="kid").execute()
        finally:
            await clean.execute("parent")

    start_worker()
    handle = parent.start()
    wait_until(lambda: durable.count_workflows("workflow_id = 'kid'") == 1)
    wait_until(lambda: "TimerStarted" in types(durable.get_handle("kid")))
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)
    assert cleaned == ["kid", "parent"]
    assert durable.get_handle("kid").status() == "cancelled"


# --- continue as new -------------------------------------------------------------------------------------


def test_continue_with_everything(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def counts(n: int, until: int) -> dict[str, Any]:
        total = {"n": n}

        @durable.on_signal("add")
        def add(by: int) -> None:
            total["n"] += by

        @durable.on_update("double")
        def double() -> int:
            total["n"] *= 2
            return total["n"]

        @durable.on_query("total")
        def show() -> int:
            return total["n"]

        await durable.upsert_search({"n": total["n"]})
        await durable.entity().increment("runs")
        await durable.output(total["n"])
        await durable.sleep(0.02)
        await durable.wait_condition(durable.all_handlers_finished)
        if total["n"] < until:
            durable.continue_as_new(total["n"] + 1, until)
        await durable.wait_for_signal("end")
        info = durable.info()
        return {"n": total["n"], "memo": info.memo, "length": info.history_length, "search": info.search}

    start_worker()
    handle = counts.options(workflow_id="c", memo={"m": 1}, search={"s": "t"}).start(0, 5)
    first = handle.run_id
    wait_until(lambda: durable.count_workflows("workflow_id = 'c' and status = 'running' and search.n = 5") == 1)
    latest = durable.get_handle("c")
    assert latest.query("total") == 5
    assert latest.update("double", timeout=20) == 10
    latest.signal("add", 1)
    latest.signal("end")
    result = handle.result(timeout=20)
    assert result["n"] == 11
    assert result["memo"] == {"m": 1}
    assert result["search"] == {"s": "t", "n": 5}
    assert result["length"] < 20
    assert list(durable.get_handle("c").follow()) == list(enumerate(range(6)))
    assert durable.get_handle("c", run_id=first).status() == "continued_as_new"
    assert durable.get_handle("c", run_id=first).result(timeout=5) == result
    assert durable.count_workflows("workflow_id = 'c'", group_by="status") == {"continued_as_new": 5, "completed": 1}
    assert durable.get_handle("c").describe().entity == {"runs": 6}
    assert types(handle)[-1] == "WorkflowContinuedAsNew"


def test_signals_during_continuing_are_all_read(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def reads(total: int, want: int) -> int:
        for _ in range(3):
            total += await durable.wait_for_signal("one")
            if total == want:
                return total
        durable.continue_as_new(total, want)
        return None

    start_worker()
    handle = reads.options(workflow_id="r").start(0, 40)

    def send(k: int) -> None:
        for n in range(10):
            durable.get_handle("r").signal("one", 1, id=f"{k}.{n}")

    threads = [threading.Thread(target=send, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handle.result(timeout=30) == 40


def test_continue_in_a_handler_is_refused(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        seen: list[str] = []

        @durable.on_signal("again")
        def again(_: Any) -> None:
            try:
                durable.continue_as_new()
            except Exception as e:
                seen.append(type(e).__name__)

        await durable.wait_condition(lambda: bool(seen))
        return seen[0]

    start_worker()
    handle = flow.start()
    handle.signal("again")
    assert handle.result(timeout=20)


# --- handlers as hooks -----------------------------------------------------------------------------------


def test_hooks_run_beside_the_workflow(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def greet(name: str) -> str:
        return f"hi {name}"

    @durable.workflow
    async def hooked() -> dict[str, Any]:
        state: dict[str, Any] = {"greetings": []}

        @durable.on_signal("hook")
        async def hook(name: str) -> None:
            await durable.sleep(0.01)
            greeting = await greet.execute(name)
            await durable.entity().append("greetings", greeting)
            state["greetings"].append(greeting)
            if len(state["greetings"]) == 3:
                await durable.signal_workflow(durable.info().workflow_id, "done", "hooks")

        @durable.on_update("exec_hook")
        async def exec_hook(name: str) -> str:
            try:
                return await greet.execute(name)
            finally:
                await durable.entity().increment("executed")

        done = await durable.wait_for_signal("done")
        await durable.wait_condition(durable.all_handlers_finished)
        return {"done": done, "greetings": sorted(state["greetings"]), "entity": await durable.entity().get()}

    start_worker()
    handle = hooked.start()
    for name in "abc":
        handle.signal("hook", name)
    result = handle.result(timeout=20)
    assert result["done"] == "hooks"
    assert result["greetings"] == ["hi a", "hi b", "hi c"]
    assert sorted(result["entity"]["greetings"]) == ["hi a", "hi b", "hi c"]
    Replayer([hooked]).replay(handle.export())


def test_a_failing_signal_handler(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        @durable.on_signal("break")
        async def fails(_: Any) -> None:
            raise ValueError("in handler")

        await durable.sleep("1h")

    start_worker()
    handle = flow.start()
    handle.signal("break")
    with pytest.raises(durable.WorkflowFailed, match="in handler"):
        handle.result(timeout=20)


def test_queries_are_read_only(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def act() -> None: ...

    @durable.workflow
    async def flow() -> None:
        @durable.on_query("writes")
        def writes() -> None:
            act.start()

        @durable.on_query("fails")
        def fails(n: int, m: int = 2) -> int:
            raise ValueError(f"{n} {m}")

        @durable.on_query("adds")
        def adds(n: int, m: int = 2) -> int:
            return n + m

        await durable.wait_for_signal("end")

    start_worker()
    handle = flow.start()
    assert handle.query("adds", 1) == 3
    assert handle.query("adds", 1, 1) == 2
    length = len(handle.history())
    for name, args in (("writes", ()), ("fails", (1,)), ("missing", ()), ("adds", ())):
        with pytest.raises(durable.QueryFailed):
            handle.query(name, *args)
    with pytest.raises(durable.QueryFailed, match="1 2"):
        handle.query("fails", 1)
    assert len(handle.history()) == length
    handle.signal("end")
    handle.result(timeout=20)
    assert handle.query("adds", 3) == 5


def test_nobody_answers_a_query(broker: Any) -> None:
    @durable.workflow
    async def flow() -> None: ...

    handle = flow.start()
    before = time.monotonic()
    with pytest.raises(durable.QueryTimedOut):
        handle.query("q", timeout="300ms")
    assert time.monotonic() - before < 5


# --- versions --------------------------------------------------------------------------------------------


def test_patched_in_three_steps(broker: Any, start_worker: StartWorker) -> None:
    version = {"n": 1}

    @durable.activity
    def act(n: int) -> int:
        return n

    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        match version["n"]:
            case 1:
                seen.append(await act.execute(1))
            case 2:
                seen.append(await act.execute(2) if durable.patched("p") else await act.execute(1))
            case 3:
                durable.deprecate_patch("p")
                seen.append(await act.execute(2))
        await durable.wait_for_signal("go")
        return seen

    worker = start_worker()
    old = flow.start()
    wait_until(lambda: "ActivityCompleted" in types(old))
    version["n"] = 2
    Replayer([flow]).replay(old.export())
    worker.stop()
    broker.runner.cache.clear()
    worker = start_worker()
    new = flow.start()
    wait_until(lambda: "ActivityCompleted" in types(new))
    old.signal("go")
    assert old.result(timeout=20) == [1]
    assert "PatchRecorded" in types(new)
    version["n"] = 3
    Replayer([flow]).replay(new.export())
    with pytest.raises(durable.Nondeterminism):
        Replayer([flow]).replay(old.export())
    new.signal("go")
    assert new.result(timeout=20) == [2]


def test_changed_code_keeps_the_run_open_and_shows_why(broker: Any, start_worker: StartWorker) -> None:
    version = {"n": 1}

    @durable.activity
    def act(n: int) -> int:
        return n

    @durable.workflow
    async def flow() -> int:
        got = await act.execute(version["n"])
        await durable.wait_for_signal("go")
        return got

    worker = start_worker()
    handle = flow.start()
    wait_until(lambda: "ActivityCompleted" in types(handle))
    worker.stop()
    broker.runner.cache.clear()
    version["n"] = 2
    handle.signal("go")
    worker = start_worker()
    wait_until(lambda: handle.describe().task_failure)
    assert handle.status() == "running"
    version["n"] = 1
    assert handle.result(timeout=60) == 1
    assert handle.describe().task_failure is None


# --- combinations ----------------------------------------------------------------------------------------


@dataclass
class Order:
    id: str
    cents: int


def test_an_order_with_approval_saga_and_reset(broker: Any, start_worker: StartWorker) -> None:
    ledger: list[str] = []

    @durable.activity(max_retries=0)
    def reserve(order: Order) -> str:
        assert isinstance(order, Order)
        ledger.append(f"reserve {order.id}")
        return f"r-{order.id}"

    @durable.activity(max_retries=0)
    def charge(order: Order, token: str | None) -> str:
        if order.cents > 1000 and token is None:
            raise PermissionError("not approved")
        ledger.append(f"charge {order.cents}")
        return "receipt"

    @durable.activity
    def undo(what: str) -> None:
        ledger.append(f"undo {what}")

    @durable.workflow
    async def shop(order: Order) -> dict[str, Any]:
        done: list[str] = []
        try:
            done.append(await reserve.execute(order))
            token = None
            if order.cents > 1000:
                answer = await durable.escalate(role="boss", subject=order.id, payload=order, timeout="1h")
                token = answer["token"]
            receipt = await charge.execute(order, token)
        except (durable.ActivityFailed, durable.EscalationCancelled) as e:
            for what in reversed(done):
                await undo.execute(what)
            return {"failed": type(e).__name__, "undone": done}
        return {"receipt": receipt, "order": order}

    start_worker()
    big, small, no = (shop.start(Order(i, c)) for i, c in (("a", 5000), ("b", 10), ("c", 7000)))
    assert small.result(timeout=20) == {"receipt": "receipt", "order": {"id": "b", "cents": 10}}
    wait_until(lambda: len(escalations.list(role="boss")) == 2)
    tasks = {t.subject: t for t in escalations.list(role="boss")}
    assert tasks["a"].payload == {"id": "a", "cents": 5000}
    escalations.resolve(tasks["a"].id, {"token": None})
    escalations.cancel(tasks["c"].id)
    assert big.result(timeout=20) == {"failed": "ActivityFailed", "undone": ["r-a"]}
    assert no.result(timeout=20) == {"failed": "EscalationCancelled", "undone": ["r-c"]}
    opened = next(e for e in big.history() if e.type == "EscalationOpened")
    again = big.reset(opened.event_id)
    [task] = wait_until(lambda: escalations.list(role="boss", status="waiting"))
    assert task.run_id == again.run_id
    escalations.resolve(task.id, {"token": "t"})
    assert again.result(timeout=20)["receipt"] == "receipt"
    assert ledger.count("reserve a") == 1


def test_cancelled_while_handlers_children_and_questions_are_open(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> None:
        await durable.sleep("1h")

    @durable.workflow
    async def flow() -> str:
        @durable.on_update("slow")
        async def slow() -> str:
            await durable.sleep("1h")
            return "?"

        async with asyncio.TaskGroup() as group:
            group.create_task(kid.options(workflow_id="kid").execute())
            group.create_task(durable.escalate(role="r", subject="s"))  # type: ignore[arg-type]
            group.create_task(durable.wait_for_signal("x", timeout="1h"))
            group.create_task(durable.wait_condition(lambda: False))
        return "?"

    start_worker()
    handle = flow.start()
    update = handle.update("slow", wait="accepted", timeout=20)
    wait_until(lambda: escalations.list(status="waiting"))
    wait_until(lambda: durable.count_workflows("workflow_id = 'kid'") == 1)
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)
    with pytest.raises(durable.WorkflowClosed):
        update.result(timeout=10)
    assert escalations.stats().cancelled == 1
    wait_until(lambda: durable.get_handle("kid").status() == "cancelled")
    assert handle.describe().pending == []


def test_async_twins_do_all_of_it(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def plain(n: int) -> int:
        return n

    @durable.workflow
    async def flow(n: int) -> int:
        @durable.on_query("n")
        def query() -> int:
            return n

        @durable.on_update("u")
        def update(by: int) -> int:
            return n + by

        await durable.output(n)
        return n + await durable.wait_for_signal("s")

    start_worker()

    async def client() -> None:
        handle = await flow.options(workflow_id="a").astart(1)
        assert await handle.astatus() == "running"
        assert await handle.aquery("n") == 1
        assert await handle.aupdate("u", 5, timeout=20) == 6
        accepted = await handle.aupdate("u", 6, wait="accepted", update_id="x", timeout=20)
        assert await accepted.aresult(timeout=10) == 7
        assert await handle.get_update("x").aresult(timeout=10) == 7
        await handle.asignal("s", 2, id="i")
        assert await handle.aresult(timeout=20) == 3
        assert (await handle.adescribe()).result == 3
        assert (await handle.ahistory())[-1].type == "WorkflowCompleted"
        assert await handle.achildren() == []
        assert '"events"' in await handle.aexport()
        again = await handle.areset(1)
        assert again.run_id != handle.run_id
        await again.aterminate("over")
        assert await durable.acount_workflows() == 2
        assert len(await durable.alist_workflows("workflow_id = 'a'")) == 2
        more = await flow.astart(1)
        assert await durable.abatch_cancel("status = 'running'") == 1
        with pytest.raises(durable.WorkflowCancelled):
            await more.aresult(timeout=20)
        assert await escalations.alist() == []
        await plain.asend(1)

    asyncio.run(client())
