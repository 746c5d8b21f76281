"""Spans of the user's own, from inside a workflow."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import Any

from .names import check_name
from .primitives import require


class _Done:
    """Something to await that is done already; it may be left alone, too."""

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


def trace(name: str, attributes: Mapping[str, Any] | None = None) -> _Done:
    """Write a span of one's own into the run's trace: a moment of the run, with what is to be said of it.

    It is written once, when the step in which the code came here is committed, however often the run is replayed; a
    worker that dies in between may take it with it.  It leaves nothing in the history: calls may come and go with
    versions of the code.  Without an OpenTelemetry SDK, or with ``DRAMATIQ_DURABLE_TELEMETRY=off``, it does nothing.

    Parameters:
      name(str): the span's name, 1 to 200 characters.
      attributes: texts, numbers and booleans by their names, or lists of one kind of these.

    Raises:
      NotInWorkflow: outside a workflow; there, OpenTelemetry's own tracer does it.
      InvalidName: the name is empty, too long or no text.
      TypeError: the attributes are no such mapping.
    """
    execution = require("durable.trace()")
    check_name(name, "a span's name")
    given = _checked(name, attributes)
    n = execution.state["traces"] = execution.state.get("traces", 0) + 1
    if execution.traced is not None:
        execution.traced.append((n, name, time.time_ns(), given))
    return _Done()


def _checked(span: str, attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    if attributes is None:
        return {}
    if not isinstance(attributes, Mapping):
        raise TypeError(f"the attributes of the span {span!r} are a mapping, not {attributes!r:.60}")
    for name, value in attributes.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"an attribute of the span {span!r} has a name that is no text: {name!r:.60}")
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, (str, bool, int, float)) for v in values) or len({type(v) for v in values}) > 1:
            raise TypeError(
                f"the attribute {name!r} of the span {span!r} is a text, a number, a boolean or a list of one kind of "
                f"these, not {value!r:.60}"
            )
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in attributes.items()}
