"""Names, ids and calls: what a caller can get wrong, checked where the mistake is made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..errors import InvalidName

MAX_NAME = 200
"""The cap on names and ids, in characters."""


def check_name(name: str, what: str) -> str:
    """Return the name, if it is 1 to 200 characters without NUL.

    Raises:
      InvalidName: it is not.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not storable(name):
        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
        raise InvalidName(f"{what} is 1 to {MAX_NAME} characters of text without NUL, not {shown}.")
    return name


def storable(text: str) -> bool:
    """Whether Postgres can keep it: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def check_call(fn: Callable[..., Any] | None, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the function does not take, at the call: a worker would only fail on them later.

    Raises:
      TypeError: there is one too many, too few, or one of another name.
    """
    if fn is not None:
        try:
            _signature(fn).bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{name}(): {e}") from None


@functools.lru_cache(maxsize=1024)
def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(fn)
