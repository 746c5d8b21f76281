"""What JSON does not have, as what it has: values to text.

Plain JSON goes straight through the C encoder.  The same value always gives the same text.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import inspect
import ipaddress
import json
import json.encoder
import pathlib
import sys
import zoneinfo
from collections import deque
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, Final
from uuid import UUID

#: Types that are written as their text, and read by being called with it.
WRITTEN: Final = (
    UUID,
    Decimal,
    Fraction,
    pathlib.PurePath,
    zoneinfo.ZoneInfo,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)


def _plain(value: Any) -> Any:
    """Turn what JSON does not have into what it has.

    Raises:
      TypeError: the value's type is not supported.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, WRITTEN):
        return str(value)
    if isinstance(value, timedelta):
        return _seconds(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        # A set's order differs from process to process; its encoding must not, or a replay would see other arguments.
        return [item for _, item in sorted(((dumps(item), item) for item in value), key=lambda pair: pair[0])]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, deque):
        return list(value)
    if is_model(type(value)):
        return dump_model(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def _seconds(value: timedelta) -> Any:
    seconds = value.total_seconds()
    try:
        exact = timedelta(seconds=seconds) == value
    except OverflowError:
        exact = False
    # A float has no microseconds beyond some centuries.
    return seconds if exact else [value.days, value.seconds, value.microseconds]


#: What keys of mappings are, beside JSON's own: their text is.
KEYS = (Enum, UUID, Decimal, date, time)


def _with_plain_keys(value: Any) -> Any:
    """The same value, with keys that JSON takes: JSON's encoder asks nobody about keys."""
    if isinstance(value, Mapping):
        return {_key(key): _with_plain_keys(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_plain_keys(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return _with_plain_keys(_plain(value))


def _key(key: Any) -> Any:
    return _plain(key) if isinstance(key, KEYS) and not isinstance(key, (str, int, float)) else key


def _make_encoder() -> Callable[[Any], str]:
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C accelerator
        return json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False, default=_plain).encode
    # JSONEncoder.encode builds this object anew at each call.  No markers: they would be shared by threads, and a
    # value that contains itself ends in RecursionError all the same.
    chunks = make(None, _plain, json.encoder.encode_basestring, None, ":", ",", False, False, True)
    return lambda value: "".join(chunks(value, 0))


_encode_plain = _make_encoder()


def dumps(value: Any) -> str:
    """Return a value as JSON.

    Raises:
      TypeError, ValueError, RecursionError: a part of it has no encoding.
    """
    try:
        return _encode_plain(value)
    except TypeError as e:
        if not str(e).startswith("keys must be"):
            raise
        return _encode_plain(_with_plain_keys(value))


# --- pydantic, where the application has it -------------------------------------------------------------------
def is_model(cls: type) -> bool:
    """Whether a class is a model of pydantic's; pydantic is never imported here."""
    pydantic = sys.modules.get("pydantic")
    base = getattr(pydantic, "BaseModel", None)
    return isinstance(base, type) and issubclass(cls, base)


@functools.cache
def _by_name(load: Any) -> bool:
    return "by_name" in inspect.signature(load).parameters


def dump_model(model: Any) -> Any:
    """A model as plain JSON: by its fields' names, or their aliases where pydantic cannot read names again."""
    by_alias = not _by_name(type(model).model_validate_json)
    return model.model_dump(mode="json", round_trip=True, by_alias=by_alias)


def load_model(cls: Any, value: Any) -> Any:
    """The model that `dump_model` made plain.  Raises pydantic's ValidationError, a ValueError."""
    load = cls.model_validate_json
    options = {"by_name": True, "by_alias": True} if _by_name(load) else {}
    return load(json.dumps(value), **options)
