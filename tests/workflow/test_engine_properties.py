"""Whatever a workflow does with asyncio, its commands are a function of its events: on replay, after being dropped from
memory at any time, in another process, with another hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workflow import programs
from tests.workflow.test_engine_support import Run

ROOT = Path(__file__).parents[2]

#: Tasks whose failure nobody asked for are the programs' own; asyncio says so once they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), depth=st.integers(1, 4))
def test_replay_gives_the_same_commands(rng: Any, depth: int) -> None:
    driven = programs.live(programs.make(rng, depth), rng)
    execution = driven.replayed()
    assert execution.last_event_id == driven.execution.last_event_id == len(driven.history)
    assert execution.closed == driven.execution.closed
    assert execution.loop.now_ms == driven.execution.loop.now_ms
    execution.evict()
    driven.execution.evict()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9))
def test_a_run_that_is_dropped_before_every_event_has_the_same_history(seed: int) -> None:
    import random

    def drop(driven: Run) -> None:
        driven.execution.evict()
        driven.execution = driven.replayed()

    rng = random.Random(seed)
    program = programs.make(rng)
    histories = []
    for between in (lambda driven: None, drop):
        driven = programs.live(program, random.Random(seed), between)
        driven.execution.evict()
        histories.append(driven.history)
    assert histories[0] == histories[1]


def digests(seed: str, python: str = sys.executable) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [python, "-W", "ignore", "-m", "tests.workflow.programs", "0", "150"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 150
    return done.stdout


def test_processes_with_other_hash_seeds_make_the_same_histories() -> None:
    assert digests("1") == digests("2")
