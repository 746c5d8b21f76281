"""What a run is told from outside, other than signals by handles: updates, and what comes with a start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from opentelemetry.trace import StatusCode

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Exported, parent_of

Start = Callable[..., dramatiq.Worker]


@pytest.fixture
def order(broker: durable.DurableBroker, start_worker: Start) -> Any:
    @durable.activity(queue_name="orders")
    def price(cents: int) -> int:
        return cents

    @durable.workflow(queue_name="orders")
    async def order() -> list[int]:
        added: list[int] = []

        def positive(cents: int) -> None:
            if cents <= 0:
                raise ValueError("nothing to add")

        @durable.on_update("add", validator=positive)
        async def add(cents: int) -> int:
            if cents == 13:
                raise ValueError("unlucky")
            added.append(await price.execute(cents) if cents > 100 else cents)
            return sum(added)

        await durable.wait_for_signal("done")
        await durable.wait_condition(durable.all_handlers_finished)
        return added

    start_worker(broker)
    return order


def told(exported: Exported, what: str, name: str, times: int = 1) -> list[Any]:
    def found() -> list[Any]:
        spans = exported.all("process orders")
        return [span for span in spans if span.attributes.get(f"dramatiq_durable.{what}") == name]

    wait_until(lambda: len(found()) == times, message=f"{times} of {what} {name}, not {exported.names()}")
    return found()


def test_an_update(order: Any, exported: Exported) -> None:
    with exported.tracer.start_as_current_span("POST /orders"):
        handle = order.options(workflow_id="o-1").start()
    with exported.tracer.start_as_current_span("POST /items"):
        assert handle.update("add", 5) == 5
        assert handle.update("add", 500) == 505
    processed = told(exported, "update", "add", 2)
    request = exported.one("POST /items").context
    start = exported.one("WORKFLOW/START/order").context
    for span in processed:
        assert span.context.trace_id == request.trace_id != start.trace_id
        assert parent_of(exported, span) == "send update"
        assert [link.context.span_id for link in span.links] == [start.span_id]
        assert span.attributes["dramatiq_durable.workflow_id"] == "o-1"
        assert span.status.status_code is StatusCode.UNSET
    assert all(span.parent.span_id == request.span_id for span in exported.all("send update"))
    # What the handler does belongs to the run.
    assert parent_of(exported, exported.one("ACTIVITY/price")) == "WORKFLOW/START/order"
    handle.signal("done")
    assert handle.result(timeout=10) == [5, 500]
    accepted = [e for e in handle.history() if e.type == "UpdateAccepted"]
    assert all(set(e.attributes["trace"]) == {"traceparent"} for e in accepted)


def test_an_update_that_fails(order: Any, exported: Exported) -> None:
    handle = order.start()
    with pytest.raises(durable.UpdateFailed):
        handle.update("add", 13)
    with pytest.raises(durable.UpdateRejected):
        handle.update("add", -1)
    with pytest.raises(durable.UpdateRejected):
        handle.update("no such", -1)
    failed, rejected = told(exported, "update", "add", 2)
    [unknown] = told(exported, "update", "no such")
    assert failed.status.description == "ValueError: unlucky"
    assert rejected.status.description == "ValueError: nothing to add"
    assert "no handler" in unknown.status.description
    assert len({span.context.span_id for span in (failed, rejected, unknown)}) == 3


@pytest.mark.parametrize("level", ["info", "debug"])
def test_an_update_in_detail(level: str, make_broker: Any, start_worker: Start, exported: Exported) -> None:
    """What is rejected is no step of the history."""
    broker = make_broker(level)

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        @durable.on_update("add")
        def add() -> None:
            pass

        await durable.wait_for_signal("done")

    start_worker(broker)
    handle = order.start()
    with pytest.raises(durable.UpdateRejected):
        handle.update("take")
    handle.update("add")
    told(exported, "update", "take")
    told(exported, "update", "add")
    steps = [name for name in exported.names() if name.startswith("STEP/")]
    assert steps == ([] if level == "info" else ["STEP/order/1", "STEP/order/2"])


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("what", ["signal", "update"])
def test_what_comes_with_a_start(what: str, running: bool, order: Any, exported: Exported) -> None:
    options: Any = {"with_signal": ("done", None)} if what == "signal" else {"with_update": ("add", 5)}
    if running:
        order.options(workflow_id="o-1").start()
        exported.one("WORKFLOW/START/order")
    with exported.tracer.start_as_current_span("request"):
        handle = order.options(workflow_id="o-1", id_conflict="use_existing", **options).start()
    [span] = told(exported, what, "done" if what == "signal" else "add")
    request = exported.one("request").context
    assert span.context.trace_id == request.trace_id
    assert parent_of(exported, span) == "send orders"
    start = exported.one("WORKFLOW/START/order").context
    assert [link.context.span_id for link in span.links] == [start.span_id]
    assert (start.trace_id == request.trace_id) is not running
    if what == "update":
        assert handle.get_update().result(timeout=10) == 5
        handle.signal("done")
    handle.result(timeout=10)


def test_an_update_that_comes_before_the_code_begins_is_told_once(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    @durable.workflow(queue_name="orders")
    async def order() -> None:
        @durable.on_update("add")
        def add() -> None:
            pass

        await durable.wait_for_signal("done")

    with exported.tracer.start_as_current_span("request"):
        handle = order.start()
        # With no worker yet it is only asked for.
        with pytest.raises(durable.Timeout):
            handle.update("add", update_id="u", timeout=0.1)
    start_worker(broker)
    handle.get_update("u").result(timeout=10)
    told(exported, "update", "add")
    exported.trace()


@pytest.mark.parametrize("verb", ["resolve", "cancel"])
def test_an_escalation(verb: str, broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    @durable.workflow(queue_name="orders")
    async def order() -> Any:
        try:
            return await durable.escalate(role="clerk")
        except durable.EscalationCancelled:
            return "cancelled"

    start_worker(broker)
    with exported.tracer.start_as_current_span("POST /orders"):
        handle = order.start()
    wait_until(lambda: durable.escalations.list(role="clerk"))
    [escalation] = durable.escalations.list(role="clerk")
    durable.escalations.claim(escalation.id, by="ann")
    with exported.tracer.start_as_current_span("POST /decisions"):
        if verb == "resolve":
            durable.escalations.resolve(escalation.id, {"ok": True}, by="ann")
        else:
            durable.escalations.cancel(escalation.id)
    assert handle.result(timeout=10) == ({"ok": True} if verb == "resolve" else "cancelled")
    [span] = told(exported, "escalation", "clerk")
    assert parent_of(exported, span) == "send escalation"
    assert span.context.trace_id == exported.one("POST /decisions").context.trace_id
    assert [link.context.span_id for link in span.links] == [exported.one("WORKFLOW/START/order").context.span_id]
    sent = exported.one("send escalation")
    assert sent.attributes["dramatiq_durable.escalation"] == verb
    assert sent.attributes["messaging.destination.name"] == escalation.id


def test_one_who_is_subscribed_to_a_topic(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    seen: list[Any] = []

    @durable.subscribe("paid")
    @dramatiq.actor(queue_name="receipts", min_backoff=1, max_backoff=2)
    def send_receipt(payload: Any) -> None:
        seen.append((payload, durable.event_info()))
        with exported.tracer.start_as_current_span("smtp"):
            pass
        if len(seen) == 1:
            raise ValueError("not yet")

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.emit("paid", 500)

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.options(workflow_id="o-1").start()
    handle.result(timeout=10)
    wait_until(lambda: len(exported.all("process receipts")) == 2)
    exported.one("WORKFLOW/COMPLETE/order")
    exported.trace()
    for span in exported.all("process receipts"):
        assert parent_of(exported, span) == "WORKFLOW/START/order"
        assert span.attributes["dramatiq_durable.workflow_id"] == "o-1"
        assert span.attributes["dramatiq_durable.run_id"] == handle.run_id
    assert [(payload, info.topic, info.attempt) for payload, info in seen] == [(500, "paid", 1), (500, "paid", 2)]
    assert len({span.context.span_id for span in exported}) == len(exported.names())
