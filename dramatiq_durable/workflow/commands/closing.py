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

    def attributes(self) -> dict[str, Any]:
        return {"failure": self.failure}


@dataclass(slots=True, eq=False)
class CancelWorkflow(Command):
    """End the run as cancelled."""

    event_type: ClassVar[str] = events.WORKFLOW_CANCELLED
