"""Values survive the round trip; what does not is named by its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, NamedTuple, NewType
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_durable import errors
from dramatiq_durable.workflow import converter
from dramatiq_durable.workflow.converter import (
    decode,
    decode_call,
    encode,
    encode_call,
    hash_arguments,
)
from dramatiq_durable.workflow.failures import failure_from_json, failure_to_json


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    at: datetime


UserId = NewType("UserId", int)


@dataclass
class Item:
    sku: str
    price: Decimal
    tags: frozenset[str] = frozenset()


@dataclass
class Order:
    id: UUID
    items: list[Item]
    colour: Colour | None = None
    placed: datetime | None = None
    parts: dict[int, Item] = field(default_factory=dict)
    next: Order | None = None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


@given(json_values)
def test_json_survives(value: Any) -> None:
    data = encode(value)
    assert decode(data) == value
    assert encode(decode(data)) == data


def test_what_jsonb_would_lose_survives() -> None:
    value = {"b": "\0", "a": -0.0, "lone": "\ud800", "é": math.inf}
    again = decode(encode(value))
    assert list(again) == list(value)
    assert math.copysign(1, again["a"]) == -1
    assert again["lone"] == "\ud800"
    assert math.isnan(decode(encode(math.nan)))


def test_typed_values_survive() -> None:
    order = Order(
        id=uuid4(),
        items=[Item("a", Decimal("1.10"), frozenset({"x", "y"}))],
        colour=Colour.RED,
        placed=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        parts={7: Item("b", Decimal(0))},
    )
    order.next = Order(id=uuid4(), items=[])
    assert decode(encode(order), Order) == order
    assert decode(encode([order]), list[Order]) == [order]
    assert decode(encode({"k": order}), dict[str, Order]) == {"k": order}


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ((1, "a"), tuple[int, str]),
        ((Decimal(1), Decimal(2)), tuple[Decimal, ...]),
        ((1, 2), tuple),
        ({1, 2}, set[int]),
        (frozenset({date(2026, 1, 1)}), frozenset[date]),
        (b"\x00\xff", bytes),
        (timedelta(hours=1.5), timedelta),
        (date(2026, 2, 3), date),
        (Point(1, datetime(2026, 1, 1)), Point),
        (Level.HIGH, Level),
        (None, UUID | None),
        (Colour.RED, Colour | None),
        (5, UUID | int),
        ("free text", UUID | str),
        (UserId(3), UserId),
        (Decimal("1.5"), Annotated[Decimal, "money"]),
        ([Decimal(1)], Sequence[Decimal]),
        ({Colour.RED.value: 1}, dict[str, int]),
        ({1.5: "x"}, dict[float, str]),
        ({"a": [1, None]}, Any),
        ([1, "x"], list),
    ],
)
def test_decoding_follows_the_annotation(value: Any, annotation: Any) -> None:
    again = decode(encode(value), annotation)
    assert again == value
    assert type(again) is type(value)


def test_unknown_fields_are_dropped_and_missing_ones_take_their_default() -> None:
    assert decode(b'{"sku":"a","price":"1","new":true}', Item) == Item("a", Decimal(1))


def test_calls() -> None:
    async def fn(order: Order, /, n: int, *rest: Decimal, when: date | None = None, **more: UUID) -> None: ...

    order, key = Order(id=uuid4(), items=[]), uuid4()
    data = encode_call((order, 2, Decimal(3)), {"when": date(2026, 1, 1), "key": key})
    assert decode_call(data, fn) == ([order, 2, Decimal(3)], {"when": date(2026, 1, 1), "key": key})
    assert decode_call(encode_call((), {}), fn) == ([], {})
    assert encode_call((1, "x"), {"a": 2}) == b'{"args":[1,"x"],"kwargs":{"a":2}}'


def test_an_unresolvable_annotation_leaves_json() -> None:
    def fn(a: NotDefinedAnywhere, b: int) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert decode_call(b'{"args":[1,2],"kwargs":{}}', fn) == ([1, 2], {})


def test_what_cannot_be_encoded_is_named() -> None:
    def charge(order_id: str, cents: int) -> None: ...

    with pytest.raises(errors.NotEncodable, match=r"argument 2 \('cents'\) of 'charge'.*type object"):
        encode_call(("a", object()), {}, charge, "charge")
    with pytest.raises(errors.NotEncodable, match=r"argument 'cents' of 'charge', at \['a'\]\[1\]"):
        encode_call(("a",), {"cents": {"a": [1, object()]}}, charge, "charge")
    with pytest.raises(errors.NotEncodable, match="key of type tuple"):
        encode({(1, 2): 3})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(errors.NotEncodable, match="contains itself"):
        encode(loop)


def test_the_cap_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "MAX_PAYLOAD", 100)
    encode("x" * 98)
    with pytest.raises(errors.PayloadTooLarge, match="reference"):
        encode("x" * 99)
    with pytest.raises(errors.PayloadTooLarge, match="'charge'"):
        encode_call(("x" * 99,), {}, None, "charge")


def test_the_hash_is_stable() -> None:
    assert hash_arguments(b'{"args":[],"kwargs":{}}') == hash_arguments(encode_call((), {}))
    assert len(hash_arguments(b"")) == 16


def test_failures_round_trip() -> None:
    try:
        try:
            raise OSError("disk \0 \ud800")
        except OSError as e:
            raise ValueError("bad") from e
    except ValueError as e:
        described = failure_to_json(e, retryable=False)
    encode(described)
    failure = failure_from_json(described, errors.ActivityFailed, activity="charge", attempt=2)
    assert (failure.type, failure.message, failure.retryable, failure.activity) == (
        "ValueError",
        "bad",
        False,
        "charge",
    )
    assert "raise ValueError" in (failure.traceback or "")
    cause = failure.__cause__
    assert isinstance(cause, errors.Failure)
    assert (cause.type, cause.message) == ("OSError", "disk \0 \ud800")


def test_failures_are_bounded() -> None:
    def recurse(n: int) -> None:
        if n:
            recurse(n - 1)
        raise ValueError("é" * 100_000)

    error: BaseException
    try:
        recurse(200)
    except ValueError as e:
        error = e
    described = failure_to_json(error)
    assert len(described["message"].encode()) <= 17_000
    assert len(described["traceback"].encode()) <= 17_000
    for i in range(20):
        outer = RuntimeError(str(i))
        outer.__cause__ = error
        error = outer
    described, depth = failure_to_json(error), 0
    while "cause" in described:
        described, depth = described["cause"], depth + 1
    assert depth == 8


def test_failures_of_odd_exceptions() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert failure_to_json(Odd())["type"] == "Odd"
    group = ExceptionGroup("several", [KeyError("k"), ValueError()])
    assert failure_to_json(group)["cause"]["type"] == "KeyError"
    rebuilt = failure_from_json({}, errors.Failure)
    assert rebuilt.type == "Exception"
