"""A run that is dropped from memory does nothing any more, whatever its code has in its cleanup."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable.workflow import primitives
from tests.workflow.test_engine_asyncio import check
from tests.workflow.test_engine_support import Run, echo, ship


class Witness:
    """Tries everything through which code could have an effect, and remembers what had one."""

    def __init__(self) -> None:
        self.got_through: list[str] = []
        self.visits = 0

    async def ran(self) -> None:
        self.got_through.append("a task")

    def look(self) -> None:
        self.visits += 1
        loop = asyncio.get_running_loop
        attempts: list[Callable[[], Any]] = [
            lambda: echo.execute("too late"),
            lambda: echo.start("too late").cancel(),
            lambda: ship.start("too late"),
            lambda: primitives.sleep(1),
            lambda: durable.wait_for_signal("x").close(),
            lambda: durable.side_effect(lambda: self.got_through.append("side effect")),
            lambda: durable.local(lambda: self.got_through.append("local")),
            lambda: durable.patched("late"),
            lambda: durable.random().random(),
            lambda: loop().create_future().set_result(1),
            lambda: loop().call_soon(self.got_through.append, "call_soon"),
            lambda: loop().call_later(1, self.got_through.append, "call_later"),
        ]
        for attempt in attempts:
            with contextlib.suppress(BaseException):
                attempt()
        task = self.ran()
        try:
            self.task = asyncio.create_task(task)
        except BaseException:
            task.close()

    async def wait_again(self) -> None:
        self.visits += 1
        for attempt in (lambda: asyncio.sleep(1), lambda: echo.execute("late"), lambda: asyncio.sleep(0)):
            with contextlib.suppress(BaseException):
                await attempt()
                self.got_through.append("an await")


def in_finally(witness: Witness) -> Any:
    async def wf() -> Any:
        try:
            await echo.execute(1)
        finally:
            witness.look()

    return wf


def in_except(witness: Witness) -> Any:
    async def wf() -> Any:
        try:
            await echo.execute(1)
        except asyncio.CancelledError:
            witness.got_through.append("CancelledError")
        except Exception:
            witness.got_through.append("Exception")
        except BaseException:
            witness.look()
            await witness.wait_again()

    return wf


def in_context_managers(witness: Witness) -> Any:
    @contextlib.contextmanager
    def plain() -> Iterator[None]:
        try:
            yield
        finally:
            witness.look()

    @contextlib.asynccontextmanager
    async def asynchronous() -> AsyncIterator[None]:
        try:
            yield
        finally:
            witness.look()
            await witness.wait_again()

    async def wf() -> Any:
        with plain():
            async with asynchronous(), asyncio.timeout(5), asyncio.Lock(), durable.uncancellable():
                await echo.execute(1)

    return wf


def in_generators(witness: Witness) -> Any:
    def plain() -> Iterator[int]:
        try:
            yield 1
        finally:
            witness.look()

    async def asynchronous() -> AsyncIterator[int]:
        try:
            yield await echo.execute("first")
        finally:
            witness.look()
            await witness.wait_again()

    async def wf() -> Any:
        for _ in plain():
            async for _ in asynchronous():
                await echo.execute(1)

    return wf


def in_tasks(witness: Witness) -> Any:
    async def child(i: int) -> None:
        try:
            await echo.execute(i)
        finally:
            witness.look()

    async def wf() -> Any:
        handle = asyncio.create_task(child(0))
        handle.add_done_callback(lambda _: witness.got_through.append("callback"))
        async with asyncio.TaskGroup() as group:
            group.create_task(child(1))
            await asyncio.gather(child(2), asyncio.shield(child(3)))

    return wf


def in_finalizers(witness: Witness) -> Any:
    class Thing:
        def __del__(self) -> None:
            witness.look()

    class Cycle(Thing):
        def __init__(self) -> None:
            self.me = self

    async def wf() -> Any:
        things = [Thing(), Cycle()]
        weakref.finalize(things[0], witness.look)
        await echo.execute(len(things))

    return wf


@pytest.mark.parametrize(
    "make",
    [in_finally, in_except, in_context_managers, in_generators, in_tasks, in_finalizers],
    ids=lambda f: f.__name__,
)
def test_nothing_comes_of_cleanup(make: Callable[[Witness], Any], caplog: pytest.LogCaptureFixture) -> None:
    witness = Witness()
    run = Run(make(witness))
    if make is in_generators:
        run.complete(1)
    commands = len(run.commands)
    run.execution.evict()
    gc.collect()
    assert witness.visits
    assert witness.got_through == []
    assert run.execution._out == {}
    assert len(run.commands) == commands
    assert caplog.records == []


def test_nothing_comes_of_the_cleanup_of_what_is_left_when_a_run_closes() -> None:
    witness = Witness()

    async def left() -> None:
        try:
            await echo.execute(1)
        finally:
            witness.look()

    async def wf() -> Any:
        task = asyncio.create_task(left())
        await asyncio.sleep(0)
        return task.done()

    run = Run(wf)
    assert run.types == ["ActivityScheduled", "WorkflowCompleted"]
    assert witness.visits == 1
    assert witness.got_through == []


def test_a_finalizer_that_the_collector_runs_during_a_step_belongs_to_no_run() -> None:
    witness = Witness()

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            witness.look()

    async def wf() -> Any:
        Cycle()
        gc.collect()
        await echo.execute("mine")

    gc.disable()
    try:
        run = Run(wf)
    finally:
        gc.enable()
    assert witness.visits == 1
    assert witness.got_through == []
    assert [c.event_type for c in run.last] == ["ActivityScheduled"]
    run.execution.evict()


def test_the_logger_of_workflows_is_silent_while_a_run_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def wf() -> Any:
        durable.logger.warning("began")
        try:
            await echo.execute(1)
        finally:
            durable.logger.error("cleanup")

    with caplog.at_level(logging.INFO):
        run = Run(wf)
        run.execution.evict()
    assert [r.message for r in caplog.records] == ["began"]


def test_a_coroutine_that_will_not_close_holds_nobody_up() -> None:
    async def wf() -> Any:
        while True:
            try:
                await echo.execute(1)
            except BaseException:
                with contextlib.suppress(BaseException):
                    await asyncio.sleep(1)

    Run(wf).execution.evict()


def test_an_evicted_run_made_again_goes_on_where_it_was() -> None:
    async def wf() -> Any:
        seen = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(echo.execute("a"))
                async with asyncio.timeout(60):
                    seen.append(await echo.execute("b"))
                    seen.append(await echo.execute("c"))
        finally:
            seen.append(await echo.execute("cleanup"))
        return seen

    run = Run(wf)
    for _ in range(4):
        run.execution.evict()
        run.execution = run.replayed()
        command = run.open_commands()[-1]
        assert command.seq is not None
        run.complete(command.seq, command.args[0])  # type: ignore[attr-defined]
        if run.execution.closed:
            break
    run.finish()
    assert run.result == ["b", "c", "cleanup"]
    check(run)
