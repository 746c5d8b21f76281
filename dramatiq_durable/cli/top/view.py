"""What of a look is shown, and what the keys do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ..output import cell, duration, text
from .look import Detail, Look

#: What is to be seen closely: of which kind, and which.
Drill = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column.

    Attributes:
      title(str): its head, and the name of what it shows.
      rank(int): where it is narrow, those of the highest rank go first.
      right(bool): figures.
      wide(bool): takes what room there is.
    """

    title: str
    rank: int = 1
    right: bool = False
    wide: bool = False


@dataclass(slots=True)
class Row:
    """A row.  ``key`` is what it is, whatever place it has."""

    key: str
    cells: list[str]
    style: str = ""
    drill: Drill | None = None


@dataclass(slots=True)
class Section:
    """A table of the screen; ``empty``: what it says where it has no rows."""

    name: str
    columns: list[Column]
    rows: list[Row]
    empty: str
    sort: str = ""
    total: int = 0


#: By what each section can be sorted: those with a minus have the greatest first.
SORTS = {
    "streams": ("name", "-ready", "-oldest", "-in/s", "-out/s", "-change/s", "-dead"),
    "workers": ("worker", "-oldest", "-holds", "-silent"),
    "runs": ("status", "-runs"),
    "stuck": ("worst", "-for", "what"),
    "detail": ("",),
}
SECTIONS = ("streams", "workers", "runs", "stuck")


@dataclass(slots=True)
class View:
    """What somebody looks at.

    Attributes:
      focus(str): the section that the keys are about.
      selected(dict): in each section, the key of the row that is chosen.
      drills(list): what is seen closely: each from within the one before.
      typing(bool): what is typed goes into the filter.
      helping(bool): what the keys and the columns are is shown.
    """

    focus: str = "streams"
    selected: dict[str, str] = field(default_factory=dict)
    sorts: dict[str, int] = field(default_factory=dict)
    drills: list[Drill] = field(default_factory=list)
    filter: str = ""
    typing: bool = False
    paused: bool = False
    helping: bool = False
    ended: bool = False
    sections: list[Section] = field(default_factory=list)

    def arrange(self, look: Look | None, detail: Detail | None) -> None:
        """Make the sections of what was found."""
        if self.drills:
            made = [_detail(detail)]
        elif look is None:
            made = []
        else:
            made = [make(look) for make in (_streams, _workers, _runs, _stuck)]
        self.sections = [self._chosen(section) for section in made]

    def _chosen(self, section: Section) -> Section:
        by = SORTS[section.name][self.sorts.get(section.name, 0)]
        titles = [column.title for column in section.columns]
        total, rows = len(section.rows), section.rows
        if self.filter and section.name != "runs":
            rows = [row for row in rows if any(self.filter.lower() in shown.lower() for shown in row.cells)]
        section = replace(section, rows=rows, sort=by.removeprefix("-"), total=total)
        if by.removeprefix("-") in titles:
            at = titles.index(by.removeprefix("-"))
            rows.sort(key=lambda row: _order(row, at), reverse=by.startswith("-"))
        return section

    @property
    def focused(self) -> Section | None:
        """The section that the keys are about."""
        if self.drills:
            return self.sections[0] if self.sections else None
        return next((section for section in self.sections if section.name == self.focus), None)

    def place(self, section: Section) -> int:
        """The number of the chosen row."""
        keys = [row.key for row in section.rows]
        chosen = self.selected.get(section.name)
        return keys.index(chosen) if chosen in keys else 0

    def press(self, key: str) -> None:
        """A key was pressed."""
        if self.typing:
            self._type(key)
            return
        if self.helping:
            # Whatever it is: back to what is seen.
            self.helping = False
            return
        act: Callable[[], None] | None = {
            "q": self._leave, "escape": self._back, "left": self._back, "delete": self._back, "enter": self._drill,
            "right": self._drill, "s": self._sort, "/": self._begin_filter, "p": self._pause,
            "?": self._help, "h": self._help,
            "tab": lambda: self._turn(1), "back": lambda: self._turn(-1), "j": lambda: self._move(1),
            "down": lambda: self._move(1), "k": lambda: self._move(-1), "up": lambda: self._move(-1),
            "page down": lambda: self._move(10), "page up": lambda: self._move(-10),
            "home": lambda: self._move(-1_000_000), "end": lambda: self._move(1_000_000),
        }.get(key)  # fmt: skip
        if act is not None:
            act()
        elif key in ("1", "2", "3", "4") and not self.drills:
            self.focus = SECTIONS[int(key) - 1]

    def _type(self, key: str) -> None:
        if key in ("enter", "escape"):
            self.typing = False
            self.filter = self.filter if key == "enter" else ""
        elif key == "delete":
            self.filter = self.filter[:-1]
        elif key == "clear":
            self.filter = ""
        elif len(key) == 1 and len(self.filter) < 100:
            self.filter += key

    def _begin_filter(self) -> None:
        self.typing, self.filter = True, ""

    def _pause(self) -> None:
        self.paused = not self.paused

    def _help(self) -> None:
        self.helping = True

    def _leave(self) -> None:
        if self.drills:
            self._back()
        else:
            self.ended = True

    def _back(self) -> None:
        if self.drills:
            self.drills.pop()
            self.selected.pop("detail", None)
        self.filter = ""

    def _drill(self) -> None:
        section = self.focused
        if section is None or not section.rows:
            return
        drill = section.rows[self.place(section)].drill
        if drill is not None:
            self.drills.append(drill)
            self.selected.pop("detail", None)
            self.filter = ""

    def _sort(self) -> None:
        name = "detail" if self.drills else self.focus
        self.sorts[name] = (self.sorts.get(name, 0) + 1) % len(SORTS[name])

    def _turn(self, by: int) -> None:
        if not self.drills:
            self.focus = SECTIONS[(SECTIONS.index(self.focus) + by) % len(SECTIONS)]

    def _move(self, by: int) -> None:
        section = self.focused
        if section is not None and section.rows:
            place = min(max(self.place(section) + by, 0), len(section.rows) - 1)
            self.selected[section.name] = section.rows[place].key


def _order(row: Row, at: int) -> tuple[int, Any]:
    value = getattr(row.cells[at], "value", row.cells[at])
    return (0, 0.0) if value is None else (1, value)


class _Cell(str):
    """What a cell shows; ``value``: what it is sorted by."""

    value: Any = None


def _cell(value: Any, shown: str | None = None) -> str:
    plain = text(cell(value) if shown is None else shown).plain
    # One line; what is indented, as a traceback is, stays so.
    made = _Cell(" " * (len(plain) - len(plain.lstrip(" "))) + " ".join(plain.split()))
    made.value = value if isinstance(value, (int, float)) or value is None else str(made)
    return made


def _ago(seconds: float | None) -> str:
    return _cell(seconds, "" if seconds is None else duration(seconds))


def rate(value: float | None, *, signed: bool = False) -> str:
    """Something a second, as a person reads it; empty where it is not known."""
    if value is None:
        return ""
    plus = "+" if signed and value > 0 else ""
    return f"{plus}{value:.1f}" if 0 < abs(value) < 10 else f"{plus}{value:.0f}"


def _streams(look: Look) -> Section:
    columns = [
        Column("name", wide=True), Column("ready", 1, True), Column("leased", 2, True), Column("delayed", 6, True),
        Column("dead", 3, True), Column("oldest", 1, True), Column("in/s", 2, True), Column("out/s", 2, True),
        Column("change/s", 7, True), Column("dead/s", 8, True), Column("workers", 4, True), Column("paused", 5),
    ]  # fmt: skip
    rows = []
    for s in look.streams:
        cells = [
            _cell(s["name"]), _cell(s["ready"]), _cell(s["leased"]), _cell(s["delayed"]), _cell(s["dead"]),
            _ago(s["oldest"]), _cell(s["in_rate"], rate(s["in_rate"])), _cell(s["out_rate"], rate(s["out_rate"])),
            _cell(s["change_rate"], rate(s["change_rate"], signed=True)), _cell(s["dead_rate"], rate(s["dead_rate"])),
            _cell(s["workers"]), _cell("paused" if s["paused"] else ""),
        ]  # fmt: skip
        bad = (s["ready"] and not s["workers"]) or s["dead_rate"]
        rows.append(Row(s["name"], cells, "red" if bad else "yellow" if s["paused"] else "", ("stream", s["name"])))
    return Section("streams", columns, rows, "there are no streams yet")


def _workers(look: Look) -> Section:
    columns = [
        Column("worker", 0, True), Column("state", 0), Column("host", wide=True), Column("pid", 4, True),
        Column("threads", 5, True), Column("holds", 1, True), Column("oldest", 1, True), Column("silent", 2, True),
        Column("up", 6, True), Column("streams", 3), Column("login", 7),
    ]  # fmt: skip
    rows = []
    for w in look.workers:
        up = look.at - w["started_at"].timestamp()
        streams = w["streams"]
        shown = ", ".join(streams[:3]) + (f" and {len(streams) - 3} more" if len(streams) > 3 else "")
        cells = [
            _cell(w["worker_id"]), _cell(w["state"]), _cell(w["host"]), _cell(w["pid"]), _cell(w["threads"]),
            _cell(w["holds"]), _ago(w["oldest"]), _ago(w["silent"]), _ago(up), _cell(shown), _cell(w["login"]),
        ]  # fmt: skip
        key = str(w["worker_id"])
        # A worker is heard of every few seconds: the rest of its reclaim delay is for hiccups.
        quiet = w["silent"] > min(w["reclaim_delay"] / 2, 10)
        rows.append(Row(key, cells, "red" if w["state"] == "silent" else "yellow" if quiet else "", ("worker", key)))
    return Section("workers", columns, rows, "no worker is registered")


def _runs(look: Look) -> Section:
    rows = [
        Row(status, [_cell(status), _cell(count)], drill=("runs", status))
        for status, count in look.runs.items()
        if count
    ]
    return Section("runs", [Column("status", wide=True), Column("runs", 0, True)], rows, "there are no runs yet")


def _stuck(look: Look) -> Section:
    columns = [
        Column("what", 0), Column("name", 0), Column("count", 2, True), Column("for", 1, True),
        Column("detail", wide=True),
    ]  # fmt: skip
    rows = [
        Row(
            f"{line['what']} {line['name']} {line['drill']} {line['detail']}",
            [_cell(line["what"]), _cell(line["name"]), _cell(line["count"]), _ago(line["for"]), _cell(line["detail"])],
            "red" if line["bad"] else "yellow",
            line["drill"],
        )
        for line in look.stuck
    ]
    return Section("stuck", columns, rows, "nothing is slow or stuck")


def _detail(detail: Detail | None) -> Section:
    if detail is None:
        return Section("detail", [], [], "...")
    ages = {"for", "due"}
    # Figures, and times: half of one says nothing.
    right = {"for", "due", "attempt", "worker", "events", "number", "started", "next attempt"}
    # Ids are long, and say least.
    ranks = {"message": 9, "run": 9, "started": 8, "next attempt": 7, "worker": 6, "events": 5, "attempt": 4}
    columns = [
        Column(name, ranks.get(name, 1), name in right, name == detail.columns[-1] and name != "run")
        for name in detail.columns
    ]
    rows = []
    for number, row in enumerate(detail.rows):
        cells = [_ago(row[name]) if name in ages else _cell(row[name]) for name in detail.columns]
        rows.append(Row(str(row[detail.columns[0]] or number), cells, drill=row.get("drill")))
    return Section("detail", columns, rows, detail.note)


def shown_fact(value: Any) -> str:
    """A fact of a closer look."""
    said = f"{cell(value)} {value.astimezone():%Z}" if isinstance(value, datetime) else cell(value)
    return " ".join(text(said).plain.split())
