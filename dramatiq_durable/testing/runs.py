"""Runs of an environment: their history, and what their commands mean there."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import DurableError, WorkflowAlreadyStarted
from ..workflow import events
from ..workflow.commands import (
    CancelActivity,
    CancelChild,
    CancelTimer,
    CancelWorkflow,
    Command,
    CompleteWorkflow,
    FailWorkflow,
    RequestActivityCancel,
    ScheduleActivity,
    StartChild,
    StartTimer,
)
from ..workflow.computing import computed
from ..workflow.converter import decode_call, encode, encode_call, loads
from ..workflow.events import Event
from ..workflow.failures import failure_to_json
from ..workflow.info import Info, Parent
from ..workflow.options import WorkflowOptions
from ..workflow.replay import Execution
from .activities import ScheduledActivity
from .replayer import replay
from .turns import Turns

if TYPE_CHECKING:
    from ..workflow.definition import Workflow
    from .environment import Entry, Environment

#: What a run's end means for its parent.
_ENDS = {
    "completed": events.CHILD_COMPLETED,
    "failed": events.CHILD_FAILED,
    "cancelled": events.CHILD_CANCELLED,
    "terminated": events.CHILD_TERMINATED,
    "timed_out": events.CHILD_TIMED_OUT,
}

_CLOSING = {CompleteWorkflow: "completed", FailWorkflow: "failed", CancelWorkflow: "cancelled"}


class Run:
    """One run.

    Attributes:
      history(list[Event]): what was recorded.
      status(str): as `WorkflowHandle.status` says it.
      early(list[Event]): what came before its first step.
      activities, timers, children: what it waits for, by the number of the command.
    """

    def __init__(
        self,
        environment: Environment,
        workflow: Workflow[Any, Any],
        workflow_id: str,
        run_id: str,
        options: WorkflowOptions,
        parent: tuple[Run, int] | None = None,
    ) -> None:
        self.environment = environment
        self.workflow = workflow
        self.workflow_id = workflow_id
        self.run_id = run_id
        self.options = options
        self.parent = parent
        self.status = "running"
        self.started_at = environment.now()
        self.closed_at: datetime | None = None
        self.history: list[Event] = []
        self.early: list[Event] = []
        self.keys: set[str] = set()
        self.activities: dict[int, ScheduledActivity] = {}
        self.timers: dict[int, Entry] = {}
        self.children: dict[int, Run] = {}
        self.mocks: dict[int, Turns] = {}
        self.execution = self.fresh()

    def fresh(self) -> Execution:
        """A new execution of this run, which knows nothing of its history."""
        return Execution(self.workflow.fn, self.info())

    def info(self) -> Info:
        """What the run is told of itself at its beginning."""
        parent = None if self.parent is None else Parent(self.parent[0].workflow_id, self.parent[0].run_id)
        name, queue_name = self.workflow.name, self.workflow.queue_name
        return Info(self.workflow_id, self.run_id, name, queue_name, started_at=self.started_at, parent=parent)

    def begin(self, payload: bytes) -> None:
        """Have it take its first step, now or after its delay."""
        facts = self.options.facts()
        attributes = None if facts is None else json.loads(facts)
        event = Event(0, events.WORKFLOW_STARTED, 0, None, self.workflow.name, payload, attributes)
        self.environment.at(self.environment.now_ms + self.options.delay_ms, lambda: self.take(event))

    def take(self, event: Event) -> None:
        """Give the run an event, and do what comes of it."""
        if self.status != "running":
            return
        execution = self.execution
        if not self.history and event.type != events.WORKFLOW_STARTED:
            self.early.append(event)
            return
        news = [event]
        if not self.history:
            news += self.early
        for each in news:
            step = execution.step(each._replace(at=self.environment.now_ms))
            self.history += step.events
            for command in step.commands:
                self.carry_out(command)
            if execution.closed:
                break
            news += [computed(asked)._replace(at=self.environment.now_ms) for asked in execution.computations()]

    def carry_out(self, command: Command) -> None:
        """Do what a command means."""
        closing = _CLOSING.get(type(command))
        if closing is not None:
            self.close(closing)
            return
        carry = _CARRIERS.get(type(command))
        if carry is not None:
            carry(self, command)

    def end(self, status: str, type: str, reason: str | None) -> None:
        """Close the run from outside, without a word to its code."""
        last = self.history[-1] if self.history else None
        event_id = last.event_id + 1 if last is not None else 1
        facts = {"reason": reason}
        self.history.append(Event(event_id, type, self.environment.now_ms, None, None, None, facts))
        self.execution.evict()
        self.close(status)

    def close(self, status: str) -> None:
        """The run has ended: so does what it waits for, and whoever waits for it is told."""
        self.status = status
        self.closed_at = self.environment.now()
        for timer in self.timers.values():
            timer.dropped = True
        for activity in list(self.activities.values()):
            activity.cancel()
        for child in self.children.values():
            if child.status == "running":
                if child.options.parent_close == "terminate":
                    child.end("terminated", "WorkflowTerminated", "its parent closed")
                elif child.options.parent_close == "cancel":
                    self.environment.post(child, Event(0, events.CANCEL_REQUESTED, 0))
        if self.parent is not None:
            run, seq = self.parent
            last = self.history[-1]
            self.environment.post(
                run, Event(0, _ENDS[status], 0, seq, self.workflow.name, last.payload, last.attributes)
            )
        if status in _CLOSING.values():
            self.environment.closed(self)

    def replayed(self) -> None:
        """Replay the history from its beginning.

        Raises:
          Nondeterminism: the code does not do what it did.
        """
        replay(self.workflow, self.info(), self.history)

    # --- what commands mean -------------------------------------------------------------------------------

    def _activity(self, command: ScheduleActivity) -> None:
        assert command.seq is not None
        self.activities[command.seq] = ScheduledActivity(self.environment, self, command)

    def _cancel_activity(self, command: CancelActivity) -> None:
        assert command.seq is not None
        activity = self.activities.get(command.seq)
        if activity is not None:
            activity.cancel()

    def _timer(self, command: StartTimer) -> None:
        seq = command.seq
        assert seq is not None

        def fire() -> None:
            del self.timers[seq]
            self.take(Event(0, events.TIMER_FIRED, 0, seq))

        self.timers[seq] = self.environment.at(self.environment.now_ms + command.ms, fire)

    def _cancel_timer(self, command: CancelTimer) -> None:
        assert command.seq is not None
        timer = self.timers.pop(command.seq, None)
        if timer is not None:
            timer.dropped = True

    def _child(self, command: StartChild) -> None:
        assert command.seq is not None
        assert command.name is not None
        environment, seq, name = self.environment, command.seq, command.name
        payload = command.payload or encode_call((), {})
        workflow = environment.workflow_named(name, self.workflow.broker)
        mock = environment.mocked(name)
        if mock is not None:
            self._mocked_child(command, mock, workflow, payload)
            return
        if workflow is None:
            raise DurableError(
                f"the workflow {self.workflow.name!r} starts the workflow {name!r}, and its code is not here: "
                f"mock it, Environment(mocks={{{name!r}: function}})."
            )
        options = options_of(command)
        try:
            existing = environment.place(workflow, options)
        except WorkflowAlreadyStarted:
            environment.post(self, Event(0, events.CHILD_START_FAILED, 0, seq, name))
            return
        if existing is not None:
            self.children[seq] = existing
            return
        child = Run(environment, workflow, command.workflow_id, command.run_id, options, (self, seq))
        self.children[seq] = child
        environment.add(child)
        child.begin(payload)

    def _mocked_child(
        self, command: StartChild, mock: Callable[..., Any], workflow: Workflow[Any, Any] | None, payload: bytes
    ) -> None:
        environment, seq = self.environment, command.seq
        assert seq is not None
        args, kwargs = decode_call(payload, mock if workflow is None else workflow.fn)
        environment.calls.append((command.name or "", tuple(args), kwargs))
        turns = self.mocks[seq] = Turns(lambda: environment.now_ms, lambda: mock(*args, **kwargs))

        def take_turn() -> None:
            if seq not in self.mocks:
                return
            turns.take()
            if not turns.ended:
                environment.at(turns.wakes_at, take_turn)
                return
            del self.mocks[seq]
            type, value, facts = events.CHILD_COMPLETED, None, None
            if turns.error is None:
                value = encode(turns.value, f"the result of {command.name!r}")
            elif isinstance(turns.error, Exception):
                type, facts = events.CHILD_FAILED, {"failure": failure_to_json(turns.error)}
            else:
                raise turns.error
            environment.post(self, Event(0, type, 0, seq, command.name, value, facts))

        environment.at(environment.now_ms + command.options.get("delay_ms", 0), take_turn)

    def _cancel_child(self, command: CancelChild) -> None:
        assert command.seq is not None
        child = self.children.get(command.seq)
        if child is not None:
            self.environment.post(child, Event(0, events.CANCEL_REQUESTED, 0))
        elif self.mocks.pop(command.seq, None) is not None:
            self.environment.post(self, Event(0, events.CHILD_CANCELLED, 0, command.seq, command.name))

    # --- for people ---------------------------------------------------------------------------------------

    def waits_for(self) -> str:
        """What the run waits for, in words."""
        found = [f"the activity {a.name!r}" for a in self.activities.values()]
        found += [f"the child {c.workflow_id!r}" for c in self.children.values() if c.status == "running"]
        found += [f"{len(self.timers)} timers"] if self.timers else []
        return ", ".join(found) or "a signal or a condition"


_CARRIERS: dict[type[Command], Callable[[Run, Any], None]] = {
    ScheduleActivity: Run._activity,
    CancelActivity: Run._cancel_activity,
    RequestActivityCancel: Run._cancel_activity,
    StartTimer: Run._timer,
    CancelTimer: Run._cancel_timer,
    StartChild: Run._child,
    CancelChild: Run._cancel_child,
}


def options_of(command: StartChild) -> WorkflowOptions:
    """The options that a child's start command carries."""
    given = dict(command.options)
    given["delay"] = given.pop("delay_ms", 0)
    given.update(given.pop("facts", {}))
    return WorkflowOptions().updated(command.name or "", {**given, "workflow_id": command.workflow_id})


def time_of(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def value_of(payload: bytes | None) -> Any:
    return None if payload is None else loads(payload)
