"""Spans, written through the SDK that the application has set up.  Only this package's modules import OpenTelemetry.

No failure here is anybody's: what the SDK, a sampler or an exporter raises is logged, and the work goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..group_commit import riding
from ..workflow import events
from .context import CARRIED, LONGEST, carried, derived_span_id, derived_trace_id, workflow_id_in
from .runs import RunTrace, begin_local, describe, remember, write_end
from .texts import carried_text, traced_exception

if TYPE_CHECKING:
    from ..delivery import Delivery
    from ..operations import Advance
    from ..workflow.commands import Compute
    from ..workflow.events import Event
    from ..workflow.replay import Execution, Step

logger = logging.getLogger(__name__)

SYSTEM = "dramatiq_durable"

_TRACE_CONTEXT = TraceContextTextMapPropagator()
_BAGGAGE = W3CBaggagePropagator()

#: The trace id and the span id that the span that begins now is to have.
_wanted: ContextVar[tuple[int, int] | None] = ContextVar("wanted", default=None)


class _Ids:
    """Stands in front of the SDK's own generator of ids, for our tracer alone."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def generate_trace_id(self) -> int:
        wanted = _wanted.get()
        return int(self.own.generate_trace_id()) if wanted is None else wanted[0]

    def generate_span_id(self) -> int:
        wanted = _wanted.get()
        return int(self.own.generate_span_id()) if wanted is None else wanted[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


class Attempt:
    """The span of an attempt that runs on this thread."""

    def __init__(self, span: Span, token: Any) -> None:
        self._span = span
        self._token = token

    def end(self, delivery: Delivery, exception: BaseException | None) -> None:
        """It has ended, with its hooks."""
        delivery.span = None
        if exception is not None and delivery.retry is not None:
            self._span.set_attribute("dramatiq_durable.retry_delay", delivery.retry / 1000)
        end(self._span, self._token, exception)


def end(span: Span, token: Any, failed: BaseException | None) -> None:
    """End a span that was the current one, and say what it failed with."""
    try:
        otel.detach(token)
        if failed is not None:
            span.record_exception(failed, traced_exception(failed))
            span.set_status(Status(StatusCode.ERROR, carried_text(f"{type(failed).__name__}: {failed}", 1000)))
        span.end()
    except Exception:
        logger.warning("a span was not written", exc_info=True)


class Spans:
    """Writes spans.

    Attributes:
      provider(TracerProvider): the application's.
      debug(bool): everything is told.
    """

    def __init__(self, provider: TracerProvider, *, debug: bool) -> None:
        self.provider = provider
        self.debug = debug
        tracer: Any = provider.get_tracer(SYSTEM)
        self.tracer = tracer
        ids = getattr(tracer, "id_generator", None)
        # A tracer that is not the SDK's makes its ids by itself: then they are not derived.
        if ids is not None and not isinstance(ids, _Ids):
            tracer.id_generator = _Ids(ids)

    def begin(
        self,
        name: str,
        parent: Context,
        ids: tuple[int, int],
        attributes: Mapping[str, Any],
        kind: SpanKind = SpanKind.INTERNAL,
        at: int | None = None,
        links: Sequence[Link] = (),
    ) -> Span:
        """Begin a span with these ids (trace, if the parent has none, and span).  ``at`` is in nanoseconds."""
        token = _wanted.set(ids)
        try:
            span: Span = self.tracer.start_span(name, parent, kind, attributes, links, start_time=at)
            return span
        finally:
            _wanted.reset(token)

    # --- context ------------------------------------------------------------------------------------------
    def context_in(self, options: Any) -> Context:
        """The context that options carry; an empty one if they carry none that is any good."""
        carrier = carried(options)
        if not carrier:
            return Context()
        context = _TRACE_CONTEXT.extract(carrier, Context())
        return _BAGGAGE.extract(carrier, context) if "baggage" in carrier else context

    def carrier_of(self, context: Context | None = None) -> dict[str, str]:
        """A context (None: the current one) as it travels; empty where there is nothing to tell."""
        carrier: dict[str, str] = {}
        try:
            _TRACE_CONTEXT.inject(carrier, context)
            _BAGGAGE.inject(carrier, context)
        except Exception:
            logger.warning("the trace context is not passed on", exc_info=True)
        return carried(carrier)

    # --- sending ------------------------------------------------------------------------------------------
    @contextmanager
    def sending(self, stream: str | None, attributes: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """Around something that is sent to a stream (None: to several): a producer's span.  Gives the context that
        travels with it."""
        try:
            what = {**messaging("send", stream), **attributes}
            if riding.get() is not None:
                # Whether it comes to anything, the caller's transaction decides.
                what["dramatiq_durable.using"] = True
            span: Span = self.tracer.start_span(
                "send" if stream is None else f"send {stream}", kind=SpanKind.PRODUCER, attributes=what
            )
        except Exception:
            logger.warning("a span was not written", exc_info=True)
            yield self.carrier_of()
            return
        token = otel.attach(trace.set_span_in_context(span))
        failed: BaseException | None = None
        try:
            yield self.carrier_of()
        except BaseException as e:
            failed = e
            raise
        finally:
            end(span, token, failed)

    def telling(self, what: str, name: str | None, run: str | None) -> AbstractContextManager[dict[str, str]]:
        """As `sending`, for a signal, an update or a cancel that a run (one of its ids) is sent."""
        attributes = {"messaging.destination.name": run or ""}
        if name is not None:
            attributes[f"dramatiq_durable.{what}"] = name
        return self.sending(what, attributes)

    @contextmanager
    def sending_message(self, message: Message[Any]) -> Iterator[Message[Any]]:
        """As `sending`; gives the message with the context in its options."""
        attributes = {"messaging.message.id": message.message_id, "dramatiq_durable.actor": message.actor_name}
        with self.sending(message.queue_name, attributes) as carrier:
            yield _with(message, carrier)

    @contextmanager
    def sending_messages(self, messages: Sequence[Message[Any]]) -> Iterator[list[Message[Any]]]:
        """Around many messages that are sent together: one span."""
        attributes = {"messaging.batch.message_count": len(messages)}
        streams = {message.queue_name for message in messages}
        with self.sending(streams.pop() if len(streams) == 1 else None, attributes) as carrier:
            yield [_with(message, carrier) for message in messages]

    # --- processing ---------------------------------------------------------------------------------------
    def begin_attempt(self, delivery: Delivery) -> None:
        """An attempt begins on this thread: its span is the current one until `Attempt.end`."""
        try:
            activity = delivery.kind == "a"
            key = delivery.key.hex()
            parent = self.context_in(delivery.options)
            # What is sent again under its own id is another message.
            sent = trace.get_current_span(parent).get_span_context().span_id
            span = self.begin(
                f"ACTIVITY/{delivery.actor_name[:LONGEST]}" if activity else f"process {delivery.queue_name}",
                parent,
                (
                    0 if sent else derived_trace_id(delivery.run_id if delivery.run_id is not None else key),
                    derived_span_id(key, f"{delivery.attempt}:{sent}"),
                ),
                {
                    **messaging("process", delivery.queue_name),
                    "messaging.message.id": carried_text(delivery.message_id, LONGEST),
                    "dramatiq_durable.actor": carried_text(delivery.actor_name, LONGEST),
                    "dramatiq_durable.attempt": delivery.attempt,
                    **_run_of(delivery),
                },
                SpanKind.CONSUMER,
            )
            delivery.span = Attempt(span, otel.attach(trace.set_span_in_context(span, parent)))
        except Exception:
            logger.warning("a span was not written", exc_info=True)

    # --- runs ---------------------------------------------------------------------------------------------
    def note(self, advance: Advance, execution: Execution, step: Step) -> None:
        """Take in a part of a step: its spans are written once it is committed.  Whatever the step sends has the
        run's context from here on."""
        try:
            if advance.trace is None:
                advance.trace = RunTrace(self, execution)
            advance.trace.note(execution, step)
        except Exception:
            logger.warning("the spans of a step are not written", exc_info=True)

    def ended(self, row: tuple[Any, ...]) -> None:
        """The database has ended a run: write its last span."""
        try:
            write_end(self, row)
        except Exception:
            logger.warning("a span was not written", exc_info=True)

    def recall(self, run_id: str, history: list[Event]) -> None:
        """A run is loaded: its answers' spans begin when they were asked for."""
        remember(run_id, history)

    def computing(self, command: Compute, execution: Execution, compute: Callable[[Compute], Event]) -> Event:
        """Around an attempt of a local activity: as any other it is a span, and its own spans nest under it."""
        try:
            span, token = begin_local(self, command, execution)
        except Exception:
            logger.warning("a span was not written", exc_info=True)
            return compute(command)
        event: Event | None = None
        try:
            event = compute(command)
            return event
        finally:
            if event is not None:
                describe(span, events.described_failure(event))
            end(span, token, None)


def messaging(operation: str, stream: str | None) -> dict[str, Any]:
    """What OpenTelemetry's conventions for messaging say of a span."""
    said = {
        "messaging.system": SYSTEM,
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
    }
    if stream is not None:
        said["messaging.destination.name"] = stream
    return said


def _with(message: Message[Any], carrier: dict[str, str]) -> Message[Any]:
    """A message with this context, and nothing of the one that it was sent in before."""
    message = message.copy(options=carrier)
    for key in CARRIED:
        if key not in carrier:
            message.options.pop(key, None)
    return message


def _run_of(delivery: Delivery) -> dict[str, Any]:
    if delivery.run_id is None:
        return {}
    # Of an activity that names no other, the run's id is the workflow's.
    workflow_id = carried_text(workflow_id_in(delivery.options) or delivery.run_id)
    return {"dramatiq_durable.run_id": delivery.run_id, "dramatiq_durable.workflow_id": workflow_id}
