"""A run: history in, commands out.

An ``Execution`` holds one run's event loop, its main task and the futures that wait for events.  It is pure: what comes
out is a function of the events that went in, so that a run can be dropped from memory at any time and made again from
its history, in another process, by feeding it the same events.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from ctypes import py_object, pythonapi
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol, cast

from ..errors import Failure, ForbiddenInWorkflow, Nondeterminism, NotEncodable, PayloadTooLarge, RunawayWorkflow
from . import events, guard
from .attributes import search_values
from .commands import (
    CancelTimer,
    CancelWorkflow,
    Command,
    CommandFuture,
    CompleteWorkflow,
    Compute,
    FailWorkflow,
    StartTimer,
)
from .commands.closing import ContinueAsNewRequested
from .compare import compare, describe
from .converter import decode_call, encode
from .deadlock import Overdue
from .events import Event
from .failures import failure_to_json
from .handlers import Handlers
from .info import START_FACTS, STATE_FACTS, SUGGESTED_BYTES, SUGGESTED_LENGTH, Info
from .interceptors import CallContext, Interceptors, through
from .lineage import Lineage
from .loop import MAX_HANDLES, Scope, WorkflowLoop, current_host
from .mailbox import Mailbox
from .patches import Patches
from .retry import asked_delay, forbids

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INPUT_TYPES = events.INPUT_TYPES
_NO_INTERCEPTORS = Interceptors()

#: How much one step may ask for: it is stored by one call, twice (what happened, and what is sent), and many fit into one.
MAX_STEP_BYTES = 64 * 1024 * 1024

_COMPUTED = (events.LOCAL_ACTIVITY_COMPLETED, events.SIDE_EFFECT_RECORDED)


class Step(NamedTuple):
    """One step, ready to be stored: the input event and one event for each command, and the commands."""

    events: list[Event]
    commands: list[Command]


class _Pending(Protocol):
    def resolve(self, event: Event) -> None: ...


class _Condition(NamedTuple):
    holds: Callable[[], Any]
    future: asyncio.Future[Any]
    context: contextvars.Context


class Execution:
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
        "_asked_bytes",
        "_base",
        "_cancel_requested",
        "_computing",
        "_conditions",
        "_failure",
        "_inbound",
        "_keep",
        "_main",
        "_out",
        "_pending",
        "_seq",
        "_to_compute",
        "closed",
        "evicted",
        "facts",
        "fn",
        "handlers",
        "history_bytes",
        "interceptors",
        "is_replaying",
        "last_event_id",
        "lineage",
        "loop",
        "mailbox",
        "patches",
        "reading",
        "state",
        "tainted",
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
        self.fn = fn
        self._keep = keep
        self.interceptors = interceptors
        self._inbound: CallContext | None = None
        self._base = info
        #: What the first event says of the run beside its input.
        self.facts: dict[str, Any] = {}
        self.lineage = Lineage(info.run_id)
        self._main: asyncio.Task[Any] | None = None
        self._seq = 0
        self._asked_bytes = 0
        # By number; what cancels command n has ~n, the closing command 0, a patch its name.
        self._out: dict[int | str, Command] = {}
        self._computing: dict[int, Compute] = {}
        self._to_compute: list[Compute] = []
        self.patches = Patches(self)
        self._pending: dict[int, _Pending] = {}
        self._conditions: list[_Condition] = []
        self._cancel_requested = False
        self._failure: Exception | None = None
        self.reading: str | None = None
        """What only looks at the run now, and may change nothing: a query, or an update's validator."""
        self.tainted = False
        """Something that may only look has tried to change the run."""
        self.closed = False
        self.evicted = False
        self.history_bytes = 0
        self.is_replaying = False
        self.last_event_id = 0
        self.loop = WorkflowLoop(self, info.run_id, max_handles, deadlock_timeout)  # type: ignore[abstract]
        self.mailbox = Mailbox(self.loop)
        self.handlers = Handlers(self)
        self.state: dict[str, Any] = {}
        """What the primitives keep for the run, e.g. its random numbers."""

    # --- events in, commands out -----------------------------------------------------------------------
    def step(self, event: Event, more: bool = False) -> Step:
        """Apply one input event and number everything.

        Parameters:
          event(Event): its ``event_id`` is ignored: it gets the next one, and the commands' events those after it.
          more(bool): something that is said to the code comes next: as ``apply``.

        Returns:
          Step: the events to store, in order, and the commands to carry out.

        Raises:
          as ``apply``.
        """
        event_id = self.last_event_id + 1
        _, type, at, seq, name, payload, attributes = event
        # What is recorded keeps to history's clock: news from other machines' clocks may lie behind it.
        event = Event(event_id, type, max(at, self.loop.now_ms), seq, name, payload, attributes)
        commands = self.apply(event, more)
        return Step([event, *self._recorded(commands)], commands)

    def close_late(self) -> Step:
        """What was to come next does not come: a run that has ended closes now, with the step before."""
        if self.closed or not self._has_ended():
            return Step([], [])
        with self.scope():
            self._end()
        commands = self._gathered()
        return Step(self._recorded(commands), commands)

    def _recorded(self, commands: list[Command]) -> list[Event]:
        now = self.loop.now_ms
        return [
            Event(event_id, c.event_type, now, c.seq, c.name, c.payload, c.attributes())
            for event_id, c in enumerate(commands, self.last_event_id + 1 - len(commands))
        ]

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
            raise _overdue(scope) from None
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

    def replay(self, history: Iterable[Event]) -> None:
        """Apply a recorded history, comparing every command with what the history says.

        Parameters:
          history: complete steps, from where this execution stands; a fresh one starts with event 1.

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
                    more = applied < len(inputs) and inputs[applied] in events.MESSAGE_TYPES
                    commands = self.apply(event, more)
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
            if compared < len(commands):
                missing = self.last_event_id + 1 if compared else self.last_event_id - len(commands) + 1
                raise Nondeterminism(missing, "no more commands", describe(commands[compared]))
        finally:
            self.is_replaying = False

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

    @property
    def info(self) -> Info:
        """A copy of what the run knows about itself, as of now."""
        base = self._base
        return dataclasses.replace(
            base,
            memo=dict(base.memo),
            search=search_values(self.search),
            headers=dict(self.headers),
            history_length=self.last_event_id,
            history_bytes=self.history_bytes,
            continue_as_new_suggested=(self.last_event_id >= SUGGESTED_LENGTH or self.history_bytes >= SUGGESTED_BYTES),
        )

    def handed_on(self) -> dict[str, Any]:
        """The state that the next run of continue-as-new begins with: facts, as JSON has them."""
        return {fact: value for fact in STATE_FACTS if (value := self.state.get(fact))}

    @property
    def search(self) -> dict[str, Any]:
        """The run's search attributes, as JSON has them."""
        search: dict[str, Any] = self.state.get("search", {})
        return search

    @property
    def headers(self) -> dict[str, Any]:
        """The run's headers, as its interceptors left them."""
        return self._base.headers if self._inbound is None else self._inbound.headers

    @property
    def now(self) -> datetime:
        """History's clock, in UTC."""
        return _EPOCH + timedelta(milliseconds=self.loop.now_ms)

    @property
    def workflow_id(self) -> str:
        return self._base.workflow_id

    @property
    def run_id(self) -> str:
        return self._base.run_id

    # --- what the primitives and definitions ask for ---------------------------------------------------
    def issue(self, command: Command) -> int:
        """Number a command and take it; its future, once made, is given to ``expect``."""
        if self.loop.evicting:
            self.loop.refuse_late()
        if self.reading is not None:
            raise self.change_refused()
        if command.payload is not None:
            self._asked_bytes += len(command.payload)
            if self._asked_bytes > MAX_STEP_BYTES:
                raise PayloadTooLarge(
                    f"{command.name!r} is one too many: what one step of a workflow asks for may have "
                    f"{MAX_STEP_BYTES:,} bytes. Await some of it before you ask for more, or store large values "
                    "elsewhere and pass their keys."
                )
        self._seq = seq = self._seq + 1
        command.seq = seq
        self._out[seq] = command
        return seq

    def note(self, key: str, command: Command) -> None:
        """Take a command that has no number: nothing answers it."""
        if self.loop.evicting:
            self.loop.refuse_late()
        if self.reading is not None:
            raise self.change_refused()
        self._out[key] = command

    def compute(self, command: Compute) -> int:
        """Number a command that is answered on the spot, outside of the code; see ``computations``."""
        if self.loop.evicting:
            self.loop.refuse_late()
        if self.reading is not None:
            raise self.change_refused()
        self._seq = seq = self._seq + 1
        command.seq = seq
        self._computing[seq] = command
        self._to_compute.append(command)
        return seq

    def computations(self) -> list[Compute]:
        """Return, once, what the code asked to have computed and history has no answer to, in the code's order."""
        asked = [command for command in self._to_compute if command.seq in self._computing]
        self._to_compute.clear()
        return asked

    def expect(self, seq: int, pending: _Pending) -> None:
        """Have the event that answers command ``seq`` given to ``pending``."""
        self._pending[seq] = pending

    def unanswered(self) -> list[Command]:
        """The commands whose outcome is still waited for, in the order in which they were asked for.  A timer of the
        loop's has no length any more."""
        return [
            getattr(pending, "command", None) or StartTimer(seq, ms=0) for seq, pending in sorted(self._pending.items())
        ]

    def expects(self, seq: int) -> bool:
        """Whether the outcome of command ``seq`` is still waited for."""
        return seq in self._pending

    def due(self, seq: int) -> str:
        """The type of the event with which a timer of command ``seq``, whose outcome is waited for, answers it."""
        pending = self._pending[seq]
        return pending.due if isinstance(pending, CommandFuture) else events.TIMER_FIRED

    def child_ids(self, seq: int) -> tuple[str, str]:
        """Return the default workflow id and the run id of the child that command ``seq`` starts."""
        return self.lineage.child_ids(self._base.workflow_id, seq)

    def is_in_main(self) -> bool:
        """Whether the workflow's own coroutine is running, not another task of it."""
        return asyncio.current_task() is self._main

    def start_timer(self, ms: int, entry: _Pending) -> int:
        seq = self.issue(StartTimer(ms=ms))
        self._pending[seq] = entry
        return seq

    def cancel_timer(self, seq: int) -> None:
        if self.reading is not None:
            raise self.change_refused()
        if self._pending.pop(seq, None) is not None and self._out.pop(seq, None) is None:
            self._out[~seq] = CancelTimer(seq)

    def withdraw(self, future: CommandFuture[Any]) -> bool:
        """Cancel a future's command by its policy.

        Returns:
          bool: whether its outcome is still to come.
        """
        if self.reading is not None:
            raise self.change_refused()
        seq = cast(int, future.command.seq)
        if future.policy == "abandon":
            self._pending.pop(seq, None)
            return False
        if self._out.pop(seq, None) is not None:  # asked for in this very step: as if it had never been
            self._pending.pop(seq, None)
            return False
        if seq not in self._pending:
            return False
        self._out[~seq] = future.cancel_command()
        if future.policy == "wait":
            return True
        del self._pending[seq]
        return False

    def add_condition(self, holds: Callable[[], Any]) -> asyncio.Future[Any]:
        """Return a future that is resolved once ``holds()`` is true; it is looked at whenever nothing else can run."""
        future: asyncio.Future[Any] = self.loop.create_future()
        self._conditions.append(_Condition(holds, future, contextvars.copy_context()))
        return future

    def fail(self, error: Exception) -> None:
        """End the run with an exception that escaped a handler; the first one counts."""
        self._failure = self._failure or error

    @contextmanager
    def scope(self) -> Iterator[None]:
        """While it is entered, the run's code may be called, for as long as a step may take.

        Raises:
          RunawayWorkflow: it does not come to an end.
        """
        self.loop.left = self.loop.max_handles
        scope = Scope(self.loop)
        try:
            with scope:
                yield
        except Overdue:
            raise _overdue(scope) from None

    @contextmanager
    def reading_only(self, what: str) -> Iterator[None]:
        """While it is entered, whatever would change the run is refused."""
        loop = self.loop
        ready, loop.ready = loop.ready, _Closed(self)
        self.reading = what
        try:
            yield
        finally:
            self.reading = None
            loop.ready = ready

    def change_refused(self) -> ForbiddenInWorkflow:
        """The error for what only looks at the run and wanted to change it."""
        self.tainted = True
        return ForbiddenInWorkflow(
            f"{self.reading} only looks at the run, and may not change it: no activities, timers, signals or tasks, "
            "nothing random, no waking of what waits. What changes the run is a signal or an update."
        )

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
            return self.fn(*args, **kwargs)

        def last(ctx: CallContext) -> Coroutine[Any, Any, Any]:
            self._inbound = ctx
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

    def _settle(self, main: asyncio.Task[Any]) -> None:
        """Resolve the oldest condition that holds, run what that wakes, and look again, until none holds: what somebody
        waited for is still so when its code goes on."""
        loop = self.loop
        while not main.done():
            self._conditions = [condition for condition in self._conditions if not condition.future.done()]
            if not any(map(_resolve, self._conditions)) and not loop.ready:
                return
            loop.drain(main)

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
        # Handlers that were given something begin, whatever the code has come to meanwhile.
        if self.handlers.unstarted and self.loop.ready:
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
                again.unread = self.mailbox.unread()
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
        ends_all = self._cancel_requested or forbids(policy, exc)
        # What failed elsewhere goes by the name of the exception that was raised there.
        ends_all = ends_all or (isinstance(exc, Failure) and exc.type in (policy.get("non_retryable") or ()))
        return FailWorkflow(
            failure=failure_to_json(exc, retryable=not ends_all),
            unread=self.mailbox.unread(),
            retry_delay_ms=asked_delay(exc),
        )

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


def _overdue(scope: Scope) -> RunawayWorkflow:
    return RunawayWorkflow(scope.leave() or "a step of the workflow took too long.")


class _Closed(deque[Any]):
    """The ready queue while something only looks at the run: nothing may become ready."""

    def __init__(self, execution: Execution) -> None:
        super().__init__()
        self._execution = execution

    def append(self, handle: Any) -> None:
        raise self._execution.change_refused()


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


def _resolve(condition: _Condition) -> bool:
    try:
        if not condition.context.run(condition.holds):
            return False
        condition.future.set_result(None)
    except Exception as e:
        condition.future.set_exception(e)
    return True


def current() -> Execution | None:
    """Return the run whose code is running on this thread, or None outside of workflows."""
    return cast("Execution | None", current_host())


def _is_held(event: Event) -> bool:
    return event.attributes is not None and event.type == events.SIGNAL_RECEIVED and "with_next" in event.attributes
