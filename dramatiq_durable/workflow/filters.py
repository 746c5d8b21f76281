"""The language of ``where``: text to conditions, and conditions to what the database is asked.

    status = 'running' and (search.region in ('eu', 'us') or entity.customer.tier >= 2) and not name like 'test-%'

Every condition is true or false.  A comparison with something that is missing, or of another type, is false; ``!=`` is
true wherever ``=`` is false, and ``not`` turns any condition over; ``= null`` is true of what is missing or null.

What is asked of columns goes to the database as parameters of their types, so that it finds the rows by an index; what
is asked of search attributes and entities as jsonpath, an expression language that knows nothing but the value it is
given.  No part of a filter ever becomes SQL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from ..errors import InvalidFilter
from .attributes import time_text

MAX_LENGTH: Final = 10_000
"""How many characters a filter may have."""

MAX_DEPTH: Final = 50
"""How deep parentheses and ``not`` may be nested."""

TEXTS = ("workflow_id", "run_id", "name", "status", "queue_name", "parent_id")
TIMES = ("started_at", "closed_at")
STATUSES = ("running", "completed", "failed", "cancelled", "terminated", "timed_out", "continued_as_new")
_FIELDS = f"the fields are {', '.join(TEXTS + TIMES)}, search.NAME and entity.PATH"

Literal = str | int | float | bool | None


# --- conditions ------------------------------------------------------------------------------------------
@dataclass(slots=True, frozen=True)
class Field:
    """What is compared: a column, or (``root`` search or entity) what lies at a path."""

    root: str
    path: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class Comparison:
    """``field op value``; the value of ``in`` is a tuple."""

    field: Field
    op: str
    value: Any


@dataclass(slots=True, frozen=True)
class All:
    """Every one of these."""

    parts: tuple[Condition, ...]


@dataclass(slots=True, frozen=True)
class Some:
    """At least one of these."""

    parts: tuple[Condition, ...]


@dataclass(slots=True, frozen=True)
class Not:
    """Not this."""

    part: Condition


Condition = Comparison | All | Some | Not


# --- text to conditions ----------------------------------------------------------------------------------
class _Token(NamedTuple):
    kind: str
    text: str
    at: int


_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<text>'(?:[^']|'')*')
    |(?P<number>-?(?:0|[1-9][0-9]{0,99})(?:\.[0-9]{1,100})?(?:[eE][+-]?[0-9]{1,4})?(?![\w.]))
    |(?P<name>[^\W\d][\w-]*(?:\.(?:[\w-]+|"(?:[^"]|"")+"))*)
    |(?P<op>!=|<=|>=|=|<|>)
    |(?P<mark>[(),])""",
    re.VERBOSE,
)
_WORDS = ("and", "or", "not", "in", "like", "true", "false", "null")
_OPS = ("=", "!=", "<", "<=", ">", ">=", "in", "like")


def parse(where: str) -> Condition:
    """Read a filter.

    Raises:
      InvalidFilter: it makes no sense; the error says where, and what was expected.
    """
    if not isinstance(where, str):
        raise InvalidFilter(f"a filter is text such as \"status = 'running'\", not {where!r:.60}.", 0)
    if len(where) > MAX_LENGTH:
        raise InvalidFilter(f"a filter has at most {MAX_LENGTH:,} characters, not {len(where):,}.", MAX_LENGTH)
    return _Parser(where).parse()


class _Parser:
    def __init__(self, where: str) -> None:
        self._where = where
        self._tokens = list(self._split())
        self._next = 0
        self._depth = 0

    def _split(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._where):
            found = _TOKEN.match(self._where, at)
            if found is None:
                raise self._error(at, self._unreadable(at))
            kind = found.lastgroup or ""
            text = found.group()
            if kind == "name" and text.lower() in _WORDS:
                kind, text = "word", text.lower()
            if kind != "space":
                yield _Token(kind, text, at)
            at = found.end()
        yield _Token("end", "", len(self._where))

    def _unreadable(self, at: int) -> str:
        rest = self._where[at:]
        if rest[0] == "'":
            return "this text has no end: put a quote behind it (a quote within is doubled: 'it''s')"
        if rest[0] == '"':
            return "text stands in single quotes: 'text'"
        if rest.startswith(("<>", "==", "&&", "||", "~")):
            return "there is no such operator: there are = != < <= > >= in like, and, or, not"
        if rest[0].isdigit() or rest[0] in "-.":
            return "this is no number; times and ids are texts in single quotes"
        return f"{rest[0]!r} has no meaning here"

    def _error(self, at: int, what: str) -> InvalidFilter:
        begin = self._where.rfind("\n", 0, at) + 1
        line = self._where[begin:].split("\n", 1)[0]
        shown = line[max(0, at - begin - 60) : at - begin + 60]
        caret = " " * min(at - begin, 60)
        return InvalidFilter(f"at character {at + 1} of the filter, {what}:\n  {shown}\n  {caret}^", at)

    def _peek(self, *texts: str) -> bool:
        token = self._tokens[self._next]
        return token.kind in ("word", "op", "mark") and token.text in texts

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def _expect(self, text: str) -> None:
        token = self._take()
        if token.kind != "mark" or token.text != text:
            raise self._error(token.at, f"{text!r} is missing")

    def parse(self) -> Condition:
        condition = self._some()
        token = self._take()
        if token.kind != "end":
            raise self._error(token.at, "the filter should end here, or go on with `and` or `or`")
        return condition

    def _some(self) -> Condition:
        return self._chain("or", self._all, Some)

    def _all(self) -> Condition:
        return self._chain("and", self._not, All)

    def _chain(
        self, word: str, part: Callable[[], Condition], make: Callable[[tuple[Condition, ...]], Condition]
    ) -> Condition:
        parts = [part()]
        while self._peek(word):
            self._take()
            parts.append(part())
        return parts[0] if len(parts) == 1 else make(tuple(parts))

    def _not(self) -> Condition:
        if not self._peek("not", "("):
            return self._comparison()
        token = self._take()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(token.at, f"this is nested more than {MAX_DEPTH} deep")
        if token.text == "not":
            condition: Condition = Not(self._not())
        else:
            condition = self._some()
            self._expect(")")
        self._depth -= 1
        return condition

    def _comparison(self) -> Condition:
        token = self._take()
        if token.kind != "name":
            raise self._error(token.at, f"a field is missing; {_FIELDS}")
        field = self._field(token)
        op = self._take()
        if op.text not in _OPS or op.kind not in ("op", "word"):
            raise self._error(op.at, f"an operator is missing: one of {' '.join(_OPS)}")
        if op.text == "in":
            self._expect("(")
            values = [self._literal(field, "in")]
            while self._peek(","):
                self._take()
                values.append(self._literal(field, "in"))
            self._expect(")")
            return Comparison(field, "in", tuple(values))
        return Comparison(field, op.text, self._literal(field, op.text))

    def _field(self, token: _Token) -> Field:
        root, *rest = _segments(token.text)
        if root in TEXTS + TIMES and not rest:
            return Field(root)
        if root == "search" and len(rest) == 1:
            return Field(root, tuple(rest))
        if root == "entity" and rest:
            return Field(root, tuple(rest))
        if root == "search":
            raise self._error(token.at, "a search attribute is search.NAME, one name without dots")
        if root == "entity":
            raise self._error(token.at, "what lies in an entity is entity.PATH, such as entity.customer.name")
        raise self._error(token.at, f"there is no field {token.text!r}; {_FIELDS}")

    def _literal(self, field: Field, op: str) -> Literal:
        token = self._take()
        value: Literal
        if token.kind == "text":
            value = token.text[1:-1].replace("''", "'")
            if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
                raise self._error(token.at, "a text cannot have a NUL or half a surrogate pair")
        elif token.kind == "number":
            value = float(token.text) if set(token.text) & set(".eE") else int(token.text)
            if value in (float("inf"), float("-inf")):
                raise self._error(token.at, "this number is too large")
        elif token.kind == "word" and token.text in ("true", "false", "null"):
            value = {"true": True, "false": False, "null": None}[token.text]
        else:
            raise self._error(token.at, "a value is missing: 'text', a number, true, false or null")
        self._check(field, op, value, token.at)
        return value

    def _check(self, field: Field, op: str, value: Literal, at: int) -> None:
        """What a column cannot be compared with is a mistake; search attributes and entities may be anything."""
        if op == "like" and not isinstance(value, str):
            raise self._error(at, "what `like` compares with is a text, such as 'order-%'")
        if value is None:
            if op not in ("=", "!=", "in"):
                raise self._error(at, f"null is neither more nor less than anything: use = or !=, not {op}")
        elif field.root in TEXTS and not isinstance(value, str):
            raise self._error(at, f"{field.root} is text: put the value in single quotes")
        elif field.root == "status" and op in ("=", "!=", "in") and value not in STATUSES:
            raise self._error(at, f"a status is one of {', '.join(STATUSES)}")
        elif field.root in TIMES and op == "like":
            raise self._error(at, f"{field.root} is a time: use < <= > >=")
        elif field.root in TIMES and time_of(value) is None:
            raise self._error(at, f"{field.root} is a time: write '2026-01-31' or '2026-01-31T12:00:00Z', in quotes")


def _segments(name: str) -> list[str]:
    found = re.findall(r'"((?:[^"]|"")+)"|([^."]+)', name)
    return [quoted.replace('""', '"') if quoted else plain for quoted, plain in found]


def time_of(value: Literal) -> datetime | None:
    """The time that a text means (UTC, where it names no zone), or None."""
    if not isinstance(value, str) or len(value) < 10 or value[4:5] != "-":
        return None
    try:
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


# --- conditions to what the database is asked ------------------------------------------------------------
def compiled(condition: Condition | None) -> dict[str, Any]:
    """What ``list_workflows`` and ``count_workflows`` in SQL take as their filter."""
    filter: dict[str, Any] = {}
    asked: dict[str, list[str]] = {"search": [], "entity": [], "rest": []}
    uses: set[str] = set()
    parts = () if condition is None else _flat(condition)
    for part in parts:
        if isinstance(part, Comparison) and _by_column(part, filter):
            continue
        roots = {field.root for field in _fields(part)}
        if len(roots) == 1 and roots <= {"search", "entity"} and not _holds_of_nothing(part):
            asked[next(iter(roots))].append(_jsonpath(part, "$"))
        else:
            asked["rest"].append(_jsonpath(part, None))
            uses |= {_USES[root] for root in roots if root in _USES}
    for name, paths in asked.items():
        if paths:
            filter[name] = " && ".join(paths)
    if asked["rest"]:
        filter["uses"] = sorted(uses)
    return filter


#: What a condition asks of that costs something to come by.
_USES = {"search": "search", "entity": "entity", "parent_id": "parent", "started_at": "times", "closed_at": "times"}


def _flat(condition: Condition) -> Iterator[Condition]:
    if isinstance(condition, All):
        for part in condition.parts:
            yield from _flat(part)
    elif isinstance(condition, Not) and isinstance(condition.part, Comparison) and condition.part.op == "=":
        yield Comparison(condition.part.field, "!=", condition.part.value)
    else:
        yield condition


def _fields(condition: Condition) -> Iterator[Field]:
    if isinstance(condition, Comparison):
        yield condition.field
    elif isinstance(condition, Not):
        yield from _fields(condition.part)
    else:
        for part in condition.parts:
            yield from _fields(part)


#: Columns that the database takes a value, or a list of them, for.
_ONE = {"status": "status", "name": "name", "workflow_id": "workflow_id"}
_MANY = {
    "status": "statuses",
    "name": "names",
    "workflow_id": "workflow_ids",
    "queue_name": "queues",
    "run_id": "run_ids",
    "parent_id": "parents",
}
_LIKE = {"workflow_id": "workflow_like", "name": "name_like"}


def _by_column(part: Comparison, filter: dict[str, Any]) -> bool:
    """Ask for it by a column, if there is a way and it is free."""
    root, op = part.field.root, part.op
    if root == "started_at" and op != "!=" and op != "in" and part.value is not None:
        return _by_start(op, part.value, filter)
    if op == "like" and root in _LIKE and _LIKE[root] not in filter:
        filter[_LIKE[root]] = "".join(
            "\\" + p[1] if len(p) == 2 and p[1] in "%_\\" else p[-1] for p in _pattern(part.value)
        )
        return True
    if root == "status" and op == "!=" and part.value is not None:
        op, part = "in", Comparison(part.field, "in", tuple(s for s in STATUSES if s != part.value))
    if op not in ("=", "in") or root not in _MANY:
        return False
    values = [part.value] if op == "=" else list(part.value)
    if None in values:
        return False
    if root == "run_id":
        values = [str(id) for value in values if (id := _uuid(value)) is not None]
    place = _ONE[root] if len(values) == 1 and root in _ONE else _MANY[root]
    if place in filter:
        return False
    filter[place] = values[0] if place in _ONE.values() else values
    return True


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


TICK = timedelta(microseconds=1)


def _by_start(op: str, value: str, filter: dict[str, Any]) -> bool:
    at = time_of(value)
    assert at is not None
    try:
        since = {">=": at, ">": at + TICK, "=": at}.get(op)
        before = {"<": at, "<=": at + TICK, "=": at + TICK}.get(op)
    except OverflowError:  # the last of all times
        return False
    if since is not None:
        filter["since"] = max(filter.get("since", ""), _zoned(since))
    if before is not None:
        filter["before"] = min(filter.get("before", "~"), _zoned(before))
    return True


def _zoned(at: datetime) -> str:
    return time_text(at) + "+00:00"


def _prefix_of(pattern: str) -> str | None:
    """What a text must begin with to match, if that is all that the pattern says."""
    parts = list(_pattern(pattern))
    if parts and parts[-1] == "%" and all(len(p) == 2 for p in parts[:-1]):
        return "".join(p[1] for p in parts[:-1])
    return None


def _pattern(pattern: str) -> Iterator[str]:
    r"""The parts of a pattern: ``%``, ``_``, and any other character (also ``\%``, ``\_``, ``\\``) behind an ``=``."""
    characters = iter(pattern)
    for c in characters:
        if c == "\\":
            yield "=" + next(characters, "\\")
        else:
            yield c if c in "%_" else "=" + c


def _holds_of_nothing(condition: Condition) -> bool:
    """Whether a run without any search attributes or entity meets it."""
    if isinstance(condition, All):
        return all(map(_holds_of_nothing, condition.parts))
    if isinstance(condition, Some):
        return any(map(_holds_of_nothing, condition.parts))
    if isinstance(condition, Not):
        return not _holds_of_nothing(condition.part)
    if condition.op == "in":
        return None in condition.value
    return (condition.value is None) == (condition.op == "=") and condition.op in ("=", "!=")


# --- jsonpath --------------------------------------------------------------------------------------------
def _jsonpath(condition: Condition, root: str | None) -> str:
    """A condition as a predicate; ``root`` is where its paths begin, or None for all that is known of a run.

    Whatever a comparison comes upon, ``exists`` makes it true or false.
    """
    if isinstance(condition, (All, Some)):
        sign = " && " if isinstance(condition, All) else " || "
        return "(" + sign.join(_jsonpath(part, root) for part in condition.parts) + ")"
    if isinstance(condition, Not):
        return f"(!({_jsonpath(condition.part, root)}))"
    field, op, value = condition.field, condition.op, condition.value
    names = field.path if root is not None else (field.root, *field.path)
    path = "$" + "".join(f".{_quoted(name)}" for name in names)
    if op == "!=":
        return f"(!({_jsonpath(Comparison(field, '=', value), root)}))"
    values = value if op == "in" else (value,)
    tests = [_test(field, "==" if op in ("=", "in") else op, v) for v in values if v is not None]
    found = [f"exists({path} ? ({' || '.join(tests)}))"] if tests else []
    if None in values:
        found += [f"!exists({path})", f"exists({path} ? (@ == null))"]
    return "(" + " || ".join(f"({f})" for f in found) + ")"


def _test(field: Field, op: str, value: Any) -> str:
    if op == "like":
        prefix = _prefix_of(value)
        if prefix is not None:
            return f"@ starts with {_quoted(prefix)}"
        return f'@ like_regex {_quoted(_regex(value))} flag "s"'
    if isinstance(value, bool):
        return f"@ {op} {'true' if value else 'false'}"
    if not isinstance(value, str):
        return f"@ {op} {value!r}"
    at = time_of(value)
    if field.root in TIMES and at is not None:
        return f"@ {op} {_quoted(time_text(at))}"
    if field.root == "search" and at is not None:
        return f"@ {op} {_quoted(value)} || @.time {op} {_quoted(time_text(at))}"
    return f"@ {op} {_quoted(value)}"


def _regex(pattern: str) -> str:
    signs = {"%": ".*", "_": "."}
    parts = [
        signs.get(p) or (f"\\{p[1]}" if p[1].isascii() and not p[1].isalnum() else p[1]) for p in _pattern(pattern)
    ]
    return "^" + "".join(parts) + "$"


def _quoted(text: str) -> str:
    return json.dumps(text)
