"""A whole shop in processes of its own: what a request brings about is one trace, whatever happens on the way."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import dramatiq
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Exported

Worker = Callable[..., Any]

#: What one order is, as (span, its parent), and how often.
ORDER = Counter(
    {
        ("send shop", "POST /orders"): 1,
        ("process shop", "send shop"): 1,
        ("checking", "process shop"): 1,
        ("send shop", "checking"): 2,
        ("WORKFLOW/START/ledger", "send shop"): 1,
        ("WORKFLOW/START/order", "send shop"): 1,
        ("begun", "WORKFLOW/START/order"): 1,
        ("ACTIVITY/charge", "WORKFLOW/START/order"): 3,
        ("ACTIVITY/charge", "WORKFLOW/START/ledger"): 1,
        ("bank", "ACTIVITY/charge"): 4,
        ("ACTIVITY/book", "WORKFLOW/START/order"): 1,
        ("ACTIVITY/plan", "WORKFLOW/START/order"): 1,
        ("process shop", "ACTIVITY/plan"): 1,
        ("reporting", "process shop"): 1,
        ("send update", "POST /items"): 1,
        ("process shop", "send update"): 1,
        ("WORKFLOW/START/ship", "WORKFLOW/START/order"): 2,
        ("ACTIVITY/notify", "WORKFLOW/START/ship"): 2,
        ("push", "ACTIVITY/notify"): 2,
        ("process shop", "WORKFLOW/START/ship"): 1,
        **{(f"looked {n}", "WORKFLOW/START/order"): 1 for n in range(5)},
        ("WORKFLOW/COMPLETE/ship", "WORKFLOW/START/ship"): 2,
        ("WORKFLOW/COMPLETE/ledger", "WORKFLOW/START/ledger"): 1,
        ("WORKFLOW/COMPLETE/order", "WORKFLOW/START/order"): 1,
        ("POST /items", "POST /orders"): 1,
        ("POST /orders", None): 1,
    }
)


class Span(NamedTuple):
    name: str
    trace: str
    id: str
    parent: str | None
    status: str = "UNSET"
    state: str = ""
    attributes: str = "{}"


def spans_of(*processes: Any) -> list[Span]:
    lines = [line for process in processes for line in process.output.splitlines()]
    found = [json.loads(line.removeprefix("span ")) for line in lines if line.startswith("span ")]
    return [Span(**{**span, "attributes": json.dumps(span["attributes"], sort_keys=True)}) for span in found]


def here(exported: Exported) -> list[Span]:
    return [
        Span(
            span.name,
            f"{span.context.trace_id:032x}",
            f"{span.context.span_id:016x}",
            None if span.parent is None else f"{span.parent.span_id:016x}",
        )
        for span in exported
    ]


def told(spans: list[Span]) -> Counter[tuple[str, str | None]]:
    """Spans with their parents' names."""
    names = {span.id: span.name for span in spans}
    return Counter((span.name, None if span.parent is None else names.get(span.parent, "?")) for span in spans)


@pytest.fixture
def worker(run_process: Any, database_url: str) -> Worker:
    def start(processes: int = 1, **env: str) -> Any:
        env = {"TEST_URL": database_url, "dramatiq_worker_timeout": "200", **env}
        options = ("--processes", str(processes), "--threads", "4")
        process = run_process.dramatiq("tests.telemetry.shop:broker", *options, env=env)
        process.wait_for("Worker process is ready", count=processes)
        return process

    return start


class Web:
    """The web application: it knows names, and nothing of the shop's code."""

    def __init__(self, broker: durable.DurableBroker, exported: Exported) -> None:
        self.broker = broker
        self.exported = exported
        broker.declare_queue("shop")

    def accept(self, order_id: str, cents: int) -> None:
        self.broker.enqueue(dramatiq.Message("shop", "accept", (order_id, cents), {}, {}))

    def order(self, worker: Any, cents: int = 500) -> str:
        """One order from the request to its end, with what others do for it."""
        with self.exported.tracer.start_as_current_span("POST /orders"):
            self.accept("o-1", cents)
            handle = durable.get_handle("o-1")
            token = worker.wait_for("token ").removeprefix("token ")
            durable.complete_activity(token, "booked")
            with self.exported.tracer.start_as_current_span("POST /items"):
                assert handle.update("add", 7, timeout=20) == 7
        assert handle.result(timeout=30) == "shipped"
        assert durable.get_handle("ledger-o-1").result(timeout=30) == "booked"
        return str(handle.history()[0].attributes["trace"]["traceparent"][3:35])


@pytest.fixture
def web(broker: durable.DurableBroker, exported: Exported) -> Web:
    return Web(broker, exported)


def complete(exported: Exported, *processes: Any, expected: Counter[Any] = ORDER) -> list[Span]:
    """All spans of an order, once they are there: one trace, the parents as they ought to be, nothing twice."""
    total = sum(expected.values())
    wait_until(lambda: len({span.id for span in [*here(exported), *spans_of(*processes)]}) >= total)
    spans = [*here(exported), *spans_of(*processes)]
    assert len({span.trace for span in spans}) == 1
    assert told(spans) == expected
    assert len({span.id for span in spans}) == total
    return spans


@pytest.mark.parametrize("cache", [None, "1", "0"])
def test_one_trace(cache: str | None, worker: Worker, web: Web, exported: Exported) -> None:
    """Also where runs are dropped from memory all the time, and replayed for each step."""
    process = worker(**({} if cache is None else {"TEST_CACHE": cache}))
    trace_id = web.order(process)
    spans = complete(exported, process)
    assert spans[0].trace == trace_id
    assert {span.status for span in spans} == {"UNSET"}
    logged = re.findall(r"^log (\S+) workflow=(\S+) run=(\S+) message=(\S+) trace=(\S+)$", process.output, re.MULTILINE)
    assert {entry[4] for entry in logged} == {trace_id}
    known = {(text, workflow) for text, workflow, _, _, _ in logged}
    assert known >= {
        ("charging", "o-1"),
        ("charging", "ledger-o-1"),
        ("notifying", "ship-o-1"),
        ("reporting", "None"),
        ("accepted", "None"),
        ("ordering", "o-1"),
    }


def test_two_workers_in_two_processes_each(worker: Worker, web: Web, exported: Exported) -> None:
    processes = [worker(processes=2, TEST_CACHE="1"), worker(processes=2, TEST_CACHE="1")]
    with exported.tracer.start_as_current_span("POST /orders"):
        web.accept("o-1", 500)
        wait_until(lambda: any("token " in process.output for process in processes))
        output = "".join(process.output for process in processes)
        durable.complete_activity(re.findall("^token (.+)$", output, re.MULTILINE)[0], "booked")
        handle = durable.get_handle("o-1")
        with exported.tracer.start_as_current_span("POST /items"):
            handle.update("add", 7, timeout=20)
    handle.result(timeout=30)
    durable.get_handle("ledger-o-1").result(timeout=30)
    complete(exported, *processes)


def test_an_attempt_that_fails_is_another_span(worker: Worker, web: Web, exported: Exported) -> None:
    process = worker()
    web.order(process, 666)
    expected = ORDER + Counter({("ACTIVITY/charge", "WORKFLOW/START/order"): 1, ("bank", "ACTIVITY/charge"): 1})
    spans = complete(exported, process, expected=expected)
    [failed] = [span for span in spans if span.status == "ERROR"]
    assert failed.name == "ACTIVITY/charge"
    assert json.loads(failed.attributes)["dramatiq_durable.attempt"] == 1


def test_a_worker_that_is_killed(worker: Worker, web: Web, exported: Exported) -> None:
    """Its attempt is made again by another, and is the same span; what it had exported stays."""
    first = worker(TEST_HOLD="charge")
    with exported.tracer.start_as_current_span("POST /orders"):
        web.accept("o-1", 500)
    first.wait_for("holding charge")
    # What had accepted the order has ended, too: else it is done again, as any actor is.  And what is named as a parent
    # later is told of.
    for name in ("process shop", "WORKFLOW/START/order", "WORKFLOW/START/ledger"):
        first.wait_for(f'"{name}"')
    first.kill()
    second = worker()
    token = second.wait_for("token ").removeprefix("token ")
    durable.complete_activity(token, "booked")
    handle = durable.get_handle("o-1")
    with exported.tracer.start_as_current_span("POST /items"):
        handle.update("add", 7, timeout=20)
    assert handle.result(timeout=30) == "shipped"
    durable.get_handle("ledger-o-1").result(timeout=30)
    second.wait_for("WORKFLOW/COMPLETE/order")
    second.wait_for("WORKFLOW/COMPLETE/ledger")
    # The killed one had told of the bank, under an attempt that the second one has told of.
    orphans = [span for span in spans_of(first) if span.name == "bank"]
    retold = {span.id for span in spans_of(second) if span.name == "ACTIVITY/charge"}
    assert orphans
    assert {span.parent for span in orphans} <= retold
    spans = [*here(exported), *spans_of(first, second)]
    ours = [span for span in spans if span.name.startswith(("WORKFLOW/", "ACTIVITY/", "send ", "process "))]
    assert len({span.id for span in ours}) == len(set(ours))
    assert sum(span.name == "WORKFLOW/COMPLETE/order" for span in set(ours)) == 1
    assert {span.parent for span in spans} - {span.id for span in spans} == {None}


def test_what_is_not_sampled_is_carried_and_not_exported(
    worker: Worker, broker: durable.DurableBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request came with flags 00, from a proxy, and with a state and baggage of its own."""
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    exported = Exported(provider)
    web = Web(broker, exported)
    process = worker()
    traceparent = f"00-{'ab' * 16}-{'cd' * 8}-00"
    came = TraceContextTextMapPropagator().extract({"traceparent": traceparent, "tracestate": "vendor=1,other=x"})
    token = context.attach(baggage.set_baggage("shop", "berlin", came))
    try:
        trace_id = web.order(process)
    finally:
        context.detach(token)
    provider.shutdown()
    assert trace_id == "ab" * 16
    assert exported.names() == []
    assert spans_of(process) == []
    facts = durable.get_handle("ship-o-1").history()[0].attributes["trace"]
    assert facts["traceparent"].startswith(f"00-{'ab' * 16}-")
    assert facts["traceparent"].endswith("-00")
    assert facts["tracestate"] == "vendor=1,other=x"
    assert facts["baggage"] == "shop=berlin"
    said = re.findall("^baggage (.*)$", process.output, re.MULTILINE)
    assert set(said) == {"berlin"}
    assert f"log charging workflow=o-1 run={durable.get_handle('o-1').describe().run_id}" in process.output
    logged = re.findall(r"^log \S+ .* trace=(\S+)$", process.output, re.MULTILINE)
    assert set(logged) == {"ab" * 16}


def test_the_state_of_a_vendor_travels_with_it(worker: Worker, web: Web, exported: Exported) -> None:
    process = worker()
    came = TraceContextTextMapPropagator().extract(
        {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "vendor=1"}
    )
    token = context.attach(came)
    try:
        web.order(process)
    finally:
        context.detach(token)
    process.wait_for("WORKFLOW/COMPLETE/ledger")
    spans = spans_of(process)
    assert {span.trace for span in spans} == {"ab" * 16}
    # But for what a run is told: with a signal travels where it is from, and no more.
    without = [span for span in spans if span.state != "vendor=1"]
    told_of = [json.loads(span.attributes) for span in without]
    assert sorted(a.get("dramatiq_durable.signal") or a["dramatiq_durable.update"] for a in told_of) == [
        "add",
        "shipped",
    ]
