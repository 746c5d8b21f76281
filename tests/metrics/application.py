"""Actors and workflows that do all that is counted, and fail in all ways that are."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.middleware import AsyncIO, default_middleware
from dramatiq.middleware.prometheus import Prometheus

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings

chosen = [Prometheus()] if "dramatiq_prom_port" in os.environ else []
broker = durable.DurableBroker(
    os.environ["TEST_URL"],
    middleware=[*chosen, *(make() for make in default_middleware), AsyncIO()],
    reclaim_delay=2.0,
    reclaim_count=2,
    settings=Settings(poll_interval=0.2),
)
dramatiq.set_broker(broker)

PID = os.getpid()


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


@dramatiq.actor(queue_name="counted")
def count(n: int) -> None:
    pass


@dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=5)
def fail() -> None:
    raise ValueError("as planned")


@dramatiq.actor
def until(path: str) -> None:
    say("until begins")
    while not Path(path).exists():
        time.sleep(0.02)


@durable.activity
def double(n: int) -> int:
    return 2 * n


@durable.workflow(queue_name="flows")
async def order(n: int) -> int:
    added: list[int] = []

    @durable.on_update("add")
    def add(m: int) -> int:
        added.append(m)
        return sum(added)

    doubled = await double.execute(n)
    await durable.sleep(0.05)
    await durable.wait_for_signal("go")
    await durable.escalate(role="clerk", subject="an order", timeout="1 day")
    return doubled + sum(added)


@durable.workflow(queue_name="flows")
async def drifts() -> None:
    # What no workflow may do: it depends on the process that it is replayed in.
    await double.execute(PID)
    await durable.wait_for_signal("go")


@durable.workflow(queue_name="flows")
async def breaks() -> Any:
    raise ValueError("as planned")
