"""Activities that run out of time: by each of their limits, with and without a worker, and what the code sees of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import TimeLimitExceeded

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]
Retry = durable.RetryPolicy

_numbers = count()


def trying(activity: Any, **options: Any) -> durable.Workflow[[], Any]:
    """A workflow that runs an activity, and answers its value or what it failed with."""

    @durable.workflow(queue_name="runs", name=f"trying-{next(_numbers)}")
    async def run() -> Any:
        try:
            return await activity.options(**options).execute()
        except durable.ActivityFailed as e:
            return [e.type, e.timeout, e.attempt, e.retryable, getattr(e.__cause__, "type", None)]

    return run


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def test_start_to_close_interrupts_the_code_and_ends_it(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    interrupted = threading.Event()

    @durable.activity(queue_name="steps")
    def hang() -> str:
        try:
            while True:
                time.sleep(0.01)
        except TimeLimitExceeded:
            interrupted.set()
            return "too late"

    run = trying(hang, start_to_close=0.3, retry=Retry(maximum_attempts=1))
    start_worker()
    handle = run.start()
    assert handle.result(timeout=15) == ["Timeout", "start_to_close", 1, True, None]
    assert interrupted.wait(5)
    assert types(handle) == ["WorkflowStarted", "ActivityScheduled", "ActivityTimedOut", "WorkflowCompleted"]


def test_start_to_close_is_tried_again_by_the_policy(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    attempts: list[int] = []

    @durable.activity(queue_name="steps")
    def slow_once() -> str:
        info = durable.activity_info()
        assert info is not None
        attempts.append(info.attempt)
        if info.attempt == 1:
            time.sleep(0.2)
            while True:
                time.sleep(0.01)
        return "done"

    run = trying(slow_once, start_to_close=0.3, retry=Retry(initial_interval=0.05))
    start_worker()
    assert run.start().result(timeout=15) == "done"
    assert attempts == [1, 2]


def test_dramatiqs_retries_hold_for_limits_too(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    attempts: list[int] = []

    @durable.activity(queue_name="steps", max_retries=1, min_backoff=50, max_backoff=100)
    def mixed() -> None:
        info = durable.activity_info()
        assert info is not None
        attempts.append(info.attempt)
        if info.attempt == 1:
            while True:
                time.sleep(0.01)
        assert info.is_last_attempt
        raise ValueError("boom")

    run = trying(mixed, start_to_close=0.3)
    start_worker()
    assert run.start().result(timeout=15) == ["ValueError", None, 2, True, None]
    assert attempts == [1, 2]


@pytest.mark.administrator
def test_schedule_to_start_without_any_worker(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    run = trying(durable.activity_stub("nobody", queue_name="nobodys"), schedule_to_start=0.3)
    start_worker()
    handle = run.start()
    assert handle.result(timeout=15) == ["Timeout", "schedule_to_start", 1, False, None]
    broker.declare_queue("nobodys")
    broker.join("nobodys", timeout=5000)


def test_schedule_to_close_without_any_worker(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    run = trying(durable.activity_stub("nobody", queue_name="nobodys"), schedule_to_close=0.3)
    start_worker()
    assert run.start().result(timeout=15) == ["Timeout", "schedule_to_close", 1, False, None]


def test_schedule_to_close_ends_the_retries(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="steps")
    def fails() -> None:
        raise ValueError("boom")

    run = trying(fails, schedule_to_close=0.5, retry=Retry(initial_interval=0.05, backoff_coefficient=1))
    start_worker()
    kind, timeout, attempt, retryable, cause = run.start().result(timeout=15)
    assert (kind, timeout, retryable, cause) == ("Timeout", "schedule_to_close", False, "ValueError")
    assert attempt > 2


def test_a_short_schedule_to_close_is_in_time(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def slow() -> None:
        time.sleep(0.8)

    run = trying(slow, schedule_to_close=0.15)
    start_worker()
    assert run.start().result(timeout=15)[:2] == ["Timeout", "schedule_to_close"]


def test_schedule_to_close_interrupts_what_runs(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    interrupted = threading.Event()

    @durable.activity(queue_name="steps")
    def hang() -> None:
        try:
            while True:
                time.sleep(0.01)
        except TimeLimitExceeded:
            interrupted.set()
            raise

    run = trying(hang, schedule_to_close=0.4, start_to_close="1 minute")
    start_worker()
    assert run.start().result(timeout=15)[1] == "schedule_to_close"
    assert interrupted.wait(5)


def test_a_limit_that_is_kept_costs_nothing_later(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="steps", start_to_close=5, schedule_to_start=5, schedule_to_close=5, heartbeat=5)
    def quick(n: int) -> int:
        durable.heartbeat(n)
        return n

    @durable.workflow(queue_name="runs")
    async def run() -> int:
        return sum([await quick.execute(n) for n in range(5)])

    start_worker()
    assert run.start().result(timeout=15) == 10

    def left() -> int:
        with looking(broker) as conn:
            query = "SELECT (SELECT count(*) FROM durable.message) + (SELECT count(*) FROM durable.activity)"
            return int(conn.execute(query).fetchall()[0][0])

    wait_until(lambda: left() == 0, timeout=10, message="nothing is left of them")


def test_a_missing_heartbeat(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    seen: list[Any] = []

    @durable.activity(queue_name="steps")
    def work() -> str:
        info = durable.activity_info()
        assert info is not None
        seen.append(info.heartbeat_details)
        for n in range(6):
            durable.heartbeat({"n": n})
            time.sleep(0.2)
        if info.attempt == 1:
            while True:
                time.sleep(0.01)
        return "done"

    run = trying(work, heartbeat=0.6, retry=Retry(initial_interval=0.05))
    start_worker()
    assert run.start().result(timeout=20) == "done"
    # Longer than its limit as a whole, and resumed with what it said last.
    assert seen[0] is None
    assert seen[1]["n"] >= 3


def test_details_of_a_failed_attempt(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="steps")
    def work() -> Any:
        info = durable.activity_info()
        assert info is not None
        if info.attempt == 1:
            for n in range(100):
                durable.heartbeat(n)
            raise ValueError("boom")
        durable.heartbeat("of this attempt")
        return info.heartbeat_details

    run = trying(work, retry=Retry(initial_interval=0.01))
    start_worker()
    assert run.start().result(timeout=15) == 99


def test_a_closed_run_leaves_no_alarm(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    run = trying(durable.activity_stub("nobody", queue_name="nobodys"), schedule_to_close="1 hour", heartbeat=5)
    worker = start_worker()
    handle = run.start()
    wait_until(lambda: "ActivityScheduled" in types(handle), timeout=10, message="it is scheduled")
    handle.terminate()
    worker.stop()
    with looking(broker) as conn:
        for table in ("message", "activity", "activity_cancel"):
            assert conn.execute(f"SELECT count(*) FROM durable.{table}".encode()).fetchall() == [(0,)], table


@pytest.mark.parametrize("limit", ["start_to_close", "heartbeat"])
def test_limits_of_async_actors(broker: durable.DurableBroker, start_worker: StartWorker, limit: str) -> None:
    import asyncio

    broker.add_middleware(dramatiq.middleware.AsyncIO())
    interrupted = threading.Event()

    @durable.activity(queue_name="steps")
    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        except TimeLimitExceeded:
            interrupted.set()
            raise

    run = trying(hang, retry=Retry(maximum_attempts=1), **{limit: 0.3})
    start_worker()
    assert run.start().result(timeout=15)[:2] == ["Timeout", limit]
    assert interrupted.wait(5)
