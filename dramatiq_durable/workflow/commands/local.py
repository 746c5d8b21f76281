"""What is computed on the spot, inside the workflow task, and recorded with it: side effects and local activities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ... import errors
from .. import events
from ..failures import failure_from_json
from .base import Call, Command

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Compute(Command):
    """Call a function outside of the workflow's code, once; what comes of it is the event that answers.

    It has no event of its own: a run whose answer was not recorded computes again.

    Attributes:
      fn: what is called; ``args(tuple)``, ``kwargs(dict)``.
      answer(str): the type of the event that records the outcome.
      attempt(int): which attempt it is, from 1.
      hopeless: whether it would fail for good with this exception.
      limit(tuple[int, str] | None): how long it may take, in milliseconds, and what that limit is called.
      about(dict | None): of an activity: what `activity_info()` tells its code.
    """

    fn: Callable[..., Any] = field(kw_only=True)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    answer: str = field(kw_only=True)
    attempt: int = 1
    hopeless: Callable[[BaseException], bool] | None = None
    limit: tuple[int, str] | None = None
    about: dict[str, Any] | None = None

    @property
    def slow(self) -> bool:
        """Whether it may take its time."""
        return self.answer == events.LOCAL_ACTIVITY_COMPLETED


class ComputeCall(Call[T]):
    """Waits for what is computed.  Cancelling it only stops the waiting: it is as good as done."""

    __slots__ = ()

    def resolve(self, event: events.Event) -> None:
        failure = events.described_failure(event)
        if failure:
            self.set_exception(
                failure_from_json(
                    failure,
                    errors.ActivityFailed,
                    activity=self.command.name,
                    attempt=failure.get("attempt", 1),
                    timeout=failure.get("timeout"),
                    retry_after=failure.get("retry_after"),
                )
            )
        else:
            self._complete(event.payload)
