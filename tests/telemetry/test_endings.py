"""The last span of a run that its own code did not end, and the trace of runs that go on for others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import dramatiq
import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import StatusCode

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Exported, parent_of

Start = Callable[..., dramatiq.Worker]


def waiting() -> Any:
    @durable.workflow(queue_name="orders", name="order")
    async def order() -> None:
        await durable.wait_for_signal("never")

    return order


def begun(exported: Exported, name: str = "order", times: int = 1) -> None:
    wait_until(lambda: len(exported.all(f"WORKFLOW/START/{name}")) == times)


def test_one_that_is_terminated(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, rows: Any
) -> None:
    order = waiting()
    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.options(workflow_id="o-1").start()
    begun(exported)
    handle.terminate("a mistake")
    span = exported.one("WORKFLOW/ERROR/order")
    exported.trace()
    assert parent_of(exported, span) == "WORKFLOW/START/order"
    assert span.attributes == {
        "dramatiq_durable.workflow": "order",
        "dramatiq_durable.workflow_id": "o-1",
        "dramatiq_durable.run_id": handle.run_id,
        "messaging.destination.name": "orders",
        "dramatiq_durable.status": "terminated",
    }
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "WorkflowTerminated: a mistake"
    description = handle.describe()
    assert abs(span.start_time / 1e9 - description.started_at.timestamp()) < 0.01
    assert abs(span.end_time / 1e9 - description.closed_at.timestamp()) < 0.01
    wait_until(lambda: rows("SELECT * FROM durable.message") == [], message="nothing is left of it")
    assert len(exported.all("WORKFLOW/ERROR/order")) == 1


def test_one_whose_time_is_over(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    order = waiting()
    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.options(run_timeout=0.3).start()
    with pytest.raises(durable.WorkflowTimedOut):
        handle.result(timeout=20)
    span = exported.one("WORKFLOW/ERROR/order")
    exported.trace()
    assert span.attributes["dramatiq_durable.status"] == "timed_out"
    assert span.status.description == "WorkflowTimedOut: run_timeout"


def test_one_that_was_begun_in_no_trace_and_whose_time_is_over(
    broker: durable.DurableBroker, start_worker: Start, provider: TracerProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = waiting()
    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        order.options(execution_timeout=0.5).start()
    exported = Exported(provider)
    start_worker(broker)
    assert exported.one("WORKFLOW/ERROR/order").status.description == "WorkflowTimedOut: execution_timeout"
    exported.trace()


def test_children_that_end_with_their_parent(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    """However it ends: here its own code ends it, and the grandchild's parent is ended."""

    @durable.workflow(queue_name="parcels")
    async def pack() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow(queue_name="parcels")
    async def ship() -> None:
        await pack.execute()

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        ship.start()
        await durable.wait_for_signal("enough")

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start()
        begun(exported, "pack")
        handle.signal("enough")
    handle.result(timeout=10)
    for name in ("ship", "pack"):
        span = exported.one(f"WORKFLOW/ERROR/{name}")
        assert span.status.description == "WorkflowTerminated: its parent closed"
        assert parent_of(exported, span) == f"WORKFLOW/START/{name}"
    exported.one("WORKFLOW/COMPLETE/order")
    exported.trace()


def test_one_whose_workflow_id_another_takes(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    order = waiting()
    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        first = order.options(workflow_id="o-1").start()
        begun(exported)
        second = order.options(workflow_id="o-1", id_conflict="terminate_existing").start()
        begun(exported, times=2)
    span = exported.one("WORKFLOW/ERROR/order")
    assert span.attributes["dramatiq_durable.run_id"] == first.run_id
    second.reset(1)
    begun(exported, times=3)
    wait_until(lambda: len(exported.all("WORKFLOW/ERROR/order")) == 2)
    span = exported.all("WORKFLOW/ERROR/order")[1]
    assert span.attributes["dramatiq_durable.run_id"] == second.run_id
    assert span.status.description == "WorkflowTerminated: reset"
    exported.trace()


def test_many_at_once(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    order = waiting()
    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        for _ in range(20):
            order.start()
    begun(exported, times=20)
    assert durable.batch_terminate("name = 'order'", "enough") == 20
    wait_until(lambda: len(exported.all("WORKFLOW/ERROR/order")) == 20)
    assert len({span.context.span_id for span in exported.all("WORKFLOW/ERROR/order")}) == 20


def test_what_is_in_no_trace_leaves_nothing_for_a_worker(
    broker: durable.DurableBroker, rows: Any, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = waiting()
    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        untraced = order.start()
    traced = order.start()
    untraced.terminate()
    traced.terminate()
    assert rows("SELECT kind, run_id::text FROM durable.message") == [("e", traced.run_id)]


def test_a_termination_that_is_rolled_back(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, database_url: str
) -> None:
    order = waiting()
    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start()
    begun(exported)
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            handle.terminate()
        conn.rollback()
    assert handle.status() == "running"
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            handle.terminate("meant")
        conn.commit()
    assert exported.one("WORKFLOW/ERROR/order").status.description == "WorkflowTerminated: meant"


@pytest.mark.parametrize("traced", [True, False])
def test_runs_that_are_retried_are_one_trace(
    traced: bool,
    broker: durable.DurableBroker,
    start_worker: Start,
    provider: TracerProvider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what they go on as; also where nobody began a trace."""
    retry = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3)
    calls: list[int] = []

    @durable.workflow(queue_name="orders", retry=retry)
    async def order(turn: int) -> None:
        calls.append(turn)
        if len(calls) in (1, 2):
            raise ValueError("not yet")
        if turn < 2:
            durable.continue_as_new(turn + 1)

    exported = Exported(provider)
    with monkeypatch.context() as without:
        if not traced:
            without.setattr(trace, "_TRACER_PROVIDER", None)
        with exported.tracer.start_as_current_span("request") if traced else nullcontext():
            handle = order.start(0)
    start_worker(broker)
    handle.result(timeout=20)
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == 3)
    exported.trace()
    assert calls == [0, 0, 0, 1, 2]
    assert len(exported.all("WORKFLOW/START/order")) == 5
    assert len(exported.all("WORKFLOW/ERROR/order")) == 2
    parents = [parent_of(exported, span) for span in exported.all("WORKFLOW/START/order")]
    assert parents == (["send orders"] * 5 if traced else [None, *["WORKFLOW/START/order"] * 4])


def test_a_reset_of_one_that_was_begun_in_no_trace(
    broker: durable.DurableBroker, start_worker: Start, provider: TracerProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    @durable.activity(queue_name="orders")
    def charge() -> int:
        return 1

    @durable.workflow(queue_name="orders")
    async def order() -> int:
        return await charge.execute()

    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        handle = order.start()
    exported = Exported(provider)
    start_worker(broker)
    assert handle.result(timeout=10) == 1
    again = handle.reset(3)
    assert again.result(timeout=10) == 1
    assert again.reset(1).result(timeout=10) == 1
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == 3)
    exported.trace()
    starts = exported.all("WORKFLOW/START/order")
    assert [parent_of(exported, span) for span in starts] == [None, "WORKFLOW/START/order", "WORKFLOW/START/order"]
