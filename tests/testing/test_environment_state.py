"""The environment for tests: what runs let others see, and what an application puts around them."""

from __future__ import annotations

import asyncio
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment

pytestmark = pytest.mark.usefixtures("broker")


def test_search_attributes_and_the_entity(env: Environment) -> None:
    @durable.workflow
    async def order() -> int:
        await durable.upsert_search({"customer": "Kim", "cents": 500})
        entity = durable.entity()
        await entity.set("customer.name", "Kim")
        await entity.append("lines", "pen")
        await durable.wait_for_signal("go")
        return await entity.increment("total", 3)

    handle = env.start(order.options(search={"kind": "order"}))
    described = handle.describe()
    assert described.search == {"kind": "order", "customer": "Kim", "cents": 500}
    assert described.entity == {"customer": {"name": "Kim"}, "lines": ["pen"]}
    assert described.stack is not None
    assert "wait_for_signal" in described.stack
    handle.signal("go")
    assert handle.describe().entity["total"] == 3
    assert handle.describe().search["customer"] == "Kim"


def test_what_a_run_waits_for(env: Environment) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.sleep("1 day")

    @durable.workflow
    async def parent() -> None:
        await asyncio.gather(durable.sleep("2 days"), child.execute())

    handle = env.start(parent)
    timer, started = handle.describe().pending
    assert (timer.kind, timer.next_attempt_at is not None, started.kind, started.name) == (
        "timer",
        True,
        "child",
        "child",
    )
    handle.result()
    assert handle.describe().pending == []


def test_subscribers_are_given_the_events_of_a_run_in_order(env: Environment) -> None:
    seen: list[Any] = []

    @durable.subscribe("paid")
    @dramatiq.actor(max_retries=2, min_backoff=1000, max_backoff=1000)
    def receipt(payload: Any) -> None:
        event = durable.event_info()
        assert event is not None
        seen.append((payload, event.attempt, event.workflow_id))
        if payload == 1 and event.attempt == 1:
            raise ConnectionError("busy")

    @durable.subscribe("other")
    @dramatiq.actor
    def other(payload: Any) -> None:
        raise AssertionError("nobody emits to it")

    @durable.workflow
    async def pays() -> None:
        for n in range(3):
            await durable.emit("paid", n)
        await durable.emit("nobody listens")

    env.start(pays.options(workflow_id="p"))
    assert seen == [(0, 1, "p"), (1, 1, "p")]
    env.advance(2)
    assert seen[2:] == [(1, 2, "p"), (2, 1, "p")]
    assert [name for name, _, _ in env.calls] == ["receipt"] * 4


def test_output_is_followed_through_the_runs_that_go_on(env: Environment) -> None:
    @durable.workflow
    async def reports(n: int = 0) -> None:
        await durable.output(n)
        await durable.sleep("1 day")
        await durable.output([n])
        if n < 1:
            durable.continue_as_new(n + 1)
        await durable.wait_for_signal("end")

    handle = env.start(reports)
    found = handle.follow()
    assert [next(found) for _ in range(4)] == [(0, 0), (1, [0]), (2, 1), (3, [1])]
    with pytest.raises(durable.Timeout, match="puts out no more"):
        next(found)
    env.get_handle(handle.workflow_id).signal("end")
    assert list(handle.follow(2)) == [(2, 1), (3, [1])]

    async def followed() -> list[Any]:
        return [value async for _, value in handle.afollow()]

    assert asyncio.run(followed()) == [0, [0], 1, [1]]


def test_output_goes_on_with_the_next_attempt(env: Environment) -> None:
    @durable.workflow(retry=durable.RetryPolicy(maximum_attempts=2))
    async def fails() -> None:
        await durable.output(durable.info().attempt)
        if durable.info().attempt == 1:
            raise ValueError("again")

    assert list(env.start(fails).follow()) == [(0, 1), (1, 2)]


class Counts(durable.WorkflowInterceptor):
    async def execute_workflow(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        return ["around", await call_next(ctx)]

    async def execute_activity(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        ctx.headers["tenant"] = "t-1"
        await durable.sleep(1)
        return await call_next(ctx)


def test_interceptors() -> None:
    @durable.activity
    def tenant() -> Any:
        info = durable.activity_info()
        assert info is not None
        return info.headers["tenant"]

    @durable.workflow
    async def asks() -> Any:
        @durable.on_query("tenant")
        def known() -> str:
            return found

        found = await tenant.execute()
        return found

    with Environment(interceptors=[Counts()]) as env:
        handle = env.start(asks)
        assert handle.result() == ["around", "t-1"]
        assert handle.query("tenant") == "t-1"


def test_the_brokers_interceptors_are_there(env: Environment, broker: durable.DurableBroker) -> None:
    from dramatiq_durable.workflow.interceptors import Interceptors

    broker.interceptors = Interceptors([Counts()])

    @durable.workflow
    async def plain() -> int:
        return 1

    assert env.run(plain) == ["around", 1]


class Backwards:
    name = "backwards"

    def encode(self, data: bytes) -> bytes:
        return data[::-1]

    def decode(self, data: bytes) -> bytes:
        if b"lost" in data[::-1]:
            raise ValueError("lost")
        return data[::-1]


def test_codecs() -> None:
    @durable.activity
    def echo(value: str) -> str:
        return value

    @durable.workflow
    async def asks(value: str) -> str:
        return await echo.execute(value)

    with Environment(codecs=[Backwards()]) as env:
        assert env.run(asks, "kept") == "kept"
        with pytest.raises(durable.CodecFailed, match="backwards"):
            env.run(asks, "lost")
