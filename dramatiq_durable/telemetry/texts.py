"""Texts that somebody else has chosen: a sender, or a worker of another's."""

from __future__ import annotations

import traceback
from typing import Final

#: The most characters of a message, and of a traceback, that a span has: where an exporter refuses what is large, the
#: other spans go with it.
MESSAGE: Final = 4_000
TRACEBACK: Final = 20_000


def carried_text(text: str, most: int = MESSAGE) -> str:
    """A text as a span may have it: half a surrogate pair would keep the whole batch from being exported."""
    return text[:most].encode("utf-8", "replace").decode()


def carried_traceback(text: str) -> str:
    """A traceback as a span may have it: of a long one its beginning and its end."""
    half = TRACEBACK // 2 - 10
    return carried_text(text if len(text) <= TRACEBACK else f"{text[:half]}\n[...]\n{text[-half:]}", TRACEBACK)


def traced_exception(error: BaseException) -> dict[str, str]:
    """What a span says of an exception, beside its type."""
    told = "".join(traceback.format_exception(error))
    return {"exception.message": carried_text(str(error)), "exception.stacktrace": carried_traceback(told)}


def one_line(text: str) -> str:
    """A text as a line of a log may have it: no line of its own, and nothing that a terminal obeys."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
