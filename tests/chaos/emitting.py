"""What the workers of the kill tests of topics run: runs that emit, count and put out, and two subscribers that keep a
book of what they were given."""

from __future__ import annotations

import os

import dramatiq

import dramatiq_durable as durable

URL = os.environ["TEST_URL"]
EVENTS = 12

broker = durable.DurableBroker(URL, reclaim_delay=1, reclaim_count=10_000)
dramatiq.set_broker(broker)


def note(listener: str, n: int) -> None:
    info = durable.event_info()
    assert info is not None
    with durable.transaction() as conn:
        conn.execute(
            "INSERT INTO given (listener, workflow_id, n) VALUES (%s, %s, %s)", [listener, info.workflow_id, n]
        )


@durable.subscribe("steps")
@dramatiq.actor(queue_name="listeners")
def careful(n: int) -> None:
    note("careful", n)


@durable.subscribe("steps")
@dramatiq.actor(queue_name="listeners", min_backoff=5, max_backoff=20)
def clumsy(n: int) -> None:
    info = durable.event_info()
    assert info is not None
    if n % 5 == 2 and info.attempt == 1:
        raise ValueError("the first time it fails")
    note("clumsy", n)


@durable.activity(queue_name="activities")
def pause(n: int) -> int:
    return n


@durable.workflow(queue_name="runs")
async def emitter() -> int:
    entity = durable.entity()
    for n in range(EVENTS):
        await durable.emit("steps", n)
        await entity.increment("emitted")
        await durable.output(n)
        if n % 3 == 0:
            await pause.execute(n)
        elif n % 3 == 1:
            await durable.sleep(0.02)
    return int(await entity.get("emitted"))
