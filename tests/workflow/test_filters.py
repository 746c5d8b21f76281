"""The language of filters: what it reads, what it refuses and where, and that the database means the same by it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dramatiq_durable as durable
from dramatiq_durable.workflow.attributes import check_search
from dramatiq_durable.workflow.filters import All, Comparison, Condition, Field, Not, Some, compiled, parse, time_of
from dramatiq_durable.workflow.listing import _page
from tests.support.scoped import looking

S, E = (lambda *path: Field("search", path)), (lambda *path: Field("entity", path))


@pytest.mark.parametrize(
    ("where", "condition"),
    [
        ("status = 'running'", Comparison(Field("status"), "=", "running")),
        ("  search.x!=-1.5e3 ", Comparison(S("x"), "!=", -1500.0)),
        ("search.x = 'it''s'", Comparison(S("x"), "=", "it's")),
        ("entity.a.b IN (1, 'x', TRUE, null)", Comparison(E("a", "b"), "in", (1, "x", True, None))),
        ('entity."odd key"."a.b" = 1', Comparison(E("odd key", "a.b"), "=", 1)),
        ('entity."say ""hi""" = 1', Comparison(E('say "hi"'), "=", 1)),
        ("entity.a-b.0 = false", Comparison(E("a-b", "0"), "=", False)),
        (
            "search.a = 1 or search.b = 2 and not search.c = 3",
            Some(
                (
                    Comparison(S("a"), "=", 1),
                    All((Comparison(S("b"), "=", 2), Not(Comparison(S("c"), "=", 3)))),
                )
            ),
        ),
        (
            "(search.a = 1 or search.b = 2)\n and search.c like 'x%'",
            All(
                (
                    Some((Comparison(S("a"), "=", 1), Comparison(S("b"), "=", 2))),
                    Comparison(S("c"), "like", "x%"),
                )
            ),
        ),
    ],
)
def test_what_is_read(where: str, condition: Condition) -> None:
    assert parse(where) == condition


@pytest.mark.parametrize(
    ("where", "at", "says"),
    [
        ("", 0, "a field is missing"),
        ("status", 6, "an operator is missing"),
        ("status = ", 9, "a value is missing"),
        ("status = running", 9, "a value is missing"),
        ("status == 'running'", 8, "a value is missing"),
        ("status <> 'running'", 8, "a value is missing"),
        ("status = 'running", 9, "has no end"),
        ('status = "running"', 9, "single quotes"),
        ("status = 'runing'", 9, "one of running, completed"),
        ("status = 5", 9, "is text"),
        ("memo.x = 5", 0, "there is no field 'memo.x'"),
        ("search = 5", 0, "search.NAME"),
        ("search.a.b = 5", 0, "without dots"),
        ("entity = 5", 0, "entity.PATH"),
        ("name = 'x' and", 14, "a field is missing"),
        ("name = 'x' name = 'y'", 11, "should end here"),
        ("(name = 'x'", 11, "')' is missing"),
        ("name = 'x')", 10, "should end here"),
        ("name in 'x'", 8, "'(' is missing"),
        ("name in ('x' 'y')", 13, "')' is missing"),
        ("started_at > 'soon'", 13, "is a time"),
        ("started_at like '2026%'", 16, "is a time"),
        ("search.x like 5", 14, "is a text"),
        ("search.x < null", 11, "null is neither"),
        ("search.x = 01", 11, "no number"),
        ("search.x = 1x", 11, "no number"),
        ("search.x = 1e999", 11, "too large"),
        ("search.x = 'a\0b'", 11, "NUL"),
        ("name = 'x'; DROP TABLE run", 10, "no meaning here"),
        ("name = 'x' -- more", 11, "no number"),
        ("not " * 60 + "name = 'x'", 200, "nested more than 50"),
        ("name = '" + "x" * 10_000 + "'", 10_000, "at most 10,000 characters"),
    ],
)
def test_what_is_refused_and_where(where: str, at: int, says: str) -> None:
    with pytest.raises(durable.InvalidFilter, match=re.escape(says)) as refused:
        parse(where)
    assert refused.value.position == at
    if len(where) < 60:
        line, caret = str(refused.value).splitlines()[-2:]
        assert line.strip() == where.strip()
        assert len(caret) - 1 == at + 2


def test_the_line_of_the_mistake_is_shown() -> None:
    with pytest.raises(durable.InvalidFilter) as refused:
        parse("name = 'x'\nand stats = 'running'\nor true")
    assert str(refused.value).splitlines()[1:] == ["  and stats = 'running'", "      ^"]


def test_columns_are_asked_for_by_their_values() -> None:
    where = (
        "status = 'failed' and name in ('a', 'b') and workflow_id like 'order-%' and started_at >= '2026-01-01' "
        "and started_at < '2026-02-01' and started_at > '2025-01-01T00:00:00+01:00' and search.x = 1 "
        "and queue_name = 'q' and (name = 'a' or search.y = 2)"
    )
    filter = compiled(parse(where))
    assert filter.pop("search") == '((exists($."x" ? (@ == 1))))'
    assert "exists" in filter.pop("rest")
    assert filter == {
        "status": "failed",
        "names": ["a", "b"],
        "workflow_like": "order-%",
        "since": "2026-01-01T00:00:00.000000+00:00",
        "before": "2026-02-01T00:00:00.000000+00:00",
        "queues": ["q"],
        "uses": ["search"],
    }
    assert compiled(None) == {}
    assert set(compiled(parse("search.x != 1"))) == {"rest", "uses"}, "true of runs without any search attributes"


# --- the database means the same ---------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab'\"\\%_.$@\n é\U0001f600"), max_size=4)
NUMBER = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, -0.0, 2.0, 1e20, 12345678901234567890]))
DAYS = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
KEYS = st.sampled_from(["x", "y", "odd key", 'q"', "\\"])
SEARCHED = st.one_of(st.booleans(), NUMBER, TEXT, st.sampled_from(DAYS), st.lists(TEXT, max_size=3))
JSON = st.recursive(
    SCALAR, lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3), max_leaves=5
)
LITERAL = st.one_of(SCALAR, st.sampled_from([day.isoformat() for day in DAYS]), st.just("2026-01-02"))
SEARCH_FIELD = st.builds(lambda name: S(name), st.sampled_from(["x", "y"]))
ENTITY_FIELD = st.builds(lambda path: E(*path), st.lists(KEYS, min_size=1, max_size=2))
ANY_FIELD = SEARCH_FIELD | ENTITY_FIELD


def comparisons() -> st.SearchStrategy[Condition]:
    ordered = st.builds(
        Comparison,
        ANY_FIELD,
        st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
        LITERAL.filter(lambda v: v is not None),
    )
    nulls = st.builds(Comparison, ANY_FIELD, st.sampled_from(["=", "!="]), st.none())
    lists = st.builds(Comparison, ANY_FIELD, st.just("in"), st.lists(LITERAL, min_size=1, max_size=3).map(tuple))
    likes = st.builds(Comparison, ANY_FIELD, st.just("like"), TEXT)
    columns = st.one_of(
        st.builds(
            Comparison, st.just(Field("status")), st.sampled_from(["=", "!="]), st.sampled_from(["running", "failed"])
        ),
        st.builds(
            Comparison,
            st.just(Field("workflow_id")),
            st.sampled_from(["=", "<", ">=", "like"]),
            st.sampled_from(["w-1", "w-1%", "w_2", "%3"]),
        ),
        st.builds(Comparison, st.just(Field("name")), st.just("in"), st.just(("one", "two"))),
        st.builds(Comparison, st.just(Field("closed_at")), st.sampled_from(["=", "!="]), st.none()),
        st.builds(
            Comparison,
            st.just(Field("started_at")),
            st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
            st.sampled_from([d.isoformat() for d in DAYS]),
        ),
    )
    return st.one_of(ordered, nulls, lists, likes, columns)


CONDITION: st.SearchStrategy[Condition] = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(All, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(Some, st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=5,
)


def as_text(condition: Condition) -> str:
    """A condition as somebody would write it."""
    if isinstance(condition, Not):
        return f"not ({as_text(condition.part)})"
    if isinstance(condition, (All, Some)):
        word = " and " if isinstance(condition, All) else " or "
        return word.join(f"({as_text(part)})" for part in condition.parts)
    field = condition.field
    name = field.root
    for segment in field.path:
        name += "." + (segment if re.fullmatch(r"[\w-]+", segment) else '"' + segment.replace('"', '""') + '"')
    value = condition.value
    shown = "(" + ", ".join(map(literal, value)) + ")" if isinstance(value, tuple) else literal(value)
    return f"{name} {condition.op} {shown}"


def literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def meets(run: dict[str, Any], condition: Condition) -> bool:
    """What a condition means, in Python."""
    if isinstance(condition, Not):
        return not meets(run, condition.part)
    if isinstance(condition, All):
        return all(meets(run, part) for part in condition.parts)
    if isinstance(condition, Some):
        return any(meets(run, part) for part in condition.parts)
    field, op, value = condition.field, condition.op, condition.value
    if op == "!=":
        return not meets(run, Comparison(field, "=", value))
    if op == "in":
        return any(meets(run, Comparison(field, "=", v)) for v in value)
    found = list(reach(run[field.root], field.path))
    if value is None:
        return not found or any(v is None for v in unwrapped(found))
    return any(compares(v, op, value) for v in unwrapped(found))


def reach(value: Any, path: tuple[str, ...]) -> Iterator[Any]:
    """What lies at a path; in a list, of each of its elements."""
    if not path:
        yield value
    elif isinstance(value, dict):
        if path[0] in value:
            yield from reach(value[path[0]], path[1:])
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield from reach(item, path)


def unwrapped(values: list[Any], levels: int = 2) -> Iterator[Any]:
    """Values, and of lists (also in lists) their elements."""
    for value in values:
        if isinstance(value, list) and levels:
            yield from unwrapped(value, levels - 1)
        else:
            yield value


def compares(value: Any, op: str, literal: Any) -> bool:
    if isinstance(value, datetime):
        literal = time_of(literal)
        if literal is None:
            return False
    if op == "like":
        pattern = ""
        escaped = False
        for c in literal:
            if escaped or c not in "%_\\":
                pattern, escaped = pattern + re.escape(c), False
            elif c == "\\":
                escaped = True
            else:
                pattern += ".*" if c == "%" else "."
        pattern += re.escape("\\") if escaped else ""
        return isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None
    kinds = [bool, (int, float), str, datetime]
    kind = next((k for k in kinds if isinstance(value, k)), None)  # type: ignore[arg-type]
    if kind is None or not isinstance(literal, kind) or (kind is not bool and isinstance(literal, bool)):  # type: ignore[arg-type]
        return False
    tests: dict[str, Callable[[], bool]] = {
        "=": lambda: value == literal,
        "<": lambda: value < literal,
        "<=": lambda: value <= literal,
        ">": lambda: value > literal,
        ">=": lambda: value >= literal,
    }
    return tests[op]()


@pytest.fixture
def broker_alone(database_url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(database_url, middleware=[])
    yield broker
    broker.close()


def store(conn: psycopg.Connection[Any], runs: list[dict[str, Any]]) -> None:
    conn.execute("TRUNCATE durable.run, durable.run_state")
    for run in runs:
        id = uuid.uuid4()
        conn.execute(
            "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, started_at, closed_at, status, last_event) "
            "VALUES (%s, %s, (SELECT stream_id FROM durable.stream), %s, %s, %s, %s, 1)",
            (id, run["workflow_id"], run["name"], run["started_at"], run["closed_at"], run["status"]),
        )
        if run["search"] or run["entity"]:
            conn.execute(
                "INSERT INTO durable.run_state (run_id, search, entity) VALUES (%s, %s, %s)",
                (id, json.dumps(check_search(run["search"])), json.dumps(run["entity"])),
            )


RUN = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["one", "two", "three"]),
        "started_at": st.sampled_from(DAYS),
        "search": st.dictionaries(st.sampled_from(["x", "y"]), SEARCHED, max_size=2),
        "entity": st.dictionaries(KEYS, JSON, max_size=2),
        "failed": st.booleans(),
    }
)


def test_the_database_means_the_same(broker_alone: durable.DurableBroker) -> None:
    broker_alone.stream_id("s")
    with looking(broker_alone) as conn:

        @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(RUN, min_size=1, max_size=5), st.lists(CONDITION, min_size=5, max_size=12))
        def same(runs: list[dict[str, Any]], conditions: list[Condition]) -> None:
            for n, run in enumerate(runs):
                run["workflow_id"] = f"w-{n}"
                run["status"] = "failed" if run["failed"] else "running"
                run["closed_at"] = run["started_at"] + timedelta(days=1) if run["failed"] else None
                run["queue_name"] = "s"
            store(conn, runs)
            for condition in conditions:
                where = as_text(condition)
                assert parse(where) == condition or "(" in where, where
                expected = {run["workflow_id"] for run in runs if meets(run, condition)}
                found = durable.list_workflows(where, broker=broker_alone)
                assert {run.workflow_id for run in found} == expected, (where, compiled(parse(where)), runs)
                assert durable.count_workflows(where, broker=broker_alone) == len(expected)

        same()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.text(max_size=60) | st.from_regex(r"(search|entity)\.\w+ (=|like|in|<) [('\"$@\\)\w;-]{0,30}", fullmatch=True)
)
def test_any_text_is_read_or_refused_with_a_position(where: str) -> None:
    refused = None
    try:
        json.dumps(compiled(parse(where)))
    except durable.InvalidFilter as e:
        refused = e
    assert refused is None or (0 <= refused.position <= len(where) and "\n" in str(refused))


HOSTILE = [
    "'; DROP TABLE durable.run; --",
    '" ? (@ == 1) || $.x == "',
    '\\" || true || "',
    '") || exists($.*) || exists($ ? (@ == "',
    "$$; SELECT pg_sleep(10); $$",
    "%s %(x)s {} {schema}",
    "\\u0022 || 1 == 1 || \\u0022",
    "*/ true /*",
]


def test_nothing_in_a_filter_is_code(broker_alone: durable.DurableBroker) -> None:
    broker_alone.stream_id("s")
    run = {
        "workflow_id": "w", "name": "n", "started_at": DAYS[0], "closed_at": None, "status": "running",
        "search": {"x": "harmless"}, "entity": {"x": "harmless"},
    }  # fmt: skip
    with looking(broker_alone) as conn:
        store(conn, [run])

        def found(where: str) -> int:
            return len(durable.list_workflows(where, broker=broker_alone))

        def quoted(text: str) -> str:
            return "'" + text.replace("'", "''") + "'"

        for text in HOSTILE:
            for field in ("search.x", "entity.x", "workflow_id", "name", "queue_name", "run_id", "parent_id"):
                for op in ("=", "like"):
                    assert found(f"{field} {op} {quoted(text)}") == 0, (field, op, text)
                    assert found(f"not {field} {op} {quoted(text)}") == 1, (field, op, text)
            for field, value in (
                ("search.x", "harmless"),
                ("entity.x", "harmless"),
                ("workflow_id", "w"),
                ("name", "n"),
            ):
                assert found(f"{field} <= {quoted(text)}") == (value <= text), (field, text)
            key = text.replace('"', '""')
            assert found(f'entity."{key}" = 1 or entity."{key}".a = 1') == 0
            assert durable.count_workflows(group_by=f'entity."{key}"', broker=broker_alone) == {None: 1}
        # And what is the value itself is found.
        for text in HOSTILE:
            store(conn, [{**run, "search": {"x": text}, "entity": {text: {"a": text}}}])
            key = text.replace('"', '""')
            assert found(f"search.x = {quoted(text)}") == 1
            assert found(f'entity."{key}".a = {quoted(text)} and not entity."{key}".a != {quoted(text)}') == 1
            assert durable.count_workflows(group_by=f'entity."{key}".a', broker=broker_alone) == {text: 1}

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
        def any_text(text: str) -> None:
            store(conn, [{**run, "workflow_id": "w", "search": {"x": text}, "entity": {text: text}}])
            key = text.replace('"', '""')
            where = (
                f'search.x = {quoted(text)} and entity."{key}" = {quoted(text)} and entity."{key}" in ({quoted(text)})'
            )
            assert found(where) == 1
            pattern = [re.sub(r"([%_\\])", r"\\\1", c) for c in text]
            for like in ("".join(pattern), pattern[0] + "%", "%" + pattern[-1], "_" * len(text)):
                assert found(f"search.x like {quoted(like)}") == 1

        any_text()


def test_pages_of_conditions_go_on(broker_alone: durable.DurableBroker) -> None:
    broker_alone.stream_id("s")
    runs = [
        {
            "workflow_id": f"w-{n:02}", "name": "n", "started_at": DAYS[n % 2], "closed_at": None, "status": "running",
            "search": {"x": n % 3}, "entity": {},
        }
        for n in range(30)
    ]  # fmt: skip
    with looking(broker_alone) as conn:
        store(conn, runs)
    condition = parse("search.x = 1")
    for order in ("started_at", "-started_at", "closed_at", "-closed_at"):
        after, seen = None, []
        while True:
            page = _page(broker_alone, condition, order, 3, after)
            seen += [run.workflow_id for run in page]
            after = page.next
            if after is None:
                break
        assert len(seen) == 10
        assert sorted(seen) == [f"w-{n:02}" for n in range(1, 30, 3)]
