"""How the commands print: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

#: Width of a table where nobody looks at a screen: wide enough for lines not to be cut.
UNBOUNDED = 240

#: How deep values are shown: whoever may send something may nest it deeper than can be written.
DEEPEST = 100


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: times in ISO 8601 (UTC), bytes as text.  What is nested deeper than 100 is left out."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth + 1) for k, v in value.items()} if depth < DEEPEST else "{...}"
    if isinstance(value, (list, tuple)):
        return [plain(v, depth + 1) for v in value] if depth < DEEPEST else "[...]"
    return value


def facts_of(thing: Any) -> Any:
    """A dataclass's fields by their names, and those of what it is made of; values stay as they are, however deep."""
    if dataclasses.is_dataclass(thing):
        return {field.name: facts_of(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
    if isinstance(thing, list):
        return [facts_of(part) if dataclasses.is_dataclass(part) else part for part in thing]
    return thing


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(plain(value), indent=2, default=str))


def print_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool, empty: str, limit: int | None = None
) -> None:
    """Print a listing.

    Parameters:
      rows(Sequence): what was found.
      columns(Sequence): which of it a table shows; JSON has everything.
      as_json(bool): print JSON.
      empty(str): what a table says where there is nothing.
      limit(int | None): how many rows were asked for; where so many came, a table says that there may be more.
    """
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(empty)
        return
    table = make_table([column.replace("_", " ") for column in columns])
    for row in rows:
        table.add_row(*(text(cell(row.get(column))) for column in columns))
    print_table(table)
    if len(rows) == limit:
        click.echo(f"no more than {limit} shown: see --limit")


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one thing: a line for each of its facts."""
    if as_json:
        print_json(facts)
        return
    table = make_table(["", ""], header=False)
    for name, value in facts.items():
        shown = f"{cell(value)} {value.astimezone():%Z}" if isinstance(value, datetime) else cell(value)
        table.add_row(text(name.replace("_", " ")), text(shown))
    print_table(table)


def make_table(columns: Sequence[str], *, header: bool = True) -> Any:
    """A table whose cells are never cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if header else None, show_header=header, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(table: Any) -> None:
    """Print a table, as wide as the screen, or as it needs where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else UNBOUNDED, highlight=False).print(table)


def text(value: str) -> Any:
    """Text as it is: nothing in it is markup, and no control character reaches the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in value))


def cell(value: Any) -> str:
    """A value as a person reads it; times in the local time zone."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, timedelta):
        return duration(value.total_seconds())
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    if isinstance(value, (dict, list)):
        return json.dumps(plain(value), default=str) if value else ""
    return str(plain(value))


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``0.4s``, ``12s``, ``3m 20s``, ``2d 4h``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    left, parts = int(seconds), []
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
