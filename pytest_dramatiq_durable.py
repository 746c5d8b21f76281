"""The pytest plugin of dramatiq_durable: fixtures for workflows in memory, and on a real Postgres.

It is a module by itself, and imports nothing of the package before a fixture is asked for: pytest loads it wherever the
package is installed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import dramatiq

    import dramatiq_durable as durable
    from dramatiq_durable.testing import Environment


@pytest.fixture
def durable_environment() -> Iterator[Environment]:
    """An `Environment` without mocks: workflows run in memory, on a clock of their own."""
    from dramatiq_durable.testing import Environment

    with Environment() as environment:
        yield environment


@pytest.fixture(scope="session")
def _durable_server() -> Iterator[_Server]:
    """The embedded Postgres of this test process, with a migrated database that others are cloned from."""
    from dramatiq_durable import embedded
    from dramatiq_durable.migrate import migrate

    directory = Path(tempfile.mkdtemp(prefix="dramatiq-durable-")).resolve()
    directory.chmod(0o711)  # as root, the server is another user's
    try:
        with embedded.acquire(directory / "postgres") as embedded_server:
            server = _Server(embedded_server.url)
            server.execute("CREATE DATABASE durable_template")
            migrate(server.database("durable_template"))
            yield server
            embedded_server.release(wait=30)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def durable_broker(_durable_server: _Server) -> Iterator[durable.DurableBroker]:
    """A `DurableBroker` on a fresh database; it is Dramatiq's global broker during the test.

    Actors and workflows that were declared before, on a `DurableBroker` that is the global one, work on this one.
    """
    import dramatiq

    import dramatiq_durable as durable

    with _durable_server.clone() as url:
        broker = durable.DurableBroker(url)
        before = dramatiq.broker.global_broker
        dramatiq.set_broker(broker)
        try:
            with _lent(before, broker):
                yield broker
        finally:
            dramatiq.broker.global_broker = before
            broker.close()


@contextmanager
def _lent(before: Any, broker: durable.DurableBroker) -> Iterator[None]:
    """Have one broker's actors and workflows work on another one."""
    import dramatiq_durable as durable

    if not isinstance(before, durable.DurableBroker):
        yield
        return
    workflows = list(before.workflows.values())
    lent: list[Any] = [actor for name, actor in before.actors.items() if name not in before.workflows]
    for actor in lent:
        broker.declare_queue(actor.queue_name)
        broker.declare_actor(actor)
    for workflow in workflows:
        broker.declare_workflow(workflow)
    lent += workflows
    for each in lent:
        each.broker = broker
    try:
        yield
    finally:
        for each in lent:
            each.broker = before


@pytest.fixture
def durable_worker(durable_broker: durable.DurableBroker) -> Iterator[dramatiq.Worker]:
    """A running worker of `durable_broker`: 4 threads, all queues, also those that are declared later."""
    import dramatiq

    worker = dramatiq.Worker(durable_broker, worker_timeout=50, worker_threads=4)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(timeout=10_000)


class _Server:
    """A Postgres of one's own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._clones = 0

    def database(self, name: str) -> str:
        from urllib.parse import urlsplit, urlunsplit

        return urlunsplit(urlsplit(self._url)._replace(path=f"/{name}"))

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self._url, autocommit=True) as conn:
            conn.execute(statement.encode())

    @contextmanager
    def clone(self) -> Iterator[str]:
        """The URL of a copy of the template; it is dropped afterwards."""
        self._clones += 1
        name = f"durable_{self._clones}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE durable_template STRATEGY file_copy")
        try:
            yield self.database(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")
