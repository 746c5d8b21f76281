"""Retries, fatal errors, time limits, cancels, terminations."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


def test_an_activity_succeeds_at_its_third_attempt(broker: Any, start_worker: StartWorker) -> None:
    attempts: list[Any] = []

    @durable.activity(
        retry=durable.RetryPolicy(
            initial_interval=0.1, backoff_coefficient=2, maximum_interval="1s", maximum_attempts=5
        )
    )
    def flaky() -> str:
        info = durable.activity_info()
        assert info is not None
        attempts.append((info.attempt, info.is_last_attempt, time.monotonic()))
        if len(attempts) < 3:
            raise ConnectionError(f"attempt {info.attempt}")
        return "done"

    @durable.workflow
    async def retries() -> str:
        return await flaky.execute()

    start_worker()
    handle = retries.start()
    assert handle.result(timeout=20) == "done"
    assert [a[:2] for a in attempts] == [(1, False), (2, False), (3, False)]
    assert attempts[1][2] - attempts[0][2] >= 0.095
    assert attempts[2][2] - attempts[1][2] >= 0.195
    assert types(handle).count("ActivityFailed") == 0
    assert types(handle).count("ActivityScheduled") == 1


def test_attempts_run_out(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def never() -> None:
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as e:
            raise OSError("disk") from e

    @durable.workflow
    async def catches() -> list[Any]:
        policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3)
        try:
            await never.options(retry=policy).execute()
        except durable.ActivityFailed as e:
            cause: Any = e.__cause__
            return [e.activity, e.attempt, e.type, e.message, e.timeout, cause.type, "ZeroDivisionError" in str(cause)]
        return []

    start_worker()
    handle = catches.start()
    assert handle.result(timeout=20) == ["never", 3, "OSError", "disk", None, "ZeroDivisionError", True]
    failed = next(e for e in handle.history() if e.type == "ActivityFailed")
    assert failed.name == "never"


def test_fatal_errors_are_not_tried_again(broker: Any, start_worker: StartWorker) -> None:
    class FatalError(Exception): ...

    class Derived(FatalError): ...

    calls: list[str] = []

    @durable.activity(throws=FatalError)
    def by_throws() -> None:
        calls.append("throws")
        raise FatalError("f")

    @durable.activity
    def by_policy(cls: str) -> None:
        calls.append(cls)
        raise {"FatalError": FatalError, "Derived": Derived}[cls]("f")

    @durable.workflow
    async def fatal() -> list[Any]:
        seen = []
        policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3, non_retryable=("FatalError",))
        for call in (
            by_throws.execute(),
            by_policy.options(retry=policy).execute("FatalError"),
        ):
            try:
                await call
            except durable.ActivityFailed as e:
                seen.append([e.attempt, e.type, e.retryable])
        return seen

    start_worker()
    assert fatal.start().result(timeout=20) == [[1, "FatalError", False], [1, "FatalError", False]]
    assert calls == ["throws", "FatalError"]


def test_non_retryable_takes_classes(broker: Any, start_worker: StartWorker) -> None:
    class FatalError(Exception): ...

    calls: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3, non_retryable=(FatalError,)))
    def breaks() -> None:
        calls.append(1)
        raise FatalError("f")

    @durable.workflow
    async def fatal() -> None:
        await breaks.execute()

    start_worker()
    with pytest.raises(durable.WorkflowFailed) as caught:
        fatal.start().result(timeout=20)
    assert calls == [1]
    error: Any = caught.value
    assert error.type == "ActivityFailed"
    assert error.__cause__.type == "FatalError"


def test_next_retry_delay(broker: Any, start_worker: StartWorker) -> None:
    at: list[float] = []

    class Later(Exception):
        next_retry_delay = 0.3

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01))
    def waits() -> None:
        at.append(time.monotonic())
        if len(at) < 2:
            raise Later

    @durable.workflow
    async def flow() -> None:
        await waits.execute()

    start_worker()
    flow.start().result(timeout=20)
    assert at[1] - at[0] >= 0.295


def test_pending_shows_the_failed_attempt(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity(retry=durable.RetryPolicy(initial_interval="1h"))
    def slow_to_heal() -> None:
        durable.heartbeat({"at": 7})
        raise RuntimeError("not now")

    @durable.workflow
    async def child() -> None:
        await durable.sleep("1d")

    @durable.workflow
    async def flow() -> None:
        child.start()
        await asyncio.gather(slow_to_heal.execute(), durable.sleep("2h"), durable.escalate(role="r", subject="s"))

    start_worker()
    handle = flow.start()

    def failed() -> Any:
        pending = {p.kind: p for p in handle.describe().pending}
        return pending if "activity" in pending and pending["activity"].last_failure else None

    pending = wait_until(failed)
    assert set(pending) == {"activity", "timer", "child", "escalation"}
    activity = pending["activity"]
    assert activity.name == "slow_to_heal"
    assert activity.attempt == 2
    assert "not now" in str(activity.last_failure)
    assert activity.next_attempt_at is not None
    assert activity.heartbeat_details == {"at": 7}
    assert pending["child"].name == "child"
    assert handle.describe().stack is None or "flow" in handle.describe().stack
    handle.terminate()


@pytest.mark.parametrize(
    ("option", "kind"),
    [("start_to_close", "start_to_close"), ("heartbeat", "heartbeat"), ("schedule_to_close", "schedule_to_close")],
)
def test_time_limits_of_activities(broker: Any, start_worker: StartWorker, option: str, kind: str) -> None:
    release = threading.Event()

    @durable.activity(max_retries=0)
    def hangs() -> None:
        for _ in range(500):
            if release.wait(0.02):
                return

    @durable.workflow
    async def limited() -> list[Any]:
        try:
            await hangs.options(**{option: 0.3}).execute()
        except durable.ActivityFailed as e:
            return [e.activity, e.attempt, e.timeout]
        return []

    start_worker()
    handle = limited.start()
    try:
        assert handle.result(timeout=20) == ["hangs", 1, kind]
    finally:
        release.set()
    assert "ActivityTimedOut" in types(handle)


def test_nobody_takes_the_activity(broker: Any, start_worker: StartWorker) -> None:
    remote = durable.activity_stub("elsewhere", queue_name="nobody")

    @durable.workflow
    async def limited() -> Any:
        try:
            await remote.options(schedule_to_start="200ms").execute(1)
        except durable.ActivityFailed as e:
            return [e.activity, e.timeout]

    start_worker()
    assert limited.start().result(timeout=20) == ["elsewhere", "schedule_to_start"]


def test_cancel_with_cleanup(broker: Any, start_worker: StartWorker) -> None:
    log: list[str] = []

    @durable.activity
    def note(text: str) -> None:
        log.append(text)

    @durable.workflow
    async def flow(swallow: bool) -> str:
        try:
            await durable.sleep("1h")
        except asyncio.CancelledError:
            async with durable.uncancellable():
                await note.execute("clean")
                await durable.sleep(0.01)
                await note.execute("up")
            if not swallow:
                raise
        return "swallowed"

    start_worker()
    handle = flow.start(False)
    wait_until(lambda: "TimerStarted" in types(handle))
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)
    assert handle.status() == "cancelled"
    assert log == ["clean", "up"]
    assert types(handle)[-1] == "WorkflowCancelled"
    assert "CancelRequested" in types(handle)
    assert "TimerCancelled" in types(handle)
    second = flow.start(True)
    wait_until(lambda: "TimerStarted" in types(second))
    second.cancel()
    assert second.result(timeout=20) == "swallowed"


def test_a_second_cancel_after_a_swallowed_one(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def stubborn() -> list[str]:
        seen: list[str] = []

        @durable.on_query("seen")
        def show() -> list[str]:
            return seen

        for _ in range(2):
            try:
                await durable.wait_for_signal("never")
            except asyncio.CancelledError:
                seen.append("cancelled")
        return seen

    start_worker()
    handle = stubborn.start()
    assert handle.query("seen") == []
    handle.cancel()
    wait_until(lambda: handle.query("seen") == ["cancelled"])
    handle.cancel()
    assert handle.result(timeout=20) == ["cancelled"] * 2


def test_shield_and_the_scope_of_one_task(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def work(n: int) -> int:
        time.sleep(0.1)
        return n

    @durable.workflow
    async def flow() -> Any:
        inner = asyncio.ensure_future(work.execute(5))
        try:
            await asyncio.shield(asyncio.gather(inner, durable.sleep(0.5)))
        except asyncio.CancelledError:
            return ["cancelled", await inner]
        return "?"

    start_worker()
    handle = flow.start()
    wait_until(lambda: "ActivityScheduled" in types(handle))
    handle.cancel()
    assert handle.result(timeout=20) == ["cancelled", 5]


def test_an_activity_is_told_of_the_cancel(broker: Any, start_worker: StartWorker) -> None:
    seen: list[str] = []
    begun = threading.Event()

    @durable.activity(max_retries=0)
    def long() -> None:
        begun.set()
        try:
            for _ in range(500):
                time.sleep(0.02)
                durable.heartbeat()
        except durable.ActivityCancelled:
            seen.append("told")
            raise

    @durable.workflow
    async def flow(policy: str) -> str:
        task = asyncio.ensure_future(long.options(cancellation=policy).execute())
        await durable.wait_for_signal("stop")
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "?"

    start_worker()
    for policy in ("try", "wait"):
        begun.clear()
        seen.clear()
        handle = flow.start(policy)
        assert begun.wait(10)
        handle.signal("stop")
        assert handle.result(timeout=20) == "cancelled"
        wait_until(lambda: seen == ["told"])
        assert ("ActivityCancelRequested" in types(handle)) == (policy == "wait")
        assert "ActivityCancelled" in types(handle)
        assert "ActivityFailed" not in types(handle)


def test_terminate_says_why(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> None:
        await durable.sleep("1h")

    @durable.workflow
    async def forever() -> None:
        async with asyncio.TaskGroup() as group:
            for policy in ("terminate", "cancel", "abandon"):
                group.create_task(kid.options(workflow_id=f"k-{policy}", parent_close=policy).execute())

    start_worker()
    handle = forever.start()
    wait_until(lambda: len(handle.children()) == 3)
    for policy in ("terminate", "cancel", "abandon"):
        wait_until(lambda policy=policy: "TimerStarted" in types(durable.get_handle(f"k-{policy}")))
    handle.terminate(reason="house rules")
    assert handle.status() == "terminated"
    with pytest.raises(durable.WorkflowTerminated, match="house rules"):
        handle.result(timeout=5)
    wait_until(lambda: durable.get_handle("k-terminate").status() == "terminated")
    wait_until(lambda: durable.get_handle("k-cancel").status() == "cancelled")
    assert durable.get_handle("k-abandon").status() == "running"
    assert handle.history()[-1].type == "WorkflowTerminated"
    assert handle.history()[-1].attributes["reason"] == "house rules"


def test_timeouts_of_runs(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def forever() -> None:
        await durable.sleep("1h")

    start_worker()
    for option in ("run_timeout", "execution_timeout"):
        handle = forever.options(**{option: 0.3}).start()
        with pytest.raises(durable.WorkflowTimedOut):
            handle.result(timeout=20)
        assert handle.status() == "timed_out"
        assert types(handle)[-1] == "WorkflowTimedOut"


def test_a_workflow_that_is_retried(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow(retry=durable.RetryPolicy(initial_interval=0.05, maximum_attempts=3, non_retryable=("KeyError",)))
    async def shaky(how: str) -> int:
        attempt = durable.info().attempt
        if how == "heals" and attempt == 3:
            return attempt
        raise KeyError("k") if how == "fatal" else ValueError(f"attempt {attempt}")

    start_worker()
    assert shaky.start("heals").result(timeout=20) == 3
    with pytest.raises(durable.WorkflowFailed, match="attempt 3"):
        shaky.start("never").result(timeout=20)
    handle = shaky.start("fatal")
    with pytest.raises(durable.WorkflowFailed) as caught:
        handle.result(timeout=20)
    assert caught.value.type == "KeyError"
    assert durable.count_workflows(f"workflow_id = '{handle.workflow_id}'") == 1


def test_an_async_activity_needs_no_middleware(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    async def nap(n: int) -> int:
        await asyncio.sleep(0.01)
        return n

    @durable.workflow
    async def flow() -> list[int]:
        return await asyncio.gather(*(nap.execute(n) for n in range(5)))

    worker = start_worker()
    assert flow.start().result(timeout=20) == list(range(5))
    worker.stop()
    start_worker()
    assert flow.start().result(timeout=20) == list(range(5))


def test_an_async_activity_with_dramatiqs_own_middleware(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    async def nap(n: int) -> int:
        await asyncio.sleep(0.01)
        return n

    broker.add_middleware(dramatiq.middleware.AsyncIO())

    @durable.workflow
    async def flow() -> int:
        return await nap.execute(3)

    start_worker()
    assert flow.start().result(timeout=20) == 3


def test_both_retries_are_an_error() -> None:
    with pytest.raises(ValueError):
        durable.activity(max_retries=3, retry=durable.RetryPolicy())(lambda: None)


def test_forbidden_in_workflows(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def act() -> int:
        return 1

    @dramatiq.actor
    def plain() -> None: ...

    @durable.workflow
    async def other() -> None: ...

    @durable.workflow
    async def bad(what: str) -> str:
        try:
            match what:
                case "send":
                    plain.send()
                case "send activity":
                    act.send()
                case "sleep":
                    time.sleep(1)
                case "thread":
                    threading.Thread(target=print).start()
                case "open":
                    open("/etc/hostname")
                case "handle":
                    durable.get_handle("x").result()
                case "list":
                    durable.list_workflows()
                case "escalations":
                    durable.escalations.list()
        except durable.ForbiddenInWorkflow as e:
            return f"forbidden: {e}"
        return "allowed"

    start_worker()
    for what in ("send", "send activity", "sleep", "thread", "open", "handle", "list", "escalations"):
        assert bad.start(what).result(timeout=20).startswith("forbidden"), what


def test_outside_of_a_workflow(broker: Any) -> None:
    for call in (
        durable.now,
        durable.random,
        durable.uuid4,
        durable.info,
        durable.is_replaying,
        lambda: durable.patched("x"),
        lambda: durable.continue_as_new(),
        durable.entity,
        durable.all_handlers_finished,
        lambda: durable.on_signal("x")(lambda: None),
    ):
        with pytest.raises(durable.NotInWorkflow):
            call()
    assert durable.activity_info() is None
