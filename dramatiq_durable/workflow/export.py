"""A run's history as a text: for people, for files beside the tests that replay them, and for other tools.

The text is JSON, an object::

    {
        "format": "dramatiq-durable-history",
        "version": 1,
        "info": {
            "workflow_id": "order-7",
            "run_id": "0197...",
            "name": "order",
            "queue_name": "orders",
            "started_at": "2026-01-31T12:00:00.123000+00:00",
            "status": "completed",
            "parent": {"workflow_id": "day-31", "run_id": "0197..."},
        },
        "events": [
            {
                "event_id": 1,
                "type": "WorkflowStarted",
                "at": 1769860800123,
                "name": "order",
                "value": {"args": ["o-7", 500], "kwargs": {}},
            },
            {
                "event_id": 2,
                "type": "ActivityScheduled",
                "at": 1769860800131,
                "seq": 1,
                "name": "charge",
                "value": {"args": ["o-7", 500], "kwargs": {}},
                "attributes": {"hash": "9f...", "stream": "payments"},
            },
        ],
    }

``at`` is milliseconds since the epoch.  ``seq``, ``name`` and ``attributes`` are left out where an event has none.  An
event's payload is ``value`` where it is JSON that comes back byte for byte, ``base64`` where it is not, and neither
where there is none.  ``parent`` is null for a run that is nobody's child.

A later version only adds to this; a text of a version that is not known here is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from .events import Event
from .info import Info, Parent

FORMAT = "dramatiq-durable-history"
VERSION = 1


def export_history(info: Info, events: Iterable[Event], status: str | None = None) -> str:
    """Return a run's history as a text.

    Parameters:
      info(Info): the run's ids, name, stream, start and parent; the rest of it is in the first event.
      events: the whole history, with payloads as the converter made them (no codec around them).
      status(str | None): how the run stood; only for people.

    Returns:
      str: JSON as described above, one event a line: ASCII only, so that it goes through any tool.
    """
    head = {
        "workflow_id": info.workflow_id,
        "run_id": info.run_id,
        "name": info.name,
        "queue_name": info.queue_name,
        "started_at": None if info.started_at is None else info.started_at.astimezone(UTC).isoformat(),
        "status": status,
        "parent": None
        if info.parent is None
        else {"workflow_id": info.parent.workflow_id, "run_id": info.parent.run_id},
    }
    lines = ",\n".join("    " + json.dumps(_exported(event)) for event in events)
    return (
        f'{{\n  "format": {json.dumps(FORMAT)},\n  "version": {VERSION},\n'
        f'  "info": {json.dumps(head)},\n  "events": [\n{lines}\n  ]\n}}\n'
    )


def load_history(text: str) -> tuple[Info, list[Event]]:
    """Return what `export_history` was given.

    Returns:
      The run's Info, and its events in order, counted from 1 without a gap.

    Raises:
      ValueError: the text is no exported history, or one of a version that is not known here.
    """
    try:
        data = json.loads(text)
    except ValueError as e:
        raise ValueError(f"this is no exported history: it is no JSON ({e})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'this is no exported history: it has no "format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise ValueError(
            f"this history is of version {data.get('version')!r}, and version {VERSION} is known here: it was exported "
            "by a newer dramatiq-durable, replay it with that"
        )
    try:
        info = _info(data["info"])
        events = [_loaded(number, entry) for number, entry in enumerate(data["events"], 1)]
    except (KeyError, TypeError, AttributeError, binascii.Error) as e:
        raise ValueError(f"this exported history is damaged: {type(e).__name__}: {e}") from None
    if not events:
        raise ValueError("this exported history is damaged: it has no events")
    return info, events


def _exported(event: Event) -> dict[str, Any]:
    entry: dict[str, Any] = {"event_id": event.event_id, "type": event.type, "at": event.at}
    if event.seq is not None:
        entry["seq"] = event.seq
    if event.name is not None:
        entry["name"] = event.name
    if event.payload is not None:
        key, entry_value = _value(event.payload)
        entry[key] = entry_value
    if event.attributes is not None:
        entry["attributes"] = event.attributes
    return entry


def _value(payload: bytes) -> tuple[str, Any]:
    """The payload as JSON, if it comes back from that byte for byte."""
    try:
        value = json.loads(payload.decode("utf-8", "surrogatepass"))
        if _bytes(value) == payload:
            return "value", value
    except (ValueError, RecursionError):
        pass
    return "base64", base64.b64encode(payload).decode()


def _bytes(value: Any) -> bytes:
    """Compact JSON, as the converter makes it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def _info(head: dict[str, Any]) -> Info:
    parent = head.get("parent")
    started_at = head.get("started_at")
    return Info(
        workflow_id=head["workflow_id"],
        run_id=head["run_id"],
        name=head["name"],
        queue_name=head["queue_name"],
        started_at=None if started_at is None else datetime.fromisoformat(started_at),
        parent=None if parent is None else Parent(parent["workflow_id"], parent["run_id"]),
    )


def _loaded(number: int, entry: dict[str, Any]) -> Event:
    if entry["event_id"] != number:
        raise ValueError(f"this exported history is damaged: event {entry['event_id']} is in the place of {number}")
    payload = None
    if "value" in entry:
        payload = _bytes(entry["value"])
    elif "base64" in entry:
        payload = base64.b64decode(entry["base64"], validate=True)
    return Event(
        number, entry["type"], entry["at"], entry.get("seq"), entry.get("name"), payload, entry.get("attributes")
    )
