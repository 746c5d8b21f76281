"""Streams, what waits on them, dead letters, workers and schedules."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, LiteralString

from .. import schedules as all_schedules
from ..cli.output import duration
from ..cli.payload import call, decode, last_line
from ..metrics.gauges import MOST_COUNTED
from .html import Child, address, link, tag
from .page import (
    LESS,
    BadRequest,
    Go,
    Missing,
    Page,
    View,
    action,
    ago,
    block,
    box,
    choice,
    facts,
    field_,
    filters,
    moment,
    pager,
    seconds,
    section,
    short,
    sliced,
    state,
    table,
    value,
)  # fmt: skip

#: How many dead letters, or messages, a page has.
ROWS = 50

#: What is read of a message in a list: values that are large are not, and of failures the end says most.
_SMALL: LiteralString = (
    "kind, octet_length(payload) AS size, CASE WHEN octet_length(payload) <= 65536 THEN payload END AS payload, "
)
_MESSAGE: LiteralString = _SMALL + (
    "message_id, state, actor, run_id, priority, due_at, attempt, worker_id, host, pid, since, abort_at, "
    "CASE WHEN octet_length(last_failure) <= 65536 THEN last_failure ELSE right(last_failure, 4000) END AS last_failure"
)
_LETTER: LiteralString = _SMALL + (
    "dead_letter_id, stream, actor, reason, attempt, died_at, "
    "CASE WHEN octet_length(failure) <= 65536 THEN failure ELSE right(failure, 4000) END AS failure"
)

#: What is said after something was done, by the word in the address.
PAUSED = {
    "paused": "It is paused: nothing more is handed out, and what runs goes on.",
    "paused-before": "It was paused already.",
    "resumed": "It goes on.",
    "resumed-before": "It was not paused.",
}
DROPPED = {"dropped": "The letter was dropped.", "dropped-before": "There was no such letter any more."}

REASONS = ("rejected", "poison", "aborted", "unsettled")
STATES = ("waiting", "delayed", "leased")


# --- streams ----------------------------------------------------------------------------------------------------


def streams(view: View) -> Page:
    """Every stream with its counts: those of the exporter, whatever there is counted no further than it counts."""
    columns = ("stream", "#ready", "#leased", "#delayed", "#dead", "oldest ready", "#workers", "state")
    shown, more = sliced(view, "/streams", sorted(_gauges(view).items()))
    rows = [
        (
            link(name, "/stream", name=name),
            _counted(known["ready_messages"]),
            _counted(known["leased_messages"]),
            _counted(known["delayed_messages"]),
            _dead(name, known),
            seconds(known["oldest_ready_seconds"] or None),
            _workers(known),
            state("paused" if known["paused"] else "active"),
        )
        for name, known in shown
    ]
    about = tag("p", f"From {MOST_COUNTED:,} on, counts are estimates (~).", class_="soft") if rows else None
    return Page("Streams", [table("Streams", columns, rows, "There are no streams yet."), about, more], "/streams")


def _gauges(view: View) -> dict[str, dict[str, float]]:
    """What is known of each stream, by the names of the exporter's gauges."""
    found: dict[str, dict[str, float]] = {}
    for row in view.target.rows("read_gauges", MOST_COUNTED):
        if row["metric"].startswith("stream_"):
            found.setdefault(row["name"], defaultdict(float))[row["metric"].removeprefix("stream_")] += row["value"]
    return found


def _dead(name: str, known: dict[str, float]) -> Child:
    dead = known["dead_letters"]
    return link(_counted(dead), "/dead-letters", stream=name) if dead else "0"


def _workers(known: dict[str, float]) -> Child:
    return int(known["workers"]) or tag("span", "none", class_="bad")


def _counted(rows: float) -> str:
    return f"{'~' if rows >= MOST_COUNTED else ''}{rows:,.0f}"


def stream(view: View) -> Page:
    """What waits on a stream, in the order in which it is handed out."""
    name, chosen, actor = view.given("name"), view.given("state"), view.given("actor")
    if name is None:
        raise Missing("name a stream")
    if chosen not in (None, *STATES):
        raise BadRequest(f"state is one of {', '.join(STATES)}, not {chosen!r:.60}")
    found = view.target.rows("peek_messages", name, chosen, actor, ROWS + 1, columns=_MESSAGE)
    now = datetime.now(UTC)
    columns = ("message id", "state", "actor", "arguments", "#priority", "due", "#attempt", "worker", "last failure")
    rows = [_message(view, row, now) for row in found[:ROWS]]
    form = filters(
        "/stream",
        tag("input", type="hidden", name="name", value=name),
        choice("State", "state", STATES, chosen),
        field_("Actor", "actor", actor),
    )
    known = _gauges(view).get(name, defaultdict(float))
    paused = bool(known["paused"])
    return Page(
        f"Stream {name}",
        [
            _said(view, PAUSED),
            facts(
                ("state", state("paused" if paused else "active")),
                ("ready", _counted(known["ready_messages"])),
                ("oldest ready", seconds(known["oldest_ready_seconds"] or None)),
                ("leased", _counted(known["leased_messages"])),
                ("delayed", _counted(known["delayed_messages"])),
                ("dead", _dead(name, known)),
                ("workers", _workers(known)),
            ),
            action(
                view, "/stream/resume" if paused else "/stream/pause", "Resume" if paused else "Pause",
                tag("input", type="hidden", name="name", value=name),
            ),
            tag("h2", "Messages"),
            form,
            table("Messages", columns, rows, "There is no such message."),
            tag("p", f"There are more than these {ROWS}.") if len(found) > ROWS else None,
        ],
        "/streams",
    )  # fmt: skip


def pause(view: View) -> Go:
    """Have a stream hand out nothing."""
    return _pause(view, True)


def resume(view: View) -> Go:
    """Have it hand out again."""
    return _pause(view, False)


def _pause(view: View, paused: bool) -> Go:
    name = view.filled("name")
    [row] = view.target.rows("pause_stream", name, paused)
    verb = "paused" if paused else "resumed"
    return Go(address("/stream", name=name, done=verb if row["pause_stream"] else f"{verb}-before"))


def _said(view: View, texts: Mapping[str, str]) -> Child:
    """What became of what was done last."""
    text = texts.get(view.given("done") or "")
    return None if text is None else box(text)


def _message(view: View, row: dict[str, Any], now: datetime) -> tuple[Child, ...]:
    if row["kind"] in ("s", "t", "w"):
        arguments: Child = link("a task of a run", f"/runs/{row['run_id']}")
    else:
        arguments = _call(view, row)
    worker = None if row["worker_id"] is None else f"{row['worker_id']} ({row['host']}, pid {row['pid']})"
    running = None if row["since"] is None else f" for {duration((now - row['since']).total_seconds())}"
    return (
        str(row["message_id"]),
        [state(row["state"]), ", aborted" if row["abort_at"] is not None else None],
        row["actor"],
        arguments,
        row["priority"],
        ago(row["due_at"]),
        row["attempt"],
        [worker, running],
        last_line(view.broker.codecs.decode_text(row["last_failure"])),
    )


def _call(view: View, row: dict[str, Any]) -> str:
    """The arguments of a message in one line; of a large one, how large it is."""
    if row["payload"] is None:
        return f"{row['size']:,} bytes"
    return call(decode(row["payload"], row["kind"], view.broker.codecs))


# --- dead letters -----------------------------------------------------------------------------------------------


def dead_letters(view: View) -> Page:
    """A page of dead letters, the latest first."""
    stream, actor, reason, text = (view.given(name) for name in ("stream", "actor", "reason", "text"))
    below = view.number("below")
    given = (None, None, stream, actor, reason, None, None, text, ROWS + 1, below)
    found = view.target.rows("list_dead_letters", *given, columns=_LETTER)
    codecs = view.broker.codecs
    rows = []
    for row in found[:ROWS]:
        number = row["dead_letter_id"]
        pick = tag(
            "input", type="checkbox", name="letter", value=number, form="redrive", aria_label=f"Choose letter {number}"
        )
        cells: tuple[Child, ...] = (
            link(str(number), f"/dead-letters/{number}"),
            row["stream"],
            row["actor"],
            _call(view, row),
            state(row["reason"]),
            row["attempt"],
            ago(row["died_at"]),
            last_line(codecs.decode_text(row["failure"])),
        )
        rows.append((pick, *cells) if view.allow_actions else cells)
    columns = ["letter", "stream", "actor", "arguments", "reason", "#attempt", "died", "failure"]
    query = {"stream": stream, "actor": actor, "reason": reason, "text": text}
    next = found[ROWS - 1]["dead_letter_id"] if len(found) > ROWS else None
    return Page(
        "Dead letters",
        [
            _redriven(view),
            _said(view, DROPPED),
            filters(
                "/dead-letters",
                field_("Stream", "stream", stream),
                field_("Actor", "actor", actor),
                choice("Reason", "reason", REASONS, reason),
                field_("In the failure", "text", text),
            ),
            table("Dead letters", ["choose", *columns] if view.allow_actions else columns, rows,
                  "There are no such dead letters."),
            action(view, "/dead-letters/redrive", "Redrive the chosen", id="redrive") if rows else None,
            pager("/dead-letters", query, "below", below is None, next),
        ],
        "/dead-letters",
    )  # fmt: skip


def _redriven(view: View) -> Child:
    done, kept = view.number("redriven"), view.number("kept")
    if done is None:
        return None
    stay = f" {kept} stay: a live message has their id or unique key, or they are gone." if kept else ""
    return box(f"{done} went back to their streams.{stay}", bad=bool(kept))


def dead_letter(view: View) -> Page:
    """Everything about one dead letter."""
    number = _number(view.path["number"])
    found = view.target.rows("list_dead_letters", [number], *[None] * 7, 1)
    if not found:
        raise Missing(f"there is no dead letter {number}: it was redriven, dropped, or never there")
    row = found[0]
    decoded = decode(row["payload"], row["kind"], view.broker.codecs)
    traceback = (decoded.get("options") or {}).pop("traceback", None)
    failure = view.broker.codecs.decode_text(row["failure"])
    hidden = tag("input", type="hidden", name="letter", value=number)
    given: Child = block(decoded["bytes"]) if "bytes" in decoded else value(decoded)
    return Page(
        f"Dead letter {number}",
        [
            facts(
                ("reason", state(row["reason"])),
                ("stream", link(row["stream"], "/stream", name=row["stream"])),
                ("actor", row["actor"]),
                ("message id", str(row["message_id"])),
                ("attempt", row["attempt"]),
                ("deaths of workers", row["deaths"] or None),
                ("priority", row["priority"]),
                ("unique key", row["unique_key"]),
                ("sent", ago(row["enqueued_at"])),
                ("died", ago(row["died_at"])),
            ),
            action(view, "/dead-letters/redrive", "Redrive", hidden),
            section("Failure", block(failure)) if failure else None,
            section("Traceback", block(traceback)) if isinstance(traceback, str) else None,
            section("Message", given),
            section("Drop", action(
                view, "/dead-letters/drop", "Drop", hidden,
                tag("div", tag("input", type="checkbox", name="sure", id="sure", required=True), " ",
                    tag("label", "It is gone then, with what it carries.", for_="sure")),
            )) if view.allow_actions else None,
        ],
        "/dead-letters",
    )  # fmt: skip


def redrive(view: View) -> Go:
    """Bring the chosen letters back."""
    letters = sorted({_number(text) for text in view.form.get("letter", [])[:ROWS]})
    if not letters:
        raise BadRequest("choose the letters to redrive")
    [row] = view.target.rows("redrive_dead_letters", letters, *[None] * 7, 0, letters[-1], len(letters))
    return Go(address("/dead-letters", redriven=row["redriven"], kept=len(letters) - row["redriven"]))


def drop(view: View) -> Go:
    """Drop a letter, for ever."""
    number = _number(view.filled("letter"))
    if not view.filled("sure"):
        raise BadRequest("say that you are sure: it is gone then")
    [row] = view.target.rows("drop_dead_letters", [number], *[None] * 7, number - 1, number, 1)
    return Go(address("/dead-letters", done="dropped" if row["dropped"] else "dropped-before"))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise Missing("the number of a dead letter is a whole number")
    return int(text)


# --- workers and schedules --------------------------------------------------------------------------------------


def workers(view: View) -> Page:
    """Every worker that is registered."""
    columns = (
        "#worker",
        "state",
        "host",
        "#pid",
        "login",
        "#threads",
        "streams",
        "#holds",
        "oldest",
        "silent",
        "started",
    )
    shown, more = sliced(view, "/workers", view.target.rows("list_workers"))
    rows = [
        (
            link(str(row["worker_id"]), f"/workers/{row['worker_id']}"),
            state(row["state"]),
            row["host"],
            row["pid"],
            row["login"],
            row["threads"],
            short(", ".join(row["streams"])),
            row["holds"],
            seconds(row["oldest"]),
            seconds(row["silent"]),
            moment(row["started_at"]),
        )
        for row in shown
    ]
    return Page("Workers", [table("Workers", columns, rows, "No worker is registered."), more], "/workers")


def worker(view: View) -> Page:
    """One worker, and what it holds."""
    text = view.path["number"]
    found = next((row for row in view.target.rows("list_workers") if str(row["worker_id"]) == text), None)
    if found is None:
        raise Missing("no such worker is registered: it has ended, or never was")
    now = datetime.now(UTC)
    number = found["worker_id"]
    shown, more = sliced(view, f"/workers/{number}", view.target.rows("worker_messages", number))
    rows = [
        (
            str(row["message_id"]),
            row["stream"],
            row["actor"],
            row["attempt"],
            None if row["since"] is None else seconds((now - row["since"]).total_seconds()),
            "yes" if row["abort_at"] is not None else None,
        )
        for row in shown
    ]
    return Page(
        f"Worker {found['worker_id']}",
        [
            facts(
                ("state", state(found["state"])),
                ("process", f"{found['pid']} on {found['host']}"),
                ("login", found["login"]),
                ("threads", found["threads"]),
                ("streams", ", ".join(found["streams"])),
                ("last heard of", [seconds(found["silent"]), " ago"]),
                ("others take over after", seconds(found["reclaim_delay"])),
                ("started", ago(found["started_at"])),
            ),
            section(
                "Messages that it holds",
                table("Messages", ("message id", "stream", "actor", "#attempt", "for", "aborted"), rows,
                      "It holds no message."),
                more,
            ),
        ],
        "/workers",
    )  # fmt: skip


def schedules(view: View) -> Page:
    """All schedules, with their next due times."""
    columns = (
        "schedule",
        "cron",
        "fires",
        "stream",
        "next due",
        "last due",
        "#fired",
        "#skipped",
        "#missed",
        "remarks",
    )
    rows = []
    shown, more = sliced(view, "/schedules", all_schedules.list(broker=view.broker))
    for known in shown:
        remarks: list[Child] = [] if known.workers else [tag("p", "no live worker", class_="bad")]
        remarks += [block(known.failure, LESS)] if known.failure else []
        rows.append(
            (
                known.name,
                [tag("code", known.cron), " ", known.timezone],
                f"{known.kind} {known.target}",
                known.queue_name,
                state("paused") if known.paused else ago(next(iter(known.next_due), None)),
                _fired(known),
                known.fired,
                known.skipped,
                known.missed,
                remarks,
            )
        )
    return Page("Schedules", [table("Schedules", columns, rows, "There are no schedules."), more], "/schedules")


def _fired(known: all_schedules.Schedule) -> Child:
    if known.kind == "workflow" and known.last_id is not None:
        return [ago(known.last_due), " ", link("its run", f"/runs/{uuid.UUID(known.last_id)}")]
    return ago(known.last_due)
