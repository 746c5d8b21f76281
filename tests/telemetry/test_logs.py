"""Which run and which trace a record is about."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from opentelemetry import trace

import dramatiq_durable as durable
from dramatiq_durable.telemetry.logs import FIELDS
from tests.support import wait_until

from .conftest import Exported

Start = Callable[..., dramatiq.Worker]
shop = logging.getLogger("shop")


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def one(self, text: str) -> Any:
        wait_until(lambda: any(text in r.getMessage() for r in self.records), message=text)
        return next(r for r in self.records if text in r.getMessage())


@pytest.fixture
def kept() -> Any:
    """Keeps what our own loggers, and the shop's through a handler with the filter, have logged."""
    ours, handler = Kept(), Kept()
    handler.addFilter(durable.LogFields())
    loggers = [(logging.getLogger("dramatiq_durable"), ours), (shop, handler)]
    for logger, kept in loggers:
        logger.addHandler(kept)
        logger.setLevel(logging.INFO)
    yield ours, handler
    for logger, kept in loggers:
        logger.removeHandler(kept)
        logger.setLevel(logging.NOTSET)


def test_records_of_runs_and_activities(
    broker: durable.DurableBroker, start_worker: Start, exported: Exported, kept: Any
) -> None:
    ours, theirs = kept

    @durable.activity
    def charge() -> None:
        shop.info("charging")

    @durable.workflow
    async def order() -> None:
        durable.logger.info("begins")
        await charge.execute()
        await charge.options(local=True).execute()

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.options(workflow_id="o-1").start()
    handle.result(timeout=10)
    trace_id = f"{exported.one('request').context.trace_id:032x}"
    exported.one("WORKFLOW/COMPLETE/order")
    record = ours.one("begins")
    assert (record.workflow_id, record.run_id, record.trace_id) == ("o-1", handle.run_id, trace_id)
    wait_until(lambda: len(theirs.records) == 2)
    spans = [f"{span.context.span_id:016x}" for span in exported.all("ACTIVITY/charge")]
    for record, span_id in zip(theirs.records, spans, strict=True):
        assert (record.workflow_id, record.run_id, record.trace_id) == ("o-1", handle.run_id, trace_id)
        assert record.span_id == span_id


def test_without_an_sdk_they_still_say_which_run(
    broker: durable.DurableBroker, start_worker: Start, kept: Any, make_broker: Any
) -> None:
    _, theirs = kept

    @durable.activity(queue_name="elsewhere")
    def charge() -> None:
        shop.info("charging")

    @durable.workflow(queue_name="runs")
    async def order() -> None:
        await charge.execute()

    elsewhere = make_broker()
    dramatiq.actor(queue_name="elsewhere", actor_name="charge", broker=elsewhere)(charge.fn)
    start_worker(broker, queues={"runs"})
    start_worker(elsewhere, queues={"elsewhere"})
    handle = order.options(workflow_id="o-1").start()
    handle.result(timeout=10)
    record = theirs.one("charging")
    assert (record.workflow_id, record.run_id, record.trace_id) == ("o-1", handle.run_id, None)


def test_a_run_that_was_begun_in_no_trace(
    broker: durable.DurableBroker,
    start_worker: Start,
    exported: Exported,
    kept: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, _ = kept

    @durable.workflow
    async def order() -> None:
        durable.logger.info("begins")

    with monkeypatch.context() as without:
        without.setattr(trace, "_TRACER_PROVIDER", None)
        handle = order.start()
    start_worker(broker)
    handle.result(timeout=10)
    assert ours.one("begins").trace_id == f"{exported.one('WORKFLOW/START/order').context.trace_id:032x}"


def test_our_own_warnings(broker: durable.DurableBroker, start_worker: Start, kept: Any, exported: Exported) -> None:
    ours, _ = kept

    @durable.workflow
    async def order() -> None:
        if not durable.is_replaying():
            raise BaseException("the task fails")

    start_worker(broker)
    with exported.tracer.start_as_current_span("request"):
        handle = order.options(workflow_id="o-1").start()
    record = ours.one("failed and is tried again")
    assert record.run_id == handle.run_id
    handle.terminate()


def test_every_field_is_there_for_a_formatter(broker: durable.DurableBroker, kept: Any) -> None:
    ours, theirs = kept
    shop.info("nothing in particular")
    durable.logger.info("outside")
    formatter = logging.Formatter(" ".join(f"%({name})s" for name in FIELDS))
    for record in (theirs.one("nothing"), ours.one("outside")):
        assert formatter.format(record) == "None None None None None"


def test_what_the_record_says_itself_stays(kept: Any) -> None:
    _, theirs = kept
    shop.info("of another run", extra={"run_id": "mine"})
    assert theirs.one("of another").run_id == "mine"
