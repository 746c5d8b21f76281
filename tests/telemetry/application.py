"""What the worker processes of these tests run; every span that is exported is printed as a line of JSON.

``TEST_DIE_BEFORE``, ``TEST_DIE_AFTER``: the span around whose export the process kills itself.  ``TEST_NO_SDK``: it has
none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=0.5, reclaim_count=1000)
broker.add_middleware(dramatiq.middleware.AsyncIO())
dramatiq.set_broker(broker)


started = threading.Event()


def say(text: str) -> None:
    # In one piece: other threads write there too.
    os.write(1, f"{text}\n".encode())


def die_if(name: str, variable: str) -> None:
    if name == os.environ.get(variable):
        os.kill(os.getpid(), signal.SIGKILL)


def set_up() -> Any:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Printing(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            for span in spans:
                die_if(span.name, "TEST_DIE_BEFORE")
                parent = None if span.parent is None else f"{span.parent.span_id:016x}"
                ids = f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", parent
                say("span " + json.dumps([span.name, *ids]))
                if span.name.startswith("WORKFLOW/START/"):
                    started.set()
                if span.name == os.environ.get("TEST_DIE_AFTER"):
                    # Another thread is about to tell of that: what is missing then is another test's.
                    started.wait(10)
                die_if(span.name, "TEST_DIE_AFTER")
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Printing()))
    trace.set_tracer_provider(provider)
    return provider.get_tracer("shop")


tracer = None if os.environ.get("TEST_NO_SDK") else set_up()


@durable.activity(queue_name="orders")
def charge(cents: int) -> int:
    if tracer is None:
        # (not the loggers' records: they go where the application's do)
        say(f"opentelemetry is {'there' if any(m.startswith('opentelemetry') for m in sys.modules) else 'not there'}")
        return cents
    with tracer.start_as_current_span("bank"):
        return cents


@durable.activity(queue_name="orders")
async def notify() -> None:
    if tracer is not None:
        with tracer.start_as_current_span("push"):
            pass


@durable.workflow(queue_name="orders")
async def order(cents: int) -> int:
    await durable.trace("begun")
    paid = await charge.execute(cents)
    await notify.execute()
    return paid
