"""A first step that asked for nothing leaves no trace in the history: it is made once all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.metrics import catalogue
from tests.support import wait_until

from .conftest import Exported

Start = Callable[..., dramatiq.Worker]


@pytest.fixture
def forgetful(broker: durable.DurableBroker) -> durable.DurableBroker:
    broker.runner.cache._capacity = 0
    return broker


def test_it_is_told_and_counted_and_logged_once(
    forgetful: durable.DurableBroker, start_worker: Start, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    replaying: list[bool] = []

    @durable.workflow(queue_name="orders")
    async def order() -> str:
        durable.logger.info("the order begins")
        await durable.trace("begun")
        replaying.append(durable.is_replaying())
        await durable.wait_for_signal("approved")
        return "new" if durable.patched("later") else "old"

    start_worker(forgetful)
    with caplog.at_level(logging.INFO):
        handle = order.start()
        exported.one("WORKFLOW/START/order")
        handle.signal("approved")
        assert handle.result(timeout=10) == "new"
    exported.one("WORKFLOW/COMPLETE/order")
    assert sorted(exported.names()) == [
        "WORKFLOW/COMPLETE/order",
        "WORKFLOW/START/order",
        "begun",
        "process orders",
        "send orders",
        "send signal",
    ]
    assert replaying == [False, True]
    assert caplog.text.count("the order begins") == 1
    assert forgetful.commit.metrics.counted()[catalogue.STARTED]["durable", "order"] == 1


def test_a_signal_may_be_there_before_it(
    forgetful: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.trace("begun")
        await durable.wait_for_signal("approved")
        await durable.wait_for_signal("paid")

    handle = order.start()
    handle.signal("approved")
    start_worker(forgetful)
    wait_until(lambda: len(exported.all("process orders")) == 1)
    handle.signal("paid")
    handle.result(timeout=10)
    exported.one("WORKFLOW/COMPLETE/order")
    assert len(exported.all("WORKFLOW/START/order")) == len(exported.all("begun")) == 1


def test_one_whose_first_task_was_purged_begins_with_what_it_is_told(
    forgetful: durable.DurableBroker, start_worker: Start, exported: Exported, rows: Any
) -> None:
    @durable.activity(queue_name="orders")
    def charge() -> int:
        return 1

    @durable.workflow(queue_name="orders")
    async def order() -> int:
        return await charge.execute()

    handle = order.start()
    assert rows("DELETE FROM durable.message RETURNING kind") == [("s",)]
    handle.signal("whatever")
    start_worker(forgetful)
    assert handle.result(timeout=10) == 1
    exported.one("WORKFLOW/COMPLETE/order")
    assert len(exported.all("WORKFLOW/START/order")) == 1


def test_a_query_that_brings_it_back_leaves_it_awake(
    forgetful: durable.DurableBroker, start_worker: Start, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    @durable.workflow(queue_name="orders")
    async def order() -> str:
        @durable.on_query("state")
        def state() -> str:
            return "waiting"

        await durable.wait_for_signal("approved")
        durable.logger.info("the order goes on")
        return "replaying" if durable.is_replaying() else "awake"

    start_worker(forgetful)
    handle = order.start()
    exported.one("WORKFLOW/START/order")
    forgetful.runner.cache._capacity = 100
    assert handle.query("state") == "waiting"
    assert forgetful.runner.cache.peek(handle.run_id or "") is not None
    with caplog.at_level(logging.INFO):
        handle.signal("approved")
        assert handle.result(timeout=10) == "awake"
    assert caplog.text.count("the order goes on") == 1


def test_a_reset_to_the_first_thing_that_it_was_told(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    """The new run has the old one's start, and is told that it is new: it begins once."""

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.trace("begun")
        await durable.wait_for_signal("approved")

    start_worker(broker)
    handle = order.start()
    handle.signal("approved")
    handle.result(timeout=10)
    exported.one("WORKFLOW/COMPLETE/order")
    assert [e.type for e in handle.history()] == ["WorkflowStarted", "SignalReceived", "WorkflowCompleted"]
    again = handle.reset(2)
    again.result(timeout=10)
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == 2)
    starts = [span.attributes["dramatiq_durable.run_id"] for span in exported.all("WORKFLOW/START/order")]
    assert starts == [handle.run_id, again.run_id]
