"""Activities: scheduling one, cancelling it, waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ... import errors
from .. import events
from ..failures import failure_from_json
from .base import Call, Command, CommandFuture

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class ScheduleActivity(Command):
    """Run an activity.

    Attributes:
      queue_name(str): the stream that the activity's message goes to.
      args(tuple), kwargs(dict): the arguments as the code gave them; ``payload`` is their snapshot at the call.
      options(dict): options of Dramatiq's message, e.g. ``max_retries``.
      priority(int | None): None means the actor's own.
      delay_ms(int): wait that many milliseconds before the first attempt.
    """

    event_type: ClassVar[str] = events.ACTIVITY_SCHEDULED
    queue_name: str = "default"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    priority: int | None = None
    delay_ms: int = 0

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"hash": self.hash, "stream": self.queue_name}
        if self.options:
            facts["options"] = self.options
        if self.priority is not None:
            facts["priority"] = self.priority
        if self.delay_ms:
            facts["delay_ms"] = self.delay_ms
        return facts


@dataclass(slots=True, eq=False)
class CancelActivity(Command):
    """Tell an activity that it is cancelled; the run waits for its outcome only if ``wait``."""

    event_type: ClassVar[str] = events.ACTIVITY_CANCELLED
    wait: bool = False


@dataclass(slots=True, eq=False)
class RequestActivityCancel(CancelActivity):
    """Tell an activity that it is cancelled, and go on waiting for its outcome."""

    event_type: ClassVar[str] = events.ACTIVITY_CANCEL_REQUESTED
    wait: bool = True


class ActivityHandle(CommandFuture[T]):
    """Waits for an activity; ``cancel()`` cancels it by its policy."""

    __slots__ = ()

    def cancel_command(self) -> Command:
        kind = RequestActivityCancel if self.policy == "wait" else CancelActivity
        return kind(self.command.seq, self.command.name)

    def has_confirmed(self, event: events.Event) -> bool:
        """Whether the activity, which was told that it is cancelled, ended by that."""
        return self.asked_to_cancel and events.described_failure(event).get("type") == "ActivityCancelled"

    def resolve(self, event: events.Event) -> None:
        if event.type == events.ACTIVITY_COMPLETED:
            self._complete(event.payload)
            return
        # Histories of before it had a name of its own have it as a failure.
        if self.has_confirmed(event):
            self._end_cancelled()
            return
        failure = events.described_failure(event)
        self.set_exception(
            failure_from_json(
                failure,
                errors.ActivityFailed,
                activity=self.command.name,
                attempt=failure.get("attempt", 1),
                timeout=failure.get("timeout"),
            )
        )


class ActivityCall(Call[T], ActivityHandle[T]):
    """``await activity.execute(...)``."""

    __slots__ = ()
