"""What was found: rows with a target beside the result, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
import operator
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

SIGNS = {"≥": operator.ge, "≤": operator.le}


@dataclass(frozen=True)
class Target:
    """What is asked of a value: ``Target("≥", 0.75)``."""

    sign: str
    bound: float

    def met(self, value: float) -> bool:
        return bool(SIGNS[self.sign](value, self.bound))


def at_least(bound: float) -> Target:
    return Target("≥", bound)


def at_most(bound: float) -> Target:
    return Target("≤", bound)


@dataclass
class Row:
    """One finding.

    Attributes:
      what(str): what was measured.
      value(float | None): the figure that is judged and travels between machines, a ratio or a count.
      target(Target | None): what is asked of it.
      figures(dict): what was measured on this machine, by heading.
    """

    what: str
    value: float | None = None
    target: Target | None = None
    figures: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.target is None or self.value is None else self.target.met(self.value)


@dataclass
class Table:
    """The answer to one question."""

    name: str
    title: str
    heading: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, value: float | None = None, target: Target | None = None, **figures: float | str) -> None:
        self.rows.append(Row(what, value, target, {name.replace("_", " "): f for name, f in figures.items()}))

    def render(self) -> RichTable:
        columns = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        table = RichTable(
            title=self.title,
            title_justify="left",
            title_style="bold",
            caption="\n".join(self.notes) or None,
            caption_justify="left",
        )
        table.add_column("")
        table.add_column(self.heading, justify="right")
        table.add_column("target")
        for heading in columns:
            table.add_column(heading, justify="right")
        for row in self.rows:
            asked = Text(f"{row.target.sign} {row.target.bound:<6,g} " if row.target else "")
            asked.append(*{None: ("", ""), True: ("ok", "green"), False: ("missed", "bold red")}[row.met])
            table.add_row(row.what, number(row.value), asked, *(number(row.figures.get(name)) for name in columns))
        return table


def number(value: float | str | None) -> str:
    """A figure with as many digits as mean something."""
    if value is None or isinstance(value, str):
        return value or ""
    if value == 0 or abs(value) >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.4f}"


class Report:
    """All tables of a run, printed as they come unless they are wanted as JSON."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.tables: list[Table] = []
        self.console = Console(stderr=as_json)
        if not self.console.is_terminal:
            self.console.width = 130

    def show(self, table: Table) -> None:
        self.tables.append(table)
        if not self.as_json:
            self.console.print(table.render())
            self.console.print()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)

    def missed(self) -> list[str]:
        return [f"{table.title}: {row.what}" for table in self.tables for row in table.rows if row.met is False]

    def finish(self, about: Mapping[str, Any]) -> None:
        """Print what is left to be said."""
        judged = [row for table in self.tables for row in table.rows if row.met is not None]
        if self.as_json:
            found = [{**asdict(table), "rows": [_row(row) for row in table.rows]} for table in self.tables]
            print(json.dumps({"about": about, "tables": found, "missed": self.missed()}, indent=2, ensure_ascii=False))
        elif judged:
            self.console.print(f"{len(judged) - len(self.missed())} of {len(judged)} targets are met.")
            for what in self.missed():
                self.console.print(f"  missed: {what}")


def _row(row: Row) -> dict[str, Any]:
    return {**asdict(row), "met": row.met}


def machine() -> dict[str, Any]:
    """Where and amid what it is measured."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """The value below or at which so many percent of the sorted values are."""
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * percent / 100))]
