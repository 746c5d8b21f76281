"""Search attributes, the entity, topics and output on the engine alone; and that an entity in SQL is the same."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_support import Run, echo

import dramatiq_durable as durable
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.attributes import MAX_ENTITY
from dramatiq_durable.workflow.entity import Entity
from dramatiq_durable.workflow.replay import current


def result_of(code: Callable[[], Any]) -> Any:
    run = Run(code).finish()
    run.replayed()
    return run.result


# --- the entity --------------------------------------------------------------------------------------------


def test_what_each_operation_does_and_returns() -> None:
    async def f() -> list[Any]:
        e = durable.entity()
        found = [
            await e.get(),
            await e.get("a.b"),
            await e.get("a.b", 7),
            await e.set({"a": {"b": 1}, "list": [1, {"x": 2}]}),
            await e.get("list.1.x"),
            await e.get("list.5"),
            await e.set("a.c.d", "deep"),
            await e.set("list.0", "first"),
            await e.merge({"a": {"b": 2, "e": None}, "new": [1]}),
            await e.merge("a.c", {"f": {}}),
            await e.merge("made.here", {"x": 1}),
            await e.append("list", 3),
            await e.append("fresh.list", "x"),
            await e.prepend("fresh.list", "w"),
            await e.remove("list", 1),
            await e.remove("list", -1),
            await e.remove("list", 9),
            await e.remove("nothing", 0),
            await e.increment("n"),
            await e.increment("n", 2.5),
            await e.increment("n", -1),
            await e.toggle("t"),
            await e.toggle("t"),
            await e.set_if_not_exists("n", 100),
            await e.set_if_not_exists("m", 100),
            await e.set_if_not_exists("a.e", 5),
            await e.delete("a.b"),
            await e.delete("a.b"),
            await e.delete("list.0"),
        ]
        return [found, await e.get()]

    found, document = result_of(f)
    assert found == [
        {},
        None,
        7,
        {"a": {"b": 1}, "list": [1, {"x": 2}]},
        2,
        None,
        "deep",
        "first",
        {"a": {"b": 2, "c": {"d": "deep"}, "e": None}, "list": ["first", {"x": 2}], "new": [1]},
        {"d": "deep", "f": {}},
        {"x": 1},
        ["first", {"x": 2}, 3],
        ["x"],
        ["w", "x"],
        ["first", 3],
        ["first"],
        ["first"],
        [],
        1,
        3.5,
        2.5,
        True,
        False,
        2.5,
        100,
        None,
        True,
        False,
        True,
    ]
    assert document == {
        "a": {"c": {"d": "deep", "f": {}}, "e": None},
        "list": [],
        "new": [1],
        "made": {"here": {"x": 1}},
        "fresh": {"list": ["w", "x"]},
        "n": 2.5,
        "t": False,
        "m": 100,
    }


class Colour(Enum):
    RED = "red"


class Loop(dict[str, Any]):
    pass


@pytest.mark.parametrize(
    ("mistake", "error", "says"),
    [
        (lambda e: e.set("a"), TypeError, "a path and a value, or a dict"),
        (lambda e: e.set(5, 1), TypeError, "a path is text"),
        (lambda e: e.set("", 1), ValueError, "names with dots"),
        (lambda e: e.set("a..b", 1), ValueError, "names with dots"),
        (lambda e: e.set(".".join("a" * 51), 1), ValueError, "at most 50"),
        (lambda e: e.set("a\0", 1), durable.NotEncodable, "NUL"),
        (lambda e: e.set("a", "x\0y"), durable.NotEncodable, "NUL"),
        (lambda e: e.set("a", {"x\0": 1}), durable.NotEncodable, "NUL"),
        (lambda e: e.set("a", ["\ud800"]), durable.NotEncodable, "surrogate"),
        (lambda e: e.set("a", math.nan), durable.NotEncodable, "finite"),
        (lambda e: e.set("a", {"x": [math.inf]}), durable.NotEncodable, "finite"),
        (lambda e: e.set("a", object()), durable.NotEncodable, "cannot be encoded"),
        (lambda e: e.set("a", "x" * MAX_ENTITY), durable.PayloadTooLarge, "an entity has at most"),
        (lambda e: e.set("text.more", 1), TypeError, "there is text"),
        (lambda e: e.set("null.more", 1), TypeError, "there is null"),
        (lambda e: e.set("list.7", 1), IndexError, "no element '7'"),
        (lambda e: e.set("list.x", 1), IndexError, "no element 'x'"),
        (lambda e: e.merge("text", {"a": 1}), TypeError, "there is text, not an object"),
        (lambda e: e.merge("a", 5), TypeError, "takes a dict"),
        (lambda e: e.merge([1]), TypeError, "a dict for the whole entity"),
        (lambda e: e.append("text", 1), TypeError, "there is text, not a list"),
        (lambda e: e.prepend("object", 1), TypeError, "there is an object, not a list"),
        (lambda e: e.remove("list", "x"), TypeError, "the index of an element"),
        (lambda e: e.remove("list", True), TypeError, "the index of an element"),
        (lambda e: e.increment("text"), TypeError, "is no number"),
        (lambda e: e.increment("n", "5"), TypeError, "is no number"),
        (lambda e: e.increment("bool"), TypeError, "is no number"),
        (lambda e: e.increment("n", True), TypeError, "is no number"),
        (lambda e: e.increment("big", 1.7e308), durable.NotEncodable, "finite"),
        (lambda e: e.toggle("n"), TypeError, "neither true nor false"),
        (lambda e: e.delete(""), ValueError, "names with dots"),
    ],
)
def test_mistakes_are_told_at_the_call_and_change_nothing(
    mistake: Callable[[Entity], Any], error: type[Exception], says: str
) -> None:
    async def f() -> list[Any]:
        e = durable.entity()
        start = {"text": "x", "null": None, "list": [1], "object": {}, "n": 1, "bool": True, "big": 1.7e308}
        await e.set(start)
        raised = None
        try:
            mistake(e)  # not awaited: the call itself refuses
        except Exception as caught:
            raised = caught
        return [type(raised).__name__, str(raised), await e.get() == start]

    kind, text, unchanged = result_of(f)
    assert (kind, unchanged) == (error.__name__, True), text
    assert says in text


def test_what_is_handed_out_is_a_copy() -> None:
    async def f() -> Any:
        e = durable.entity()
        mine = {"list": [1]}
        await e.set("a", mine)
        mine["list"].append(2)
        (await e.get("a.list")).append(3)
        (await e.append("a.list", {"x": 1})).append(4)
        (await e.get())["b"] = 1
        merged = await e.merge({"c": {"d": [5]}})
        merged["c"]["d"].append(6)
        return await e.get()

    assert result_of(f) == {"a": {"list": [1, {"x": 1}]}, "c": {"d": [5]}}


def test_values_go_through_the_converter() -> None:
    async def f() -> Any:
        await durable.entity().set(
            {"at": datetime(2026, 1, 31, tzinfo=UTC), "colour": Colour.RED, "pair": (1, 2), 5: 6}
        )
        return await durable.entity().get()

    assert result_of(f) == {"at": "2026-01-31T00:00:00+00:00", "colour": "red", "pair": [1, 2], "5": 6}


def test_an_entity_that_grows_is_measured() -> None:
    async def f() -> list[Any]:
        e = durable.entity()
        added = 0
        try:
            while True:
                await e.append("list", "x" * 50_000)
                added += 1
        except durable.PayloadTooLarge as error:
            told = "the entity would be" in str(error)
        for _ in range(40):  # what is replaced makes room
            await e.set("other", "y" * 20_000)
        await e.delete("list")
        await e.append("list", "x" * 50_000)
        return [added, told]

    assert result_of(f) == [20, True]


def test_changes_are_recorded_at_the_call_in_order_and_awaiting_them_is_a_matter_of_taste() -> None:
    async def f() -> Any:
        e = durable.entity()
        later = e.increment("n")
        now = await asyncio.gather(e.increment("n"), e.get("n"), asyncio.create_task(e.increment("n")))
        return [now, await later]

    run = Run(f)
    assert run.result == [[2, 2, 3], 1]
    assert [e.attributes["value"] for e in run.history if e.attributes and "value" in e.attributes] == [1, 2, 3]
    assert len(run.history) == 5, "nothing of it takes a step of its own"


def test_other_changes_are_nondeterminism() -> None:
    def changing(verb: str, *args: Any) -> Callable[[], Any]:
        async def f() -> None:
            await getattr(durable.entity(), verb)(*args)
            await echo.execute(1)

        return f

    run = Run(changing("set", "a", 1))
    for other in (changing("set", "a", 2), changing("set", "b", 1), changing("increment", "a"), changing("get", "a")):
        with pytest.raises(durable.Nondeterminism):
            run.replayed(other)


async def everything() -> Any:
    e = durable.entity()
    await durable.upsert_search({"a": 1, "due": datetime(2026, 1, 31, tzinfo=UTC)})
    seen = []
    for n in range(3):
        await e.append("list", n)
        await echo.execute(n)
        offset = await durable.output({"n": n})
        await durable.emit("t", {"n": n, "offset": offset})
        await durable.upsert_search({"a": n, f"b{n}": None if n == 1 else "x"})
        await e.increment("n", n)
        seen.append([await e.get(), sorted(durable.info().search)])
    return seen


def test_a_run_that_is_dropped_at_every_event_goes_on_as_if_it_had_not() -> None:
    whole = Run(everything).finish()
    inputs = [n for n, e in enumerate(whole.history) if e.type in events.INPUT_TYPES]
    for begin, end in zip(inputs[1:], [*inputs[2:], len(whole.history)], strict=True):
        again = Run(everything, start=False)
        again.execution.replay(whole.history[:begin])
        step = again.execution.step(whole.history[begin])
        assert [e[3:] for e in step.events] == [e[3:] for e in whole.history[begin:end]]


# --- search attributes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "error", "says"),
    [
        ([("a", 1)], durable.NotEncodable, "a dict of names"),
        ({"": 1}, ValueError, "a letter or an underscore"),
        ({"a.b": 1}, ValueError, "a letter or an underscore"),
        ({"5": 1}, ValueError, "a letter or an underscore"),
        ({"x" * 101: 1}, ValueError, "100 at the most"),
        ({5: 1}, ValueError, "a letter or an underscore"),
        ({"a": {"b": 1}}, durable.NotEncodable, "of type dict"),
        ({"a": [1]}, durable.NotEncodable, "a list of other things"),
        ({"a": b"x"}, durable.NotEncodable, "of type bytes"),
        ({"a": math.nan}, durable.NotEncodable, "finite"),
        ({"a": datetime(2026, 1, 31)}, ValueError, "without a time zone"),
        ({"a": "x\0"}, durable.NotEncodable, "NUL"),
        ({"a": ["\udc00"]}, durable.NotEncodable, "surrogate"),
        ({"a": "x" * 40_000}, durable.PayloadTooLarge, "the cap is 32,768"),
    ],
)
def test_search_attributes_that_cannot_be(search: Any, error: type[Exception], says: str) -> None:
    @durable.workflow(broker=echo.broker)
    async def f() -> list[str]:
        await durable.upsert_search({"kept": 1})
        try:
            durable.upsert_search(search)
        except Exception as e:
            return [type(e).__name__, str(e), str(durable.info().search)]
        return []

    kind, text, kept = result_of(f)
    assert (kind, kept) == (error.__name__, "{'kept': 1}"), text
    assert says in text
    with pytest.raises(error, match=says):
        f.options(search=search)


def test_all_of_them_together_are_bounded() -> None:
    async def f() -> int:
        for n in range(10):
            try:
                await durable.upsert_search({f"a{n}": "x" * 10_000})
            except durable.PayloadTooLarge:
                return n
        return 10

    assert result_of(f) == 3


def test_info_has_them_at_once_and_typed() -> None:
    due = datetime(2026, 1, 31, 12, 0, 0, 5, tzinfo=UTC)

    class Text(str):
        pass

    async def f() -> list[Any]:
        await durable.upsert_search(
            {"due": due, "n": 1, "f": 1.0, "b": True, "l": ("x",), "s": Text("y"), "none": None}
        )
        search = durable.info().search
        search["n"] = 99
        return [
            search["due"] == due,
            search["due"].tzinfo is not None,
            {k: v for k, v in durable.info().search.items() if k != "due"},
        ]

    assert result_of(f) == [True, True, {"n": 1, "f": 1.0, "b": True, "l": ["x"], "s": "y"}]


# --- what a run begins with, and hands on ------------------------------------------------------------------


def test_a_run_begins_with_what_was_handed_on() -> None:
    handed: dict[str, Any] = {}

    async def f() -> list[Any]:
        e = durable.entity()
        await durable.upsert_search({"due": datetime(2026, 1, 31, tzinfo=UTC)})
        result = [await e.increment("n"), await durable.output("x"), str(durable.info().search)]
        execution = current()
        assert execution is not None
        handed.update(execution.handed_on())
        return result

    first = Run(f)
    assert first.result[:2] == [1, 0]
    facts = json.loads(json.dumps(handed))
    assert facts["entity"] == {"n": 1}
    step = first.fresh().step(events.Event(0, events.WORKFLOW_STARTED, 1, attributes=facts))
    assert json.loads(step.events[-1].payload or b"") == [2, 1, first.result[2]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: durable.emit("", 1), "a topic is 1 to 200"),
        (lambda: durable.emit("t", object()), "cannot be encoded"),
        (lambda: durable.emit("t", "x" * (8 * 1024 * 1024)), "the cap is"),
        (lambda: durable.output(object()), "the output"),
    ],
)
def test_what_cannot_be_emitted_or_put_out(call: Callable[[], Any], says: str) -> None:
    async def f() -> str:
        try:
            call()
        except Exception as e:
            return str(e)
        return ""

    run = Run(f)
    assert says in run.result
    assert len(run.history) == 2


def test_only_inside_a_workflow() -> None:
    outside: list[Callable[[], Any]] = [durable.entity, lambda: durable.emit("t"), lambda: durable.output(1)]
    for call in (*outside, lambda: durable.upsert_search({"a": 1})):
        with pytest.raises(durable.NotInWorkflow):
            call()


# --- in SQL ------------------------------------------------------------------------------------------------

KEY = st.sampled_from(["a", "b", "0", "1", 'odd "key"', "ü"])
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(-1e6, 1e6), st.text(max_size=3))
VALUE = st.recursive(
    SCALAR.filter(lambda v: not isinstance(v, str) or v.isprintable()),
    lambda inner: st.dictionaries(KEY, inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=6,
)
PATH = st.lists(KEY, min_size=1, max_size=3).map(".".join)
OPERATION = st.one_of(
    st.tuples(st.just("set"), PATH, VALUE),
    st.tuples(st.just("set"), st.dictionaries(KEY, VALUE, max_size=3)),
    st.tuples(st.just("merge"), PATH, st.dictionaries(KEY, VALUE, max_size=3)),
    st.tuples(st.just("merge"), st.dictionaries(KEY, VALUE, max_size=3)),
    st.tuples(st.sampled_from(["append", "prepend", "set_if_not_exists"]), PATH, VALUE),
    st.tuples(st.just("remove"), PATH, st.integers(-3, 3)),
    st.tuples(st.just("increment"), PATH, st.integers(-3, 3) | st.floats(-10, 10)),
    st.tuples(st.sampled_from(["toggle", "delete"]), PATH),
)


def test_the_entity_in_the_database_is_that_of_the_code(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(OPERATION, min_size=1, max_size=12))
        def same(operations: list[tuple[Any, ...]]) -> None:
            async def f() -> Any:
                for verb, *args in operations:
                    try:
                        await getattr(durable.entity(), verb)(*args)
                    except (TypeError, IndexError):
                        continue
                return await durable.entity().get()

            run = Run(f)
            run.replayed()
            conn.execute("DELETE FROM durable.run_state")
            for event in run.history:
                if event.type == events.ENTITY_CHANGED:
                    conn.execute(
                        "SELECT durable.change_entity('00000000-0000-0000-0000-000000000001', %s)",
                        (json.dumps(event.attributes),),
                    )
            row = conn.execute("SELECT entity FROM durable.run_state").fetchone()
            assert (row[0] if row else {}) == run.result

        same()
