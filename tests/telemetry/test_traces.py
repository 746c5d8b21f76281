"""One connected trace, from who sends to whatever comes of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.middleware import AsyncIO
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode

import dramatiq_durable as durable
from dramatiq_durable.telemetry.context import carried
from dramatiq_durable.testing import Environment
from tests.support import wait_until

from .conftest import Exported, parent_of

Start = Callable[..., dramatiq.Worker]
Make = Callable[..., durable.DurableBroker]


def seconds(span: Any) -> float:
    return float(span.end_time - span.start_time) / 1e9


def test_a_message(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    seen: list[Any] = []

    @dramatiq.actor(queue_name="mails")
    def mail(to: str) -> None:
        with exported.tracer.start_as_current_span("smtp"):
            seen.append(baggage.get_baggage("shop"))

    start_worker(broker)
    token = context.attach(baggage.set_baggage("shop", "berlin"))
    try:
        with exported.tracer.start_as_current_span("POST /orders"):
            message = mail.send("a@b.c")
    finally:
        context.detach(token)
    processed = exported.one("process mails")
    exported.trace()
    assert seen == ["berlin"]
    sent = exported.one("send mails")
    assert parent_of(exported, sent) == "POST /orders"
    assert parent_of(exported, processed) == "send mails"
    assert parent_of(exported, exported.one("smtp")) == "process mails"
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert dict(sent.attributes or {}) == {
        "messaging.system": "dramatiq_durable",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": "mails",
        "messaging.message.id": message.message_id,
        "dramatiq_durable.actor": "mail",
    }
    assert dict(processed.attributes or {}) == {
        "messaging.system": "dramatiq_durable",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "mails",
        "messaging.message.id": message.message_id,
        "dramatiq_durable.actor": "mail",
        "dramatiq_durable.attempt": 1,
    }


def test_retries_are_a_span_each(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    attempts: list[int] = []

    @dramatiq.actor(min_backoff=1, max_backoff=5)
    def flaky() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError(f"attempt {len(attempts)}")

    start_worker(broker)
    flaky.send()
    wait_until(lambda: len(exported.all("process default")) == 3)
    spans = exported.all("process default")
    exported.trace()
    assert [span.attributes["dramatiq_durable.attempt"] for span in spans] == [1, 2, 3]
    assert [span.status.status_code for span in spans] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [[e.attributes["exception.message"] for e in span.events] for span in spans] == [
        ["attempt 1"],
        ["attempt 2"],
        [],
    ]
    assert spans[0].attributes["dramatiq_durable.retry_delay"] > 0
    assert len(exported.all("send default")) == 1
    assert len({span.context.span_id for span in spans}) == 3


def test_pipelines_and_groups_belong_to_it(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    done = threading.Event()

    @dramatiq.actor
    def first() -> int:
        return 1

    @dramatiq.actor
    def second(n: int) -> None:
        done.set()

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        (first.message() | second.message()).run()
    assert done.wait(10)
    wait_until(lambda: len(exported.all("process default")) == 2)
    exported.trace()
    # Who sent the first may be told so after the second was sent.
    assert {parent_of(exported, sent) for sent in exported.all("send default")} == {"request", "process default"}


def test_many_at_once(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    @dramatiq.actor
    def count(n: int) -> None:
        pass

    start_worker(broker)
    broker.enqueue_many([count.message(n) for n in range(5)])
    wait_until(lambda: len(exported.all("process default")) == 5)
    exported.trace()
    assert exported.one("send default").attributes["messaging.batch.message_count"] == 5


def test_everything_that_a_request_brings_about(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, database_url: str
) -> None:
    @durable.activity(queue_name="payments")
    def charge(cents: int) -> int:
        with exported.tracer.start_as_current_span("bank"):
            return cents

    @dramatiq.actor(queue_name="mails")
    def mail() -> None:
        pass

    @durable.activity(queue_name="payments")
    def tell() -> None:
        mail.send()

    @durable.workflow(queue_name="parcels")
    async def ship(times: int) -> str:
        await charge.execute(times)
        if times:
            durable.continue_as_new(times - 1)
        return "shipped"

    @durable.workflow(queue_name="orders")
    async def order(cents: int) -> str:
        await charge.execute(cents)
        await durable.wait_for_signal("approved")
        await tell.execute()
        await durable.trace("approved by hand", {"shop.cents": cents, "shop.tags": ["a", "b"]})
        return await ship.execute(1)

    start_worker(broker)
    with exported.tracer.start_as_current_span("POST /orders"), psycopg.connect(database_url) as conn:
        with durable.using(conn):
            handle = order.options(workflow_id="o-1").start(500)
        conn.commit()
        handle.signal("approved")
    assert handle.result(timeout=20) == "shipped"
    wait_until(lambda: exported.all("WORKFLOW/COMPLETE/order") and exported.all("process mails"))
    exported.trace()
    start = exported.one("WORKFLOW/START/order")
    assert parent_of(exported, start) == "send orders"
    assert start.attributes["dramatiq_durable.workflow_id"] == "o-1"
    assert start.attributes["dramatiq_durable.run_id"] == handle.run_id
    assert {parent_of(exported, span) for span in exported.all("ACTIVITY/charge")} == {
        "WORKFLOW/START/order",
        "WORKFLOW/START/ship",
    }
    assert {parent_of(exported, span) for span in exported.all("bank")} == {"ACTIVITY/charge"}
    assert parent_of(exported, exported.one("send mails")) == "ACTIVITY/tell"
    assert parent_of(exported, exported.all("WORKFLOW/START/ship")[0]) == "WORKFLOW/START/order"
    assert len(exported.all("WORKFLOW/START/ship")) == 2
    statuses = [span.attributes["dramatiq_durable.status"] for span in exported.all("WORKFLOW/COMPLETE/ship")]
    assert statuses == ["continued_as_new", "completed"]
    own = exported.one("approved by hand")
    assert (own.attributes["shop.cents"], own.attributes["shop.tags"]) == (500, ("a", "b"))
    assert parent_of(exported, own) == "WORKFLOW/START/order"
    complete = exported.one("WORKFLOW/COMPLETE/order")
    assert complete.start_time <= start.end_time
    assert complete.end_time >= exported.one("send mails").end_time - 1_000_000
    assert exported.all("ACTIVITY/charge")[0].attributes["dramatiq_durable.workflow_id"] == "o-1"


def test_a_signal_from_another_request(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, rows: Any
) -> None:
    """It belongs to the trace of who sent it, which leads to the run's."""

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.wait_for_signal("approved")
        await durable.wait_for_signal("paid")

    start_worker(broker)
    with exported.tracer.start_as_current_span("POST /orders"):
        handle = order.options(workflow_id="o-1").start()
    with exported.tracer.start_as_current_span("POST /approvals"):
        handle.signal("approved", {"ok": True})
    # Whoever calls the procedure himself may say what he likes.
    post = "SELECT durable.post(NULL, 0, %s::uuid[], ARRAY[NULL], ARRAY['SignalReceived'], ARRAY['x'],"
    for n, value in enumerate(["nonsense", "00-" + "1" * 32 + "-" + "1" * 16 + "-01\n", "x" * 100_000, None]):
        assert rows(f"{post} ARRAY[NULL]::bytea[], ARRAY[%s], ARRAY[%s]::text[])", [handle.run_id], f"k{n}", value) == [
            (["ok"],)
        ]
    handle.signal("paid")
    handle.result(timeout=10)
    exported.one("WORKFLOW/COMPLETE/order")
    wait_until(lambda: len(exported.all("process orders")) == 2)
    approved = next(s for s in exported.all("process orders") if s.attributes["dramatiq_durable.signal"] == "approved")
    assert parent_of(exported, approved) == "send signal"
    request = exported.one("POST /approvals").context
    assert approved.context.trace_id == request.trace_id != exported.one("POST /orders").context.trace_id
    assert [link.context.span_id for link in approved.links] == [exported.one("WORKFLOW/START/order").context.span_id]
    sent = next(s for s in exported.all("send signal") if s.parent is not None)
    assert sent.parent.span_id == request.span_id
    assert sent.attributes["messaging.destination.name"] == "o-1"
    received = [e for e in handle.history() if e.type == "SignalReceived"]
    assert [e.attributes.get("trace") is not None for e in received] == [True, False, False, False, False, True]


def test_a_signal_from_another_run(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    """It comes from the span of that run's start, in its trace; from a batch, from the one span of the batch."""

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.wait_for_signal("approved")
        await durable.wait_for_signal("paid")

    @durable.workflow(queue_name="approvals")
    async def approval() -> None:
        await durable.signal_workflow("o-1", "approved")

    start_worker(broker)
    handles = [order.options(workflow_id=f"o-{n}").start() for n in (1, 2)]
    with exported.tracer.start_as_current_span("POST /approvals"):
        approval.start().result(timeout=10)
    wait_until(lambda: exported.all("process orders"))
    [approved] = exported.all("process orders")
    assert approved.attributes["dramatiq_durable.signal"] == "approved"
    assert parent_of(exported, approved) == "WORKFLOW/START/approval"
    assert approved.context.trace_id == exported.one("POST /approvals").context.trace_id
    handles[1].signal("approved")
    assert durable.batch_signal("name = 'order'", "paid") == 2
    for handle in handles:
        handle.result(timeout=10)
    wait_until(lambda: len(exported.all("process orders")) == 4)
    paid = [s for s in exported.all("process orders") if s.attributes["dramatiq_durable.signal"] == "paid"]
    [batch] = [s for s in exported.all("send signal") if s.attributes["dramatiq_durable.signal"] == "paid"]
    assert [s.parent.span_id for s in paid] == [batch.context.span_id] * 2


@pytest.mark.parametrize("kind", ["actor", "workflow"])
def test_schedules(kind: str, broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    @dramatiq.actor(queue_name="night")
    def report() -> None:
        pass

    @durable.workflow(queue_name="night", name="close")
    async def close() -> None:
        pass

    start_worker(broker)
    target: Any = report if kind == "actor" else close
    with exported.tracer.start_as_current_span("POST /schedules"):
        durable.schedules.create("nightly", cron="0 3 * * *", target=target)
    durable.schedules.trigger("nightly")
    name = "process night" if kind == "actor" else "WORKFLOW/START/close"
    assert parent_of(exported, exported.one(name)) == "POST /schedules"
    wait_until(lambda: kind == "actor" or exported.all("WORKFLOW/COMPLETE/close"))
    exported.trace()


def test_an_error_and_its_cause(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    @durable.activity(max_retries=1, min_backoff=1, max_backoff=2)
    def charge() -> None:
        raise ValueError("no money")

    @durable.workflow
    async def order() -> None:
        await charge.execute()

    start_worker(broker)
    with pytest.raises(durable.WorkflowFailed):
        order.start().result(timeout=20)
    span = exported.one("WORKFLOW/ERROR/order")
    assert span.status.status_code is StatusCode.ERROR
    assert span.events[0].attributes["exception.type"] == "ActivityFailed"
    assert len(exported.all("ACTIVITY/charge")) == 2
    assert not exported.all("WORKFLOW/COMPLETE/order")
    exported.trace()


def test_local_activities(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    calls: list[int] = []

    @durable.activity(max_retries=3, min_backoff=1, max_backoff=2)
    def look() -> str:
        with exported.tracer.start_as_current_span("inner"):
            calls.append(1)
            if len(calls) == 1:
                raise ValueError("not yet")
            return "found"

    @durable.workflow
    async def order() -> str:
        durable.logger.info("begins")
        return str(await look.options(local=True).execute())

    start_worker(broker)
    assert order.start().result(timeout=10) == "found"
    exported.one("WORKFLOW/COMPLETE/order")
    exported.trace()
    spans = exported.all("ACTIVITY/look")
    assert [span.status.status_code for span in spans] == [StatusCode.ERROR, StatusCode.UNSET]
    assert {parent_of(exported, span) for span in exported.all("inner")} == {"ACTIVITY/look"}


def test_replay_writes_nothing(make_broker: Make, start_worker: Start, exported: Exported) -> None:
    replays: list[bool] = []

    def define(broker: durable.DurableBroker) -> Any:
        @durable.activity(queue_name="elsewhere", broker=broker)
        def charge() -> int:
            return 1

        @durable.workflow(queue_name="runs", name="order", broker=broker)
        async def order() -> int:
            replays.append(durable.is_replaying())
            await durable.trace("begun")
            total = 0
            for n in range(10):
                total += await charge.execute()
                await durable.trace(f"turn {n}")
            return total

        return order

    broker = make_broker()
    order = define(broker)
    start_worker(broker)
    forgets = broker.runner.cache
    handle = order.start()
    # Forgotten after each step, the run is brought back by a replay for the next one.
    peek, get = forgets.peek, forgets.get

    def forgetful(find: Any) -> Any:
        def look(run_id: str) -> Any:
            run = find(run_id)
            if run is not None and run.recorded and run.execution is not None and run.lock.acquire(blocking=False):
                run.drop()
                run.lock.release()
            return run

        return look

    forgets.peek, forgets.get = forgetful(peek), forgetful(get)  # type: ignore[method-assign]
    assert handle.result(timeout=30) == 10
    exported.one("WORKFLOW/COMPLETE/order")
    assert sum(replays) >= 9
    exported.trace()
    assert len(exported.all("WORKFLOW/START/order")) == 1
    assert [span.name for span in exported if span.name.startswith(("turn", "begun"))] == [
        "begun",
        *(f"turn {n}" for n in range(10)),
    ]
    assert len(exported.all("ACTIVITY/charge")) == 10
    assert len(list(exported)) == 1 + 1 + 11 + 10 + 1


@pytest.mark.parametrize("level", ["off", "info", "debug"])
def test_levels(level: str, make_broker: Make, start_worker: Start, exported: Exported) -> None:
    broker = make_broker(level)

    @durable.activity
    def charge() -> int:
        return 1

    @durable.workflow
    async def order() -> int:
        await durable.sleep(0.05)
        return await charge.execute()

    start_worker(broker)
    handle = order.start()
    assert handle.result(timeout=10) == 1
    if level == "off":
        broker.join("default", timeout=5000)
        assert exported.names() == []
        assert "trace" not in handle.history()[0].attributes
        return
    exported.one("WORKFLOW/COMPLETE/order")
    wait_until(lambda: level == "info" or exported.all("RETURN/activity/charge/2"))
    exported.trace()
    detail = [name for name in exported.names() if name.startswith(("DISPATCH/", "RETURN/"))]
    assert detail == (
        []
        if level == "info"
        else [
            "DISPATCH/timer/timer/1",
            "RETURN/timer/timer/1",
            "DISPATCH/activity/charge/2",
            "RETURN/activity/charge/2",
        ]
    )
    if level == "debug":
        assert seconds(exported.one("RETURN/timer/timer/1")) >= 0.04
        assert [n for n in exported.names() if n.startswith("STEP/")] == [
            "STEP/order/1",
            "STEP/order/3",
            "STEP/order/5",
        ]


def test_no_context_has_a_trace_of_its_own(
    broker: durable.DurableBroker, start_worker: Start, provider: TracerProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has no SDK; the worker has, and all that it does for a run is one trace."""

    @durable.activity
    def charge() -> int:
        return 1

    @durable.workflow
    async def order(times: int) -> int:
        await charge.execute()
        if times:
            durable.continue_as_new(times - 1)
        return 1

    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        handle = order.start(2)
    exported = Exported(provider)
    start_worker(broker)
    assert handle.result(timeout=10) == 1
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == 3)
    exported.trace()
    assert len(exported.all("WORKFLOW/START/order")) == 3


@pytest.mark.parametrize("sampled", [True, False])
def test_the_sampler_decides_once_for_a_run(
    sampled: bool, broker: durable.DurableBroker, start_worker: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.5)), shutdown_on_exit=False)
    seen: list[bool] = []

    @durable.activity
    def charge() -> int:
        seen.append(trace.get_current_span().get_span_context().trace_flags.sampled)
        return 1

    @durable.workflow
    async def order() -> int:
        return await charge.execute()

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    handles = [order.start() for _ in range(12)]
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    exported = Exported(provider)
    start_worker(broker)
    for handle in handles:
        handle.result(timeout=10)
    kept = sum(seen)
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == kept)
    assert len(exported.all("WORKFLOW/START/order")) == len(exported.all("ACTIVITY/charge")) == kept
    provider.shutdown()


def test_what_is_not_sampled_is_not_written(
    broker: durable.DurableBroker, start_worker: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    exported = Exported(provider)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)

    @durable.workflow
    async def order() -> int:
        return 1

    start_worker(broker)
    assert order.start().result(timeout=10) == 1
    broker.join("default", timeout=5000)
    assert exported.names() == []
    provider.shutdown()


HOSTILE: list[Any] = [
    "",
    "nonsense",
    "00-" + "0" * 32 + "-" + "1" * 16 + "-01",
    "00-" + "1" * 32 + "-" + "0" * 16 + "-01",
    "00-" + "1" * 32 + "-" + "1" * 16 + "-01\n",
    "00-" + "G" * 32 + "-" + "1" * 16 + "-01",
    "x" * 1_000_000,
    "\u0661" * 55,
    12,
    None,
    ["00-" + "1" * 32 + "-" + "1" * 16 + "-01"],
    {"a": {"b": "c"}},
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_context_is_no_context(value: Any) -> None:
    assert carried({"traceparent": value, "tracestate": value}) == {}
    assert carried(value) == {}


def test_hostile_messages_are_processed(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    @dramatiq.actor
    def take(n: int) -> None:
        seen.append(n)

    @durable.workflow(queue_name="runs")
    async def order(n: int) -> int:
        return n

    hostile = [*HOSTILE[:6], *HOSTILE[7:]]
    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        for n, value in enumerate(hostile):
            options = {"traceparent": value, "tracestate": value, "baggage": value, "durable_workflow": value}
            take.send_with_options(args=(n,), **options)
        handles = [order.start(n) for n in range(len(hostile))]
    with psycopg.connect(broker._url or "", autocommit=True) as conn:
        for handle, value in zip(handles, hostile, strict=True):
            from json import dumps

            conn.execute(
                "UPDATE durable.event SET attributes = %s WHERE run_id = %s AND event_id = 1",
                (dumps({"trace": {"traceparent": value, "baggage": value}}), handle.run_id),
            )
        conn.execute(
            "UPDATE durable.event SET attributes = %s WHERE run_id = %s", ('{"trace": [1]}', handles[0].run_id)
        )
    start_worker(broker)
    wait_until(lambda: len(seen) == len(hostile))
    assert [handle.result(timeout=10) for handle in handles] == list(range(len(hostile)))
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == len(hostile))
    assert len(exported.all("process default")) == len(hostile)


def test_an_sdk_that_fails_stops_nothing(
    broker: durable.DurableBroker, start_worker: Start, provider: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("broken")

    @durable.activity
    def charge() -> int:
        return 1

    @durable.workflow
    async def order() -> int:
        await durable.trace("a")
        return await charge.execute() + await charge.options(local=True).execute() - 1

    class Failing(SpanProcessor):
        def on_end(self, span: Any) -> None:
            raise RuntimeError("full")

    spans = broker.telemetry.spans()
    assert spans is not None
    start_worker(broker)
    with caplog.at_level(logging.WARNING):
        provider.add_span_processor(Failing())
        assert order.start().result(timeout=10) == 1
        wait_until(lambda: "a step are not written" in caplog.text)
        spans.tracer = Broken()
        assert order.start().result(timeout=10) == 1
    assert "span was not written" in caplog.text


def test_async_actors(make_broker: Make, start_worker: Start, exported: Exported) -> None:
    broker = make_broker()
    if not any(isinstance(m, AsyncIO) for m in broker.middleware):
        broker.add_middleware(AsyncIO())

    @dramatiq.actor(queue_name="plain")
    async def fetch() -> None:
        with exported.tracer.start_as_current_span("http"):
            pass

    @durable.activity
    async def charge() -> int:
        with exported.tracer.start_as_current_span("bank"):
            return 1

    @durable.workflow
    async def order() -> int:
        return await charge.execute()

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        fetch.send()
        handle = order.start()
    assert handle.result(timeout=10) == 1
    wait_until(lambda: exported.all("WORKFLOW/COMPLETE/order") and exported.all("process plain"))
    exported.trace()
    assert parent_of(exported, exported.one("http")) == "process plain"
    assert parent_of(exported, exported.one("bank")) == "ACTIVITY/charge"


def test_a_run_that_is_reset_begins_anew(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    @durable.activity
    def charge() -> int:
        return 1

    @durable.workflow
    async def order() -> int:
        await durable.trace("begun")
        paid = await charge.execute()
        await durable.trace("paid")
        return paid

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start()
    assert handle.result(timeout=10) == 1
    exported.one("WORKFLOW/COMPLETE/order")
    again = handle.reset(3)
    assert again.result(timeout=10) == 1
    wait_until(lambda: len(exported.all("WORKFLOW/COMPLETE/order")) == 2)
    exported.trace()
    first, second = exported.all("WORKFLOW/START/order")
    assert (first.attributes["dramatiq_durable.run_id"], second.attributes["dramatiq_durable.run_id"]) == (
        handle.run_id,
        again.run_id,
    )
    # What the copied history says was said by the run that it is from.
    assert len(exported.all("begun")) == 1


def test_a_task_that_fails_is_not_told_and_what_is_done_again_is_told_once(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    tries: list[int] = []

    @durable.workflow
    async def order() -> int:
        await durable.trace("begun")
        tries.append(1)
        if len(tries) < 3:
            raise BaseException("the task fails")
        return 1

    start_worker(broker)
    assert order.start().result(timeout=20) == 1
    exported.one("WORKFLOW/COMPLETE/order")
    exported.trace()
    assert len(tries) == 3
    assert sorted(exported.names()) == ["WORKFLOW/COMPLETE/order", "WORKFLOW/START/order", "begun", "send default"]


def test_a_step_that_is_refused_is_not_told(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    """A signal comes while the run is about to close: the step is made again, with the signal."""
    tries: list[int] = []

    def late() -> None:
        tries.append(1)
        if len(tries) == 1:
            durable.get_handle("o-1").signal("late")

    @durable.workflow
    async def order() -> int:
        await durable.side_effect(late)
        await durable.trace("nearly done")
        return 1

    start_worker(broker)
    handle = order.options(workflow_id="o-1").start()
    assert handle.result(timeout=20) == 1
    exported.one("WORKFLOW/COMPLETE/order")
    # Its two tasks, that of its start and that of the signal, may meet once more.
    assert len(tries) >= 2
    assert [e.type for e in handle.history()].count("SignalReceived") == 1
    assert len(exported.all("nearly done")) == len(exported.all("WORKFLOW/START/order")) == 1


@pytest.mark.parametrize(
    ("name", "attributes", "error"),
    [
        ("", None, durable.InvalidName),
        ("x" * 201, None, durable.InvalidName),
        ("a", [1], TypeError),
        ("a", {1: "x"}, TypeError),
        ("a", {"x": object()}, TypeError),
        ("a", {"x": [1, "a"]}, TypeError),
        ("a", {"x": None}, TypeError),
    ],
)
def test_what_makes_no_span(name: Any, attributes: Any, error: type[Exception]) -> None:
    @durable.workflow(broker=durable.DurableBroker("postgresql://localhost/nobody"))
    async def order() -> None:
        durable.trace(name, attributes)

    with Environment() as environment, pytest.raises(durable.WorkflowFailed) as failed:
        environment.run(order)
    assert failed.value.type == error.__name__


def test_outside_of_a_workflow() -> None:
    with pytest.raises(durable.NotInWorkflow):
        durable.trace("a")


def test_in_the_environment_it_is_quiet() -> None:
    @durable.workflow(broker=durable.DurableBroker("postgresql://localhost/nobody"))
    async def order() -> int:
        await durable.trace("a", {"n": 1})
        return 1

    with Environment() as environment:
        assert environment.run(order) == 1
