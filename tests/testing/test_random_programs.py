"""Random workflows: dropped from memory at any event, and killed at any moment, they do what they do undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.migrate import migrate
from dramatiq_durable.testing import Environment, Replayer
from dramatiq_durable.testing.runs import Run
from dramatiq_durable.workflow.events import INPUT_TYPES, MESSAGE_TYPES, Event
from tests.histories.record import exported
from tests.support import ROOT
from tests.support.processes import Processes
from tests.support.waiting import nothing_lost

from . import features, programs
from .test_replayer import durable_broker

ENDED_FROM_OUTSIDE = ("WorkflowTerminated", "WorkflowTimedOut")


class Evicting(Environment):
    """Drops runs from memory: the run of a number, or all of them, when they wait after a number of steps."""

    def __init__(self, at: int | None, **options: Any) -> None:
        super().__init__(**options)
        self.now_ms = 1_800_000_000_000
        self._at = at
        self.steps = 0

    def stepped(self, run: Run) -> None:
        self.steps += 1
        if self._at in (0, self.steps) and run.status == "running":
            run.reload()

    def histories(self) -> list[list[Event]]:
        """Of all runs; without tracebacks, which name the engine's lines."""
        return [[_bare(event) for event in run.history] for run in self._runs.values()]


def _bare(event: Event) -> Event:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k != "traceback"}
        return value

    return event._replace(attributes=bare(event.attributes))


def play(seed: int, at: int | None) -> Evicting:
    """Run a program, dropping runs at one step (counted from 1), at each of them (0), or never."""
    workflow = programs.declare(durable_broker(), 1.0)

    with Evicting(at, mocks=features.mocks(lambda: env), replay=at is None) as env:
        handle = env.start(workflow, programs.generate(seed))
        with contextlib.suppress(durable.WorkflowFailed):
            handle.result()
        env.advance("1 hour")
    return env


def replay_in_parts(run: Run, source: random.Random) -> None:
    """Replay a history as a worker does that takes turns with others: what is new, from time to time."""
    execution, history = run.fresh(), [e for e in run.history if e.type not in ENDED_FROM_OUTSIDE]
    whole = 0
    for number, event in enumerate(history):
        # Steps begin with what comes in; what is said to the code may have come with what was before it.
        if event.type in INPUT_TYPES and event.type not in MESSAGE_TYPES and source.random() < 0.3:
            execution.replay(history[whole:number])
            whole = number
    execution.replay(history[whole:])
    execution.evict()


def check(seed: int, points: int | None) -> None:
    undisturbed = play(seed, None)
    for run in filter(lambda run: run.begun, undisturbed._runs.values()):
        replay_in_parts(run, random.Random(seed))
    expected = undisturbed.histories()
    assert play(seed, None).histories() == expected  # the environment itself is deterministic
    assert play(seed, 0).histories() == expected
    steps = list(range(1, undisturbed.steps + 1))
    if points is not None and len(steps) > points:
        steps = sorted(random.Random(seed).sample(steps, points))
    for at in steps:
        assert play(seed, at).histories() == expected, f"evicted after step {at}"


@pytest.mark.parametrize("seed", range(12))
def test_evicted_anywhere_it_goes_on_alike(seed: int) -> None:
    check(seed, points=8)


@pytest.mark.soak
def test_evicted_anywhere_for_long() -> None:
    for seed in range(100, 400):
        check(seed, points=None)


def test_the_programs_are_worth_it() -> None:
    """All kinds of events come up in what the default suite plays."""
    types = {event.type for seed in range(12) for history in play(seed, None).histories() for event in history}
    assert types >= {
        "ActivityScheduled", "ActivityCompleted", "ActivityFailed", "ActivityCancelled", "TimerStarted", "TimerFired",
        "TimerCancelled", "SignalReceived", "ChildStarted", "ChildCompleted", "ChildFailed", "LocalActivityCompleted",
        "SideEffectRecorded", "WorkflowCompleted", "WorkflowFailed",
    }  # fmt: skip


# --- workers that are killed ----------------------------------------------------------------------------------

PACE = 0.02

WORKER = f"""
import dramatiq
import dramatiq_durable as durable
from tests.testing import programs

broker = durable.DurableBroker(reclaim_delay=1, reclaim_count=1000, codecs=[programs.Zipped()])
dramatiq.set_broker(broker)
programs.declare(broker, {PACE})
"""


def outcome_of(handle: durable.WorkflowHandle[Any], timeout: float) -> Any:
    try:
        return json.loads(json.dumps(handle.result(timeout=timeout)))
    except durable.WorkflowFailed as e:
        return e.type


def killed(
    run_process: Processes,
    database_url: str,
    tmp_path: Any,
    seeds: range,
    harms: list[str],
    workers: int = 1,
    server: embedded.Server | None = None,
) -> None:
    """Run programs on workers, and harm one of those from time to time: kill it, or stop it for longer than its leases
    last (and maybe kill the server meanwhile); or stop them all again and again, for moments."""
    (tmp_path / "killed_worker.py").write_text(WORKER)
    environment = {
        "DRAMATIQ_DURABLE_URL": database_url,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }

    def start() -> Any:
        return run_process.dramatiq("killed_worker:broker", "--processes", "1", "--threads", "4", env=environment)

    broker = durable.DurableBroker(database_url, codecs=[programs.Zipped()])
    with contextlib.closing(broker), nothing_lost(database_url):
        workflow = programs.declare(broker, PACE)
        running = [start() for _ in range(workers)]
        handles = {seed: workflow.start(programs.generate(seed, races=seed % 2 == 0)) for seed in seeds}
        source = random.Random(seeds.start)
        for harm in harms:
            # Harmed in the middle of something: once more has happened, or at the latest after a while.
            _until_more(handles, source.randint(1, 30))
            one = source.randrange(workers)
            if harm == "kill":
                running[one].kill()
                running[one] = start()
                continue
            if harm == "falter":
                _falter(running, source)
                continue
            running[one].signal(signal.SIGSTOP, group=True)
            if harm == "restart":
                assert server is not None
                server.restart("immediate")
            # Nobody tells when leases have run out: one second, and twice the rest until somebody has looked.
            time.sleep(source.uniform(0.5, 3))
            running[one].signal(signal.SIGCONT, group=True)
        replayer = Replayer(list(broker.workflows.values()))
        for seed, handle in handles.items():
            outcome = outcome_of(handle, 60)
            if seed % 2:  # without races, the clock has no say in it
                assert outcome == outcome_of(replay_of(seed), 1), f"seed {seed}, run {handle.run_id}"
            answered = [(e.type, e.attributes.get("seq")) for e in handle.history() if e.type == "ActivityCompleted"]
            assert len(answered) == len(set(answered))
        for run in durable.list_workflows(limit=10_000, broker=broker):
            handle = durable.get_handle(run_id=run.run_id, broker=broker)
            if run.status not in ("terminated", "timed_out", "running"):
                replayer.replay(exported(broker, handle))
        for worker in running:
            worker.stop()


def _falter(workers: list[Any], source: random.Random) -> None:
    """For a second, stop one or the other for some milliseconds: they take turns at what they would do at once."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        one = source.choice(workers)
        one.signal(signal.SIGSTOP, group=True)
        time.sleep(source.uniform(0.005, 0.1))
        one.signal(signal.SIGCONT, group=True)
        time.sleep(source.uniform(0, 0.05))


def _until_more(handles: dict[int, Any], number: int) -> None:
    length = number + sum(handle.describe().history_length for handle in handles.values())
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        described = [handle.describe() for handle in handles.values()]
        if sum(d.history_length for d in described) >= length or all(d.status != "running" for d in described):
            return
        time.sleep(0.01)


def replay_of(seed: int) -> Any:
    """The handle of the same program's run in an environment."""
    workflow = programs.declare(durable_broker(), PACE)

    env = Environment(mocks=features.mocks(lambda: env))
    return env.start(workflow, programs.generate(seed, races=False))


@pytest.mark.timeout(180)
def test_killed_at_random_events(run_process: Processes, database_url: str, tmp_path: Any) -> None:
    killed(run_process, database_url, tmp_path, range(12), 3 * ["kill"])


@pytest.mark.soak
def test_killed_at_random_events_for_long(run_process: Processes, database_url: str, tmp_path: Any) -> None:
    killed(run_process, database_url, tmp_path, range(1000, 1200), 100 * ["kill"])


@pytest.mark.timeout(180)
def test_two_workers_one_or_the_other_killed_or_stopped(
    run_process: Processes, database_url: str, tmp_path: Any
) -> None:
    harms = ["kill", "falter", "freeze", "falter", "kill"]
    killed(run_process, database_url, tmp_path, range(20, 40), harms, workers=2)


@pytest.mark.timeout(180)
def test_two_workers_on_a_server_that_is_killed(
    run_process: Processes, own_server: embedded.Server, tmp_path: Any
) -> None:
    migrate(own_server.url)
    killed(run_process, own_server.url, tmp_path, range(40, 48), ["restart", "freeze", "restart"], 2, own_server)


@pytest.mark.soak
def test_two_workers_for_long(run_process: Processes, database_url: str, tmp_path: Any) -> None:
    harms = 50 * ["kill", "falter", "freeze", "falter"]
    killed(run_process, database_url, tmp_path, range(2000, 2200), harms, workers=2)
