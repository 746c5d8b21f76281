"""The actors and the workflow that are measured.  Imported by worker processes after their broker is set."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.stub import StubBroker

import dramatiq_durable as durable

if os.environ.get("BENCHMARK_BROKER") == "stub":
    dramatiq.set_broker(StubBroker())
elif not isinstance(getattr(dramatiq.broker, "global_broker", None), durable.DurableBroker):
    dramatiq.set_broker(durable.DurableBroker())


@dramatiq.actor(queue_name="noop")
def noop(text: str) -> None:
    """The cheapest message: nothing but the machinery around it."""


if isinstance(dramatiq.get_broker(), durable.DurableBroker):

    @durable.activity(queue_name="steps")
    def step(n: int) -> int:
        return n + 1

    @durable.workflow(queue_name="runs")
    async def ten_steps() -> int:
        n = 0
        for _ in range(10):
            n = await step.execute(n)
        return n
