"""Values that the database looks into: search attributes and entities are kept as JSON there, and must be JSON here.

A search attribute that is a time is ``{"time": text}``, the text always of one form, so that times compare as texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from ..errors import NotEncodable, PayloadTooLarge
from .converter import encode, loads

MAX_ENTITY: Final = 1024 * 1024
"""The cap on an entity, in bytes of JSON."""

MAX_SEARCH: Final = 32 * 1024
"""The cap on all search attributes of a run together, in bytes of JSON."""

_NAME = re.compile(r"[^\W\d][\w-]{0,99}")


def time_text(at: datetime) -> str:
    """A time as the database compares it."""
    at = at.astimezone(UTC)
    # Not strftime, which writes the years before 1000 with fewer digits on some systems.
    return at.replace(tzinfo=None).isoformat(timespec="microseconds")


# --- search attributes -----------------------------------------------------------------------------------
def check_search(search: Any) -> dict[str, Any]:
    """Return search attributes as JSON has them.

    Raises:
      ValueError: a name or a time makes no sense.
      NotEncodable: it is no dict, or a value is of none of the types that can be searched for.
      PayloadTooLarge: they are over 32 KiB together.
    """
    if not isinstance(search, Mapping):
        raise NotEncodable(f"search attributes are a dict of names and values, not {search!r:.60}.")
    checked = {_attribute_name(name): _attribute(name, value) for name, value in search.items()}
    _check_size(checked)
    return checked


def merged_search(known: Mapping[str, Any], search: Mapping[str, Any]) -> dict[str, Any]:
    """Return search attributes after others were set; None removes one.

    Raises:
      PayloadTooLarge: they are over 32 KiB together.
    """
    merged = {name: value for name, value in {**known, **search}.items() if value is not None}
    _check_size(merged)
    return merged


def _check_size(search: Mapping[str, Any]) -> None:
    size = len(encode(search, "the search attributes"))
    if size > MAX_SEARCH:
        raise PayloadTooLarge(
            f"the search attributes are {size:,} bytes, the cap is {MAX_SEARCH:,}: keep what is not searched for in "
            "the memo or the entity."
        )


def _attribute_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a search attribute's name is a letter or an underscore, followed by letters, digits, underscores or "
            f"dashes, 100 at the most, not {name!r:.60}."
        )
    return name


def _attribute(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(str.__str__(value), f"the search attribute {name!r}")
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotEncodable(f"the search attribute {name!r} is {value}: JSON has finite numbers only.")
        return float(value)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(
                f"the search attribute {name!r} is a time without a time zone: give it one, such as tzinfo=UTC."
            )
        return {"time": time_text(value)}
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return [_text(str.__str__(item), f"the search attribute {name!r}") for item in value]
    raise NotEncodable(
        f"the search attribute {name!r} is {_kind(value)}: it can be str, int, float, bool, datetime, a list of str, "
        "or None, which removes it. Structures are for the memo or durable.entity()."
    )


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "a list of other things than str"
    return f"of type {type(value).__name__}"


def _text(text: str, what: str) -> str:
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise NotEncodable(f"{what} has a NUL or half a surrogate pair, which Postgres cannot keep in JSON.")
    return text


def search_values(search: Mapping[str, Any]) -> dict[str, Any]:
    """Return search attributes as people gave them, of what the database has; those that were removed are left out."""
    return {name: _value(value) for name, value in search.items() if value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("time"), str):
        # What is no time was stored by nobody of ours: it is shown as it is.
        with suppress(ValueError):
            return datetime.fromisoformat(value["time"]).replace(tzinfo=UTC)
    return value


# --- entities --------------------------------------------------------------------------------------------
def check_json(value: Any, what: str) -> tuple[Any, int]:
    """Return a copy of a value as it comes back from the database, and its size in bytes.

    Raises:
      NotEncodable: the converter cannot carry it, or JSON in Postgres: NUL, NaN, infinity, half a surrogate pair.
      PayloadTooLarge: it is larger than an entity may be.
    """
    data = encode(value, what)
    if len(data) > MAX_ENTITY:
        raise PayloadTooLarge(
            f"{what} would be {len(data):,} bytes, an entity has at most {MAX_ENTITY:,}: keep the data elsewhere and a "
            "reference to it in the entity."
        )
    plain = loads(data)
    # Few values have any of these: the others are not walked through.
    if b"\\u0000" in data or b"NaN" in data or b"Infinity" in data or b"\xed" in data:
        _refuse(plain, what)
    return plain, len(data)


def _refuse(value: Any, what: str) -> None:
    if isinstance(value, str):
        _text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise NotEncodable(f"{what} has {value} in it: JSON has finite numbers only.")
    elif isinstance(value, list):
        for item in value:
            _refuse(item, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _text(key, what)
            _refuse(item, what)
