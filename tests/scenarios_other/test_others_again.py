"""Runs that are taken up again, or left behind, with state, updates, questions and families."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


def test_state_as_it_was_at_the_event(broker: Any, start_worker: StartWorker) -> None:
    heard: list[Any] = []

    @dramatiq.actor
    def hear(payload: Any) -> None:
        heard.append(payload)

    durable.subscribe("t")(hear)

    @durable.workflow
    async def flow() -> Any:
        await durable.entity().increment("n")
        await durable.upsert_search({"stage": "first"})
        await durable.output("a")
        await durable.emit("t", "a")
        await durable.sleep(0.02)
        await durable.entity().increment("n")
        await durable.upsert_search({"stage": "second", "more": 1})
        await durable.output("b")
        await durable.emit("t", "b")
        go = await durable.wait_for_signal("go", timeout="1h")
        return [await durable.entity().get("n"), go]

    start_worker()
    handle = flow.options(workflow_id="w").start()
    handle.signal("go", 1)
    assert handle.result(timeout=20) == [2, 1]
    fired = next(e for e in handle.history() if e.type == "TimerFired")
    again = handle.reset(fired.event_id)
    assert again.result(timeout=20) == [2, 1]  # the signal came again
    assert again.describe().entity == {"n": 2}
    assert again.describe().search == {"stage": "second", "more": 1}
    assert [v for _, v in again.follow()] == ["a", "b"]
    first = again.reset(1)
    assert first.result(timeout=20) == [2, 1]
    assert first.describe().entity == {"n": 2}
    assert [v for _, v in first.follow()] == ["a", "b"]
    assert [e.event_id for e in again.history()] == list(range(1, len(again.history()) + 1))
    Replayer([flow]).replay(again.export())
    wait_until(lambda: heard.count("b") == 3)
    for bad in (0, -1, 10_000):
        with pytest.raises((ValueError, durable.DurableError)):
            first.reset(bad)


def test_updates_of_a_run_that_is_taken_up_again(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> int:
        total = {"n": 0}

        @durable.on_update("add")
        async def add(by: int) -> int:
            await durable.sleep(0.01)
            total["n"] += by
            return total["n"]

        await durable.wait_for_signal("end")
        return total["n"]

    start_worker()
    handle = flow.options(workflow_id="w").start()
    assert handle.update("add", 1, update_id="one", timeout=20) == 1
    assert handle.update("add", 2, update_id="two", timeout=20) == 3
    completed = [e for e in handle.history() if e.type == "UpdateCompleted"]
    again = handle.reset(completed[0].event_id)
    assert again.get_update("one").result(timeout=20) == 1
    assert again.update("add", 1, update_id="one", timeout=20) == 1
    total = again.update("add", 10, update_id="ten", timeout=20)
    assert total in (11, 13)
    again.signal("end")
    assert again.result(timeout=20) == total


def test_a_start_whose_update_is_rejected(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        def never(value: Any) -> None:
            raise ValueError("never")

        @durable.on_update("u", validator=never)
        def u(value: Any) -> None: ...

        await durable.wait_for_signal("end")
        return "ended"

    start_worker()
    try:
        handle = flow.options(workflow_id="w", with_update=("u", 1), update_id="x").start()
        with pytest.raises(durable.UpdateRejected, match="never"):
            handle.get_update("x").result(timeout=20)
    except durable.UpdateRejected:
        handle = durable.get_handle("w")
    assert handle.status() == "running"
    handle.signal("end")
    assert handle.result(timeout=20) == "ended"
    assert not [t for t in types(handle) if t.startswith("Update")]


def test_a_handle_of_another_run(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        await durable.sleep("1h")

    start_worker()
    one = flow.options(workflow_id="one").start()
    two = flow.options(workflow_id="two").start()
    mixed = durable.get_handle("one", run_id=two.run_id)
    with contextlib.suppress(durable.WorkflowNotFound):
        assert mixed.describe().workflow_id == "two"
    for bad in ("x", "", 5):
        with pytest.raises(ValueError):
            durable.get_handle("one", run_id=bad)  # type: ignore[arg-type]
    assert durable.get_handle(run_id=one.run_id).describe().workflow_id == "one"


def test_children_that_nobody_awaits(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid(name: str) -> str:
        await durable.wait_for_signal("go")
        return name

    @durable.workflow
    async def flow() -> str:
        for policy in ("abandon", "cancel", "terminate"):
            kid.options(workflow_id=f"k-{policy}", parent_close=policy).start(policy)
        return "gone"

    start_worker()
    assert flow.start().result(timeout=20) == "gone"
    durable.get_handle("k-abandon").signal("go")
    assert durable.get_handle("k-abandon").result(timeout=20) == "abandon"
    for policy, status in (("cancel", "cancelled"), ("terminate", "terminated")):
        handle = durable.get_handle(f"k-{policy}")
        with contextlib.suppress(durable.WorkflowNotFound):  # it never began
            wait_until(lambda handle=handle, status=status: handle.status() == status)


def test_a_child_that_is_cancelled_before_it_began(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> None:
        await durable.sleep("1h")

    @durable.workflow
    async def flow() -> list[str]:
        seen = []
        child = kid.start()
        await child.cancel()
        try:
            await child
        except (asyncio.CancelledError, durable.DurableError) as e:
            seen.append(type(e).__name__)
        task = asyncio.ensure_future(kid.execute())
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            seen.append("never begun")
        delayed = kid.options(delay=3_600_000).start()
        await delayed.cancel()
        try:
            await delayed
        except (asyncio.CancelledError, durable.DurableError) as e:
            seen.append(type(e).__name__)
        return seen

    start_worker()
    handle = flow.start()
    result = handle.result(timeout=20)
    assert result[1] == "never begun"
    assert result[0] == result[2]
    Replayer([flow]).replay(handle.export())


def test_continued_runs_and_their_questions_and_children(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> None:
        await durable.wait_for_signal("x")

    @durable.workflow
    async def flow(n: int) -> Any:
        if n == 0:
            ask = asyncio.ensure_future(durable.escalate(role="r", subject="first"))
            child = kid.options(workflow_id="kid").start()
            await child.started()
            await durable.wait_for_signal("next")
            assert not ask.done()
            durable.continue_as_new(1)
        return await durable.escalate(role="r", subject="second")

    start_worker()
    handle = flow.start(0)
    [task] = wait_until(lambda: escalations.list(role="r"))
    handle.signal("next")
    wait_until(lambda: escalations.list(role="r", subject="second"))
    assert escalations.get(task.id).status == "cancelled"
    [second] = escalations.list(role="r", status="waiting")
    escalations.resolve(second.id, 2)
    assert handle.result(timeout=20) == 2


def test_retried_runs_keep_what_the_chain_has(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow(retry=durable.RetryPolicy(initial_interval=0.02, maximum_attempts=3))
    async def flow() -> Any:
        info = durable.info()
        await durable.entity().increment("attempts")
        await durable.output(info.attempt)
        if info.attempt < 3:
            raise OSError(f"attempt {info.attempt}")
        return [info.memo, info.search, await durable.wait_for_signal("x")]

    start_worker()
    handle = flow.options(workflow_id="w", memo={"m": 1}, search={"s": 1}).start()
    durable.get_handle("w").signal("x", 5)
    assert handle.result(timeout=20) == [{"m": 1}, {"s": 1}, 5]
    assert durable.count_workflows("workflow_id = 'w'", group_by="status") == {"failed": 2, "completed": 1}


def test_local_activities_are_tried_again(broker: Any, start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.02, maximum_attempts=3))
    def shaky(n: int) -> int:
        calls.append(n)
        if len(calls) < 3:
            raise OSError
        return n

    @durable.activity
    async def awaited(n: int) -> int:
        await asyncio.sleep(0.01)
        return n

    @durable.workflow
    async def flow() -> list[int]:
        return [await shaky.options(local=True).execute(4), await awaited.options(local=True).execute(5)]

    start_worker()
    handle = flow.start()
    assert handle.result(timeout=20) == [4, 5]
    assert calls == [4, 4, 4]
    assert types(handle).count("ActivityScheduled") == 0


def test_two_workers_share_everything_once(make_broker: Any, database_url: str) -> None:
    """Two brokers, as two processes have them, fight over runs that do a little of everything."""
    ran: dict[str, int] = {}
    lock = threading.Lock()
    before = dramatiq.broker.global_broker

    def define(broker: Any) -> Any:
        dramatiq.set_broker(broker)

        @durable.activity(queue_name="both")
        def act(key: str) -> str:
            with lock:
                ran[key] = ran.get(key, 0) + 1
            return key

        @durable.workflow(queue_name="both")
        async def kid(n: int) -> int:
            await durable.sleep(0.005)
            return n

        @durable.workflow(queue_name="both")
        async def flow(n: int) -> list[Any]:
            @durable.on_update("u")
            async def u(value: int) -> str:
                return await act.execute(f"{n}-u{value}")

            got: list[Any] = [await act.execute(f"{n}-a"), await kid.execute(n)]
            await durable.entity().increment("n")
            got.append(await durable.wait_for_signal("go"))
            await durable.wait_condition(durable.all_handlers_finished)
            got.append(await act.execute(f"{n}-z"))
            return got

        return flow

    brokers = [make_broker(), make_broker()]
    flows = [define(broker) for broker in brokers]
    workers = [dramatiq.Worker(broker, worker_timeout=50, worker_threads=4) for broker in brokers]
    for worker in workers:
        worker.start()
    try:
        handles = [flows[n % 2].options(workflow_id=f"w-{n}").start(n) for n in range(20)]
        for n, handle in enumerate(handles):
            handle.update("u", 1, update_id="one", wait="accepted", timeout=20)
            handle.signal("go", n)
        for n, handle in enumerate(handles):
            assert handle.result(timeout=30) == [f"{n}-a", n, n, f"{n}-z"]
            assert handle.get_update("one").result(timeout=10) == f"{n}-u1"
            assert [e.event_id for e in handle.history()] == list(range(1, len(handle.history()) + 1))
        assert set(ran.values()) == {1}
        assert len(ran) == 60
    finally:
        for worker in workers:
            worker.stop(timeout=5000)
        dramatiq.broker.global_broker = before


def test_an_async_transaction_needs_no_middleware(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    async def act() -> int:
        async with durable.transaction() as conn:
            cursor = await conn.execute("SELECT 5")
            return int((await cursor.fetchone())[0])

    @durable.workflow
    async def flow() -> int:
        return await act.execute()

    start_worker()
    assert flow.start().result(timeout=20) == 5


def test_time_is_the_runs_own(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        import datetime as dt

        stamps = [durable.now()]
        stamps.append(dt.datetime.now(dt.UTC))
        clock = time.time()
        await durable.sleep(0.05)
        stamps.append(durable.now())
        return [(b - a).total_seconds() for a, b in itertools.pairwise(stamps)] + [
            abs(clock - stamps[0].timestamp()) < 1
        ]

    start_worker()
    handle = flow.start()
    first, second, close = handle.result(timeout=20)
    assert first == 0
    assert second >= 0.05 - 0.002
    assert close
    Replayer([flow]).replay(handle.export())
