"""Continue-as-new: a run ends, and another goes on for it with an empty history."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from test_engine_support import Run, WorkflowBroker, echo

import dramatiq_durable as durable
from dramatiq_durable.errors import Nondeterminism
from dramatiq_durable.workflow import events
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]
engine = WorkflowBroker(middleware=[])


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


# --- the engine alone ----------------------------------------------------------------------------------


def test_the_command_carries_input_facts_and_what_nobody_read() -> None:
    async def counting(n: int) -> None:
        await durable.wait_for_signal("go")
        durable.continue_as_new(n + 1, memo={"n": n})

    run = Run(counting, 1)
    run.signal("other", "x")
    run.signal("go")
    (command,) = run.last
    assert command.event_type == events.WORKFLOW_CONTINUED_AS_NEW
    attributes = command.attributes()
    assert attributes is not None
    assert attributes["facts"] == {"memo": {"n": 1}}
    assert attributes["unread"] == [2]
    assert run.execution.closed
    replayed = run.replayed()
    assert replayed.closed
    assert replayed.last_event_id == run.execution.last_event_id


def test_a_signal_that_was_given_to_a_task_that_never_went_on_is_unread() -> None:
    async def waits() -> None:
        async def reader() -> None:
            await durable.wait_for_signal("late")

        asyncio.get_running_loop().create_task(reader())
        await durable.wait_for_signal("go")
        durable.continue_as_new()

    run = Run(waits)
    run.send(events.SIGNAL_RECEIVED, name="go", attributes={"with_next": True})
    run.signal("late")
    attributes = run.last[0].attributes()
    assert attributes is not None
    assert attributes["unread"] == [3]


def test_other_arguments_are_nondeterministic() -> None:
    async def first() -> None:
        durable.continue_as_new(1)

    async def second() -> None:
        durable.continue_as_new(2)

    async def takes(n: int) -> None: ...

    run = Run(_with(takes, 1))
    with pytest.raises(Nondeterminism):
        run.replayed(_with(takes, 2))


def _with(takes: Any, value: int) -> Any:
    async def again(n: int = 0) -> None:
        durable.continue_as_new(value)

    return again


@pytest.mark.parametrize("where", ["task", "group"])
def test_it_is_refused_outside_of_the_workflows_own_coroutine(where: str) -> None:
    async def again() -> str:
        async def elsewhere() -> None:
            durable.continue_as_new()

        try:
            if where == "task":
                await asyncio.create_task(elsewhere())
            else:
                await asyncio.gather(elsewhere())
        except durable.ForbiddenInWorkflow as e:
            return str(e)
        return "done"

    assert "wait_condition" in Run(again).result


def test_it_passes_except_clauses_and_task_groups_and_waits_for_cleanup() -> None:
    async def again(n: int = 0) -> None:
        try:
            async with asyncio.TaskGroup():
                try:
                    durable.continue_as_new(n + 1)
                except Exception:
                    raise AssertionError("no Exception") from None
        finally:
            await echo.execute("cleanup")

    run = Run(again)
    assert run.types == [events.ACTIVITY_SCHEDULED]
    run.complete(1)
    assert run.types == [events.WORKFLOW_CONTINUED_AS_NEW]


def test_wrong_arguments_and_options_fail_at_the_call() -> None:
    seen: list[str] = []

    async def again(n: int = 0) -> str:
        for call in (
            lambda: durable.continue_as_new(1, 2),
            lambda: durable.continue_as_new(1, workflow_id="x"),
            lambda: durable.continue_as_new(1, run_timeout=-1),
            lambda: durable.continue_as_new(object()),  # type: ignore[arg-type]
        ):
            try:
                call()
            except Exception as e:
                seen.append(type(e).__name__)
        return "still here"

    assert Run(again).result == "still here"
    assert seen == ["TypeError", "TypeError", "ValueError", "NotEncodable"]


# --- on a database -------------------------------------------------------------------------------------


def test_the_chain_has_one_id_and_one_result(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def note(n: int) -> int:
        return n

    @durable.workflow
    async def counting(n: int, end: int) -> Any:
        info = durable.info()
        assert info.history_length < 5
        await note.execute(n)
        if n < end:
            durable.continue_as_new(n + 1, end)
        return [n, info.memo, info.attempt]

    start_worker()
    handle = counting.options(workflow_id="chain", memo={"a": 1}).start(0, 5)
    first = handle.run_id
    assert handle.result(timeout=20) == [5, {"a": 1}, 1]
    assert durable.get_handle("chain").result(timeout=5) == [5, {"a": 1}, 1]
    assert durable.get_handle(run_id=first).result(timeout=5) == [5, {"a": 1}, 1]
    assert handle.status() == "continued_as_new"
    assert types(handle)[-1] == "WorkflowContinuedAsNew"
    assert handle.history()[-1].attributes["input"] == {"args": [1, 5], "kwargs": {}}
    last = durable.get_handle("chain")
    assert last.status() == "completed"
    history = last.history()
    assert [e.event_id for e in history] == list(range(1, len(history) + 1))
    assert "previous" in history[0].attributes


def test_options_of_the_next_run(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def again(n: int) -> Any:
        if n == 0:
            durable.continue_as_new(1, memo={"new": True}, delay=200)
        if n == 1:
            durable.continue_as_new(2, run_timeout=0.3)
        await durable.wait_for_signal("never")

    start_worker()
    handle = again.options(workflow_id="o", memo={"old": True}).start(0)
    with pytest.raises(durable.WorkflowTimedOut):
        handle.result(timeout=20)
    last = durable.get_handle("o").describe()
    assert last.memo == {"new": True}
    assert last.status == "timed_out"


def test_a_parent_sees_one_child(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="children")
    async def child(n: int) -> int:
        if n < 3:
            durable.continue_as_new(n + 1)
        assert durable.info().parent is not None
        return n

    @durable.workflow
    async def parent() -> int:
        return await child.options(workflow_id="c").execute(0)

    start_worker()
    handle = parent.start()
    assert handle.result(timeout=20) == 3
    assert types(handle) == ["WorkflowStarted", "ChildStarted", "ChildCompleted", "WorkflowCompleted"]
    (seen,) = handle.children()
    assert (seen.workflow_id, seen.status()) == ("c", "completed")
    described = durable.get_handle("c").describe()
    assert described.parent is not None
    assert (described.parent.workflow_id, described.parent.run_id) == (handle.workflow_id, handle.run_id)


def test_a_child_that_goes_on_as_new_is_cancelled_and_closed_with_its_parent(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def child(n: int) -> None:
        if n < 2:
            durable.continue_as_new(n + 1)
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent(which: str) -> None:
        await child.options(workflow_id=which).execute(0)

    start_worker()
    handle = parent.start("cancelled")
    wait_until(
        lambda: len(handle.children()) == 1 and handle.children()[0].history()[0].attributes["input"]["args"] == [2]
    )
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    assert durable.get_handle("cancelled").status() == "cancelled"

    handle = parent.start("terminated")
    wait_until(
        lambda: len(handle.children()) == 1 and handle.children()[0].history()[0].attributes["input"]["args"] == [2]
    )
    handle.terminate()
    assert durable.get_handle("terminated").status() == "terminated"


def test_no_signal_is_lost_or_doubled(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """Signals come from several threads while the run goes on as new after each of them."""

    @durable.workflow
    async def collect(seen: list[int], end: int) -> list[int]:
        seen = [*seen, await durable.wait_for_signal("n")]
        if len(seen) < end:
            durable.continue_as_new(seen, end)
        return seen

    start_worker()
    handle = collect.options(workflow_id="collector").start([], 60)
    by_id = durable.get_handle("collector")

    def send(who: int) -> None:
        for n in range(20):
            (handle if n % 2 else by_id).signal("n", who * 100 + n)

    threads = [threading.Thread(target=send, args=[who]) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = handle.result(timeout=60)
    assert sorted(result) == sorted(who * 100 + n for who in range(3) for n in range(20))
    for who in range(3):
        mine = [n for n in result if n // 100 == who]
        assert mine == sorted(mine), "the order of each sender"


def test_a_signals_id_counts_for_the_whole_chain(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def collect(seen: list[str]) -> list[str]:
        if len(seen) < 2:
            durable.continue_as_new([*seen, await durable.wait_for_signal("n")])
        return seen

    start_worker()
    handle = collect.start([])
    first = handle.run_id
    handle.signal("n", "a", id="one")
    wait_until(lambda: durable.get_handle(run_id=first).status() == "continued_as_new")
    handle.signal("n", "a", id="one")
    handle.signal("n", "b", id="two")
    assert handle.result(timeout=10) == ["a", "b"]
    handle.signal("n", "b", id="two")  # it did arrive
    with pytest.raises(durable.WorkflowClosed):
        handle.signal("n", "c")


def test_a_cancel_at_the_turn_reaches_the_next_run(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def spinning(n: int) -> None:
        await durable.sleep(0.001)
        durable.continue_as_new(n + 1)

    start_worker()
    for round in range(10):
        handle = spinning.options(workflow_id=f"spin-{round}").start(0)
        wait_until(lambda handle=handle: handle.status() == "continued_as_new")
        handle.cancel()
        with pytest.raises(durable.WorkflowCancelled):
            handle.result(timeout=20)


def test_terminate_ends_the_chain(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def spinning(n: int) -> None:
        await durable.sleep(0.001)
        durable.continue_as_new(n + 1)

    start_worker()
    for round in range(10):
        handle = spinning.options(workflow_id=f"spin-{round}").start(0)
        wait_until(lambda handle=handle: handle.status() == "continued_as_new")
        handle.terminate("enough")
        with pytest.raises(durable.WorkflowTerminated, match="enough"):
            handle.result(timeout=20)
        assert durable.get_handle(f"spin-{round}").status() == "terminated"


def test_default_ids_of_children_are_new_in_each_run(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """A child that was abandoned lives on, and is in nobody's way."""

    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent(n: int) -> str:
        kid = child.options(parent_close="abandon").start()
        await kid.started()
        if n:
            durable.continue_as_new(n - 1)
        return "done"

    start_worker()
    assert parent.start(2).result(timeout=20) == "done"


def test_a_long_history_suggests_it() -> None:
    async def long(n: int) -> None:
        rounds = 0
        while not durable.info().continue_as_new_suggested:
            await echo.execute(n)
            rounds += 1
        durable.continue_as_new(rounds)

    run = Run(long, 0)
    while not run.execution.closed:
        run.complete(run.last[0].seq or 0)
    assert 10_000 <= run.execution.last_event_id <= 10_010
