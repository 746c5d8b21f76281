"""The spans of runs: gathered while a step is made, written once it is committed, and never by a replay.

Their ids are derived from the run and the event, so that any worker can name the span of the run's start as the parent
of what it does for it, also if another one wrote that span, or died before it could.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from ..workflow import events
from . import TRACE
from .context import derived_span_id, derived_trace_id, source_of
from .texts import carried_text, carried_traceback

if TYPE_CHECKING:
    from ..workflow.commands import Compute
    from ..workflow.events import Event
    from ..workflow.replay import Execution, Step
    from .spans import Spans

logger = logging.getLogger(__name__)

#: How a run ended: the span, and what it says.
_CLOSINGS: Final = {
    events.WORKFLOW_COMPLETED: ("COMPLETE", "completed"),
    events.WORKFLOW_CANCELLED: ("COMPLETE", "cancelled"),
    events.WORKFLOW_CONTINUED_AS_NEW: ("COMPLETE", "continued_as_new"),
    events.WORKFLOW_FAILED: ("ERROR", "failed"),
}

#: How the database ended a run: what its last span says beside the reason.
_ENDINGS: Final = {"terminated": "WorkflowTerminated", "timed_out": "WorkflowTimedOut"}

#: What the code asks for, and what answers it, by our words for it.
_DISPATCHES: Final = {
    events.ACTIVITY_SCHEDULED: "activity",
    events.TIMER_STARTED: "timer",
    events.CHILD_STARTED: "child",
    events.ESCALATION_OPENED: "escalation",
    events.SIGNAL_SENT: "signal",
    events.CANCEL_SENT: "cancel",
    events.SEARCH_UPSERTED: "search",
    events.ENTITY_CHANGED: "entity",
    events.TOPIC_EMITTED: "topic",
    events.OUTPUT_WRITTEN: "output",
}
_RETURNS: Final = {
    events.ACTIVITY_COMPLETED: "activity",
    events.ACTIVITY_FAILED: "activity",
    events.ACTIVITY_TIMED_OUT: "activity",
    events.ACTIVITY_CANCEL_CONFIRMED: "activity",
    events.TIMER_FIRED: "timer",
    events.CHILD_COMPLETED: "child",
    events.CHILD_FAILED: "child",
    events.CHILD_CANCELLED: "child",
    events.CHILD_TERMINATED: "child",
    events.CHILD_TIMED_OUT: "child",
    events.CHILD_START_FAILED: "child",
    events.LOCAL_ACTIVITY_COMPLETED: "local",
    events.SIDE_EFFECT_RECORDED: "side_effect",
    events.ESCALATION_RESOLVED: "escalation",
    events.ESCALATION_CANCELLED: "escalation",
    events.ESCALATION_TIMED_OUT: "escalation",
    events.MESSAGE_DELIVERED: "signal",
    events.MESSAGE_FAILED: "signal",
    events.SIGNAL_RECEIVED: "signal",
    events.CANCEL_REQUESTED: "cancel",
    events.UPDATE_ACCEPTED: "update",
    events.UPDATE_COMPLETED: "update",
}

#: What a run tells others.
_TELLING: Final = (events.SIGNAL_SENT, events.CANCEL_SENT, events.TOPIC_EMITTED)

#: What a run is told from outside, by our words for it.
_TOLD: Final = {
    events.SIGNAL_RECEIVED: "signal",
    events.CANCEL_REQUESTED: "cancel",
    events.UPDATE_ACCEPTED: "update",
    events.UPDATE_REJECTED: "update",
    events.ESCALATION_RESOLVED: "escalation",
    events.ESCALATION_CANCELLED: "escalation",
}

#: Of so many commands it is known here when they were asked for, and their names.
_REMEMBERED = 20_000

_dispatched: OrderedDict[tuple[str, int], tuple[int, str]] = OrderedDict()


class _Written(NamedTuple):
    """A span to be written: times in nanoseconds; ``end`` None is when it is written."""

    name: str
    what: str
    start: int
    end: int | None
    attributes: Mapping[str, Any]
    failure: Mapping[str, Any] | None = None
    sender: Context | None = None


class Place:
    """Where a run is in its trace.

    Parameters:
      facts: what the run was started with.

    Attributes:
      parent(Context): the context that it was started in.
      trace_id(int): of the trace.
      context(Context): that of the span of its start, under which all that it does is.
      carrier(dict): the same for what it sends.
      attributes(dict): what each of its spans says.
    """

    __slots__ = ("attributes", "carrier", "context", "parent", "run_id", "spans", "trace_id")

    def __init__(
        self, spans: Spans, run_id: str, workflow_id: str, name: str, queue_name: str, facts: Mapping[str, Any]
    ) -> None:
        self.spans = spans
        self.run_id = run_id
        parent = spans.context_in(facts.get(TRACE))
        sender = trace.get_current_span(parent).get_span_context()
        if sender.is_valid:
            trace_id, flags, state = sender.trace_id, sender.trace_flags, sender.trace_state
        else:
            # Begun in no trace: the sampler decides by the trace's id, here and wherever the run goes on.
            source = source_of(facts, run_id)
            trace_id, flags, state = derived_trace_id(source), TraceFlags(TraceFlags.SAMPLED), None
            sampler = getattr(spans.tracer, "sampler", None)
            start = f"WORKFLOW/START/{name}"
            if sampler is not None and not sampler.should_sample(parent, trace_id, start).decision.is_sampled():
                flags = TraceFlags(TraceFlags.DEFAULT)
            if source != run_id:
                first = SpanContext(trace_id, derived_span_id(source, "start"), True, flags)
                parent = trace.set_span_in_context(NonRecordingSpan(first), parent)
        own = SpanContext(trace_id, derived_span_id(run_id, "start"), True, flags, state)
        self.parent, self.trace_id = parent, trace_id
        self.context = trace.set_span_in_context(NonRecordingSpan(own), parent)
        self.carrier = spans.carrier_of(self.context)
        self.attributes = {
            "dramatiq_durable.workflow": name,
            "dramatiq_durable.workflow_id": workflow_id,
            "dramatiq_durable.run_id": run_id,
            "messaging.destination.name": queue_name,
        }


def place_of(spans: Spans, execution: Execution) -> Place:
    """The place of a run that is in memory, which it keeps; another SDK may sample otherwise."""
    place: Place | None = execution.place
    if place is None or place.spans is not spans:
        info = execution.info
        place = Place(spans, info.run_id, info.workflow_id, info.name, info.queue_name, execution.facts)
        execution.place = place
    return place


class RunTrace:
    """The spans of one step of a run.

    Attributes:
      carrier(dict): the context of the run, for what it sends.
    """

    def __init__(self, spans: Spans, execution: Execution) -> None:
        self._spans = spans
        self._info = execution.info
        self._place = place = place_of(spans, execution)
        self._attributes = place.attributes
        self.carrier = place.carrier
        self._due: list[_Written] = []

    def note(self, execution: Execution, step: Step) -> None:
        for event in step.events:
            if event.type in (events.WORKFLOW_STARTED, events.WORKFLOW_RESET):
                self._begin(event)
            elif event.type in _CLOSINGS:
                self._close(event)
            elif event.type in _TELLING and event.attributes is not None and "traceparent" in self.carrier:
                # What others are told has its place in the run's trace.
                event.attributes.setdefault(TRACE, {"traceparent": self.carrier["traceparent"]})
            elif event.type in _TOLD and event.attributes is not None and TRACE in event.attributes:
                self._told(event, event.attributes[TRACE], _failure_of(event, step))
            if self._spans.debug:
                self._detail(event)
        recorded = [event for event in step.events if event.event_id]
        if self._spans.debug and recorded:
            first = recorded[0]
            what = {
                **self._attributes,
                "dramatiq_durable.event": first.type,
                "dramatiq_durable.events": len(recorded),
                "dramatiq_durable.commands": len(step.commands),
            }
            name = f"STEP/{self._info.name}/{first.event_id}"
            self._due.append(_Written(name, f"step:{first.event_id}", time.time_ns(), None, what))
        for n, name, at, given in execution.traced or ():
            self._due.append(_Written(name, f"trace:{n}", at, at, {**self._attributes, **given}))
        execution.traced = None

    def _begin(self, event: Event) -> None:
        if any(span.what == "start" for span in self._due):
            return  # A reset may have kept nothing but the start: both are in the first step.
        what = {**self._attributes, "dramatiq_durable.attempt": self._info.attempt}
        self._due.append(_Written(f"WORKFLOW/START/{self._info.name}", "start", _ns(event.at), None, what))

    def _close(self, event: Event) -> None:
        kind, status = _CLOSINGS[event.type]
        started = self._info.started_at
        start = _ns(event.at if started is None else int(started.timestamp() * 1000))
        what = {**self._attributes, "dramatiq_durable.status": status}
        failure = events.described_failure(event) or None
        name = f"WORKFLOW/{kind}/{self._info.name}"
        self._due.append(_Written(name, "close", min(start, _ns(event.at)), _ns(event.at), what, failure))
        if event.type == events.WORKFLOW_CONTINUED_AS_NEW and event.attributes is not None:
            # The run that follows belongs to the trace, also where nobody began one.
            facts = event.attributes.get("facts")
            if isinstance(facts, dict):
                facts.setdefault(TRACE, self.carrier)

    def _told(self, event: Event, carrier: Any, failure: Mapping[str, Any] | None) -> None:
        """It was signalled, updated or cancelled: that belongs to the sender's trace, and is linked to the run's."""
        sender = self._spans.context_in(carrier)
        if not trace.get_current_span(sender).get_span_context().is_valid:
            return
        queue_name = self._info.queue_name
        what = {
            **self._attributes,
            "messaging.system": "dramatiq_durable",
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
        }
        if event.name is not None:
            what[f"dramatiq_durable.{_TOLD[event.type]}"] = event.name
        # A rejected update is no event of the history, and has no number.
        key = event.event_id or (event.attributes or {}).get("update_id")
        at = _ns(event.at)
        self._due.append(_Written(f"process {queue_name}", f"told:{key}", at, None, what, failure, sender))

    def _detail(self, event: Event) -> None:
        run_id = self._info.run_id
        at = _ns(event.at)
        n = event.seq if event.seq is not None else event.event_id
        what = {**self._attributes, "dramatiq_durable.event_id": event.event_id}
        if (kind := _DISPATCHES.get(event.type)) is not None:
            name = event.name or kind
            remember(run_id, [event])
            self._due.append(_Written(f"DISPATCH/{kind}/{name}/{n}", f"dispatch:{event.event_id}", at, at, what))
        elif (kind := _RETURNS.get(event.type)) is not None:
            start, name = _dispatched.pop((run_id, n), (at, event.name or kind))
            failure = events.described_failure(event) or None
            span = _Written(f"RETURN/{kind}/{name}/{n}", f"return:{event.event_id}", min(start, at), at, what, failure)
            self._due.append(span)

    def committed(self) -> None:
        """The step is committed: write its spans."""
        due, self._due = self._due, []
        try:
            self._write(due)
        except Exception:
            logger.warning("the spans of a step are not written", exc_info=True)

    def _write(self, due: list[_Written]) -> None:
        for name, what, start, end, attributes, failure, sender in due:
            outside = self._place.parent if what == "start" else sender
            parent = self._place.context if outside is None else outside
            ids = self._place.trace_id, derived_span_id(self._place.run_id, what)
            kind = SpanKind.INTERNAL if outside is None else SpanKind.CONSUMER
            links = [] if sender is None else [Link(trace.get_current_span(self._place.context).get_span_context())]
            span = self._spans.begin(name, parent, ids, attributes, kind, start, links)
            describe(span, failure or {})
            span.end(end)


def remember(run_id: str, history: list[Event]) -> None:
    """When commands were asked for, for the spans of their answers."""
    for event in history:
        kind = _DISPATCHES.get(event.type)
        if kind is not None and event.seq is not None:
            _dispatched[run_id, event.seq] = (_ns(event.at), event.name or kind)
        elif event.type in _RETURNS and event.seq is not None:
            _dispatched.pop((run_id, event.seq), None)
    while len(_dispatched) > _REMEMBERED:
        _dispatched.popitem(last=False)


def _failure_of(told: Event, step: Step) -> Mapping[str, Any] | None:
    """What an update failed with, as far as this step knows."""
    if told.type == events.UPDATE_REJECTED:
        return events.described_failure(told)
    if told.type == events.UPDATE_ACCEPTED:
        update_id = (told.attributes or {}).get("update_id")
        for event in step.events:
            if event.type == events.UPDATE_COMPLETED and (event.attributes or {}).get("update_id") == update_id:
                return events.described_failure(event)
    return None


def write_end(spans: Spans, row: tuple[Any, ...]) -> None:
    """Write the last span of a run that the database has ended: see ``get_closing`` in SQL."""
    key, workflow_id, name, queue_name, status, started_at, closed_at, reason, facts = row
    run_id = str(uuid.UUID(bytes=key))
    place = Place(spans, run_id, workflow_id, name, queue_name, json.loads(facts or "{}"))
    what = {**place.attributes, "dramatiq_durable.status": status}
    ids, start = (place.trace_id, derived_span_id(run_id, "close")), min(started_at, closed_at)
    span = spans.begin(f"WORKFLOW/ERROR/{name}", place.context, ids, what, at=_ns(start))
    describe(span, {"type": _ENDINGS[status], "message": reason or "no reason given"})
    span.end(_ns(closed_at))


def begin_local(spans: Spans, command: Compute, execution: Execution) -> tuple[trace.Span, Any]:
    """The span of an attempt of a local activity, which is the current one until it ends, and the token for that."""
    run_id = execution.run_id
    place = place_of(spans, execution)
    attributes = {
        "dramatiq_durable.actor": command.name or "",
        "dramatiq_durable.attempt": command.attempt,
        "dramatiq_durable.local": True,
        "dramatiq_durable.run_id": run_id,
        "dramatiq_durable.workflow_id": execution.workflow_id,
    }
    ids = place.trace_id, derived_span_id(run_id, f"local:{command.seq}")
    span = spans.begin(f"ACTIVITY/{command.name}", place.context, ids, attributes)
    return span, otel.attach(trace.set_span_in_context(span, place.context))


def describe(span: trace.Span, failure: Mapping[str, Any]) -> None:
    """Say of a span how what it tells of failed, if it did."""
    if not failure:
        return
    type, message = carried_text(str(failure.get("type")), 200), carried_text(str(failure.get("message")))
    told = {"exception.type": type, "exception.message": message}
    if failure.get("traceback"):
        told["exception.stacktrace"] = carried_traceback(str(failure["traceback"]))
    span.add_event("exception", told)
    span.set_status(Status(StatusCode.ERROR, f"{type}: {message}"[:1000]))


def _ns(ms: int) -> int:
    # Whoever records an event says when: no exporter takes a time that is out of its range.
    return min(max(ms, 0), 2**63 // 1_000_000) * 1_000_000
