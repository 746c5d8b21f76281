"""On a real worker: what is durable in a workflow is real in its activities, and cleanup is not cut off."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import dramatiq

import dramatiq_durable as durable
from tests.support import wait_until


def test_clocks_and_numbers_survive_the_loss_of_memory(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker]
) -> None:
    @durable.activity(queue_name="guarded", broker=broker)
    def read_the_clock() -> list[Any]:
        broker.runner.cache.clear()  # between two steps, all runs are dropped from memory
        return [time.time(), datetime.now(UTC).timestamp(), str(uuid.uuid4())]

    @durable.workflow(queue_name="guarded", broker=broker)
    async def flow() -> list[Any]:
        seen: list[Any] = [time.time(), datetime.now(UTC).timestamp(), random.random(), str(uuid.uuid4())]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read_the_clock.execute()) for _ in range(3)]
        async for task in asyncio.as_completed(tasks):
            seen.append((await task)[0] > 0)
        local = await durable.local(time.time)
        return [*seen, abs(local - time.time()) < 60, local != time.time()]

    before = time.time()
    handle = flow.start()
    start_worker()
    first, at, number, unique, *rest = handle.result(timeout=30)
    assert abs(first - before) < 60
    assert first == at
    assert 0 <= number < 1
    assert uuid.UUID(unique).version == 4
    assert rest == [True] * 5


def test_a_cancel_waits_for_an_uncancellable_block(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker]
) -> None:
    done: list[str] = []

    @durable.activity(queue_name="careful", broker=broker)
    def note(what: str) -> str:
        done.append(what)
        return what

    @durable.workflow(queue_name="careful", broker=broker)
    async def flow() -> None:
        async with durable.uncancellable():
            await note.execute("begun")
            await durable.wait_for_signal("go")
            await note.execute("ended")
        await note.execute("not done")

    handle = flow.start()
    start_worker()
    wait_until(lambda: done == ["begun"])
    handle.cancel()
    wait_until(lambda: "CancelRequested" in [event.type for event in handle.history()])
    assert handle.status() == "running"
    handle.signal("go")
    wait_until(lambda: handle.status() == "cancelled")
    assert done == ["begun", "ended"]
