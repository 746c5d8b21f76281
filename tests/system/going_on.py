"""A chain of runs for workers that are killed: each run reads one signal, does something, and continues as new."""

from __future__ import annotations

import os
from typing import Any

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ.get("TEST_URL"), reclaim_delay=1, reclaim_count=1000)
dramatiq.set_broker(broker)


@durable.activity(queue_name="going")
def note(value: int) -> int:
    return value


@durable.workflow(queue_name="going")
async def child(value: int) -> int:
    await durable.sleep(0.01)
    if value % 2:
        durable.continue_as_new(value + 1)
    return await note.execute(value)


@durable.workflow(queue_name="going")
async def collect(seen: list[int], end: int) -> Any:
    value = await durable.wait_for_signal("n")
    await note.execute(value)
    even = await child.execute(value)
    assert even in (value, value + 1)
    if len(seen) + 1 < end:
        durable.continue_as_new([*seen, value], end)
    return [*seen, value]
