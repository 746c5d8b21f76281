"""asyncio inside workflows, on a real database: what code that knows nothing of durability expects."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]


def run_it(start_worker: StartWorker, body: Callable[[], Any], *signals: str) -> Any:
    flow = durable.workflow(name="flow")(body)
    start_worker()
    handle = flow.start()
    for name in signals:
        handle.signal(name)
    result = handle.result(timeout=15)
    durable_types = [e.type for e in handle.history()]
    assert durable_types[-1] == "WorkflowCompleted"
    # The history replays.
    from dramatiq_durable.testing import Replayer

    Replayer([flow]).replay(handle.export())
    return result


def test_events_and_queues_between_tasks(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=2)
        found: list[int] = []
        done = asyncio.Event()

        async def produce() -> None:
            for n in range(6):
                await queue.put(n)
                await asyncio.sleep(0.001)
            done.set()

        async def consume() -> None:
            while True:
                found.append(await queue.get())
                queue.task_done()

        consumer = asyncio.create_task(consume())
        await produce()
        await queue.join()
        consumer.cancel()
        try:
            await consumer
        except asyncio.CancelledError:
            found.append(-1)
        return [found, done.is_set(), consumer.cancelled(), queue.empty()]

    assert run_it(start_worker, body) == [[0, 1, 2, 3, 4, 5, -1], True, True, True]


def test_priority_and_lifo_queues_and_conditions(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        p: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        s: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for n in (3, 1, 2):
            p.put_nowait(n)
            s.put_nowait(n)
        out = [[await p.get() for _ in range(3)], [await s.get() for _ in range(3)]]
        condition = asyncio.Condition()
        seen = []

        async def wait(n: int) -> None:
            async with condition:
                await condition.wait()
                seen.append(n)

        tasks = [asyncio.create_task(wait(n)) for n in range(3)]
        await asyncio.sleep(0)
        async with condition:
            condition.notify(2)
        await asyncio.sleep(0.001)
        first = list(seen)
        async with condition:
            condition.notify_all()
        await asyncio.gather(*tasks)
        return [*out, first, seen]

    assert run_it(start_worker, body) == [[1, 2, 3], [2, 1, 3], [0, 1], [0, 1, 2]]


def test_the_clocks_agree(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        loop = asyncio.get_running_loop()
        began, at = loop.time(), durable.now()
        await asyncio.sleep(1)
        passed, after = loop.time() - began, durable.now()
        return [0.9 < passed < 3, timedelta(seconds=0.9) < after - at < timedelta(seconds=3), at.tzinfo == UTC]

    assert run_it(start_worker, body) == [True, True, True]


def test_timeouts_in_every_form(start_worker: StartWorker) -> None:
    async def body() -> list[str]:
        found = []
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        except TimeoutError as e:
            found.append(type(e).__name__)
        try:
            async with asyncio.timeout(0.01) as t:
                await asyncio.Event().wait()
        except TimeoutError:
            found.append(f"timeout {t.expired()}")
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + 0.01):
                await asyncio.Future()
        except TimeoutError:
            found.append("timeout_at")
        try:
            await durable.wait_for_signal("never", timeout=0.01)
        except durable.Timeout:
            found.append("signal")
        try:
            await durable.wait_condition(lambda: False, timeout="10ms")
        except durable.Timeout:
            found.append("condition")
        async with asyncio.timeout(None):
            await durable.sleep(0)
            found.append("none")
        try:
            async with asyncio.timeout(60):
                async with asyncio.timeout(0.01):
                    await durable.sleep(30)
        except TimeoutError:
            found.append("inner")
        found.append(await asyncio.wait_for(asyncio.sleep(0.001, "slept"), 5))
        try:
            await asyncio.wait_for(asyncio.sleep(1), 0)
        except TimeoutError:
            found.append("zero")
        return found

    assert run_it(start_worker, body) == [
        "TimeoutError",
        "timeout True",
        "timeout_at",
        "signal",
        "condition",
        "none",
        "inner",
        "slept",
        "zero",
    ]


def test_durations_as_seconds_timedelta_and_text(start_worker: StartWorker) -> None:
    async def body() -> int:
        await durable.sleep(0)
        await durable.sleep(0.01)
        await durable.sleep(timedelta(milliseconds=10))
        await durable.sleep("10 ms")
        await durable.sleep("0.01 seconds")
        await asyncio.sleep(0.01)
        return 1

    assert run_it(start_worker, body) == 1


def test_a_timer_that_is_cancelled(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        timer = asyncio.create_task(durable.sleep("1 day"))
        await asyncio.sleep(0)
        timer.cancel()
        try:
            await timer
        except asyncio.CancelledError:
            return "cancelled"
        return "?"

    start_worker()
    handle = flow.start()
    assert handle.result(timeout=10) == "cancelled"
    types = [e.type for e in handle.history()]
    # Within one step nobody has seen the timer.
    assert types in (
        ["WorkflowStarted", "TimerStarted", "TimerCancelled", "WorkflowCompleted"],
        ["WorkflowStarted", "WorkflowCompleted"],
    )


def test_first_completed_and_as_completed(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        async def after(seconds: float, value: str) -> str:
            await asyncio.sleep(seconds)
            return value

        slow = asyncio.create_task(after(60, "slow"))
        fast = asyncio.create_task(after(0.01, "fast"))
        done, pending = await asyncio.wait([slow, fast], return_when=asyncio.FIRST_COMPLETED)
        out: list[Any] = [[t.result() for t in done], len(pending)]
        slow.cancel()
        done, pending = await asyncio.wait([slow], timeout=1)
        out.append([slow.cancelled(), len(pending)])
        done, pending = await asyncio.wait({asyncio.create_task(after(60, "x"))}, timeout=0.01)
        out.append([len(done), len(pending)])
        for t in pending:
            t.cancel()
        out.append([await each for each in asyncio.as_completed([after(0.05, "b"), after(0.01, "a")])])
        boom = asyncio.create_task(after(60, "y"))

        async def fail() -> None:
            raise ValueError("now")

        done, pending = await asyncio.wait([boom, asyncio.create_task(fail())], return_when=asyncio.FIRST_EXCEPTION)
        out.append([str(t.exception()) for t in done])
        boom.cancel()
        return out

    assert run_it(start_worker, body) == [["fast"], 1, [True, 0], [0, 1], ["a", "b"], ["now"]]


def test_task_groups_of_activities_and_timers(start_worker: StartWorker) -> None:
    @durable.activity
    def double(n: int) -> int:
        return 2 * n

    async def body() -> list[Any]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(double.execute(n)) for n in range(4)]
            group.create_task(asyncio.sleep(0.01))
        out: list[Any] = [[t.result() for t in tasks]]

        async def fail() -> None:
            await asyncio.sleep(0.01)
            raise KeyError("k")

        left: list[str] = []

        async def wait(name: str) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                left.append(name)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(wait("a"))
                group.create_task(fail())
                group.create_task(wait("b"))
        except* KeyError as es:
            out.append(len(es.exceptions))
        out.append(left)
        return out

    assert run_it(start_worker, body) == [[0, 2, 4, 6], 1, ["a", "b"]]


def test_a_cancel_from_outside_inside_nested_blocks(start_worker: StartWorker) -> None:
    @durable.activity
    def clean(what: str) -> str:
        return what

    @durable.workflow
    async def flow() -> None:
        try:
            async with asyncio.timeout(3600):
                async with asyncio.TaskGroup() as group:
                    group.create_task(durable.sleep("1 h"))
                    await durable.wait_for_signal("never")
        finally:
            await clean.execute("cleaned")

    start_worker()
    handle = flow.start()
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    types = [e.type for e in handle.history()]
    assert "ActivityCompleted" in types
    assert types[-1] == "WorkflowCancelled"
    assert handle.status() == "cancelled"


def test_shielded_work_survives_a_cancel(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        async def work() -> str:
            await durable.wait_for_signal("go")
            return "worked"

        task = asyncio.create_task(work())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            return f"{await task} in spite"

    start_worker()
    handle = flow.start()
    handle.cancel()
    # Signals are given before a cancel that waits beside them.
    wait_until(lambda: any(event.type == "CancelRequested" for event in handle.history()))
    handle.signal("go")
    assert handle.result(timeout=10) == "worked in spite"
    assert handle.status() == "completed"


def test_a_cancel_before_the_first_step(start_worker: StartWorker) -> None:
    ran: list[int] = []

    @durable.workflow
    async def flow() -> None:
        ran.append(1)
        await durable.sleep("1 h")

    handle = flow.start()
    handle.cancel()
    start_worker()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)


def test_cancel_of_a_task_that_ignores_it(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        async def stubborn() -> str:
            for _ in range(2):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
            return "done"

        task = asyncio.create_task(stubborn(), name="stubborn")
        await asyncio.sleep(0)
        out: list[Any] = [task.cancel("one")]
        await asyncio.sleep(0)
        out.append(task.cancelling())
        out.append(task.uncancel())
        task.cancel()
        out.append(await task)
        out += [task.cancelled(), task.done(), task.get_name(), task.cancel()]
        return out

    assert run_it(start_worker, body) == [True, 1, 0, "done", False, True, "stubborn", False]


def test_context_variables_and_async_generators(start_worker: StartWorker) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def body() -> list[Any]:
        variable.set("outer")

        async def inner() -> str:
            before = variable.get()
            variable.set("inner")
            await asyncio.sleep(0.001)
            return before + variable.get()

        async def numbers() -> Any:
            for n in range(3):
                await durable.sleep(0.001)
                yield n

        return [await asyncio.create_task(inner()), variable.get(), [n async for n in numbers()]]

    assert run_it(start_worker, body) == ["outerinner", "outer", [0, 1, 2]]


def test_callbacks_and_futures_of_the_loop(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        loop = asyncio.get_running_loop()
        out: list[Any] = []
        future: asyncio.Future[int] = loop.create_future()
        loop.call_soon(out.append, "soon")
        loop.call_later(0.01, future.set_result, 5)
        dropped = loop.call_later(0.001, out.append, "dropped")
        dropped.cancel()
        out.append(await future)
        future.add_done_callback(lambda f: out.append(f.result()))
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        out.append(len(asyncio.all_tasks()))
        out.append(asyncio.iscoroutinefunction(body))
        return out

    assert run_it(start_worker, body) == ["soon", 5, 5, 1, True]


def test_what_is_awaited_twice_and_by_many(start_worker: StartWorker) -> None:
    @durable.activity
    def double(n: int) -> int:
        return 2 * n

    async def body() -> list[Any]:
        handle = double.start(4)
        task = asyncio.create_task(double.execute(5))
        one, two = await asyncio.gather(handle, handle)
        return [one, two, await handle, await task, await task, handle.done(), handle.result()]

    assert run_it(start_worker, body) == [8, 8, 8, 10, 10, True, 8]


def test_barriers_locks_and_semaphores(start_worker: StartWorker) -> None:
    async def body() -> list[Any]:
        lock, semaphore = asyncio.Lock(), asyncio.BoundedSemaphore(2)
        order: list[str] = []
        most = now = 0

        async def locked(name: str) -> None:
            nonlocal most, now
            async with semaphore:
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.001)
                now -= 1
            async with lock:
                order.append(name + " in")
                await asyncio.sleep(0.001)
                order.append(name + " out")

        await asyncio.gather(*(locked(n) for n in "abc"))
        barrier = asyncio.Barrier(2)
        places = sorted(await asyncio.gather(barrier.wait(), barrier.wait()))
        return [order, most, places]

    assert run_it(start_worker, body) == [["a in", "a out", "b in", "b out", "c in", "c out"], 2, [0, 1]]


def test_random_uuid_and_now_are_the_same_after_replay(start_worker: StartWorker) -> None:
    import random
    import time
    import uuid

    async def body() -> list[Any]:
        out = [durable.random().random(), durable.random().randint(1, 100), str(durable.uuid4()), str(durable.uuid7())]
        out += [random.random(), str(uuid.uuid4()), time.time(), datetime.now(UTC).isoformat()]
        out += [durable.now().isoformat(), durable.random().choice("abc")]
        await durable.sleep(0.01)
        out += [durable.random().random(), str(durable.uuid4()), time.monotonic() > 0]
        return out

    first = run_it(start_worker, body)
    assert first[2] != first[5]


def test_side_effects_once(start_worker: StartWorker) -> None:
    calls: list[int] = []

    async def body() -> list[int]:
        def roll() -> int:
            calls.append(1)
            return len(calls)

        first = await durable.side_effect(roll)
        await durable.sleep(0.01)
        second = await durable.side_effect(roll)
        return [first, second]

    assert run_it(start_worker, body) == [1, 2]
    assert len(calls) == 2


def test_a_failure_in_a_task_that_nobody_awaits(start_worker: StartWorker) -> None:
    async def body() -> str:
        async def fail() -> None:
            raise ValueError("nobody looks")

        task = asyncio.create_task(fail())
        await asyncio.sleep(0.01)
        return type(task.exception()).__name__

    assert run_it(start_worker, body) == "ValueError"


def test_exception_groups_fail_the_run(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        async def fail(text: str) -> None:
            raise ValueError(text)

        async with asyncio.TaskGroup() as group:
            group.create_task(fail("one"))
            group.create_task(fail("two"))

    start_worker()
    with pytest.raises(durable.WorkflowFailed) as failed:
        flow.start().result(timeout=10)
    assert failed.value.type == "ExceptionGroup"
    assert "2 sub-exceptions" in failed.value.message


@pytest.mark.parametrize("kind", ["thread", "to_thread", "socket", "file", "send", "subprocess", "sleep", "executor"])
def test_what_cannot_be_replayed_is_refused_at_the_call(start_worker: StartWorker, kind: str) -> None:
    import socket
    import subprocess
    import threading
    import time

    @dramatiq.actor
    def actor() -> None: ...

    @durable.workflow
    async def flow() -> str:
        try:
            if kind == "thread":
                threading.Thread(target=print).start()
            elif kind == "to_thread":
                await asyncio.to_thread(print)
            elif kind == "socket":
                socket.create_connection(("127.0.0.1", 1))
            elif kind == "file":
                open("/tmp/x")
            elif kind == "send":
                actor.send()
            elif kind == "subprocess":
                subprocess.run(["true"], check=False)
            elif kind == "sleep":
                time.sleep(0.1)
            else:
                await asyncio.get_running_loop().run_in_executor(None, print)
        except durable.ForbiddenInWorkflow as e:
            return "refused" if str(e) else "no word"
        return "went on"

    start_worker()
    assert flow.start().result(timeout=10) == "refused"
