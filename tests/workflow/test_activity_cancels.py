"""Activities that are cancelled: while they wait, while they run, and when their run closes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import AsyncIO

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


class Told:
    """What a running activity was told."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.cancelled = threading.Event()
        self.after = 0.0


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def hanging(told: Told, how: str) -> Any:
    def hang(answer: str | None = None) -> str | None:
        told.running.set()
        try:
            while True:
                time.sleep(0.01)
        except durable.ActivityCancelled:
            told.cancelled.set()
            if answer is None:
                raise
            return answer

    async def ahang(answer: str | None = None) -> str | None:
        told.running.set()
        try:
            await asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
        except durable.ActivityCancelled:
            await asyncio.sleep(0.01)
            told.cancelled.set()
            if answer is None:
                raise
            return answer
        return None

    def beat(answer: str | None = None) -> str | None:
        told.running.set()
        try:
            while True:
                durable.heartbeat("on")
                time.sleep(0.05)
        except durable.ActivityCancelled:
            with pytest.raises(durable.ActivityCancelled):
                durable.heartbeat()
            told.cancelled.set()
            if answer is None:
                raise
            return answer

    fn = {"sync": hang, "async": ahang, "heartbeat": beat}[how]
    return durable.activity(queue_name="steps", actor_name="hang", max_retries=3)(fn)


def cancelling(activity: Any, policy: str, answer: str | None) -> durable.Workflow[[], Any]:
    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        handle = activity.options(cancellation=policy).start(answer)
        await durable.wait_for_signal("cancel")
        handle.cancel()
        try:
            return await handle
        except asyncio.CancelledError:
            return "cancelled"

    return run


@pytest.mark.parametrize("how", ["sync", "async", "heartbeat"])
@pytest.mark.parametrize(
    ("policy", "answer", "result", "last"),
    [
        ("try", None, "cancelled", "ActivityCancelled"),
        ("wait", None, "cancelled", "ActivityCancelled"),
        ("wait", "a value", "a value", "ActivityCompleted"),
    ],
)
def test_running_code_is_told(
    broker: durable.DurableBroker,
    start_worker: StartWorker,
    how: str,
    policy: str,
    answer: str | None,
    result: str,
    last: str,
) -> None:
    broker.add_middleware(AsyncIO())
    told = Told()
    run = cancelling(hanging(told, how), policy, answer)
    start_worker()
    handle = run.start()
    assert told.running.wait(10)
    began = time.monotonic()
    handle.signal("cancel")
    assert told.cancelled.wait(5)
    assert time.monotonic() - began < 2.5
    assert handle.result(timeout=10) == result
    assert last in types(handle)
    broker.join("steps", timeout=10_000)


def test_abandon_leaves_it_alone(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    go = threading.Event()
    done: list[str] = []

    @durable.activity(queue_name="steps")
    def work(answer: str | None) -> None:
        go.wait(10)
        done.append("done")

    @durable.workflow(queue_name="runs")
    async def run() -> str:
        handle = work.options(cancellation="abandon").start(None)
        await durable.wait_for_signal("cancel")
        handle.cancel()
        await durable.wait_for_signal("end")
        return "went on"

    start_worker()
    handle = run.start()
    handle.signal("cancel")
    time.sleep(0.1)
    go.set()
    wait_until(lambda: done == ["done"], timeout=10, message="it ran to its end")
    handle.signal("end")
    assert handle.result(timeout=10) == "went on"


@pytest.mark.administrator
@pytest.mark.parametrize("policy", ["try", "wait"])
def test_what_waits_is_withdrawn(broker: durable.DurableBroker, start_worker: StartWorker, policy: str) -> None:
    nobody = durable.activity_stub("nobody", queue_name="nobodys")
    run = cancelling(nobody, policy, None)
    start_worker()
    handle = run.start()
    wait_until(lambda: "ActivityScheduled" in types(handle), timeout=10, message="it is scheduled")
    handle.signal("cancel")
    assert handle.result(timeout=10) == "cancelled"
    cancels = [type for type in types(handle) if type.startswith("Activity")][1:]
    assert cancels == ["ActivityCancelRequested", "ActivityCancelled"][policy == "try" :]
    broker.declare_queue("nobodys")
    broker.join("nobodys", timeout=5000)


@pytest.mark.parametrize("policy", ["try", "wait"])
def test_cancelled_in_the_step_that_scheduled_it(
    broker: durable.DurableBroker, start_worker: StartWorker, policy: str
) -> None:
    ran: list[int] = []

    @durable.activity(queue_name="steps")
    def work() -> None:
        ran.append(1)

    @durable.workflow(queue_name="runs")
    async def run() -> str:
        # The second signal is there when the first is answered: both are steps of one commit.
        await durable.wait_for_signal("a")
        handle = work.options(cancellation=policy, delay=3_600_000).start()
        await durable.wait_for_signal("b")
        handle.cancel()
        try:
            await handle
        except asyncio.CancelledError:
            return "cancelled"
        return "ran"

    handle = run.start()
    handle.signal("a")
    handle.signal("b")
    start_worker()
    assert handle.result(timeout=10) == "cancelled"
    assert ran == []


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("end", ["terminate", "cancel", "return"])
def test_a_run_that_closes_cancels_what_runs(
    broker: durable.DurableBroker, start_worker: StartWorker, how: str, end: str
) -> None:
    broker.add_middleware(AsyncIO())
    told = Told()
    activity = hanging(told, how)

    @durable.workflow(queue_name="runs")
    async def run() -> None:
        activity.start(None)
        await durable.wait_for_signal("end")

    start_worker()
    handle = run.start()
    assert told.running.wait(10)
    if end == "return":
        handle.signal("end")
    else:
        getattr(handle, end)()
    assert told.cancelled.wait(5)
    broker.join("steps", timeout=10_000)


def test_cancelling_the_run_cancels_the_activity_it_waits_for(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    told = Told()
    activity = hanging(told, "sync")
    cleaned: list[str] = []

    @durable.activity(queue_name="steps")
    def clean() -> None:
        cleaned.append("up")

    @durable.workflow(queue_name="runs")
    async def run() -> None:
        try:
            await activity.options(cancellation="wait").execute(None)
        except asyncio.CancelledError:
            await clean.execute()
            raise

    start_worker()
    handle = run.start()
    assert told.running.wait(10)
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    assert told.cancelled.is_set()
    assert cleaned == ["up"]


def test_a_cancelled_activity_that_fails_otherwise_is_not_tried_again(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    running = threading.Event()
    tries: list[int] = []

    @durable.activity(queue_name="steps", retry=durable.RetryPolicy(initial_interval=0.01))
    def work(answer: str | None) -> None:
        tries.append(1)
        running.set()
        try:
            while True:
                time.sleep(0.01)
        except durable.ActivityCancelled:
            raise ValueError("while cleaning up") from None

    @durable.workflow(queue_name="runs")
    async def run() -> str:
        handle = work.options(cancellation="wait").start(None)
        await durable.wait_for_signal("cancel")
        handle.cancel()
        try:
            await handle
        except durable.ActivityFailed as e:
            return e.type
        return "no"

    start_worker()
    handle = run.start()
    assert running.wait(10)
    handle.signal("cancel")
    assert handle.result(timeout=10) == "ValueError"
    assert tries == [1]
