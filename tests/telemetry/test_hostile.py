"""What a sender or another's worker puts into a message neither breaks an export nor forges a line of a log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

import dramatiq_durable as durable
from dramatiq_durable.delivery import Delivery
from dramatiq_durable.telemetry.logs import LogFields
from dramatiq_durable.telemetry.runs import describe
from dramatiq_durable.telemetry.texts import MESSAGE, TRACEBACK
from dramatiq_durable.workflow.events import Event
from tests.sql.api import Session
from tests.support import wait_until

from .conftest import Exported

Start = Callable[..., dramatiq.Worker]

ODD = "\ud800\n2026-01-01 CRITICAL all is well\x1b[2J"


def send(broker: durable.DurableBroker, message_id: str, *args: str) -> None:
    """As somebody who writes it by himself."""
    options = {"durable_workflow": ODD, "baggage": "a=" + "b" * 9000}
    message = {"queue_name": "default", "actor_name": "take", "args": args, "kwargs": {}, "options": options}
    payload = json.dumps({**message, "message_id": message_id, "message_timestamp": 1}).encode()
    session = Session(str(broker._url))
    assert session.enqueue(session.stream("default"), payload, actor="take") == [1]
    session.close()


def texts(span: ReadableSpan) -> list[str]:
    values = [*(span.attributes or {}).values(), *(v for e in span.events for v in (e.attributes or {}).values())]
    return [span.name, span.status.description or "", *(v for v in values if isinstance(v, str))]


def test_a_span_can_be_exported(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    # What Dramatiq logs of it is more than a report of xdist can carry.
    caplog.set_level(logging.CRITICAL, logger="dramatiq")

    @dramatiq.actor(max_retries=0)
    def take(text: str) -> None:
        raise ValueError(text)

    for n, text in enumerate((ODD, "x" * 1_000_000)):
        send(broker, f"{n}{ODD}", text)
    start_worker(broker)
    wait_until(lambda: len(exported.all("process default")) == 2)
    for span in exported.all("process default"):
        assert span.status.status_code is StatusCode.ERROR
        for text in texts(span):
            assert len(text.encode()) <= TRACEBACK
        assert len(str(span.events[0].attributes["exception.message"])) <= MESSAGE
        assert "ValueError" in str(span.events[0].attributes["exception.stacktrace"])


def test_what_another_worker_says_of_a_failure(exported: Exported) -> None:
    span = exported.tracer.start_span("WORKFLOW/ERROR/order")
    failure = {"type": ODD * 1000, "message": ODD * 100_000, "traceback": ODD * 100_000 + "ValueError"}
    describe(span, failure)
    span.end()
    found = exported.one("WORKFLOW/ERROR/order")
    for text in texts(found):
        assert len(text.encode()) <= TRACEBACK
    assert str(found.events[0].attributes["exception.stacktrace"]).endswith("ValueError")


def test_times_that_nobody_has(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    from dramatiq_durable.telemetry.runs import _ns

    assert _ns(-1) == 0
    assert 0 < _ns(Event(1, "TimerFired", 2**62).at) < 2**63
    assert _ns(1_700_000_000_000) == 1_700_000_000_000_000_000


def test_a_message_is_one_line(broker: durable.DurableBroker) -> None:
    message = dramatiq.Message("default", f"take{ODD}", (ODD,), {ODD: 1}, {})
    shown = str(Delivery(message, broker, stream_id=1, key=b"", lease=b""))
    assert shown.isprintable()
    assert shown.startswith("take\\ud800\\n2026")
    plain = dramatiq.Message("default", "take", (1, "é"), {"to": "ann"}, {})
    assert str(Delivery(plain, broker, stream_id=1, key=b"", lease=b"")) == str(plain) == "take(1, 'é', to='ann')"


def test_a_record_has_one_line(broker: durable.DurableBroker, start_worker: Start, exported: Exported) -> None:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    kept, shop = Kept(), logging.getLogger("shop")
    kept.addFilter(LogFields())
    kept.setFormatter(logging.Formatter("%(message)s [%(workflow_id)s %(message_id)s %(run_id)s]"))
    shop.addHandler(kept)
    shop.setLevel(logging.INFO)
    odd = ODD.replace("\ud800", "é")

    @dramatiq.actor
    def take() -> None:
        shop.info("taken")

    @durable.activity
    def charge() -> None:
        shop.info("charging")

    @durable.workflow
    async def order() -> Any:
        shop.info("ordering")
        await charge.execute()

    try:
        start_worker(broker)
        send(broker, ODD)
        order.options(workflow_id=odd).start().result(timeout=20)
        wait_until(lambda: len(lines) == 3)
    finally:
        shop.removeHandler(kept)
        shop.setLevel(logging.NOTSET)
    assert {line.partition(" ")[0] for line in lines} == {"taken", "charging", "ordering"}
    for line in lines:
        assert line.isprintable(), line
        assert "all is well" in line
