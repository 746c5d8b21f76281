"""Plain asyncio works inside a workflow, and does the same on replay."""

from __future__ import annotations

import asyncio
import contextvars
import math
from typing import Any

import pytest

from dramatiq_durable import errors
from dramatiq_durable.workflow import primitives as durable
from tests.workflow.test_engine_support import Run, charge, echo, ship


def check(run: Run) -> Run:
    execution = run.replayed()
    assert execution.closed
    assert execution.last_event_id == len(run.history) == run.execution.last_event_id
    assert [e.event_id for e in run.history] == list(range(1, len(run.history) + 1))
    return run


def test_gather_issues_everything_in_one_step() -> None:
    async def wf() -> Any:
        return await asyncio.gather(echo.execute(1), echo.execute(2), charge.execute("o", 3))

    run = Run(wf)
    assert [(c.event_type, c.seq, c.name) for c in run.last] == [
        ("ActivityScheduled", 1, "echo"),
        ("ActivityScheduled", 2, "echo"),
        ("ActivityScheduled", 3, "charge"),
    ]
    run.complete(2, "b")
    run.complete(3, "c")
    run.complete(1, "a")
    assert run.result == ["a", "b", "c"]
    check(run)


def test_sleep_is_a_timer_in_whole_milliseconds() -> None:
    async def wf() -> Any:
        loop = asyncio.get_running_loop()
        before = loop.time()
        await asyncio.sleep(30)
        await asyncio.sleep(0.0001)
        await asyncio.sleep(0)
        async with asyncio.timeout(2.5):
            await asyncio.sleep(1)
        return loop.time() - before

    run = Run(wf).finish()
    assert [c.attributes() for c in run.commands if c.event_type == "TimerStarted"] == [
        {"ms": 30_000},
        {"ms": 1},
        {"ms": 2_500},
        {"ms": 1_000},
    ]
    check(run)


@pytest.mark.parametrize("seconds", [0.1, 0.25, 1, 7, 30, 3600, 86400 * 30, 1.001, 2.003])
def test_timeouts_are_exact_in_spite_of_floats(seconds: float) -> None:
    async def wf() -> None:
        async with asyncio.timeout(seconds):
            await echo.execute()

    for start in range(0, 5000, 137):
        run = Run(wf, start=False)
        run.now += start
        run.send("WorkflowStarted", payload=b'{"args":[],"kwargs":{}}')
        timer = next(c for c in run.last if c.event_type == "TimerStarted")
        assert timer.attributes() == {"ms": round(seconds * 1000)}


@pytest.mark.parametrize("seconds", [math.inf, 1e12])
def test_a_sleep_for_ever_is_no_timer(seconds: float) -> None:
    async def wf() -> Any:
        try:
            async with asyncio.timeout(5):
                await asyncio.sleep(seconds)
        except TimeoutError:
            with pytest.raises(ValueError):
                await asyncio.sleep(math.nan)
            return "woken"

    run = Run(wf)
    assert [c.attributes() for c in run.last] == [{"ms": 5000}]
    run.fire(1)
    assert run.result == "woken"
    check(run)


def test_wait_for_cancels_the_activity_on_timeout() -> None:
    async def wf() -> Any:
        try:
            return await asyncio.wait_for(echo.execute("x"), timeout=5)
        except TimeoutError:
            return "late"

    run = Run(wf)
    timer = next(c for c in run.last if c.event_type == "TimerStarted")
    assert timer.seq is not None
    run.fire(timer.seq)
    assert run.types == ["ActivityCancelled", "WorkflowCompleted"]
    assert run.result == "late"
    check(run)

    run = Run(wf)
    activity = next(c for c in run.last if c.event_type == "ActivityScheduled")
    assert activity.seq is not None
    run.complete(activity.seq, "in time")
    assert run.types == ["TimerCancelled", "WorkflowCompleted"]
    assert run.result == "in time"
    check(run)


def test_timeout_of_zero_leaves_no_trace() -> None:
    async def wf() -> Any:
        try:
            async with asyncio.timeout(0):
                await echo.execute("x")
        except TimeoutError:
            return "none"

    run = Run(wf)
    assert run.types == ["WorkflowCompleted"]
    check(run)


def test_queue_event_lock_semaphore_condition() -> None:
    async def wf() -> Any:
        queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
        done, lock, semaphore = asyncio.Event(), asyncio.Lock(), asyncio.Semaphore(2)
        seen: list[Any] = []

        async def produce() -> None:
            for i in range(3):
                await queue.put(await echo.execute(i))
            done.set()

        async def consume() -> None:
            for _ in range(3):
                item = await queue.get()
                async with lock, semaphore:
                    seen.append(await echo.execute(item * 10))

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            group.create_task(consume())
        await done.wait()
        condition = asyncio.Condition()
        async with condition:
            condition.notify_all()
        return seen

    run = Run(wf).finish()
    assert run.result == [0, 10, 20]
    check(run)


def test_wait_shield_and_as_completed() -> None:
    async def wf() -> Any:
        tasks = [asyncio.create_task(echo.execute(i)) for i in range(4)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = [t.result() for t in done]
        rest = [await f for f in asyncio.as_completed(pending)]
        handle = echo.start("shielded")
        shielded = asyncio.ensure_future(asyncio.shield(handle))
        await asyncio.sleep(0)
        shielded.cancel()
        return [first, rest, await handle]

    run = Run(wf)
    for seq in (3, 1, 4, 2):
        run.complete(seq, seq)
    run.finish()
    assert run.result == [[3], [1, 4, 2], "shielded"]
    assert "ActivityCancelled" not in [c.event_type for c in run.commands]
    check(run)


def test_as_completed_over_bare_coroutines_keeps_their_order() -> None:
    async def helper(i: int) -> Any:
        return await echo.execute(i)

    async def wf() -> Any:
        return [await f for f in asyncio.as_completed([helper(i) for i in range(20)])]

    for _ in range(20):
        run = Run(wf)
        assert [c.args for c in run.last] == [(i,) for i in range(20)]  # type: ignore[attr-defined]
        run.finish()
        assert run.result == list(range(20))
    check(run)


def test_as_completed_over_a_set_of_coroutines_is_refused() -> None:
    async def helper(i: int) -> Any:
        return await echo.execute(i)

    async def wf() -> None:
        for f in asyncio.as_completed({helper(0), helper(1)}):
            await f

    run = Run(wf)
    assert run.failure["type"] == "ForbiddenInWorkflow"
    assert "list" in run.failure["message"]


def test_a_task_group_cancels_in_one_order_200_times() -> None:
    async def wf() -> Any:
        order: list[int] = []

        async def child(i: int) -> None:
            try:
                await echo.execute(i)
            except asyncio.CancelledError:
                order.append(i)
                raise

        try:
            async with asyncio.TaskGroup() as group:
                for i in range(12):
                    group.create_task(child(i))
        except* errors.ActivityFailed:
            pass
        return order

    seen = set()
    for _ in range(200):
        run = Run(wf)
        run.fail(5)
        seen.add((tuple(run.result), tuple(c.seq for c in run.last)))
    assert len(seen) == 1
    assert sorted(run.result) == [i for i in range(12) if i != 4]
    check(run)


def test_create_task_of_a_call_and_cancel_before_its_first_step() -> None:
    async def wf() -> Any:
        task = asyncio.create_task(echo.execute(1))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"

    run = Run(wf)
    assert run.types == ["WorkflowCompleted"]
    assert run.result == "cancelled"


def test_cancelling_later_tells_the_activity_once() -> None:
    async def wf() -> Any:
        task = asyncio.create_task(echo.execute(1))
        await echo.execute(2)
        task.cancel()
        task.cancel()
        return [type(r).__name__ for r in await asyncio.gather(task, return_exceptions=True)]

    run = Run(wf)
    run.complete(2)
    assert [(c.event_type, c.seq, c.name) for c in run.last][:-1] == [("ActivityCancelled", 1, "echo")]
    assert run.result == ["CancelledError"]
    assert run.complete(1) == []
    check(run)


@pytest.mark.parametrize(
    ("policy", "commands"),
    [("try", ["ActivityCancelled"]), ("abandon", []), ("wait", ["ActivityCancelRequested"])],
)
def test_cancellation_policies_of_activities(policy: Any, commands: list[str]) -> None:
    async def wf() -> Any:
        call = echo.options(cancellation=policy).start(1)
        await echo.execute(2)
        assert call.cancel()
        try:
            return await call
        except asyncio.CancelledError:
            return "cancelled"

    run = Run(wf)
    run.complete(2)
    if policy == "wait":
        assert run.types == commands
        run.fail(1, type="ActivityCancelled")
        assert run.result == "cancelled"
    else:
        assert run.types == [*commands, "WorkflowCompleted"]
        assert run.result == "cancelled"
    check(run)


def test_a_cancelled_await_of_a_child_waits_for_its_outcome() -> None:
    async def wf() -> Any:
        try:
            async with asyncio.timeout(5):
                await ship.execute("o")
        except TimeoutError:
            return "late"

    run = Run(wf)
    timer = next(c for c in run.last if c.event_type == "TimerStarted")
    child = next(c for c in run.last if c.event_type == "ChildStarted")
    assert timer.seq is not None
    run.fire(timer.seq)
    assert run.types == ["ChildCancelRequested"]
    run.send("ChildCancelled", child.seq)
    assert run.result == "late"
    check(run)


def test_a_cancelled_task_of_a_child_call_waits_even_before_its_first_step() -> None:
    async def wf() -> Any:
        call = ship.execute("o")
        await echo.execute()
        task = asyncio.create_task(call)
        task.cancel()
        return await task

    run = Run(wf)
    run.complete(2)
    assert run.types == ["ChildCancelRequested"]
    run.send("ChildCompleted", 1, payload=b'"done all the same"')
    assert run.result == "done all the same"
    check(run)


def test_contextvars_belong_to_tasks() -> None:
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="none")

    async def wf() -> Any:
        async def child(name: str) -> str:
            var.set(name)
            await echo.execute()
            return var.get()

        inside = var.get()
        names = await asyncio.gather(child("a"), child("b"))
        return [inside, *names, var.get()]

    var.set("the caller's")
    run = Run(wf).finish()
    assert run.result == ["none", "a", "b", "none"]


def test_wait_condition_and_signals() -> None:
    async def wf() -> Any:
        seen: list[Any] = []

        async def collect() -> None:
            while True:
                seen.append(await durable.wait_for_signal("item"))

        task = asyncio.create_task(collect())
        await durable.wait_condition(lambda: len(seen) == 3)
        task.cancel()
        try:
            await durable.wait_for_signal("never", timeout="1h 30m")
        except TimeoutError as e:
            return [seen, type(e).__name__, str(e)]

    run = Run(wf)
    for i in range(3):
        run.signal("item", i)
    assert run.types == ["TimerStarted"]
    run.finish()
    assert run.result == [[0, 1, 2], "Timeout", "the signal 'never' did not come within 5400 s."]
    check(run)


def test_signals_are_buffered_in_order_and_not_lost_to_a_cancelled_waiter() -> None:
    async def wf() -> Any:
        await echo.execute()
        first = await durable.wait_for_signal("s", timeout=10)  # is there already: no timer
        waiter = asyncio.create_task(durable.wait_for_signal("s"))
        second = await waiter
        waiter = asyncio.create_task(durable.wait_for_signal("s"))
        other = asyncio.create_task(durable.wait_for_signal("go"))
        await other
        waiter.cancel()
        return [first, second, await durable.wait_for_signal("s")]

    run = Run(wf)
    run.signal("s", 1)
    run.signal("s", 2)
    run.complete(1)
    run.signal("go")
    run.signal("s", 3)
    assert run.result == [1, 2, 3]
    assert "TimerStarted" not in [c.event_type for c in run.commands]
    check(run)


def test_stepping_inside_a_running_loop_and_from_threads() -> None:
    import threading

    async def wf() -> Any:
        a = await echo.execute(1)
        b = await asyncio.gather(echo.execute(2), echo.execute(3))
        return [a, *b]

    async def outside() -> Run:
        run = Run(wf)
        me = asyncio.current_task()
        await asyncio.sleep(0)
        run.complete(1, 1)
        assert asyncio.current_task() is me
        assert asyncio.get_running_loop() is not run.execution.loop
        return run

    run = asyncio.run(outside())
    for seq in (2, 3):
        thread = threading.Thread(target=run.complete, args=(seq, seq))
        thread.start()
        thread.join()
    assert run.result == [1, 2, 3]
    check(run)


def test_an_asynchronous_generator_left_early_is_closed() -> None:
    async def wf() -> Any:
        log: list[str] = []

        async def numbers() -> Any:
            try:
                for i in range(10):
                    yield await echo.execute(i)
            finally:
                log.append(await echo.execute("closed"))

        async for n in numbers():
            if n == 1:
                break
        await echo.execute("after")
        await asyncio.sleep(1)
        return log

    run = Run(wf).finish()
    assert run.result == ["closed"]
    check(run)


def test_a_runaway_loop_is_stopped() -> None:
    async def wf() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    run = Run(wf, start=False, max_handles=1000)
    with pytest.raises(errors.RunawayWorkflow, match="sleep"):
        run.send("WorkflowStarted")
    run.execution.evict()


def test_sets_of_tasks_have_one_order_in_a_run() -> None:
    async def wf() -> Any:
        tasks = {asyncio.create_task(echo.execute(i)) for i in range(40)}
        assert len(tasks) == 40
        return [await task for task in tasks]

    run = Run(wf).finish()
    assert sorted(run.result) == list(range(40))
    for _ in range(20):
        ballast = [object() for _ in range(7)]
        assert Run(wf).finish().result == run.result
        del ballast
