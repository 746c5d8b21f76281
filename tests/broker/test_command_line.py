"""The real `dramatiq` command with its options: reload, watch, forks, spawn, files, timeouts."""

from __future__ import annotations

import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Rows

MODULE = "tests.broker.command_app:broker"
ONE = ("--processes", "1", "--threads", "2")


@pytest.fixture
def send(broker: durable.DurableBroker) -> Callable[..., Any]:
    """Sends to an actor of the module, from a process that has none of it."""
    actors: dict[str, Any] = {}

    def send(name: str, *arguments: Any, **options: Any) -> Any:
        if name not in actors:
            actors[name] = dramatiq.actor(lambda *a: None, actor_name=name, broker=broker)
        return actors[name].send_with_options(args=arguments, **options)

    return send


@pytest.fixture
def start(run_process: Any, database_url: str) -> Callable[..., Any]:
    def start(*arguments: str, **env: str) -> Any:
        return run_process.dramatiq(MODULE, *arguments, env={"TEST_URL": database_url, **env})

    return start


def pid_of(line: str) -> int:
    return int(line.rsplit(" ", 1)[1])


def test_a_reload_starts_anew_and_loses_nothing(start: Any, send: Any, rows: Rows, tmp_path: Path) -> None:
    process = start(*ONE)
    send("quick", "one")
    before = pid_of(process.wait_for("quick one"))
    send("until", str(tmp_path / "end"))
    process.wait_for("until begins")
    process.signal(signal.SIGHUP)
    process.wait_for("Shutting down")
    send("quick", "two")  # while the old ones are leaving
    (tmp_path / "end").touch()
    process.wait_for("until ends")
    after = pid_of(process.wait_for("quick two"))
    assert after != before
    rows.drained()
    assert process.stop() == 0
    assert process.output.count("until begins") == 1
    assert rows("SELECT count(*) FROM durable.worker") == [(0,)]


@pytest.mark.parametrize("how", [[], ["--watch-use-polling"]])
def test_a_changed_file_reloads(
    run_process: Any, database_url: str, broker: Any, tmp_path: Path, how: list[str]
) -> None:
    source = (
        "import os, dramatiq, dramatiq_durable\n"
        "broker = dramatiq_durable.DurableBroker(os.environ['TEST_URL'])\n"
        "@dramatiq.actor(broker=broker)\n"
        "def version(): os.write(1, b'version 1\\n')\n"
    )
    module = tmp_path / "watched_app.py"
    module.write_text(source)
    process = run_process.dramatiq(
        *("watched_app:broker", *ONE, "--path", str(tmp_path), "--watch", str(tmp_path), *how),
        env={"TEST_URL": database_url, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    version = dramatiq.actor(lambda: None, actor_name="version", broker=broker)
    version.send()
    process.wait_for("version 1")
    # One change is to be one event, because Dramatiq kills a worker that it tells twice to end: a write is several to
    # who listens for them, a replacement is two to who looks from time to time.
    changed = module if how else tmp_path.parent / f"{tmp_path.name}-next.py"
    changed.write_text(source.replace("version 1", "version 2"))
    changed.replace(module)
    process.wait_for("Detected changes")
    process.wait_for("registered as worker 2")
    version.send()
    process.wait_for("version 2")
    assert process.stop() == 0


def test_forks_of_the_user_and_of_a_middleware(start: Any, rows: Rows) -> None:
    process = start(*ONE, "--fork-function", "tests.broker.command_app:forked", TEST_MIDDLEWARE="forking")
    fork = pid_of(process.wait_for("forked "))
    process.wait_for("a middleware's fork")
    assert pid_of(process.wait_for("quick from the fork")) != fork
    assert process.stop() == 0
    rows.drained()


def test_spawned_processes(start: Any, send: Any) -> None:
    process = start("--processes", "2", "--threads", "1", "--use-spawn")
    process.wait_for("Worker process is ready", count=2)
    send("quick", "one")
    process.wait_for("quick one")
    send("coroutine")
    process.wait_for("coroutine ran")
    assert process.stop() == 0


def test_a_pid_file_and_a_log_file(start: Any, send: Any, tmp_path: Path) -> None:
    pid_file, log_file = tmp_path / "pid", tmp_path / "log"
    process = start(*ONE, "--pid-file", str(pid_file), "--log-file", str(log_file))
    wait_until(pid_file.exists)
    assert int(wait_until(pid_file.read_text)) == process.pid
    send("fail")
    wait_until(lambda: log_file.exists() and "RuntimeError: as told" in log_file.read_text())
    process.signal(signal.SIGHUP)
    wait_until(lambda: log_file.read_text().count("Worker process is ready") == 2, timeout=20)
    assert int(pid_file.read_text()) == process.pid
    assert process.stop() == 0
    assert not pid_file.exists()


def test_without_logging(start: Any, send: Any) -> None:
    process = start(*ONE, "--skip-logging")
    send("quick", "one")
    process.wait_for("quick one")
    assert process.stop() == 0
    assert "[INFO]" not in process.output
    assert "Traceback" not in process.output


def test_the_shutdown_timeout_leaves_what_does_not_end(start: Any, send: Any, rows: Rows, tmp_path: Path) -> None:
    """The actor dies with the process; its message is free at once, for the next worker."""
    process = start(*ONE, "--worker-shutdown-timeout", "300")
    send("until", str(tmp_path / "end"))
    process.wait_for("until begins")
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 10
    assert [m[:3] for m in rows.messages()] == [("until", 1, False)]
    (tmp_path / "end").touch()
    second = start(*ONE)
    second.wait_for("until ends")
    rows.drained()
    assert second.stop() == 0


def test_a_shutdown_reaches_an_actor_that_asked_for_it(start: Any, send: Any, rows: Rows) -> None:
    process = start(*ONE)
    send("notified", "")
    process.wait_for("notified begins")
    assert process.stop() == 0
    assert "notified of the shutdown" in process.output
    assert [(actor, reason) for actor, _, reason, _ in rows.dead_letters()] == [("notified", "rejected")]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def metrics(port: int) -> dict[str, float]:
    """Dramatiq's samples, by name and actor, over all processes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("dramatiq_") and "_bucket" not in line:
            name, _, value = line.rpartition(" ")
            actor = name.partition('actor_name="')[2].partition('"')[0]
            key = f"{name.partition('{')[0]} {actor}"
            found[key] = found.get(key, 0) + float(value)
    return found


def test_prometheus_counts_what_happened(start: Any, send: Any, rows: Rows, tmp_path: Path) -> None:
    port = free_port()
    environment = {
        "dramatiq_prom_port": str(port),
        "dramatiq_prom_host": "127.0.0.1",
        "dramatiq_prom_db": str(tmp_path),
    }
    process = start("--processes", "2", "--threads", "2", TEST_MIDDLEWARE="prometheus", **environment)
    process.wait_for("Fork process 'dramatiq.middleware.prometheus:_run_exposition_server' is ready")
    for n in range(10):
        send("quick", str(n))
    send("quick", "delayed", delay=200)
    send("fail")
    send("nobody")
    end = tmp_path / "end"
    send("until", str(end))
    process.wait_for("until begins")
    wait_until(lambda: [m[0] for m in rows.messages()] == ["until"])
    seen = wait_until(lambda: (found := metrics(port)).get("dramatiq_messages_total fail") == 2 and found)
    assert seen["dramatiq_messages_total quick"] == 11
    assert seen.get("dramatiq_message_errors_total quick", 0) == 0
    assert seen["dramatiq_message_errors_total fail"] == 2
    assert seen["dramatiq_message_retries_total fail"] == 1
    assert seen["dramatiq_message_rejects_total fail"] == 1
    assert seen["dramatiq_message_rejects_total nobody"] == 1
    assert seen["dramatiq_messages_inprogress until"] == 1
    assert seen["dramatiq_messages_inprogress quick"] == seen["dramatiq_messages_inprogress fail"] == 0
    # No message is delayed in a worker's memory.
    assert sum(value for key, value in seen.items() if key.startswith("dramatiq_delayed_messages_inprogress")) == 0
    end.touch()
    rows.drained()
    wait_until(lambda: metrics(port)["dramatiq_messages_inprogress until"] == 0)
    assert process.stop() == 0
