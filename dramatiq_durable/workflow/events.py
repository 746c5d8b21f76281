"""What history records: one flat, immutable type for every event, and the names of the kinds.

A history is a sequence of steps.  A step is one *input* event (something that happened to the run) and
the *command* events that the workflow's code asked for because of it, in the order in which it asked.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, NamedTuple

# --- inputs: what happened to the run --------------------------------------------------------------
WORKFLOW_STARTED: Final = "WorkflowStarted"
ACTIVITY_COMPLETED: Final = "ActivityCompleted"
ACTIVITY_FAILED: Final = "ActivityFailed"
# An activity that the code had cancelled, and waited for, ended cancelled; those outside read that it was cancelled.
ACTIVITY_CANCEL_CONFIRMED: Final = "ActivityCancelConfirmed"
TIMER_FIRED: Final = "TimerFired"
SIGNAL_RECEIVED: Final = "SignalReceived"
CHILD_COMPLETED: Final = "ChildCompleted"
CHILD_FAILED: Final = "ChildFailed"
CHILD_CANCELLED: Final = "ChildCancelled"
CHILD_TERMINATED: Final = "ChildTerminated"
CHILD_TIMED_OUT: Final = "ChildTimedOut"
CHILD_START_FAILED: Final = "ChildStartFailed"
ACTIVITY_TIMED_OUT: Final = "ActivityTimedOut"
LOCAL_ACTIVITY_COMPLETED: Final = "LocalActivityCompleted"
SIDE_EFFECT_RECORDED: Final = "SideEffectRecorded"
ESCALATION_RESOLVED: Final = "EscalationResolved"
ESCALATION_CANCELLED: Final = "EscalationCancelled"
ESCALATION_TIMED_OUT: Final = "EscalationTimedOut"
CHILD_START_CONFIRMED: Final = "ChildStartConfirmed"
WORKFLOW_RESET: Final = "WorkflowReset"
CANCEL_REQUESTED: Final = "CancelRequested"
UPDATE_ACCEPTED: Final = "UpdateAccepted"
MESSAGE_DELIVERED: Final = "MessageDelivered"
MESSAGE_FAILED: Final = "MessageFailed"

# --- commands: what the workflow's code asked for -----------------------------------------------------
ACTIVITY_SCHEDULED: Final = "ActivityScheduled"
ACTIVITY_CANCELLED: Final = "ActivityCancelled"
ACTIVITY_CANCEL_REQUESTED: Final = "ActivityCancelRequested"
TIMER_STARTED: Final = "TimerStarted"
TIMER_CANCELLED: Final = "TimerCancelled"
CHILD_STARTED: Final = "ChildStarted"
CHILD_START_AWAITED: Final = "ChildStartAwaited"
CHILD_CANCEL_REQUESTED: Final = "ChildCancelRequested"
ESCALATION_OPENED: Final = "EscalationOpened"
# The code took it back; those outside read that it was cancelled.
ESCALATION_WITHDRAWN: Final = "EscalationWithdrawn"
PATCH_RECORDED: Final = "PatchRecorded"
UPDATE_COMPLETED: Final = "UpdateCompleted"
SIGNAL_SENT: Final = "SignalSent"
CANCEL_SENT: Final = "CancelSent"
SEARCH_UPSERTED: Final = "SearchUpserted"
ENTITY_CHANGED: Final = "EntityChanged"
TOPIC_EMITTED: Final = "TopicEmitted"
OUTPUT_WRITTEN: Final = "OutputWritten"
WORKFLOW_COMPLETED: Final = "WorkflowCompleted"
WORKFLOW_FAILED: Final = "WorkflowFailed"
WORKFLOW_CANCELLED: Final = "WorkflowCancelled"
WORKFLOW_CONTINUED_AS_NEW: Final = "WorkflowContinuedAsNew"

# --- never recorded -------------------------------------------------------------------------------------
UPDATE_REQUESTED: Final = "UpdateRequested"
"""An update that waits in the inbox: the code accepts it, which is an event, or rejects it."""
UPDATE_REJECTED: Final = "UpdateRejected"
"""What a step says of an update that it took out of the inbox and rejected; its number is 0."""

INPUT_TYPES: Final = frozenset(
    {
        WORKFLOW_STARTED,
        ACTIVITY_COMPLETED,
        ACTIVITY_FAILED,
        ACTIVITY_CANCEL_CONFIRMED,
        TIMER_FIRED,
        SIGNAL_RECEIVED,
        CHILD_COMPLETED,
        CHILD_FAILED,
        CHILD_CANCELLED,
        CHILD_TERMINATED,
        CHILD_TIMED_OUT,
        CHILD_START_FAILED,
        ACTIVITY_TIMED_OUT,
        LOCAL_ACTIVITY_COMPLETED,
        SIDE_EFFECT_RECORDED,
        ESCALATION_RESOLVED,
        ESCALATION_CANCELLED,
        ESCALATION_TIMED_OUT,
        CHILD_START_CONFIRMED,
        WORKFLOW_RESET,
        CANCEL_REQUESTED,
        UPDATE_ACCEPTED,
        MESSAGE_DELIVERED,
        MESSAGE_FAILED,
    }
)
"""Events that are applied to a run."""

MESSAGE_TYPES: Final = frozenset({SIGNAL_RECEIVED, UPDATE_ACCEPTED, UPDATE_REQUESTED})
"""What is said to a run's code: no run closes over one that its code was not given."""

PRECEDES_END: Final = MESSAGE_TYPES | {WORKFLOW_RESET}
"""What code that has come to its end is given all the same, before the run closes: a reset may bring messages again."""

ESCALATION_ANSWERS: Final = frozenset({ESCALATION_RESOLVED, ESCALATION_CANCELLED})
"""What was said from outside to an escalation."""
TIMER_STARTS: Final = frozenset({TIMER_STARTED, ESCALATION_OPENED})
"""With their ``ms``, they start a timer."""

TIMER_ENDS: Final = frozenset({TIMER_FIRED, ESCALATION_TIMED_OUT})
"""What a timer that is due means to the run."""

RESETTABLE_TYPES: Final = INPUT_TYPES - {WORKFLOW_RESET}
"""Events with which a step begins that can be taken again."""


class Event(NamedTuple):
    """One event of a run's history.  A tuple, because a busy worker makes tens of thousands a second.

    Attributes:
      event_id(int): position in the run's history, counted from 1.
      type(str): one of the names above.
      at(int): milliseconds since the epoch, by history's clock.
      seq(int | None): number of the command that the event records or answers.
      name(str | None): name of the activity, workflow or signal.
      payload(bytes | None): a value, as the converter made it.
      attributes(dict | None): small JSON facts: ``hash``, ``ms``, ``failure``, ``workflow_id``, ...
    """

    event_id: int
    type: str
    at: int
    seq: int | None = None
    name: str | None = None
    payload: bytes | None = None
    attributes: dict[str, Any] | None = None


def describe(type: str, name: str | None) -> str:
    """Return the text that names an event or a command to people: ``ActivityScheduled 'charge'``."""
    return f"{type} {name!r}" if name else type


def command_id(run_id: str, seq: int | str) -> bytes:
    """The id of what a run's command makes (a message, a child's run), or of the ``next`` run, as 16 bytes.

    Derived, so that carrying out a command twice makes one thing; the SQL procedures derive it in the same way.  A
    uuid of version 8: nobody but the database may make one, so that nobody can take it before the run does.
    """
    digest = hashlib.md5(f"{run_id}:{seq}".encode(), usedforsecurity=False).digest()
    return digest[:6] + bytes([digest[6] & 0x0F | 0x80]) + digest[7:]


def described_failure(event: Event) -> dict[str, Any]:
    """The description of a failure that an event carries; empty if it has none."""
    failure = (event.attributes or {}).get("failure")
    return failure if isinstance(failure, dict) else {}
