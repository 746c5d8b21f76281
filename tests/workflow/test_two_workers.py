"""Runs that two workers step by turns: each has its own copy in memory, and the other's steps make it stale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.workflow.handle import WorkflowHandle


@pytest.fixture
def brokers(database_url: str) -> Iterator[list[durable.DurableBroker]]:
    """Two brokers on one database; what is defined on each runs once `start` was called."""
    with ExitStack() as stack:
        made = [durable.DurableBroker(database_url) for _ in range(2)]
        for broker in made:
            stack.callback(broker.close)
        yield made


def start(brokers: list[durable.DurableBroker], stack: ExitStack) -> None:
    for broker in brokers:
        worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
        worker.start()
        stack.callback(worker.stop)


def test_no_timer_is_lost_on_a_worker_with_an_old_copy_of_the_run(brokers: list[durable.DurableBroker]) -> None:
    for broker in brokers:

        @durable.workflow(queue_name="q", broker=broker)
        async def naps(number: int) -> int:
            for _ in range(number):
                await durable.sleep(0.01)
            return number

    with ExitStack() as stack:
        start(brokers, stack)
        runs: list[WorkflowHandle[int]] = [brokers[0].workflows["naps"].start(20) for _ in range(10)]
        assert [run.result(timeout=20) for run in runs] == [20] * 10
    assert [event.type for event in runs[0].history()].count("TimerFired") == 20
