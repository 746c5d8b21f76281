"""Signals, queries and updates of runs that go on as others: continue-as-new, retries, resets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def define_counter() -> durable.Workflow[..., Any]:
    @durable.workflow
    async def counter(total: int, rounds: int) -> list[int]:
        given = 0

        @durable.on_update("add")
        async def add(n: int) -> int:
            nonlocal total, given
            given += 1
            total += n
            return total

        @durable.on_signal("also")
        def also(n: int) -> None:
            nonlocal total, given
            given += 1
            total += n

        @durable.on_query("state")
        def state() -> list[int]:
            return [total, rounds]

        await durable.wait_condition(lambda: given >= 3 or rounds >= 5)
        if rounds < 5:
            durable.continue_as_new(total, rounds + 1)
        return [total, rounds]

    return counter


def test_messages_reach_whichever_run_goes_on(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    counter = define_counter()
    start_worker()
    handle = counter.options(workflow_id="c").start(0, 0)
    first = durable.get_handle(run_id=handle.run_id)
    for n in range(1, 15):
        if n % 2:
            assert first.update("add", 1, update_id=f"u{n}", timeout=20) == n
        else:
            first.signal("also", 1)
        assert first.query("state")[0] == n
    # The same id is the same update, also where another run of the chain has answered it.
    assert handle.update("add", 1, update_id="u1", timeout=10) == 1
    assert durable.get_handle("c").get_update("u3").result(timeout=10) == 3
    handle.signal("also", 1)
    assert handle.result(timeout=20) == [15, 5]
    assert first.query("state") == [15, 5]


def test_none_is_lost_while_runs_go_on(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def relay(total: int, rounds: int) -> list[int]:
        @durable.on_update("add")
        def add(n: int) -> int:
            nonlocal total
            total += n
            return total

        durable.on_signal("also")(add)
        await durable.wait_condition(lambda: total >= 10 * (rounds + 1))
        if total < 120:
            durable.continue_as_new(total, rounds + 1)
        return [total, rounds]

    start_worker(threads=8)
    handle = relay.start(0, 0)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(handle.update, "add", 1, timeout=60) for _ in range(60)]
        for _ in range(60):
            handle.signal("also", 1)
        results = [a.result() for a in answers]
    assert len(set(results)) == 60
    assert handle.result(timeout=20)[0] == 120


def test_an_update_at_work_is_not_handed_on(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def goes_on(rounds: int) -> int:
        @durable.on_update("wait")
        async def wait() -> None:
            await durable.wait_for_signal("never")

        await durable.wait_for_signal("go")
        if rounds == 0:
            durable.continue_as_new(1)
        return rounds

    start_worker()
    handle = goes_on.start(0)
    update = handle.update("wait", update_id="w", wait="accepted", timeout=10)
    handle.signal("go")
    with pytest.raises(durable.WorkflowClosed):
        update.result(timeout=10)
    handle.signal("go")
    assert handle.result(timeout=10) == 1


def test_a_run_that_continues_at_once_leaves_updates_to_the_next(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def late(rounds: int) -> str:
        if rounds < 3:
            durable.continue_as_new(rounds + 1)
        done = asyncio.Event()

        @durable.on_update("end")
        def end() -> int:
            done.set()
            return rounds

        await done.wait()
        return "done"

    handle = late.options(with_update=("end",), update_id="e").start(0)
    start_worker()
    assert handle.get_update().result(timeout=20) == 3
    assert handle.result(timeout=10) == "done"


def test_a_reset_gives_what_came_later_again(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def log() -> list[str]:
        entries: list[str] = []

        @durable.on_update("enter")
        async def enter(entry: str) -> int:
            await durable.sleep(0.01)
            entries.append(entry)
            return len(entries)

        durable.on_query("entries")(lambda: entries)
        durable.on_signal("note")(entries.append)
        await durable.wait_for_signal("end")
        return entries

    start_worker()
    handle = log.options(workflow_id="log").start()
    assert handle.update("enter", "a", update_id="a", timeout=10) == 1
    handle.signal("note", "b")
    assert handle.update("enter", "c", update_id="c", timeout=10) == 3
    cut = next(e.event_id for e in handle.history() if e.type == "SignalReceived")
    again = handle.reset(cut)
    wait_until(lambda: again.query("entries") == ["a", "b", "c"], message="all is there again")
    # An answer that was given stays.
    assert again.update("enter", "c", update_id="c", timeout=10) == 3
    assert again.get_update("a").result(timeout=10) == 1
    assert again.update("enter", "d", timeout=10) == 4
    assert types(again).count("UpdateCompleted") == 3
    again.signal("end")
    assert again.result(timeout=10) == ["a", "b", "c", "d"]


def test_runs_signal_children_that_went_on(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def child(rounds: int) -> int:
        await durable.wait_for_signal("next")
        if rounds < 2:
            durable.continue_as_new(rounds + 1)
        return rounds

    @durable.workflow
    async def parent() -> int:
        started = child.start(0)
        for _ in range(3):
            await started.signal("next")
        return await started

    start_worker()
    assert parent.start().result(timeout=20) == 2
