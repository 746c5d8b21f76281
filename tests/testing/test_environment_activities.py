"""The environment for tests: policies, limits, heartbeats and tokens of activities, and local ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment

pytestmark = pytest.mark.usefixtures("broker")


numbers = itertools.count()


def outcome_of(activity: Any, *args: Any) -> Any:
    """A workflow that tells what became of an activity."""

    @durable.workflow(name=f"tells-{next(numbers)}")
    async def tells() -> Any:
        try:
            return await activity.execute(*args)
        except durable.ActivityFailed as e:
            return [e.type, e.attempt, e.retryable, e.timeout]

    return tells


def test_policies(env: Environment) -> None:
    times: list[float] = []

    class Busy(Exception):
        next_retry_delay = 7

    @durable.activity(retry=durable.RetryPolicy(initial_interval=10, maximum_attempts=4, non_retryable=(KeyError,)))
    def charge(errors: list[str]) -> str:
        info = durable.activity_info()
        assert info is not None
        times.append(env.now().timestamp())
        assert info.is_last_attempt == (info.attempt == 4)
        if info.attempt <= len(errors):
            raise {"value": ValueError, "key": KeyError, "busy": Busy}[errors[info.attempt - 1]]
        return "done"

    assert env.run(outcome_of(charge, ["value", "value", "busy"])) == "done"
    assert [round(b - a) for a, b in itertools.pairwise(times)] == [10, 20, 7]
    assert env.run(outcome_of(charge, ["value", "key"])) == ["KeyError", 2, False, None]
    assert env.run(outcome_of(charge, ["value"] * 4)) == ["ValueError", 4, True, None]


def test_an_attempt_that_takes_too_long(env: Environment) -> None:
    cleaned: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=5, maximum_attempts=3))
    def slow(seconds: list[float]) -> str:
        info = durable.activity_info()
        assert info is not None
        assert info.deadline is not None
        assert (info.deadline - env.now()).total_seconds() == 10
        try:
            time.sleep(seconds[info.attempt - 1])
        finally:
            cleaned.append(info.attempt)
        return "done"

    limited = slow.options(start_to_close=10)
    began = env.now()
    assert env.run(outcome_of(limited, [60, 60, 9])) == "done"
    assert (env.now() - began).total_seconds() == 10 + 5 + 10 + 10 + 9
    assert cleaned == [1, 2, 3]
    handle = env.start(outcome_of(limited, [60, 60, 60]))
    env.advance(12)
    [pending] = handle.describe().pending
    assert (pending.kind, pending.name, pending.attempt) == ("activity", "slow", 2)
    assert pending.last_failure == "Timeout: start_to_close: an attempt did not end within 10 s"
    assert handle.result() == ["Timeout", 3, True, "start_to_close"]
    assert "ActivityTimedOut" in [event.type for event in handle.history()]


def test_an_activity_that_takes_too_long_in_all(env: Environment) -> None:
    @durable.activity(retry=durable.RetryPolicy(initial_interval=5))
    async def fails() -> None:
        await asyncio.sleep(1)
        raise ValueError("no")

    began = env.now()
    assert env.run(outcome_of(fails.options(schedule_to_close=60))) == ["Timeout", 4, False, "schedule_to_close"]
    assert (env.now() - began).total_seconds() == 60


def test_heartbeats(env: Environment) -> None:
    found: list[Any] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=1, maximum_attempts=2))
    def imports(rests: list[float]) -> str:
        info = durable.activity_info()
        assert info is not None
        found.append(info.heartbeat_details)
        for n, rest in enumerate(rests):
            durable.heartbeat({"row": n})
            time.sleep(rest / info.attempt)
        return "done"

    limited = imports.options(heartbeat=30)
    assert env.run(outcome_of(limited, [20, 20, 40])) == "done"
    assert found == [None, {"row": 2}]
    handle = env.start(outcome_of(limited, [20, 90]))
    env.advance(1)
    assert handle.describe().pending[0].heartbeat_details == {"row": 0}
    assert handle.result() == ["Timeout", 2, True, "heartbeat"]


def test_what_an_attempt_does_when_its_time_is_over_is_not_recorded(env: Environment) -> None:
    seen: list[str] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=1, maximum_attempts=2))
    def stubborn() -> str:
        info = durable.activity_info()
        assert info is not None
        if info.attempt == 1:
            with contextlib.suppress(BaseException):
                time.sleep(100)
            time.sleep(100)
            seen.append("late")
            return "late"
        time.sleep(2)
        return "second"

    assert env.run(outcome_of(stubborn.options(start_to_close=10))) == "second"
    env.advance(200)
    assert seen == ["late"]


def test_ended_from_elsewhere(env: Environment) -> None:
    tokens: list[str] = []

    @durable.activity(max_retries=0)
    def asks() -> str:
        tokens.append(durable.complete_later())
        return "ignored"

    handle = env.start(outcome_of(asks))
    env.advance("1 day")
    assert handle.status() == "running"
    env.complete_activity(tokens[0], {"answer": 42})
    assert handle.result() == {"answer": 42}
    with pytest.raises(durable.UnknownToken):
        env.complete_activity(tokens[0], 1)
    failed = env.start(outcome_of(asks))
    env.fail_activity(tokens[1], ValueError("declined"))
    assert failed.result() == ["ValueError", 1, True, None]
    again = env.start(outcome_of(asks.options(retry=durable.RetryPolicy(initial_interval=60, maximum_attempts=2))))
    env.fail_activity(tokens[-1], ValueError("again"))
    with pytest.raises(durable.UnknownToken):
        env.complete_activity(tokens[-1], "late")
    assert again.status() == "running"
    env.advance(59)
    assert len(tokens) == 3
    env.advance(1)
    env.fail_activity(tokens[3], ValueError("declined"))
    assert again.result() == ["ValueError", 2, True, None]
    with pytest.raises(TypeError, match="takes an exception"):
        env.fail_activity(tokens[1], "declined")  # type: ignore[arg-type]
    late = outcome_of(asks.options(start_to_close=10))
    assert env.run(late) == ["Timeout", 1, True, "start_to_close"]
    with pytest.raises(durable.UnknownToken):
        env.complete_activity(tokens[2])


def test_local_activities(env: Environment) -> None:
    @durable.activity(max_retries=2, min_backoff=1000, max_backoff=1000)
    def look_up(key: str) -> str:
        raise AssertionError("it is mocked")

    @durable.activity(max_retries=0)
    def sleeps(seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    attempts: list[str] = []

    def mock(key: str) -> str:
        attempts.append(key)
        if len(attempts) < 3:
            raise ConnectionError("busy")
        return key.upper()

    @durable.workflow
    async def local() -> list[Any]:
        seen: list[Any] = [await look_up.options(local=True).execute("a")]
        seen.append(await sleeps.options(local=True, start_to_close=60).execute(30))
        try:
            await sleeps.options(local=True, start_to_close=60).execute(90)
        except durable.ActivityFailed as e:
            seen.append(e.timeout)
        seen.append(await durable.local(lambda: 7))
        return seen

    with Environment(mocks={look_up: mock}) as mocked:
        began = mocked.now()
        assert mocked.run(local) == ["A", "slept", "start_to_close", 7]
        assert (mocked.now() - began).total_seconds() == 2 + 30 + 60
        assert [name for name, _, _ in mocked.calls] == ["look_up"] * 3 + ["sleeps"] * 2


@pytest.mark.parametrize("policy", ["try", "wait", "abandon"])
def test_cancellation_policies(env: Environment, policy: Any) -> None:
    ended: list[str] = []

    @durable.activity(max_retries=0)
    def works() -> None:
        try:
            time.sleep(100)
            ended.append("worked")
        except durable.ActivityCancelled:
            time.sleep(10)
            ended.append("cleaned up")
            raise

    @durable.workflow
    async def cancels() -> float:
        began = durable.now()
        handle = works.options(cancellation=policy).start()
        await durable.sleep(1)
        handle.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await handle
        took = (durable.now() - began).total_seconds()
        await durable.sleep(200)
        return took

    assert env.run(cancels) == {"try": 1, "wait": 11, "abandon": 1}[policy]
    assert ended == {"try": ["cleaned up"], "wait": ["cleaned up"], "abandon": ["worked"]}[policy]
