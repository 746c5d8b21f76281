"""Workers that die around an export, greenlets, and processes without an SDK."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Exported

Worker = Callable[..., Any]


class Span(NamedTuple):
    name: str
    trace: str
    id: str
    parent: str | None


def spans_of(*processes: Any) -> list[Span]:
    lines = [line for process in processes for line in process.output.splitlines()]
    return [Span(*json.loads(line.removeprefix("span "))) for line in lines if line.startswith("span ")]


@pytest.fixture
def worker(run_process: Any, database_url: str) -> Worker:
    def start(*, gevent: bool = False, **env: str) -> Any:
        env = {"TEST_URL": database_url, "dramatiq_worker_timeout": "200", **env}
        application = ("tests.telemetry.application:broker", "--processes", "1", "--threads", "4")
        if gevent:
            process = run_process(
                sys.executable, Path(sys.executable).parent / "dramatiq-gevent", *application, env=env
            )
        else:
            process = run_process.dramatiq(*application, env=env)
        process.wait_for("Worker process is ready")
        return process

    return start


@pytest.fixture
def order(broker: durable.DurableBroker) -> Any:
    return durable.workflow_stub("order", queue_name="orders", broker=broker)


def connected(exported: Exported, spans: list[Span], missing: tuple[str, ...] = ()) -> None:
    """All are of the request's trace; each one's parent is there, but for children of what was not exported."""
    request = exported.one("request")
    here = [Span(s.name, f"{s.context.trace_id:032x}", f"{s.context.span_id:016x}", None) for s in exported]
    assert {span.trace for span in [*here, *spans]} == {f"{request.context.trace_id:032x}"}
    ids = {span.id for span in [*here, *spans]}
    loose = {span.parent for span in spans if span.parent not in ids}
    assert len(loose) == len(missing), spans


@pytest.mark.parametrize("gevent", [False, True], ids=["threads", "gevent"])
def test_a_worker_of_its_own(gevent: bool, worker: Worker, order: Any, exported: Exported) -> None:
    process = worker(gevent=gevent)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start(5)
    assert handle.result(timeout=20) == 5
    process.wait_for("WORKFLOW/COMPLETE/order")
    spans = spans_of(process)
    connected(exported, spans)
    by_id = {span.id: span.name for span in spans}
    parents = {span.name: by_id.get(span.parent or "", "send orders") for span in spans}
    assert parents == {
        "WORKFLOW/START/order": "send orders",
        "begun": "WORKFLOW/START/order",
        "bank": "ACTIVITY/charge",
        "ACTIVITY/charge": "WORKFLOW/START/order",
        "push": "ACTIVITY/notify",
        "ACTIVITY/notify": "WORKFLOW/START/order",
        "WORKFLOW/COMPLETE/order": "WORKFLOW/START/order",
    }
    assert len(spans) == 7


@pytest.mark.parametrize("lost", ["WORKFLOW/START/order", "begun"])
def test_a_worker_that_dies_between_commit_and_export(
    lost: str, worker: Worker, order: Any, exported: Exported
) -> None:
    """The span goes with it; what others export is of the same trace, and names it as its parent."""
    first = worker(TEST_DIE_BEFORE=lost)
    with exported.tracer.start_as_current_span("request"):
        handle = order.start(5)
    wait_until(lambda: any(e.type == "ActivityScheduled" for e in handle.history()))
    second = worker()
    assert handle.result(timeout=30) == 5
    second.wait_for("WORKFLOW/COMPLETE/order")
    spans = spans_of(first, second)
    assert lost not in [span.name for span in spans_of(first)]
    connected(exported, spans, missing=("start",) if lost == "WORKFLOW/START/order" else ())
    # The activity may have been handed out before that death: what was exported of it twice is one span.
    assert len({span.id for span in spans}) == len(set(spans))
    assert [span.name for span in spans].count("WORKFLOW/COMPLETE/order") == 1


def test_what_is_exported_twice_is_the_same_span(worker: Worker, order: Any, exported: Exported) -> None:
    """The attempt's span was exported, its end was not committed: it is run again."""
    first = worker(TEST_DIE_AFTER="ACTIVITY/charge")
    with exported.tracer.start_as_current_span("request"):
        handle = order.start(5)
    first.wait_for("ACTIVITY/charge")
    second = worker()
    assert handle.result(timeout=30) == 5
    second.wait_for("WORKFLOW/COMPLETE/order")
    spans = spans_of(first, second)
    connected(exported, spans)
    once, again = [span for span in spans if span.name == "ACTIVITY/charge"]
    assert once == again
    assert [span.name for span in spans].count("WORKFLOW/START/order") == 1


def test_without_an_sdk_opentelemetry_is_not_imported(worker: Worker, order: Any) -> None:
    process = worker(TEST_NO_SDK="1")
    handle = order.start(5)
    assert handle.result(timeout=20) == 5
    assert process.wait_for("opentelemetry is") == "opentelemetry is not there"
    assert "trace" not in handle.history()[0].attributes
