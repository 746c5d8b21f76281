"""The runs, and one of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from psycopg import sql

from .. import escalations
from ..cli.workflow.look import STATUSES
from ..cli.workflow.timeline import details, ends_of
from ..errors import DurableError, InvalidFilter, NotPermitted
from ..procedures import from_json
from ..workflow.client import get_handle
from ..workflow.descriptions import Description, HistoryEvent, Pending, public
from ..workflow.events import Event
from ..workflow.filters import parse
from ..workflow.listing import WorkflowList, list_workflows
from .html import Child, Html, link, render, tag
from .page import (
    LESS,
    MOST,
    Missing,
    Page,
    View,
    ago,
    block,
    box,
    choice,
    facts,
    field_,
    filters,
    lasted,
    moment,
    pager,
    seconds,
    section,
    short,
    state,
    table,
    value,
)  # fmt: skip

#: How many runs a page has.
RUNS = 50

#: What the orders are called.
CALLED = {
    "-started_at": "latest start first",
    "started_at": "earliest start first",
    "-closed_at": "latest end first",
    "closed_at": "earliest end first",
}

#: How many events a page has.
EVENTS = 200

#: How many failures are shown, each the cause of the one before.
CAUSES = 20

#: How finely a bar is drawn.
WIDTH = 1000

#: How many things that a run waits for are shown.
PENDING = 100

#: Among how many messages of its workflow a task that failed is looked for.
NEXT = 200

#: Of what all events of a page carry, so many bytes of HTML are shown.
ALL = 500_000

#: From how many bytes on an event says no more than that it has them.
LARGE = 65_536

_SHOWN = ("input", "result", "payload", "value", "failure")


# --- all ------------------------------------------------------------------------------------------------------


def runs(view: View) -> Page:
    """A page of the runs that meet a filter; none of them is counted."""
    where, name, status = view.given("where"), view.given("name"), view.given("status")
    order, after = view.given("order") or "-started_at", view.given("after")
    wrong: str | None = None
    found = WorkflowList()
    try:
        if where is not None:
            # By itself first: a mistake is shown at its place in what was written.
            parse(where)
        parts = (f"({where})" if where else None, _equals("name", name), _equals("status", status))
        condition = " and ".join(part for part in parts if part is not None) or None
        found = list_workflows(condition, order, RUNS, after, broker=view.broker)
    except InvalidFilter as e:
        wrong = str(e)
    except ValueError as e:
        wrong = str(e)
    hint = tag(
        "p",
        "A filter compares fields with values: ", tag("code", "search.region = 'eu' and started_at > '2026-01-31'"),
        ". Fields: workflow_id, run_id, name, status, queue_name, started_at, closed_at, parent_id, search.NAME, "
        "entity.PATH.",
        id="hint", class_="soft",
    )  # fmt: skip
    form = filters(
        "/runs",
        field_(
            "Filter", "where", where, wide=True, aria_describedby="hint", spellcheck="false", autocomplete="off",
            aria_invalid="true" if wrong else None,
        ),
        field_("Workflow", "name", name),
        choice("Status", "status", STATUSES, status),
        choice("Order", "order", CALLED, order, none=""),
    )  # fmt: skip
    columns = ("workflow id", "workflow", "status", "stream", "started", "took", "#events", "search")
    rows = [
        (
            link(run.workflow_id, f"/runs/{run.run_id}"),
            run.name,
            [state(run.status), [tag("br"), tag("span", "its task fails", class_="bad")] if run.task_failure else None],
            run.queue_name,
            moment(run.started_at),
            seconds(((run.closed_at or datetime.now(UTC)) - run.started_at).total_seconds()),
            run.history_length,
            short(", ".join(f"{key}={what}" for key, what in run.search.items())),
        )
        for run in found
    ]
    query = {"where": where, "name": name, "status": status, "order": order}
    return Page(
        "Runs",
        [
            form,
            hint,
            box(tag("pre", wrong), bad=True) if wrong else table("Runs", columns, rows, "There are no such runs."),
            pager("/runs", query, "after", after is None, found.next),
        ],
        "/runs",
        status=400 if wrong else 200,
    )


def _equals(name: str, given: str | None) -> str | None:
    return None if given is None else "{} = '{}'".format(name, given.replace("'", "''"))


# --- one ------------------------------------------------------------------------------------------------------


def run(view: View) -> Page:
    """One run: what it is, what it waits for, and what happened, in its order."""
    try:
        run_id = uuid.UUID(view.path["run_id"])
    except ValueError:
        raise Missing("the id of a run is a UUID") from None
    asked = view.given("stack") is not None
    told = get_handle(run_id=str(run_id), broker=view.broker).described(ask=asked)
    after = view.number("after") or 0
    page = _events(view, run_id, min(after, 2**31 - 1), EVENTS + 1)
    events = page[:EVENTS]
    more = events[-1].event_id if len(page) > EVENTS else None
    last = [] if told.status == "running" else _events(view, run_id, told.history_length - 1, 1)
    end = told.closed_at or datetime.now(UTC)
    here = f"/runs/{run_id}"
    others = pager(here, {}, "after", after == 0, more, max(told.history_length - EVENTS, 0))
    reason = last[0].attributes.get("reason") if last else None
    return Page(
        f"Run {told.workflow_id}",
        [
            _summary(told, reason),
            section("Failure", failure(told.failure)) if told.failure else None,
            section("Its last task failed", block(told.task_failure), _next_task(view, told))
            if told.task_failure
            else None,
            section("Waits for", _pending(view, told, here)) if told.status == "running" else None,
            section("Where the code waits", _stack(told)) if asked else None,
            section("Input", value(told.input)),
            section("Result", value(told.result)) if told.status == "completed" else None,
            section(
                "Timeline",
                tag("p", f"Events {events[0].event_id:,} to {events[-1].event_id:,} of {told.history_length:,}. "
                    if len(events) < told.history_length and events else None,
                    f"Bars: from the start to {'the end' if told.closed_at else 'now'}, ",
                    lasted((end - told.started_at).total_seconds()), ".", class_="soft"),
                others,
                timeline(events, told.started_at, end, told.closed_at is not None and more is None),
                others if events else None,
            ),
        ],
        "/runs",
    )  # fmt: skip


def _summary(told: Description, reason: Any) -> Html:
    parent = told.parent
    return facts(
        ("status", state(told.status)),
        ("reason", None if reason is None else short(str(reason))),
        ("workflow", told.name),
        ("run id", told.run_id),
        ("stream", link(told.queue_name, "/stream", name=told.queue_name)),
        ("started", ago(told.started_at)),
        ("closed", ago(told.closed_at)),
        ("took", seconds((told.closed_at - told.started_at).total_seconds()) if told.closed_at else None),
        ("parent", link(parent.workflow_id or parent.run_id, f"/runs/{parent.run_id}") if parent else None),
        ("related", [
            link("its children", "/runs", where=f"parent_id = '{told.run_id}'"), ", ",
            link("runs of this workflow id", "/runs", where=_equals("workflow_id", told.workflow_id)),
        ]),
        ("events", f"{told.history_length:,}"),
        ("search", value(told.search) if told.search else None),
        ("memo", value(told.memo) if told.memo else None),
        ("entity", value(told.entity) if told.entity else None),
    )  # fmt: skip


def _stack(told: Description) -> Child:
    if told.status != "running":
        return tag("p", "Nowhere: it has ended.")
    if told.stack:
        return block(told.stack)
    return tag("p", "No worker told. Is there one for its stream? See ", link("workers", "/workers"), ".")


def _next_task(view: View, told: Description) -> Child:
    """When the task that failed comes again.  Only administrators see messages."""
    try:
        found = view.target.rows("peek_messages", told.queue_name, None, told.name, NEXT)
    except NotPermitted:
        return None
    for row in found:
        if str(row["run_id"]) == told.run_id and row["kind"] in ("s", "t", "w") and row["last_failure"] is not None:
            when: Child = "now" if row["state"] == "leased" else ago(row["due_at"])
            return tag("p", f"Attempt {row['attempt'] + 1} of the task: ", when, ".")
    where = link("what is delayed on its stream", "/stream", name=told.queue_name, state="delayed", actor=told.name)
    return tag("p", "When it comes again: see ", where, ".")


def _pending(view: View, told: Description, here: str) -> list[Child]:
    people = [
        open
        for status in ("waiting", "claimed")
        for open in escalations.list(run_id=told.run_id, status=status, limit=50, broker=view.broker)
    ]
    others = [entry for entry in told.pending if entry.kind != "escalation"]
    rows: list[Sequence[Child]] = [_pending_row(entry) for entry in others[:PENDING]]
    rows += [
        (
            "escalation",
            link(asked.subject or asked.role, f"/escalations/{asked.id}"),
            None, None,
            ["times out ", ago(asked.times_out_at)] if asked.times_out_at else None,
            f"claimed by {asked.claimed_by}" if asked.claimed_by else f"waits for {asked.role}",
        )
        for asked in people
    ]  # fmt: skip
    columns = ("what", "name", "#number", "#attempt", "next", "remarks")
    return [
        table("What the run waits for", columns, rows, "No activity, timer, child or person: a signal, or its worker."),
        tag("p", f"There are {len(others) - PENDING:,} more.") if len(others) > PENDING else None,
        tag("p", link("Ask a worker where the code waits", here, stack="1")),
    ]


def _pending_row(entry: Pending) -> Sequence[Child]:
    said: list[Child] = [block(entry.last_failure, LESS)] if entry.last_failure else []
    said += [value(entry.heartbeat_details, LESS)] if entry.heartbeat_details is not None else []
    return entry.kind, entry.name, entry.seq, entry.attempt, ago(entry.next_attempt_at), said


def failure(known: Mapping[str, Any] | None, most: int = MOST) -> Html:
    """A failure with its traceback, and what caused it; of all texts not many more than so many characters."""
    parts: list[Child] = []
    for _ in range(CAUSES):
        if not isinstance(known, Mapping) or most <= 0:
            break
        traceback = known.get("traceback")
        said, trace = str(known.get("message")), str(traceback) if traceback else ""
        parts.append(tag("p", "caused by:") if parts else None)
        parts.append(tag("p", tag("strong", short(str(known.get("type")))), ": ", said if len(said) <= LESS else None))
        parts.append(block(said, LESS) if len(said) > LESS else None)
        parts.append(block(trace, most) if trace else None)
        most -= len(said) + len(trace)
        known = known.get("cause")
    return tag("div", parts)


def _events(view: View, run_id: uuid.UUID, after: int, most: int) -> list[HistoryEvent]:
    """Events of a run; of those that carry much, only how much that is."""
    call = sql.SQL(
        "SELECT event_id, type, at, seq, name, CASE WHEN octet_length(payload) <= {most} THEN payload END, "
        "CASE WHEN octet_length(attributes) <= {most} THEN attributes END, "
        "greatest(octet_length(payload), octet_length(attributes)) FROM {schema}.get_history(%s, %s, %s)"
    ).format(most=LARGE, schema=sql.Identifier(view.target.namespace))
    with view.broker.database.calling() as conn:
        rows = conn.execute(call, [run_id, after, most]).fetchall()
    return [
        _told(view, Event(id, type, at, seq, name, payload, from_json(facts)), size or 0)
        for id, type, at, seq, name, payload, facts, size in rows
    ]


def _told(view: View, event: Event, size: int) -> HistoryEvent:
    """An event as it is shown; whatever its writer has put into it, the others are seen."""
    try:
        told = public(view.broker.codecs.open(event))
    except (ValueError, TypeError, RecursionError, DurableError) as e:
        told = public(event._replace(payload=None, attributes={"unreadable": str(e)}))
    if size > LARGE:
        much = {"size": f"{size:,} bytes, too many for this page"}
        told = replace(told, attributes={**much, **told.attributes})
    return told


def timeline(events: Sequence[HistoryEvent], start: datetime, end: datetime, whole: bool) -> Html:
    """Events in their order, with a bar for what takes its time.

    Parameters:
      start, end: what the bars are a part of.
      whole: nothing comes behind these events: what they opened and did not end never ended.
    """
    ends = ends_of(events)
    failed = {
        event.attributes.get("seq") for event in events if event.type.endswith(("Failed", "TimedOut", "Terminated"))
    }
    rows: list[Sequence[Child]] = []
    left = ALL
    for event in events:
        drawn: Child = None
        if event.event_id in ends:
            until = ends[event.event_id]
            kind = "open" if until is None else "bad" if event.attributes.get("seq") in failed else None
            drawn = _bar(event.at, until, start, end, kind, whole)
        told = render(_details(event, left > 0))
        left -= len(told)
        rows.append(
            (
                event.event_id,
                tag("time", lasted((event.at - start).total_seconds()), datetime=event.at.isoformat(),
                    title=event.at.isoformat(sep=" ", timespec="milliseconds")),
                tag("strong", event.type),
                event.attributes.get("seq"),
                event.name,
                drawn,
                told,
            )
        )  # fmt: skip
    columns = ("#event", "#after", "type", "#number", "name", "when", "details")
    return table("Timeline", columns, rows, "There are no events here.")


def _bar(at: datetime, until: datetime | None, start: datetime, end: datetime, kind: str | None, whole: bool) -> Html:
    whole_time = max((end - start).total_seconds(), 0.001)

    def place(when: datetime) -> int:
        return max(0, min(WIDTH, round((when - start).total_seconds() / whole_time * WIDTH)))

    begin = min(place(at), WIDTH - 5)
    length = max(place(until or end) - begin, 5)
    took = lasted(((until or end) - at).total_seconds())
    said = (
        took
        if until is not None
        else f"{took}, never ended"
        if whole
        else f"{took} so far, or as far as this page goes"
    )
    rect = tag("rect", x=begin, y=2, width=length, height=12, rx=2, class_=kind)
    return tag(
        "svg", tag("title", said), rect,
        viewBox=f"0 0 {WIDTH} 16", preserveAspectRatio="none", class_="bar", role="img", aria_label=said,
    )  # fmt: skip


def _details(event: HistoryEvent, wholly: bool) -> Child:
    try:
        line = details(event)
    except (ValueError, TypeError, KeyError, AttributeError):
        line = "not written by this package"
    known = [(name, event.attributes[name]) for name in _SHOWN if event.attributes.get(name) is not None and wholly]
    if event.type == "ChildStarted" and "run_id" in event.attributes:
        return [link("its run", "/runs/" + quote(str(event.attributes["run_id"]), safe="")), _folded(line, known)]
    return _folded(line, known)


def _folded(line: str, known: Sequence[tuple[str, Any]]) -> Child:
    """What an event carries: a line, and all of it behind that."""
    if not known:
        return line
    inside: list[Child] = []
    for name, what in known:
        inside.append(tag("p", name))
        is_failure = name == "failure" and isinstance(what, Mapping)
        inside.append(failure(what, LESS) if is_failure else value(what, LESS))
    return tag("details", tag("summary", line or "details"), inside)
