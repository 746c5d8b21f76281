"""The W3C trace context as text, and ids that are derived: what is exported twice is the same span."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from . import FIRST, WORKFLOW

#: The keys under which context travels, in a message's options and in what a run is started with, and how long each
#: may be: what is longer, or no text, is as good as not there.
CARRIED: Final = {"traceparent": 55, "tracestate": 512, "baggage": 8192}

#: How much is told of a name or an id that a message brings: ours are no longer.
LONGEST: Final = 200

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def carried(options: Any) -> dict[str, str]:
    """The context that somebody's options carry; empty if they have none.  Never raises: anybody may have made them."""
    if not isinstance(options, Mapping):
        return {}
    found: dict[str, str] = {}
    for key, longest in CARRIED.items():
        value = options.get(key)
        if isinstance(value, str) and len(value) <= longest and value.isascii() and value.isprintable():
            found[key] = value
    if "traceparent" not in found or _TRACEPARENT.fullmatch(found["traceparent"]) is None:
        found.pop("traceparent", None)
        found.pop("tracestate", None)
    return found


def workflow_id_in(options: Any) -> str | None:
    """The workflow id that an activity's options name, if that is one.  Never raises: anybody may have made them."""
    named = options.get(WORKFLOW) if isinstance(options, Mapping) else None
    return named if isinstance(named, str) and len(named) <= LONGEST else None


def trace_id_of(options: Any) -> str | None:
    """The trace id, as 32 hexadecimal digits, of the context that options carry."""
    parent = carried(options).get("traceparent")
    return None if parent is None else parent[3:35]


def source_of(facts: Mapping[str, Any], run_id: str) -> str:
    """What the trace of a run is derived from that was begun in none: itself, or the first run that it goes on for."""
    first = facts.get(FIRST)
    return first if isinstance(first, str) else run_id


def derived_trace_id(source: str) -> int:
    """The trace id of what was begun in no trace: the same wherever it is derived.  ``source`` is its id."""
    return int.from_bytes(_digest("trace", source)[:16], "big") or 1


def derived_span_id(source: str, what: str) -> int:
    """The id of a span: of what (an event, an attempt, ...), of which run or message."""
    return int.from_bytes(_digest("span", f"{source}:{what}")[:8], "big") or 1


def _digest(kind: str, text: str) -> bytes:
    return hashlib.blake2b(f"{kind}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
