"""Steps that build upon steps, and code that ends in the middle of one."""

from __future__ import annotations

import sys
import threading
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.arrays import Ints
from dramatiq_durable.operations import Advance, Context
from tests.support import wait_until


def test_a_step_upon_one_that_was_refused_is_refused() -> None:
    context = Context(bytes(16), iter(range(1, 9)))  # type: ignore[arg-type]
    context.worker = context.sender
    first = Advance(bytes(16), bytes(16), bytes(16), 10, 11)
    second = Advance(bytes(16), bytes(16), bytes(16), 11, 12, before=first)
    assert Advance.arguments([first, second], context)[3] == Ints([10, 11])
    first.finished, first.answer = True, "refused"
    assert Advance.arguments([second], context)[3] == Ints([-1])
    first.answer = "ok"
    assert Advance.arguments([second], context)[3] == Ints([11])


def test_an_activity_that_outlives_its_worker_holds_up_nobody(broker: durable.DurableBroker, start_worker: Any) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    @durable.activity(queue_name="q")
    def slow() -> None:
        begun.set()
        go.wait(20)
        ended.set()

    @durable.workflow(queue_name="q")
    async def patient() -> None:
        await slow.execute()

    @dramatiq.actor(queue_name="other")
    def other() -> None: ...

    worker = start_worker()
    patient.start()
    assert begun.wait(10)
    worker.stop(timeout=100)
    go.set()
    assert ended.wait(10)
    wait_until(lambda: broker.commit.pending, timeout=5)
    sent = threading.Thread(target=other.send, daemon=True)
    sent.start()
    sent.join(5)
    assert not sent.is_alive()


@pytest.mark.parametrize("activity_first", [False, True])
def test_code_that_exits_takes_no_thread_with_it(
    broker: durable.DurableBroker, start_worker: Any, activity_first: bool
) -> None:
    @durable.activity(queue_name="q")
    def nothing() -> None: ...

    @durable.workflow(queue_name="q")
    async def exits() -> None:
        if activity_first:
            await nothing.execute()
        sys.exit(3)

    worker = start_worker(1)
    run = exits.start()
    wait_until(lambda: run.describe().task_failure, timeout=10)
    assert "SystemExit" in str(run.describe().task_failure)
    assert all(thread.is_alive() for thread in worker.workers)
    assert run.status() == "running"


def test_a_task_that_goes_back_in_the_middle_of_a_step_comes_again_whole(
    broker: durable.DurableBroker, start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @durable.activity(queue_name="elsewhere")
    def nothing() -> None: ...

    @durable.workflow(queue_name="q")
    async def once() -> str:
        await nothing.execute()
        return "done"

    start_worker()
    stream_id, refused = broker.stream_id, []

    def away(name: str) -> int:
        if name == "elsewhere" and not refused:
            refused.append(name)
            raise durable.DatabaseUnavailable("away")
        return stream_id(name)

    monkeypatch.setattr(broker, "stream_id", away)
    assert once.start().result(timeout=10) == "done"
    assert refused


def test_an_activity_whose_message_is_too_large_fails_and_keeps_no_place(
    broker: durable.DurableBroker, start_worker: Any
) -> None:
    @durable.activity(queue_name="q")
    def big(text: str) -> None: ...

    @durable.workflow(queue_name="q")
    async def sends() -> None:
        await big.execute("x" * (16 * 1024 * 1024 - 30))

    start_worker()
    run = sends.start()
    with pytest.raises(durable.WorkflowFailed) as caught:
        run.result(timeout=20)
    assert isinstance(caught.value.__cause__, durable.Failure)
    assert caught.value.__cause__.type == "PayloadTooLarge"
    claimer = broker.claimer
    assert claimer is not None
    assert claimer._reserved == 0


def test_an_activity_that_cannot_be_decoded_fails_in_its_run(
    broker: durable.DurableBroker, start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @durable.activity(queue_name="q")
    def nothing() -> None: ...

    @durable.workflow(queue_name="q")
    async def asks() -> None:
        await nothing.execute()

    def refuse(*row: Any) -> Any:
        raise ValueError("not in this encoding")

    monkeypatch.setattr("dramatiq_durable.incoming.decode_message", refuse)
    start_worker()
    with pytest.raises(durable.WorkflowFailed, match="not in this encoding"):
        asks.start().result(timeout=10)
