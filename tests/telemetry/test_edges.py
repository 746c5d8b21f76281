"""Ways of sending, encoders, codecs, brokers and clients of all kinds; and what others put into messages."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.encoder import PickleEncoder
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import dramatiq_durable as durable
from dramatiq_durable.rate_limits import PostgresBackend as Limits
from tests.support import wait_until

from .conftest import Exported, parent_of

Start = Callable[..., dramatiq.Worker]
Make = Callable[..., durable.DurableBroker]


class Rot:
    """A codec."""

    name = "rot"

    def encode(self, data: bytes) -> bytes:
        return bytes(255 - byte for byte in data)

    decode = encode


# --- ways of sending ------------------------------------------------------------------------------------------
def test_a_transaction_that_is_rolled_back(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, database_url: str
) -> None:
    """The span of the sending says that it is the transaction which decides; nothing else is told."""

    @dramatiq.actor(queue_name="mails")
    def mail() -> None:
        pass

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.wait_for_signal("approved")

    start_worker(broker)
    handle = order.options(workflow_id="o-1").start()
    exported.one("WORKFLOW/START/order")
    exported.exporter.clear()
    with exported.tracer.start_as_current_span("request"), psycopg.connect(database_url) as conn:
        with durable.using(conn):
            mail.send()
            order.options(workflow_id="o-2").start()
            handle.signal("approved")
        conn.rollback()
    sent = [span for span in exported if span.kind is SpanKind.PRODUCER]
    assert [span.name for span in sent] == ["send mails", "send orders", "send signal"]
    assert all(span.attributes["dramatiq_durable.using"] is True for span in sent)
    mail.send()
    exported.one("process mails")
    assert sorted(exported.names()) == [
        "process mails",
        "request",
        "send mails",
        "send mails",
        "send orders",
        "send signal",
    ]
    assert "dramatiq_durable.using" not in exported.all("send mails")[1].attributes
    assert handle.status() == "running"


def test_a_group_and_its_callback(
    make_broker: Make, start_worker: Start, exported: Exported, database_url: str
) -> None:
    broker = make_broker()
    broker.add_middleware(dramatiq.middleware.GroupCallbacks(Limits(database_url)))
    done = threading.Event()

    @dramatiq.actor(queue_name="parts")
    def part(n: int) -> None:
        pass

    @dramatiq.actor(queue_name="wholes")
    def whole() -> None:
        done.set()

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        members = dramatiq.group([part.message(n) for n in range(3)])
        members.add_completion_callback(whole.message())
        members.run()
    assert done.wait(10)
    assert parent_of(exported, exported.one("process wholes")) == "process parts"
    wait_until(lambda: len(exported.all("process parts")) == 3)
    exported.trace()
    assert len({span.context.span_id for span in exported}) == len(exported.names())


def test_many_on_several_streams(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    @dramatiq.actor(queue_name="one")
    def one() -> None:
        pass

    @dramatiq.actor(queue_name="two")
    def two() -> None:
        pass

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        broker.enqueue_many([one.message(), two.message()])
    sent = exported.one("send")
    assert "messaging.destination.name" not in sent.attributes
    assert sent.attributes["messaging.batch.message_count"] == 2
    for name in ("process one", "process two"):
        assert parent_of(exported, exported.one(name)) == "send"
    exported.trace()


def test_a_message_that_is_sent_again_is_in_the_new_trace(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    """Nothing is left of the context that it was sent in before."""
    seen: list[Any] = []

    @dramatiq.actor(queue_name="mails")
    def mail() -> None:
        span = trace.get_current_span().get_span_context()
        seen.append((span.trace_id, span.trace_state.to_header(), baggage.get_baggage("shop")))

    start_worker(broker)
    came = TraceContextTextMapPropagator().extract(
        {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "vendor=1"}
    )
    token = context.attach(baggage.set_baggage("shop", "berlin", came))
    try:
        message = mail.send()
    finally:
        context.detach(token)
    wait_until(lambda: len(seen) == 1)
    with exported.tracer.start_as_current_span("request") as request:
        again = message.copy(message_id="another")
        broker.enqueue(again)
    wait_until(lambda: len(seen) == 2)
    assert seen == [(int("ab" * 16, 16), "vendor=1", "berlin"), (request.get_span_context().trace_id, "", None)]
    assert message.options["tracestate"] == "vendor=1"


def test_a_delay_and_a_redriven_dead_letter(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, rows: Any
) -> None:
    @dramatiq.actor(queue_name="mails", max_retries=0)
    def mail() -> None:
        if len(exported.all("process mails")) == 0:
            raise ValueError("not now")

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        mail.send_with_options(delay=50)
    exported.one("process mails")
    wait_until(lambda: rows("SELECT count(*) FROM durable.dead_letter") == [(1,)])
    anything = ", ".join(["NULL"] * 8)
    assert rows(f"SELECT redriven FROM durable.redrive_dead_letters({anything}, 0, 1000, 10)") == [(1,)]
    wait_until(lambda: len(exported.all("process mails")) == 2)
    exported.trace()
    first, second = exported.all("process mails")
    assert first.context.span_id != second.context.span_id
    assert [span.attributes["dramatiq_durable.attempt"] for span in (first, second)] == [1, 2]


def test_a_message_that_is_sent_twice_under_one_id(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    @dramatiq.actor(queue_name="mails")
    def mail() -> None:
        pass

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        message = mail.send()
        exported.one("process mails")
        broker.join("mails")
        broker.enqueue(message)
    wait_until(lambda: len(exported.all("process mails")) == 2)
    exported.trace()
    assert len({span.context.span_id for span in exported}) == 5


async def requests(order: Any, mail: Any, exported: Exported) -> Any:
    with exported.tracer.start_as_current_span("request"):
        await mail.asend("x") if hasattr(mail, "asend") else mail.send("x")
        handle = await order.options(workflow_id="o-1").astart()
        await asyncio.gather(handle.asignal("approved"), handle.aupdate("add"))
        return await handle.aresult(timeout=10)


def test_a_client_that_awaits(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    @durable.activity(queue_name="mails")
    def mail(text: str) -> None:
        pass

    @durable.workflow(queue_name="orders")
    async def order() -> str:
        added: list[int] = []
        durable.on_update("add")(lambda: added.append(1))
        await durable.wait_for_signal("approved")
        await durable.wait_condition(lambda: bool(added))
        return "done"

    start_worker(broker)
    assert asyncio.run(requests(order, mail, exported)) == "done"
    exported.one("WORKFLOW/COMPLETE/order")
    wait_until(lambda: len(exported.all("process orders")) == 2)
    exported.one("process mails")
    exported.trace()
    sends = [span for span in exported if span.kind is SpanKind.PRODUCER]
    assert sorted(span.name for span in sends) == ["send mails", "send orders", "send signal", "send update"]
    assert {parent_of(exported, span) for span in sends} == {"request"}


# --- encoders, codecs, brokers --------------------------------------------------------------------------------
@pytest.fixture
def pickled() -> Iterator[None]:
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(PickleEncoder())
    yield
    dramatiq.set_encoder(before)


def flow(exported: Exported, broker: durable.DurableBroker, start_worker: Start) -> None:
    @dramatiq.actor(queue_name="mails", broker=broker)
    def mail() -> None:
        with exported.tracer.start_as_current_span("smtp"):
            pass

    @durable.activity(queue_name="orders", broker=broker)
    def charge() -> None:
        mail.send()

    @durable.workflow(queue_name="parcels", broker=broker)
    async def ship() -> None:
        pass

    @durable.workflow(queue_name="orders", broker=broker)
    async def order() -> None:
        durable.on_update("add")(lambda: None)
        await durable.wait_for_signal("approved")
        await charge.execute()
        await ship.execute()

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start()
        handle.update("add", timeout=10)
        handle.signal("approved", {"by": "me"})
        handle.result(timeout=20)
    for name in ("WORKFLOW/COMPLETE/order", "WORKFLOW/COMPLETE/ship", "smtp", "process mails"):
        exported.one(name)
    wait_until(lambda: len(exported.all("process orders")) == 2)
    exported.trace()
    assert parent_of(exported, exported.one("WORKFLOW/START/ship")) == "WORKFLOW/START/order"
    assert parent_of(exported, exported.one("send mails")) == "ACTIVITY/charge"
    assert parent_of(exported, exported.one("smtp")) == "process mails"
    assert len({span.context.span_id for span in exported}) == len(exported.names()) == 14


@pytest.mark.usefixtures("pickled")
def test_another_encoder(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    flow(exported, broker, start_worker)


def test_a_codec(make_broker: Make, start_worker: Start, exported: Exported) -> None:
    flow(exported, make_broker(codecs=[Rot()]), start_worker)


def test_a_codec_and_the_last_span(make_broker: Make, start_worker: Start, exported: Exported) -> None:
    broker = make_broker(codecs=[Rot()])

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.wait_for_signal("never")

    start_worker(broker)
    handle = order.start()
    exported.one("WORKFLOW/START/order")
    handle.terminate("a secret")
    assert exported.one("WORKFLOW/ERROR/order").status.description == "WorkflowTerminated: a secret"


def test_two_brokers(make_broker: Make, start_worker: Start, exported: Exported, empty_database_url: str) -> None:
    """A message of the one sends with the other."""
    durable.migrate.migrate(empty_database_url)
    first = make_broker()
    second = durable.DurableBroker(empty_database_url)
    try:

        @dramatiq.actor(queue_name="far", broker=second)
        def far() -> None:
            pass

        @dramatiq.actor(queue_name="near", broker=first)
        def near() -> None:
            far.send()

        start_worker(first)
        start_worker(second)
        with exported.tracer.start_as_current_span("request"):
            near.send()
        assert parent_of(exported, exported.one("process far")) == "send far"
        assert parent_of(exported, exported.one("send far")) == "process near"
        exported.one("process near")
        exported.trace()
    finally:
        second.close()


def test_an_sdk_that_is_set_up_while_the_broker_works(
    broker: durable.DurableBroker, start_worker: Start, provider: TracerProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    @dramatiq.actor(queue_name="mails")
    def mail() -> None:
        seen.append(1)

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    start_worker(broker)
    mail.send()
    wait_until(lambda: len(seen) == 1)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    exported = Exported(provider)
    mail.send()
    exported.one("process mails")
    exported.trace()
    # Another one, as after a fork: the first is not written to any more.
    other = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", other)
    again = Exported(other)
    mail.send()
    again.one("process mails")
    assert len(exported.all("process mails")) == 1
    other.shutdown()


# --- activities that end elsewhere ----------------------------------------------------------------------------
def test_an_activity_that_is_completed_by_its_token(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported
) -> None:
    tokens: list[str] = []

    @durable.activity(queue_name="orders")
    def book() -> None:
        tokens.append(durable.complete_later())

    @durable.workflow(queue_name="orders")
    async def order() -> Any:
        return await book.execute()

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start()
    exported.one("ACTIVITY/book")
    with exported.tracer.start_as_current_span("callback"):
        durable.complete_activity(tokens[0], "booked")
    assert handle.result(timeout=10) == "booked"
    exported.one("WORKFLOW/COMPLETE/order")
    assert len(exported.all("ACTIVITY/book")) == 1


def test_an_activity_that_is_cut_short(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    """Its attempt says by what; the thread's next message is in no trace of it."""

    @durable.activity(queue_name="orders", max_retries=0, time_limit=200)
    def slow() -> None:
        for _ in range(1000):
            threading.Event().wait(0.01)

    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await slow.execute()

    start_worker(broker, threads=1)
    with pytest.raises(durable.WorkflowFailed):
        order.start().result(timeout=30)
    span = exported.one("ACTIVITY/slow")
    assert span.status.description.startswith("TimeLimitExceeded")
    exported.one("WORKFLOW/ERROR/order")
    exported.trace()


# --- what others put into messages ----------------------------------------------------------------------------
LONG = "x" * 100_000
CONTEXT = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.mark.parametrize(
    ("options", "is_of_it"),
    [
        ({"traceparent": CONTEXT, "tracestate": "=,=,,", "baggage": ";;=,%ZZ=%00"}, True),
        ({"traceparent": CONTEXT, "tracestate": "a=1,a=2", "baggage": ",".join(f"k{n}=v" for n in range(500))}, True),
        ({"traceparent": CONTEXT, "tracestate": LONG, "baggage": LONG}, True),
        ({"traceparent": CONTEXT, "tracestate": ["a"], "baggage": {"a": 1}}, True),
        ({"traceparent": CONTEXT, "durable_workflow": LONG}, True),
        ({"traceparent": CONTEXT.replace("00-", "ff-", 1)}, False),
        ({"traceparent": CONTEXT + "-extra"}, False),
        ({"traceparent": LONG}, False),
        ({"traceparent": CONTEXT.upper()}, False),
        ({"tracestate": "vendor=1", "baggage": "a=\u00e9"}, False),
        ({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01\r\nx: y"}, False),
    ],
    ids=range(11),
)
def test_hostile_options(
    options: dict[str, Any],
    is_of_it: bool,
    broker: durable.DurableBroker,
    start_worker: Start,
    exported: Exported,
    rows: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    @dramatiq.actor(queue_name="mails")
    def mail() -> None:
        seen.append(dict(baggage.get_all()))
        follow.send()

    @dramatiq.actor(queue_name="follows")
    def follow() -> None:
        seen.append("followed")

    message = dramatiq.Message("mails", "mail", (), {}, options)
    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        broker.enqueue(message)
    with caplog.at_level(logging.WARNING, "dramatiq_durable"):
        start_worker(broker)
        wait_until(lambda: "followed" in seen)
        span = exported.one("process mails")
        exported.one("process follows")
    assert (span.context.trace_id == int("ab" * 16, 16)) is is_of_it
    assert len({s.context.trace_id for s in exported}) == 1
    assert max(len(str(value)) for s in exported for value in s.attributes.values()) <= 200
    assert "Traceback" not in caplog.text


def test_hostile_traces_of_what_a_run_is_told(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, rows: Any
) -> None:
    """As a login of its own might send them, past our client."""

    @durable.workflow(queue_name="orders")
    async def order() -> list[Any]:
        got: list[Any] = []
        durable.on_update("add")(got.append)
        await durable.wait_for_signal("done")
        return got

    start_worker(broker)
    handle = order.options(workflow_id="o-1").start()
    exported.one("WORKFLOW/START/order")
    hostile = ["", "x", LONG, CONTEXT.upper(), f"00-{'0' * 32}-{'0' * 16}-00", "\u0661" * 55, None, '{"a": 1}']
    call = "SELECT * FROM durable.request_updates(gen_random_uuid(), 1, %s::uuid[], %s::text[], %s, %s, %s, %s::text[])"
    n = len(hostile)
    arguments = json.dumps({"args": [1], "kwargs": {}}).encode()
    answers = rows(call, [None] * n, ["o-1"] * n, [f"u{i}" for i in range(n)], ["add"] * n, [arguments] * n, hostile)
    assert {status for status, _ in answers} == {"ok"}
    for i in range(n):
        handle.get_update(f"u{i}").result(timeout=10)
    handle.signal("done")
    assert handle.result(timeout=10) == [1] * n
    exported.one("WORKFLOW/COMPLETE/order")
    assert [s for s in exported.all("process orders") if "dramatiq_durable.update" in s.attributes] == []


def test_a_run_with_hostile_facts_is_ended_all_the_same(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, rows: Any
) -> None:
    @durable.workflow(queue_name="orders")
    async def order() -> None:
        await durable.wait_for_signal("never")

    facts = [
        '{"trace": [1]}',
        '{"trace": "\\u0000"}',
        '{"trace": {"traceparent": "\\ud800"}}',
        '{"trace": {"traceparent": 1}, "first": [2]}',
        '{"first": "nonsense"}',
        '{"trace": null, "first": ""}',
    ]
    handles = [order.start() for _ in facts]
    for handle, text in zip(handles, facts, strict=True):
        rows(
            "WITH u AS (UPDATE durable.event SET attributes = %s WHERE run_id = %s AND event_id = 1 RETURNING 1) "
            "SELECT count(*) FROM u",
            text,
            handle.run_id,
        )
    start_worker(broker)
    wait_until(lambda: len(exported.all("WORKFLOW/START/order")) == len(facts))
    for handle in handles:
        handle.terminate()
        assert handle.status() == "terminated"
    wait_until(lambda: rows("SELECT * FROM durable.message") == [])
