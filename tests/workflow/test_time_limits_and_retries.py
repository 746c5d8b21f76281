"""Time limits and retries of workflows, and starts that are put off."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from test_engine_support import Run

import dramatiq_durable as durable
from dramatiq_durable.errors import ActivityFailed
from dramatiq_durable.workflow import events
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


@pytest.mark.parametrize("limit", ["run_timeout", "execution_timeout"])
def test_a_run_ends_when_its_time_is_over(broker: durable.DurableBroker, start_worker: StartWorker, limit: Any) -> None:
    @durable.workflow
    async def waiting() -> None:
        await durable.wait_for_signal("never")

    start_worker()
    handle = waiting.options(**{limit: 0.3}).start()
    with pytest.raises(durable.WorkflowTimedOut, match=limit):
        handle.result(timeout=20)
    assert handle.status() == "timed_out"
    assert types(handle)[-1] == "WorkflowTimedOut"
    assert handle.history()[-1].attributes["reason"] == limit
    with pytest.raises(durable.WorkflowClosed):
        handle.signal("never")


def test_time_is_over_without_the_code_and_before_the_first_step(
    broker: durable.DurableBroker, start_worker: StartWorker, database_url: str
) -> None:
    """Any worker of the stream does it: the database ends the run."""
    other = durable.DurableBroker(database_url)

    @durable.workflow(broker=other, queue_name="here")
    async def unknown() -> None: ...

    @durable.workflow(queue_name="here")
    async def known() -> str:
        return "here"

    handle = unknown.options(run_timeout="200ms").start()
    start_worker()
    with pytest.raises(durable.WorkflowTimedOut):
        handle.result(timeout=20)
    assert known.start().result(timeout=10) == "here"
    other.close()


def test_what_ended_in_time_leaves_no_deadline(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="short")
    async def short() -> int:
        return 1

    start_worker()
    assert short.options(run_timeout="1 hour", execution_timeout="1 day").start().result(timeout=10) == 1
    with looking(broker) as conn:
        assert conn.execute("SELECT count(*) FROM durable.message WHERE kind = 'e'").fetchone() == (0,)


def test_the_first_run_times_out_and_the_next_is_in_time(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def second_time_lucky() -> int:
        if durable.info().attempt == 1:
            await durable.wait_for_signal("never")
        return durable.info().attempt

    start_worker()
    retry = durable.RetryPolicy(initial_interval=0.05)
    handle = second_time_lucky.options(run_timeout=0.3, retry=retry).start()
    assert handle.result(timeout=20) == 2
    assert handle.status() == "timed_out"


def test_the_attempt_after_a_run_timeout_is_given_what_was_not_read(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def work() -> list[Any]:
        seen = [await durable.wait_for_signal("go")]
        if durable.info().attempt < 3:
            await durable.wait_for_signal("never")
        for _ in range(3):
            seen.append(await durable.wait_for_signal("n"))
        return seen

    worker = start_worker()
    retry = durable.RetryPolicy(initial_interval=0.05)
    handle = work.options(workflow_id="w", run_timeout=1, retry=retry).start()
    for name, value in (("n", 1), ("go", "first"), ("n", 2), ("go", "second"), ("go", "third")):
        handle.signal(name, value)
    wait_until(lambda: [e.type for e in handle.history()].count("SignalReceived") == 5)
    wait_until(lambda: handle.status() == "timed_out")
    durable.get_handle("w").signal("n", 3)
    assert handle.result(timeout=20) == ["third", 1, 2, 3]
    worker.stop()
    # Each is given once to a run that is taken up again.
    again = handle.reset(1)
    with broker.database.connection() as conn:
        rows = conn.execute("SELECT count(*) FROM durable.inbox WHERE type = 'SignalReceived'").fetchone()
    assert rows == (6,)
    again.terminate()


def test_the_execution_timeout_ends_all_attempts(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def never() -> None:
        await durable.sleep(0.05)
        raise ValueError("again")

    start_worker()
    retry = durable.RetryPolicy(initial_interval=0.05, backoff_coefficient=1)
    began = time.monotonic()
    handle = never.options(execution_timeout=0.8, retry=retry).start()
    with pytest.raises((durable.WorkflowTimedOut, durable.WorkflowFailed)):
        handle.result(timeout=20)
    assert time.monotonic() - began < 10
    assert handle.status() == "failed"


def test_attempts_of_a_workflow(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    attempts: list[tuple[int, float]] = []

    @durable.workflow
    async def flaky(until: int) -> Any:
        info = durable.info()
        attempts.append((info.attempt, time.monotonic()))
        if info.attempt < until:
            raise ValueError(f"attempt {info.attempt}")
        return [info.attempt, info.workflow_id, info.memo]

    start_worker()
    retry = durable.RetryPolicy(initial_interval=0.1, backoff_coefficient=3, maximum_attempts=3)
    handle = flaky.options(workflow_id="flaky", retry=retry, memo={"a": 1}).start(3)
    assert handle.result(timeout=20) == [3, "flaky", {"a": 1}]
    assert [n for n, _ in attempts] == [1, 2, 3]
    assert attempts[1][1] - attempts[0][1] >= 0.1
    assert attempts[2][1] - attempts[1][1] >= 0.3
    assert handle.status() == "failed"
    assert durable.get_handle("flaky").history()[0].attributes["attempt"] == 3

    with pytest.raises(durable.WorkflowFailed, match="attempt 3"):
        flaky.options(retry=retry).start(9).result(timeout=20)


def test_what_is_not_retried() -> None:
    policy = {"initial": 1, "coefficient": 2, "maximum": None, "attempts": None, "non_retryable": ["LookupError"]}

    def retryable(error: Exception, cancel: bool = False) -> Any:
        async def failing() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await durable.wait_for_signal("go")
            raise error

        run = Run(failing, start=False)
        run.send(events.WORKFLOW_STARTED, attributes={"retry": policy})
        if cancel:
            run.cancel()
        else:
            run.signal("unread", 1)
            run.signal("go")
        assert run.types == [events.WORKFLOW_FAILED]
        attributes = run.last[0].attributes()
        assert attributes is not None
        assert attributes.get("unread") == (None if cancel else [2])
        return attributes["failure"]["retryable"]

    assert retryable(ValueError("v")) is True
    assert retryable(KeyError("subclass")) is False
    assert retryable(ActivityFailed("from elsewhere", type="LookupError")) is False
    assert retryable(ValueError("v"), cancel=True) is False


def test_a_parent_sees_the_last_attempt_only(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flaky(until: int) -> int:
        attempt = durable.info().attempt
        if attempt < until:
            raise ValueError("not yet")
        return attempt

    @durable.workflow
    async def parent() -> Any:
        child = flaky.options(retry=durable.RetryPolicy(initial_interval=0.02, maximum_attempts=3))
        seen: list[Any] = [await child.execute(3)]
        try:
            await child.execute(9)
        except durable.ChildWorkflowFailed as e:
            seen.append(e.type)
        return seen

    start_worker()
    handle = parent.start()
    assert handle.result(timeout=20) == [3, "ValueError"]
    assert types(handle).count("ChildCompleted") == types(handle).count("ChildFailed") == 1


def test_unread_signals_go_to_the_next_attempt(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def picky() -> Any:
        if durable.info().attempt == 1:
            await durable.wait_for_signal("fail")
            raise ValueError("as asked")
        return [await durable.wait_for_signal("n"), await durable.wait_for_signal("n")]

    start_worker()
    handle = picky.options(retry=durable.RetryPolicy(initial_interval=0.02)).start()
    handle.signal("n", 1)
    handle.signal("fail")
    handle.signal("n", 2)
    assert handle.result(timeout=20) == [1, 2]


def test_a_cancel_ends_the_wait_for_the_next_attempt(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def failing() -> None:
        if durable.info().attempt > 1:
            await durable.wait_for_signal("never")
        raise ValueError("again")

    start_worker()
    handle = failing.options(workflow_id="f", retry=durable.RetryPolicy(initial_interval=3600)).start()
    wait_until(lambda: handle.status() == "failed")
    with pytest.raises(durable.WorkflowAlreadyStarted):
        failing.options(workflow_id="f").start()
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)


def test_a_signal_does_not_hasten_a_start_that_was_put_off(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def later() -> Any:
        return await durable.wait_for_signal("early")

    start_worker()
    began = time.monotonic()
    handle = later.options(delay=600).start()
    handle.signal("early", 1)
    assert handle.result(timeout=20) == 1
    assert time.monotonic() - began >= 0.6


def test_a_start_that_was_put_off_is_cancelled_at_once(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    ran = threading.Event()

    @durable.activity
    def work() -> None:
        ran.set()

    @durable.workflow
    async def later() -> None:
        await work.execute()

    start_worker()
    handle = later.options(delay=3_600_000).start()
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)
    assert not ran.is_set()


def test_limits_of_a_delayed_run_count_from_its_first_step(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def quick() -> str:
        return "in time"

    start_worker()
    assert quick.options(delay=600, run_timeout=0.4).start().result(timeout=20) == "in time"


def test_two_cancels_that_wait_together_are_one(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    cleaned = threading.Event()

    @durable.activity
    def clean() -> None:
        cleaned.set()

    @durable.workflow
    async def waiting() -> None:
        try:
            await durable.sleep("30 days")
        finally:
            await clean.execute()

    handle = waiting.start()
    for _ in range(3):
        handle.cancel()
    start_worker()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)
    assert cleaned.is_set()
    assert types(handle).count("CancelRequested") == 1
