"""Fixtures of all tests: databases, servers, processes.  Nothing is started before a test asks for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dramatiq.middleware.time_limit import _CtypesTimeoutManager

from dramatiq_durable import embedded
from tests.support import postgres, scoped
from tests.support.processes import Processes

# The processes of a run find each other by this: workers of pytest-xdist inherit the environment.
SHARED = "DRAMATIQ_DURABLE_TEST_SHARED"


@pytest.fixture(autouse=True)
def no_deadlines_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dramatiq's time limits stay behind when a worker's thread ends in the middle of a message; ten minutes later they
    would hit whatever thread has its number then."""
    made: list[Any] = []
    begin = _CtypesTimeoutManager.start

    def start(manager: Any) -> None:
        made.append(manager)
        begin(manager)

    monkeypatch.setattr(_CtypesTimeoutManager, "start", start)
    yield
    for manager in made:
        with manager.mu:
            manager.deadlines.clear()


@pytest.fixture(autouse=True)
def scoped_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that was chosen, brokers connect as logins that may do only what the test declares."""
    if scoped.chosen():
        scoped.install(monkeypatch.setattr)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    under_a_scope = Path(__file__).parent / "scoped"
    more = [
        item
        for item in items
        if item.get_closest_marker("administrator") and (scoped.chosen() or under_a_scope in item.path.parents)
    ]
    config.hook.pytest_deselected(items=more)
    items[:] = [item for item in items if item not in more]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[SHARED] = str(postgres.make_directory())


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        postgres.clear(Path(os.environ.pop(SHARED)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[postgres.Cluster]:
    """The server that all tests share.  It is not to be restarted, and its settings are not to be changed."""
    cluster = postgres.Cluster(Path(os.environ[SHARED]))
    yield cluster
    cluster.close()


@pytest.fixture
def database_url(cluster: postgres.Cluster) -> Iterator[str]:
    """URL (superuser) of a fresh database with the schema ``durable``; dropped afterwards."""
    with cluster.database(cluster.template()) as url:
        yield url


@pytest.fixture
def empty_database_url(cluster: postgres.Cluster) -> Iterator[str]:
    """URL (superuser) of a fresh database without anything in it; dropped afterwards."""
    with cluster.database() as url:
        yield url


@pytest.fixture
def instance_directory() -> Iterator[Path]:
    """An empty folder for an embedded server; its server is waited for and the folder removed afterwards."""
    directory = postgres.make_directory()
    yield directory
    for server in [server for server in embedded._registry.values() if directory in server.directory.parents]:
        server.release()
    for lock in list(directory.rglob("supervisor.lock")):
        postgres.remove(lock.parent)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def own_server(instance_directory: Path) -> Iterator[embedded.Server]:
    """A server for this test alone, which may restart or break it.  Costs half a second."""
    with embedded.acquire(instance_directory, bin_dir=postgres.chosen_binaries()) as server:
        yield server


@pytest.fixture
def run_process() -> Iterator[Processes]:
    """Starts programs, ``run_process(...)`` or ``run_process.dramatiq(...)``; the end of the test kills them."""
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Drops our variables from the environment; call it with new ones: ``clean_environment(URL="...")``."""

    def set_variables(**values: str) -> None:
        for name in [name for name in os.environ if name.startswith("DRAMATIQ_DURABLE_")]:
            if not name.startswith("DRAMATIQ_DURABLE_TEST_"):
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(f"DRAMATIQ_DURABLE_{name}", value)

    set_variables()
    return set_variables
