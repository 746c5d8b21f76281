"""Child workflows: starting one, cancelling it, waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ... import errors
from .. import events
from ..failures import failure_from_json
from .base import Call, Cancellation, Command, CommandFuture, CommandHost

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


@dataclass(slots=True, eq=False)
class AwaitChildStart(Command):
    """Ask whether a child was started.  The answer is an event, which has its run id.

    Attributes:
      child(int): the number of the command that starts it.
    """

    event_type: ClassVar[str] = events.CHILD_START_AWAITED
    child: int = 0

    def attributes(self) -> dict[str, Any]:
        return {"child": self.child}


_CHILD_ENDS = {
    events.CHILD_CANCELLED: ("WorkflowCancelled", "the child workflow was cancelled"),
    events.CHILD_TERMINATED: ("WorkflowTerminated", "the child workflow was terminated"),
    events.CHILD_TIMED_OUT: ("WorkflowTimedOut", "the child workflow ran out of its time"),
}


class ChildHandle(CommandFuture[T]):
    """Waits for a child workflow.

    Attributes:
      workflow_id(str), run_id(str): the child's.  One that goes on as new has other runs later; where ``id_conflict``
        is ``use_existing``, the run id is right once ``await child.started()`` has returned.
    """

    __slots__ = ("_asked", "_known", "_refused")

    command: StartChild

    def __init__(
        self,
        host: CommandHost,
        command: StartChild,
        policy: Cancellation = "wait",
        decode: Callable[[Any], T] | None = None,
    ) -> None:
        super().__init__(host, command, policy, decode)
        self._asked: list[ChildStartCall] = []
        self._known = False
        self._refused: errors.WorkflowAlreadyStarted | None = None

    @property
    def workflow_id(self) -> str:
        return self.command.workflow_id

    @property
    def run_id(self) -> str:
        return self.command.run_id

    def started(self) -> Coroutine[Any, Any, None]:
        """Wait until the child was started.

        Raises:
          WorkflowAlreadyStarted: (when awaited) its id is taken.
        """
        seq = self.command.seq
        assert seq is not None
        asked = AwaitChildStart(None, self.command.name, child=seq)
        call = ChildStartCall(self.host, asked, "abandon")
        if self._refused is not None:
            call.set_exception(self._refused)
        elif self._known or self.done():
            call.set_result(None)
        else:
            call.child = self
            self._asked.append(call)
            self.host.expect(self.host.issue(asked), call)
        return call

    def confirm(self, run_id: str) -> None:
        """It was started, as this run."""
        self._known = True
        self.command.run_id = run_id

    def cancel_command(self) -> Command:
        return CancelChild(self.command.seq, self.command.name)

    def resolve(self, event: events.Event) -> None:
        if event.type == events.CHILD_COMPLETED:
            self._complete(event.payload)
        elif event.type == events.CHILD_START_FAILED:
            self._refused = errors.WorkflowAlreadyStarted(
                f"the child workflow {self.command.name!r} was not started: a run with the id "
                f"{self.workflow_id!r} exists; choose another id, or another id_conflict or id_reuse."
            )
            for asked in self._asked:
                if not asked.done():
                    asked.set_exception(self._refused)
            self.set_exception(self._refused)
        elif event.type == events.CHILD_CANCELLED and self.asked_to_cancel:
            self._end_cancelled()
        else:
            type, message = _CHILD_ENDS.get(event.type, ("Exception", ""))
            failure = events.described_failure(event) or {"type": type, "message": message}
            self.set_exception(failure_from_json(failure, errors.ChildWorkflowFailed, workflow_id=self.workflow_id))


class ChildCall(Call[T], ChildHandle[T]):
    """``await workflow.execute(...)`` inside a workflow."""

    __slots__ = ()


class ChildStartCall(Call[None]):
    """``await child.started()``.  Cancelling it only stops the waiting."""

    __slots__ = ("child",)

    child: ChildHandle[Any]

    def resolve(self, event: events.Event) -> None:
        self.child.confirm(str((event.attributes or {}).get("run_id") or self.child.run_id))
        if not self.done():
            self.set_result(None)
