"""What is told of a run to whoever looks at it from outside."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .converter import loads
from .events import Event
from .info import Parent

#: What the payload of an event is called, where it is no result.
_PAYLOADS = {
    "WorkflowStarted": "input",
    "WorkflowContinuedAsNew": "input",
    "ActivityScheduled": "input",
    "ChildStarted": "input",
    "SignalReceived": "payload",
    "SignalSent": "payload",
    "UpdateAccepted": "input",
    "EscalationOpened": "payload",
    "TopicEmitted": "payload",
    "OutputWritten": "value",
}

#: What events are called, where the engine tells apart what is one thing to those outside.
_TYPES = {
    "ActivityCancelConfirmed": "ActivityCancelled",
    "EscalationWithdrawn": "EscalationCancelled",
}


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One event of a run's history.

    Attributes:
      event_id(int): its place in the run's one order, from 1.
      type(str): what happened, for example ``ActivityCompleted``.
      name(str | None): of the activity, the child, the signal.
      at(datetime): UTC.
      attributes(dict): the rest: ``seq`` (the number of the command), values decoded from JSON.
    """

    event_id: int
    type: str
    name: str | None
    at: datetime
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pending:
    """What a run waits for.

    Attributes:
      kind(str): activity, timer or child.
      name(str | None): of the activity or the child's workflow.
      seq(int): the number of the command, as in the history.
      attempt(int | None): which attempt of the activity runs or comes next, from 1.
      last_failure(str | None): why the attempt before it failed, or a child's last task.
      next_attempt_at(datetime | None): when it is due, while that lies ahead; UTC.
      heartbeat_details: what the activity said last with ``heartbeat(details)``.
    """

    kind: str
    name: str | None
    seq: int
    attempt: int | None
    last_failure: str | None
    next_attempt_at: datetime | None
    heartbeat_details: Any


@dataclass(frozen=True, slots=True)
class Description:
    """A run as it stands.

    Attributes:
      input: ``{"args": [...], "kwargs": {...}}``, as JSON.
      result: what it returned, as JSON, if it has completed.
      failure(dict | None): what it failed with: ``type``, ``message``, ``traceback``, ``cause``.
      pending(list[Pending]): what it waits for.
    """

    workflow_id: str
    run_id: str
    name: str
    queue_name: str
    status: str
    started_at: datetime
    closed_at: datetime | None
    parent: Parent | None
    memo: dict[str, Any]
    search: dict[str, Any]
    entity: dict[str, Any]
    history_length: int
    task_failure: str | None
    input: Any
    result: Any
    failure: dict[str, Any] | None
    pending: list[Pending]
    stack: str | None = None


def value_of(event: Event | None) -> Any:
    """What an event carries; None where it is not there."""
    return None if event is None or event.payload is None else readable(event.payload)


def readable(data: bytes) -> Any:
    """A value for whoever looks; what is no JSON is named instead: nobody of ours stores that, and it must not hide all
    else."""
    try:
        return loads(data)
    except (ValueError, RecursionError):
        return f"<no JSON, {len(data):,} bytes>"


def public(event: Event) -> HistoryEvent:
    # The number of a command is what the database knows it by.
    attributes = {name: value for name, value in (event.attributes or {}).items() if name != "seq"}
    if event.seq is not None:
        attributes["seq"] = event.seq
    if event.payload is not None:
        attributes[_PAYLOADS.get(event.type, "result")] = readable(event.payload)
    return HistoryEvent(
        event.event_id,
        _TYPES.get(event.type, event.type),
        event.name,
        datetime.fromtimestamp(event.at / 1000, UTC),
        attributes,
    )
