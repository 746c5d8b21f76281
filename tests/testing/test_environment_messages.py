"""The environment for tests: queries, updates, and what runs say to each other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment

pytestmark = pytest.mark.usefixtures("broker")


def cart_workflow() -> Any:
    @durable.activity(max_retries=0)
    def reserve(sku: str) -> bool:
        if sku == "unicorn":
            raise LookupError("there is none")
        return True

    @durable.workflow
    async def cart() -> list[str]:
        items: list[str] = []
        open_ = True

        @durable.on_query("items")
        def count() -> list[str]:
            return items

        @durable.on_query("wrong")
        def wrong() -> None:
            durable.random().random()

        def check(sku: str) -> None:
            if not sku:
                raise ValueError("no sku")

        @durable.on_update("add", validator=check)
        async def add(sku: str) -> int:
            await reserve.execute(sku)
            items.append(sku)
            return len(items)

        @durable.on_update("wait")
        async def wait() -> str:
            await durable.sleep("1 day")
            return "waited"

        @durable.on_signal("remove")
        def remove(sku: str) -> None:
            items.remove(sku)

        @durable.on_signal("close")
        def close() -> None:
            nonlocal open_
            open_ = False

        await durable.wait_condition(lambda: not open_)
        await durable.wait_condition(durable.all_handlers_finished)
        return items

    return cart


def test_queries_updates_and_handlers(env: Environment) -> None:
    handle = env.start(cart_workflow())
    assert handle.query("items") == []
    assert handle.update("add", "pen") == 1
    assert handle.update("add", "ink", update_id="u-2") == 2
    assert handle.update("add", "ink", update_id="u-2") == 2
    assert handle.query("items") == ["pen", "ink"]
    before = len(handle.history())
    with pytest.raises(durable.UpdateRejected, match="no sku"):
        handle.update("add", "")
    with pytest.raises(durable.UpdateRejected, match="has no handler"):
        handle.update("addd", "pen")
    assert len(handle.history()) == before
    with pytest.raises(durable.UpdateFailed, match="there is none"):
        handle.update("add", "unicorn")
    with pytest.raises(durable.QueryFailed, match="has no handler"):
        handle.query("other")
    with pytest.raises(durable.QueryFailed, match="only looks"):
        handle.query("wrong")
    with pytest.raises(ValueError, match="wait is"):
        handle.update("add", "pen", wait="other")  # type: ignore[call-overload]
    handle.signal("remove", "pen")
    handle.signal("close")
    assert handle.result() == ["ink"]
    assert handle.query("items") == ["ink"]
    assert handle.get_update("u-2").result() == 2
    with pytest.raises(durable.WorkflowNotFound, match="no update"):
        handle.get_update("u-3").result()
    with pytest.raises(durable.WorkflowClosed):
        handle.update("add", "pen")


def test_an_update_that_takes_time(env: Environment) -> None:
    handle = env.start(cart_workflow())
    began = env.now()
    accepted = handle.update("wait", update_id="w", wait="accepted")
    assert env.now() == began
    assert accepted.result() == "waited"
    assert (env.now() - began).days == 1
    handle.update("wait", update_id="left", wait="accepted")
    handle.terminate()
    with pytest.raises(durable.WorkflowClosed):
        handle.get_update("left").result()


def test_the_awaited_twins(env: Environment) -> None:
    handle = env.start(cart_workflow())

    async def talk() -> None:
        assert await handle.aupdate("add", "pen") == 1
        assert await handle.aquery("items") == ["pen"]

    asyncio.run(talk())


def test_an_update_that_nobody_answers(env: Environment) -> None:
    @durable.workflow
    async def waits() -> None:
        @durable.on_update("ask")
        async def ask() -> Any:
            return await durable.wait_for_signal("never")

        await durable.wait_for_signal("never")

    handle = env.start(waits)
    with pytest.raises(durable.Timeout, match="nothing else is going to happen"):
        handle.update("ask")


def test_started_with_a_signal_or_an_update(env: Environment) -> None:
    cart = cart_workflow()
    handle = env.start(cart.options(workflow_id="c", with_update=("add", "pen")))
    assert handle.get_update().result() == 1
    again = env.start(cart.options(workflow_id="c", with_update=("add", "ink"), update_id="u"))
    assert again.run_id == handle.run_id
    assert again.get_update().result() == 2
    env.start(cart.options(workflow_id="c", with_signal=("remove", "pen")))
    assert handle.query("items") == ["ink"]
    closed = env.start(cart.options(workflow_id="d", with_signal=("close", None)))
    assert closed.result() == []


def test_what_has_not_begun_is_not_asked(env: Environment) -> None:
    handle = env.start(cart_workflow().options(delay=1000))
    with pytest.raises(durable.QueryTimedOut, match="has not begun"):
        handle.query("items")
    assert handle.update("add", "pen") == 1


def test_runs_tell_each_other(env: Environment) -> None:
    @durable.workflow
    async def listens() -> list[Any]:
        try:
            seen = [await durable.wait_for_signal("news"), await durable.wait_for_signal("news")]
            await durable.wait_for_signal("never")
            return seen
        except asyncio.CancelledError:
            return ["cancelled"]

    @durable.workflow
    async def tells() -> list[str]:
        seen = []
        child = listens.options(workflow_id="child").start()
        await child.signal("news", 1)
        await durable.signal_workflow("child", "news", 2)
        await durable.cancel_workflow("child")
        assert await child == ["cancelled"]
        for send in (
            lambda: durable.signal_workflow("child", "news"),
            lambda: child.signal("news"),
            lambda: durable.cancel_workflow("nobody"),
        ):
            try:
                await send()
            except durable.DurableError as e:
                seen.append(type(e).__name__)
        return seen

    handle = env.start(tells)
    assert handle.result() == ["WorkflowClosed", "WorkflowClosed", "WorkflowNotFound"]
    types = [event.type for event in handle.history()]
    assert types.count("MessageDelivered") == 3
    assert types.count("MessageFailed") == 3


def test_what_is_said_together_is_given_in_order(env: Environment) -> None:
    @durable.workflow
    async def collects() -> list[int]:
        seen: list[int] = []

        @durable.on_signal("item")
        async def item(n: int) -> None:
            await durable.sleep(0)
            seen.append(n)

        await durable.wait_condition(lambda: len(seen) == 5)
        return seen

    handle = env.start(collects.options(delay=1000))
    for n in range(5):
        handle.signal("item", n)
    assert handle.result() == list(range(5))


def test_updates_go_on_with_the_next_run(env: Environment) -> None:
    @durable.workflow
    async def goes_on(n: int = 0) -> int:
        if n == 0:
            await durable.wait_for_signal("go")
            durable.continue_as_new(1)
        told = 0

        @durable.on_update("add")
        def add(by: int) -> int:
            nonlocal told
            told += by
            return told

        await durable.wait_condition(lambda: told > 0)
        return told

    handle = env.start(goes_on.options(workflow_id="g"))
    handle.signal("go")
    assert handle.update("add", 3, update_id="u") == 3
    assert handle.result() == 3
    assert env.get_handle("g").get_update("u").result() == 3
