"""Exceptions as JSON and back: what crosses the database is a description, never a pickle."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import Failure

F = TypeVar("F", bound=Failure)

_MAX_CAUSES = 8
_MAX_FRAMES = 30
_MAX_TEXT = 16 * 1024


def failure_to_json(exc: BaseException, *, retryable: bool = True) -> dict[str, Any]:
    """Describe an exception as JSON: type, message, traceback (30 frames, 16 kB) and up to 8 causes.

    Never raises: an exception whose text cannot be made is described without it.
    """
    return _describe(exc, retryable, _MAX_CAUSES)


def _describe(exc: BaseException, retryable: bool, causes: int) -> dict[str, Any]:
    try:
        message = str(exc)
    except Exception:
        message = "(this exception's text could not be made)"
    described: dict[str, Any] = {
        "type": type(exc).__name__,
        "message": _shorten(message),
        "traceback": _format_traceback(exc),
        "retryable": retryable,
    }
    if causes and (cause := _cause(exc, causes - 1)) is not None:
        described["cause"] = cause
    return described


def _cause(exc: BaseException, causes: int) -> dict[str, Any] | None:
    if isinstance(exc, Failure) and exc.type != type(exc).__name__:
        # It stands for an exception of another process: that one is the cause, as it was described there.
        described: dict[str, Any] = {
            "type": exc.type,
            "message": exc.message,
            "traceback": exc.traceback,
            "retryable": exc.retryable,
        }
        if exc.timeout is not None:
            described["timeout"] = exc.timeout
        if causes and exc.__cause__ is not None:
            described["cause"] = _describe_link(exc.__cause__, causes - 1)
        return described
    cause = exc.__cause__
    if cause is None and isinstance(exc, BaseExceptionGroup):
        cause = exc.exceptions[0]
    return None if cause is None else _describe_link(cause, causes)


def _describe_link(exc: BaseException, causes: int) -> dict[str, Any]:
    if type(exc) is Failure:  # a link that crossed the database before: keep it as it was
        return _cause(exc, causes) or _describe(exc, exc.retryable, causes)
    return _describe(exc, True, causes)


def _format_traceback(exc: BaseException) -> str | None:
    if exc.__traceback__ is None:
        return None
    try:
        lines = traceback.format_exception(type(exc), exc, exc.__traceback__, limit=-_MAX_FRAMES, chain=False)
    except Exception:
        return None
    return _shorten("".join(lines))


def _shorten(text: str) -> str:
    if len(text) <= _MAX_TEXT and len(text.encode("utf-8", "surrogatepass")) <= _MAX_TEXT:
        return text
    # The end of a traceback says most; UTF-8 takes up to 4 bytes a character, so cut by bytes.
    data = text.encode("utf-8", "surrogatepass")
    return "... " + data[-(_MAX_TEXT - 4) :].decode("utf-8", "ignore")


def failure_from_json(described: Mapping[str, Any], cls: type[F], **extra: Any) -> F:
    """Rebuild a failure, with its chain of causes: each link is a ``Failure`` with ``.type``.

    Parameters:
      cls: the class of the first link.
      **extra: attributes to set on it, e.g. ``activity``.
    """
    failure = _link(described, cls)
    for name, value in extra.items():
        setattr(failure, name, value)
    link: Failure = failure
    cause = described.get("cause")
    # Whoever holds an activity's lease describes its failure: what is no description ends the chain.
    while cause and isinstance(cause, Mapping):
        behind = _link(cause, Failure)
        link.__cause__ = behind
        link, cause = behind, cause.get("cause")
    return failure


def _link(described: Mapping[str, Any], cls: type[F]) -> F:
    link = cls(
        str(described.get("message", "")),
        type=str(described.get("type", "Exception")),
        traceback=described.get("traceback"),
        retryable=bool(described.get("retryable", True)),
    )
    timeout = described.get("timeout")
    if isinstance(timeout, str):
        link.timeout = timeout
    return link
