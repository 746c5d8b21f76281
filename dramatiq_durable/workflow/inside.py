"""A run as its own code sees it: what it knows of itself, and what it asks for."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol, cast

from ..errors import ForbiddenInWorkflow, PayloadTooLarge, RunawayWorkflow
from . import events
from .attributes import search_values
from .commands import CancelTimer, Command, CommandFuture, Compute, StartTimer
from .deadlock import Overdue
from .events import Event
from .info import STATE_FACTS, SUGGESTED_BYTES, SUGGESTED_LENGTH, Info
from .interceptors import CallContext
from .lineage import Lineage
from .loop import Scope, WorkflowLoop

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

#: How much one step may ask for: one call stores it, twice (what happened, and what is sent).
MAX_STEP_BYTES = 64 * 1024 * 1024


class _Pending(Protocol):
    def resolve(self, event: Event) -> None: ...


class _Condition(NamedTuple):
    holds: Callable[[], Any]
    future: asyncio.Future[Any]
    context: contextvars.Context


class Inside:
    """What the primitives, the definitions and the handlers have of the run that calls them."""

    __slots__ = (
        "_asked_bytes",
        "_base",
        "_computing",
        "_conditions",
        "_failure",
        "_inbound",
        "_main",
        "_out",
        "_pending",
        "_seq",
        "_timers",
        "_to_compute",
        "history_bytes",
        "last_event_id",
        "lineage",
        "loop",
        "reading",
        "state",
        "tainted",
    )

    loop: WorkflowLoop

    def __init__(self, info: Info) -> None:
        self._base = info
        self._inbound: CallContext | None = None
        self.lineage = Lineage(info.run_id)
        self._main: asyncio.Task[Any] | None = None
        self._seq = 0
        self._asked_bytes = 0
        # By number; what cancels command n has ~n, the closing command 0, a patch its name.
        self._out: dict[int | str, Command] = {}
        self._computing: dict[int, Compute] = {}
        self._to_compute: list[Compute] = []
        self._pending: dict[int, _Pending] = {}
        #: When the timers among them are due.
        self._timers: dict[int, int] = {}
        self._conditions: list[_Condition] = []
        self._failure: Exception | None = None
        self.reading: str | None = None
        """What only looks at the run now, and may change nothing: a query, or an update's validator."""
        self.tainted = False
        """Something that may only look has tried to change the run."""
        self.history_bytes = 0
        self.last_event_id = 0
        self.state: dict[str, Any] = {}
        """What the primitives keep for the run, e.g. its random numbers."""

    # --- what it knows of itself --------------------------------------------------------------------------
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

    def timers_until(self, seq: int) -> list[int]:
        """The timers that are due before the one of command ``seq``, and this one, in the order in which they fire: of
        those that are due at once, the one that was started first comes first."""
        timers = self._timers
        if len(timers) < 2 or seq not in timers:
            return [seq]
        last = timers[seq]
        # There may be thousands, one message each: no tuple is made of those that stay.
        before = [(due, n) for n, due in timers.items() if due < last or (due == last and n <= seq)]
        return [n for _, n in sorted(before)]

    def _clock(self, event: Event) -> None:
        """Note when the timer is due that an event starts."""
        ms = (event.attributes or {}).get("ms")
        if ms is not None:
            self._timers[cast(int, event.seq)] = event.at + ms

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
        self._timers.pop(seq, None)
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
        self._timers.pop(seq, None)
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
            raise overdue(scope) from None

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

    def _settle(self, main: asyncio.Task[Any]) -> None:
        """Resolve the oldest condition that holds, run what that wakes, and look again, until none holds: what somebody
        waited for is still so when its code goes on."""
        loop = self.loop
        while not main.done():
            self._conditions = [condition for condition in self._conditions if not condition.future.done()]
            if not any(map(_resolve, self._conditions)) and not loop.ready:
                return
            loop.drain(main)


def overdue(scope: Scope) -> RunawayWorkflow:
    return RunawayWorkflow(scope.leave() or "a step of the workflow took too long.")


class _Closed(deque[Any]):
    """The ready queue while something only looks at the run: nothing may become ready."""

    def __init__(self, execution: Inside) -> None:
        super().__init__()
        self._execution = execution

    def append(self, handle: Any) -> None:
        raise self._execution.change_refused()


def _resolve(condition: _Condition) -> bool:
    try:
        if not condition.context.run(condition.holds):
            return False
        condition.future.set_result(None)
    except Exception as e:
        condition.future.set_exception(e)
    return True
