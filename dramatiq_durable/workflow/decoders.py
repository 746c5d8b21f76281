"""From plain JSON to what an annotation asks for: decoders, compiled once for each annotation.

A decoder is a function of a plain value; None stands for "leave the value as it is".  What does not fit is refused with
its path: where that is, is only looked for once something did not fit.
"""

from __future__ import annotations

import base64
import collections
import collections.abc
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from contextvars import ContextVar
from datetime import date, datetime, time, timedelta
from enum import Enum
from typing import Annotated, Any, Literal, NewType, TypeVar, Union

from ..errors import NotDecodable
from .hints import hints_of
from .plain import WRITTEN, dumps, is_model, load_model

Decoder = Callable[[Any], Any]

#: What a decoder raises when a value does not fit.
_MISFITS = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError)

_SEQUENCES = (
    list,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_COLLECTIONS: dict[Any, Callable[[Any], Any]] = {
    set: set,
    frozenset: frozenset,
    collections.abc.Set: frozenset,
    collections.abc.MutableSet: set,
    collections.deque: collections.deque,
}
#: What says something about a field, and nothing about its value.
_WRAPPERS = tuple(
    found
    for name in ("Required", "NotRequired", "ReadOnly", "Final", "ClassVar")
    if (found := getattr(typing, name, None))
)


def decoder_for(annotation: Any) -> Decoder | None:
    """Return the decoder of an annotation, or None where JSON's value is the value.

    A decoder raises NotDecodable for a value that does not fit.
    """
    if _looked_at.get():
        return _compile(annotation)
    try:
        return _cached(annotation)
    except TypeError:  # an annotation that cannot be hashed, e.g. Annotated with a list
        return _compile(annotation)


@functools.lru_cache(maxsize=4096)
def _cached(annotation: Any) -> Decoder | None:
    return _compile(annotation)


def _compile(annotation: Any) -> Decoder | None:
    annotation = _bare(annotation)
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if (alias := _alias(annotation)) is not None:
        return _recursive(alias, annotation)
    if isinstance(annotation, TypeVar):
        return _union(annotation.__constraints__) if annotation.__constraints__ else decoder_for(annotation.__bound__)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is Literal:
        return _literal(arguments)
    if origin is tuple or annotation is tuple:
        return _tuple(arguments)
    if origin in _SEQUENCES:
        item = decoder_for(arguments[0]) if arguments else None
        return None if item is None else _collect(list, item)
    if origin in _MAPPINGS:
        return _mapping(*arguments) if arguments else None
    if origin in _COLLECTIONS or annotation in _COLLECTIONS:
        return _collect(_COLLECTIONS[origin or annotation], decoder_for(arguments[0]) if arguments else None)
    if isinstance(origin or annotation, type):
        return _class(origin or annotation, annotation)
    return None


def _bare(annotation: Any) -> Any:
    """An annotation without what says nothing about the value."""
    while True:
        origin = typing.get_origin(annotation)
        if origin is Annotated or (origin is not None and origin in _WRAPPERS):
            annotation = typing.get_args(annotation)[0]
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif (alias := _alias(annotation)) is not None and not _names(alias.__value__, alias, set()):
            annotation = _aliased(alias, annotation)
        else:
            return annotation


def _alias(annotation: Any) -> Any:
    """What the statement ``type`` has made, also where its parameters are given; None if it is no such thing."""
    for subject in (annotation, typing.get_origin(annotation)):
        if type(subject).__name__ == "TypeAliasType":
            return subject
    return None


def _aliased(alias: Any, annotation: Any) -> Any:
    return _substituted(alias.__value__, dict(zip(alias.__type_params__, typing.get_args(annotation), strict=False)))


def _names(annotation: Any, alias: Any, seen: set[int]) -> bool:
    """Whether an annotation has an alias in it: that alias stands for something which contains itself."""
    if _alias(annotation) is alias:
        return True
    other = _alias(annotation)
    if other is not None:
        if id(other) in seen:
            return False
        seen.add(id(other))
        if _names(other.__value__, alias, seen):
            return True
    return any(_names(argument, alias, seen) for argument in typing.get_args(annotation))


#: Aliases that contain themselves, while it is looked what they say.
_looked_at: ContextVar[tuple[Any, ...]] = ContextVar("looked_at", default=())


def _recursive(alias: Any, annotation: Any) -> Decoder | None:
    """The decoder of what contains itself; None where nothing in it says what a value is."""
    if alias in _looked_at.get():
        return None
    token = _looked_at.set((*_looked_at.get(), alias))
    try:
        says = _compile(_aliased(alias, annotation))
    finally:
        _looked_at.reset(token)
    if says is None:
        return None

    @functools.cache  # made at first use
    def inside() -> Decoder | None:
        return _compile(_aliased(alias, annotation))

    def decode(value: Any) -> Any:
        make = inside()
        return value if make is None else make(value)

    return decode


def _misfit(value: Any, expected: str, error: BaseException | None = None) -> NotDecodable:
    why = f" ({_shortened(str(error), 300)})" if error is not None and str(error) else ""
    return NotDecodable(f"{_shortened(repr(value), 60)} is no {expected}{why}")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _calling(make: Callable[[Any], Any], expected: str) -> Decoder:
    """A decoder that calls a type, or a parser, with the value."""

    def decode(value: Any) -> Any:
        try:
            return make(value)
        except NotDecodable:
            raise
        except _MISFITS as e:
            raise _misfit(value, expected, e) from e

    return decode


# --- scalars -------------------------------------------------------------------------------------------
def _timedelta(value: Any) -> timedelta:
    return timedelta(*value) if isinstance(value, list) else timedelta(seconds=value)


def _text(make: Callable[[str], Any]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"it is of type {type(value).__name__}")
        return make(value)

    return parse


_SCALARS: dict[type, Callable[[Any], Any]] = {
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    timedelta: _timedelta,
    bytes: lambda value: base64.b64decode(value, validate=True),
    bytearray: lambda value: bytearray(base64.b64decode(value, validate=True)),
}


def _class(cls: Any, annotation: Any) -> Decoder | None:
    if issubclass(cls, Enum):
        return _calling(functools.partial(_member, cls), cls.__name__)
    if cls in _SCALARS:
        return _calling(_SCALARS[cls], cls.__name__)
    if issubclass(cls, WRITTEN):
        return _calling(_text(cls), cls.__name__)
    if is_model(cls):
        return _calling(functools.partial(load_model, cls), cls.__name__)
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls, annotation)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _named_tuple(cls, annotation)
    if typing.is_typeddict(cls):
        return _typed_dict(cls, annotation)
    return None


def _member(cls: Any, value: Any) -> Any:
    try:
        return cls(value)
    except (ValueError, TypeError):
        # What JSON made of a member's value (a tuple, a date) is not that value.
        for member in cls:
            if _same(member.value, value):
                return member
        raise


def _same(value: Any, plain: Any) -> bool:
    """Whether a plain value is what a value is encoded as."""
    try:
        encoded = json.loads(dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return type(encoded) is type(plain) and bool(encoded == plain)


def _literal(arguments: tuple[Any, ...]) -> Decoder:
    def decode(value: Any) -> Any:
        for argument in arguments:
            if _same(argument, value):
                return argument
        raise _misfit(value, " or ".join(map(repr, arguments)))

    return decode


# --- collections -----------------------------------------------------------------------------------------
def _collect(make: Callable[[Any], Any], item: Decoder | None) -> Decoder:
    def decode(value: Any) -> Any:
        if not isinstance(value, list):
            raise _misfit(value, "list")
        try:
            return make(value if item is None else [item(x) for x in value])
        except NotDecodable:
            raise _located(((f"[{i}]", item, x) for i, x in enumerate(value))) from None
        except TypeError as e:
            raise _misfit(value, make.__name__, e) from e

    return decode


def _located(parts: typing.Iterable[tuple[str, Decoder | None, Any]]) -> NotDecodable:
    """The error of the first part that does not fit, with its place."""
    for place, make, value in parts:
        try:
            if make is not None:
                make(value)
        except NotDecodable as e:
            e.path = place + e.path
            return e
    raise AssertionError("a part fits that did not fit before")


def _tuple(arguments: tuple[Any, ...]) -> Decoder:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _collect(tuple, decoder_for(arguments[0]))
    if not arguments:
        return _collect(tuple, None)
    makes = [decoder_for(argument) for argument in arguments if argument != ()]

    def decode(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(makes):
            raise _misfit(value, f"list of {len(makes)}")
        try:
            return tuple([x if m is None else m(x) for m, x in zip(makes, value, strict=True)])
        except NotDecodable:
            raise _located((f"[{i}]", m, x) for i, (m, x) in enumerate(zip(makes, value, strict=True))) from None

    return decode


def _mapping(key: Any, item: Any) -> Decoder | None:
    key_of, make = _key_decoder(key), decoder_for(item)
    if key_of is None and make is None:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _misfit(value, "object")
        try:
            return {(k if key_of is None else key_of(k)): (x if make is None else make(x)) for k, x in value.items()}
        except NotDecodable:
            parts = ((f"[{k!r}]", m, x) for k, v in value.items() for m, x in ((key_of, k), (make, v)))
            raise _located(parts) from None

    return decode


def _key_decoder(annotation: Any) -> Decoder | None:
    """The decoder of a mapping's keys: JSON has only text there."""
    annotation = _bare(annotation)
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType, Literal):
        # A key of one of several types: which one it was, only the decoders can tell.
        options = [_key_decoder(a) if origin is not Literal else _one_key(a) for a in typing.get_args(annotation)]
        return _first(options, "of these keys") if any(options) else None
    if annotation in (int, float):
        return _calling(annotation, annotation.__name__)
    if annotation is bool:
        return _calling({"true": True, "false": False}.__getitem__, "bool")
    if annotation is type(None):
        return _calling({"null": None}.__getitem__, "None")
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        members = {_as_key(member.value): member for member in annotation}
        return _calling(members.__getitem__, annotation.__name__)
    return decoder_for(annotation)


def _one_key(literal: Any) -> Decoder:
    return _calling({_as_key(literal): literal}.__getitem__, repr(literal))


def _as_key(value: Any) -> str:
    return str(next(iter(json.loads(dumps({value: None})))))


# --- what has fields -----------------------------------------------------------------------------------------
def _fields_of(cls: Any, annotation: Any) -> dict[str, Any]:
    """The annotations of a class's fields, its type variables replaced by what they stand for."""
    hints = {name: _itself(hint, annotation) for name, hint in hints_of(cls).items()}
    known = _variables(cls, typing.get_args(annotation))
    return {name: _substituted(hint, known) for name, hint in hints.items()} if known else hints


def _itself(hint: Any, cls: Any) -> Any:
    """A hint with the class in place of ``Self``."""
    if hint is typing.Self:
        return cls
    given = typing.get_args(hint)
    arguments = tuple(_itself(argument, cls) for argument in given)
    if all(new is old for new, old in zip(arguments, given, strict=True)):
        return hint
    origin = typing.get_origin(hint)
    return (Union if origin is types.UnionType else origin)[arguments]


def _variables(cls: Any, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    known: dict[Any, Any] = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
    for base in getattr(cls, "__orig_bases__", ()):
        origin = typing.get_origin(base)
        if isinstance(origin, type) and origin is not typing.Generic:
            given = tuple(_substituted(argument, known) for argument in typing.get_args(base))
            known = {**_variables(origin, given), **known}
    return known


def _substituted(hint: Any, known: dict[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return known.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if not parameters or isinstance(hint, type):
        return hint
    return hint[tuple(known.get(parameter, parameter) for parameter in parameters)]


def _dataclass(cls: Any, annotation: Any) -> Decoder:
    @functools.cache  # resolved at first use: a dataclass may refer to itself
    def fields() -> dict[str, Decoder | None]:
        hints = _fields_of(cls, annotation)
        return {f.name: decoder_for(hints.get(f.name, Any)) for f in dataclasses.fields(cls)}

    set_later = [f.name for f in dataclasses.fields(cls) if not f.init]

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _misfit(value, cls.__name__)
        # Unknown fields are dropped: code that was given a new field and rolled back still reads old and new values.
        given = _given(fields(), value)
        later = {name: given.pop(name) for name in set_later if name in given}
        try:
            made = cls(**given)
        except _MISFITS as e:
            raise NotDecodable(f"an object with {', '.join(value) or 'nothing'} is no {cls.__name__} ({e})") from e
        for name, found in later.items():
            object.__setattr__(made, name, found)
        return made

    return decode


def _given(fields: dict[str, Decoder | None], value: dict[str, Any]) -> dict[str, Any]:
    try:
        return {
            name: value[name] if decode is None else decode(value[name])
            for name, decode in fields.items()
            if name in value
        }
    except NotDecodable:
        raise _located((f".{name}", fields[name], value[name]) for name in fields if name in value) from None


def _named_tuple(cls: Any, annotation: Any) -> Decoder:
    @functools.cache
    def makes() -> list[Decoder | None]:
        hints = _fields_of(cls, annotation)
        return [decoder_for(hints.get(name, Any)) for name in cls._fields]

    def decode(value: Any) -> Any:
        if not isinstance(value, list):
            raise _misfit(value, cls.__name__)
        try:
            return cls(*[x if m is None else m(x) for m, x in zip(makes(), value, strict=False)])
        except NotDecodable:
            raise _located((f".{n}", m, x) for n, m, x in zip(cls._fields, makes(), value, strict=False)) from None
        except TypeError as e:
            raise _misfit(value, cls.__name__, e) from e

    return decode


def _typed_dict(cls: Any, annotation: Any) -> Decoder:
    @functools.cache
    def fields() -> dict[str, Decoder | None]:
        return {name: decoder_for(hint) for name, hint in _fields_of(cls, annotation).items()}

    @functools.cache
    def required() -> list[str]:
        # `__required_keys__` takes annotations that are text for ordinary ones.
        said = {name: typing.get_origin(hint) for name, hint in hints_of(cls).items()}
        return [
            name
            for name, how in said.items()
            if how is typing.Required or (name in cls.__required_keys__ and how is not typing.NotRequired)
        ]

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _misfit(value, cls.__name__)
        missing = [name for name in required() if name not in value]
        if missing:
            raise NotDecodable(f"an object without {', '.join(missing)} is no {cls.__name__}")
        return {**value, **_given(fields(), value)}

    return decode


# --- one of several ---------------------------------------------------------------------------------------------
_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (int, float),
    bool: (bool,),
    type(None): (type(None),),
    list: (list,),
    dict: (dict,),
}


def _union(arguments: tuple[Any, ...]) -> Decoder | None:
    members = [_bare(a) for a in arguments if a is not type(None)]
    makes = [decoder_for(a) for a in members]
    if all(make is None for make in makes):
        return None
    optional = type(None) in arguments
    first = makes[0] if len(makes) == 1 else _first(list(map(_option, members, makes)), _named(members))
    assert first is not None
    return (lambda value: None if value is None else first(value)) if optional else first


def _option(member: Any, make: Decoder | None) -> Decoder | None:
    """A member's decoder; where JSON's value is the value, one that tells whether it is of that type."""
    if make is not None:
        return make
    fits = _JSON_TYPES.get(typing.get_origin(member) or member)
    if fits is None:
        return None

    def check(value: Any) -> Any:
        if isinstance(value, fits) and not (isinstance(value, bool) and bool not in fits):
            return value
        raise _misfit(value, member.__name__)

    return check


def _first(options: list[Decoder | None], expected: str) -> Decoder:
    """The first that a value fits such that it would be encoded as the same value again, or else the first it fits."""

    def decode(value: Any) -> Any:
        found: list[Any] = []
        for make in options:
            if make is None:
                found.append(value)
                break
            try:
                made = make(value)
            except NotDecodable:
                continue
            if made is value or _same(made, value):
                return made
            found.append(made)
        if not found:
            raise _misfit(value, expected)
        return found[0]

    return decode


def _named(members: list[Any]) -> str:
    return " or ".join(getattr(member, "__name__", str(member)) for member in members)
