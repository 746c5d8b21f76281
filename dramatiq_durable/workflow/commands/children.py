"""Child workflows: starting one, cancelling it, waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ... import errors
from .. import events
from ..failures import failure_from_json
from .base import Call, Command, CommandFuture

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class StartChild(Command):
    """Start a child workflow.

    Attributes:
      queue_name(str): the child's stream.
      workflow_id(str): the child's workflow id; by default the parent's with the command's number behind it.
      run_id(str): the child's run id, derived from the parent's run id and the command's number: starting the
        same child twice is one child.
      options(dict): ``id_conflict``, ``id_reuse``, ``parent_close``, ``delay_ms``, ``facts`` (its first event's
        attributes): those that were set.
    """

    event_type: ClassVar[str] = events.CHILD_STARTED
    queue_name: str = "default"
    workflow_id: str = ""
    run_id: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "hash": self.hash,
            "stream": self.queue_name,
            "workflow_id": self.workflow_id,
            "run_id": self.run_id,
        }
        if self.options:
            facts["options"] = self.options
        return facts


@dataclass(slots=True, eq=False)
class CancelChild(Command):
    """Ask a child to cancel itself; its outcome comes as an event, whatever it does."""

    event_type: ClassVar[str] = events.CHILD_CANCEL_REQUESTED


_CHILD_ENDS = {
    events.CHILD_CANCELLED: ("WorkflowCancelled", "the child workflow was cancelled"),
    events.CHILD_TERMINATED: ("WorkflowTerminated", "the child workflow was terminated"),
    events.CHILD_TIMED_OUT: ("WorkflowTimedOut", "the child workflow ran out of its time"),
}


class ChildHandle(CommandFuture[T]):
    """Waits for a child workflow.

    Attributes:
      workflow_id(str), run_id(str): the child's.
    """

    __slots__ = ()

    @property
    def workflow_id(self) -> str:
        command = self.command
        assert isinstance(command, StartChild)
        return command.workflow_id

    @property
    def run_id(self) -> str:
        command = self.command
        assert isinstance(command, StartChild)
        return command.run_id

    def cancel_command(self) -> Command:
        return CancelChild(self.command.seq, self.command.name)

    def resolve(self, event: events.Event) -> None:
        if event.type == events.CHILD_COMPLETED:
            self._complete(event.payload)
        elif event.type == events.CHILD_START_FAILED:
            self.set_exception(
                errors.WorkflowAlreadyStarted(
                    f"the child workflow {self.command.name!r} was not started: a run with the id "
                    f"{self.workflow_id!r} exists; choose another id, or another id_conflict or id_reuse."
                )
            )
        elif event.type == events.CHILD_CANCELLED and self.asked_to_cancel:
            self._end_cancelled()
        else:
            type, message = _CHILD_ENDS.get(event.type, ("Exception", ""))
            failure = events.described_failure(event) or {"type": type, "message": message}
            self.set_exception(failure_from_json(failure, errors.ChildWorkflowFailed, workflow_id=self.workflow_id))


class ChildCall(Call[T], ChildHandle[T]):
    """``await workflow.execute(...)`` inside a workflow."""

    __slots__ = ()
