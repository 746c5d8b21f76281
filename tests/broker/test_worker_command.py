"""The unmodified `dramatiq` command on a DurableBroker."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Rows

MODULE = "tests.broker.actors_for_process:broker"


@pytest.fixture
def stubs(broker: durable.DurableBroker) -> Any:
    """The actors of the module, as somebody else's process sees them."""

    def stub(name: str, queue_name: str = "default") -> Any:
        return dramatiq.actor(lambda *a: None, actor_name=name, queue_name=queue_name, broker=broker)

    class Stubs:
        quick = stub("quick")
        other = stub("other", "other")
        until = stub("until")

    return Stubs


@pytest.fixture
def start(run_process: Any, database_url: str) -> Callable[..., Any]:
    def start(*arguments: str, **env: str) -> Any:
        return run_process.dramatiq(MODULE, *arguments, env={"TEST_URL": database_url, **env})

    return start


def ran(process: Any, name: str) -> list[int]:
    words = [line.split() for line in process.output.splitlines() if line.startswith(name + " ")]
    return sorted(int(w[1]) for w in words)


def test_several_processes_share_the_work(start: Any, broker: durable.DurableBroker, stubs: Any, rows: Rows) -> None:
    broker.enqueue_many([stubs.quick.message(n) for n in range(200)])
    process = start("--processes", "2", "--threads", "2")
    rows.drained(timeout=30)
    wait_until(lambda: rows("SELECT count(*) FROM durable.worker") == [(2,)])
    stubs.other.send(1)
    process.wait_for("other 1")
    assert process.stop() == 0
    assert ran(process, "quick") == list(range(200))
    assert "Traceback" not in process.output
    assert rows("SELECT count(*) FROM durable.worker") == [(0,)]  # they said good-bye


def test_only_the_named_queues(start: Any, broker: durable.DurableBroker, stubs: Any, rows: Rows) -> None:
    stubs.quick.send(1)
    stubs.other.send(2)
    process = start("--processes", "1", "--queues", "other")
    process.wait_for("other 2")
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("quick", 1, False)])
    assert process.stop() == 0
    assert ran(process, "quick") == []


def test_a_term_hands_prefetched_messages_back_at_once(
    start: Any, broker: durable.DurableBroker, stubs: Any, rows: Rows, tmp_path: Path
) -> None:
    """While a long actor is still running on the only thread, the others' messages are free for other workers."""
    process = start("--processes", "1", "--threads", "1")
    broker.enqueue_many([stubs.quick.message(n) for n in range(300)])  # makes it claim ahead
    end = tmp_path / "end"
    broker.enqueue_many([stubs.until.message(str(end)), *(stubs.quick.message(1000 + n) for n in range(50))])
    process.wait_for("until begins")
    process.signal(signal.SIGTERM)
    sent = time.monotonic()
    wait_until(lambda: sorted(m[2] for m in rows.messages()) == [False] * 50 + [True], timeout=10)
    assert time.monotonic() - sent < 5
    assert "until ends" not in process.output
    assert all(attempt == 1 for _, attempt, _, _ in rows.messages())
    end.touch()
    assert process.wait() == 0
    assert "until ends" in process.output
    assert [m[:3] for m in rows.messages()] == [("quick", 1, False)] * 50
    assert not any(n >= 1000 for n in ran(process, "quick"))


def test_the_messages_of_a_killed_process_are_run_by_another(
    start: Any, broker: durable.DurableBroker, stubs: Any, rows: Rows, tmp_path: Path
) -> None:
    first = start("--processes", "1", "--threads", "1", TEST_RECLAIM_DELAY="1s")
    stubs.until.send(str(tmp_path / "end"))
    first.wait_for("until begins")
    first.kill()
    (tmp_path / "end").touch()
    second = start("--processes", "1", "--threads", "1", TEST_RECLAIM_DELAY="1s")
    second.wait_for("until ends")
    second.wait_for("handed 1 of its messages back")
    rows.drained()
    assert second.stop() == 0


def test_a_stopped_worker_is_refused_when_it_goes_on(
    start: Any, broker: durable.DurableBroker, stubs: Any, rows: Rows, tmp_path: Path
) -> None:
    """SIGSTOP for longer than the reclaim delay: another worker runs the message; the first one learns that it may no
    longer answer for it, and registers again."""
    end = tmp_path / "end"
    frozen = start("--processes", "1", "--threads", "1", TEST_RECLAIM_DELAY="1s")
    stubs.until.send(str(end))
    frozen.wait_for("until begins")
    frozen.signal(signal.SIGSTOP, group=True)
    try:
        other = start("--processes", "1", "--threads", "1", TEST_RECLAIM_DELAY="1s")
        other.wait_for("until begins")
        end.touch()
        other.wait_for("until ends")
        rows.drained()
    finally:
        frozen.signal(signal.SIGCONT, group=True)
    frozen.wait_for("declared dead")
    frozen.wait_for("the lease on until")
    wait_until(lambda: rows("SELECT count(*) FROM durable.worker") == [(2,)])
    assert other.stop() == 0
    stubs.quick.send(7)
    frozen.wait_for("quick 7")
    assert frozen.stop() == 0
    assert rows.dead_letters() == []


def test_a_wrong_database_ends_the_worker_with_a_message(run_process: Any, empty_database_url: str) -> None:
    process = run_process.dramatiq("--processes", "1", MODULE, env={"TEST_URL": empty_database_url})
    process.wait_for("dramatiq-durable migrate")
    process.stop()


def test_a_module_that_is_missing_ends_the_worker_with_a_message(run_process: Any, tmp_path: Path) -> None:
    (tmp_path / "broken_shop.py").write_text("import nothing_of_that_name\n")
    environment = {"DRAMATIQ_DURABLE_URL": "postgresql://localhost:1/x", "DRAMATIQ_DURABLE_IMPORT": "shop_x.orders"}
    command = ("dramatiq_durable.app", "--processes", "1", "--path", str(tmp_path))
    process = run_process.dramatiq(*command, env=environment)
    process.wait_for("DRAMATIQ_DURABLE_IMPORT names shop_x.orders, and there is no module shop_x")
    assert process.wait() != 0
    # One that is there, and lacks another, says what it lacks.
    process = run_process.dramatiq(*command, env={**environment, "DRAMATIQ_DURABLE_IMPORT": "broken_shop"})
    process.wait_for("No module named 'nothing_of_that_name'")
    assert process.wait() != 0
    assert "names broken_shop" not in process.output
