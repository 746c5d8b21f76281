"""A broker for workflows that no worker ever runs, and an environment that runs them."""

from __future__ import annotations

from collections.abc import Iterator

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment


@pytest.fixture
def broker() -> Iterator[durable.DurableBroker]:
    """What workflows are declared on; nothing listens at its address."""
    broker = durable.DurableBroker("postgresql://nobody@127.0.0.1:1/nothing")
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.broker.global_broker = before
    broker.close()


@pytest.fixture
def env(broker: durable.DurableBroker) -> Iterator[Environment]:
    with Environment() as env:
        yield env
