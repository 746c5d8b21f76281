"""Names and ids: what Postgres keeps and people read."""

from __future__ import annotations

from ..errors import InvalidName

MAX_NAME = 200
"""The cap on names and ids, in characters."""


def check_name(name: str, what: str) -> str:
    """Return the name, if it is 1 to 200 characters without NUL.

    Raises:
      InvalidName: it is not.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not _storable(name):
        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
        raise InvalidName(f"{what} is 1 to {MAX_NAME} characters of text without NUL, not {shown}.")
    return name


def _storable(text: str) -> bool:
    """Whether Postgres can keep it: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
