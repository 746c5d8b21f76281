"""Timers of one run fire in the order in which they are due, those that are due at once in the order of their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment
from tests.support import wait_until
from tests.workflow.encoded import MakeBroker

StartWorker = Callable[..., dramatiq.Worker]


def count(broker: durable.DurableBroker, what: str) -> int:
    with broker.database.connection() as conn:
        row = conn.execute(f"SELECT count(*) FROM durable.{what}").fetchone()
    assert row is not None
    return int(row[0])


def shuffle(broker: durable.DurableBroker, order: str) -> None:
    """All timers are overdue; the claims' order is another than the timers'."""
    with broker.database.connection() as conn:
        conn.execute(
            "UPDATE durable.message m SET due_at = t.at FROM (SELECT message_id, "
            f"clock_timestamp() - interval '1 hour' + row_number() OVER (ORDER BY {order}) * interval '1 second' AS at "
            "FROM durable.message WHERE kind = 'w') t WHERE t.message_id = m.message_id"
        )


def spread(broker: durable.DurableBroker, unit: float = 1) -> Any:
    """A run with timers of all kinds, started in another order than they are due."""

    @durable.workflow(queue_name="q", broker=broker)
    async def spread() -> list[str]:
        seen: list[str] = []

        async def nap(name: str, seconds: float) -> None:
            await durable.sleep(seconds)
            seen.append(name)

        async def snooze(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(name)

        async def ask(name: str, seconds: float) -> None:
            try:
                await durable.escalate(role="people", timeout=seconds)
            except durable.Timeout:
                seen.append(name)

        naps = [nap(f"n{n}", unit * (6 - n)) for n in range(6)] + [snooze(f"s{n}", unit * (6 - n)) for n in range(6)]
        await asyncio.gather(*naps, ask("late", 7 * unit), ask("early", unit / 2), nap("last", 7 * unit))
        return seen

    return spread


SPREAD = ["early", "n5", "s5", "n4", "s4", "n3", "s3", "n2", "s2", "n1", "s1", "n0", "s0", "late", "last"]


def test_in_an_environment() -> None:
    broker = durable.DurableBroker("postgresql://nobody@127.0.0.1:1/nothing")
    with Environment() as env:
        assert env.run(spread(broker)) == SPREAD


@pytest.mark.parametrize("order", ["due_at DESC", "due_at", "md5(message_id::text)"])
@pytest.mark.parametrize("here", [True, False])
def test_all_are_overdue_and_claimed_in_any_order(
    broker: durable.DurableBroker, start_worker: StartWorker, order: str, here: bool
) -> None:
    flow = spread(broker, 60)
    worker = start_worker(threads=1)
    handle = flow.start()
    wait_until(lambda: count(broker, "message WHERE kind = 'w'") == len(SPREAD))
    worker.stop(timeout=5000)
    if not here:
        broker.runner.cache.clear()
    shuffle(broker, order)
    start_worker(threads=4)
    assert handle.result(timeout=20) == SPREAD
    fired = [e for e in handle.history() if e.type in ("TimerFired", "EscalationTimedOut")]
    assert len(fired) == len(SPREAD)
    wait_until(lambda: count(broker, "message") == 0)


def test_with_two_workers(make_broker: MakeBroker) -> None:
    brokers = [make_broker() for _ in range(2)]
    flows = [spread(broker, 0.02) for broker in brokers]
    with ExitStack() as stack:
        for broker in brokers:
            worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
            worker.start()
            stack.callback(worker.stop, timeout=5000)
        handles = [flows[n % 2].start() for n in range(10)]
        assert [handle.result(timeout=30) for handle in handles] == [SPREAD] * 10
        wait_until(lambda: count(brokers[0], "message") == 0)


def test_a_timer_that_is_cancelled_by_one_before_it_does_not_fire(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow(queue_name="q")
    async def flow() -> str:
        try:
            async with asyncio.timeout(60):
                await durable.sleep(120)
        except TimeoutError:
            return "timed out"
        return "slept"

    worker = start_worker(threads=1)
    handle = flow.start()
    wait_until(lambda: count(broker, "message WHERE kind = 'w'") == 2)
    worker.stop(timeout=5000)
    shuffle(broker, "due_at DESC")
    start_worker()
    assert handle.result(timeout=20) == "timed out"
    types = [e.type for e in handle.history()]
    assert types == ["WorkflowStarted", "TimerStarted", "TimerStarted", "TimerFired", "TimerCancelled", *types[5:]]
    assert types[5:] == ["WorkflowCompleted"]


def test_timers_of_a_run_that_waited_for_a_worker_take_their_time(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """Its clock begins when it was started; what its code asks for then runs from the time at which it is asked for."""

    @durable.workflow(queue_name="q")
    async def flow() -> bool:
        long = asyncio.create_task(durable.sleep(1.5))
        for _ in range(3):
            await durable.sleep(0.02)
        return long.done()

    broker.declare_queue("q")
    handle = flow.start()
    with broker.database.connection() as conn:
        conn.execute("UPDATE durable.event SET at = at - interval '1 minute'")
    start_worker()
    assert handle.result(timeout=20) is False
    assert sorted(e.at for e in handle.history()) == [e.at for e in handle.history()]
