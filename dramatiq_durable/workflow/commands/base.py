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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from .. import events
from ..converter import fit, loads
from ..loop import WorkflowLoop
from ..tasks import Future

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


class CommandHost(Protocol):
    """What a command's future needs of its run."""

    loop: WorkflowLoop

    def issue(self, command: Command) -> int: ...

    def expect(self, seq: int, pending: Any) -> None: ...

    def withdraw(self, future: CommandFuture[Any]) -> bool: ...


class Answer(int):
    """A truth value that may also be awaited: asyncio calls ``cancel()``, people await it."""

    def __await__(self) -> Generator[Any, None, bool]:
        yield from ()
        return bool(self)


class CommandFuture(Future[T]):
    """Waits for the event that answers a command."""

    __slots__ = ("asked_to_cancel", "command", "decode", "host", "policy")

    #: What it means when the command's timer is due.
    due: ClassVar[str] = events.TIMER_FIRED

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
            value = fit(value, self.decode, f"the result of {self.command.name!r}")
        except Exception as e:
            self.set_exception(e)
        else:
            self.set_result(value)

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
