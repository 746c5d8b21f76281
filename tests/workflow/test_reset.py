"""Reset: a run is taken up again at an earlier event."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def event(handle: durable.WorkflowHandle[Any], type: str, nth: int = 0) -> int:
    return [e.event_id for e in handle.history() if e.type == type][nth]


def test_a_failed_run_goes_on_with_mended_code(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    calls: list[str] = []
    mended = []

    @durable.activity
    def step(name: str) -> str:
        calls.append(name)
        return name.upper()

    @durable.workflow
    async def work() -> Any:
        drawn = [durable.random().random(), str(durable.uuid4()), await durable.side_effect(lambda: time.time())]
        first = await step.execute("a")
        second = await step.execute("b")
        if not mended:
            raise ValueError("a bug")
        return [first, second, drawn]

    start_worker()
    handle = work.options(workflow_id="w", memo={"m": 1}).start()
    with pytest.raises(durable.WorkflowFailed):
        handle.result(timeout=20)
    before = handle.history()
    mended.append(True)
    again = handle.reset(event(handle, "ActivityCompleted", 1))
    assert again.run_id != handle.run_id
    result = again.result(timeout=20)
    assert result[:2] == ["A", "B"]
    assert calls == ["a", "b"], "what is kept is not done again"
    assert result[2][2] == next(e for e in before if e.type == "SideEffectRecorded").attributes["result"]
    history = again.history()
    assert [e.type for e in history].count("WorkflowReset") == 1
    assert [e.event_id for e in history] == list(range(1, len(history) + 1))
    assert again.describe().memo == {"m": 1}
    assert handle.status() == "failed"
    assert durable.get_handle("w").describe().run_id == again.run_id
    # It replays in a process that has not seen it, also after another reset.
    broker.runner.cache.clear()
    third = again.reset(event(again, "ActivityCompleted", 1))
    assert third.result(timeout=20)[:2] == ["A", "B"]
    assert third.result()[2] == result[2]


def test_a_live_run_is_reset_and_its_waiters_follow(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity
    def count() -> int:
        calls.append(1)
        return len(calls)

    @durable.workflow
    async def work() -> Any:
        n = await count.execute()
        return [n, await durable.wait_for_signal("go"), await durable.wait_for_signal("go")]

    start_worker()
    handle = work.start()
    handle.signal("go", "kept")
    wait_until(lambda: {"SignalReceived", "ActivityCompleted"} <= set(types(handle)))
    again = handle.reset(event(handle, "ActivityScheduled"))
    assert handle.status() == "terminated"
    assert handle.history()[-1].attributes["reason"] == "reset"
    handle.signal("go", "new")  # whoever has the old handle reaches the new run
    assert again.result(timeout=20) == [2, "kept", "new"], "the activity was pending then: it is sent again"
    assert handle.result(timeout=20) == [2, "kept", "new"]


def test_what_was_pending_is_done_again(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """Activities are sent again, timers keep their due times, children are found."""
    ran: list[str] = []

    @durable.activity
    def slow(name: str) -> str:
        ran.append(name)
        return name

    @durable.workflow
    async def kid() -> str:
        return str(await durable.wait_for_signal("go"))

    @durable.workflow
    async def work() -> Any:
        import asyncio

        nap = asyncio.create_task(asyncio.sleep(1.5))
        child = kid.options(workflow_id="kid").start()
        activity = slow.options(delay=300).start("x")
        await durable.wait_for_signal("first")
        await durable.wait_for_signal("second")
        return [await activity, await child, await nap]

    start_worker()
    began = time.monotonic()
    handle = work.start()
    wait_until(lambda: "TimerStarted" in types(handle))
    handle.signal("first")
    wait_until(lambda: "ActivityCompleted" in types(handle))
    child_run = durable.get_handle("kid").describe().run_id
    again = handle.reset(event(handle, "SignalReceived"))
    again.signal("second")
    durable.get_handle("kid").signal("go", "grown")
    assert again.result(timeout=20) == ["x", "grown", None]
    assert ran == ["x", "x"]
    assert 1.4 <= time.monotonic() - began < 5
    assert durable.get_handle("kid").describe().run_id == child_run
    assert [c.run_id for c in again.children()] == [child_run]


@pytest.mark.parametrize("how", ["ended", "with its parent"])
def test_children_that_have_ended(broker: durable.DurableBroker, start_worker: StartWorker, how: str) -> None:
    """One that ended by itself tells the new run how; one that ended because its parent did is started again."""
    runs: list[str] = []

    @durable.workflow
    async def kid() -> str:
        runs.append("kid")
        return str(await durable.wait_for_signal("go"))

    @durable.workflow
    async def work() -> Any:
        child = kid.options(workflow_id="kid").start()
        await durable.wait_for_signal("first")
        return await child

    start_worker()
    handle = work.start()
    handle.signal("first")
    wait_until(lambda: "SignalReceived" in types(handle) and len(runs) == 1)
    at = event(handle, "ChildStarted")
    if how == "ended":
        durable.get_handle("kid").signal("go", "early")
        assert handle.result(timeout=20) == "early"
    else:
        handle.terminate()
        assert durable.get_handle("kid").status() == "terminated"
    again = handle.reset(at)
    if how != "ended":
        wait_until(lambda: len(runs) == 2)
        durable.get_handle("kid").signal("go", "late")
    assert again.result(timeout=20) == ("early" if how == "ended" else "late")
    assert len(runs) == (1 if how == "ended" else 2)


def test_a_parent_waits_for_the_child_that_was_reset(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> Any:
        return await durable.wait_for_signal("go")

    @durable.workflow
    async def parent() -> Any:
        return await kid.options(workflow_id="kid").execute()

    start_worker()
    handle = parent.start()
    wait_until(lambda: handle.children())
    handle.children()[0].reset(1)
    durable.get_handle("kid").signal("go", "after")
    assert handle.result(timeout=20) == "after"


def test_to_the_first_event_it_starts_anew(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity
    def count() -> int:
        calls.append(1)
        return len(calls)

    @durable.workflow
    async def work(n: int) -> Any:
        return [n, await count.execute()]

    start_worker()
    handle = work.start(7)
    assert handle.result(timeout=20) == [7, 1]
    again = handle.reset(1)
    assert again.result(timeout=20) == [7, 2]
    assert handle.result(timeout=5) == [7, 1], "a closed run keeps its result"
    assert again.reset(2).result(timeout=20) == [7, 3], "a command is asked for again"
    with pytest.raises(ValueError, match="history\\(\\) has 1 to 4"):
        handle.reset(5)
    for wrong in (0, -1, "2", True, 2**31):
        with pytest.raises(ValueError, match="to_event"):
            handle.reset(wrong)  # type: ignore[arg-type]
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle("nobody").reset(1)


def test_a_reset_between_local_calls_keeps_what_was_computed(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    computed: list[str] = []

    def compute(name: str) -> str:
        computed.append(name)
        return f"{name}{len(computed)}"

    @durable.workflow
    async def work() -> Any:
        return [await durable.local(compute, name) for name in "abc"]

    start_worker()
    handle = work.start()
    assert handle.result(timeout=20) == ["a1", "b2", "c3"]
    again = handle.reset(event(handle, "LocalActivityCompleted", 1))
    assert again.result(timeout=20) == ["a1", "b2", "c4"]


def test_random_numbers_differ_after_the_reset_and_replay(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def work() -> Any:
        numbers = durable.random()
        seen = [numbers.random()]
        for _ in range(3):
            await durable.wait_for_signal("go")
            seen.append(numbers.random())
        return seen

    start_worker()
    handle = work.start()
    for n in range(2):
        handle.signal("go")
        wait_until(lambda n=n: types(handle).count("SignalReceived") == n + 1)
        broker.runner.cache.clear()
    handle.signal("go")
    old = handle.result(timeout=20)
    again = handle.reset(event(handle, "SignalReceived", 1))
    new = again.result(timeout=20)
    assert new[:2] == old[:2]
    assert set(new[2:]).isdisjoint(old)


def test_a_reset_is_fought_over_by_threads(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """Each reset ends the run of the one before: one run is live at any time, and all waiters end with the last."""
    from concurrent.futures import ThreadPoolExecutor

    @durable.workflow
    async def work() -> Any:
        await durable.wait_for_signal("one")
        return await durable.wait_for_signal("go")

    start_worker()
    handle = work.options(workflow_id="fought").start()
    handle.signal("one")
    wait_until(lambda: "SignalReceived" in types(handle))
    with ThreadPoolExecutor(6) as pool:
        resets = list(pool.map(lambda _: handle.reset(2), range(6)))
    durable.get_handle("fought").signal("go", "end")
    assert handle.result(timeout=20) == "end"
    statuses = sorted(r.status() for r in resets)
    assert statuses == ["completed", *["terminated"] * 5]
