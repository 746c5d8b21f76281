"""Workflows on a real database and a real worker."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def test_result_history_and_status(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="steps")
    def double(n: int) -> int:
        return n * 2

    @durable.workflow(queue_name="runs")
    async def twice(n: int) -> int:
        return await double.execute(await double.execute(n))

    start_worker()
    handle = twice.options(workflow_id="w-1").start(5)
    assert handle.result(timeout=10) == 20
    assert handle.workflow_id == "w-1"
    assert handle.status() == "completed"
    history = handle.history()
    assert [e.event_id for e in history] == list(range(1, len(history) + 1))
    assert [e.type for e in history] == [
        "WorkflowStarted",
        "ActivityScheduled",
        "ActivityCompleted",
        "ActivityScheduled",
        "ActivityCompleted",
        "WorkflowCompleted",
    ]
    assert history[0].attributes["input"] == {"args": [5], "kwargs": {}}
    assert history[2].attributes["result"] == 10
    assert sorted(e.at for e in history) == [e.at for e in history]
    description = handle.describe()
    assert (description.name, description.queue_name, description.closed_at is not None) == ("twice", "runs", True)
    assert durable.get_handle("w-1").result(timeout=5) == 20
    assert durable.get_handle(run_id=handle.run_id).status() == "completed"
    broker.join("runs", timeout=5000)
    broker.join("steps", timeout=5000)


def test_async_twins(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def greet(name: str) -> str:
        return f"{await durable.wait_for_signal('greeting')} {name}"

    start_worker()

    async def client() -> str:
        handle = await greet.astart("world")
        assert await handle.astatus() == "running"
        await handle.asignal("greeting", "hello")
        result = await handle.aresult(timeout=10)
        assert (await handle.ahistory())[-1].type == "WorkflowCompleted"
        assert (await handle.adescribe()).status == "completed"
        with pytest.raises(durable.WorkflowClosed):
            await handle.acancel()
        with pytest.raises(durable.WorkflowClosed):
            await handle.aterminate()
        return result

    assert asyncio.run(client()) == "hello world"


def test_send_starts_a_run_and_so_does_a_plain_message(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    done = threading.Event()

    @durable.activity
    def mark(who: str) -> None:
        assert who == "pipeline"
        done.set()

    @durable.workflow
    async def follow(who: str) -> str:
        if who == "pipeline":
            await mark.execute(who)
        return who

    @dramatiq.actor
    def first() -> str:
        return "pipeline"

    start_worker()
    assert follow.send("sender").result(timeout=10) == "sender"
    message = dramatiq.Message(queue_name="default", actor_name="follow", args=(), kwargs={}, options={})
    (first.message() | message).run()
    assert done.wait(10)


def test_parallel_activities_keep_one_order(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="wide")
    def square(n: int) -> int:
        return n * n

    @durable.workflow
    async def wide(n: int) -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(square.execute(i)) for i in range(n)]
        return sum(t.result() for t in tasks)

    start_worker(threads=8)
    handle = wide.start(60)
    assert handle.result(timeout=20) == sum(i * i for i in range(60))
    assert [e.event_id for e in handle.history()] == list(range(1, 123))


def test_failure_crosses_the_database_with_its_cause(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(max_retries=1, min_backoff=1)
    def fail() -> None:
        try:
            raise KeyError("in\0side")
        except KeyError as e:
            raise ValueError("out\0side") from e

    @durable.workflow
    async def failing() -> None:
        await fail.execute()

    start_worker()
    handle = failing.start()
    with pytest.raises(durable.WorkflowFailed) as caught:
        handle.result(timeout=10)
    assert caught.value.type == "ActivityFailed"
    cause = caught.value.__cause__
    assert isinstance(cause, durable.Failure)
    assert (cause.type, cause.message) == ("ValueError", "out\0side")
    assert isinstance(cause.__cause__, durable.Failure)
    assert cause.__cause__.type == "KeyError"
    (failed,) = [e for e in handle.history() if e.type == "ActivityFailed"]
    assert failed.attributes["failure"]["attempt"] == 2


def test_caught_failure_and_retries(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    attempts: list[int] = []

    @durable.activity(max_retries=5, min_backoff=1, max_backoff=2)
    def flaky() -> int:
        info = durable.activity_info()
        assert info is not None
        attempts.append(info.attempt)
        if info.attempt < 3:
            raise RuntimeError("not yet")
        return info.attempt

    @durable.activity(max_retries=0)
    def broken() -> None:
        raise RuntimeError("never")

    @durable.workflow
    async def careful() -> Any:
        try:
            await broken.execute()
        except durable.ActivityFailed as e:
            return [await flaky.execute(), e.activity, e.type, e.attempt]

    start_worker()
    assert careful.start().result(timeout=10) == [3, "broken", "RuntimeError", 1]
    assert attempts == [1, 2, 3]
    assert durable.activity_info() is None


def test_signals_are_buffered_in_order_and_deduplicated(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def collect(n: int) -> list[Any]:
        return [await durable.wait_for_signal("item") for _ in range(n)]

    handle = collect.start(5)
    handle.signal("item", 1, id="one")
    handle.signal("item", 1, id="one")
    for n in range(2, 4):
        handle.signal("item", n)
    start_worker()
    handle.signal("item", None)
    handle.signal("item", {"n": 5})
    assert handle.result(timeout=10) == [1, 2, 3, None, {"n": 5}]
    with pytest.raises(durable.WorkflowClosed):
        handle.signal("item", 6)


def test_no_signal_is_left_unread_at_the_end(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """Signals that come together are given together; a run does not close over one it was not given."""

    @durable.workflow
    async def first_only() -> Any:
        return await durable.wait_for_signal("go")

    handle = first_only.start()
    for n in range(20):
        handle.signal("go", n)
    start_worker()
    assert handle.result(timeout=10) == 0
    assert types(handle).count("SignalReceived") == 20


def test_timeout_of_a_signal_and_of_the_client(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def impatient(seconds: float) -> str:
        try:
            return str(await durable.wait_for_signal("never", timeout=seconds))
        except TimeoutError:
            return "expired"

    start_worker()
    assert impatient.start(0.05).result(timeout=10) == "expired"
    waiting = impatient.start(60)
    with pytest.raises(durable.Timeout):
        waiting.result(timeout=0.05)
    waiting.terminate("enough")
    with pytest.raises(durable.WorkflowTerminated, match="enough"):
        waiting.result(timeout=5)


def test_asyncio_sleep_wait_for_and_timeout_are_durable(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.activity
    def quick() -> str:
        return "quick"

    @durable.workflow
    async def timing() -> list[str]:
        seen = []
        began = durable.now()
        await asyncio.sleep(0.05)
        await durable.sleep("50ms")
        seen.append("slept" if (durable.now() - began).total_seconds() >= 0.1 else "too short")
        seen.append(await asyncio.wait_for(quick.execute(), timeout=30))
        try:
            async with asyncio.timeout(0.02):
                await durable.wait_for_signal("never")
        except TimeoutError:
            seen.append("timed out")
        done, pending = await asyncio.wait(
            [asyncio.create_task(asyncio.sleep(0.01)), asyncio.create_task(asyncio.sleep(60))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        seen.append(f"{len(done)} {len(pending)}")
        for task in pending:
            task.cancel()
        return seen

    start_worker()
    handle = timing.start()
    assert handle.result(timeout=10) == ["slept", "quick", "timed out", "1 1"]
    wait_until(lambda: broker.join("default", timeout=5000) is None)


def test_cancel_wakes_a_waiting_run_and_its_cleanup_is_durable(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
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

    start_worker()
    handle = waiting.start()
    wait_until(lambda: "TimerStarted" in types(handle))
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    assert cleaned.is_set()
    assert handle.status() == "cancelled"
    assert types(handle)[-1] == "WorkflowCancelled"
    # The timer of thirty days is gone with it.
    broker.join("default", timeout=5000)


def test_swallowed_cancel_completes(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def stubborn() -> str:
        try:
            await durable.sleep(3600)
        except asyncio.CancelledError:
            return "I stay"
        return "no"

    start_worker()
    handle = stubborn.start()
    handle.cancel()
    assert handle.result(timeout=10) == "I stay"
    assert handle.status() == "completed"


def test_children(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="children")
    async def child(n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        return n + 1

    @durable.workflow(queue_name="parents")
    async def parent() -> list[Any]:
        results: list[Any] = list(await asyncio.gather(*[child.execute(n) for n in range(5)]))
        handle = child.options(workflow_id="named").start(41)
        results.append(await handle)
        try:
            await child.execute(-1)
        except durable.ChildWorkflowFailed as e:
            results.append(e.type)
        return results

    start_worker()
    assert parent.start().result(timeout=15) == [1, 2, 3, 4, 5, 42, "ValueError"]
    assert durable.get_handle("named").result(timeout=5) == 42
    described = durable.get_handle("named").describe()
    assert described.parent is not None


def test_child_with_a_taken_id(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent() -> str:
        try:
            await child.options(workflow_id="taken").execute()
        except durable.WorkflowAlreadyStarted:
            return "taken"
        return "started"

    start_worker()
    child.options(workflow_id="taken").start()
    assert parent.start().result(timeout=10) == "taken"


@pytest.mark.parametrize(
    ("policy", "status"), [("terminate", "terminated"), ("cancel", "cancelled"), ("abandon", "running")]
)
def test_parent_close(broker: durable.DurableBroker, start_worker: StartWorker, policy: Any, status: str) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent() -> str:
        handle = child.options(workflow_id="kid", parent_close=policy).start()
        await durable.sleep(0.01)
        return str(handle.workflow_id)

    start_worker()
    assert parent.start().result(timeout=10) == "kid"
    wait_until(lambda: durable.get_handle("kid").status() == status)


def test_cancel_reaches_children(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent() -> None:
        await child.options(workflow_id="kid").execute()

    start_worker()
    handle = parent.start()
    wait_until(lambda: "ChildStarted" in types(handle))
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    assert durable.get_handle("kid").status() == "cancelled"


def test_ids_conflict_and_reuse(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def forever(fail: bool = False) -> None:
        await durable.wait_for_signal("end")
        if fail:
            raise ValueError("as asked")

    start_worker()
    named = forever.options(workflow_id="one")
    first = named.start()
    with pytest.raises(durable.WorkflowAlreadyStarted):
        named.start()
    assert named.options(id_conflict="use_existing").start().run_id == first.run_id
    second = named.options(id_conflict="terminate_existing").start(True)
    assert second.run_id != first.run_id
    assert durable.get_handle(run_id=first.run_id).status() == "terminated"
    second.signal("end")
    with pytest.raises(durable.WorkflowFailed):
        second.result(timeout=10)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        named.options(id_reuse="reject").start()
    third = named.options(id_reuse="allow_failed").start()
    third.signal("end")
    third.result(timeout=10)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        named.options(id_reuse="allow_failed").start()
    assert named.start().run_id != third.run_id


def test_unknown_workflow_is_not_found(broker: durable.DurableBroker) -> None:
    handle = durable.get_handle("nobody")
    for call in (handle.describe, handle.result, handle.history, handle.cancel, lambda: handle.signal("s")):
        with pytest.raises(durable.WorkflowNotFound, match="nobody"):
            call()
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle(run_id=str(uuid.uuid4())).status()


def test_delayed_start_and_memo(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def later() -> Any:
        return durable.info().memo

    start_worker()
    handle = later.options(delay=300, memo={"for": "people"}).start()
    assert handle.describe().memo == {"for": "people"}
    assert handle.result(timeout=10) == {"for": "people"}
    # History's clock starts when the run may take its first step.
    assert (handle.history()[0].at - handle.describe().started_at).total_seconds() >= 0.29


def test_nondeterminism_leaves_the_run_open_and_shows(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def one() -> int:
        return 1

    @durable.activity
    def other() -> int:
        return 2

    version = ["old"]

    @durable.workflow
    async def changing() -> int:
        n = await (one if version[0] == "old" else other).execute()
        return n + int(await durable.wait_for_signal("go"))

    start_worker()
    handle = changing.start()
    wait_until(lambda: "ActivityCompleted" in types(handle))
    version[0] = "new"
    broker.runner.cache.clear()
    handle.signal("go", 10)
    described = wait_until(lambda: d if (d := handle.describe()).task_failure else None)
    assert "Nondeterminism" in str(described.task_failure)
    assert "one" in str(described.task_failure)
    assert "other" in str(described.task_failure)
    assert described.status == "running"
    version[0] = "old"
    assert handle.result(timeout=20) == 11
    assert handle.describe().task_failure is None


def test_a_run_goes_on_in_a_process_that_never_saw_it(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """Evicted after every step, the run ends with the same history as one that stays in memory."""

    @durable.activity(queue_name="elsewhere")
    def add(a: int, b: int) -> int:
        broker.runner.cache.clear()
        return a + b

    @durable.workflow
    async def long() -> list[Any]:
        numbers = durable.random()
        ids = [str(durable.uuid4()), str(durable.uuid7())]
        total = 0
        for n in range(5):
            total = await add.execute(total, n)
            await durable.sleep(0.005)
        return [total, numbers.random(), *ids, str(durable.uuid4())]

    start_worker()
    handle = long.start()
    result = handle.result(timeout=20)
    assert result[0] == 10
    assert types(handle).count("ActivityCompleted") == 5
    assert types(handle).count("TimerFired") == 5
    assert len(set(result)) == 5


def test_stub_runs_an_activity_of_another_codebase(
    broker: durable.DurableBroker, start_worker: StartWorker, database_url: str
) -> None:
    other = durable.DurableBroker(database_url)
    dramatiq.actor(lambda text: text.upper(), actor_name="shout", queue_name="foreign", broker=other)
    remote = durable.activity_stub("shout", queue_name="foreign")

    @durable.workflow
    async def asking() -> str:
        return str(await remote.execute("hey"))

    start_worker()
    handle = asking.start()
    wait_until(lambda: "ActivityScheduled" in types(handle))
    worker = dramatiq.Worker(other, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        assert handle.result(timeout=10) == "HEY"
    finally:
        worker.stop()
        other.close()


def test_existing_actor_as_activity(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @dramatiq.actor(queue_name="old")
    def legacy(n: int) -> int:
        return n + 1

    wrapped = durable.activity(legacy)

    @durable.workflow
    async def using() -> int:
        return await wrapped.options(priority=3, max_retries=0).execute(1)

    start_worker()
    assert using.start().result(timeout=10) == 2


def test_unencodable_result_fails_the_activity(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def odd() -> Any:
        return object()

    @durable.workflow
    async def asking() -> str:
        try:
            await odd.execute()
        except durable.ActivityFailed as e:
            return e.type
        return "no"

    start_worker()
    assert asking.start().result(timeout=10) == "NotEncodable"


def test_step_is_one_commit(broker: durable.DurableBroker, start_worker: StartWorker, database_url: str) -> None:
    """Completion, the run's next step and the hand-out of its next activity are one transaction."""

    @durable.activity(queue_name="steps")
    def step(n: int) -> int:
        return n + 1

    @durable.workflow(queue_name="runs")
    async def ten() -> int:
        n = 0
        for _ in range(10):
            n = await step.execute(n)
        return n

    start_worker()
    ten.start().result(timeout=10)
    handle = ten.start()
    assert handle.result(timeout=10) == 10
    with psycopg.connect(database_url) as conn:
        rows = conn.execute(
            "SELECT e.event_id, e.type, e.xmin::text FROM durable.event e WHERE e.run_id = %s ORDER BY e.event_id",
            [handle.run_id],
        ).fetchall()
    by_transaction: dict[str, list[str]] = {}
    for _, type_, xmin in rows[1:]:
        by_transaction.setdefault(xmin, []).append(type_)
    middle = [["ActivityCompleted", "ActivityScheduled"]] * 9
    assert list(by_transaction.values()) == [["ActivityScheduled"], *middle, ["ActivityCompleted", "WorkflowCompleted"]]


def test_wrong_arguments_fail_at_the_call(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def charge(order: str, cents: int) -> str:
        return order

    @durable.workflow
    async def buying(order: str) -> str:
        try:
            await charge.execute(order)  # type: ignore[call-arg]
        except TypeError as e:
            return str(e)
        return "no"

    with pytest.raises(TypeError, match=r"buying\(\): missing a required argument: 'order'"):
        buying.start()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="too many"):
        buying.start("a", "b")  # type: ignore[call-arg]
    start_worker()
    assert buying.start("o").result(timeout=10) == "charge(): missing a required argument: 'cents'"
