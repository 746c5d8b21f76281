"""What the workflow's code asks for, and the futures that wait for the answers.

Every command knows the event that records it: ``event_type``, ``seq``, ``name``, ``payload`` and
``attributes()``.  Commands compare by identity: two equal calls are two commands.

A command's future is resolved by the event that answers it.  Cancelling the future, which is what asyncio does when
the task that awaits it is cancelled, cancels the command by its policy: ``try`` tells the other side and goes on at
once, ``wait`` tells it and waits for its outcome, ``abandon`` goes on and leaves it alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from .. import errors
from . import events
from .converter import loads
from .failures import failure_from_json
from .loop import Future, WorkflowLoop

T = TypeVar("T")
Cancellation = Literal["try", "wait", "abandon"]


@dataclass(slots=True, eq=False)
class Command:
    """Base of every command.

    Attributes:
      seq(int | None): number of the command in its run, given at the call; None for the closing ones.
        A command that cancels carries the number of the command that it cancels.
      name(str | None): name of the activity or workflow.
      payload(bytes | None): the value that is recorded, as the converter made it.
      hash(str | None): hash of the encoded arguments, taken before any codec; compared on replay.
    """

    event_type: ClassVar[str] = ""
    seq: int | None = None
    name: str | None = None
    payload: bytes | None = None
    hash: str | None = None

    def attributes(self) -> dict[str, Any] | None:
        """Return the small JSON facts that the event records beside the payload."""
        return None


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


@dataclass(slots=True, eq=False)
class StartChild(Command):
    """Start a child workflow.

    Attributes:
      queue_name(str): the child's stream.
      workflow_id(str): the child's workflow id; by default the parent's with the command's number behind it.
      run_id(str): the child's run id, derived from the parent's run id and the command's number: starting the
        same child twice is one child.
      options(dict): ``id_conflict``, ``id_reuse``, ``parent_close``, ``memo``, ``delay_ms``: those that were set.
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


# --- futures -------------------------------------------------------------------------------------------
class CommandHost(Protocol):
    """What a command's future needs of its run."""

    loop: WorkflowLoop

    def withdraw(self, future: CommandFuture[Any]) -> bool: ...


class Answer(int):
    """A truth value that may also be awaited: asyncio calls ``cancel()``, people await it."""

    def __await__(self) -> Generator[Any, None, bool]:
        yield from ()
        return bool(self)


class CommandFuture(Future[T]):
    """Waits for the event that answers a command."""

    __slots__ = ("asked_to_cancel", "command", "decode", "host", "policy")

    def __init__(
        self,
        host: CommandHost,
        command: Command,
        policy: Cancellation = "try",
        decode: Callable[[Any], T] | None = None,
    ) -> None:
        super().__init__(host.loop, host.loop.number())
        self.host = host
        self.command = command
        self.policy = policy
        self.decode = decode
        self.asked_to_cancel = False

    def cancel(self, msg: Any | None = None) -> Answer:  # type: ignore[override]
        """Cancel the command by its policy; the answer may be awaited.

        Returns:
          True if that had an effect or is under way; False if the outcome is known already.
        """
        if self.done() or self.host.loop.evicting:
            return Answer(False)
        if not self.asked_to_cancel:
            self.asked_to_cancel = True
            if self.host.withdraw(self):
                return Answer(True)
        elif self.policy == "wait":
            return Answer(True)
        return Answer(super().cancel(msg))

    def cancel_command(self) -> Command:
        """Return the command that cancels this one."""
        raise NotImplementedError

    def resolve(self, event: events.Event) -> None:
        """Take the outcome from the event that answers the command."""
        raise NotImplementedError

    def _complete(self, payload: bytes | None) -> None:
        try:
            value = None if payload is None else loads(payload)
            if self.decode is not None:
                value = self.decode(value)
        except Exception as e:
            e.add_note(f"while decoding the result of {self.command.name!r}")
            self.set_exception(e)
        else:
            self.set_result(value)  # type: ignore[arg-type]

    def _end_cancelled(self) -> None:
        Future.cancel(self)


class Call(CommandFuture[T]):
    """A command's future that is a coroutine too, so that ``create_task`` and ``TaskGroup`` take it.

    The command is issued when the call is made, not when it is awaited; one that is never awaited is still done.
    """

    __slots__ = ()

    def send(self, value: Any, /) -> Any:
        if self.done():
            raise StopIteration(self.result())
        self._asyncio_future_blocking = True
        return self

    def throw(self, typ: Any, val: Any = None, tb: Any = None, /) -> Any:
        exc = typ if isinstance(typ, BaseException) else val if isinstance(val, BaseException) else typ()
        if isinstance(exc, asyncio.CancelledError) and not self.done():
            self.cancel()
            if not self.done():  # the policy is to wait for the outcome
                self._asyncio_future_blocking = True
                return self
        raise exc

    def close(self) -> None:
        pass


class TimerCall(Call[None]):
    """Waits for a timer."""

    __slots__ = ()

    def cancel_command(self) -> Command:
        return CancelTimer(self.command.seq)

    def resolve(self, event: events.Event) -> None:
        self.set_result(None)


class ActivityHandle(CommandFuture[T]):
    """Waits for an activity; ``cancel()`` cancels it by its policy."""

    __slots__ = ()

    def cancel_command(self) -> Command:
        kind = RequestActivityCancel if self.policy == "wait" else CancelActivity
        return kind(self.command.seq, self.command.name)

    def resolve(self, event: events.Event) -> None:
        if event.type == events.ACTIVITY_COMPLETED:
            self._complete(event.payload)
            return
        failure = events.described_failure(event)
        if self.asked_to_cancel and failure.get("type") == "ActivityCancelled":
            self._end_cancelled()
            return
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
