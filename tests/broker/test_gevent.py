"""The real `dramatiq-gevent` command: every thread is a greenlet of one thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable

from .conftest import Rows


@pytest.fixture
def actors(broker: durable.DurableBroker) -> Callable[[str], Any]:
    """The actors of the module, as somebody else's process sees them."""
    return lambda name: dramatiq.actor(lambda *a: None, actor_name=name, broker=broker)


@pytest.fixture
def process(run_process: Any, database_url: str) -> Any:
    command = (sys.executable, Path(sys.executable).parent / "dramatiq-gevent", "tests.broker.command_app:broker")
    process = run_process(*command, "--processes", "1", "--threads", "100", env={"TEST_URL": database_url})
    process.wait_for("Worker process is ready")
    return process


def test_many_sleeping_actors_at_once(process: Any, broker: durable.DurableBroker, actors: Any, rows: Rows) -> None:
    actors("threads").send()
    process.wait_for("gevent.hub")
    nap = actors("nap")
    began = time.monotonic()
    broker.enqueue_many([nap.message(1) for _ in range(100)])
    rows.drained()
    assert time.monotonic() - began < 10  # one after the other they take 100 s
    assert process.output.count("napped") == 100
    quick = actors("quick")
    broker.enqueue_many([quick.message(str(n)) for n in range(500)])
    rows.drained()
    assert process.stop() == 0
    assert "Traceback" not in process.output
    assert rows("SELECT count(*) FROM durable.worker") == [(0,)]


def test_greenlets_are_interrupted(process: Any, actors: Any, rows: Rows) -> None:
    actors("limited").send()
    process.wait_for("over the limit")
    actors("notified").send("")
    process.wait_for("notified begins")
    assert process.stop() == 0
    assert "notified of the shutdown" in process.output
    assert sorted(d[0] for d in rows.dead_letters()) == ["limited", "notified"]
    assert rows.count() == 0


def test_actors_send_retry_and_await(process: Any, actors: Any, rows: Rows) -> None:
    actors("coroutine").send()
    process.wait_for("coroutine ran")
    actors("fail").send()
    actors("passes_on").send("from a greenlet")
    process.wait_for("quick from a greenlet")
    rows.drained()
    assert [(d[0], d[1]) for d in rows.dead_letters()] == [("fail", 2)]
    assert process.stop() == 0
