"""Task groups, timeouts, waiting for several, and cancels: one order, and the rules of the latest Python on all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable import errors
from dramatiq_durable.workflow import primitives
from tests.workflow.test_engine_asyncio import check
from tests.workflow.test_engine_support import Run, echo, ship


def timers(run: Run) -> list[int]:
    return [c.ms for c in run.commands if c.event_type == "TimerStarted"]  # type: ignore[attr-defined]


def fire_all(run: Run) -> None:
    """Fire the oldest open timer until the run closes."""
    while not run.execution.closed:
        timer = min(
            (c for c in run.open_commands() if c.event_type == "TimerStarted"),
            key=lambda c: (c.ms, c.seq),  # type: ignore[attr-defined]
        )
        assert timer.seq is not None
        run.fire(timer.seq)


# --- task groups ---------------------------------------------------------------------------------------


def test_a_group_gathers_the_failures_and_cancels_in_the_order_of_creation() -> None:
    async def wf() -> Any:
        order: list[int] = []

        async def child(i: int) -> None:
            try:
                await echo.execute(i)
            except asyncio.CancelledError:
                order.append(i)
                if i == 2:
                    raise ValueError("in cleanup") from None
                raise

        try:
            async with asyncio.TaskGroup() as group:
                for i in range(5):
                    group.create_task(child(i))
        except ExceptionGroup as e:
            me = asyncio.current_task()
            assert me is not None
            return [order, [str(each) for each in e.exceptions], me.cancelling()]

    run = Run(wf)
    run.fail(4)
    assert run.result == [[0, 1, 2, 4], ["ValueError: boom", "in cleanup"], 0]
    assert [c.seq for c in run.last[:-1]] == [1, 2, 3, 5]
    check(run)


def test_nested_groups_make_nested_exception_groups() -> None:
    async def wf() -> Any:
        async def inner(i: int) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(echo.execute(i))
                group.create_task(echo.execute(i + 1))

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(inner(0))
                group.create_task(inner(10))
        except BaseExceptionGroup as e:
            inside = e.exceptions[0]
            assert isinstance(inside, BaseExceptionGroup)
            return [len(e.exceptions), type(inside.exceptions[0]).__name__]

    run = Run(wf)
    run.fail(3)
    assert run.result == [1, "ActivityFailed"]
    assert [c.seq for c in run.last[:-1]] == [4, 1, 2]
    check(run)


def test_the_body_of_a_group_that_fails_cancels_the_children() -> None:
    async def wf() -> Any:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(echo.execute(1))
                await echo.execute(2)
                raise ValueError("the body")
        except ExceptionGroup as e:
            return str(e.exceptions[0])

    run = Run(wf)
    run.complete(2)
    assert run.result == "the body"
    assert run.types == ["ActivityCancelled", "WorkflowCompleted"]
    check(run)


def test_a_cancelled_group_passes_the_cancel_on() -> None:
    async def wf() -> Any:
        async with asyncio.TaskGroup() as group:
            group.create_task(echo.execute(1))
            group.create_task(echo.execute(2))

    run = Run(wf)
    run.cancel()
    assert run.types == ["ActivityCancelled", "ActivityCancelled", "WorkflowCancelled"]
    check(run)


def test_a_cancel_from_outside_while_a_group_fails_is_not_lost() -> None:
    async def wf() -> Any:
        async def stubborn() -> None:
            try:
                await echo.execute(1)
            except asyncio.CancelledError:
                await echo.execute("cleanup")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(stubborn())
                group.create_task(echo.execute(2))
        except* errors.ActivityFailed:
            pass
        try:
            await echo.execute("not done")
        except asyncio.CancelledError:
            return "cancelled"

    run = Run(wf)
    run.fail(2)
    run.cancel()
    run.complete(3)
    assert run.result == "cancelled"
    check(run)


def test_what_a_group_refuses() -> None:
    async def wf() -> Any:
        said = []
        group = asyncio.TaskGroup()
        with pytest.raises(RuntimeError, match="not been entered"):
            group.create_task(echo.execute(0))
        async with group:
            with pytest.raises(RuntimeError, match="before"):
                await group.__aenter__()
            group.create_task(echo.execute(1), name="named")
            said.append(sorted(t.get_name() for t in asyncio.all_tasks()))
        with pytest.raises(RuntimeError, match="finished"):
            group.create_task(echo.execute(2))
        with pytest.raises(errors.ForbiddenInWorkflow, match="eager"):
            asyncio.get_running_loop().create_task(echo.execute(3), eager_start=True)  # type: ignore[call-arg]
        return said

    assert Run(wf).finish().result == [["main", "named"]]


def test_groups_of_other_loops_and_derived_ones_are_what_they_were() -> None:
    class Mine(asyncio.TaskGroup):
        pass

    async def wf() -> Any:
        async with Mine() as group:
            assert type(group) is Mine
            one = group.create_task(echo.execute(1))
        async with asyncio.TaskGroup() as other:
            assert isinstance(other, asyncio.TaskGroup)
            assert type(other) is not asyncio.TaskGroup
        return one.result()

    async def outside() -> None:
        async with asyncio.TaskGroup() as group:
            assert type(group) is asyncio.TaskGroup
        assert type(asyncio.timeout(1)) is asyncio.Timeout
        assert await asyncio.wait_for(asyncio.sleep(0, "x"), 5) == "x"

    check(Run(wf).finish())
    asyncio.run(outside())


# --- timeouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer", "inner", "who"), [(1, 5, "outer"), (5, 1, "inner")])
def test_nested_timeouts(outer: float, inner: float, who: str) -> None:
    async def wf() -> Any:
        try:
            async with asyncio.timeout(outer) as a:
                try:
                    async with asyncio.timeout(inner) as b:
                        await echo.execute()
                except TimeoutError:
                    return ["inner", a.expired(), b.expired()]
        except TimeoutError:
            return ["outer", a.expired(), b.expired()]

    run = Run(wf)
    fire_all(run)
    assert run.result == [who, who == "outer", who == "inner"]
    check(run)


def test_a_timeout_around_a_group_that_fails_while_it_is_cancelled_leaves_no_cancel_behind() -> None:
    async def wf() -> Any:
        try:
            async with asyncio.timeout(1), asyncio.TaskGroup() as group:
                group.create_task(echo.execute(1))
                group.create_task(ship.execute("waits for its outcome"))
        except ExceptionGroup as e:
            failed = str(e.exceptions[0])
        me = asyncio.current_task()
        assert me is not None
        return [failed, await echo.execute("goes on"), me.cancelling()]

    run = Run(wf)
    run.fire(1)
    assert run.types == ["ActivityCancelled", "ChildCancelRequested"]
    run.send("ChildFailed", 3, attributes={"failure": {"type": "Oops", "message": "in cleanup"}})
    run.complete(4, "gone on")
    assert run.result == ["Oops: in cleanup", "gone on", 0]
    check(run)


def test_gathering_what_is_done_already() -> None:
    async def wf() -> Any:
        task = asyncio.create_task(echo.execute("a"))
        first = await asyncio.gather(task, task)
        gathered = asyncio.gather(task, return_exceptions=True)
        assert gathered.done()
        assert not gathered.cancel()
        failing = asyncio.create_task(echo.execute("b"))
        await asyncio.wait([failing])
        return [first, await gathered, await asyncio.gather(), str(asyncio.gather(failing).exception())]

    run = Run(wf)
    run.complete(1, "a")
    run.fail(2)
    assert run.result == [["a", "a"], ["a"], [], "ValueError: boom"]
    check(run)


def test_rescheduling_a_timeout() -> None:
    async def wf() -> Any:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(None) as scope:
                assert scope.when() is None
                scope.reschedule(loop.time() + 10)
                await asyncio.sleep(4)
                scope.reschedule(loop.time() + 3)
                await asyncio.sleep(60)
        except TimeoutError:
            pass
        with pytest.raises(RuntimeError):
            scope.reschedule(None)
        try:
            async with asyncio.timeout_at(loop.time() - 1):
                await asyncio.sleep(5)
        except TimeoutError:
            return [scope.expired(), round(loop.time() - began, 3)]

    run = Run(wf)
    run.now += 0
    run.send("TimerFired", 2, after_ms=4000)
    assert [c.event_type for c in run.last] == ["TimerCancelled", "TimerStarted", "TimerStarted"]
    run.send("TimerFired", 3, after_ms=3000)
    assert run.result == [True, 7.0]
    check(run)


def test_timeouts_work_in_the_cleanup_after_a_swallowed_cancel() -> None:
    async def wf() -> Any:
        done = []
        with contextlib.suppress(asyncio.CancelledError):
            await echo.execute()
        try:
            async with asyncio.timeout(1):
                await echo.execute("cleanup")
        except TimeoutError:
            done.append("timeout")
        try:
            await asyncio.wait_for(echo.execute("cleanup"), 1)
        except TimeoutError:
            done.append("wait_for")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(echo.execute("fails"))
        except* errors.ActivityFailed:
            done.append("group")
        return done

    run = Run(wf)
    run.cancel()
    for _ in range(2):
        timer = next(c for c in run.last if c.event_type == "TimerStarted")
        assert timer.seq is not None
        run.fire(timer.seq)
    failing = run.last[-1].seq
    assert failing is not None
    run.fail(failing)
    assert run.result == ["timeout", "wait_for", "group"]
    check(run)


def test_a_second_cancel_after_a_swallowed_one_is_delivered_again() -> None:
    async def wf() -> Any:
        caught = []
        for _ in range(2):
            try:
                await echo.execute()
            except asyncio.CancelledError:
                caught.append(asyncio.current_task().cancelling())  # type: ignore[union-attr]
        asyncio.current_task().uncancel()  # type: ignore[union-attr]
        return [*caught, asyncio.current_task().cancelling()]  # type: ignore[union-attr]

    run = Run(wf)
    run.cancel()
    run.cancel()
    assert run.result == [1, 2, 1]
    check(run)


def test_wait_for_with_no_time_and_for_ever() -> None:
    async def value() -> str:
        return "there"

    async def wf() -> Any:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        ready.set_result("ready")
        answers = [await asyncio.wait_for(ready, 0), await asyncio.wait_for(value(), None)]
        for timeout in (0, -1):
            try:
                await asyncio.wait_for(value(), timeout)
            except TimeoutError:
                answers.append("late")
        return answers

    run = Run(wf)
    assert run.result == ["ready", "there", "late", "late"]
    assert run.types == ["WorkflowCompleted"]


def test_wait_for_passes_a_cancel_on_and_tells_it_from_its_timeout() -> None:
    async def wf() -> Any:
        await asyncio.wait_for(echo.execute(), 5)

    run = Run(wf)
    run.cancel()
    assert run.types == ["ActivityCancelled", "TimerCancelled", "WorkflowCancelled"]
    check(run)


# --- waiting for several -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("return_when", "answered", "done"),
    [
        (asyncio.FIRST_COMPLETED, [3], [2]),
        (asyncio.FIRST_EXCEPTION, [3, -2], [1, 2]),
        (asyncio.ALL_COMPLETED, [3, -2, 1, 4], [0, 1, 2, 3]),
    ],
)
def test_wait(return_when: str, answered: list[int], done: list[int]) -> None:
    async def wf() -> Any:
        tasks = [asyncio.create_task(echo.execute(i)) for i in range(4)]
        finished, pending = await asyncio.wait(reversed(tasks), return_when=return_when)
        assert finished | pending == set(tasks)
        assert [t for t in finished if t in pending] == []
        return [[tasks.index(t) for t in finished], [tasks.index(t) for t in pending]]

    run = Run(wf)
    for seq in answered:
        assert not run.execution.closed
        if seq < 0:
            run.fail(-seq)
        else:
            run.complete(seq)
    assert run.result == [done[::-1], [i for i in (3, 2, 1, 0) if i not in done]]
    check(run)


def test_wait_takes_calls_and_handles_and_refuses_coroutines() -> None:
    async def wf() -> Any:
        bare: Any = coroutine()
        calls: list[Any] = [echo.execute(0), echo.start(1), ship.start("o")]
        done, pending = await asyncio.wait(calls, timeout=10)
        with pytest.raises(TypeError):
            await asyncio.wait([bare])
        bare.close()
        with pytest.raises(ValueError):
            await asyncio.wait([])
        with pytest.raises(TypeError):
            await asyncio.wait(calls[0])
        return [[calls.index(c) for c in done], [calls.index(c) for c in pending]]

    async def coroutine() -> None: ...

    run = Run(wf)
    run.complete(2)
    run.fire(4)
    assert run.result == [[1], [0, 2]]


def test_the_sets_of_wait_keep_their_order_whatever_is_done_with_them() -> None:
    async def wf() -> Any:
        tasks = [asyncio.create_task(echo.execute(i)) for i in range(30)]
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = pending.pop()
        assert first is tasks[0]
        rest = pending - {tasks[3]} | {tasks[0]}
        copied = pending.copy() & set(tasks)
        return [[tasks.index(t) for t in rest], [tasks.index(t) for t in copied]]

    run = Run(wf)
    run.complete(30)
    expected = [i for i in range(1, 29) if i != 3]
    assert run.result == [[*expected, 0], list(range(1, 29))]


def test_a_cancelled_wait_leaves_its_tasks_alone() -> None:
    async def wf() -> Any:
        task = asyncio.create_task(echo.execute(1))
        try:
            async with asyncio.timeout(1):
                await asyncio.wait([task], timeout=7)
        except TimeoutError:
            return await task

    run = Run(wf)
    run.fire(2)
    assert run.types == ["TimerCancelled"]
    run.complete(1, "whole")
    assert run.result == "whole"
    check(run)


def test_as_completed_as_an_asynchronous_iterator() -> None:
    async def bare() -> Any:
        return await echo.execute("bare")

    async def wf() -> Any:
        named = {asyncio.create_task(echo.execute(i)): i for i in range(3)}
        seen = []
        async for task in asyncio.as_completed([*named, bare()]):
            seen.append([named.get(task, "bare"), await task])
        return seen

    run = Run(wf)
    for seq in (2, 4, 1, 3):
        run.complete(seq, seq * 10)
    assert run.result == [[1, 20], ["bare", 40], [0, 10], [2, 30]]
    check(run)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_as_completed_with_a_timeout(asynchronous: bool) -> None:
    async def wf() -> Any:
        seen: list[Any] = []
        calls = [echo.execute(0), echo.execute(1)]
        try:
            if asynchronous:
                async for call in asyncio.as_completed(calls, timeout=5):
                    seen.append(await call)
            else:
                for call in asyncio.as_completed(calls, timeout=5):
                    seen.append(await call)
        except TimeoutError:
            seen.append("late")
        return seen

    run = Run(wf)
    run.complete(2, "one")
    run.fire(3)
    assert run.result == ["one", "late"]
    check(run)


def test_gather_cancels_in_order_and_keeps_exceptions() -> None:
    async def wf() -> Any:
        gathered = asyncio.gather(*(echo.execute(i) for i in range(4)), return_exceptions=True)
        results = await gathered
        try:
            async with asyncio.timeout(3):
                await asyncio.gather(*(echo.execute(i) for i in range(3)))
        except TimeoutError:
            return [type(r).__name__ for r in results]

    run = Run(wf)
    run.fail(2)
    for seq in (1, 3, 4):
        run.complete(seq, seq)
    run.fire(next(c.seq for c in run.last if c.event_type == "TimerStarted"))  # type: ignore[arg-type]
    assert [c.name for c in run.last[:-1]] == ["echo"] * 3
    assert [c.seq for c in run.last[:-1]] == sorted(c.seq for c in run.last[:-1])  # type: ignore[type-var]
    assert run.result == ["int", "ActivityFailed", "int", "int"]
    check(run)


def test_queues_barriers_and_semaphores_are_fair() -> None:
    async def wf() -> Any:
        seen: list[Any] = []
        barrier = asyncio.Barrier(3)
        semaphore = asyncio.BoundedSemaphore(2)
        condition = asyncio.Condition()
        queue: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        stack: asyncio.LifoQueue[int] = asyncio.LifoQueue()

        async def worker(i: int) -> None:
            await echo.execute(i)
            queue.put_nowait(-i)
            stack.put_nowait(i)
            await barrier.wait()
            async with semaphore:
                seen.append(("in", i))
                await asyncio.sleep(1)
            async with condition:
                await condition.wait_for(lambda: len(seen) >= 4)
                seen.append(("out", i))

        async with asyncio.TaskGroup() as group:
            for i in range(3):
                group.create_task(worker(i))
            while len([s for s in seen if s[0] == "in"]) < 3:  # noqa: ASYNC110
                await asyncio.sleep(2)
            await asyncio.sleep(2)
            async with condition:
                seen.append(("go", 0))
                condition.notify_all()
        with pytest.raises(ValueError):
            semaphore.release()
        return [seen, [await queue.get() for _ in range(3)], [await stack.get() for _ in range(3)]]

    run = Run(wf).finish()
    assert run.result == [
        [["in", 2], ["in", 0], ["in", 1], ["go", 0], ["out", 2], ["out", 0], ["out", 1]],
        [-2, -1, 0],
        [2, 1, 0],
    ]
    check(run)


def test_call_later_call_at_and_the_loops_clock() -> None:
    async def wf() -> Any:
        loop = asyncio.get_running_loop()
        seen: list[Any] = []
        began = loop.time()
        loop.call_later(2, seen.append, "later")
        dropped = loop.call_at(loop.time() + 3, seen.append, "dropped")
        assert dropped.when() == began + 3
        loop.call_soon(seen.append, "soon")
        await asyncio.sleep(0)
        dropped.cancel()
        await asyncio.sleep(5)
        return [seen, round(loop.time() - began), [t.get_name() for t in asyncio.all_tasks()]]

    run = Run(wf)
    assert timers(run) == [2000, 5000]
    run.send("TimerFired", 1, after_ms=2000)
    run.send("TimerFired", 3, after_ms=3000)
    assert run.result == [["soon", "later"], 5, ["main"]]
    check(run)


def test_all_tasks_are_those_of_the_run_oldest_first() -> None:
    async def wf() -> Any:
        tasks = [asyncio.create_task(echo.execute(i), name=f"t{i}") for i in range(20)]
        del tasks[5:15]
        await asyncio.sleep(0)
        return [t.get_name() for t in asyncio.all_tasks()]

    other = Run(wf, run_id="another", start=False)
    assert Run(wf).result == ["main", *(f"t{i}" for i in range(20))]
    other.execution.evict()


def test_futures_that_another_thread_resolves_are_refused() -> None:
    import threading

    futures: list[asyncio.Future[Any]] = []
    errors_there: list[BaseException] = []

    async def wf() -> Any:
        future = asyncio.get_running_loop().create_future()
        futures.append(future)
        await future

    def elsewhere() -> None:
        for attempt in (
            lambda: futures[0].get_loop().call_soon_threadsafe(print),
            lambda: futures[0].set_result(1),
        ):
            try:
                attempt()
            except errors.ForbiddenInWorkflow as e:
                errors_there.append(e)

    run = Run(wf)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(errors_there) == 2
    assert all("signal" in str(e) for e in errors_there)
    run.execution.evict()


# --- cancels -------------------------------------------------------------------------------------------


def test_a_cancel_is_held_back_until_an_uncancellable_block_ends() -> None:
    async def wf() -> Any:
        seen = []
        try:
            async with durable.uncancellable():
                seen.append(await echo.execute("a"))
                seen.append(await asyncio.gather(echo.execute("b"), echo.execute("c")))
            seen.append("not reached")
        except asyncio.CancelledError:
            seen.append(asyncio.current_task().cancelling())  # type: ignore[union-attr]
        return seen

    run = Run(wf)
    run.cancel()
    assert run.types == []
    run.finish()
    assert run.result == ["a", ["b", "c"], 1]
    assert "ActivityCancelled" not in [c.event_type for c in run.commands]
    check(run)


def test_timeouts_inside_an_uncancellable_block_work_and_those_around_it_wait() -> None:
    async def wf() -> Any:
        seen = []
        try:
            async with asyncio.timeout(1):
                async with durable.uncancellable():
                    try:
                        async with asyncio.timeout(5):
                            await echo.execute("too slow")
                    except TimeoutError:
                        seen.append("inside")
                    try:
                        async with asyncio.TaskGroup() as group:
                            group.create_task(echo.execute("fails"))
                            await echo.execute("is cancelled")
                    except* errors.ActivityFailed:
                        seen.append("group")
                    await echo.execute("last")
                seen.append("not reached")
        except TimeoutError:
            seen.append("around")
        return [seen, asyncio.current_task().cancelling()]  # type: ignore[union-attr]

    run = Run(wf)
    run.fire(1)
    assert run.types == []
    run.fire(2)
    run.fail(next(c.seq for c in run.last if getattr(c, "args", ()) == ("fails",)))  # type: ignore[arg-type]
    run.finish()
    assert run.result == [["inside", "group", "around"], 0]
    check(run)


def test_nested_uncancellable_blocks_end_one_by_one() -> None:
    async def wf() -> Any:
        seen = []
        try:
            async with durable.uncancellable():
                async with asyncio.timeout(1):
                    async with durable.uncancellable():
                        await echo.execute("a")
                        seen.append("a")
                    seen.append("not reached")
        except TimeoutError:
            seen.append("timeout")
        try:
            await echo.execute("b")
        except asyncio.CancelledError:
            seen.append("cancelled")
        return seen

    run = Run(wf)
    run.fire(1)
    run.complete(2)
    assert run.types == ["ActivityScheduled"]
    run.cancel()
    assert run.result == ["a", "timeout", "cancelled"]
    check(run)


def test_an_uncancellable_block_in_a_task_that_its_group_cancels() -> None:
    async def wf() -> Any:
        seen: list[Any] = []

        async def careful() -> None:
            async with durable.uncancellable():
                await echo.execute("begin")
                seen.append(await echo.execute("end"))
            seen.append("not reached")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(careful())
                group.create_task(echo.execute("fails"))
        except* errors.ActivityFailed:
            pass
        return seen

    run = Run(wf)
    run.fail(1)
    assert run.types == []
    run.finish()
    assert run.result == ["end"]
    check(run)


def test_an_uncancellable_block_that_fails_with_a_cancel_waiting_ends_cancelled() -> None:
    async def wf() -> Any:
        async with durable.uncancellable():
            await echo.execute()
            raise ValueError("of the block")

    run = Run(wf)
    run.cancel()
    run.complete(1)
    assert run.types == ["WorkflowCancelled"]
    check(run)
    run = Run(wf)
    run.complete(1)
    assert run.failure["message"] == "of the block"


def test_uncancellable_outside_of_a_workflow_says_so() -> None:
    async def outside() -> None:
        async with durable.uncancellable():
            pass

    with pytest.raises(errors.NotInWorkflow, match="shield"):
        asyncio.run(outside())


def test_a_shielded_task_goes_on_when_its_waiter_is_cancelled() -> None:
    async def wf() -> Any:
        async def cleanup() -> str:
            await echo.execute("x")
            return "clean"

        task = asyncio.create_task(cleanup())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            return await task

    run = Run(wf)
    run.cancel()
    assert run.types == []
    run.complete(1)
    assert run.result == "clean"
    check(run)


@pytest.mark.parametrize("make", [lambda: echo.execute(1), lambda: asyncio.sleep(5), lambda: primitives.sleep(5)])
def test_a_cancel_while_the_result_is_already_there(make: Callable[[], Any]) -> None:
    """The task has been resolved, and is cancelled before it could take the result: asyncio lets the cancel win."""

    async def wf() -> Any:
        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def waits() -> str:
            try:
                return await gate
            except asyncio.CancelledError:
                return "the cancel"

        task = asyncio.create_task(waits())
        await make()
        gate.set_result("the result")
        task.cancel()
        return [gate.result(), await task]

    run = Run(wf).finish()
    assert run.result == ["the result", "the cancel"]
    check(run)


def test_several_conditions_hold_when_their_waiters_go_on() -> None:
    async def wf() -> Any:
        free, order = [True], []

        async def worker(i: int) -> None:
            await durable.wait_condition(lambda: free[0])
            assert free[0]
            free[0] = False
            order.append(i)
            await echo.execute(i)
            free[0] = True

        free[0] = False
        async with asyncio.TaskGroup() as group:
            for i in range(4):
                group.create_task(worker(i))
            await asyncio.sleep(1)
            free[0] = True
        return order

    run = Run(wf).finish()
    assert run.result == [0, 1, 2, 3]
    check(run)
