"""A value comes back as it was given, by its annotation; what does not fit is named by its place."""

from __future__ import annotations

import enum
import ipaddress
import pathlib
import re
import sys
import types
import typing
import zoneinfo
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum, auto
from fractions import Fraction
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Required,
    TypedDict,
    TypeVar,
)
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dramatiq_durable as durable
from dramatiq_durable import NotDecodable, NotEncodable
from dramatiq_durable.workflow.converter import decode, decode_call, decoders_of, encode, encode_call
from dramatiq_durable.workflow.decoders import decoder_for

T = TypeVar("T")
N = TypeVar("N", bound=Decimal)
C = TypeVar("C", UUID, Decimal)


class Plain(Enum):
    RED = "red"
    NUMBER = 2


class Odd(Enum):
    """Values that JSON does not have."""

    PAIR = (1, 2)
    DAY = date(2026, 1, 1)
    NOTHING = None


class Mixed(str, Enum):  # noqa: UP042 - as many are written
    A = "a"


class Grade(IntEnum):
    LOW = 1
    HIGH = 3


class Mode(StrEnum):
    FAST = "fast"


class Weight(float, Enum):
    LIGHT = 0.5


class Rights(Flag):
    READ = auto()
    WRITE = auto()


class Bits(IntFlag):
    ONE = 1
    TWO = 2


@dataclass(frozen=True, slots=True)
class Money:
    amount: Decimal
    currency: str = "EUR"


@dataclass(kw_only=True)
class Line:
    sku: str
    price: Money
    tags: frozenset[str] = frozenset()


@dataclass
class Box(Generic[T]):
    item: T
    rest: list[T] = field(default_factory=list)
    _: KW_ONLY
    label: str | None = None
    size: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.size = 1 + len(self.rest)


@dataclass
class MoneyBox(Box[Money]):
    opened: datetime | None = None


@dataclass
class Tree:
    value: date
    children: list[Tree] = field(default_factory=list)


@dataclass
class Cat:
    kind: Literal["cat"]
    lives: int = 9


@dataclass
class Dog:
    kind: Literal["dog"]
    name: str = "Rex"


@dataclass
class Left:
    a: int = 0


@dataclass
class Right:
    b: int = 0


class Point(NamedTuple):
    x: Decimal
    at: datetime | None = None


class Pair(NamedTuple, Generic[T]):
    first: T
    second: T


class Options(TypedDict, total=False):
    due: Required[date]
    who: NotRequired[UUID]
    note: str


Age = NewType("Age", int)
Price = NewType("Price", Decimal)

utc_times = st.datetimes(timezones=st.just(UTC))
zoned_times = st.datetimes(
    min_value=datetime(1975, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.timezones(), allow_imaginary=False
)
decimals = st.decimals(allow_nan=False)
monies = st.builds(Money, decimals, st.text(max_size=3))
uuids = st.uuids()
dates = st.dates()


def trees() -> st.SearchStrategy[Tree]:
    return st.recursive(st.builds(Tree, dates), lambda inner: st.builds(Tree, dates, st.lists(inner, max_size=3)))


#: (annotation, values of it)
TYPES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (datetime, st.datetimes() | utc_times | zoned_times),
    (date, dates),
    (time, st.times()),
    (timedelta, st.timedeltas()),
    (UUID, uuids),
    (Decimal, decimals | st.sampled_from([Decimal("-0"), Decimal("1E+30"), Decimal("Infinity")])),
    (Fraction, st.fractions()),
    (bytes, st.binary()),
    (bytearray, st.binary().map(bytearray)),
    (Plain, st.sampled_from(Plain)),
    (Odd, st.sampled_from(Odd)),
    (Mixed, st.sampled_from(Mixed)),
    (Grade, st.sampled_from(Grade)),
    (Mode, st.sampled_from(Mode)),
    (Weight, st.sampled_from(Weight)),
    (Rights, st.sampled_from([Rights(0), Rights.READ, Rights.READ | Rights.WRITE])),
    (Bits, st.sampled_from([Bits.ONE, Bits.ONE | Bits.TWO])),
    (Money, monies),
    (Line, st.builds(Line, sku=st.text(), price=monies, tags=st.frozensets(st.text()))),
    (Box[Money], st.builds(Box, monies, st.lists(monies), label=st.none() | st.text())),
    (Box[dict[str, UUID]], st.builds(Box, st.dictionaries(st.text(), uuids))),
    (MoneyBox, st.builds(MoneyBox, monies, st.lists(monies), opened=st.none() | utc_times)),
    (Tree, trees()),
    (Point, st.builds(Point, decimals, st.none() | utc_times)),
    (Pair[UUID], st.builds(Pair, uuids, uuids)),
    (list[tuple[int, UUID]], st.lists(st.tuples(st.integers(), uuids))),
    (tuple[Decimal, ...], st.lists(decimals).map(tuple)),
    (tuple[()], st.just(())),
    (tuple[Money, str | None], st.tuples(monies, st.none() | st.text())),
    (set[date], st.sets(dates)),
    (frozenset[UUID], st.frozensets(uuids)),
    (deque[date], st.lists(dates).map(deque)),
    (Sequence[Money], st.lists(monies)),
    (Collection[Money], st.lists(monies)),
    (dict[str, list[Money]], st.dictionaries(st.text(), st.lists(monies))),
    (dict[int, date], st.dictionaries(st.integers(), dates)),
    (dict[UUID, Money], st.dictionaries(uuids, monies)),
    (Mapping[date, int], st.dictionaries(dates, st.integers())),
    (dict[Decimal, str], st.dictionaries(st.integers().map(Decimal), st.text())),
    (dict[Plain, date], st.dictionaries(st.sampled_from(Plain), dates)),
    (dict[str, dict[Grade, UUID]], st.dictionaries(st.text(), st.dictionaries(st.sampled_from(Grade), uuids))),
    (dict[bool, UUID], st.dictionaries(st.booleans(), uuids)),
    (dict[int | None, int], st.dictionaries(st.none() | st.integers(), st.integers())),
    (dict[Literal["a", 1], UUID], st.dictionaries(st.sampled_from(["a", 1]), uuids)),
    (Literal["a", 1, True, None], st.sampled_from(["a", 1, True, None])),
    (Literal[Grade.LOW, Plain.RED], st.sampled_from([Grade.LOW, Plain.RED])),
    (Money | None, st.none() | monies),
    (UUID | int | None, st.none() | st.integers() | uuids),
    (datetime | date, st.datetimes() | dates),
    (date | datetime, st.datetimes() | dates),
    (Cat | Dog, st.builds(Cat, st.just("cat"), st.integers()) | st.builds(Dog, st.just("dog"), st.text())),
    (Left | Right, st.builds(Left, st.integers()) | st.builds(Right, st.integers())),
    (list[Left | Right | None], st.lists(st.none() | st.builds(Left, st.integers()) | st.builds(Right, st.integers()))),
    (int | Decimal, st.integers() | decimals),
    (Age, st.integers()),
    (Price, decimals),
    (Annotated[Price, "in cents"], decimals),
    (Annotated[list[Annotated[date, 1]], ["unhashable"]], st.lists(dates)),
    (N, decimals),
    (C, uuids | decimals),
    (T, st.integers() | st.text()),
    (zoneinfo.ZoneInfo, st.timezone_keys(allow_prefix=False).map(zoneinfo.ZoneInfo)),
    (pathlib.PurePosixPath, st.sampled_from(["/a/b", "c"]).map(pathlib.PurePosixPath)),
    (ipaddress.IPv4Address, st.ip_addresses(v=4)),
    (ipaddress.IPv6Address, st.ip_addresses(v=6)),
    (ipaddress.IPv4Network, st.just(ipaddress.ip_network("10.0.0.0/8"))),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "values"), TYPES, ids=[str(annotation) for annotation, _ in TYPES])
def test_a_value_comes_back_as_it_was_given(annotation: Any, values: st.SearchStrategy[Any]) -> None:
    @settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(values)
    def check(value: Any) -> None:
        data = encode(value)
        again = decode(data, annotation)
        assert again == value
        assert type(again) is type(value)
        assert encode(again) == data

    check()


def test_typed_dicts() -> None:
    value: Options = {"due": date(2026, 1, 2), "who": UUID(int=1), "note": "x"}
    assert decode(encode(value), Options) == value
    assert decode(b'{"due":"2026-01-02","more":1}', Options) == {"due": date(2026, 1, 2), "more": 1}
    with pytest.raises(NotDecodable, match="an object without due is no Options"):
        decode(b"{}", Options)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement `type` came with 3.12")
def test_type_aliases() -> None:
    names: dict[str, Any] = {"date": date}
    exec("type Days = list[date]", names)
    assert decode(b'["2026-01-01"]', names["Days"]) == [date(2026, 1, 1)]


class TypeAliasType:
    """As the statement ``type`` makes them from Python 3.12 on: what they stand for is looked up late."""

    def __init__(self, value: Any, *parameters: Any) -> None:
        self._value = value
        self.__type_params__ = self.__parameters__ = parameters

    @property
    def __value__(self) -> Any:
        return self._value()

    def __getitem__(self, arguments: Any) -> Any:
        return types.GenericAlias(self, arguments)  # type: ignore[arg-type]

    def __call__(self) -> None: ...


def test_type_aliases_with_parameters_and_of_themselves() -> None:
    pair = TypeAliasType(lambda: tuple[T, T], T)
    json: Any = TypeAliasType(lambda: typing.Union[dict[str, json], list[json], str, int, None])  # noqa: UP007
    prices: Any = TypeAliasType(lambda: typing.Union[dict[str, prices], list[prices], Decimal, None])  # noqa: UP007
    nested: Any = TypeAliasType(lambda: typing.Union[list[nested[T]], T], T)  # noqa: UP007
    assert decode(b'["1","2"]', pair[Decimal]) == (Decimal(1), Decimal(2))
    assert decoder_for(json) is None
    assert decode(b'{"a":["1",{"b":null}]}', typing.Optional[prices]) == {"a": [Decimal(1), {"b": None}]}  # noqa: UP045
    assert decode(b'["2026-01-01",["2026-01-02"]]', nested[date]) == [date(2026, 1, 1), [date(2026, 1, 2)]]
    with pytest.raises(NotDecodable, match="'x' is no"):
        decode(b'["x"]', list[prices])


@pytest.mark.parametrize("name", ["List", "Dict", "Sequence", "Mapping", "Iterable"])
def test_generics_without_arguments(name: str) -> None:
    bare = getattr(typing, name)
    for value in ([1], {"a": 1}):
        assert decode(encode(value), bare) == value
        assert decode(encode(value), bare | None) == value


@dataclass
class Chain:
    value: Decimal
    next: typing.Self | None = None
    links: list[typing.Self] = field(default_factory=list)
    seen: set[int] = field(init=False, default_factory=set)


def test_classes_that_name_themselves_and_fields_that_are_set_later() -> None:
    chain = Chain(Decimal(1), Chain(Decimal(2)), [Chain(Decimal(3))])
    chain.seen.add(1)
    assert decode(encode(chain), Chain) == chain


def test_one_annotation_that_cannot_be_resolved_costs_no_other_its_type() -> None:
    def fn(a: NotDefinedAnywhere, b: Money, *c: date) -> NotDefinedEither: ...  # type: ignore[name-defined]  # noqa: F821

    assert decode_call(b'{"args":[1,{"amount":"2"},"2026-01-01"],"kwargs":{}}', fn) == (
        [1, Money(Decimal(2)), date(2026, 1, 1)],
        {},
    )

    @dataclass
    class Odd(Line):
        other: NotDefinedAnywhere = None  # type: ignore[name-defined]  # noqa: F821
        when: date | None = None

    odd = Odd(sku="a", price=Money(Decimal(1)), other=[1], when=date(2026, 1, 1))
    assert decode(encode(odd), Odd) == odd


def test_a_call_is_decoded_by_the_functions_annotations() -> None:
    def fn(box: Box[Money], /, *dates: date, mode: Mode = Mode.FAST, **more: dict[UUID, Point]) -> Tree: ...  # type: ignore[empty-body]

    args = (Box(Money(Decimal(1))), date(2026, 1, 1), date(2026, 1, 2))
    kwargs = {"mode": Mode.FAST, "a": {UUID(int=1): Point(Decimal(2))}}
    assert decode_call(encode_call(args, kwargs), fn) == (list(args), kwargs)
    result = decoders_of(fn).result
    assert result is not None
    assert result({"value": "2026-01-01"}) == Tree(date(2026, 1, 1))


def test_functions_that_nobody_can_refer_to_weakly() -> None:
    assert decoders_of(str.upper).result is None
    assert decoders_of("a".upper).plain


@pytest.mark.parametrize(
    ("data", "annotation", "message"),
    [
        ('"x"', Decimal, "'x' is no Decimal"),
        ("5", UUID, "5 is no UUID (it is of type int)"),
        ('{"value":"2026-01-01","children":[{"value":"26"}]}', Tree, "at .children[0].value: '26' is no date"),
        ('[{"item":{"amount":"x"}}]', list[Box[Money]], "at [0].item.amount: 'x' is no Decimal"),
        ('{"a":["2026-01-01",3]}', dict[str, tuple[date, date]], "at ['a'][1]: 3 is no date"),
        ('{"x":1}', dict[UUID, int], "at ['x']: 'x' is no UUID"),
        ('"green"', Plain, "'green' is no Plain"),
        ('"c"', Literal["a", "b"], "'c' is no 'a' or 'b'"),
        ("true", Literal[1], "True is no 1"),
        ("{}", Money, "an object with nothing is no Money (Money.__init__() missing 1 required positional argument"),
        ("[]", Money, "[] is no Money"),
        ("[1]", tuple[int, UUID], "[1] is no list of 2"),
        ("5", list[date], "5 is no list"),
        ("[[]]", set[list[int]], "[[]] is no set"),
        ("[1,2,3]", Point, "at .x: 1 is no Decimal"),
        ('{"kind":"fox"}', Cat | Dog, "is no Cat or Dog"),
        ("{}", UUID | int, "{} is no UUID or int"),
        ('"' + "x" * 9000 + '"', date, "xxx... is no date"),
        ('"=="', bytes, "'==' is no bytes"),
        ('"long"', timedelta, "'long' is no timedelta"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(data: str, annotation: Any, message: str) -> None:
    with pytest.raises(NotDecodable, match=re.escape(message)) as caught:
        decode(data.encode(), annotation)
    assert len(str(caught.value)) < 500


def test_the_argument_that_does_not_fit_is_named() -> None:
    def fn(a: int, order: Tree, *, when: date | None = None) -> None: ...

    with pytest.raises(NotDecodable, match=r"^argument 2 \('order'\), at \.value: 7 is no date"):
        decode_call(b'{"args":[1,{"value":7}],"kwargs":{}}', fn)

    def days(*days: date) -> None: ...

    with pytest.raises(NotDecodable, match=r"^argument 2: 7 is no date"):
        decode_call(b'{"args":["2026-01-01",7,7],"kwargs":{}}', days)
    with pytest.raises(NotDecodable, match=r"^argument 'when': 'x' is no date"):
        decode_call(b'{"args":[1],"kwargs":{"when":"x"}}', fn)


def test_keys_that_have_no_text_are_named() -> None:
    with pytest.raises(NotEncodable, match=r"a key of type tuple \(keys are text"):
        encode({(1, 2): 3})
    with pytest.raises(NotEncodable, match=r"at \['a'\]"):
        encode({"a": {UUID(int=1): object()}})


def test_a_key_inside_of_what_json_does_not_have() -> None:
    value = Box([{Plain.RED: {date(2026, 1, 1)}}])
    assert encode(value) == b'{"item":[{"red":["2026-01-01"]}],"rest":[],"label":null,"size":1}'


def test_the_same_value_gives_the_same_bytes() -> None:
    assert encode({frozenset({3, 1, 2}).__class__.__name__: {"b", "a"}}) == b'{"frozenset":["a","b"]}'
    assert encode(timedelta(seconds=1.5)) == b"1.5"


def test_enums_of_enum_are_not_needed_here() -> None:
    assert decode(encode([enum.Enum("New", {"X": "x"})("x")]), list[str]) == ["x"]  # type: ignore[misc]


class TestPydantic:
    def test_is_never_imported(self) -> None:
        import subprocess

        program = (
            "import sys, dramatiq_durable\n"
            "from dramatiq_durable.workflow.converter import encode, decode\n"
            "encode({'a': [1, object.__class__.__name__]}); decode(b'1', int)\n"
            "assert 'pydantic' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

    def test_models_come_back(self) -> None:
        pydantic = pytest.importorskip("pydantic")

        class Item(pydantic.BaseModel):  # type: ignore[name-defined, misc]
            model_config = pydantic.ConfigDict(strict=True)
            sku: str
            price: Decimal
            due: datetime
            secret: bytes = b""
            kind: Plain = Plain.RED

        class Order(pydantic.BaseModel):  # type: ignore[name-defined, misc]
            id: UUID
            items: list[Item]
            shown: str = pydantic.Field(default="x", alias="displayName")
            sent: int = pydantic.Field(default=1, serialization_alias="sentCount")

        class Page(pydantic.BaseModel, Generic[T]):  # type: ignore[name-defined, misc]
            rows: list[T]

        item = Item(sku="a", price=Decimal("1.10"), due=datetime(2026, 1, 1, tzinfo=UTC), secret=b"\x01")
        order = Order(id=UUID(int=1), items=[item], displayName="y", sent=3)
        for value, annotation in (
            (order, Order),
            ([order], list[Order]),
            (Box(order), Box[Order]),
            (order, Order | None),
            (item, Order | Item),
            (Page[Order](rows=[order]), Page[Order]),
            ({UUID(int=2): item}, dict[UUID, Item]),
        ):
            again = decode(encode(value), annotation)
            assert again == value
            assert type(again) is type(value)
        with pytest.raises(NotDecodable, match=r"at \[0\]: .* is no Order \(.*\nid\n +Field required"):
            decode(b'[{"items":[]}]', list[Order])

    def test_its_dataclasses_come_back(self) -> None:
        dataclasses = pytest.importorskip("pydantic.dataclasses")

        @dataclasses.dataclass
        class Item:
            price: Decimal

        assert decode(encode(Item(price=Decimal(1))), Item) == Item(price=Decimal(1))


def test_types_reach_both_sides(broker: durable.DurableBroker, start_worker: Any) -> None:
    @durable.activity(queue_name="steps")
    def double(box: Box[Money]) -> Money:
        return Money(box.item.amount * 2)

    @durable.workflow(queue_name="runs")
    async def order(box: Box[Money], mode: Mode) -> dict[date, Point]:
        assert isinstance(box.item, Money)
        assert mode is Mode.FAST
        result = await double.execute(box)
        assert isinstance(result, Money)
        return {date(2026, 1, 1): Point(result.amount)}

    @durable.workflow(queue_name="runs")
    async def picky(when: date) -> None: ...

    start_worker()
    handle = order.start(Box(Money(Decimal("1.5"))), Mode.FAST)
    assert handle.result(timeout=30) == {date(2026, 1, 1): Point(Decimal("3.0"))}
    with pytest.raises(durable.WorkflowFailed, match=r"NotDecodable: argument 1 \('when'\): 'soon' is no date"):
        picky.start("soon").result(timeout=30)  # type: ignore[arg-type]


def test_types_of_the_function_around_reach_both_sides(broker: durable.DurableBroker, start_worker: Any) -> None:
    @dataclass
    class Item:
        price: Decimal

    @dataclass
    class Cart:
        items: list[Item]

    @durable.activity(queue_name="steps")
    def first(cart: Cart) -> Item:
        return cart.items[0]

    @durable.activity(queue_name="steps")
    def double(item: Item) -> Item:
        return Item(item.price * 2)

    @durable.workflow(queue_name="runs")
    async def order(cart: Cart) -> Cart:
        @durable.on_signal("put")
        def put(item: Item) -> None:
            cart.items.append(Item(item.price))

        @durable.on_update("raise")
        def raise_price(item: Item, by: Decimal) -> Decimal:
            return item.price + by

        @durable.on_query("total")
        def total(more: Item) -> Decimal:
            return sum((item.price for item in cart.items), more.price)

        await durable.wait_condition(lambda: len(cart.items) > 1)
        cart.items += [await first.execute(cart), await double.execute(cart.items[0])]
        cart.items.append(await double.options(local=True).execute(cart.items[1]))
        return cart

    start_worker()
    handle = order.start(Cart([Item(Decimal(1))]))
    assert handle.update("raise", Item(Decimal(1)), Decimal(2), timeout=30) == "3"
    assert handle.query("total", Item(Decimal(5))) == "6"
    handle.signal("put", Item(Decimal(3)))
    assert handle.result(timeout=30) == Cart([Item(Decimal(n)) for n in (1, 3, 1, 2, 6)])
