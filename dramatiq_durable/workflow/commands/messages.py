"""What a run's code says to others: answers to updates, signals and cancels for other runs."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ... import errors
from .. import events
from ..converter import encode, hash_arguments
from ..names import check_name
from .base import Call, Command, CommandHost

if TYPE_CHECKING:
    from ..replay import Execution


@dataclass(slots=True, eq=False)
class CompleteUpdate(Command):
    """The handler of an update has come to an end: its result is ``payload``.  Nothing answers it."""

    event_type: ClassVar[str] = events.UPDATE_COMPLETED
    update_id: str = ""
    failure: dict[str, Any] | None = None

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"update_id": self.update_id}
        if self.failure is not None:
            facts["failure"] = self.failure
        return facts


@dataclass(slots=True, eq=False)
class SendSignal(Command):
    """Send another run a signal: ``name`` with ``payload``.

    Attributes:
      workflow_id(str): whose.
      child(int | None): the number of the command that started that run, where it is a child of this one.
    """

    event_type: ClassVar[str] = events.SIGNAL_SENT
    workflow_id: str = ""
    child: int | None = None

    def attributes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"hash": self.hash, "workflow_id": self.workflow_id}
        if self.child is not None:
            facts["child"] = self.child
        return facts


@dataclass(slots=True, eq=False)
class SendCancel(SendSignal):
    """Ask another run to cancel itself."""

    event_type: ClassVar[str] = events.CANCEL_SENT


class SendCall(Call[None]):
    """Waits for what became of a message to another run.  Cancelling it only stops the waiting: it is sent."""

    __slots__ = ()

    def resolve(self, event: events.Event) -> None:
        if event.type == events.MESSAGE_DELIVERED:
            self.set_result(None)
            return
        command = self.command
        assert isinstance(command, SendSignal)
        if (event.attributes or {}).get("reason") == "closed":
            self.set_exception(
                errors.WorkflowClosed(
                    f"the workflow {command.workflow_id!r} has ended: it takes no more messages. Catch WorkflowClosed "
                    "where that may happen"
                )
            )
        else:
            self.set_exception(
                errors.WorkflowNotFound(
                    f"there is no workflow {command.workflow_id!r} in this namespace, or the login of this run's "
                    "worker may not use its stream"
                )
            )


def send_signal(
    host: CommandHost, workflow_id: str, child: int | None, name: str, payload: Any
) -> Coroutine[Any, Any, None]:
    """Issue the command that sends a signal, through the run's interceptors.

    Raises:
      InvalidName: the name is empty, too long or no text.
      NotEncodable, PayloadTooLarge: the payload cannot be carried; where interceptors are, when awaited.
    """
    check_name(name, "a signal's name")
    execution = cast("Execution", host)
    methods = execution.interceptors.signal
    if not methods:
        return _send_signal(execution, workflow_id, child, name, payload)
    # They are calls themselves, made of what is here.
    from ..interceptors import CallContext, intercept

    ctx = CallContext(name, (payload,), {}, dict(execution.headers), execution.info, workflow_id)
    call = intercept(
        execution, methods, ctx, SendCall, lambda ctx: _send_signal(execution, workflow_id, child, name, *ctx.args)
    )
    assert isinstance(call, Call)
    return call


def _send_signal(host: CommandHost, workflow_id: str, child: int | None, name: str, payload: Any = None) -> SendCall:
    data = None if payload is None else encode(payload, f"the payload of the signal {name!r}")
    digest = hash_arguments(b"\0".join((workflow_id.encode(), data or b"")))
    return _sent(host, SendSignal(None, name, data, digest, workflow_id, child))


def send_cancel(host: CommandHost, workflow_id: str) -> Coroutine[Any, Any, None]:
    """Issue the command that asks another run to cancel itself."""
    return _sent(host, SendCancel(None, None, None, hash_arguments(workflow_id.encode()), workflow_id))


def _sent(host: CommandHost, command: Command) -> SendCall:
    seq = host.issue(command)
    call = SendCall(host, command, "abandon")
    host.expect(seq, call)
    return call
