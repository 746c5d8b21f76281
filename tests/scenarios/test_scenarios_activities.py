"""What activities do to the workflows that call them, told by the page of the API alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]
once = durable.RetryPolicy(maximum_attempts=1)


class OutOfStock(Exception):
    pass


class NoMoney(Exception):
    pass


def links(e: BaseException | None) -> list[tuple[str, str]]:
    """The chain of causes as (type, message)."""
    found = []
    while e is not None:
        found.append((e.type, e.message))  # type: ignore[attr-defined]
        e = e.__cause__
    return found


def test_a_failure_has_its_attributes_inside_and_outside(start_worker: StartWorker) -> None:
    @durable.activity(retry=once)
    def buy(item: str) -> None:
        try:
            try:
                raise KeyError(item)
            except KeyError as e:
                raise NoMoney("empty purse") from e
        except NoMoney as e:
            raise OutOfStock("no more " + item) from e

    seen: list[Any] = []

    @durable.workflow
    async def shop() -> None:
        try:
            await buy.execute("tea")
        except durable.ActivityFailed as e:
            seen[:] = [
                e.activity,
                e.attempt,
                e.type,
                e.message,
                e.retryable,
                e.timeout,
                e.traceback,
                links(e.__cause__),
            ]
            raise

    start_worker()
    handle = shop.start()
    with pytest.raises(durable.WorkflowFailed) as failed:
        handle.result(timeout=10)
    assert seen[:4] == ["buy", 1, "OutOfStock", "no more tea"]
    assert seen[5] is None
    assert "in buy" in seen[6]
    assert seen[7] == [("NoMoney", "empty purse"), ("KeyError", "'tea'")]
    error = failed.value
    assert error.workflow_id == handle.workflow_id
    assert error.type == "ActivityFailed"
    assert links(error)[0][0] == "ActivityFailed"
    chain = links(error.__cause__)
    assert [t for t, _ in chain][-3:] == ["OutOfStock", "NoMoney", "KeyError"], chain
    failure = handle.describe().failure
    assert failure is not None
    assert failure["type"] == "ActivityFailed"
    assert handle.history()[-1].type == "WorkflowFailed"
    event = next(e for e in handle.history() if e.type == "ActivityFailed")
    assert event.name == "buy"


def test_a_failure_raised_again_from_another(start_worker: StartWorker) -> None:
    @durable.activity(retry=once)
    def breaks() -> None:
        raise ValueError("deep")

    @durable.workflow
    async def wraps() -> None:
        try:
            await breaks.execute()
        except durable.ActivityFailed as e:
            raise OutOfStock("shallow") from e

    start_worker()
    with pytest.raises(durable.WorkflowFailed) as failed:
        wraps.start().result(timeout=10)
    assert links(failed.value)[0] == ("OutOfStock", "shallow")
    chain = [t for t, _ in links(failed.value)]
    assert chain[0] == "OutOfStock"
    assert "ActivityFailed" in chain
    assert chain[-1] == "ValueError"


def test_no_retry_by_type_and_by_limit(start_worker: StartWorker) -> None:
    tries: list[str] = []

    @durable.activity
    def breaks(kind: str) -> None:
        tries.append(kind)
        raise {"money": NoMoney, "stock": OutOfStock}[kind](kind)

    policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3, non_retryable=("NoMoney",))
    by_class = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3, non_retryable=(NoMoney,))

    @durable.workflow
    async def run() -> list[Any]:
        found: list[Any] = []
        for p in (policy, by_class):
            for kind in ("money", "stock"):
                try:
                    await breaks.options(retry=p).execute(kind)
                except durable.ActivityFailed as e:
                    found.append((e.type, e.attempt, e.retryable))
        return found

    start_worker()
    assert [tuple(x) for x in run.start().result(timeout=20)] == [
        ("NoMoney", 1, False),
        ("OutOfStock", 3, True),
    ] * 2
    assert tries == ["money", "stock", "stock", "stock"] * 2


def test_next_retry_delay_of_an_exception(start_worker: StartWorker) -> None:
    class Busy(Exception):
        next_retry_delay = timedelta(milliseconds=50)

    class Later(Exception):
        def __init__(self) -> None:
            super().__init__("later")
            self.next_retry_delay = 0.05

    at: list[float] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=60, maximum_attempts=3))
    def flaky() -> int:
        at.append(time.monotonic())
        if len(at) == 1:
            raise Busy
        if len(at) == 2:
            raise Later
        return len(at)

    @durable.workflow
    async def run() -> int:
        return await flaky.execute()

    start_worker()
    assert run.start().result(timeout=10) == 3
    assert at[2] - at[0] < 8


def test_every_timeout_has_its_name_and_cause(start_worker: StartWorker) -> None:
    @durable.activity(retry=once)
    def slow() -> None:
        for _ in range(1000):
            time.sleep(0.01)

    nowhere = durable.activity_stub("nowhere", queue_name="nowhere")

    @durable.workflow
    async def run() -> list[Any]:
        found = []
        for call in (
            slow.options(start_to_close=0.2),
            slow.options(heartbeat="0.2s"),
            slow.options(schedule_to_close=timedelta(seconds=0.3)),
            nowhere.options(schedule_to_start=0.2),
            nowhere.options(schedule_to_close=0.2),
        ):
            try:
                await call.execute()
            except durable.ActivityFailed as e:
                found.append([e.timeout, e.activity, e.attempt, isinstance(e, TimeoutError)])
        return found

    start_worker()
    handle = run.start()
    assert handle.result(timeout=30) == [
        ["start_to_close", "slow", 1, False],
        ["heartbeat", "slow", 1, False],
        ["schedule_to_close", "slow", 1, False],
        ["schedule_to_start", "nowhere", 1, False],
        ["schedule_to_close", "nowhere", 1, False],
    ]
    assert [e.type for e in handle.history()].count("ActivityTimedOut") == 5


def test_a_timeout_is_known_by_its_name_behind_every_boundary(start_worker: StartWorker) -> None:
    nowhere = durable.activity_stub("nowhere", queue_name="nowhere").options(schedule_to_start=0.2)

    @durable.workflow
    async def child() -> None:
        await nowhere.execute()

    @durable.workflow
    async def run() -> str:
        @durable.on_update("u")
        async def u() -> None:
            await nowhere.execute()

        await durable.wait_for_signal("end")
        try:
            await child.execute()
        except durable.ChildWorkflowFailed as e:
            assert (e.type, e.timeout) == ("ActivityFailed", None)
            cause = e.__cause__
            assert (cause.type, cause.timeout) == ("Timeout", "schedule_to_start")  # type: ignore[union-attr]
            raise
        return "?"

    start_worker()
    handle = run.start()
    with pytest.raises(durable.UpdateFailed) as update:
        handle.update("u", timeout=10)
    handle.signal("end")
    with pytest.raises(durable.WorkflowFailed) as failed:
        handle.result(timeout=10)
    assert failed.value.type == "ChildWorkflowFailed"
    for link in (update.value, failed.value):
        last: Any = link
        while last.__cause__ is not None:
            last = last.__cause__
        assert (last.type, last.timeout) == ("Timeout", "schedule_to_start")


def test_details_of_heartbeats_go_to_the_next_attempt(start_worker: StartWorker) -> None:
    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=4))
    def count() -> list[Any]:
        info = durable.activity_info()
        assert info is not None
        if info.attempt == 1:
            assert info.heartbeat_details is None
            durable.heartbeat({"at": 1})
            durable.heartbeat({"at": 2, "more": [1, "x"]})
            raise RuntimeError("first")
        if info.attempt == 2:
            # no heartbeat in this attempt
            raise RuntimeError("second")
        return [info.attempt, info.heartbeat_details, info.is_last_attempt]

    @durable.workflow
    async def run() -> list[Any]:
        return await count.execute()

    start_worker()
    assert run.start().result(timeout=10) == [3, {"at": 2, "more": [1, "x"]}, False]


def test_activity_info_is_whole(start_worker: StartWorker) -> None:
    infos: list[Any] = []

    @durable.activity(queue_name="shelf", retry=once, start_to_close=30)
    def look() -> None:
        infos.append(durable.activity_info())

    @dramatiq.actor(queue_name="shelf")
    def plain() -> None:
        infos.append(durable.activity_info())

    @durable.workflow
    async def run() -> None:
        await look.execute()

    start_worker()
    handle = run.options(workflow_id="i-1").start()
    handle.result(timeout=10)
    plain.send()
    wait_until(lambda: len(infos) == 2)
    info = infos[0]
    assert (info.workflow_id, info.run_id, info.activity, info.attempt) == ("i-1", handle.run_id, "look", 1)
    assert info.is_last_attempt is True
    assert isinstance(info.scheduled_at, datetime)
    assert info.scheduled_at.tzinfo is not None
    assert info.deadline is None or isinstance(info.deadline, datetime)
    assert info.headers == {}
    assert infos[1] is None


@pytest.mark.parametrize("policy", ["try", "wait", "abandon"])
def test_types_of_cancellation(start_worker: StartWorker, policy: str) -> None:
    running, told, free = threading.Event(), threading.Event(), threading.Event()

    @durable.activity(retry=once)
    def work() -> str:
        running.set()
        try:
            while not free.is_set():
                durable.heartbeat()
                time.sleep(0.01)
        except durable.ActivityCancelled:
            told.set()
            free.wait(10)
            if policy == "wait":
                return "cleaned up"
            raise
        return "not told"

    @durable.workflow
    async def run() -> str:
        task = asyncio.create_task(work.options(cancellation=policy).execute())
        await durable.wait_for_signal("go")
        task.cancel()
        try:
            return "result " + await task
        except asyncio.CancelledError:
            return "cancelled"

    start_worker()
    handle = run.start()
    assert running.wait(10)
    handle.signal("go")
    if policy != "abandon":
        assert told.wait(10)
    if policy == "wait":
        assert handle.status() == "running"
        free.set()
        assert handle.result(timeout=10) == "result cleaned up"
    else:
        assert handle.result(timeout=10) == "cancelled"
        free.set()
        types = [e.type for e in handle.history()]
        assert ("ActivityCancelled" in types) == (policy == "try")


def test_waiting_for_a_cancelled_activity_that_ends_cancelled(start_worker: StartWorker) -> None:
    running = threading.Event()

    @durable.activity(retry=once)
    def work() -> None:
        running.set()
        while True:
            time.sleep(0.01)

    @durable.workflow
    async def run() -> str:
        call = work.options(cancellation="wait").start()
        await durable.wait_for_signal("go")
        call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            return "cancelled"
        return "?"

    start_worker()
    handle = run.start()
    assert running.wait(10)
    handle.signal("go")
    assert handle.result(timeout=10) == "cancelled"
    assert [e.type for e in handle.history()][-3:] == [
        "ActivityCancelRequested",
        "ActivityCancelled",
        "WorkflowCompleted",
    ]


def test_an_activity_cancelled_while_it_waits_for_its_retry(start_worker: StartWorker) -> None:
    failed = threading.Event()

    @durable.activity(retry=durable.RetryPolicy(initial_interval=3600))
    def work() -> None:
        failed.set()
        raise ValueError("once")

    @durable.workflow
    async def run() -> str:
        task = work.options(cancellation="wait").start()
        await durable.wait_for_signal("go")
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        except durable.ActivityFailed as e:
            return e.type
        return "?"

    start_worker()
    handle = run.start()
    assert failed.wait(10)
    wait_until(lambda: handle.describe().pending[0].last_failure)
    (pending,) = [p for p in handle.describe().pending if p.kind == "activity"]
    assert pending.name == "work"
    assert pending.attempt == 2
    assert "once" in str(pending.last_failure)
    assert pending.next_attempt_at is not None
    assert pending.next_attempt_at > datetime.now(UTC) + timedelta(minutes=50)
    handle.signal("go")
    assert handle.result(timeout=10) == "cancelled"


def test_async_completion(start_worker: StartWorker) -> None:
    tokens: list[Any] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2))
    def ask(what: str) -> str:
        tokens.append(durable.complete_later())
        return "ignored"

    @durable.workflow
    async def run() -> Any:
        try:
            return await ask.execute("x")
        except durable.ActivityFailed as e:
            return [e.type, e.message, e.attempt]

    start_worker()
    handle = run.start()
    wait_until(lambda: len(tokens) == 1)
    durable.heartbeat_activity(tokens[0], {"half": True})
    wait_until(lambda: handle.describe().pending[0].heartbeat_details == {"half": True})
    durable.complete_activity(tokens[0], "from afar")
    assert handle.result(timeout=10) == "from afar"
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(tokens[0], "again")

    failing = run.start()
    wait_until(lambda: len(tokens) == 2)
    durable.fail_activity(tokens[1], NoMoney("declined"))
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(tokens[1], "late")
    # Its policy gives it a second try, which has a token of its own.
    wait_until(lambda: len(tokens) == 3)
    durable.fail_activity(tokens[2], NoMoney("declined again"))
    assert failing.result(timeout=10) == ["NoMoney", "declined again", 2]


def test_local_activities(start_worker: StartWorker) -> None:
    tries: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3))
    def flaky(least: int) -> int:
        info = durable.activity_info()
        assert info is not None
        assert (info.workflow_id, info.activity, info.heartbeat_details) == ("l-1", "flaky", None)
        assert info.is_last_attempt == (info.attempt == 3)
        durable.heartbeat(info.attempt)
        tries.append(info.attempt)
        if info.attempt < least:
            raise NoMoney(f"attempt {info.attempt}")
        return info.attempt

    async def plain(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    def breaks() -> None:
        raise OutOfStock("local")

    @durable.workflow
    async def run() -> Any:
        first = await flaky.options(local=True).execute(2)
        try:
            await flaky.options(local=True).execute(9)
        except durable.ActivityFailed as e:
            last = [e.activity, e.attempt, e.type, e.message]
        try:
            await durable.local(breaks)
        except durable.ActivityFailed as e:
            third = [e.activity, e.type, e.message]
        return [first, last, third, await durable.local(plain, 1)]

    start_worker()
    handle = run.options(workflow_id="l-1").start()
    assert handle.result(timeout=10) == [2, ["flaky", 3, "NoMoney", "attempt 3"], ["breaks", "OutOfStock", "local"], 2]
    types = [e.type for e in handle.history()]
    assert "ActivityScheduled" not in types
    assert "LocalActivityCompleted" in types


def test_activities_in_parallel_with_one_that_fails(start_worker: StartWorker) -> None:
    told = threading.Event()

    @durable.activity(retry=once)
    def good(n: int) -> int:
        return n

    @durable.activity(retry=once)
    def bad() -> None:
        raise NoMoney("bad")

    @durable.activity(retry=once)
    def long() -> None:
        try:
            while True:
                time.sleep(0.01)
        except durable.ActivityCancelled:
            told.set()
            raise

    @durable.workflow
    async def run() -> list[Any]:
        found: list[Any] = [await asyncio.gather(*(good.execute(n) for n in range(5)))]
        outcomes = await asyncio.gather(good.execute(1), bad.execute(), return_exceptions=True)
        found.append([type(o).__name__ for o in outcomes])
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(long.execute())
                group.create_task(bad.execute())
        except* durable.ActivityFailed as es:
            found.append([e.type for e in es.exceptions])  # type: ignore[attr-defined, union-attr]
        return found

    start_worker()
    assert run.start().result(timeout=10) == [[0, 1, 2, 3, 4], ["int", "ActivityFailed"], ["NoMoney"]]
    assert told.wait(10)


def test_async_activities_are_cancelled_by_cancelled_error(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    broker.add_middleware(dramatiq.middleware.AsyncIO())
    running, told = threading.Event(), threading.Event()

    @durable.activity(retry=once)
    async def work() -> None:
        running.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError as e:
            if isinstance(e, durable.ActivityCancelled):
                told.set()
            raise

    @durable.workflow
    async def run() -> str:
        try:
            async with asyncio.timeout(0.5):
                await work.execute()
        except TimeoutError:
            return "timeout"
        return "?"

    start_worker()
    assert run.start().result(timeout=10) == "timeout"
    assert running.is_set()
    assert told.wait(10)


def test_keyword_arguments_defaults_and_options_of_definitions(start_worker: StartWorker) -> None:
    @durable.activity(queue_name="k", actor_name="named", max_retries=0)
    def act(a: int, b: int = 2, *, c: int = 3) -> list[int]:
        return [a, b, c]

    @durable.workflow(name="flow", queue_name="k")
    async def run(x: int, *, y: int = 5) -> list[Any]:
        return [await act.execute(x), await act.execute(x, 4, c=y), await act.execute(a=1, b=1, c=1)]

    start_worker()
    handle = run.start(1, y=7)
    assert handle.result(timeout=10) == [[1, 2, 3], [1, 4, 7], [1, 1, 1]]
    assert handle.describe().name == "flow"
    assert handle.describe().input == {"args": [1], "kwargs": {"y": 7}}
    assert {e.name for e in handle.history() if e.type == "ActivityScheduled"} == {"named"}


def test_an_unregistered_activity_is_tried_until_its_time_is_over(start_worker: StartWorker) -> None:
    @durable.activity(queue_name="known")
    def known() -> None: ...

    missing = durable.activity_stub("missing", queue_name="known")

    @durable.workflow
    async def run() -> Any:
        try:
            await missing.options(schedule_to_close=1).execute()
        except durable.ActivityFailed as e:
            return [e.activity, e.timeout or e.type]

    start_worker()
    result = run.start().result(timeout=30)
    assert result[0] == "missing"
