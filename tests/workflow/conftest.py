"""A broker on a database of its own, and workers in this process that run what the test defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.workflow.encoded import MakeBroker


@pytest.fixture
def broker(database_url: str) -> Iterator[durable.DurableBroker]:
    """A broker that is Dramatiq's global one during the test; a short reclaim delay."""
    broker = durable.DurableBroker(database_url, reclaim_delay=2)
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.broker.global_broker = before
    broker.close()


@pytest.fixture
def start_worker(broker: durable.DurableBroker) -> Iterator[Callable[[], dramatiq.Worker]]:
    """Starts a worker on the broker; call it once everything is defined."""
    workers: list[dramatiq.Worker] = []

    def start(threads: int = 4) -> dramatiq.Worker:
        worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=threads)
        worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop(timeout=5000)


@pytest.fixture
def make_broker(database_url: str) -> Iterator[MakeBroker]:
    """Makes brokers on one database, each as another process would."""
    brokers: list[durable.DurableBroker] = []

    def make(**options: Any) -> durable.DurableBroker:
        broker = durable.DurableBroker(database_url, reclaim_delay=2, **options)
        brokers.append(broker)
        return broker

    yield make
    for broker in brokers:
        broker.close()
