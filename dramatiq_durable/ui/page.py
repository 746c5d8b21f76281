"""What all pages are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from ..broker import DurableBroker
from ..cli.output import duration, plain
from ..cli.target import Target
from .html import Child, Html, link, tag

T = TypeVar("T")

PAGES = {
    "/runs": "Runs",
    "/streams": "Streams",
    "/dead-letters": "Dead letters",
    "/workers": "Workers",
    "/schedules": "Schedules",
    "/escalations": "Escalations",
}

#: Of a value, so many characters are shown; of one among many, so many.
MOST, LESS = 20_000, 4_000

#: Of a text in a table, so many.
SHORT = 300

#: Of what is not read in pages, so many are on one.
SLICE = 200

GOOD = frozenset({"completed", "live", "resolved", "active"})
BAD = frozenset({"failed", "timed_out", "terminated", "silent", "poison", "rejected", "unsettled"})
OPEN = frozenset({"running", "waiting", "claimed", "paused", "delayed", "leased"})


@dataclass(frozen=True)
class View:
    """What a page is asked for, and by whom."""

    target: Target
    allow_actions: bool
    form_token: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    form: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def broker(self) -> DurableBroker:
        return self.target.broker

    def given(self, name: str) -> str | None:
        """A parameter of the address; None where it is missing or empty."""
        return self.query.get(name, "").strip() or None

    def number(self, name: str) -> int | None:
        """As `given`, a whole number.  Raises BadRequest."""
        text = self.given(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and int(text) < 2**63):
            raise BadRequest(f"{name} is a whole number, not {text!r:.60}")
        return int(text)

    def filled(self, name: str) -> str:
        """A field of the form; empty where it is missing."""
        return self.form.get(name, [""])[0].strip()


class BadRequest(Exception):
    """What was asked for makes no sense; the text says why."""


class Missing(Exception):
    """There is nothing like that."""


@dataclass(frozen=True)
class Page:
    """A page's content; ``here`` is the address of the part that it belongs to."""

    title: str
    body: Child
    here: str
    status: int = 200


@dataclass(frozen=True)
class Go:
    """On to another page, after something was done."""

    address: str


def document(page: Page, view: View) -> str:
    """A whole page."""
    # Who has not given the token yet learns no names.
    namespace = view.target.namespace if page.here else "dramatiq-durable"
    items = [
        tag("li", tag("a", name, href=path, aria_current="page" if path == page.here else None))
        for path, name in PAGES.items()
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{page.title} · {namespace}"),
        tag("link", rel="stylesheet", href="/style.css"),
        tag("link", rel="icon", href="/icon.svg"),
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", class_="skip", href="#content"),
        tag(
            "header",
            tag("strong", namespace),
            tag("nav", tag("ul", items), aria_label="Pages") if page.here else None,
            tag("span", "actions are allowed" if view.allow_actions else "read-only", class_="soft")
            if page.here
            else None,
        ),
        tag("main", tag("h1", page.title), page.body, id="content", tabindex="-1"),
    )
    return "<!doctype html>" + tag("html", head, body, lang="en")


# --- parts ------------------------------------------------------------------------------------------------------


def table(label: str, columns: Sequence[str], rows: Iterable[Sequence[Child]], empty: str) -> Html:
    """A table that scrolls by itself where it is too wide; a column's name that begins with # is one of numbers.

    On a narrow screen each row is a card, whose cells have their column's name beside them.  The roles say what a table
    is otherwise: browsers forget it where it is not laid out as one.
    """
    names = [column.lstrip("#") for column in columns]
    body = [
        tag("tr", [
            tag("td", cell, role="cell", class_=_class(column), data_name=name)
            for column, name, cell in zip(columns, names, row, strict=True)
        ], role="row")
        for row in rows
    ]  # fmt: skip
    if not body:
        return tag("p", empty)
    head = tag("tr", [
        tag("th", name, scope="col", role="columnheader", class_=_class(column))
        for column, name in zip(columns, names, strict=True)
    ], role="row")  # fmt: skip
    whole = tag(
        "table",
        tag("caption", label, class_="unseen"),
        tag("thead", head, role="rowgroup"),
        tag("tbody", body, role="rowgroup"),
        role="table",
    )
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def _class(column: str) -> str | None:
    return "number" if column.startswith("#") else {"when": "bar", "choose": "choose"}.get(column)


def facts(*pairs: tuple[str, Child]) -> Html:
    """What is known of one thing; what is None is left out."""
    return tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in pairs if value not in (None, "")])


def moment(at: datetime | None) -> Child:
    if at is None:
        return None
    at = at.astimezone(UTC)
    return tag("time", f"{at:%Y-%m-%d %H:%M:%S} UTC", datetime=at.isoformat())


def ago(at: datetime | None) -> Child:
    """A time, and how far it is away."""
    if at is None:
        return None
    seconds = (datetime.now(UTC) - at).total_seconds()
    return [moment(at), " (", f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}", ")"]


def lasted(value: float) -> str:
    """Seconds as text; what is short in milliseconds."""
    return f"{max(round(value * 1000), 0)} ms" if value < 1 else duration(value)


def seconds(value: float | None) -> Child:
    return None if value is None else tag("span", lasted(value), class_="keep")


def state(name: str) -> Html:
    """A status: its word, and a colour that says no more than the word."""
    kind = "good" if name in GOOD else "bad" if name in BAD else "open" if name in OPEN else "soft"
    return tag("span", name.replace("_", " "), class_=f"state {kind}")


def value(given: Any, most: int = MOST) -> Html:
    """A value as JSON, in lines; of a large one no more is written than is shown."""
    parts: list[str] = []
    length = 0
    try:
        for part in _JSON.iterencode(given):
            parts.append(part)
            length += len(part)
            if length > most:
                break
    except (TypeError, ValueError, RecursionError):
        # Keys that are no text, or a thing in a thing in a thing: only another encoder than ours makes that.
        return block(f"{''.join(parts)[:most]}\n… what follows cannot be shown as JSON: the command line shows it")
    return block("".join(parts), most)


_JSON = json.JSONEncoder(indent=2, ensure_ascii=False, default=lambda other: str(plain(other)))


def block(text: str, most: int = MOST) -> Html:
    """Text with lines of its own."""
    cut = text if len(text) <= most else f"{text[:most]}\n… cut off: the command line shows all"
    return tag("pre", cut, tabindex="0")


def short(text: str | None) -> str | None:
    """Text of a line, which may be anything."""
    return text if text is None or len(text) <= SHORT else text[: SHORT - 1] + "…"


def section(title: str, *children: Child) -> Html:
    return tag("section", tag("h2", title), children)


def box(*children: Child, bad: bool = False) -> Html:
    """Something to be read first."""
    return tag("div", children, class_="box bad" if bad else "box", role="alert" if bad else "status")


def field_(
    label: str, name: str, given: str | None, *, id: str | None = None, wide: bool = False, **attributes: Any
) -> Html:
    """A line to fill in, with its label; ``id`` tells it from others of its name on the page."""
    put = tag("input", id=id or name, name=name, value=given or "", **attributes)
    return tag("div", tag("label", label, for_=id or name), put, class_="wide" if wide else None)


def choice(
    label: str, name: str, options: Sequence[str] | Mapping[str, str], given: str | None, none: str = "any"
) -> Html:
    """One of several; a mapping says what each is called."""
    called = options if isinstance(options, Mapping) else {option: option.replace("_", " ") for option in options}
    items = [tag("option", none, value="")] if none else []
    items += [tag("option", text, value=option, selected=option == given) for option, text in called.items()]
    return tag("div", tag("label", label, for_=name), tag("select", items, id=name, name=name))


def filters(path: str, *fields: Child) -> Html:
    """A form that asks for other things; it changes nothing."""
    return tag("form", fields, tag("button", "Show"), action=path, class_="filters", role="search")


def action(view: View, path: str, button: str, *fields: Child, **attributes: Any) -> Html:
    """A form that does something: with the token, and only where actions are allowed."""
    if not view.allow_actions:
        return Html("")
    hidden = tag("input", type="hidden", name="form_token", value=view.form_token)
    return tag("form", hidden, fields, tag("button", button), action=path, method="post", class_="act", **attributes)


def pager(
    path: str,
    query: Mapping[str, str | int | None],
    cursor: str,
    first: bool,
    next: str | int | None,
    last: int | None = None,
) -> Html:
    """Ways to the first and to the next page, and to the last where that is known."""
    links = [] if first else [link("First page", path, **query)]
    links += [] if next is None else [link("Next page", path, **query, **{cursor: next})]
    links += [] if next is None or last is None else [link("Last page", path, **query, **{cursor: last})]
    return tag("nav", links, class_="more", aria_label="More of the list") if links else Html("")


def sliced(view: View, path: str, all: Sequence[T]) -> tuple[Sequence[T], Html]:
    """A page of what was read as a whole, and the ways to the others; ``from`` says where it begins."""
    begin = view.number("from") or 0
    shown = all[begin : begin + SLICE]
    next = begin + SLICE if begin + SLICE < len(all) else None
    return shown, pager(path, {}, "from", begin == 0, next)


Handler = Callable[[View], Page | Go]
