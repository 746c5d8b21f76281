"""What the worker processes of these tests run; they are killed."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=1)
dramatiq.set_broker(broker)


def mark(folder: str, name: str) -> None:
    with (Path(folder) / name).open("a") as f:
        f.write(f"{os.getpid()}\n")


@durable.activity(queue_name="killed")
def step(folder: str, name: str) -> str:
    mark(folder, name)
    return name


@durable.activity(queue_name="killed")
def once(folder: str, name: str, hang: bool = False) -> str:
    """The effect is committed with the result; its first worker is killed between effect and result."""
    with durable.transaction() as conn:
        conn.execute("INSERT INTO public.effect VALUES (%s)", (name,))
        if hang and not (Path(folder) / f"hang-{name}").exists():
            mark(folder, f"hang-{name}")
            time.sleep(1000)
    return name


@durable.activity(queue_name="killed")
def resume(folder: str, pages: int) -> list[int]:
    info = durable.activity_info()
    assert info is not None
    begin = info.heartbeat_details or 0
    for page in range(begin, pages):
        mark(folder, f"page-{page}")
        durable.heartbeat(page + 1)
        if page == 3 and begin == 0:
            mark(folder, "hang-resume")
            time.sleep(1000)
    return [begin, info.attempt]


@durable.workflow(queue_name="killed")
async def kid(n: int) -> int:
    await durable.sleep(0.3)
    return n * 2


@durable.workflow(queue_name="killed")
async def journey(folder: str) -> dict[str, Any]:
    seen: list[Any] = []

    @durable.on_query("seen")
    def show() -> list[Any]:
        return seen

    @durable.on_update("add")
    async def add(value: Any) -> int:
        await durable.sleep(0.1)
        seen.append(value)
        return len(seen)

    roll = durable.random().randint(1, 10**9)
    ids = [str(durable.uuid4())]
    first = await step.execute(folder, "first")
    await durable.entity().increment("stage")
    await durable.output("began")
    effect = await once.execute(folder, "effect", True)
    await durable.entity().increment("stage")
    await durable.output("effected")
    pages = await resume.execute(folder, 6)
    await durable.entity().increment("stage")
    kids = await asyncio.gather(*(kid.execute(n) for n in range(3)))
    signal = await durable.wait_for_signal("go", timeout="1h")
    last = await step.execute(folder, "last")
    await durable.output("done")
    return {
        "roll": [roll, durable.random().randint(1, 10**9)],
        "ids": ids,
        "first": first,
        "effect": effect,
        "pages": pages,
        "kids": kids,
        "signal": signal,
        "last": last,
        "seen": seen,
        "stage": await durable.entity().get("stage"),
    }


@durable.workflow(queue_name="killed")
async def chain(folder: str, n: int, until: int) -> int:
    await step.execute(folder, f"chain-{n}")
    await durable.sleep(0.02)
    if n == until:
        return n
    durable.continue_as_new(folder, n + 1, until)
    return None
