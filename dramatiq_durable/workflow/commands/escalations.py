"""Escalations: asking somebody, taking that back, waiting for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ... import errors
from .. import events
from .base import Call, Command


@dataclass(slots=True, eq=False)
class OpenEscalation(Command):
    """Write a row that somebody in a role (``name``) is to resolve.

    Attributes:
      subject(str | None), type(str | None), metadata(dict | None): by which it is found.
      priority(int): lower comes first.
      ms(int | None): after how many milliseconds nobody need answer any more.
    """

    event_type: ClassVar[str] = events.ESCALATION_OPENED
    subject: str | None = None
    type: str | None = None
    priority: int = 0
    ms: int | None = None
    metadata: dict[str, Any] | None = None

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"hash": self.hash}
        for fact in ("subject", "type", "ms", "metadata"):
            value = getattr(self, fact)
            if value is not None:
                facts[fact] = value
        if self.priority:
            facts["priority"] = self.priority
        return facts


@dataclass(slots=True, eq=False)
class WithdrawEscalation(Command):
    """Take an escalation back: nobody need answer it any more."""

    event_type: ClassVar[str] = events.ESCALATION_WITHDRAWN


class EscalationCall(Call[Any]):
    """Waits for somebody's answer."""

    __slots__ = ()

    due: ClassVar[str] = events.ESCALATION_TIMED_OUT

    def cancel_command(self) -> Command:
        return WithdrawEscalation(self.command.seq, self.command.name)

    def resolve(self, event: events.Event) -> None:
        command = self.command
        assert isinstance(command, OpenEscalation)
        what = f"the escalation to {command.name!r}"
        if command.subject is not None:
            what += f" ({command.subject[:200]})"
        if event.type == events.ESCALATION_RESOLVED:
            self._complete(event.payload)
        elif event.type == events.ESCALATION_TIMED_OUT:
            self.set_exception(errors.Timeout(f"{what} was not resolved within {(command.ms or 0) / 1000:g} s."))
        else:
            self.set_exception(errors.EscalationCancelled(f"{what} was cancelled."))
