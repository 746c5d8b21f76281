"""Dramatiq's verbs start runs: no caller has to change."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


@pytest.fixture
def pay(broker: durable.DurableBroker) -> Any:
    @durable.workflow(queue_name="q", memo={"made": "here"})
    async def pay(order: str, cents: int = 1) -> list[Any]:
        return [order, cents, durable.info().memo]

    return pay


def test_send_with_options(pay: Any, start_worker: StartWorker) -> None:
    start_worker()
    handle = pay.send_with_options(args=("o-1",), kwargs={"cents": 5}, workflow_id="pay-1", memo={"a": 1})
    assert handle.workflow_id == "pay-1"
    assert handle.result(timeout=10) == ["o-1", 5, {"a": 1}]
    handle = asyncio.run(pay.asend_with_options(args=["o-2"], workflow_id="pay-2"))
    assert handle.result(timeout=10) == ["o-2", 1, {"made": "here"}]
    with pytest.raises(durable.WorkflowAlreadyStarted):
        pay.send_with_options(args=("o-1",), workflow_id="pay-1", id_reuse="reject")
    for delay in (300, timedelta(milliseconds=300)):
        began = time.monotonic()
        assert pay.send_with_options(args=("o-3",), delay=delay).result(timeout=10)[0] == "o-3"
        assert time.monotonic() - began >= 0.3


def test_what_is_refused(pay: Any) -> None:
    for option in ("max_retries", "time_limit", "max_age", "on_success", "priority", "unique_key"):
        with pytest.raises(TypeError, match=f"no option '{option}': that is one of Dramatiq's.*workflow_id"):
            pay.send_with_options(args=("o-1",), **{option: 1})
        with pytest.raises(TypeError, match=f"no option '{option}': that is one of Dramatiq's.*workflow_id"):
            pay.message_with_options(args=("o-1",), **{option: 1})
    with pytest.raises(TypeError, match="no option 'colour'"):
        pay.send_with_options(colour="red")
    with pytest.raises(TypeError):
        pay.send_with_options(args=())
    with pytest.raises(ValueError, match="delay"):
        pay.send_with_options(args=("o-1",), delay=-1)
    with pytest.raises(ValueError, match="send"):
        pay.message_with_options(args=("o-1",), with_signal=("a", 1))


def test_not_inside_a_workflow(pay: Any, start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="q")
    async def outer() -> None:
        pay.send_with_options(args=("o-1",))

    start_worker()
    with pytest.raises(durable.WorkflowFailed, match="execute"):
        outer.start().result(timeout=10)


def test_members_of_pipelines_and_groups(broker: Any, pay: Any, start_worker: StartWorker) -> None:
    after = threading.Event()

    @dramatiq.actor
    def first() -> str:
        return "o-piped"

    @dramatiq.actor
    def done() -> None:
        after.set()

    start_worker()
    last = pay.options(workflow_id="piped", memo={"b": 2}).message()
    (first.message() | last).run()
    handle = durable.get_handle("piped")
    wait_until(lambda: handle_exists(handle), timeout=10)
    assert handle.result(timeout=10) == ["o-piped", 1, {"b": 2}]

    alone = pay.message_with_options(args=("o-alone", 3), pipe_ignore=True)
    (first.message() | alone).run()
    handle = durable.get_handle(alone.message_id)
    wait_until(lambda: handle_exists(handle), timeout=10)
    assert handle.result(timeout=10) == ["o-alone", 3, {"made": "here"}]

    broker.add_middleware(dramatiq.middleware.GroupCallbacks(durable.rate_limits.PostgresBackend(broker=broker)))
    members = [pay.message(f"o-{n}") for n in range(3)]
    group = dramatiq.group(members)
    group.add_completion_callback(done.message())
    group.run()
    assert after.wait(10)
    for n, member in enumerate(members):
        assert durable.get_handle(member.message_id).result(timeout=10)[0] == f"o-{n}"


def test_a_message_whose_workflow_id_is_taken_is_a_dead_letter(
    broker: durable.DurableBroker, pay: Any, start_worker: StartWorker
) -> None:
    start_worker()
    pay.send_with_options(args=("o-1",), workflow_id="taken").result(timeout=10)
    broker.enqueue(pay.message_with_options(args=("o-2",), workflow_id="taken", id_reuse="reject"))

    def letters() -> int:
        with broker.database.connection() as conn:
            row = conn.execute("SELECT count(*) FROM durable.dead_letter").fetchone()
        assert row is not None
        return int(row[0])

    wait_until(lambda: letters() == 1, timeout=10)
    assert durable.get_handle("taken").result(timeout=5)[0] == "o-1"


def handle_exists(handle: durable.WorkflowHandle[Any]) -> bool:
    try:
        handle.status()
    except durable.WorkflowNotFound:
        return False
    return True
