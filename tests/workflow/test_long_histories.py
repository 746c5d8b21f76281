"""Runs with histories of ten thousand events: they go on as fast as short ones, from memory and after a load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer
from dramatiq_durable.workflow.events import Event
from dramatiq_durable.workflow.replay import Execution
from tests.support import ROOT, wait_until
from tests.support.processes import Process, Processes
from tests.test_cli_commands import run
from tests.workflow import long_application as application
from tests.workflow.test_two_workers import brokers, start

__all__ = ["brokers"]

StartWorker = Callable[..., dramatiq.Worker]

#: Which workflow, of how many, and its result.
LONG = {
    "loop": (4_999, 4_999 * 4_998),
    "wide": (1_000, 1_000 * 999),
    "hear": (5_000, 5_000 * 4_999 // 2),
    "mixed": (1_000, 2 * 1_000 * 999 // 2),
    "mixed_wide": (1_000, 2 * 1_000 * 999 // 2),
}

WORKER = """
import dramatiq
import dramatiq_durable as durable
from tests.workflow import long_application

broker = durable.DurableBroker(reclaim_delay=1, reclaim_count=1000)
dramatiq.set_broker(broker)
long_application.declare(broker)
"""


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many events were replayed, each time."""
    counts: list[int] = []
    replay = Execution.replay

    def counted(execution: Execution, history: Iterable[Event], **options: Any) -> None:
        history = list(history)
        counts.append(len(history))
        replay(execution, history, **options)

    monkeypatch.setattr(Execution, "replay", counted)
    return counts


def begin(broker: durable.DurableBroker, name: str) -> durable.WorkflowHandle[Any]:
    number, _ = LONG[name]
    handle: durable.WorkflowHandle[Any] = broker.workflows[name].start(number)
    if name in ("hear", "mixed"):
        for each in range(number):
            handle.signal("said", each)
    return handle


@pytest.mark.parametrize("name", LONG)
def test_dropped_from_memory_on_its_way_it_goes_on(
    broker: durable.DurableBroker, start_worker: StartWorker, replayed: list[int], name: str
) -> None:
    application.declare(broker)
    handle = begin(broker, name)
    start_worker()
    number, result = LONG[name]
    for part in (1, 2, 3):
        wait_until(
            lambda part=part: handle.describe().history_length > part * number // 2 or handle.status() != "running"
        )
        broker.runner.cache.clear()
    assert handle.result(timeout=60) == result
    history = handle.history()
    assert [event.event_id for event in history] == list(range(1, len(history) + 1))
    assert len(history) == handle.describe().history_length >= 2_000
    assert sum(replayed) < 10 * len(history)
    Replayer([broker.workflows[name]]).replay(handle.export())


def test_two_workers_that_take_turns_replay_each_other_s_steps_only(
    brokers: list[durable.DurableBroker], replayed: list[int]
) -> None:
    for broker in brokers:
        application.declare(broker)
    with ExitStack() as stack:
        start(brokers, stack)
        handles = [brokers[0].workflows["mixed"].start(300) for _ in range(2)]
        for number in range(300):
            for handle in handles:
                handle.signal("said", number)
        assert [handle.result(timeout=60) for handle in handles] == [300 * 299] * 2
    length = sum(handle.describe().history_length for handle in handles)
    assert length >= 2 * 300 * 5
    assert sum(replayed) < 60 * length


@pytest.mark.timeout(120)
def test_workers_that_are_killed(run_process: Processes, database_url: str, tmp_path: Any) -> None:
    (tmp_path / "long_worker.py").write_text(WORKER)
    environment = {
        "DRAMATIQ_DURABLE_URL": database_url,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }

    def begin_worker() -> Process:
        return run_process.dramatiq("long_worker:broker", "--processes", "1", "--threads", "4", env=environment)

    workers = [begin_worker() for _ in range(2)]
    broker = durable.DurableBroker(database_url)
    try:
        application.declare(broker)
        handles = {name: begin(broker, name) for name in ("loop", "wide", "mixed_wide")}
        for part in (1, 2, 3, 4):
            wait_until(
                lambda part=part: any(
                    handle.describe().history_length > part * LONG[name][0] // 3 or handle.status() != "running"
                    for name, handle in handles.items()
                ),
                timeout=30,
            )
            workers[part % 2].kill()
            workers[part % 2] = begin_worker()
        for name, handle in handles.items():
            assert handle.result(timeout=90) == LONG[name][1]
            Replayer([broker.workflows[name]]).replay(handle.export())
            shown = run(database_url, "workflow", "show", "--run-id", handle.run_id)
            assert str(handle.describe().history_length) in shown.output
            listed = json.loads(run(database_url, "workflow", "history", "--run-id", handle.run_id, "--json").output)
            assert len(listed) == handle.describe().history_length
    finally:
        broker.close()
