"""Servers of other brokers, each started by these tests in a folder and on ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from dramatiq_durable.cli import main
from tests.support import free_port, wait_until
from tests.system.old_brokers import Old


def program(package: str, *places: str) -> str:
    """A program of the system's packages."""
    for place in places:
        if found := shutil.which(place):
            return found
    raise AssertionError(f"install {package}")


def listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def running(
    ready: Callable[[], bool], *command: str, folder: Path, env: dict[str, str] | None = None
) -> Iterator[None]:
    """A server, from when it is ready until the end of the block."""
    log = folder / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )

    def started() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")
        return ready()

    try:
        wait_until(started, timeout=60, message=command[0])
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis; each test takes another namespace."""
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with running(lambda: listening(port), program("redis-server", "redis-server"), *options, folder=folder):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="session")
def rabbitmq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a RabbitMQ; each test takes other queues."""
    folder, port, names = tmp_path_factory.mktemp("rabbitmq"), free_port(), free_port()
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{port}\ndisk_free_limit.absolute = 1MB\nlog.file = false\nlog.console = true\n"
    )
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
        # Erlang's own name server, which stays behind otherwise.
        "ERL_EPMD_PORT": str(names),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    # Not the one in /usr/sbin, which takes another user and another environment.
    server = program("rabbitmq-server", "/usr/lib/rabbitmq/bin/rabbitmq-server")
    try:
        with running(lambda: listening(port), server, folder=folder, env=env):
            yield f"amqp://guest:guest@127.0.0.1:{port}"
    finally:
        subprocess.run(["epmd", "-port", str(names), "-kill"], env=env, capture_output=True, check=False)


# --- imports from them ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["redis", "rabbitmq"])
def old(request: pytest.FixtureRequest) -> Iterator[Old]:
    old = Old(request.param, request.getfixturevalue(f"{request.param}_url"))
    yield old
    old.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Old]:
    old = Old("redis", redis_url)
    yield old
    old.close()


@pytest.fixture
def rabbitmq(rabbitmq_url: str) -> Iterator[Old]:
    old = Old("rabbitmq", rabbitmq_url)
    yield old
    old.close()


@pytest.fixture
def attempt(database_url: str) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, ["--url", database_url, *arguments], catch_exceptions=False)


@pytest.fixture
def moved(attempt: Callable[..., Result], old: Old) -> Callable[..., dict[str, Any]]:
    """Imports the test's queue, and answers its report."""

    def run(*more: str) -> dict[str, Any]:
        done = attempt(*old.arguments("--json", *more))
        assert done.exit_code == 0, done.output
        (report,) = json.loads(done.stdout)
        assert report["queue"] == old.queue
        return dict(report)

    return run


@pytest.fixture
def rows(database_url: str) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield lambda query, *arguments: conn.execute(query.encode(), arguments).fetchall()
