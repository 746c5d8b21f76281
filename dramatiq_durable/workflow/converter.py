"""Values to bytes and back: compact JSON, and typed by annotations on the way in.

Beyond JSON, ``encode`` takes tuples, sets, dataclasses, pydantic models, enums, dates and times, ``UUID``, ``Decimal``,
bytes, paths and addresses (see `plain`); ``decode`` makes them again where an annotation says so (see `decoders`), and
leaves JSON as it is where none does.  The same value always gives the same bytes: the bytes of a call's arguments are
hashed, and the hash is compared on replay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import json.encoder
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..errors import NotDecodable, NotEncodable, PayloadTooLarge
from .decoders import Decoder, decoder_for
from .hints import hints_of
from .plain import KEYS as _KEYS
from .plain import dumps as _dumps

MAX_PAYLOAD: Final = 16 * 1024 * 1024
"""The cap on one value, in bytes."""

_EMPTY_CALL: Final = b'{"args":[],"kwargs":{}}'


# --- encode ------------------------------------------------------------------------------------------
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
        f"{what}: cannot be encoded: {why}. "
        "Pass JSON values, dataclasses, pydantic models, enums, dates, UUIDs, Decimals or bytes."
    )


def _find(value: Any, path: str, depth: int) -> tuple[str, str] | None:
    """Return the path to the first part that has no encoding, and why; None if there is none."""
    if depth > 50:
        return None
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, type(None), *_KEYS)):
                kinds = "keys are text, numbers, enums, UUIDs, Decimals or dates"
                return path or "its top level", f"a key of type {type(key).__name__} ({kinds})"
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


# --- decode ------------------------------------------------------------------------------------------
def loads(data: bytes) -> Any:
    """Decode bytes to plain JSON values.

    Raises:
      ValueError: the bytes are not JSON, or nested deeper than can be read.
    """
    try:
        return _loads(data.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError("it is nested too deep to be read") from None


def decode(data: bytes, annotation: Any = Any, what: str = "the value") -> Any:
    """Decode a value, typed by an annotation.

    Raises:
      ValueError: the bytes are not JSON.
      NotDecodable: they do not fit the annotation's type; the message names the place.
    """
    return fit(loads(data), decoder_for(annotation), what)


def fit(value: Any, make: Decoder | None, what: str) -> Any:
    """Make of a plain value what its decoder makes of it; ``what`` names it in errors.

    Raises:
      NotDecodable: it does not fit.
    """
    if make is None:
        return value
    try:
        return make(value)
    except NotDecodable as e:
        e.what = what
        raise


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
    try:
        known = _decoders.get(fn)
        if known is None:
            known = _decoders[fn] = _decoders_of(fn)
        return known
    except TypeError:  # what nobody can refer to weakly, e.g. a method of a built-in type
        return _decoders_of(fn)


def _decoders_of(fn: Callable[..., Any]) -> Decoders:
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
    return Decoders(
        positional=tuple(positional),
        named=named,
        rest=rest,
        result=decoder_for(hints.get("return", Any)),
        plain=rest is None and not named and not any(positional),
    )


def decode_call(data: bytes, fn: Callable[..., Any] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """Decode what ``encode_call`` made, typed by the function's annotations.

    Returns:
      The positional arguments and the keyword arguments.

    Raises:
      ValueError: the bytes are no call.
      NotDecodable: an argument does not fit its annotation; the message names it.
    """
    call = loads(data)
    args: list[Any] = call["args"]
    kwargs: dict[str, Any] = call["kwargs"]
    if fn is not None:
        _type(args, kwargs, fn)
    return args, kwargs


def typed(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call that are plain JSON values as the function's annotations say.

    Raises:
      NotDecodable: an argument does not fit its annotation; the message names it.
    """
    if decoders_of(fn).plain:
        return args, kwargs
    positional, named = list(args), dict(kwargs)
    _type(positional, named, fn)
    return tuple(positional), named


def _type(args: list[Any], kwargs: dict[str, Any], fn: Callable[..., Any]) -> None:
    known = decoders_of(fn)
    if known.plain:
        return
    place = 0
    try:
        for i, value in enumerate(args):
            make = known.positional[i] if i < len(known.positional) else known.rest
            if make is not None:
                place = i
                args[i] = make(value)
        if known.named:
            for i, (name, value) in enumerate(kwargs.items(), len(args)):
                make = known.named.get(name) or known.named.get("**")
                if make is not None:
                    place = i
                    kwargs[name] = make(value)
    except NotDecodable as e:
        e.what = _places(tuple(args), kwargs, fn)[place][0]
        raise
