"""Runs of an environment: their history, and what their commands mean there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import DurableError, WorkflowAlreadyStarted
from ..workflow import events
from ..workflow.commands import (
    AwaitChildStart,
    CancelActivity,
    CancelChild,
    CancelTimer,
    CancelWorkflow,
    Command,
    CompleteWorkflow,
    ContinueAsNew,
    EmitTopic,
    FailWorkflow,
    OpenEscalation,
    RequestActivityCancel,
    ScheduleActivity,
    SendCancel,
    SendSignal,
    StartChild,
    StartTimer,
    WithdrawEscalation,
)
from ..workflow.computing import computed
from ..workflow.converter import encode_call
from ..workflow.events import Event
from ..workflow.info import Info, Parent
from ..workflow.ordering import in_order
from ..workflow.replay import Execution, Step
from ..workflow.retry import delay_after, is_last
from .activities import ScheduledActivity
from .children import start_mocked
from .local import LocalCall
from .replayer import interceptors_of, replay

if TYPE_CHECKING:
    from ..workflow.definition import Workflow
    from .asking import Update
    from .environment import Entry, Environment
    from .turns import Turns

#: What a run's end means for its parent.
_ENDS = {
    "completed": events.CHILD_COMPLETED,
    "failed": events.CHILD_FAILED,
    "cancelled": events.CHILD_CANCELLED,
    "terminated": events.CHILD_TERMINATED,
    "timed_out": events.CHILD_TIMED_OUT,
}

_CLOSING = {
    CompleteWorkflow: "completed",
    FailWorkflow: "failed",
    CancelWorkflow: "cancelled",
    ContinueAsNew: "continued_as_new",
}

#: What a run that goes on for another gets, if that one was not given it any more.
_HANDED_ON = (events.SIGNAL_RECEIVED, events.CANCEL_REQUESTED, events.UPDATE_REQUESTED)

#: What an event says of an update.
_UPDATES = {
    events.UPDATE_ACCEPTED: "accepted",
    events.UPDATE_COMPLETED: "completed",
    events.UPDATE_REJECTED: "rejected",
}


class Run:
    """One run.

    Attributes:
      facts(dict): what it was started with beside its input.
      parent(Run | None): whose child it is; ``parent_close(str)``.
      told(list): which runs wait for its end, by which command.
      history(list[Event]): what was recorded.
      status(str): as `WorkflowHandle.status` says it.
      next(Run | None): the run that goes on where this one ended.
      updates(dict): what it, and the runs that it goes on for, were asked for, by their ids.
      begun(bool): it has taken its first step; ``stepping(bool)``: its code is running.
      activities, timers, children, computing: what it waits for, by the number of the command.
    """

    def __init__(
        self,
        environment: Environment,
        workflow: Workflow[Any, Any],
        workflow_id: str,
        run_id: str,
        payload: bytes,
        facts: dict[str, Any],
        *,
        parent: Run | None = None,
        parent_close: str = "terminate",
        told: list[tuple[Run, int]] | None = None,
        delay_ms: int = 0,
        deadline: int | None = None,
        early: list[Event] | None = None,
        updates: dict[str, Update] | None = None,
    ) -> None:
        self.environment = environment
        self.workflow = workflow
        self.workflow_id = workflow_id
        self.run_id = run_id
        self.facts = facts
        self.parent = parent
        self.parent_close = parent_close
        self.told = told if told is not None else []
        self.status = "running"
        self.started_at = environment.now()
        self.closed_at: datetime | None = None
        self.next: Run | None = None
        self.keys: set[str] = set()
        self.updates: dict[str, Update] = {} if updates is None else updates
        self.stepping = False
        self.activities: dict[int, ScheduledActivity] = {}
        self.timers: dict[int, Entry] = {}
        self.children: dict[int, Run] = {}
        self.mocks: dict[int, Turns] = {}
        self.computing: dict[int, LocalCall] = {}
        self.execution = self.fresh()
        begins = environment.now_ms + delay_ms
        self.history = [Event(1, events.WORKFLOW_STARTED, begins, None, workflow.name, payload, facts or None)]
        self._early: list[Event] = early or []
        self._unseen: list[Event] = self._early
        #: Updates that wait for the code to begin, as its interceptors let it.
        self._held: list[Event] = []
        self.begun = False
        self._begin_at = environment.at(begins, self._begin)
        if facts.get("execution_timeout") and deadline is None:
            deadline = begins + facts["execution_timeout"]
        self.deadline = deadline
        limits = [] if facts.get("run_timeout") is None else [begins + facts["run_timeout"]]
        limits += [] if deadline is None else [deadline]
        self._limit = environment.at(min(limits), self._expire) if limits else None
        environment.add(self)

    def fresh(self, keep: bool = False) -> Execution:
        """A new execution of this run, which knows nothing of its history."""
        interceptors = self.environment.interceptors or interceptors_of(self.workflow)
        return Execution(self.workflow.fn, self.info(), interceptors=interceptors, keep=keep)

    def info(self) -> Info:
        """What the run is told of itself at its beginning."""
        parent = None if self.parent is None else Parent(self.parent.workflow_id, self.parent.run_id)
        name, queue_name = self.workflow.name, self.workflow.queue_name
        return Info(self.workflow_id, self.run_id, name, queue_name, started_at=self.started_at, parent=parent)

    def take(self, event: Event) -> None:
        """Give the run an event, and do what comes of it; the run that goes on for it, where it has ended."""
        if self.status != "running":
            if self.next is not None and event.type in _HANDED_ON:
                self.next.take(event)
        elif self.begun:
            self._step([event])
        else:
            self._early.append(event)
            if event.type == events.CANCEL_REQUESTED:
                self._begin()

    def _begin(self) -> None:
        """Take the first step."""
        if self.status != "running" or self.begun:
            return
        self.begun = True
        self._begin_at.dropped = True
        self._step([event for _, event in in_order([(0, self.history[0]), *((0, event) for event in self._early)])])

    def _step(self, news: list[Event]) -> None:
        execution = self.execution
        while news:
            event = news.pop(0)._replace(at=self.environment.now_ms)
            more = bool(self._held) or (bool(news) and news[0].type in events.MESSAGE_TYPES)
            first = event.type == events.WORKFLOW_STARTED
            self.stepping = True
            try:
                if event.type != events.UPDATE_REQUESTED:
                    step = execution.step(event, more)
                elif execution.begun:
                    step = self._admit(event, more)
                else:
                    self._held.append(event)
                    step = Step([], [])
                if self._held and execution.begun:
                    news += self._held
                    self._held = []
                elif self._held:
                    late = execution.close_late()
                    step = Step(step.events + late.events, step.commands + late.commands)
            finally:
                self.stepping = False
            self.history[len(self.history) - first :] = map(self._stored, step.events)
            for made in step.events:
                self._note(made)
            for command in step.commands:
                self._unseen = news + self._held
                self.carry_out(command)
            if execution.closed:
                return
            for asked in execution.computations():
                if not asked.slow:
                    news.append(computed(asked))
                elif asked.seq not in self.computing:
                    self.computing[asked.seq or 0] = LocalCall(self, asked)
        self.environment.stepped(self)

    def _admit(self, event: Event, more: bool) -> Step:
        """Give the code an update, or reject it: then there is no event."""
        failure = self.execution.handlers.refusal(event)
        if failure is None:
            return self.execution.step(event._replace(type=events.UPDATE_ACCEPTED), more)
        self._note(
            event._replace(type=events.UPDATE_REJECTED, attributes={**(event.attributes or {}), "failure": failure})
        )
        return Step([], []) if more else self.execution.close_late()

    def _note(self, event: Event) -> None:
        """Say of an update what an event says of it."""
        status = _UPDATES.get(event.type)
        if status is not None:
            facts = event.attributes or {}
            update = self.updates[facts["update_id"]]
            update.status = status
            if status != "accepted":
                update.payload = event.payload if status == "completed" else None
                update.failure = facts.get("failure")

    def _stored(self, event: Event) -> Event:
        """An event, as it is when it was stored and read again."""
        codecs = self.environment.codecs or getattr(self.workflow.broker, "codecs", None)
        return codecs.open(codecs.seal(event)) if codecs else event

    def reload(self) -> None:
        """Drop the run from memory, and make it again from its history, as another worker would.

        Raises:
          Nondeterminism: the code does not do what it did.
        """
        execution = self.fresh()
        execution.replay(self.history)
        self.execution.evict()
        self.execution = execution

    def carry_out(self, command: Command) -> None:
        """Do what a command means."""
        closing = _CLOSING.get(type(command))
        if closing is not None:
            self.close(closing)
            return
        carry = _CARRIERS.get(type(command))
        if carry is not None:
            carry(self, command)

    def end(self, status: str, type: str, reason: str | None, **facts: Any) -> None:
        """Close the run from outside, without a word to its code."""
        event_id, facts = self.history[-1].event_id + 1, {"reason": reason, **facts}
        self.history.append(Event(event_id, type, self.environment.now_ms, None, None, None, facts))
        self.execution.evict()
        self.close(status)

    def _expire(self) -> None:
        if self.status == "running":
            whole = self.deadline is not None and self.environment.now_ms >= self.deadline
            reason, unread = "execution_timeout" if whole else "run_timeout", self.execution.unread()
            self.end("timed_out", "WorkflowTimedOut", reason, **({"unread": unread} if unread else {}))

    def close(self, status: str) -> None:
        """The run has ended: so does what it waits for; another goes on for it, or whoever waits for it is told."""
        environment = self.environment
        self.status = status
        self.closed_at = environment.now()
        for entry in (*self.timers.values(), self._begin_at, self._limit):
            if entry is not None:
                entry.dropped = True
        for activity in list(self.activities.values()):
            activity.drop()
        for child in self.children.values():
            child = child.latest()
            if child.status == "running" and child.parent is self:
                if child.parent_close == "terminate":
                    child.end("terminated", "WorkflowTerminated", "its parent closed")
                elif child.parent_close == "cancel":
                    environment.post(child, Event(0, events.CANCEL_REQUESTED, 0))
        environment.escalations.withdraw(self)
        last = self.history[-1]
        self._go_on(last)
        if self.next is None:
            for run, seq in self.told:
                event = Event(0, _ENDS[status], 0, seq, self.workflow.name, last.payload, last.attributes)
                environment.post(run, event)
        if self.execution.closed:
            environment.closed(self)

    def latest(self) -> Run:
        """This run, or the last of those that went on for it."""
        run = self
        while run.next is not None:
            run = run.next
        return run

    def _go_on(self, last: Event) -> None:
        """Start the run that goes on where this one ended, if one does."""
        closing = last.attributes or {}
        if self.status == "continued_as_new":
            facts, payload, delay = closing["facts"], last.payload, closing.get("delay_ms", 0)
        else:
            again = self._next_attempt(closing)
            if again is None:
                return
            facts, delay = again
            payload = self.history[0].payload
        facts = {**facts, "previous": self.run_id}
        unread = [self._unread(self.history[event_id - 1]) for event_id in closing.get("unread", ())]
        never_given = [e for e in self._unseen if e.type in _HANDED_ON]
        self.next = Run(
            self.environment,
            self.workflow,
            self.workflow_id,
            self.environment.new_id(),
            payload or encode_call((), {}),
            facts,
            parent=self.parent,
            parent_close=self.parent_close,
            told=self.told,
            delay_ms=delay,
            deadline=self.deadline,
            early=[event._replace(seq=None) for event in (*unread, *never_given)],
            updates=self.updates,
        )
        for update in self.updates.values():
            if update.run is self and update.status == "requested":
                update.run = self.next

    def _unread(self, event: Event) -> Event:
        """What no code has read, as the next run is given it."""
        if event.type != events.UPDATE_ACCEPTED:
            return event
        self.updates[(event.attributes or {})["update_id"]].status = "requested"
        return event._replace(type=events.UPDATE_REQUESTED)

    def _next_attempt(self, closing: dict[str, Any]) -> tuple[dict[str, Any], int] | None:
        """The facts of the attempt that follows, and in how many milliseconds."""
        policy = self.facts.get("retry")
        attempt = self.facts.get("attempt", 1)
        if policy is None or is_last(policy, attempt):
            return None
        if self.status == "timed_out":
            cancelled = any(event.type == events.CANCEL_REQUESTED for event in self.history)
            if closing["reason"] != "run_timeout" or cancelled:
                return None
        elif self.status != "failed" or not closing["failure"]["retryable"]:
            return None
        asked = closing.get("retry_delay_ms")
        delay = delay_after(policy, attempt) if asked is None else asked
        if self.deadline is not None and self.environment.now_ms + delay >= self.deadline:
            return None
        # Whoever follows the output goes on with the next attempt's.
        outputs = self.facts.get("outputs", 0) + sum(e.type == events.OUTPUT_WRITTEN for e in self.history)
        return {**self.facts, "attempt": attempt + 1, "outputs": outputs}, delay

    def replayed(self) -> None:
        """Replay the history from its beginning.

        Raises:
          Nondeterminism: the code does not do what it did.
        """
        replay(self.workflow, self.info(), self.history, self.environment.interceptors)

    # --- what commands mean -------------------------------------------------------------------------------

    def _activity(self, command: ScheduleActivity) -> None:
        assert command.seq is not None
        self.activities[command.seq] = ScheduledActivity(self.environment, self, command)

    def _cancel_activity(self, command: CancelActivity) -> None:
        assert command.seq is not None
        activity = self.activities.get(command.seq)
        if activity is not None:
            activity.cancel()

    def _escalate(self, command: OpenEscalation) -> None:
        self.environment.escalations.open(self, command)

    def _withdraw(self, command: WithdrawEscalation) -> None:
        self.environment.escalations.withdraw(self, command.seq)

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
            start_mocked(self, command, mock, workflow, payload)
            return
        if workflow is None:
            raise DurableError(
                f"the workflow {self.workflow.name!r} starts the workflow {name!r}, and its code is not here: "
                f"mock it, Environment(mocks={{{name!r}: function}})."
            )
        options = command.options
        try:
            existing = environment.place(
                command.workflow_id, options.get("id_conflict", "fail"), options.get("id_reuse", "allow")
            )
        except WorkflowAlreadyStarted:
            environment.post(self, Event(0, events.CHILD_START_FAILED, 0, seq, name))
            return
        if existing is not None:
            existing.told.append((self, seq))
            self.children[seq] = existing
            return
        self.children[seq] = Run(
            environment,
            workflow,
            command.workflow_id,
            command.run_id,
            payload,
            options.get("facts", {}),
            parent=self,
            parent_close=options.get("parent_close", "terminate"),
            told=[(self, seq)],
            delay_ms=options.get("delay_ms", 0),
        )

    def _await_child(self, command: AwaitChildStart) -> None:
        child = self.children.get(command.child)
        if child is not None or command.child in self.mocks:
            facts = {"child": command.child} if child is None else {"child": command.child, "run_id": child.run_id}
            self.environment.post(self, Event(0, events.CHILD_START_CONFIRMED, 0, command.seq, None, None, facts))

    def _cancel_child(self, command: CancelChild) -> None:
        assert command.seq is not None
        child = self.children.get(command.seq)
        if child is not None:
            self.environment.post(child.latest(), Event(0, events.CANCEL_REQUESTED, 0))
        elif self.mocks.pop(command.seq, None) is not None:
            self.environment.post(self, Event(0, events.CHILD_CANCELLED, 0, command.seq, command.name))

    def _emit(self, command: EmitTopic) -> None:
        self.environment.subscribers.emit(self, command)

    def _send(self, command: SendSignal) -> None:
        """Say something to another run: the live one that has the id, or a child of this one."""
        environment = self.environment
        if command.child in self.mocks:
            self._sent(command, None)  # what is mocked takes everything
            return
        child = None if command.child is None else self.children.get(command.child)
        found = environment.find(command.workflow_id, None) if command.child is None else child
        target = None if found is None else found.latest()
        if target is None:
            self._sent(command, "missing")
        elif target.status != "running":
            self._sent(command, "closed")
        else:
            type = events.CANCEL_REQUESTED if isinstance(command, SendCancel) else events.SIGNAL_RECEIVED
            environment.post(target, Event(0, type, 0, None, command.name, command.payload))
            self._sent(command, None)

    def _sent(self, command: SendSignal, reason: str | None) -> None:
        type = events.MESSAGE_DELIVERED if reason is None else events.MESSAGE_FAILED
        facts = None if reason is None else {"reason": reason}
        self.environment.post(self, Event(0, type, 0, command.seq, command.name, None, facts))

    # --- for people ---------------------------------------------------------------------------------------

    def waits_for(self) -> str:
        """What the run waits for, in words."""
        found = [f"the activity {a.name!r}" for a in self.activities.values()]
        found += [f"the child {c.workflow_id!r}" for c in self.children.values() if c.latest().status == "running"]
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
    AwaitChildStart: Run._await_child,
    OpenEscalation: Run._escalate,
    WithdrawEscalation: Run._withdraw,
    EmitTopic: Run._emit,
    SendSignal: Run._send,
    SendCancel: Run._send,
}
