"""Workflows with long histories, for worker processes."""

from __future__ import annotations

import asyncio
from typing import Any

import dramatiq_durable as durable


def declare(broker: durable.DurableBroker) -> None:
    """Declare all of them."""

    @durable.activity(broker=broker, queue_name="steps")
    def double(n: int) -> int:
        return n * 2

    @durable.workflow(broker=broker, queue_name="runs")
    async def loop(n: int) -> int:
        return sum([await double.execute(i) for i in range(n)])

    @durable.workflow(broker=broker, queue_name="runs")
    async def wide(n: int) -> int:
        return sum(await asyncio.gather(*[double.execute(i) for i in range(n)]))

    @durable.workflow(broker=broker, queue_name="kids")
    async def kid(n: int) -> int:
        return n

    @durable.workflow(broker=broker, queue_name="runs")
    async def hear(n: int) -> int:
        heard: list[Any] = []
        async for each in durable.signals("said"):
            heard.append(each)
            if len(heard) == n:
                break
        assert heard == list(range(n))
        return sum(heard)

    @durable.workflow(broker=broker, queue_name="runs")
    async def mixed(n: int) -> int:
        """A child, a timer and a signal, one after another."""
        total = 0
        for number in range(n):
            total += await kid.execute(number)
            await durable.sleep(0.001)
            total += await durable.wait_for_signal("said")
        return total

    @durable.workflow(broker=broker, queue_name="runs")
    async def mixed_wide(n: int) -> int:
        """Children and timers at once."""

        async def nap(number: int) -> int:
            await durable.sleep(0.001 + number % 7 / 100)
            return number

        return sum(await asyncio.gather(*[kid.start(i) for i in range(n)], *[nap(i) for i in range(n)]))
