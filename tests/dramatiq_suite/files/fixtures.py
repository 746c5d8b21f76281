"""The suite's fixtures: whatever it asks for, it gets ours, on an empty database."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import rate_limits, results

from . import URL, StubBroker
from .inapplicable import INAPPLICABLE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unused = dict(INAPPLICABLE)
    for item in items:
        key = item.nodeid.removeprefix("tests/").partition("[")[0]
        if key in INAPPLICABLE:
            unused.pop(key, None)
            item.add_marker(pytest.mark.skip(reason=f"cannot apply: {INAPPLICABLE[key]}"))
    if config.args == ["tests"] and not config.getoption("lf") and unused:
        raise pytest.UsageError(f"no longer in the suite: {', '.join(unused)}")


@pytest.fixture(scope="session")
def superuser() -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(URL, autocommit=True) as conn:
        yield conn


@pytest.fixture
def empty_database(superuser: psycopg.Connection[Any]) -> None:
    superuser.execute("TRUNCATE durable.message, durable.dead_letter, durable.result, durable.limiter")


def serve(broker: durable.DurableBroker) -> Iterator[durable.DurableBroker]:
    broker.emit_after("process_boot")
    dramatiq.set_broker(broker)
    yield broker
    broker.flush_all()
    broker.close()


@pytest.fixture
def stub_broker(empty_database: None) -> Iterator[durable.DurableBroker]:
    yield from serve(StubBroker())


@pytest.fixture
def rabbitmq_broker(empty_database: None) -> Iterator[durable.DurableBroker]:
    yield from serve(durable.DurableBroker(URL))


@pytest.fixture
def redis_broker(empty_database: None) -> Iterator[durable.DurableBroker]:
    yield from serve(durable.DurableBroker(URL))


def work(broker: durable.DurableBroker, **options: Any) -> Iterator[dramatiq.Worker]:
    worker = dramatiq.Worker(broker, worker_threads=32, **options)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def stub_worker(stub_broker: durable.DurableBroker) -> Iterator[dramatiq.Worker]:
    yield from work(stub_broker, worker_timeout=100)


@pytest.fixture
def rabbitmq_worker(rabbitmq_broker: durable.DurableBroker) -> Iterator[dramatiq.Worker]:
    yield from work(rabbitmq_broker)


@pytest.fixture
def redis_worker(redis_broker: durable.DurableBroker) -> Iterator[dramatiq.Worker]:
    yield from work(redis_broker)


@pytest.fixture
def place(empty_database: None) -> Iterator[durable.DurableBroker]:
    """What the back ends keep their connections in: another broker than the one under test."""
    broker = durable.DurableBroker(URL, middleware=[])
    yield broker
    broker.close()


@pytest.fixture
def result_backend(place: durable.DurableBroker) -> results.PostgresBackend:
    return results.PostgresBackend(place)


@pytest.fixture
def redis_result_backend(result_backend: results.PostgresBackend) -> results.PostgresBackend:
    return result_backend


@pytest.fixture
def rate_limiter_backend(place: durable.DurableBroker) -> rate_limits.PostgresBackend:
    return rate_limits.PostgresBackend(place)


@pytest.fixture
def start_cli(empty_database: None) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the real command; the end of the test stops it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(module: str, *, extra_args: list[str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dramatiq", module, *(extra_args or [])]
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
