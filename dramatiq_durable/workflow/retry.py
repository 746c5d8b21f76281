"""When an activity that failed is tried again: ``RetryPolicy``, and what of it travels with the activity's message."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..durations import Duration, parse_duration

logger = logging.getLogger(__name__)

#: The message's option that carries a policy.
OPTION = "durable_retry"

#: The longest that an attempt is put off, in milliseconds: ten years.
LONGEST = 315_360_000_000


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When an activity that failed is tried again.  It replaces Dramatiq's retry options of the actor.

    The n-th retry comes ``initial_interval * backoff_coefficient ** (n - 1)`` after the failure, at the most
    ``maximum_interval``.  An exception can ask for another delay: its attribute ``next_retry_delay``, a duration.

    Parameters:
      initial_interval: seconds, a ``timedelta`` or text such as ``"500ms"``.
      backoff_coefficient(float): from 1 to 1000.
      maximum_interval: a duration; None is no bound.
      maximum_attempts(int | None): how often it is tried in all, the first time included; None is for ever.
      non_retryable: exceptions after which it is not tried again, as classes or as names (``"ValueError"``,
        ``"shop.errors.Declined"``); their subclasses count.

    Raises:
      ValueError: a value makes no sense.
    """

    initial_interval: Duration = 1
    backoff_coefficient: float = 2
    maximum_interval: Duration | None = None
    maximum_attempts: int | None = None
    non_retryable: tuple[str | type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        try:
            parse_duration(self.initial_interval)
            if self.maximum_interval is not None:
                parse_duration(self.maximum_interval)
        except ValueError as e:
            raise ValueError(f"an interval of a RetryPolicy: {e}") from None
        coefficient = self.backoff_coefficient
        if not isinstance(coefficient, (int, float)) or isinstance(coefficient, bool) or not 1 <= coefficient <= 1000:
            raise ValueError(f"backoff_coefficient is a number from 1 to 1000, not {coefficient!r}.")
        most = self.maximum_attempts
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ValueError(
                f"maximum_attempts counts the first try, and is at least 1, or None for no bound, not {most!r}."
            )
        given: Any = self.non_retryable
        if not isinstance(given, (tuple, list, set, frozenset)):
            raise ValueError(f"non_retryable is a tuple, like (ValueError, 'Declined'), not {given!r}.")
        for what in given:
            if not isinstance(what, str) and not (isinstance(what, type) and issubclass(what, BaseException)):
                raise ValueError(f"non_retryable has exception classes or their names, not {what!r}.")

    def to_json(self) -> dict[str, Any]:
        """Return what travels with the message: milliseconds, and names instead of classes."""
        most = self.maximum_interval
        return {
            "initial": min(parse_duration(self.initial_interval), LONGEST),
            "coefficient": self.backoff_coefficient,
            "maximum": None if most is None else min(parse_duration(most), LONGEST),
            "attempts": self.maximum_attempts,
            "non_retryable": [what if isinstance(what, str) else what.__name__ for what in self.non_retryable],
        }


def delay_after(policy: Mapping[str, Any], attempt: int) -> int:
    """Return how many milliseconds after the failure of an attempt (from 1) the next one comes."""
    delay = policy["initial"] * float(policy["coefficient"]) ** min(attempt - 1, 60)
    most = policy.get("maximum")
    return int(min(delay, LONGEST if most is None else most, LONGEST))


def is_last(policy: Mapping[str, Any], attempt: int) -> bool:
    """Return whether no attempt follows this one."""
    most = policy.get("attempts")
    return most is not None and attempt >= most


def forbids(policy: Mapping[str, Any], exception: BaseException) -> bool:
    """Return whether no attempt follows this exception: it, or a base class, is named as one."""
    names = policy.get("non_retryable") or ()
    return any(
        kind.__name__ in names or f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(exception).__mro__
    )


def next_delay(policy: Mapping[str, Any] | None, attempt: int, exception: BaseException) -> int | None:
    """Return in how many milliseconds another attempt follows one that failed with this exception; None: none does."""
    if not policy or forbids(policy, exception) or is_last(policy, attempt):
        return None
    asked = asked_delay(exception)
    return delay_after(policy, attempt) if asked is None else asked


def asked_delay(exception: BaseException) -> int | None:
    """Return the milliseconds after which an exception itself asks to be tried again: its ``next_retry_delay``."""
    asked = getattr(exception, "next_retry_delay", None)
    if asked is None:
        return None
    try:
        return min(parse_duration(asked), LONGEST)
    except ValueError as e:
        logger.warning("next_retry_delay of a %s is ignored: %s", type(exception).__name__, e)
        return None
