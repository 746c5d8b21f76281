"""Workers that are killed while updates, signals and queries are under way."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.waiting import assert_nothing_is_lost

Start = Callable[[], Any]


@pytest.fixture
def ledger(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application's workflow, as a client has it: this process runs no worker."""
    before = dramatiq.broker.global_broker
    monkeypatch.setenv("TEST_URL", database_url)
    sys.modules.pop("tests.workflow.messages_application", None)
    application = importlib.import_module("tests.workflow.messages_application")
    yield application.ledger
    dramatiq.broker.global_broker = before
    application.broker.close()


@pytest.fixture
def worker(run_process: Any, database_url: str) -> Start:
    def start() -> Any:
        process = run_process.dramatiq(
            *("tests.workflow.messages_application:broker", "--processes", "1", "--threads", "4"),
            env={"TEST_URL": database_url, "dramatiq_worker_timeout": "200"},
        )
        process.wait_for("Worker process is ready")
        return process

    return start


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def test_an_update_survives_its_worker_between_acceptance_and_completion(
    ledger: Any, worker: Start, tmp_path: Path
) -> None:
    process = worker()
    handle = ledger.start(str(tmp_path))
    update = handle.update("pass_gate", "first", update_id="g", wait="accepted", timeout=20)
    wait_until(lambda: (tmp_path / "first-begun").exists(), message="its activity has begun")
    process.kill()
    with pytest.raises(durable.QueryTimedOut):
        handle.query("entries", timeout=0.3)
    with ThreadPoolExecutor() as pool:
        entered = pool.submit(handle.update, "enter", "while nobody was there", update_id="e", timeout=60)
        wait_until(lambda: "UpdateAccepted" in types(handle), message="it is recorded")
        worker()
        assert entered.result() == 1
    (tmp_path / "open").touch()
    assert update.result(timeout=60) == "passed as first"
    assert handle.update("pass_gate", "first", update_id="g", timeout=10) == "passed as first"
    assert handle.query("entries", timeout=20) == ["while nobody was there"]
    handle.signal("end")
    assert handle.result(timeout=20) == ["while nobody was there"]
    assert types(handle).count("UpdateAccepted") == types(handle).count("UpdateCompleted") == 2


def test_updates_signals_and_queries_while_workers_die(
    ledger: Any, worker: Start, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "open").touch()
    handle = ledger.start(str(tmp_path))
    processes = [worker(), worker()]
    counts: list[Any] = []
    gates: list[Any] = []
    with ThreadPoolExecutor(16) as pool:
        for wave in range(4):
            for n in range(10 * wave, 10 * wave + 10):
                counts.append(pool.submit(handle.update, "enter", f"e{n}", update_id=f"e{n}", timeout=120))
            for n in range(3 * wave, 3 * wave + 3):
                gates.append(pool.submit(handle.update, "pass_gate", f"g{n}", update_id=f"g{n}", timeout=120))
                handle.signal("note", f"n{n}", id=f"n{n}")
            wait_until(lambda: any(c.done() for c in counts[-10:]), timeout=60, message="the wave is under way")
            processes.pop(0).kill()
            processes.append(worker())
            assert_nothing_is_lost(database_url)
        assert [g.result() for g in gates] == [f"passed as g{n}" for n in range(12)]
        answers = [c.result() for c in counts]
    entries = handle.query("entries", timeout=60)
    assert sorted(entries) == sorted([f"e{n}" for n in range(40)] + [f"n{n}" for n in range(12)])
    assert [e for e in entries if e.startswith("n")] == [f"n{n}" for n in range(12)]
    assert [entries[place - 1] for place in answers] == [f"e{n}" for n in range(40)]
    with pytest.raises(durable.UpdateRejected, match="it is there already"):
        handle.update("enter", "e0", timeout=60)
    handle.signal("end")
    assert handle.result(timeout=60) == entries
    assert types(handle).count("UpdateCompleted") == 52
    assert handle.query("entries", timeout=60) == entries
