"""One frame: lines of text, never wider and never more than the screen has."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.text import Text

from ..output import duration
from .look import Detail, Look
from .view import Column, Section, View, rate, shown_fact

#: No column but the wide one takes more, and texts less where there is little room; the wide one has at least so many.
WIDEST, NARROW, WIDE = 40, 16, 12

#: Rows of a section where there is no screen whose height would say how many.
UNBOUNDED = 200

#: What belongs to what is seen closely.
WITHIN = {
    "stream": "messages", "worker": "messages", "runs": "runs", "run": "waits for", "message": "traceback",
}  # fmt: skip

#: Facts of a stream and of a worker that are seen closely, in this order.
FACTS = {
    "stream": (
        "ready", "leased", "delayed", "dead", "oldest", "in_rate", "out_rate", "change_rate", "dead_rate",
        "timers_overdue", "workers", "paused", "dead_by_reason",
    ),
    "worker": (
        "state", "silent", "reclaim_delay", "host", "pid", "login", "threads", "holds", "oldest", "started_at",
        "streams",
    ),
}  # fmt: skip

#: Facts that are so many seconds.
AGES = ("oldest", "silent", "reclaim_delay")

HELP = "q quit  jk choose  enter closer  tab table  s sort  / filter  p pause  ? help"
HELP_DETAIL = "q back  jk choose  enter closer  / filter  p pause  ? help"

MANUAL = """\
arrows or j k    choose a row; also page up and down, home and end
enter            look closer: at a stream, a worker, a run, a message
q or escape      back; on the first page q ends it, as Ctrl-C does
tab or 1 2 3 4   another table
s                sort by another column
/                show only rows that have some text in them; escape: all
p                pause, and go on

ready            messages that could be claimed now; oldest: due for so long
leased           messages that workers hold
delayed          messages that are not due yet
dead             dead letters
in/s, out/s      messages that come; that end, acked or as dead letters
change/s         what comes less what goes
workers          live workers that consume the stream
silent           since a worker was last heard of; beyond its reclaim delay it
                 counts as dead, and others take over what it holds

Rates are of the last ten seconds or so.  !: in trouble, and STUCK says why.
"""


@dataclass(slots=True)
class Seen:
    """What a frame shows besides what the view chooses.

    Attributes:
      where(str): the namespace and its database.
      trouble(str): why the last look failed; "": it did not.
      since(float): since when, in Unix time.
    """

    where: str
    look: Look | None = None
    detail: Detail | None = None
    trouble: str = ""
    since: float = 0.0


def frame(view: View, seen: Seen, width: int, height: int | None) -> list[Text]:
    """The lines of a frame.

    Parameters:
      height(int | None): of the screen; None: as many lines as there are, and no keys.
    """
    lines = _head(view, seen)
    view.arrange(seen.look, seen.detail)
    if view.helping and height is not None:
        return [_cut(line, width) for line in [*map(Text, MANUAL.splitlines()[: height - 1]), Text("q back", "dim")]]
    if view.drills:
        lines += _drilled(view, seen, width)
    left = None if height is None else max(height - len(lines) - 1, 2)
    sections = view.sections
    focused = view.focused
    if left is not None and focused is not None and left < 3 * len(sections):
        sections = [focused]
    rooms = _rooms(sections, left, sections.index(focused) if focused in sections else 0)
    for section, room in zip(sections, rooms, strict=True):
        lines += _table(view, section, width, room, chosen=height is not None and section is focused)
    if height is not None:
        # The keys stay at the bottom.
        lines = lines[: height - 1]
        lines += [Text()] * (height - 1 - len(lines))
        lines.append(_foot(view))
    return [_cut(line, width) for line in lines]


def _cut(line: Text, width: int) -> Text:
    if line.cell_len > width:
        line.truncate(width, overflow="ellipsis")
    return line


def _head(view: View, seen: Seen) -> list[Text]:
    look = seen.look
    first = Text(style="bold")
    if look is not None:
        first.append(time.strftime("%H:%M:%S  ", time.localtime(look.at)))
    if view.paused:
        first.append("paused  ", "yellow")
    if look is not None and not look.sees_all:
        first.append("as a monitor  ")
    first.append(seen.where)
    if look is not None and look.stuck:
        bad = sum(line["bad"] for line in look.stuck)
        first.append(f"  {len(look.stuck)} stuck", "red" if bad else "yellow")
    lines = [first]
    if seen.trouble:
        when = f" for {duration(time.time() - seen.since)}"
        said = shown_fact(seen.trouble)
        old = (
            "" if look is None else f"; shown is what was there at {time.strftime('%H:%M:%S', time.localtime(look.at))}"
        )
        lines.append(Text(f"no answer{when}{old}: {said}", "bold red"))
    if look is None:
        return lines
    live = [worker for worker in look.workers if worker["state"] == "live"]
    silent = len(look.workers) - len(live)
    parts = [
        f"{name} {rate(look.rates[key])}/s"
        for name, key in (("in", "in"), ("out", "out"), ("dead", "dead"), ("runs", "runs_started"))
        if look.rates.get(key) is not None
    ]
    running = look.runs.get("running", 0)
    parts.append(f"{running} open run{'s' * (running != 1)}")
    parts.append(f"{len(live)} live worker{'s' * (len(live) != 1)}" + (f", {silent} silent" if silent else ""))
    lines.append(Text("  ".join(parts), "" if not seen.trouble else "dim"))
    return lines


def _drilled(view: View, seen: Seen, width: int) -> list[Text]:
    """What is seen closely, its facts (as many on a line as fit), and which commands go on from here."""
    kind, key = view.drills[-1]
    facts: dict[str, Any] = {} if seen.detail is None else seen.detail.facts
    if seen.look is not None and kind in FACTS:
        things, named = (seen.look.streams, "name") if kind == "stream" else (seen.look.workers, "worker_id")
        thing = next((thing for thing in things if str(thing[named]) == key), {})
        facts = {name: thing.get(name) for name in FACTS[kind]}
    lines = [Text(" > ".join(f"{kind} {shown_fact(key)}" for kind, key in view.drills), "bold cyan")]
    line = ""
    for name, value in facts.items():
        if value is None or value in ([], {}, ""):
            continue
        if isinstance(value, dict):
            value = [f"{count} {what}" for what, count in sorted(value.items())]
        shown = duration(value) if name in AGES else rate(value) if name.endswith("_rate") else shown_fact(value)
        fact = f"  {name.replace('_rate', '/s').replace('_', ' ')}: {shown}"
        if line and cell_len(line) + cell_len(fact) > width:
            lines.append(Text(line))
            line = ""
        line += fact
        while cell_len(line) > width:
            # What is too long for a line, as the reason of a failure may be, goes on in the next.
            first, *_ = chop_cells(line, width)
            lines.append(Text(first))
            line = f"    {line[len(first) :]}"
    if line:
        lines.append(Text(line))
    if seen.look is not None and seen.look.sees_all:
        lines += [Text(f"  $ dramatiq-durable {shown_fact(command)}", "dim") for command in _commands(kind, key, facts)]
    return lines


def _commands(kind: str, key: str, facts: dict[str, Any]) -> list[str]:
    """What an operator may want to type next."""
    quoted = shlex.quote(key)
    if kind == "stream":
        found = [f"stream peek {quoted}"]
        if facts["paused"]:
            found.append(f"stream resume {quoted}")
        if facts["dead"]:
            found.append(f"dead-letter list --stream {quoted}")
        return found
    if kind == "message" and facts:
        dead, message = facts.get("dead_letter_id"), facts["message_id"]
        return (
            [f"message abort {message}"]
            if dead is None
            else [f"dead-letter show {dead}", f"dead-letter redrive {dead}"]
        )
    if kind == "run":
        return [f"workflow show --run-id {quoted}"]
    if kind == "worker":
        return [f"worker show {quoted}"]
    return [f"workflow list --status {quoted}"] if kind == "runs" else []


def _rooms(sections: list[Section], left: int | None, focused: int) -> list[int]:
    """How many lines each section gets: what it needs, as far as there is room; the focused one more than another."""
    wanted = [1 + (1 + len(section.rows) if section.rows else 1) for section in sections]
    if left is None:
        return [min(want, UNBOUNDED + 2) for want in wanted]
    rooms = [min(want, 3) for want in wanted]
    spare = left - sum(rooms)
    # What is stuck, the last one, matters more than the rest.
    order = [focused, len(sections) - 1, focused, *(n for n in range(len(sections)) if n != focused)]
    while spare > 0 and any(room < want for room, want in zip(rooms, wanted, strict=True)):
        for n in order:
            if spare > 0 and rooms[n] < wanted[n]:
                rooms[n] += 1
                spare -= 1
    return rooms


def _table(view: View, section: Section, width: int, room: int, *, chosen: bool) -> list[Text]:
    rows, place, count = section.rows, view.place(section), room - 2
    start = max(place - count + 1, 0) if chosen else 0
    shown = rows[start : start + count]
    name = section.name if section.name != "detail" else WITHIN[view.drills[-1][0]]
    title = Text(f" {name.upper()} ", "bold reverse" if chosen else "bold")
    if len(shown) < len(rows):
        title.append(f"{start + 1}-{start + len(shown)} of ")
    if section.total:
        title.append(f"{len(rows)} ")
    if len(rows) < section.total:
        title.append(f"of {section.total} ")
    if section.sort and rows:
        title.append(f"by {section.sort} ")
    if not rows:
        return [title, Text(f"  {section.empty if not section.total else 'nothing has the filter in it'}", "dim")]
    columns = _fitting(section, width - 3)
    head = "  ".join(_padded(section.columns[n].title, size, section.columns[n]) for n, size in columns)
    lines = [title, Text(f"   {head}", "dim underline")]
    for number, row in enumerate(shown, start):
        cells = "  ".join(_padded(row.cells[n], size, section.columns[n]) for n, size in columns)
        here = chosen and number == place
        mark = f"{'!' if row.style == 'red' else ' '}{'>' if here else ' '}"
        lines.append(Text(f"{mark} {cells}", f"{row.style} reverse" if here else row.style))
    return lines


def _fitting(section: Section, width: int) -> list[tuple[int, int]]:
    """Which columns there is room for, and how much each gets."""
    columns = section.columns
    natural = [
        max([cell_len(column.title), *(cell_len(row.cells[n]) for row in section.rows)])
        for n, column in enumerate(columns)
    ]
    natural = [size if column.wide else min(size, WIDEST) for size, column in zip(natural, columns, strict=True)]
    wide = next((n for n, column in enumerate(columns) if column.wide), None)
    least = 0 if wide is None else min(natural[wide], WIDE)
    kept = list(range(len(columns)))
    sizes = list(natural)

    def room() -> int:
        """For the wide one."""
        return width - sum(sizes[n] + 2 for n in kept if n != wide)

    while True:
        # Texts give way first, the longest before the others; then columns, those that say least.
        sizes[:] = natural
        texts = [n for n in kept if n != wide and not columns[n].right]
        while room() < 2 * least and any(sizes[n] > NARROW for n in texts):
            sizes[max(texts, key=sizes.__getitem__)] -= 1
        if room() >= least or len(kept) <= 2:
            break
        kept.remove(max((n for n in kept if n != wide), key=lambda n: columns[n].rank))
    if wide is not None:
        sizes[wide] = min(sizes[wide], max(room(), 1))
    return [(n, sizes[n]) for n in kept]


def _padded(value: str, size: int, column: Column) -> str:
    if cell_len(value) > size:
        return set_cell_size(value, size - 1) + "…"
    return " " * (size - cell_len(value)) + value if column.right else set_cell_size(value, size)


def _foot(view: View) -> Text:
    if view.typing:
        return Text.assemble(("filter: ", "bold"), view.filter, ("_", "blink"), "  enter keep  escape none")
    filtered = f"filter: {view.filter} (escape none)  " if view.filter else ""
    return Text(filtered + (HELP_DETAIL if view.drills else HELP), "dim")
