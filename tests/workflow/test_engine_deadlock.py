"""Workflow code that never awaits is stopped, and the error says where it was."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.errors import NotConfigured, RunawayWorkflow
from dramatiq_durable.settings import Settings
from dramatiq_durable.workflow import deadlock
from dramatiq_durable.workflow.loop import current_host
from tests.support import wait_until
from tests.workflow.test_engine_support import Run, echo

TIMEOUT = 0.2


def overdue(fn: Any) -> str:
    run = Run(fn, start=False, deadlock_timeout=TIMEOUT)
    with pytest.raises(RunawayWorkflow) as caught:
        run.send("WorkflowStarted")
    assert current_host() is None
    assert not deadlock.stepping
    run.execution.evict()
    # Nothing is left that could hit what this thread does next.
    for _ in range(10_000):
        pass
    return str(caught.value)


def spin() -> None:
    while True:
        pass


async def in_the_body() -> None:
    while True:
        pass


async def in_a_task() -> None:
    async def child() -> None:
        spin()

    await asyncio.gather(child(), echo.execute(1))


async def in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(spin)
    await echo.execute(1)


async def in_a_condition() -> None:
    seen = itertools.count()
    await durable.wait_condition(lambda: spin() if next(seen) else None)


async def in_a_call_of_ours() -> None:
    while True:
        durable.now()


async def in_a_generator_of_the_standard_library() -> None:
    for _ in itertools.count():
        sorted(range(100), key=lambda n: -n)


async def in_something_that_swallows_it_once() -> None:
    try:
        spin()
    except BaseException:
        await echo.execute(1)
    spin()


@pytest.mark.parametrize(
    "fn",
    [
        in_the_body,
        in_a_task,
        in_a_callback,
        in_a_condition,
        in_a_call_of_ours,
        in_a_generator_of_the_standard_library,
        in_something_that_swallows_it_once,
    ],
    ids=lambda f: f.__name__,
)
def test_it_is_stopped(fn: Any) -> None:
    text = overdue(fn)
    assert fn.__name__ in text  # the workflow
    assert "test_engine_deadlock.py:" in text  # the place
    assert "DRAMATIQ_DURABLE_DEADLOCK_TIMEOUT" in text


def test_a_step_that_ends_in_time_is_left_alone() -> None:
    async def wf() -> Any:
        for _ in range(3):
            end = os.times().elapsed + TIMEOUT / 2
            while os.times().elapsed < end:
                pass
            await echo.execute(1)
        return "done"

    run = Run(wf, deadlock_timeout=TIMEOUT)
    assert run.finish().result == "done"


def test_without_a_timeout_nothing_is_stopped() -> None:
    async def wf() -> Any:
        end = os.times().elapsed + 3 * TIMEOUT
        while os.times().elapsed < end:
            pass
        return "done"

    assert Run(wf).result == "done"


def test_cleanup_of_a_dropped_run_that_never_ends_is_stopped() -> None:
    async def wf() -> Any:
        try:
            await echo.execute(1)
        finally:
            spin()

    run = Run(wf, deadlock_timeout=TIMEOUT)
    run.execution.evict()
    assert current_host() is None


def test_only_the_thread_that_is_stuck_is_hit() -> None:
    stop = threading.Event()
    hit: list[BaseException] = []

    def works() -> None:
        try:
            while not stop.is_set():
                sum(range(100))
        except BaseException as e:
            hit.append(e)

    thread = threading.Thread(target=works)
    thread.start()
    try:
        overdue(in_the_body)
    finally:
        stop.set()
        thread.join()
    assert hit == []


def test_the_setting() -> None:
    assert Settings().deadlock_timeout == 5.0
    assert Settings.from_env({"DRAMATIQ_DURABLE_DEADLOCK_TIMEOUT": "1500ms"}).deadlock_timeout == 1.5
    assert Settings.from_env({"DRAMATIQ_DURABLE_DEADLOCK_TIMEOUT": "off"}).deadlock_timeout is None
    with pytest.raises(NotConfigured, match="DEADLOCK_TIMEOUT"):
        Settings.from_env({"DRAMATIQ_DURABLE_DEADLOCK_TIMEOUT": "soon"})


@pytest.fixture
def impatient(database_url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(database_url, settings=Settings(deadlock_timeout=TIMEOUT))
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.broker.global_broker = before
    broker.close()


def test_the_task_fails_and_is_tried_again(impatient: durable.DurableBroker) -> None:
    attempts = itertools.count(1)

    @durable.workflow(queue_name="stuck", broker=impatient)
    async def stuck() -> int:
        await durable.sleep(0.01)
        attempt = next(attempts)  # the code is mended meanwhile, as it were
        if attempt <= 2:
            spin()
        return attempt

    handle = stuck.start()
    worker = dramatiq.Worker(impatient, worker_timeout=50, worker_threads=2)
    worker.start()
    try:
        wait_until(lambda: "spin" in (handle.describe().task_failure or ""), timeout=20)
        assert handle.describe().status == "running"
        assert handle.result(timeout=30) == 3
    finally:
        worker.stop(timeout=5000)
