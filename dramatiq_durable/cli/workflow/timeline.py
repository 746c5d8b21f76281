"""A history as people read it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from ...workflow.descriptions import HistoryEvent
from ..output import cell, duration, make_table, print_table, text
from ..values import shown

#: Of a value in a timeline, so many characters are shown; ``--json`` has all of them.
SHOWN = 160

#: How wide the bars are.
WIDTH = 24

#: What takes its time: it is opened by this event, and ended by the next of its number that is no `_CANCELLING`.
_OPENING = ("ActivityScheduled", "TimerStarted", "ChildStarted", "EscalationOpened")
_CANCELLING = ("ActivityCancelRequested", "ChildCancelRequested")
_CLOSING = (
    "WorkflowCompleted",
    "WorkflowFailed",
    "WorkflowCancelled",
    "WorkflowTerminated",
    "WorkflowTimedOut",
    "WorkflowContinuedAsNew",
)


def print_timeline(events: Sequence[HistoryEvent]) -> None:
    """Print a history as a table: relative times, and a bar for everything that takes its time."""
    first, last = events[0].at, events[-1].at
    took = (last - first).total_seconds()
    bars = bars_of(events, WIDTH) if took > 0 else {}
    columns = ["event", "at", "after", "type", "#", "name", "details"]
    if bars:
        columns.insert(-1, f"0 … {duration(took)}" if _unicode() else f"0 .. {duration(took)}")
    table = make_table(columns)
    for event in events:
        seq = event.attributes.get("seq")
        row = [
            str(event.event_id),
            event.at.astimezone().strftime("%H:%M:%S.%f")[:-3],
            duration((event.at - first).total_seconds()),
            text(event.type),
            "" if seq is None else str(seq),
            text(event.name or ""),
            text(details(event)),
        ]
        if bars:
            row.insert(-1, bars.get(event.event_id, ""))
        table.add_row(*row)
    start = first.astimezone()
    click.echo(f"{events[0].name}, started {start:%Y-%m-%d %H:%M:%S %Z}")
    print_table(table)
    waits = open_of(events)
    if waits:
        now = datetime.now(first.tzinfo)
        click.echo("waits for " + ", ".join(_waiting(event, now) for event in waits))


def ends_of(events: Sequence[HistoryEvent]) -> dict[int, datetime | None]:
    """When that which an event opened was over (by the event's number); None: it is not, or the run ended first."""
    ends: dict[int, datetime | None] = {}
    opened: dict[Any, int] = {}
    for event in events:
        seq = event.attributes.get("seq")
        if event.type in _OPENING:
            ends[event.event_id] = None
            # One that has no number ends nowhere: no worker of ours writes that.
            if seq is not None:
                opened[seq] = event.event_id
        elif seq in opened and event.type not in _CANCELLING:
            ends[opened.pop(seq)] = event.at
    return ends


def open_of(events: Sequence[HistoryEvent]) -> list[HistoryEvent]:
    """What a run that has not ended waits for."""
    if events[-1].type in _CLOSING:
        return []
    ends = ends_of(events)
    return [event for event in events if event.event_id in ends and ends[event.event_id] is None]


def bars_of(events: Sequence[HistoryEvent], width: int) -> dict[int, str]:
    """A bar for each event that opened something, from then to its end; with an arrow where it did not end."""
    first, last = events[0].at, events[-1].at
    line, arrow = ("━", "▶") if _unicode() else ("=", ">")

    def place(at: datetime) -> int:
        return min(width - 1, int((at - first) / (last - first) * width))

    bars: dict[int, str] = {}
    opened = {event.event_id: event for event in events}
    for event_id, end in ends_of(events).items():
        begin, until = place(opened[event_id].at), place(last if end is None else end)
        length = until - begin + 1
        bars[event_id] = " " * begin + (line * length if end is not None else line * (length - 1) + arrow)
    return bars


def _unicode() -> bool:
    return (sys.stdout.encoding or "").lower().startswith("utf")


def _waiting(event: HistoryEvent, now: datetime) -> str:
    kind = {"ActivityScheduled": "activity", "TimerStarted": "timer", "ChildStarted": "child"}
    what = f"{kind.get(event.type, 'escalation')} #{event.attributes.get('seq')}"
    if event.name:
        what += f" {event.name}"
    return f"{what} for {duration((now - event.at).total_seconds())}"


def details(event: HistoryEvent) -> str:
    """What an event carries, on one line."""
    parts = []
    for name, value in event.attributes.items():
        if name in ("seq", "hash"):
            continue
        if name == "ms" and isinstance(value, int) and 0 <= value < 2**53:
            parts.append(duration(value / 1000))
        elif name == "failure" and isinstance(value, dict):
            parts.append(f"{value.get('type')}: {value.get('message')}")
        elif name == "input" and _is_call(value):
            parts.append(_call(value))
        elif name in ("result", "payload"):
            parts.append(shown(value))
        else:
            parts.append(f"{name}={cell(value)}")
    line = " ".join("  ".join(parts).split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"args", "kwargs"}
        and isinstance(value["args"], list)
        and isinstance(value["kwargs"], dict)
    )


def _call(value: dict[str, Any]) -> str:
    arguments = [shown(v) for v in value["args"]]
    arguments += [f"{k}={shown(v)}" for k, v in value["kwargs"].items()]
    return f"({', '.join(arguments)})"
