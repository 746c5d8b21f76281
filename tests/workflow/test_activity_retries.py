"""Activities that fail: when they are tried again, and what shows of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from itertools import count
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import AsyncIO

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]
Retry = durable.RetryPolicy


_numbers = count()


class Declined(ValueError):
    pass


class Busy(Exception):
    next_retry_delay = 0.05


def failing(activity: Any, **options: Any) -> durable.Workflow[[], dict[str, Any]]:
    """A workflow that runs an activity, and answers what it failed with."""

    @durable.workflow(queue_name="runs", name=f"run-{next(_numbers)}")
    async def run() -> dict[str, Any]:
        try:
            return {"value": await activity.options(**options).execute()}
        except durable.ActivityFailed as e:
            cause = e.__cause__
            return {
                "activity": e.activity,
                "type": e.type,
                "message": e.message,
                "attempt": e.attempt,
                "retryable": e.retryable,
                "timeout": e.timeout,
                "cause": None if cause is None else getattr(cause, "type", None),
            }

    return run


def test_a_policy_tries_again_until_it_succeeds(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    seen: list[tuple[int, bool]] = []

    @durable.activity(queue_name="steps", retry=Retry(initial_interval=0.01, maximum_attempts=3))
    def flaky() -> str:
        info = durable.activity_info()
        assert info is not None
        seen.append((info.attempt, info.is_last_attempt))
        if info.attempt < 3:
            raise ValueError("not yet")
        return "done"

    run = failing(flaky)
    start_worker()
    handle = run.start()
    assert handle.result(timeout=15) == {"value": "done"}
    assert seen == [(1, False), (2, False), (3, True)]
    assert [e.type for e in handle.history()] == [
        "WorkflowStarted",
        "ActivityScheduled",
        "ActivityCompleted",
        "WorkflowCompleted",
    ]


def test_maximum_attempts_count_the_first(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity(queue_name="steps", max_retries=0)
    def fails() -> None:
        calls.append(1)
        raise ValueError("boom")

    # What the actor says of its retries is replaced.
    run = failing(fails, retry=Retry(initial_interval=0.01, maximum_attempts=2))
    start_worker()
    failed = run.start().result(timeout=15)
    assert len(calls) == 2
    assert (failed["type"], failed["message"], failed["attempt"], failed["retryable"]) == (
        "ValueError",
        "boom",
        2,
        True,
    )


@pytest.mark.parametrize("named", [(ValueError,), ("Declined",), ("LookupError", "ValueError"), ("Exception",)])
def test_non_retryable_exceptions_and_their_subclasses(
    broker: durable.DurableBroker, start_worker: StartWorker, named: tuple[Any, ...]
) -> None:
    @durable.activity(queue_name="steps")
    def decline() -> None:
        raise Declined("no")

    run = failing(decline, retry=Retry(initial_interval=0.01, non_retryable=named))
    start_worker()
    failed = run.start().result(timeout=15)
    assert (failed["type"], failed["attempt"], failed["retryable"]) == ("Declined", 1, False)


def test_backoff_and_the_delay_that_an_exception_asks_for(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    at: dict[str, list[float]] = {"backoff": [], "asks": []}

    @durable.activity(queue_name="steps")
    def backoff() -> None:
        at["backoff"].append(time.monotonic())
        raise ValueError("boom")

    @durable.activity(queue_name="steps")
    def asks() -> None:
        at["asks"].append(time.monotonic())
        raise Busy

    policy = Retry(initial_interval=0.1, backoff_coefficient=3, maximum_interval=0.5, maximum_attempts=4)
    slow = Retry(initial_interval="1 hour", maximum_attempts=2)
    first, second = failing(backoff, retry=policy), failing(asks, retry=slow)
    start_worker()
    one, other = first.start(), durable.get_handle(run_id=second.start().run_id)
    assert other.result(timeout=15)["attempt"] == 2
    assert one.result(timeout=15)["attempt"] == 4
    gaps = [b - a for a, b in zip(at["backoff"], at["backoff"][1:], strict=False)]
    assert all(gap >= least for gap, least in zip(gaps, (0.1, 0.3, 0.5), strict=True)), gaps
    assert gaps[2] < 0.9


def test_the_delay_that_an_exception_asks_for_holds_for_dramatiqs_retries_too(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.activity(queue_name="steps", max_retries=1, min_backoff=3_600_000)
    def asks() -> None:
        raise Busy

    run = failing(asks)
    start_worker()
    assert run.start().result(timeout=15)["attempt"] == 2


def test_throws_are_not_tried_again(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="steps", throws=(Declined,))
    def decline() -> None:
        raise Declined("no")

    by_policy, by_options = failing(decline, retry=Retry(initial_interval=0.01)), failing(decline)
    start_worker()
    for run in (by_policy, by_options):
        failed = run.start().result(timeout=15)
        assert (failed["attempt"], failed["retryable"]) == (1, False)


def test_a_policy_reaches_activities_of_other_codebases(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    tries: list[int] = []

    @dramatiq.actor(actor_name="elsewhere", queue_name="other")
    def elsewhere() -> str:
        tries.append(1)
        if len(tries) < 2:
            raise ValueError("not yet")
        return "there"

    run = failing(durable.activity_stub("elsewhere", queue_name="other"), retry=Retry(initial_interval=0.01))
    start_worker()
    assert run.start().result(timeout=15) == {"value": "there"}


def test_a_policy_holds_for_plain_messages_of_the_activity(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    tries: list[int] = []

    @durable.activity(queue_name="steps", retry=Retry(initial_interval=0.01, maximum_attempts=2))
    def fails() -> None:
        tries.append(1)
        raise ValueError("boom")

    start_worker()
    fails.send()
    broker.join("steps", timeout=15_000)
    assert len(tries) == 2


def test_one_or_the_other() -> None:
    broker = durable.DurableBroker("postgresql://nowhere")
    with pytest.raises(ValueError, match="max_retries"):
        durable.activity(retry=Retry(), max_retries=3, broker=broker)(lambda: None)
    with pytest.raises(ValueError, match="RetryPolicy"):
        durable.activity(retry=3, broker=broker)(lambda: None)  # type: ignore[arg-type]
    plain = durable.activity_stub("x")
    with pytest.raises(ValueError, match="min_backoff"):
        plain.options(retry=Retry(), min_backoff=3)
    # The later one replaces the earlier.
    assert plain.options(max_retries=3).options(retry=Retry())._dispatch.message.keys() == {"durable_retry"}
    assert plain.options(retry=Retry()).options(max_retries=3)._dispatch.message == {"max_retries": 3}
    with pytest.raises(ValueError, match="stub"):
        plain.options(local=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_interval": -1},
        {"initial_interval": "soon"},
        {"maximum_interval": -1},
        {"backoff_coefficient": 0.5},
        {"backoff_coefficient": "2"},
        {"maximum_attempts": 0},
        {"maximum_attempts": 2.5},
        {"non_retryable": "ValueError"},
        {"non_retryable": ValueError},
        {"non_retryable": (3,)},
    ],
)
def test_wrong_policies(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Retry(**wrong)


def test_pending_shows_the_last_failure_and_the_next_attempt(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.activity(queue_name="steps")
    def fails(n: int) -> None:
        durable.heartbeat({"at": n})
        raise ValueError("boom")

    @durable.workflow(queue_name="runs")
    async def child() -> None:
        await durable.sleep("1 hour")

    @durable.workflow(queue_name="runs")
    async def parent(n: int) -> None:
        child.start()
        fails.options(retry=Retry(initial_interval="1 hour")).start(n)
        await durable.sleep("2 hours")

    start_worker()
    handle = parent.start(7)
    wait_until(lambda: len(p := handle.describe().pending) == 3 and p[1].attempt == 2, timeout=10, message="3 wait")
    description = handle.describe()
    a_child, activity, timer = description.pending
    assert (a_child.kind, a_child.name) == ("child", "child")
    assert (activity.kind, activity.name, activity.last_failure) == ("activity", "fails", "ValueError: boom")
    assert activity.heartbeat_details == {"at": 7}
    assert activity.next_attempt_at is not None
    assert timedelta(minutes=55) < activity.next_attempt_at - description.started_at < timedelta(minutes=65)
    assert timer.kind == "timer"
    assert timer.next_attempt_at is not None
    assert description.input == {"args": [7], "kwargs": {}}
    assert (description.result, description.failure) == (None, None)
    handle.terminate()
    assert handle.describe().pending == []


class Color(Enum):
    RED = "red"


@dataclass
class Order:
    id: str
    at: datetime
    color: Color


def test_arguments_are_what_the_annotations_say(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    broker.add_middleware(AsyncIO())

    @durable.activity(queue_name="steps")
    def take(order: Order, *more: Order, when: datetime) -> str:
        assert all(isinstance(o, Order) and isinstance(o.color, Color) for o in (order, *more))
        assert isinstance(when, datetime)
        return f"{order.at:%Y}{order.color.name}{len(more)}"

    @durable.activity(queue_name="steps")
    async def atake(order: Order) -> Order:
        assert isinstance(order, Order)
        return order

    @durable.activity(queue_name="steps", max_retries=5)
    def wrong(order: Order) -> None: ...

    remote = durable.activity_stub("wrong", queue_name="steps")

    @durable.workflow(queue_name="runs")
    async def run(order: Order) -> list[Any]:
        back = await atake.execute(order)
        assert isinstance(back, Order)
        text = await take.execute(order, back, when=order.at)
        try:
            await remote.execute("no order")
        except durable.ActivityFailed as e:
            return [text, e.type, e.attempt, e.retryable]
        return []

    start_worker()
    order = Order("o-1", datetime(2026, 1, 2), Color.RED)
    assert run.start(order).result(timeout=15) == ["2026RED1", "TypeError", 1, False]
    # A plain message stays as it is.
    seen: list[Any] = []

    @durable.activity(queue_name="steps")
    def plain(order: Order) -> None:
        seen.append(order)

    plain.send({"id": "o"})  # type: ignore[arg-type]
    wait_until(lambda: seen == [{"id": "o"}], timeout=10, message="the plain one came")


def test_activity_info(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    broker.add_middleware(AsyncIO())

    @durable.activity(queue_name="steps", start_to_close="1 minute", max_retries=1)
    def look() -> dict[str, Any]:
        info = durable.activity_info()
        assert info is not None
        assert info is durable.activity_info()
        assert info.deadline is not None
        left = (info.deadline - info.scheduled_at).total_seconds()
        return {
            "ids": [info.workflow_id, info.run_id, info.activity],
            "attempt": info.attempt,
            "headers": info.headers,
            "details": info.heartbeat_details,
            "left": left,
            "last": info.is_last_attempt,
        }

    @durable.activity(queue_name="steps", max_retries=0)
    async def bare() -> list[Any]:
        info = durable.activity_info()
        assert info is not None
        return [info.workflow_id, info.deadline, info.is_last_attempt]

    @durable.workflow(queue_name="runs")
    async def run() -> list[Any]:
        return [await look.execute(), await bare.execute()]

    start_worker()
    handle = run.options(workflow_id="w-info").start()
    seen, other = handle.result(timeout=15)
    assert 59 < seen.pop("left") < 65
    assert seen == {
        "ids": ["w-info", handle.run_id, "look"],
        "attempt": 1,
        "headers": {},
        "details": None,
        "last": False,
    }
    assert other == ["w-info", None, True]
    assert durable.activity_info() is None
    with pytest.raises(durable.DurableError, match="activity"):
        durable.heartbeat()


def test_local_activities(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    tries: dict[str, int] = {"flaky": 0, "hopeless": 0}

    @durable.activity(queue_name="nobody-consumes-this", retry=Retry(initial_interval=0.05, maximum_attempts=3))
    def flaky(order: Order) -> str:
        assert isinstance(order, Order)
        tries["flaky"] += 1
        if tries["flaky"] < 3:
            raise ValueError("not yet")
        return order.id

    @durable.activity(queue_name="nobody-consumes-this")
    async def hopeless() -> None:
        tries["hopeless"] += 1
        raise Declined("no")

    @durable.activity(queue_name="nobody-consumes-this")
    def slow() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)

    never = Retry(maximum_attempts=1)

    @durable.workflow(queue_name="runs")
    async def run(order: Order) -> list[Any]:
        first = await flaky.options(local=True).execute(order)
        said: list[Any] = [first]
        for activity in (
            hopeless.options(local=True, retry=Retry(non_retryable=(ValueError,))),
            slow.options(local=True, retry=never, start_to_close=0.3),
        ):
            try:
                await activity.start()
            except durable.ActivityFailed as e:
                said.append([e.activity, e.type, e.attempt, e.retryable, e.timeout])
        return said

    start_worker()
    handle = run.start(Order("o-1", datetime(2026, 1, 2), Color.RED))
    assert handle.result(timeout=15) == [
        "o-1",
        ["hopeless", "Declined", 1, False, None],
        ["slow", "Timeout", 1, True, "start_to_close"],
    ]
    assert tries == {"flaky": 3, "hopeless": 1}
    types = [e.type for e in handle.history()]
    assert types.count("LocalActivityCompleted") == 5
    assert types.count("TimerFired") == 2
    assert "ActivityScheduled" not in types
