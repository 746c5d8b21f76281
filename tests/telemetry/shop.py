"""A shop as its developers would write it, in worker processes: every span is printed as a line of JSON.

``TEST_CACHE``: how many runs a worker keeps in memory.  ``TEST_HOLD``: the activity that waits there for its end by
SIGKILL, once it has said so.  ``TEST_SAMPLER``: the SDK's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from typing import Any

import dramatiq
from opentelemetry import baggage, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=0.5, reclaim_count=1000)
broker.add_middleware(dramatiq.middleware.AsyncIO())
dramatiq.set_broker(broker)
if "TEST_CACHE" in os.environ:
    broker.runner.cache._capacity = int(os.environ["TEST_CACHE"])


def say(text: str) -> None:
    # In one piece: other threads write there too.
    os.write(1, f"{text}\n".encode())


class Printing(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        for span in spans:
            context = span.context
            state = context.trace_state.to_header()
            attributes = {
                name: value for name, value in span.attributes.items() if name.startswith("dramatiq_durable.")
            }
            told = {
                "name": span.name,
                "trace": f"{context.trace_id:032x}",
                "id": f"{context.span_id:016x}",
                "parent": None if span.parent is None else f"{span.parent.span_id:016x}",
                "status": span.status.status_code.name,
                "state": state,
                "attributes": attributes,
            }
            say("span " + json.dumps(told))
        return SpanExportResult.SUCCESS


# After the broker was made, as an application's start-up may have it.
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SimpleSpanProcessor(Printing()))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("shop")

logger = logging.getLogger("shop")
handler = logging.StreamHandler()
handler.addFilter(durable.LogFields())
handler.setFormatter(
    logging.Formatter(
        "log %(message)s workflow=%(workflow_id)s run=%(run_id)s message=%(message_id)s trace=%(trace_id)s"
    )
)
logger.addHandler(handler)
logger.setLevel(logging.INFO)
logger.propagate = False


def hold(name: str) -> None:
    if os.environ.get("TEST_HOLD") == name:
        say(f"holding {name}")
        threading.Event().wait()


@durable.activity(queue_name="shop", min_backoff=1, max_backoff=2)
def charge(order_id: str, cents: int) -> int:
    with tracer.start_as_current_span("bank"):
        logger.info("charging")
        say(f"baggage {baggage.get_baggage('shop')}")
    hold("charge")
    if cents == 666 and durable.activity_info().attempt == 1:
        raise ValueError("try again")
    return cents


@durable.activity(queue_name="shop")
async def notify(whom: str) -> None:
    with tracer.start_as_current_span("push"):
        await asyncio.sleep(0)
        logger.info("notifying")


@durable.activity(queue_name="shop")
def book(order_id: str) -> str:
    token = durable.complete_later()
    say(f"token {token}")
    return "ignored"


@dramatiq.actor(queue_name="shop")
def report() -> None:
    with tracer.start_as_current_span("reporting"):
        logger.info("reporting")


@durable.activity(queue_name="shop")
def plan(order_id: str) -> None:
    durable.schedules.create(f"report-{order_id}", cron="0 3 1 1 *", target=report)
    durable.schedules.trigger(f"report-{order_id}")


@durable.workflow(queue_name="shop")
async def ship(order_id: str, parcels: int) -> str:
    await notify.execute(order_id)
    if parcels > 1:
        durable.continue_as_new(order_id, parcels - 1)
    await durable.signal_workflow(f"ledger-{order_id}", "shipped")
    return "shipped"


@durable.workflow(queue_name="shop")
async def ledger(order_id: str) -> str:
    await durable.wait_for_signal("shipped")
    await charge.options(local=True).execute(order_id, 1)
    return "booked"


@durable.workflow(queue_name="shop")
async def order(order_id: str, cents: int) -> str:
    items: list[int] = []
    logger.info("ordering")

    @durable.on_update("add")
    async def add(more: int) -> int:
        items.append(await charge.execute(order_id, more))
        return sum(items)

    await durable.trace("begun", {"shop.order": order_id})
    await charge.execute(order_id, cents)
    await charge.options(local=True).execute(order_id, 2)
    await book.execute(order_id)
    await plan.execute(order_id)
    await durable.wait_condition(lambda: bool(items))
    shipped = await ship.options(workflow_id=f"ship-{order_id}").execute(order_id, 2)
    for n in range(5):
        await durable.sleep(0.01)
        await durable.trace(f"looked {n}")
    return shipped


@dramatiq.actor(queue_name="shop")
def accept(order_id: str, cents: int) -> None:
    with tracer.start_as_current_span("checking"):
        ledger.options(workflow_id=f"ledger-{order_id}").start(order_id)
        order.options(workflow_id=order_id).start(order_id, cents)
        logger.info("accepted")
