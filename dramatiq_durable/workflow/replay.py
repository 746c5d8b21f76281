"""A run: history in, commands out.

An ``Execution`` holds one run's event loop, its main task and the futures that wait for events.  It is pure: what comes
out is a function of the events that went in, so that a run can be dropped from memory at any time and made again from
its history, in another process, by feeding it the same events.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Coroutine, Iterable
from ctypes import py_object, pythonapi
from typing import Any, NamedTuple, cast

from ..errors import Failure, Nondeterminism, NotEncodable, PayloadTooLarge
from . import events, guard
from .commands import ActivityHandle, CancelWorkflow, Command, CompleteWorkflow, FailWorkflow
from .commands.closing import ContinueAsNewRequested
from .compare import compare, describe
from .converter import decode_call, encode
from .deadlock import Overdue
from .events import Event
from .failures import failure_to_json
from .handlers import Handlers
from .info import START_FACTS, STATE_FACTS, Info, Parent
from .inside import Inside, overdue
from .interceptors import CallContext, Interceptors, through
from .loop import MAX_HANDLES, Scope, WorkflowLoop, current_host
from .mailbox import Mailbox
from .patches import Patches
from .retry import asked_delay, forbids, is_last

_INPUT_TYPES = events.INPUT_TYPES
_NO_INTERCEPTORS = Interceptors()
_COMPUTED = (events.LOCAL_ACTIVITY_COMPLETED, events.SIDE_EFFECT_RECORDED)


class Step(NamedTuple):
    """One step, ready to be stored: the input event and one event for each command, and the commands."""

    events: list[Event]
    commands: list[Command]


class Execution(Inside):
    """One run in memory.

    It may be stepped by different threads, one after another, never by two at a time.  After an exception from
    ``apply``, ``step`` or ``replay`` it is of no more use: evict it.

    Parameters:
      fn: the workflow's ``async def``.
      info(Info): what the run knows about itself; ``info.run_id`` seeds what is random.
      max_handles(int): how many callbacks one step may run.
      interceptors(Interceptors): what its code, and its calls, go through.
      deadlock_timeout(float | None): how many seconds one step may take; None: as many as it likes.
      keep(bool): keep the code in memory when the run has ended, so that it can be asked how it was then.

    Attributes:
      closed(bool): the run has ended; how, its last command says.
      last_event_id(int): number of the last event known here, inputs and commands alike.
      is_replaying(bool): true while ``replay`` runs.
    """

    __slots__ = (
        "_cancel_requested",
        "_keep",
        "_recorded_at",
        "begun",
        "closed",
        "evicted",
        "facts",
        "fn",
        "handlers",
        "interceptors",
        "is_replaying",
        "mailbox",
        "patches",
        "place",
        "traced",
    )

    def __init__(
        self,
        fn: Callable[..., Coroutine[Any, Any, Any]],
        info: Info,
        *,
        max_handles: int = MAX_HANDLES,
        interceptors: Interceptors = _NO_INTERCEPTORS,
        deadlock_timeout: float | None = None,
        keep: bool = False,
    ) -> None:
        guard.install()
        super().__init__(info)
        self.fn = fn
        self._keep = keep
        self.interceptors = interceptors
        #: What the first event says of the run beside its input.
        self.facts: dict[str, Any] = {}
        self.patches = Patches(self)
        #: The spans that the code has asked for with `trace` in a step; None in a replay, or where nobody writes spans.
        self.traced: list[tuple[int, str, int, dict[str, Any]]] | None = None
        #: Where it is in its trace: see `telemetry`.
        self.place: Any = None
        self._cancel_requested = False
        self.begun = False
        """Its code has begun: before that, its interceptors may wait for something, and nobody answers updates."""
        #: The time of the last event.
        self._recorded_at = 0
        self.closed = False
        self.evicted = False
        self.is_replaying = False
        self.loop = WorkflowLoop(self, info.run_id, max_handles, deadlock_timeout)  # type: ignore[abstract]
        self.mailbox = Mailbox(self.loop)
        self.handlers = Handlers(self)

    # --- events in, commands out -----------------------------------------------------------------------
    def step(self, event: Event, more: bool = False, now: int = 0) -> Step:
        """Apply one input event and number everything.

        Parameters:
          event(Event): its ``event_id`` is ignored: it gets the next one, and the commands' events those after it.
          more(bool): something that is said to the code comes next: as ``apply``.
          now(int): the time, in milliseconds since the epoch, if what happened may have waited for long: what the code
            asks for is recorded with it, and its timers run from then.

        Returns:
          Step: the events to store, in order, and the commands to carry out.

        Raises:
          as ``apply``.
        """
        event_id = self.last_event_id + 1
        _, type, at, seq, name, payload, attributes = event
        # What is recorded keeps to history's clock: news from other machines' clocks may lie behind it.
        self._recorded_at = at = max(at, self._recorded_at)
        if type == events.ACTIVITY_FAILED:
            asked = self._pending.get(cast(int, seq))
            if isinstance(asked, ActivityHandle) and asked.has_confirmed(event):
                type = events.ACTIVITY_CANCEL_CONFIRMED
        event = Event(event_id, type, at, seq, name, payload, attributes)
        commands = self.apply(event, more)
        return Step([event, *self._recorded(commands, now)], commands)

    def close_late(self, now: int = 0) -> Step:
        """What was to come next does not come: a run that has ended closes now, with the step before."""
        if self.closed or not self._has_ended():
            return Step([], [])
        with self.scope():
            self._end()
        commands = self._gathered()
        return Step(self._recorded(commands, now), commands)

    def _recorded(self, commands: list[Command], now: int) -> list[Event]:
        if not commands:
            return []
        self._recorded_at = at = max(now, self._recorded_at)
        recorded = [
            Event(event_id, c.event_type, at, c.seq, c.name, c.payload, c.attributes())
            for event_id, c in enumerate(commands, self.last_event_id + 1 - len(commands))
        ]
        for event in recorded:
            if event.type in events.TIMER_STARTS:
                self._clock(event)
        return recorded

    def apply(self, event: Event, more: bool = False) -> list[Command]:
        """Apply one input event and run the code until it waits.

        Parameters:
          more(bool): something that is said to the code comes next: code that has come to its end is given that, too,
            before the run closes.

        Returns:
          The commands that came out, in order.  An event that nothing waits for any more gives none, and so does every
          event after the closing one.

        Raises:
          ValueError: the event is no input.
          RuntimeError: the execution was evicted.
          RunawayWorkflow: the code does not come to an end.
          BaseException: what is no Exception and escaped the code, e.g. KeyboardInterrupt.
        """
        handler = _HANDLERS.get(event.type)
        if handler is None:
            raise ValueError(f"{event.type} is no input event.")
        if self.evicted:
            raise RuntimeError("this execution was evicted: make a new one and replay its history.")
        loop = self.loop
        self.last_event_id = event.event_id
        if event.at > loop.now_ms:
            loop.now_ms = event.at
        if event.payload is not None:
            self.history_bytes += len(event.payload)
        if self.closed:
            return []
        self._asked_bytes = 0
        scope = Scope(loop)
        try:
            with scope:
                loop.left = loop.max_handles
                handler(self, event)
                main = self._main
                # Signals that came together are given together: code that answers the first can see the others.
                if main is not None and not _is_held(event):
                    if loop.ready:
                        loop.drain(main)
                    if self._conditions:
                        self._settle(main)
                    if self._has_ended() and (not more or self._goes_on()):
                        self._end()
        except Overdue:
            raise overdue(scope) from None
        return self._gathered()

    def _gathered(self) -> list[Command]:
        if not self._out:
            return []
        commands = list(self._out.values())
        self._out.clear()
        for command in commands:
            if command.payload is not None:
                self.history_bytes += len(command.payload)
        self.last_event_id += len(commands)
        return commands

    def replay(self, history: Iterable[Event], more: bool = False) -> None:
        """Apply a recorded history, comparing every command with what the history says.

        Parameters:
          history: complete steps, from where this execution stands; a fresh one starts with event 1.
          more(bool): a reset cut it here, and what the code was told next comes again.

        Raises:
          Nondeterminism: the code asks for less, for more, for something else or in another order.
          as ``apply``.
        """
        history = list(history)
        inputs = [e.type for e in history if e.type in _INPUT_TYPES]
        applied = 0
        self.patches.recorded.update(e.name or "" for e in history if e.type == events.PATCH_RECORDED)
        self.is_replaying = True
        commands: list[Command] = []
        compared = 0
        try:
            for event in history:
                if event.type in _INPUT_TYPES:
                    if compared < len(commands):
                        raise Nondeterminism(event.event_id, "no more commands", describe(commands[compared]))
                    applied += 1
                    follows = inputs[applied] in events.PRECEDES_END if applied < len(inputs) else more
                    commands = self.apply(event, follows)
                    compared = 0
                else:
                    if event.type == events.PATCH_RECORDED and self.patches.are_behind(event, commands[compared:]):
                        self.last_event_id = event.event_id
                        continue
                    if compared >= len(commands):
                        raise Nondeterminism(event.event_id, events.describe(event.type, event.name), "nothing")
                    compare(event, commands[compared])
                    compared += 1
                    self.last_event_id = event.event_id
                    if event.type in events.TIMER_STARTS:
                        self._clock(event)
            if compared < len(commands):
                missing = self.last_event_id + 1 if compared else self.last_event_id - len(commands) + 1
                raise Nondeterminism(missing, "no more commands", describe(commands[compared]))
        finally:
            self.is_replaying = False
        if history:
            self._recorded_at = max(self._recorded_at, history[-1].at)

    def evict(self) -> None:
        """Drop the run from memory.  Code that runs because of it (``finally`` blocks) can do nothing any more."""
        if self.evicted:
            return
        self.evicted = True
        scope = Scope(self.loop)
        try:
            with scope:
                self._tear_down()
        except Overdue:
            scope.leave()

    # --- inside ------------------------------------------------------------------------------------------
    def _on_start(self, event: Event) -> None:
        if self._main is not None:
            raise ValueError("the run has started already.")
        self.facts = event.attributes or {}
        self.lineage.begin(self.facts)
        if self.lineage.started_at is not None:
            self._base.started_at = self.lineage.started_at
        if self._base.started_at is None:
            self._base.started_at = self.now
        parent = self.facts.get("parent")
        if parent is not None and self._base.parent is not None:
            # Another may have become its parent since.
            self._base.parent = Parent(parent["workflow_id"], parent["run_id"])
        if self._base.name == "" and event.name:
            self._base.name = event.name
        for fact, value in self.facts.items():
            if fact in START_FACTS:
                setattr(self._base, fact, value)
            elif fact in STATE_FACTS:
                self.state[fact] = value
        try:
            args, kwargs = decode_call(event.payload, self.fn) if event.payload is not None else ([], {})
            main = self._enter(args, kwargs)
        except Exception as e:
            self._finish(self._failed(e))
            return
        self._main = self.loop.make_task(main, "main", contextvars.Context())

    def _enter(self, args: list[Any], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """The workflow's code, with its interceptors around it."""
        methods = self.interceptors.workflow
        if not methods:
            self.begun = True
            return self.fn(*args, **kwargs)

        def last(ctx: CallContext) -> Coroutine[Any, Any, Any]:
            self._inbound = ctx
            self.begun = True
            return self.fn(*ctx.args, **ctx.kwargs)

        self._inbound = CallContext(self._base.name, tuple(args), kwargs, dict(self._base.headers), self.info)
        return through(methods, self._inbound, last)

    def _on_answer(self, event: Event) -> None:
        if event.type in _COMPUTED:
            asked = self._computing.pop(cast(int, event.seq), None)
            facts = event.attributes or {}
            if asked is None or (asked.answer, asked.name, asked.hash) != (event.type, event.name, facts.get("hash")):
                got = "nothing" if asked is None else events.describe(asked.answer, asked.name)
                raise Nondeterminism(event.event_id, events.describe(event.type, event.name), got)
        pending = self._pending.pop(cast(int, event.seq), None)
        if pending is not None:
            self._timers.pop(cast(int, event.seq), None)
            pending.resolve(event)

    def _on_signal(self, event: Event) -> None:
        self.mailbox.put(event)

    def _on_update(self, event: Event) -> None:
        self.handlers.update(event)

    def _on_cancel(self, event: Event) -> None:
        self._cancel_requested = True
        if self._main is not None:
            self._main.cancel()

    def _on_reset(self, event: Event) -> None:
        """Up to here the run had the history of another: what comes is its own."""
        self.lineage.reset(str((event.attributes or {})["run_id"]))
        for name, known in self.state.items():
            if isinstance(known, random.Random):
                known.seed(self.lineage.seed(name))

    def _goes_on(self) -> bool:
        """Whether the code has ended, and another run goes on with what it was not given."""
        main = self._main
        if main is None or not main.done() or main.cancelled() or self._failure is not None:
            return False
        exc = main.exception()
        return exc is not None and ContinueAsNewRequested.within(exc) is not None

    def _has_ended(self) -> bool:
        return self._main is not None and (self._failure is not None or self._main.done())

    def _end(self) -> None:
        # Handlers that were given something begin, whatever the code has come to meanwhile: here, or in the next run.
        if self.handlers.unstarted and self.loop.ready and not self._is_followed():
            self.loop.drain(self.handlers)
        if self._failure is not None:
            self._finish(self._failed(self._failure))
        elif self._main is not None:
            self._close(self._main)

    def _close(self, main: asyncio.Task[Any]) -> None:
        closing: Command
        if main.cancelled():
            if self._cancel_requested:
                closing = CancelWorkflow()
            else:
                error = asyncio.CancelledError("the workflow's code raised CancelledError, and nobody had cancelled it")
                closing = self._failed(error)
        else:
            exc = main.exception()
            if exc is None:
                try:
                    payload = encode(main.result(), f"the result of {self._base.name!r}")
                    closing = CompleteWorkflow(payload=payload)
                except (NotEncodable, PayloadTooLarge) as e:
                    closing = self._failed(e)
            elif (again := ContinueAsNewRequested.within(exc)) is not None:
                again.unread = self.unread()
                again.facts = {k: v for k, v in {**self.handed_on(), **again.facts}.items() if v is not None}
                closing = again
            elif isinstance(exc, Exception):
                closing = self._failed(exc)
            else:
                raise exc
        self._finish(closing)

    def _failed(self, exc: BaseException) -> FailWorkflow:
        """How the run ends by an exception; with a policy for retries, whether and when another attempt follows."""
        policy = self.facts.get("retry")
        if policy is None:
            return FailWorkflow(failure=failure_to_json(exc))
        return FailWorkflow(
            failure=failure_to_json(exc, retryable=self._is_retried(policy, exc)),
            unread=self.unread(),
            retry_delay_ms=asked_delay(exc),
        )

    def _is_retried(self, policy: dict[str, Any], exc: BaseException) -> bool:
        if self._cancel_requested or forbids(policy, exc):
            return False
        # What failed elsewhere goes by the name of the exception that was raised there.
        return not (isinstance(exc, Failure) and exc.type in (policy.get("non_retryable") or ()))

    def _is_followed(self) -> bool:
        """Whether the code has ended, and another run goes on with what it has not read, as far as is known here."""
        policy, main = self.facts.get("retry"), self._main
        exc: BaseException | None = self._failure
        if exc is None and main is not None and main.done() and not main.cancelled():
            exc = main.exception()
        if policy is None or not isinstance(exc, Exception):
            return self._goes_on()
        return self._is_retried(policy, exc) and not is_last(policy, self._base.attempt)

    def unread(self) -> list[int]:
        """The signals that no code has read, and the updates whose handlers have not begun, by their events."""
        return sorted([*self.mailbox.unread(), *self.handlers.unstarted])

    def _finish(self, closing: Command) -> None:
        self._out[0] = closing
        self.closed = True
        self.handlers.end()
        if not self._keep:
            self._tear_down()

    def _tear_down(self) -> None:
        loop = self.loop
        loop.evicting = True
        # Whatever cleanup asks for: nothing of it leaves.
        out = dict(self._out)
        for task in reversed(loop.pending_tasks()):
            _close_coroutine(task.get_coro())
        self._out = out
        loop.drop()
        self._main = None
        self._pending.clear()
        self._timers.clear()
        self._computing.clear()
        self._to_compute.clear()
        self.mailbox.clear()
        self.handlers.clear()
        self._conditions.clear()
        self.state.clear()


_HANDLERS: dict[str, Callable[[Execution, Event], None]] = {
    **dict.fromkeys(events.INPUT_TYPES, Execution._on_answer),
    events.WORKFLOW_STARTED: Execution._on_start,
    events.SIGNAL_RECEIVED: Execution._on_signal,
    events.CANCEL_REQUESTED: Execution._on_cancel,
    events.UPDATE_ACCEPTED: Execution._on_update,
    events.WORKFLOW_RESET: Execution._on_reset,
}


def _close_coroutine(coro: Any) -> None:
    for _ in range(100):
        try:
            coro.close()
        except RuntimeError as e:
            if "ignored GeneratorExit" in str(e):
                continue  # it awaits again in a `finally` block: close that, too
        except BaseException:  # its cleanup failed, and has no one to tell
            pass
        return
    # It refuses (`except BaseException: pass` around an endless loop).  Its destruction, even at the end of the
    # process, would only run its code once more, and make noise: it is never destroyed.
    pythonapi.Py_IncRef(py_object(coro))


def current() -> Execution | None:
    """Return the run whose code is running on this thread, or None outside of workflows."""
    return cast("Execution | None", current_host())


def _is_held(event: Event) -> bool:
    return event.attributes is not None and event.type == events.SIGNAL_RECEIVED and "with_next" in event.attributes
