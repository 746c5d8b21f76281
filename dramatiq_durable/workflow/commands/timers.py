"""Timers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .. import events
from .base import Call, Command


@dataclass(slots=True, eq=False)
class StartTimer(Command):
    """Wake the run after ``ms`` milliseconds, counted from the step's time."""

    event_type: ClassVar[str] = events.TIMER_STARTED
    ms: int = 0

    def attributes(self) -> dict[str, Any]:
        return {"ms": self.ms}


@dataclass(slots=True, eq=False)
class CancelTimer(Command):
    """Drop a timer that has not fired."""

    event_type: ClassVar[str] = events.TIMER_CANCELLED


class TimerCall(Call[None]):
    """Waits for a timer."""

    __slots__ = ()

    def cancel_command(self) -> Command:
        return CancelTimer(self.command.seq)

    def resolve(self, event: events.Event) -> None:
        self.set_result(None)
