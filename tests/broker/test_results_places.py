"""Which database `results.PostgresBackend` keeps results in: the broker's, by default the global one's, or another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Retries
from dramatiq.results import ResultFailure, Results

import dramatiq_durable as durable
from dramatiq_durable.rate_limits import PostgresBackend as LimiterBackend
from dramatiq_durable.results import PostgresBackend
from tests.support import wait_until
from tests.support.postgres import Cluster

from .conftest import NOTES, Rows


@pytest.fixture
def global_broker(broker: durable.DurableBroker) -> Iterator[durable.DurableBroker]:
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(broker)
    yield broker
    dramatiq.broker.global_broker = before


def test_made_from_a_url_it_is_the_same_place(
    broker: durable.DurableBroker, start_worker: Any, notes: Any, database_url: str
) -> None:
    backend = PostgresBackend(database_url)
    broker.add_middleware(Results(backend=backend, store_results=True))

    @dramatiq.actor(broker=broker)
    def answer() -> int:
        return 1

    start_worker(broker)
    assert answer.send().get_result(backend=backend, block=True, timeout=20_000) == 1
    [(_, one), (_, other)] = notes()
    assert one == other
    backend.place.broker.close()


def test_a_url_may_be_given_by_its_name(database_url: str) -> None:
    """As Dramatiq's own back ends take it."""
    for kind in (PostgresBackend, LimiterBackend):
        backend = kind(url=database_url)
        assert backend.place.broker.place == PostgresBackend(database_url).place.broker.place
        with pytest.raises(ValueError, match="a broker or a URL, not both"):
            kind(backend.place.broker, url=database_url)


def test_made_from_nothing_it_is_the_global_broker(
    global_broker: durable.DurableBroker, start_worker: Any, notes: Any
) -> None:
    backend = PostgresBackend()
    global_broker.add_middleware(Results(backend=backend, store_results=True))

    @dramatiq.actor
    def answer() -> int:
        return 1

    start_worker(global_broker)
    assert answer.send().get_result(block=True, timeout=20_000) == 1
    [(_, one), (_, other)] = notes()
    assert one == other


def test_a_broker_of_another_kind_needs_a_place_to_be_named(global_broker: durable.DurableBroker) -> None:
    stub = StubBroker()
    dramatiq.set_broker(stub)
    message = dramatiq.Message("q", "a", (), {}, {})
    with pytest.raises(durable.NotConfigured, match="DurableBroker or a database's URL"):
        message.get_result(backend=PostgresBackend())
    assert isinstance(PostgresBackend(global_broker).place.broker, durable.DurableBroker)


def test_on_another_database_than_the_brokers(
    broker: durable.DurableBroker, start_worker: Any, cluster: Cluster, rows: Rows
) -> None:
    with cluster.database(cluster.template()) as url:
        backend = PostgresBackend(url)
        broker.add_middleware(Results(backend=backend, store_results=True))
        there = Rows(url)
        there.conn.execute(NOTES.encode())

        @dramatiq.actor(broker=broker)
        def answer() -> int:
            return 1

        @dramatiq.actor(broker=broker, max_retries=0)
        def fails() -> int:
            raise KeyError("no")

        start_worker(broker)
        assert answer.send().get_result(backend=backend, block=True, timeout=20_000) == 1
        with pytest.raises(ResultFailure, match="no"):
            fails.send().get_result(backend=backend, block=True, timeout=20_000)
        broker.join("default", timeout=10_000)
        assert rows("SELECT 1 FROM durable.result") == []
        # Each is written once, the failure where Dramatiq writes it.
        wait_until(lambda: len(there("SELECT 1 FROM note")) >= 2)
        assert len(there("SELECT 1 FROM note")) == 2
        there.conn.close()
        backend.place.broker.close()


def test_on_a_broker_of_another_kind(database_url: str) -> None:
    stub = StubBroker(middleware=[Retries()])
    backend = PostgresBackend(database_url)
    stub.add_middleware(Results(backend=backend, store_results=True))

    @dramatiq.actor(broker=stub)
    def answer() -> int:
        return 1

    worker = dramatiq.Worker(stub, worker_timeout=50, worker_threads=1)
    worker.start()
    assert answer.send().get_result(backend=backend, block=True, timeout=20_000) == 1
    worker.stop()
    backend.place.broker.close()


def test_another_address_of_the_same_database_is_the_same_place(
    broker: durable.DurableBroker, database_url: str
) -> None:
    backend = PostgresBackend(f"{database_url}{'&' if '?' in database_url else '?'}application_name=other")
    assert backend.place.broker.place != broker.place
    assert backend.place.shared_with(broker)
    backend.place.broker.close()


def test_a_clone_of_the_database_is_another_place(broker: durable.DurableBroker, cluster: Cluster) -> None:
    with cluster.database(cluster.template()) as url:
        backend = PostgresBackend(url)
        assert not backend.place.shared_with(broker)
        backend.place.broker.close()
