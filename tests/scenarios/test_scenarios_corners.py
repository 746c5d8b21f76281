"""Corners in which features meet: each scenario crosses two or three of them."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]
once = durable.RetryPolicy(maximum_attempts=1)


def test_async_activities_need_no_middleware(start_worker: StartWorker) -> None:
    @durable.activity(retry=once)
    async def act(n: int) -> int:
        await asyncio.sleep(0.01)
        return n + 1

    @durable.workflow
    async def flow() -> list[int]:
        return [await act.execute(1), await act.options(local=True).execute(2)]

    start_worker()
    assert flow.start().result(timeout=10) == [2, 3]


def test_local_functions_are_free(start_worker: StartWorker, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")

    def io() -> list[Any]:
        time.sleep(0.01)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        return [path.read_text(), random.random(), str(uuid.uuid4())]

    async def aio() -> str:
        await asyncio.sleep(0.01)
        return await asyncio.to_thread(path.read_text)

    @durable.activity(retry=once)
    def act() -> str:
        return path.read_text()

    @durable.workflow
    async def flow() -> list[Any]:
        return [await durable.local(io), await durable.local(aio), await act.options(local=True).execute()]

    start_worker()
    handle = flow.start()
    first, second, third = handle.result(timeout=10)
    assert (first[0], second, third) == ("content",) * 3
    path.unlink()
    Replayer([flow]).replay(handle.export())


def test_locals_in_parallel_and_in_handlers(start_worker: StartWorker) -> None:
    calls: list[str] = []

    def work(name: str) -> str:
        calls.append(name)
        return name.upper()

    @durable.workflow
    async def flow() -> list[str]:
        @durable.on_update("u")
        async def u(name: str) -> str:
            return await durable.local(work, name)

        @durable.on_signal("s")
        async def s(name: str) -> None:
            got.append(await durable.local(work, name))

        got: list[str] = []
        got += await asyncio.gather(durable.local(work, "a"), durable.local(work, "b"))
        await durable.wait_condition(lambda: len(got) == 3)
        return got

    start_worker()
    handle = flow.start()
    assert handle.update("u", "x", timeout=10) == "X"
    handle.signal("s", "y")
    assert handle.result(timeout=10) == ["A", "B", "Y"]
    assert sorted(calls) == ["a", "b", "x", "y"]


def test_cancel_between_the_attempts_of_a_local_activity(start_worker: StartWorker) -> None:
    tries: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=3600))
    def act() -> None:
        tries.append(1)
        raise ValueError("x")

    @durable.workflow
    async def flow() -> None:
        await act.options(local=True).execute()

    start_worker()
    handle = flow.start()
    wait_until(lambda: tries)
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    assert len(tries) == 1


def test_a_cancelled_run_uses_what_a_waited_for_activity_returns(start_worker: StartWorker) -> None:
    running = threading.Event()

    @durable.activity(retry=once, cancellation="wait")
    def act() -> str:
        running.set()
        try:
            while True:
                durable.heartbeat()
                time.sleep(0.01)
        except durable.ActivityCancelled:
            return "finished"

    @durable.workflow
    async def flow() -> str:
        return await act.execute()

    start_worker()
    handle = flow.start()
    assert running.wait(10)
    handle.cancel()
    assert handle.result(timeout=10) == "finished"
    assert handle.status() == "completed"


def test_a_cancelled_run_whose_activity_fails_otherwise(start_worker: StartWorker) -> None:
    running = threading.Event()

    @durable.activity(retry=once, cancellation="wait")
    def act() -> str:
        running.set()
        try:
            while True:
                time.sleep(0.01)
        except durable.ActivityCancelled:
            raise KeyError("while cleaning up") from None

    @durable.workflow
    async def flow() -> str:
        return await act.execute()

    start_worker()
    handle = flow.start()
    assert running.wait(10)
    handle.cancel()
    with pytest.raises(durable.WorkflowFailed) as failed:
        handle.result(timeout=10)
    assert failed.value.type == "ActivityFailed"
    assert failed.value.__cause__.type == "KeyError"  # type: ignore[union-attr]


def test_continue_as_new_leaves_what_is_pending(start_worker: StartWorker) -> None:
    told, running = threading.Event(), threading.Event()

    @durable.activity(retry=once)
    def act() -> None:
        running.set()
        try:
            while True:
                time.sleep(0.01)
        except durable.ActivityCancelled:
            told.set()
            raise

    @durable.workflow
    async def flow(n: int) -> str:
        if n:
            return "second"
        act.start()
        asyncio.create_task(durable.sleep("1 day"))
        await durable.wait_for_signal("go")
        durable.continue_as_new(1)
        return "?"

    start_worker()
    handle = flow.start(0)
    assert running.wait(10)
    handle.signal("go")
    assert handle.result(timeout=10) == "second"
    assert told.wait(10)


def test_send_and_its_options_start_runs(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int, m: int = 0) -> int:
        return n + m

    start_worker()
    flow.send(1)
    flow.options(delay=100).send(2, m=5)
    wait_until(lambda: durable.count_workflows("status = 'completed'") == 2)
    results = sorted(durable.get_handle(run_id=r.run_id).result(timeout=5) for r in durable.list_workflows())
    assert results == [1, 7]


def test_a_memo_of_values(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> Any:
        memo = durable.info().memo
        memo["n"] = "changed by the code"
        return durable.info().memo

    start_worker()
    memo = {"n": 1, "list": [1, {"a": None}], "text": "\u2603"}
    handle = flow.options(memo=memo).start()
    handle.result(timeout=10)
    assert handle.describe().memo == memo


def test_arguments_are_the_runs_own(start_worker: StartWorker) -> None:
    @durable.activity
    def act(values: list[int]) -> list[int]:
        values.append(99)
        return values

    @durable.workflow
    async def flow(values: list[int]) -> list[Any]:
        mine = [1]
        call = act.start(mine)
        mine.append(2)
        got = await call
        return [values, mine, got]

    start_worker()
    given = [0]
    handle = flow.start(given)
    given.append(5)
    assert handle.result(timeout=10) == [[0], [1, 2], [1, 99]]


def test_a_child_s_results_types_and_its_handle(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child(n: int) -> tuple[int, timedelta]:
        return n, timedelta(seconds=n)

    @durable.workflow
    async def flow() -> list[Any]:
        handles = [child.options(workflow_id=f"k-{n}").start(n) for n in range(3)]
        got = await asyncio.gather(*handles)
        assert got[1] == (1, timedelta(seconds=1))
        done, pending = await asyncio.wait(handles)
        first = await asyncio.wait_for(child.execute(9), 30)
        return [len(done), len(pending), [g[0] for g in got], first[0]]

    start_worker()
    assert flow.start().result(timeout=10) == [3, 0, [0, 1, 2], 9]


def test_timeout_around_children_and_signals(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def flow() -> list[Any]:
        out = []
        try:
            async with asyncio.timeout(0.2):
                await child.options(workflow_id="kid").execute()
        except TimeoutError:
            out.append("child")
        try:
            await asyncio.wait_for(durable.wait_for_signal("x"), 0.05)
        except TimeoutError:
            out.append("signal")
        out.append(await durable.wait_for_signal("x"))
        return out

    start_worker()
    handle = flow.start()
    wait_until(lambda: [e.type for e in handle.history()].count("TimerFired") == 2)
    handle.signal("x", 1)
    assert handle.result(timeout=10) == ["child", "signal", 1]
    assert durable.get_handle("kid").status() == "cancelled"


def test_interceptors_see_what_the_page_says(make_broker: Callable[..., durable.DurableBroker]) -> None:
    seen: list[Any] = []

    class Watch(durable.WorkflowInterceptor):
        async def execute_workflow(self, ctx: Any, call_next: Any) -> Any:
            if not durable.is_replaying():
                seen.append(
                    ["workflow", ctx.name, list(ctx.args), dict(ctx.kwargs), dict(ctx.headers), ctx.info.workflow_id]
                )
            ctx.args = (ctx.args[0] + 1,)
            ctx.headers = {**ctx.headers, "trace": "t"}
            return (await call_next(ctx)) * 10

        async def execute_activity(self, ctx: Any, call_next: Any) -> Any:
            seen.append(["activity", ctx.name, list(ctx.args), dict(ctx.headers)])
            ctx.headers["more"] = 1
            return await call_next(ctx)

    broker = make_broker(interceptors=[Watch()])
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    try:

        @durable.activity(retry=once)
        def act(n: int) -> list[Any]:
            info = durable.activity_info()
            assert info is not None
            return [n, info.headers]

        @durable.workflow
        async def flow(n: int) -> list[Any]:
            return [await act.execute(n), await act.options(local=True).execute(n), durable.info().headers]

        worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
        worker.start()
        try:
            result = flow.options(workflow_id="i").start(1).result(timeout=10)
        finally:
            worker.stop()
    finally:
        dramatiq.broker.global_broker = before
    assert seen[0] == ["workflow", "flow", [1], {}, {}, "i"]
    assert ["activity", "act", [2], {"trace": "t"}] in seen
    assert result[0] == [2, {"trace": "t", "more": 1}]
    assert result[1] == [2, {"trace": "t", "more": 1}]


def test_the_same_update_id_at_once_is_one_update(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> int:
        calls: list[int] = []

        @durable.on_update("u")
        async def u() -> int:
            await durable.sleep(0.1)
            calls.append(1)
            return 5

        await durable.wait_for_signal("end")
        await durable.wait_condition(durable.all_handlers_finished)
        return len(calls)

    start_worker()
    handle = flow.start()

    async def many() -> list[Any]:
        return await asyncio.gather(*(handle.aupdate("u", update_id="same", timeout=10) for _ in range(5)))

    assert asyncio.run(many()) == [5] * 5
    handle.signal("end")
    assert handle.result(timeout=10) == 1


def test_update_then_close_in_one_step(start_worker: StartWorker) -> None:
    """The update that ends the run is answered."""

    @durable.workflow
    async def flow() -> str:
        done = False

        @durable.on_update("finish")
        def finish() -> str:
            nonlocal done
            done = True
            return "finished"

        await durable.wait_condition(lambda: done)
        return "done"

    start_worker()
    for _ in range(5):
        handle = flow.start()
        assert handle.update("finish", timeout=10) == "finished"
        assert handle.result(timeout=10) == "done"


def test_an_update_answered_after_the_run_was_told_to_end(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        @durable.on_update("slow")
        async def slow() -> str:
            await durable.sleep(0.2)
            return "slow"

        await durable.wait_for_signal("end")
        await durable.wait_condition(durable.all_handlers_finished)
        return "done"

    start_worker()
    handle = flow.start()
    update = handle.update("slow", wait="accepted")
    handle.signal("end")
    assert handle.result(timeout=10) == "done"
    assert update.result(timeout=5) == "slow"


def test_history_events_are_as_named(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> int:
        return 1

    @durable.workflow
    async def flow() -> None:
        await durable.sleep(0.001)
        await durable.side_effect(lambda: 1)
        await durable.upsert_search({"a": 1})
        await durable.entity().set("a", 1)
        await durable.emit("t", 1)
        await durable.output(1)
        await child.execute()
        durable.patched("p")
        await durable.wait_for_signal("s")
        await durable.signal_workflow("other", "x")
        try:
            await durable.escalate(role="r", subject="s", timeout=0.01)
        except TimeoutError:
            pass

    @durable.workflow
    async def other() -> None:
        await durable.wait_for_signal("x")

    start_worker()
    other.options(workflow_id="other").start()
    handle = flow.start()
    handle.signal("s")
    handle.result(timeout=10)
    events = handle.history()
    types = [e.type for e in events]
    for want in (
        "WorkflowStarted", "TimerStarted", "TimerFired", "SideEffectRecorded", "SearchUpserted", "EntityChanged",
        "TopicEmitted", "OutputWritten", "ChildStarted", "ChildCompleted", "PatchRecorded", "SignalReceived",
        "SignalSent", "EscalationOpened", "EscalationTimedOut", "WorkflowCompleted",
    ):  # fmt: skip
        assert want in types, want
    assert [e.event_id for e in events] == list(range(1, len(events) + 1))
    names = {e.type: e.name for e in events}
    assert (names["SignalReceived"], names["ChildStarted"], names["TopicEmitted"]) == ("s", "child", "t")
    assert json.loads(handle.export())


def test_queries_of_a_run_that_was_never_in_this_worker(
    make_broker: Callable[..., durable.DurableBroker],
) -> None:
    """A second process asks and signals a run that the first one began."""

    def define(broker: durable.DurableBroker) -> Any:
        @durable.workflow(name="flow", broker=broker)
        async def flow() -> int:
            n = 0

            @durable.on_signal("add")
            def add(value: int) -> None:
                nonlocal n
                n += value

            @durable.on_query("n")
            def show() -> int:
                return n

            await durable.wait_for_signal("end")
            return n

        return flow

    first, second = make_broker(), make_broker()
    one, two = define(first), define(second)
    worker = dramatiq.Worker(first, worker_timeout=50, worker_threads=2)
    worker.start()
    handle = one.start()
    handle.signal("add", 2)
    wait_until(lambda: handle.query("n") == 2)
    worker.stop()
    other = dramatiq.Worker(second, worker_timeout=50, worker_threads=2)
    other.start()
    try:
        again = durable.get_handle(handle.workflow_id, broker=second)
        assert again.query("n", timeout=20) == 2
        again.signal("add", 3)
        again.signal("end")
        assert two is not None
        assert again.result(timeout=20) == 5
    finally:
        other.stop()


def test_a_workflow_that_never_awaits(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        return "at once"

    start_worker()
    handle = flow.start()
    assert handle.result(timeout=10) == "at once"
    assert [e.type for e in handle.history()] == ["WorkflowStarted", "WorkflowCompleted"]


def test_a_deterministic_log(start_worker: StartWorker, caplog: pytest.LogCaptureFixture) -> None:
    @durable.workflow
    async def flow() -> None:
        durable.logger.warning("first")
        await durable.sleep(0.01)
        durable.logger.warning("second")

    start_worker()
    with caplog.at_level("WARNING"):
        flow.start().result(timeout=10)
    messages = [r.getMessage() for r in caplog.records if r.getMessage() in ("first", "second")]
    assert messages == ["first", "second"]
