"""asyncio's task groups and timeouts inside a workflow, and blocks in which cancels are held back.

The standard library keeps a group's tasks in a set, and has changed between Python 3.11 and 3.14 how a cancel from
outside and one from inside are told apart.  A history must not care about either.  Here tasks have the order in which
they were created, and the rules are those of the latest versions.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import Context
from types import TracebackType
from typing import Any

from .deadlock import stepping
from .loop import current_host
from .several import running_loop
from .tasks import Shelter, Task


def uncancellable() -> Shelter:
    """Hold back cancels of the running task until the end of a block: ``async with durable.uncancellable():``.

    A cancel of the run, of the task, or by a timeout around the block is delivered when the block ends, as
    ``asyncio.CancelledError``.  What is inside is not cut off: a timeout or a task group that is entered inside the
    block still works in it.

        async with durable.uncancellable():
            await release.execute(order_id)
            await notify.execute(order_id)

    Raises:
      NotInWorkflow: (when entered) no workflow is running on this thread.
    """
    return Shelter()


def _cancel(task: asyncio.Task[Any], shelter: Shelter | None) -> None:
    if isinstance(task, Task):
        task.cancel_from(shelter)
    else:
        task.cancel()


# --- timeouts ------------------------------------------------------------------------------------------


class Timeout(asyncio.Timeout):  # type: ignore[misc]  # final for type checkers
    """``asyncio.timeout`` inside a workflow.

    A cancel that was swallowed before the block began does not count: a timeout in the cleanup after it ends as a
    TimeoutError, on Python 3.11 as well.
    """

    def __init__(self, when: float | None) -> None:
        self._due = when
        self._stage = "created"
        self._timer: Any = None
        self._owner: asyncio.Task[Any] | None = None
        self._shelter: Shelter | None = None
        self._cancels = 0

    def when(self) -> float | None:
        return self._due

    def expired(self) -> bool:
        return self._stage in ("expiring", "expired")

    def reschedule(self, when: float | None) -> None:
        if self._stage != "active":
            if self._stage == "created":
                raise RuntimeError("the timeout has not been entered")
            raise RuntimeError(f"a timeout that is {self._stage} cannot be rescheduled")
        self._due = when
        if self._timer is not None:
            self._timer.cancel()
        if when is None:
            self._timer = None
            return
        loop = running_loop()
        if when <= loop.time():
            self._timer = loop.call_soon(self._expire)
        else:
            self._timer = loop.call_at(when, self._expire)

    def _expire(self) -> None:
        assert self._owner is not None
        self._stage = "expiring"
        self._timer = None
        _cancel(self._owner, self._shelter)

    async def __aenter__(self) -> Timeout:
        if self._stage != "created":
            raise RuntimeError("the timeout has been entered before")
        owner = asyncio.current_task()
        if owner is None:
            raise RuntimeError("a timeout needs a task to run in")
        self._stage = "active"
        self._owner = owner
        self._shelter = getattr(owner, "shelter", None)
        self._cancels = owner.cancelling()
        self.reschedule(self._due)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._owner is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stage == "active":
            self._stage = "exited"
        elif self._stage == "expiring":
            self._stage = "expired"
            is_pending = getattr(self._owner, "_must_cancel", False)
            if self._owner.uncancel() > self._cancels:
                return
            if kind is not None and issubclass(kind, asyncio.CancelledError):
                raise TimeoutError from exc
            if is_pending:
                # A group inside passed our cancel on to the next await, together with its own failures.  It is ours,
                # and must not be taken for another; before Python 3.13 nothing but an await takes it back.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)

    def __repr__(self) -> str:
        return f"<Timeout [{self._stage}] when={self._due}>"


# --- task groups ---------------------------------------------------------------------------------------


class TaskGroup(asyncio.TaskGroup):
    """``asyncio.TaskGroup`` inside a workflow: children are cancelled in the order in which they were created."""

    def __init__(self) -> None:
        self._children: dict[asyncio.Task[Any], None] = {}
        self._failures: list[BaseException] = []
        self._fatal: BaseException | None = None
        self._owner: asyncio.Task[Any] | None = None
        self._shelter: Shelter | None = None
        self._cancels = 0
        self._is_leaving = False
        self._is_aborting = False
        self._cancelled_owner = False
        self._all_done: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = " aborting" if self._is_aborting else " leaving" if self._is_leaving else ""
        return f"<TaskGroup tasks={len(self._children)} errors={len(self._failures)}{state}>"

    async def __aenter__(self) -> TaskGroup:
        if self._owner is not None:
            raise RuntimeError(f"{self!r} has been entered before")
        owner = asyncio.current_task()
        if owner is None:
            raise RuntimeError(f"{self!r} needs a task to run in")
        self._owner = owner
        self._shelter = getattr(owner, "shelter", None)
        self._cancels = owner.cancelling()
        return self

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None, **options: Any) -> Any:
        why = None
        if self._owner is None:
            why = "has not been entered"
        elif self._is_leaving and not self._children:
            why = "is finished"
        elif self._is_aborting:
            why = "is shutting down"
        if why is not None:
            coro.close()
            raise RuntimeError(f"{self!r} {why}: no task can be created in it")
        task = running_loop().create_task(coro, name=name, context=context, **options)
        self._children[task] = None
        task.add_done_callback(self._child_done)
        return task

    def _child_done(self, task: asyncio.Task[Any]) -> None:
        del self._children[task]
        if self._all_done is not None and not self._children and not self._all_done.done():
            self._all_done.set_result(None)
        if task.cancelled():
            return
        exc = task.exception()
        if exc is None:
            return
        owner = self._owner
        assert owner is not None
        self._failures.append(exc)
        if self._fatal is None and isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self._fatal = exc
        if owner.done():
            context = {"message": f"{task!r} failed in a group whose owner had ended", "exception": exc}
            running_loop().call_exception_handler(context)
        elif not self._is_aborting and not self._cancelled_owner:
            self._abort()
            # It wakes the owner wherever it is in the block; leaving the block takes the cancel back.
            self._cancelled_owner = True
            _cancel(owner, self._shelter)

    def _abort(self) -> None:
        self._is_aborting = True
        for task in list(self._children):
            if not task.done():
                task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        owner = self._owner
        assert owner is not None
        self._is_leaving = True
        if self._fatal is None and isinstance(exc, (SystemExit, KeyboardInterrupt)):
            self._fatal = exc
        cancel = exc if isinstance(exc, asyncio.CancelledError) else None
        if cancel is not None and self._took_back(owner):
            cancel = None
        if exc is not None and not self._is_aborting:
            self._abort()
        while self._children:
            self._all_done = running_loop().create_future()
            try:
                await self._all_done
            except asyncio.CancelledError as e:
                if not self._is_aborting:
                    # A cancel from outside while only the children were left.
                    cancel = e
                    self._abort()
            self._all_done = None
        if self._fatal is not None:
            raise self._fatal
        took_back = self._took_back(owner)
        if cancel is not None and not self._failures and not took_back:
            raise cancel
        if exc is not None and not isinstance(exc, asyncio.CancelledError):
            self._failures.append(exc)
        if self._failures:
            if owner.cancelling() > self._cancels:
                # Cancelled from outside as well: the next await says so.
                owner.uncancel()
                owner.cancel()
            try:
                raise BaseExceptionGroup("unhandled errors in a TaskGroup", self._failures)
            finally:
                self._failures = []

    def _took_back(self, owner: asyncio.Task[Any]) -> bool:
        """Take back the group's own cancel of its owner; answers whether no other one is under way."""
        if not self._cancelled_owner:
            return False
        self._cancelled_owner = False
        return owner.uncancel() <= self._cancels


# --- in asyncio's place --------------------------------------------------------------------------------


def install() -> None:
    """Let the classes make instances of ours inside a workflow; those that users derived from them stay as they are."""
    for theirs, ours in ((asyncio.TaskGroup, TaskGroup), (asyncio.Timeout, Timeout)):
        theirs.__new__ = _maker(theirs, ours)  # type: ignore[method-assign]


def _maker(theirs: type, ours: type) -> Any:
    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if stepping and cls is theirs and current_host() is not None:
            cls = ours
        return object.__new__(cls)

    return staticmethod(__new__)
