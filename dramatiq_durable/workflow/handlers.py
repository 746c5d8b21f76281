"""The handlers that a run's code has registered: for signals, for queries and for updates."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ForbiddenInWorkflow, Nondeterminism, NotEncodable, PayloadTooLarge
from . import events
from .commands import CompleteUpdate
from .converter import decode_call, decoders_of, encode, loads
from .events import Event
from .failures import failure_to_json
from .names import check_call
from .stack import stack_of

if TYPE_CHECKING:
    from .replay import Execution

logger = logging.getLogger(__name__)

#: The query that every run answers: where its code waits.
STACK = "__stack"


class Handler(NamedTuple):
    """A function that the code has registered under a name."""

    name: str
    fn: Callable[..., Any]
    context: contextvars.Context
    validator: Callable[..., Any] | None = None


class Handlers:
    """What a run's code answers when it is spoken to.

    Attributes:
      unstarted(set): signals and updates whose handlers have not begun, by the numbers of their events.  No run ends
        before they have, but for one that another run goes on for: that is given them.
      unfinished(list): those that had not finished when the run ended, for people.
    """

    __slots__ = ("_execution", "_numbers", "_queries", "_running", "_updates", "unfinished", "unstarted")

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._queries: dict[str, Handler] = {}
        self._updates: dict[str, Handler] = {}
        self._running: dict[int, str] = {}
        self._numbers = 0
        self.unstarted: set[int] = set()
        self.unfinished: list[str] = []

    @property
    def all_finished(self) -> bool:
        """Whether no signal's or update's handler is at work, or about to begin."""
        return not self._running and not self.unstarted

    def done(self) -> bool:
        """Whether every handler has begun: until then, a run that ends lets them."""
        return not self.unstarted

    def end(self) -> None:
        """The run ends: what was at work is left unfinished."""
        self.unfinished = list(self._running.values())

    def clear(self) -> None:
        """Forget everything: the run is dropped from memory."""
        self._queries.clear()
        self._updates.clear()
        self._running.clear()
        self.unstarted.clear()

    # --- signals ------------------------------------------------------------------------------------------

    def on_signal(self, name: str, fn: Callable[..., Any]) -> None:
        """Have signals of that name given to a function; those that came before are, at once and in order."""
        handler = Handler(name, fn, contextvars.copy_context())
        for signal in self._execution.mailbox.handle(name, lambda signal: self._arrived(handler, signal)):
            if inspect.iscoroutinefunction(fn):
                self._arrived(handler, signal)
            else:
                handler.context.copy().run(self._call_signal, handler, signal.payload)

    def _arrived(self, handler: Handler, signal: Event) -> None:
        self.unstarted.add(signal.event_id)
        context = handler.context.copy()
        if inspect.iscoroutinefunction(handler.fn):
            self._execution.loop.make_task(self._run_signal(handler, signal), None, context)
        else:
            self._execution.loop.call_soon(self._start_signal, handler, signal, context=context)

    def _start_signal(self, handler: Handler, signal: Event) -> None:
        self.unstarted.discard(signal.event_id)
        self._call_signal(handler, signal.payload)

    def _call_signal(self, handler: Handler, payload: bytes | None) -> Any:
        """Call a signal's handler; answers what it returned.  What escapes it fails the run, as it would elsewhere."""
        try:
            args = _arguments_of(handler.fn, payload)
        except Exception as e:
            # Whoever may send a signal could end the run with it.
            if not self._execution.is_replaying:
                logger.error(
                    "run %s: a signal %r is dropped, its payload is not what the handler takes: %s: %s",
                    self._execution.run_id,
                    handler.name,
                    type(e).__name__,
                    e,
                )
            return None
        try:
            return handler.fn(*args)
        except Exception as e:
            self._execution.fail(e)
            return None

    async def _run_signal(self, handler: Handler, signal: Event) -> None:
        number = self._begin(f"the signal {handler.name!r}", signal)
        try:
            coroutine = self._call_signal(handler, signal.payload)
            if coroutine is not None:
                await coroutine
        except Exception as e:
            self._execution.fail(e)
        except asyncio.CancelledError:
            # What it awaited was cancelled by others of the code: it has nobody to tell.
            pass
        finally:
            self._running.pop(number, None)

    def _begin(self, what: str, given: Event) -> int:
        self.unstarted.discard(given.event_id)
        self._numbers += 1
        self._running[self._numbers] = what
        return self._numbers

    # --- updates ------------------------------------------------------------------------------------------

    def on_update(self, name: str, fn: Callable[..., Any], validator: Callable[..., Any] | None) -> None:
        """Answer updates of that name with a function."""
        self._updates[name] = Handler(name, fn, contextvars.copy_context(), validator)

    def refusal(self, event: Event) -> dict[str, Any] | None:
        """Why the code does not take an update, as a failure; None if it does."""
        handler = self._updates.get(event.name or "")
        if handler is None:
            return _rejection("UpdateRejected", self._unknown("update", event.name, self._updates))
        try:
            args = _call_of(event, handler)
            if handler.validator is not None:
                check_call(handler.validator, f"the validator of {handler.name}", tuple(args), {})
        except Exception as e:
            return _rejection(type(e).__name__, str(e))
        if handler.validator is None:
            return None
        validator = handler.validator
        try:
            self._read(f"the validator of the update {handler.name!r}", handler.context, lambda: validator(*args))
        except Exception as e:
            return failure_to_json(e)
        return None

    def update(self, event: Event) -> None:
        """Give the code an update that it takes.

        Raises:
          Nondeterminism: it no longer does.
        """
        handler = self._updates.get(event.name or "")
        if handler is None:
            got = self._unknown("update", event.name, self._updates)
            raise Nondeterminism(event.event_id, events.describe(event.type, event.name), f"no such update ({got})")
        self.unstarted.add(event.event_id)
        self._execution.loop.make_task(self._run_update(handler, event), None, handler.context.copy())

    async def _run_update(self, handler: Handler, event: Event) -> None:
        update_id = str((event.attributes or {}).get("update_id"))
        number = self._begin(f"the update {handler.name!r} ({update_id})", event)
        command = CompleteUpdate(name=handler.name, update_id=update_id)
        try:
            value = handler.fn(*_call_of(event, handler))
            if inspect.isawaitable(value):
                value = await value
            if value is not None:
                command.payload = encode(value, f"the result of the update {handler.name!r}")
        except (NotEncodable, PayloadTooLarge) as e:
            command.failure = failure_to_json(e, retryable=False)
        except Exception as e:
            command.failure = failure_to_json(e)
        except asyncio.CancelledError as e:
            command.failure = failure_to_json(e)
        finally:
            self._running.pop(number, None)
        # Here, and not once the task is done: what the handler has just woken may end the run.
        self._execution.note(f"update {update_id}", command)

    # --- queries ------------------------------------------------------------------------------------------

    def on_query(self, name: str, fn: Callable[..., Any]) -> None:
        """Answer queries of that name with a function."""
        self._queries[name] = Handler(name, fn, contextvars.copy_context())

    def query(self, name: str, payload: bytes) -> tuple[bytes | None, dict[str, Any] | None]:
        """Ask the code; answers the encoded result, or a failure."""
        try:
            if name == STACK:
                return encode(stack_of(self._execution.loop)), None
            handler = self._queries.get(name)
            if handler is None:
                return None, _rejection("QueryFailed", self._unknown("query", name, self._queries))
            fn, context = handler.fn, handler.context
            args = _call_of(Event(0, "", 0, None, name, payload), handler)
            value = self._read(f"the query {name!r}", context, lambda: fn(*args))
            return None if value is None else encode(value, f"the result of the query {name!r}"), None
        except Exception as e:
            return None, failure_to_json(e, retryable=False)

    def _read(self, what: str, context: contextvars.Context, call: Callable[[], Any]) -> Any:
        """Call what may look at the run, and change nothing."""
        execution = self._execution
        with execution.scope(), execution.reading_only(what):
            value = context.copy().run(call)
            if inspect.isawaitable(value):
                if inspect.iscoroutine(value):
                    value.close()
                raise ForbiddenInWorkflow(f"{what} only looks at the run, and awaits nothing: write a plain function.")
        return value

    def _unknown(self, kind: str, name: str | None, known: dict[str, Handler]) -> str:
        names = ", ".join(map(repr, sorted(known))) or "none"
        return (
            f"the workflow {self._execution.info.name!r} has no handler for the {kind} {name!r}; it has: {names}. "
            f"Register it with @durable.on_{kind}({name!r}) before the code first awaits"
        )


def _rejection(type: str, message: str) -> dict[str, Any]:
    return {"type": type, "message": message, "traceback": None, "retryable": False}


def _call_of(event: Event, handler: Handler) -> list[Any]:
    """The arguments of a query or an update, typed by the handler's annotations.

    Raises:
      TypeError, ValueError: the handler does not take them.
    """
    args, _ = decode_call(event.payload, handler.fn) if event.payload is not None else ([], {})
    check_call(handler.fn, handler.name, tuple(args), {})
    return args


def _arguments_of(fn: Callable[..., Any], payload: bytes | None) -> tuple[Any, ...]:
    """What a signal's handler is called with: the payload, typed by the annotation; nothing where it takes nothing.

    Raises:
      TypeError, ValueError: it does not take the payload.
    """
    value = None if payload is None else loads(payload)
    signature = inspect.signature(fn)
    if value is None and not signature.parameters:
        return ()
    signature.bind(value)
    decoders = decoders_of(fn)
    decode = decoders.positional[0] if decoders.positional else decoders.rest
    return (value if decode is None else decode(value),)
