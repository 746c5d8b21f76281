"""One frame: lines of text, never wider and never more than the screen has."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ..output import duration
from .look import Detail, Look
from .view import Column, Section, View, rate, shown_fact

#: No column but the wide one takes more, and the wide one has at least so many.
WIDEST, WIDE = 40, 12

#: Rows of a section where there is no screen whose height would say how many.
UNBOUNDED = 200

#: What belongs to what is seen closely.
WITHIN = {"stream": "messages", "worker": "messages", "runs": "runs", "run": "waits for"}

#: Facts that are so many seconds.
AGES = ("oldest", "silent", "reclaim_delay")

HELP = "q: quit  arrows or jk: choose  enter: closer  tab: next table  s: sort  /: filter  p: pause"
HELP_DETAIL = "q: back  arrows or jk: choose  enter: closer  /: filter  p: pause"


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
    threads = sum(worker["threads"] for worker in live)
    silent = len(look.workers) - len(live)
    parts = [
        f"{name} {rate(look.rates[key])}/s"
        for name, key in (("in", "in"), ("out", "out"), ("dead", "dead"), ("runs", "runs_started"))
        if look.rates.get(key) is not None
    ]
    parts.append(f"{len(live)} live workers" + (f", {silent} silent" if silent else "") + f", {threads} threads")
    parts.append(f"{look.runs.get('running', 0)} runs open")
    lines.append(Text("   ".join(parts), "" if not seen.trouble else "dim"))
    return lines


def _drilled(view: View, seen: Seen, width: int) -> list[Text]:
    """What is seen closely, and its facts: as many on a line as fit."""
    kind, key = view.drills[-1]
    facts = {} if seen.detail is None else seen.detail.facts
    known = {} if seen.look is None else {"stream": seen.look.streams, "worker": seen.look.workers}
    named = "name" if kind == "stream" else "worker_id"
    for thing in known.get(kind, []):
        if str(thing[named]) == key:
            facts = {
                name: value for name, value in thing.items() if name != named and value not in (None, {}, [], False)
            }
    lines = [Text("  ".join(f"{kind} {shown_fact(key)}" for kind, key in view.drills), "bold cyan"), Text()]
    for name, value in facts.items():
        if value is None:
            continue
        shown = duration(value) if name in AGES else rate(value) if name.endswith("_rate") else shown_fact(value)
        fact = f"  {name.replace('_rate', '/s').replace('_', ' ')}: {shown}"
        if lines[-1].cell_len + cell_len(fact) > width:
            lines.append(Text())
        lines[-1].append(fact)
    return lines


def _rooms(sections: list[Section], left: int | None, focused: int) -> list[int]:
    """How many lines each section gets: what it needs, as far as there is room; the focused one more than another."""
    wanted = [1 + (1 + len(section.rows) if section.rows else 1) for section in sections]
    if left is None:
        return [min(want, UNBOUNDED + 2) for want in wanted]
    rooms = [min(want, 3) for want in wanted]
    spare = left - sum(rooms)
    order = [focused] * 2 + [n for n in range(len(sections)) if n != focused]
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
    columns = _fitting(section, width - 2)
    head = "  ".join(_padded(section.columns[n].title, size, section.columns[n]) for n, size in columns)
    lines = [title, Text(f"  {head}", "dim underline")]
    for number, row in enumerate(shown, start):
        cells = "  ".join(_padded(row.cells[n], size, section.columns[n]) for n, size in columns)
        here = chosen and number == place
        lines.append(Text(f"{'>' if here else ' '} {cells}", f"{row.style} reverse" if here else row.style))
    return lines


def _fitting(section: Section, width: int) -> list[tuple[int, int]]:
    """Which columns there is room for, and how much each gets."""
    sizes = [
        max([cell_len(column.title), *(cell_len(row.cells[n]) for row in section.rows)])
        for n, column in enumerate(section.columns)
    ]
    kept = list(range(len(sizes)))
    for n in kept:
        if not section.columns[n].wide:
            sizes[n] = min(sizes[n], WIDEST)

    def room() -> int:
        """For the wide one."""
        return width - sum(sizes[n] + 2 for n in kept if not section.columns[n].wide)

    wide = next((n for n in kept if section.columns[n].wide), None)
    least = 0 if wide is None else min(sizes[wide], WIDE)
    while room() < least and len(kept) > 2:
        kept.remove(max((n for n in kept if n != wide), key=lambda n: section.columns[n].rank))
    if wide is not None:
        sizes[wide] = min(sizes[wide], max(room(), 1))
    return [(n, sizes[n]) for n in kept]


def _padded(value: str, size: int, column: Column) -> str:
    if cell_len(value) > size:
        return set_cell_size(value, size - 1) + "…"
    return " " * (size - cell_len(value)) + value if column.right else set_cell_size(value, size)


def _foot(view: View) -> Text:
    if view.typing:
        return Text.assemble(("filter: ", "bold"), view.filter, ("_", "blink"), "   enter: keep   escape: none")
    filtered = f"filter: {view.filter} (escape: none)   " if view.filter else ""
    return Text(filtered + (HELP_DETAIL if view.drills else HELP), "dim")
