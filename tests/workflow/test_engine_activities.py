"""Activities on the engine alone: options in the history, cancels by policy, local attempts, and the replay of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dramatiq.middleware import Retries
from test_engine_support import Run, WorkflowBroker, echo

import dramatiq_durable as durable
from dramatiq_durable.workflow import events, inside
from dramatiq_durable.workflow.activities import activity
from dramatiq_durable.workflow.computing import computed

broker = WorkflowBroker(middleware=[Retries()])
policy = durable.RetryPolicy(initial_interval=2, backoff_coefficient=3, maximum_attempts=3)


class Later(Exception):
    next_retry_delay = "1 minute"


@activity(broker=broker, retry=policy, schedule_to_close="1 hour")
def limited(n: int = 0) -> int:
    return n


@activity(broker=broker, max_retries=2, min_backoff=100, max_backoff=1000, start_to_close=5)
def by_options() -> None: ...


@activity(broker=broker, retry=policy)
def flaky(n: int = 0) -> int:
    raise Later


def compute(run: Run) -> None:
    """Answer what the code asked to have computed now, as the runner does."""
    for command in run.execution.computations():
        answer = computed(command)
        run.send(answer.type, answer.seq, name=answer.name, payload=answer.payload, attributes=answer.attributes)


def test_limits_and_policies_are_facts_of_the_event() -> None:
    async def f() -> None:
        limited.start(1)
        by_options.start()

    run = Run(f)
    first, second = [e.attributes or {} for e in run.history if e.type == events.ACTIVITY_SCHEDULED]
    tried = {"initial": 2000, "coefficient": 3, "maximum": None, "attempts": 3}
    assert first["options"] == {
        "durable_retry": {**tried, "non_retryable": []},
        "durable_limits": {"schedule_to_close": 3_600_000, "retry": tried},
    }
    assert second["options"] == {
        "durable_limits": {
            "start_to_close": 5000,
            "retry": {"initial": 100, "coefficient": 2, "maximum": 1000, "attempts": 3},
        }
    }
    # A plain message has the policy, and not the limits, which are a run's.
    assert limited.message(1).options == {"durable_retry": {**tried, "non_retryable": []}}


def test_limits_of_running_runs_may_be_changed() -> None:
    async def f() -> Any:
        return await limited.execute(1)

    async def changed() -> Any:
        return await limited.options(schedule_to_close=None, retry=None, heartbeat=3).execute(1)

    run = Run(f)
    run.complete(1, 1)
    assert run.replayed(changed).closed


def test_a_time_out_reaches_the_code() -> None:
    async def f() -> Any:
        try:
            await limited.execute(1)
        except durable.ActivityFailed as e:
            return [e.type, e.timeout, e.attempt, e.__cause__ and str(e.__cause__)]

    run = Run(f)
    failure = {
        "type": "Timeout",
        "message": "schedule_to_close: ...",
        "timeout": "schedule_to_close",
        "attempt": 2,
        "cause": {"type": "ValueError", "message": "boom"},
    }
    run.send(events.ACTIVITY_TIMED_OUT, 1, attributes={"failure": failure})
    assert run.result == ["Timeout", "schedule_to_close", 2, "ValueError: boom"]
    run.replayed()


@pytest.mark.parametrize("cancelled", [True, False])
def test_wait_ends_with_the_outcome(cancelled: bool) -> None:
    async def f() -> Any:
        handle = limited.options(cancellation="wait").start(1)
        await durable.sleep(1)
        handle.cancel()
        try:
            return await handle
        except asyncio.CancelledError:
            return "cancelled"

    run = Run(f)
    run.fire(2)
    assert run.types == [events.ACTIVITY_CANCEL_REQUESTED]
    if cancelled:
        run.fail(1, "ActivityCancelled")
    else:
        run.complete(1, "all the same")
    assert run.result == ("cancelled" if cancelled else "all the same")
    run.replayed()
    types = [e.type for e in run.history]
    assert (events.ACTIVITY_CANCEL_CONFIRMED in types) == cancelled
    # Before it had a name of its own, it was recorded as a failure.
    run.history = [e._replace(type=e.type.replace("CancelConfirmed", "Failed")) for e in run.history]
    run.replayed()


def test_local_attempts_and_the_timers_between_them() -> None:
    async def f() -> Any:
        try:
            await flaky.options(local=True).execute()
        except durable.ActivityFailed as e:
            return [e.type, e.attempt, e.retryable]

    run = Run(f)
    for _ in range(3):
        compute(run)
        run.replayed()
        for timer in [c for c in run.open_commands() if c.event_type == events.TIMER_STARTED]:
            # What the exception asks for comes before what the policy says.
            assert timer.attributes() == {"ms": 60_000}
            assert timer.seq is not None
            run.send(events.TIMER_FIRED, timer.seq, after_ms=60_000)
    assert run.result == ["Later", 3, True]
    run.replayed()
    assert [e.type for e in run.history] == [
        "WorkflowStarted",
        *["LocalActivityCompleted", "TimerStarted", "TimerFired"] * 2,
        "LocalActivityCompleted",
        "WorkflowCompleted",
    ]


def test_a_local_activity_runs_out_of_its_time_between_attempts() -> None:
    async def f() -> Any:
        handle = flaky.options(local=True, schedule_to_close="50s").start()
        try:
            await handle
        except durable.ActivityFailed as e:
            return [e.attempt, e.timeout]

    run = Run(f)
    compute(run)
    assert run.result == [1, "schedule_to_close"]
    run.replayed()


def test_local_arguments_are_each_attempt_s_own() -> None:
    seen: list[list[int]] = []

    @activity(broker=broker, retry=durable.RetryPolicy(initial_interval=0, maximum_attempts=2))
    def spoil(numbers: list[int]) -> int:
        seen.append(list(numbers))
        numbers.clear()
        raise ValueError

    async def f() -> Any:
        numbers = [1, 2]
        try:
            await spoil.options(local=True).execute(numbers)
        except durable.ActivityFailed:
            return numbers

    run = Run(f)
    compute(run)
    compute(run)
    assert run.result == [1, 2]
    assert seen == [[1, 2], [1, 2]]
    run.replayed()


def test_what_one_step_asks_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "MAX_STEP_BYTES", 100_000)

    async def greedy() -> str:
        for _ in range(3):  # each step by itself is small enough
            await asyncio.gather(*[echo.execute("x" * 10_000) for _ in range(9)])
        try:
            for _ in range(100):
                echo.execute("x" * 10_000)
        except durable.PayloadTooLarge as e:
            return str(e)
        return ""

    run = Run(greedy).finish()
    assert "100,000 bytes" in run.result
    assert [event.type for event in run.history].count("ActivityScheduled") == 4 * 9
    run.replayed()
