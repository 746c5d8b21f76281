"""Activities that are ended from elsewhere, with a token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.middleware import AsyncIO

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]


class Deferred:
    """An activity that is ended elsewhere, and a workflow that waits for it."""

    def __init__(self, **options: Any) -> None:
        self.tokens: list[str] = []
        self.came = threading.Semaphore(0)

        @durable.activity(queue_name="steps", **options)
        def ask(question: str) -> str:
            self.tokens.append(durable.complete_later())
            self.came.release()
            return "ignored"

        @durable.workflow(queue_name="runs")
        async def run() -> Any:
            handle = ask.start("?")
            cancel = asyncio.create_task(durable.wait_for_signal("cancel"))
            await asyncio.wait([handle, cancel], return_when=asyncio.FIRST_COMPLETED)
            if not handle.done():
                handle.cancel()
            cancel.cancel()
            try:
                return await handle
            except asyncio.CancelledError:
                return "cancelled"
            except durable.ActivityFailed as e:
                return [e.type, e.message, e.timeout, e.attempt]

        self.run = run

    def token(self) -> str:
        assert self.came.acquire(timeout=10)
        return self.tokens[-1]


def parked(broker: durable.DurableBroker) -> bool:
    with looking(broker) as conn:
        rows = conn.execute("SELECT lease_token, worker_id FROM durable.message WHERE kind = 'a'").fetchall()
    return rows == [(None, None)]


def test_a_value_from_elsewhere(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    deferred = Deferred()
    worker = start_worker()
    handle = deferred.run.start()
    token = deferred.token()
    wait_until(lambda: parked(broker), timeout=10, message="it is parked")
    assert len(token) > 40
    worker.stop()
    durable.complete_activity(token, {"answer": 42})
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(token, 1)
    with pytest.raises(durable.UnknownToken):
        durable.fail_activity(token, ValueError("late"))
    with pytest.raises(durable.UnknownToken):
        durable.heartbeat_activity(token)
    start_worker()
    assert handle.result(timeout=10) == {"answer": 42}
    assert deferred.tokens == [token]


def test_before_its_actor_has_returned(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    go = threading.Event()

    @durable.activity(queue_name="steps")
    def ask() -> None:
        durable.complete_activity(durable.complete_later(), "at once")
        go.wait(10)

    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        return await ask.execute()

    start_worker()
    handle = run.start()
    assert handle.result(timeout=10) == "at once"
    go.set()
    broker.join("steps", timeout=10_000)


def test_a_failure_from_elsewhere(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    deferred = Deferred()
    start_worker()
    handle = deferred.run.start()
    durable.fail_activity(deferred.token(), ValueError("declined"))
    assert handle.result(timeout=10) == ["ValueError", "declined", None, 1]


def test_a_failure_from_elsewhere_is_tried_again_as_the_policy_says(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    retry = durable.RetryPolicy(initial_interval=0.05, maximum_attempts=3, non_retryable=("LookupError",))
    deferred = Deferred(retry=retry)
    start_worker()
    handle = deferred.run.start()
    first = deferred.token()
    error = ValueError("not yet")
    error.next_retry_delay = 3600  # type: ignore[attr-defined]
    durable.fail_activity(first, error)
    (pending,) = [p for p in handle.describe().pending if p.kind == "activity"]
    assert (pending.attempt, pending.last_failure) == (2, "ValueError: not yet")
    assert pending.next_attempt_at is not None
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(first, "late")
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)

    handle = deferred.run.start()
    for _ in range(2):
        durable.fail_activity(deferred.token(), ValueError("again"))
    durable.complete_activity(deferred.token(), "third time lucky")
    assert handle.result(timeout=10) == "third time lucky"

    handle = deferred.run.start()
    for _ in range(3):
        durable.fail_activity(deferred.token(), ValueError("again"))
    assert handle.result(timeout=10) == ["ValueError", "again", None, 3]

    handle = deferred.run.start()
    durable.fail_activity(deferred.token(), ValueError("again"))
    durable.fail_activity(deferred.token(), KeyError("for good"))
    assert handle.result(timeout=10) == ["KeyError", "'for good'", None, 2]
    (failed,) = [e for e in handle.history() if e.type == "ActivityFailed"]
    assert failed.attributes["failure"]["retryable"] is False


def test_a_cancelled_activity_that_fails_is_not_tried_again(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    deferred = Deferred(retry=durable.RetryPolicy(initial_interval=0.01), cancellation="wait")
    start_worker()
    handle = deferred.run.start()
    token = deferred.token()
    wait_until(lambda: parked(broker), timeout=10, message="it is parked")
    handle.signal("cancel")
    wait_until(lambda: "ActivityCancelRequested" in [e.type for e in handle.history()])
    durable.fail_activity(token, ValueError("anyway"))
    assert handle.result(timeout=10) == ["ValueError", "anyway", None, 1]


def test_nothing_waits_for_a_token_of_a_run_that_has_closed(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """It closed while the activity's actor ran."""
    tokens: list[str] = []
    closed = threading.Event()

    @durable.activity(queue_name="steps", start_to_close=60)
    def ask() -> None:
        tokens.append(durable.complete_later())
        with contextlib.suppress(durable.ActivityCancelled):
            closed.wait(10)

    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        return await ask.execute()

    start_worker()
    handle = run.start()
    wait_until(lambda: len(tokens) == 1)
    handle.terminate()
    closed.set()

    def left() -> list[Any]:
        with looking(broker) as conn:
            return [
                conn.execute(f"SELECT count(*) FROM durable.{table}").fetchone()
                for table in ("message", "activity", "activity_cancel")
            ]

    wait_until(lambda: left() == [(0,)] * 3, timeout=10, message="nothing is left of it")
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(tokens[0])


@pytest.mark.parametrize("token", ["", "nonsense", "é", "AAAA" * 14, "x" * 5000])
def test_no_tokens(broker: durable.DurableBroker, token: str) -> None:
    with pytest.raises(durable.UnknownToken, match="complete_later"):
        durable.complete_activity(token)


def test_wrong_calls(broker: durable.DurableBroker) -> None:
    with pytest.raises(TypeError):
        durable.complete_activity(b"token")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        durable.fail_activity("token", "no exception")  # type: ignore[arg-type]
    with pytest.raises(durable.DurableError, match="activity"):
        durable.complete_later()


def test_the_twins(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    deferred = Deferred()
    start_worker()

    async def client() -> list[Any]:
        said = []
        for end in (durable.acomplete_activity, durable.afail_activity):
            handle = deferred.run.start()
            token = await asyncio.to_thread(deferred.token)
            await durable.aheartbeat_activity(token, {"so": "far"})
            assert (await handle.adescribe()).pending[0].heartbeat_details == {"so": "far"}
            await end(token, ValueError("no") if end is durable.afail_activity else "yes")  # type: ignore[operator]
            said.append(await handle.aresult(timeout=10))
        return said

    assert asyncio.run(client()) == ["yes", ["ValueError", "no", None, 1]]


def test_limits_hold_while_it_waits_and_the_token_goes_with_the_attempt(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    deferred = Deferred(start_to_close=0.5, retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2))
    start_worker()
    handle = deferred.run.start()
    first = deferred.token()
    second = deferred.token()
    assert first != second
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(first)
    kind, _, timeout, attempt = handle.result(timeout=10)
    assert (kind, timeout, attempt) == ("Timeout", "start_to_close", 2)
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(second)


def test_heartbeats_from_elsewhere_keep_it_alive(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    deferred = Deferred(heartbeat=0.8, retry=durable.RetryPolicy(maximum_attempts=1))
    start_worker()
    handle = deferred.run.start()
    token = deferred.token()
    for _ in range(8):
        durable.heartbeat_activity(token)
        threading.Event().wait(0.2)
    assert handle.status() == "running"
    kind, _, timeout, _ = handle.result(timeout=10)
    assert (kind, timeout) == ("Timeout", "heartbeat")


@pytest.mark.parametrize("policy", ["try", "wait"])
def test_a_cancel_reaches_whoever_has_the_token(
    broker: durable.DurableBroker, start_worker: StartWorker, policy: str
) -> None:
    deferred = Deferred(cancellation=policy)
    start_worker()
    handle = deferred.run.start()
    token = deferred.token()
    wait_until(lambda: parked(broker), timeout=10, message="it is parked")
    durable.heartbeat_activity(token)

    def told() -> bool:
        try:
            durable.heartbeat_activity(token)
        except (durable.ActivityCancelled, durable.UnknownToken):
            return True
        return False

    handle.signal("cancel")
    wait_until(told, timeout=10, message="it is told")
    if policy == "wait":
        with pytest.raises(durable.ActivityCancelled):
            durable.heartbeat_activity(token)
        durable.fail_activity(token, durable.ActivityCancelled())
    assert handle.result(timeout=10) == "cancelled"


def test_an_actor_that_raises_has_failed(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    tokens: list[str] = []

    @durable.activity(queue_name="steps", max_retries=0)
    def ask() -> None:
        tokens.append(durable.complete_later())
        raise ValueError("boom")

    @durable.workflow(queue_name="runs")
    async def run() -> str:
        try:
            return str(await ask.execute())
        except durable.ActivityFailed as e:
            return e.type

    start_worker()
    assert run.start().result(timeout=10) == "ValueError"
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(tokens[0])


def test_async_actors_and_their_transactions(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    broker.add_middleware(AsyncIO())
    with looking(broker) as conn:
        conn.execute("CREATE TABLE effect (n int)")
    tokens: list[str] = []
    came = threading.Event()

    @durable.activity(queue_name="steps", start_to_close=30, heartbeat=30)
    async def ask() -> None:
        async with durable.transaction() as conn:
            assert isinstance(conn, psycopg.AsyncConnection)
            await conn.execute("INSERT INTO effect VALUES (1)")
        durable.heartbeat("here")
        tokens.append(durable.complete_later())
        came.set()

    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        return await ask.execute()

    start_worker()
    handle = run.start()
    assert came.wait(10)
    wait_until(lambda: parked(broker), timeout=10, message="it is parked")
    with looking(broker) as conn:
        assert conn.execute("SELECT n FROM effect").fetchall() == [(1,)]
    durable.complete_activity(tokens[0], "x")
    assert handle.result(timeout=10) == "x"
