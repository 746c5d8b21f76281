"""What is computed on the spot, and patches: on the engine alone, and on a real database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, date, datetime
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


def test_an_activity_is_the_same_one_when_it_runs_locally(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker]
) -> None:
    calls: list[Any] = []

    @durable.activity(queue_name="steps", retry=durable.RetryPolicy(maximum_attempts=2, initial_interval=0.01))
    def look(when: date) -> Any:
        info = durable.activity_info()
        assert info is not None
        durable.heartbeat({"at": 1})
        calls.append(when)
        if info.attempt == 1:
            raise ValueError("once more")
        left = None if info.deadline is None else round((info.deadline - datetime.now(UTC)).total_seconds())
        return [info.workflow_id, info.activity, info.attempt, info.headers, left, info.is_last_attempt]

    @durable.activity(queue_name="steps", max_retries=0)
    def refused(how: str) -> None:
        if how == "later":
            durable.complete_later()
        else:
            with durable.transaction():
                pass

    @durable.workflow(queue_name="runs")
    async def order() -> list[Any]:
        seen: list[Any] = []
        for local in (False, True):
            here = look.options(local=local, start_to_close=60, headers={"a": 1})
            seen.append(await here.execute(date(2026, 1, 1)))
            try:
                await here.execute("soon")  # type: ignore[arg-type]
            except durable.ActivityFailed as e:
                seen.append([e.type, e.attempt, e.retryable])
        for how in ("later", "transaction"):
            try:
                await refused.options(local=True).execute(how)
            except durable.ActivityFailed as e:
                seen.append([e.type, "without local=True" in e.message])
        return seen

    start_worker()
    handle = order.options(workflow_id="o").start()
    one = [["o", "look", 2, {"a": 1}, 60, True], ["NotDecodable", 1, False]]
    assert handle.result(timeout=30) == [*one, *one, ["DurableError", True], ["DurableError", True]]
    assert calls == [date(2026, 1, 1)] * 4
    assert durable.activity_info() is None


def test_the_result_behind_an_id_is_typed_where_the_workflow_is_known(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker], database_url: str
) -> None:
    @durable.workflow(queue_name="runs")
    async def when() -> date:
        return date(2026, 1, 1)

    start_worker()
    run_id = when.options(workflow_id="w").start().run_id
    for handle in (durable.get_handle("w"), durable.get_handle(run_id=run_id)):
        assert handle.result(timeout=30) == date(2026, 1, 1)
    other = durable.DurableBroker(database_url)
    assert durable.get_handle("w", broker=other).result() == "2026-01-01"
    other.close()
