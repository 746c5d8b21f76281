"""Durations as people write them: seconds, ``timedelta``, or text such as ``"3 days"``."""

from __future__ import annotations

import math
import re
from datetime import timedelta

Duration = int | float | timedelta | str
"""Seconds, a ``timedelta``, or text: ``"250ms"``, ``"1h 30m"``, ``"3 days"``."""

_EXAMPLES = 'seconds (2.5), a timedelta, or text such as "250ms", "1h 30m" or "3 days"'
_UNITS = {
    **dict.fromkeys(("ms", "msec", "msecs", "millisecond", "milliseconds"), 1),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1_000),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60_000),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3_600_000),
    **dict.fromkeys(("d", "day", "days"), 86_400_000),
    **dict.fromkeys(("w", "week", "weeks"), 604_800_000),
}
_TEXT = re.compile(r"(?:\d+(?:\.\d+)?\s*[a-z]+(?:\s*,\s*|\s+and\s+|\s*))+", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.ASCII)

#: A thousand years: more is a mistake, and would not fit the database's times.
_LIMIT = 1000 * 366 * 86_400_000


def parse_duration(value: Duration) -> int:
    """Turn a duration into whole milliseconds, rounded up.

    Parameters:
      value: seconds (int or float), a ``timedelta``, or text: numbers with units ms, s, m, h, d, w (or their
        names), side by side or with spaces or commas between; a number alone is seconds.

    Returns:
      int: milliseconds, at least 0.

    Raises:
      ValueError: it is negative, not finite, malformed, or longer than a thousand years.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a duration: give {_EXAMPLES}.")
    if isinstance(value, timedelta):
        ms = (value.days * 86_400 + value.seconds) * 1000 + -(-value.microseconds // 1000)
    elif isinstance(value, int):
        ms = value * 1000
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value!r} is not a duration: give {_EXAMPLES}.")
        ms = whole_milliseconds(value)
    elif isinstance(value, str):
        ms = _parse_text(value)
    else:
        raise ValueError(f"{value!r} is not a duration: give {_EXAMPLES}.")
    if ms < 0:
        raise ValueError(f"{value!r} is negative; a duration is at least 0: give {_EXAMPLES}.")
    if ms > _LIMIT:
        raise ValueError(f"{value!r} is longer than a thousand years: give {_EXAMPLES}.")
    return ms


def whole_milliseconds(seconds: float) -> int:
    """Round seconds up to whole milliseconds; what is less than 10 ns over is floating-point noise."""
    return math.ceil(round(seconds * 1000, 5))


def _parse_text(value: str) -> int:
    text = value.strip().lower()
    try:
        if re.fullmatch(r"\d+(?:\.\d+)?", text, re.ASCII):
            return whole_milliseconds(float(text))
    except OverflowError:
        return _LIMIT + 1
    if not _TEXT.fullmatch(text):
        raise ValueError(f"{value!r} is not a duration: give {_EXAMPLES}.")
    total = 0.0
    for number, unit in _PART.findall(text):
        if unit not in _UNITS:
            raise ValueError(f"{value!r}: {unit!r} is not a unit of time: give {_EXAMPLES}.")
        total += float(number) * _UNITS[unit]
    return math.ceil(round(total, 5)) if total <= _LIMIT else _LIMIT + 1
