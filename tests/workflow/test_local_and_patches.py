"""What is computed on the spot, and patches: on the engine alone, and on a real database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from test_engine_support import Run, echo

import dramatiq_durable as durable
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.computing import computed

StartWorker = Callable[..., dramatiq.Worker]


def compute(run: Run) -> None:
    """Answer what the code asked to have computed, as the runner does."""
    while asked := run.execution.computations():
        for command in asked:
            answer = computed(command)
            run.send(answer.type, answer.seq, name=answer.name, payload=answer.payload, attributes=answer.attributes)


def test_side_effect_is_called_once_and_replayed() -> None:
    calls: list[int] = []

    def roll() -> int:
        calls.append(1)
        return 4

    async def f() -> int:
        first = await durable.side_effect(roll)
        await echo.execute(first)
        return first

    run = Run(f)
    compute(run)
    run.finish()
    assert run.result == 4
    run.replayed()
    assert len(calls) == 1
    assert [e.type for e in run.history] == [
        "WorkflowStarted",
        "SideEffectRecorded",
        "ActivityScheduled",
        "ActivityCompleted",
        "WorkflowCompleted",
    ]


def test_what_was_computed_must_be_asked_for_again() -> None:
    async def f() -> int:
        return await durable.local(int, "4")

    async def other() -> int:
        return await durable.local(int, "5")

    async def none() -> int:
        return int(await echo.execute(4))

    run = Run(f)
    compute(run)
    assert run.result == 4
    for changed in (other, none):
        with pytest.raises(durable.Nondeterminism):
            run.replayed(changed)


def test_an_unanswered_computation_is_asked_for_after_replay() -> None:
    async def f() -> int:
        return await durable.side_effect(lambda: 7)

    run = Run(f)
    again = run.replayed()
    assert [c.seq for c in again.computations()] == [1]
    assert again.computations() == []


def test_local_failures_reach_the_code() -> None:
    def boom() -> None:
        raise KeyError("no")

    async def f() -> str:
        try:
            await durable.local(boom)
        except durable.ActivityFailed as e:
            return f"{e.type} {e.activity}"
        return "?"

    run = Run(f)
    compute(run)
    assert run.result == "KeyError boom"


def test_patches_are_remembered_by_id() -> None:
    async def before() -> str:
        await echo.execute(1)
        await echo.execute(2)
        return "old"

    async def patched() -> str:
        await echo.execute(1)
        kept = [durable.patched("p"), durable.patched("p")]
        await echo.execute(2)
        kept.append(durable.patched("p"))
        return f"{kept}"

    async def deprecated() -> str:
        await echo.execute(1)
        durable.deprecate_patch("p")
        await echo.execute(2)
        return "new"

    old = Run(before)
    old.complete(1)
    old.complete(2)
    old.replayed(patched)  # a run from before the patch follows the old code
    under_way = Run(before)
    under_way.complete(1)
    moved = under_way.replayed(patched)
    step = moved.step(events.Event(0, events.ACTIVITY_COMPLETED, 1, 2, None, b"2"))
    assert step.events[-1].payload == b'"[False, False, False]"'

    new = Run(patched)
    new.finish()
    assert new.result == "[True, True, True]"
    assert [e.type for e in new.history].count("PatchRecorded") == 1
    new.replayed(patched)
    with pytest.raises(durable.Nondeterminism, match="PatchRecorded 'p'"):
        new.replayed(before)


def test_deprecated_patches_replay_with_and_without_their_event() -> None:
    async def patched() -> None:
        await echo.execute(1)
        durable.patched("p")
        await echo.execute(2)

    async def deprecated() -> None:
        await echo.execute(1)
        durable.deprecate_patch("p")
        await echo.execute(2)

    run = Run(patched)
    run.finish()
    assert run.replayed(deprecated).closed
    clean = Run(deprecated)
    clean.finish()
    assert "PatchRecorded" not in [e.type for e in clean.history]
    assert clean.replayed(deprecated).closed


def test_local_between_activities(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    threads: list[str] = []

    @durable.activity
    def one() -> int:
        return 1

    def add(a: int, b: int) -> int:
        threads.append(threading.current_thread().name)
        return a + b

    async def slowly(a: int) -> int:
        return a * 10

    @durable.workflow
    async def mixed() -> dict[str, Any]:
        n = await one.execute()
        n = await durable.local(add, n, 2)
        n = await durable.local(slowly, n)
        drawn = await durable.side_effect(lambda: {"n": 1})
        n += await one.execute()
        return {"n": n, "drawn": drawn}

    start_worker()
    handle = mixed.start()
    assert handle.result(timeout=10) == {"n": 31, "drawn": {"n": 1}}
    assert len(threads) == 1
    kinds = [e.type for e in handle.history()]
    assert kinds.count("LocalActivityCompleted") == 2
    assert kinds.count("SideEffectRecorded") == 1
    assert mixed.start().result(timeout=10)["n"] == 31
