"""Values to bytes and back: compact JSON, and typed by annotations on the way in.

Plain JSON values go straight through the C encoder and decoder.  Beyond JSON, ``encode`` takes tuples, sets,
dataclasses, enums, dates and times, ``UUID``, ``Decimal`` and bytes; ``decode`` makes them again where an annotation
says so, and leaves JSON as it is where none does.  The same value always gives the same bytes: the bytes of a
call's arguments are hashed, and the hash is compared on replay.
"""

from __future__ import annotations

import base64
import collections.abc
import dataclasses
import functools
import hashlib
import inspect
import json
import json.encoder
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, NewType, Union
from uuid import UUID

from ..errors import NotEncodable, PayloadTooLarge

Decoder = Callable[[Any], Any]

MAX_PAYLOAD: Final = 16 * 1024 * 1024
"""The cap on one value, in bytes."""

_EMPTY_CALL: Final = b'{"args":[],"kwargs":{}}'


# --- encode ------------------------------------------------------------------------------------------
def _plain(value: Any) -> Any:
    """Turn what JSON does not have into what it has.

    Raises:
      TypeError: the value's type is not supported.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        # A set's order differs from process to process; its encoding must not, or a replay would see other arguments.
        return [item for _, item in sorted(((_dumps(item), item) for item in value), key=lambda pair: pair[0])]
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def _make_encoder() -> Callable[[Any], str]:
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C accelerator
        return json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False, default=_plain).encode
    # JSONEncoder.encode builds this object anew at each call.  No markers: they would be shared by threads, and a
    # value that contains itself ends in RecursionError all the same.
    chunks = make(None, _plain, json.encoder.encode_basestring, None, ":", ",", False, False, True)
    return lambda value: "".join(chunks(value, 0))


_dumps = _make_encoder()
_loads = json.JSONDecoder().decode


def encode(value: Any, what: str = "the value") -> bytes:
    """Encode a value.

    Parameters:
      value: what to encode.
      what(str): names the value in errors, e.g. ``the result of 'charge'``.

    Returns:
      bytes: JSON in UTF-8 (lone surrogates survive); the same value gives the same bytes in every process.

    Raises:
      NotEncodable: a part of the value has no encoding; the message names its place.
      PayloadTooLarge: it is over 16 MiB.
    """
    try:
        text = _dumps(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise _not_encodable(value, what, e) from None
    return _to_bytes(text, what)


def encode_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[..., Any] | None = None, what: str | None = None
) -> bytes:
    """Encode a call's arguments as ``{"args": [...], "kwargs": {...}}``.

    Parameters:
      fn: the function that is called, for the parameters' names in errors.
      what(str | None): name of the activity or workflow, for errors.

    Raises:
      NotEncodable: an argument has no encoding; the message names it, e.g. ``argument 2 ('cents') of 'charge'``.
      PayloadTooLarge: the arguments are over 16 MiB together.
    """
    if not args and not kwargs:
        return _EMPTY_CALL
    try:
        text = _dumps({"args": args, "kwargs": kwargs})
    except (TypeError, ValueError, RecursionError):
        suffix = f" of {what!r}" if what else ""
        for place, value in _places(args, kwargs, fn):
            encode(value, place + suffix)
        raise
    return _to_bytes(text, f"the arguments of {what!r}" if what else "the arguments")


def _to_bytes(text: str, what: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > MAX_PAYLOAD:
        raise PayloadTooLarge(
            f"{what} would be {len(data):,} bytes, the cap is {MAX_PAYLOAD:,}: "
            "keep the data elsewhere and pass a reference to it."
        )
    return data


def _places(args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[..., Any] | None) -> list[tuple[str, Any]]:
    names: list[str] = []
    if fn is not None:
        try:
            names = list(inspect.signature(fn).parameters)
        except (TypeError, ValueError):
            names = []
    places = [
        (f"argument {i + 1} ({names[i]!r})" if i < len(names) else f"argument {i + 1}", value)
        for i, value in enumerate(args)
    ]
    return places + [(f"argument {name!r}", value) for name, value in kwargs.items()]


def _not_encodable(value: Any, what: str, error: Exception) -> NotEncodable:
    if isinstance(error, RecursionError):
        why = "it is nested too deeply, or contains itself"
    else:
        path, why = _find(value, "", 0) or ("", str(error))
        what = f"{what}, at {path}" if path else what
    return NotEncodable(
        f"{what}: cannot be encoded: {why}. Pass JSON values, dataclasses, enums, dates, UUIDs, Decimals or bytes."
    )


def _find(value: Any, path: str, depth: int) -> tuple[str, str] | None:
    """Return the path to the first part that has no encoding, and why; None if there is none."""
    if depth > 50:
        return None
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                return path or "its top level", f"a key of type {type(key).__name__} (keys are text or numbers)"
            found = _find(item, f"{path}[{key!r}]", depth + 1)
            if found:
                return found
        return None
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            found = _find(item, f"{path}[{i}]", depth + 1)
            if found:
                return found
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            found = _find(getattr(value, field.name), f"{path}.{field.name}", depth + 1)
            if found:
                return found
        return None
    try:
        _dumps(value)
    except (TypeError, ValueError, RecursionError) as e:
        return path, str(e)
    return None


def hash_arguments(data: bytes) -> str:
    """Return the hash of encoded arguments that history keeps and replay compares: 16 hex digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


# --- decoders, compiled once for each annotation; None stands for "leave the value as it is" -------------
_SEQUENCES = (list, collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_SETS: dict[Any, Callable[[Any], Any]] = {
    set: set,
    frozenset: frozenset,
    collections.abc.Set: frozenset,
    collections.abc.MutableSet: set,
}


def hints_of(subject: Any) -> dict[str, Any]:
    """Return resolved annotations; those of a function or class that cannot be resolved are left out.

    A name that exists only for type checkers must not make a workflow undecodable: its value stays JSON.
    """
    try:
        return typing.get_type_hints(subject, include_extras=True)
    except Exception:
        annotations = getattr(subject, "__annotations__", {})
        return {name: hint for name, hint in annotations.items() if not isinstance(hint, str)}


def decoder_for(annotation: Any) -> Decoder | None:
    """Return the decoder of an annotation, or None where JSON's value is the value."""
    try:
        return _cached(annotation)
    except TypeError:  # an annotation that cannot be hashed, e.g. Annotated with a list
        return _compile(annotation)


@functools.lru_cache(maxsize=4096)
def _cached(annotation: Any) -> Decoder | None:
    return _compile(annotation)


def _compile(annotation: Any) -> Decoder | None:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        return decoder_for(arguments[0])
    if isinstance(annotation, NewType):
        return decoder_for(annotation.__supertype__)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is tuple or annotation is tuple:
        return _tuple(arguments)
    if origin in _SEQUENCES:
        item = decoder_for(arguments[0])
        return None if item is None else _collect(list, item)
    if origin in _MAPPINGS:
        return _mapping(*arguments)
    if origin in _SETS or annotation in _SETS:
        return _collect(_SETS[origin or annotation], decoder_for(arguments[0]) if arguments else None)
    if isinstance(origin or annotation, type):
        return _class(origin or annotation)
    return None


def _collect(make: Callable[[Any], Any], item: Decoder | None) -> Decoder:
    if item is None:
        return make
    each = item
    return lambda value: make([each(x) for x in value])


def _class(cls: Any) -> Decoder | None:
    if issubclass(cls, Enum):
        return lambda value: cls(value)
    if cls in _SCALARS:
        return _SCALARS[cls]
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        hints = hints_of(cls)
        makes = [decoder_for(hints.get(name, Any)) for name in cls._fields]
        return lambda value: cls(*[x if m is None else m(x) for m, x in zip(makes, value, strict=False)])
    return None


_SCALARS: dict[type, Decoder] = {
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    timedelta: lambda value: timedelta(seconds=value),
    UUID: UUID,
    Decimal: Decimal,
    bytes: base64.b64decode,
    bytearray: lambda value: bytearray(base64.b64decode(value)),
}


def _dataclass(cls: Any) -> Decoder:
    fields: dict[str, Decoder | None] | None = None

    def make(value: Any) -> Any:
        nonlocal fields
        if fields is None:  # resolved at first use: a dataclass may refer to itself
            hints = hints_of(cls)
            fields = {f.name: decoder_for(hints.get(f.name, Any)) for f in dataclasses.fields(cls) if f.init}
        if not isinstance(value, dict):
            raise TypeError(f"{cls.__name__} expects an object, not {type(value).__name__}")
        # Unknown fields are dropped: code that was given a new field and rolled back still reads old and new values.
        return cls(
            **{
                name: value[name] if decode is None else decode(value[name])
                for name, decode in fields.items()
                if name in value
            }
        )

    return make


def _tuple(arguments: tuple[Any, ...]) -> Decoder:
    if not arguments:
        return tuple
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _collect(tuple, decoder_for(arguments[0]))
    makes = [decoder_for(argument) for argument in arguments]
    return lambda value: tuple([x if m is None else m(x) for m, x in zip(makes, value, strict=True)])


def _mapping(key: Any, item: Any) -> Decoder | None:
    key_of: Decoder | None = key if key in (int, float) else decoder_for(key)
    make = decoder_for(item)
    if key_of is None and make is None:
        return None
    return lambda value: {
        (k if key_of is None else key_of(k)): (x if make is None else make(x)) for k, x in value.items()
    }


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
    members = [a for a in arguments if a is not type(None)]
    makes = [decoder_for(a) for a in members]
    if all(make is None for make in makes):
        return None
    if len(makes) == 1:
        only = makes[0]
        assert only is not None
        return lambda value: None if value is None else only(value)

    def first_that_fits(value: Any) -> Any:
        if value is None:
            return None
        for member, make in zip(members, makes, strict=True):
            if make is None:
                fits = _JSON_TYPES.get(typing.get_origin(member) or member)
                if fits is None or (isinstance(value, fits) and not (isinstance(value, bool) and bool not in fits)):
                    return value
                continue
            try:
                return make(value)
            except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError):
                continue
        return value

    return first_that_fits


# --- decode ------------------------------------------------------------------------------------------
def loads(data: bytes) -> Any:
    """Decode bytes to plain JSON values.

    Raises:
      ValueError: the bytes are not JSON.
    """
    return _loads(data.decode("utf-8", "surrogatepass"))


def decode(data: bytes, annotation: Any = Any) -> Any:
    """Decode a value, typed by an annotation.

    Raises:
      ValueError, TypeError: the bytes are not JSON, or do not fit the annotation's type.
    """
    value = loads(data)
    make = decoder_for(annotation)
    return value if make is None else make(value)


@dataclasses.dataclass(slots=True, frozen=True)
class Decoders:
    """What a function's annotations say about decoding; None is "leave JSON as it is"."""

    positional: tuple[Decoder | None, ...]
    named: dict[str, Decoder]
    rest: Decoder | None
    result: Decoder | None
    plain: bool
    """True when no parameter needs decoding."""


_decoders: weakref.WeakKeyDictionary[Callable[..., Any], Decoders] = weakref.WeakKeyDictionary()


def decoders_of(fn: Callable[..., Any]) -> Decoders:
    """Return the decoders of a function's parameters and result; made once for each function."""
    known = _decoders.get(fn)
    if known is not None:
        return known
    hints = hints_of(fn)
    positional: list[Decoder | None] = []
    named: dict[str, Decoder] = {}
    rest: Decoder | None = None
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    for parameter in parameters:
        make = decoder_for(hints.get(parameter.name, Any))
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = make
            continue
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(make)
        if make is not None:
            # A VAR_KEYWORD parameter is kept under "**": the decoder of every name that is no parameter.
            named["**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name] = make
    known = Decoders(
        positional=tuple(positional),
        named=named,
        rest=rest,
        result=decoder_for(hints.get("return", Any)),
        plain=rest is None and not named and not any(positional),
    )
    _decoders[fn] = known
    return known


def decode_call(data: bytes, fn: Callable[..., Any] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """Decode what ``encode_call`` made, typed by the function's annotations.

    Returns:
      The positional arguments and the keyword arguments.

    Raises:
      ValueError, TypeError: the bytes are no call, or an argument does not fit its annotation.
    """
    call = loads(data)
    args: list[Any] = call["args"]
    kwargs: dict[str, Any] = call["kwargs"]
    if fn is not None:
        _type(args, kwargs, decoders_of(fn))
    return args, kwargs


def typed(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call that are plain JSON values as the function's annotations say.

    Raises:
      ValueError, TypeError: an argument does not fit its annotation.
    """
    known = decoders_of(fn)
    if known.plain:
        return args, kwargs
    positional, named = list(args), dict(kwargs)
    _type(positional, named, known)
    return tuple(positional), named


def _type(args: list[Any], kwargs: dict[str, Any], known: Decoders) -> None:
    if known.plain:
        return
    for i, value in enumerate(args):
        make = known.positional[i] if i < len(known.positional) else known.rest
        if make is not None:
            args[i] = make(value)
    if known.named:
        for name, value in kwargs.items():
            make = known.named.get(name) or known.named.get("**")
            if make is not None:
                kwargs[name] = make(value)
