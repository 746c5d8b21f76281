"""Many clients at once, on one event loop and on threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations

StartWorker = Callable[..., dramatiq.Worker]


def flow_of() -> Any:
    @durable.workflow
    async def flow(n: int) -> int:
        total = {"n": n}

        @durable.on_update("add")
        async def add(by: int) -> int:
            await durable.sleep(0.01)
            total["n"] += by
            return total["n"]

        @durable.on_query("total")
        def show() -> int:
            return total["n"]

        await durable.output("begun")
        got = await asyncio.gather(durable.wait_for_signal("go"), durable.escalate(role="crowd", subject=str(n)))
        await durable.wait_condition(durable.all_handlers_finished)
        await durable.output("ended")
        return total["n"] + sum(got)

    return flow


def test_a_crowd_on_one_event_loop(broker: Any, start_worker: StartWorker) -> None:
    flow = flow_of()
    start_worker(threads=8)

    async def one(n: int) -> Any:
        handle = await flow.options(workflow_id=f"w-{n}").astart(n)
        lines: list[Any] = []

        async def follow() -> None:
            async for _, value in handle.afollow():
                lines.append(value)

        following = asyncio.ensure_future(follow())
        result = asyncio.ensure_future(handle.aresult(timeout=60))
        assert await handle.aupdate("add", 1, timeout=60) == n + 1
        assert await handle.aquery("total", timeout=60) == n + 1
        await handle.asignal("go", 1)
        [task] = await escalations.alist(role="crowd", subject=str(n))
        await escalations.aclaim(task.id, by="me")
        await escalations.aresolve(task.id, 1, by="me")
        await following
        return [await result, lines]

    async def crowd() -> Any:
        return await asyncio.gather(*(one(n) for n in range(40)))

    assert asyncio.run(crowd()) == [[n + 3, ["begun", "ended"]] for n in range(40)]


def test_a_crowd_of_threads(broker: Any, start_worker: StartWorker) -> None:
    flow = flow_of()
    start_worker(threads=8)

    def one(n: int) -> Any:
        handle = flow.options(workflow_id=f"w-{n}").start(n)
        assert handle.update("add", 1, timeout=60) == n + 1
        assert handle.query("total", timeout=60) == n + 1
        handle.signal("go", 1)
        [task] = escalations.list(role="crowd", subject=str(n))
        escalations.claim(task.id, by="me")
        escalations.resolve(task.id, 1, by="me")
        assert [value for _, value in handle.follow()] == ["begun", "ended"]
        return handle.result(timeout=60)

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(one, range(40))) == [n + 3 for n in range(40)]


def test_a_result_that_is_given_up_keeps_nothing_waiting(broker: Any) -> None:
    handle = flow_of().start(1)

    async def client() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.aresult(), 0.2)

    before = time.monotonic()
    asyncio.run(client())  # it ends when all of its threads have
    assert time.monotonic() - before < 20
