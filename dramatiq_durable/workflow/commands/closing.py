"""How a run ends by its own code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .. import events
from .base import Command


@dataclass(slots=True, eq=False)
class CompleteWorkflow(Command):
    """End the run with a result: ``payload``."""

    event_type: ClassVar[str] = events.WORKFLOW_COMPLETED


@dataclass(slots=True, eq=False)
class FailWorkflow(Command):
    """End the run with the failure of an exception that escaped its code."""

    event_type: ClassVar[str] = events.WORKFLOW_FAILED
    failure: dict[str, Any] = field(default_factory=dict)
    #: For the next attempt, if there is one: signals that the code has not read, and updates that it has not begun to
    #: answer, by their events; and in how many milliseconds the exception asks for it.
    unread: list[int] = field(default_factory=list)
    retry_delay_ms: int | None = None

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"failure": self.failure}
        if self.unread:
            facts["unread"] = self.unread
        if self.retry_delay_ms is not None:
            facts["retry_delay_ms"] = self.retry_delay_ms
        return facts


@dataclass(slots=True, eq=False)
class CancelWorkflow(Command):
    """End the run as cancelled."""

    event_type: ClassVar[str] = events.WORKFLOW_CANCELLED


@dataclass(slots=True, eq=False)
class ContinueAsNew(Command):
    """End the run, and have a new one go on: ``payload`` is its input.

    Attributes:
      facts(dict): what the new run is started with beside its input.
      delay_ms(int): milliseconds until its first step.
      unread(list): signals that the code has not read, and updates that it has not begun to answer, by their events:
        they are for the new run.
    """

    event_type: ClassVar[str] = events.WORKFLOW_CONTINUED_AS_NEW
    facts: dict[str, Any] = field(default_factory=dict)
    delay_ms: int = 0
    unread: list[int] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"hash": self.hash, "facts": self.facts}
        if self.delay_ms:
            facts["delay_ms"] = self.delay_ms
        if self.unread:
            facts["unread"] = self.unread
        return facts


class ContinueAsNewRequested(BaseException):
    """On its way out of the workflow's coroutine: the run ends with the command.  No ``except Exception`` stops it."""

    def __init__(self, command: ContinueAsNew) -> None:
        super().__init__("the workflow continues as new")
        self.command = command

    @classmethod
    def within(cls, exc: BaseException | None) -> ContinueAsNew | None:
        """The command that an exception stands for, also in the group that a TaskGroup makes of what left its body."""
        if isinstance(exc, cls):
            return exc.command
        if isinstance(exc, BaseExceptionGroup):
            return next((command for e in exc.exceptions if (command := cls.within(e)) is not None), None)
        return None
