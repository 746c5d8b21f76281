"""What commands mean for the database: what a step sends, withdraws, starts and cancels.

A command that is not named here means nothing but its event; what that event brings about, `carry_out` in SQL says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from dramatiq import Message

from ..delivery import LIMITS, encode_message, id_of
from ..errors import ActivityCancelled, NotEncodable, NotPermitted, PayloadTooLarge
from ..operations import Advance, Child, Send
from ..telemetry import TRACE, WORKFLOW
from . import events
from .commands import (
    CancelActivity,
    CancelChild,
    CancelTimer,
    CancelWorkflow,
    Command,
    CompleteWorkflow,
    ContinueAsNew,
    FailWorkflow,
    OpenEscalation,
    RequestActivityCancel,
    ScheduleActivity,
    StartChild,
    StartTimer,
    WithdrawEscalation,
)
from .converter import loads
from .events import Event
from .failures import failure_to_json
from .replay import Execution

if TYPE_CHECKING:
    from ..broker import DurableBroker
    from ..telemetry.runs import RunTrace

#: The priority of timers: what was begun goes on before new runs are.
TASK_PRIORITY = -1

#: The number of the task that follows the beginning of a run's code: no command has it.
_BEGUN = -1

_CLOSING = {
    CompleteWorkflow: "completed",
    FailWorkflow: "failed",
    CancelWorkflow: "cancelled",
    ContinueAsNew: "continued_as_new",
}


class Carrier:
    """Turns the commands of a step into what `Advance` stores."""

    def __init__(self, broker: DurableBroker) -> None:
        self.broker = broker

    def carry_out(self, command: Command, advance: Advance, execution: Execution) -> Event | None:
        """Add what a command means to a step; answers the event that says that it cannot be carried out, if so."""
        closing = _CLOSING.get(type(command))
        if closing is not None:
            advance.close = closing
            return None
        carry = _CARRIERS.get(type(command))
        return None if carry is None else carry(self, command, advance, execution)

    def task(self, execution: Execution) -> Send:
        """A task for a run whose code has just begun: updates that waited for it are in its inbox."""
        info = execution.info
        stream_id = self.broker.stream_id(info.queue_name)
        return Send("w", stream_id, _BEGUN, info.name, TASK_PRIORITY, 0, b"")

    def carry_on(self, event: Event, news: list[Event], advance: Advance, execution: Execution) -> list[Event]:
        """A run was taken up again by a reset: what it waits for, and no news answers, is asked for again.
        Answers the events that say what cannot be carried out.

        Timers keep the times at which they were due.  Children that go on are found, not started again.
        """
        timers = (event.attributes or {}).get("timers") or {}
        advance.due = {int(seq): due for seq, due in timers.items()}
        known = {e.seq for e in news} | {s.seq for s in advance.sends} | {c.seq for c in advance.children}
        carried = [
            self.carry_out(command, advance, execution)
            for command in execution.unanswered()
            if command.seq not in known
        ]
        return [event for event in carried if event is not None]

    def _activity(self, command: ScheduleActivity, advance: Advance, execution: Execution) -> Event | None:
        swap = not any(s.eager for s in advance.sends)
        try:
            advance.sends.append(self._send_activity(command, execution, swap, advance.trace))
        except (NotEncodable, PayloadTooLarge, NotPermitted) as e:
            failure = {**failure_to_json(e, retryable=False), "attempt": 1}
            return Event(0, events.ACTIVITY_FAILED, now_ms(), command.seq, command.name, None, {"failure": failure})
        return None

    def _timer(self, command: StartTimer, advance: Advance, execution: Execution) -> None:
        assert command.seq is not None
        info = execution.info
        stream_id = self.broker.stream_id(info.queue_name)
        due = advance.due.get(command.seq)
        ms = command.ms if due is None else max(0, due - now_ms())
        advance.sends.append(Send("w", stream_id, command.seq, info.name, TASK_PRIORITY, ms, b""))

    def _escalation(self, command: OpenEscalation, advance: Advance, execution: Execution) -> None:
        if command.ms is not None:
            self._timer(StartTimer(command.seq, ms=command.ms), advance, execution)

    def _cancel_timer(self, command: Command, advance: Advance, execution: Execution) -> None:
        assert command.seq is not None
        if not self._unsend(command.seq, advance):
            advance.drops.append(command.seq)

    def _cancel_activity(self, command: CancelActivity, advance: Advance, execution: Execution) -> Event | None:
        """What was stored before is cancelled with the event (see `carry_out` in SQL)."""
        assert command.seq is not None
        if not self._unsend(command.seq, advance) or not isinstance(command, RequestActivityCancel):
            return None
        error = ActivityCancelled("it was cancelled before a worker had it")
        failure = {**failure_to_json(error, retryable=False), "attempt": 1}
        return Event(0, events.ACTIVITY_FAILED, now_ms(), command.seq, command.name, None, {"failure": failure})

    def _unsend(self, seq: int, advance: Advance) -> bool:
        """Whether it was this very step that sends it; then it is not sent."""
        for send in advance.sends:
            if send.seq == seq:
                advance.sends.remove(send)
                if send.eager and self.broker.claimer is not None:
                    self.broker.claimer.unreserve(1)
                return True
        return False

    def _child(self, command: StartChild, advance: Advance, execution: Execution) -> None:
        assert command.seq is not None
        assert command.name is not None
        assert command.payload is not None
        options = dict(command.options)
        options["delay"] = options.pop("delay_ms", 0)
        if advance.trace is not None:
            options["facts"] = {**(options.get("facts") or {}), TRACE: advance.trace.carrier}
        stream_id = self.broker.stream_id(command.queue_name)
        codecs = self.broker.codecs
        payload = codecs.encode(command.payload, f"the input of {command.name!r}")
        options = codecs.seal_facts(options) or {}
        advance.children.append(Child(command.seq, stream_id, command.name, command.workflow_id, payload, options))

    def _cancel_child(self, command: CancelChild, advance: Advance, execution: Execution) -> None:
        assert command.seq is not None
        advance.cancels.append(command.seq)

    def _send_activity(
        self, command: ScheduleActivity, execution: Execution, swap: bool, trace: RunTrace | None
    ) -> Send:
        assert command.seq is not None
        assert command.name is not None
        stream_id = self.broker.stream_id(command.queue_name)
        # The recorded arguments: the workflow's code may have changed its own objects since the call.
        call = loads(command.payload or b"{}")
        options = dict(command.options)
        if execution.workflow_id != execution.run_id:
            # Whoever runs it may not have the run: its logs say it.
            options[WORKFLOW] = execution.workflow_id
        if trace is not None:
            options.update(trace.carrier)
        key = events.command_id(execution.run_id, command.seq)
        message: Message[Any] = Message(
            command.queue_name,
            command.name,
            tuple(call["args"]),
            call["kwargs"],
            options,
            id_of(key),
            now_ms(),
        )
        priority = command.priority
        if priority is None:
            actor = self.broker.actors.get(command.name)
            priority = actor.priority if actor is not None else 0
        payload = self.broker.codecs.encode(encode_message(message, key), f"the message for {command.name!r}")
        claimer = self.broker.claimer
        # Last: a place that is taken is given back by way of the Send.
        eager = not command.delay_ms and claimer is not None and claimer.reserve(stream_id, swap=swap)
        kind: Literal["a", "l"] = "l" if LIMITS in command.options else "a"
        return Send(kind, stream_id, command.seq, command.name, priority, command.delay_ms, payload, eager)


_CARRIERS: dict[type[Command], Callable[[Carrier, Any, Advance, Execution], Event | None]] = {
    ScheduleActivity: Carrier._activity,
    CancelActivity: Carrier._cancel_activity,
    RequestActivityCancel: Carrier._cancel_activity,
    StartTimer: Carrier._timer,
    CancelTimer: Carrier._cancel_timer,
    StartChild: Carrier._child,
    CancelChild: Carrier._cancel_child,
    OpenEscalation: Carrier._escalation,
    WithdrawEscalation: Carrier._cancel_timer,
}


def now_ms() -> int:
    """The time of this machine, in milliseconds since the epoch."""
    return int(time.time() * 1000)
