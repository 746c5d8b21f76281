"""Tasks that begin at once: what a call does before it first waits, it does within the call."""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import tasks as asyncio_tasks
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from .loop import WorkflowLoop

_swap_current_task: Callable[[Any, Any], Any] | None = getattr(asyncio_tasks, "_swap_current_task", None)


class _Begun(Coroutine[Any, Any, Any]):
    """A coroutine that has been run up to where it first waits; the task that drives it goes on from there."""

    __slots__ = ("_coro", "_first")

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self._coro = coro
        self._first: Callable[[], Any] | None = None

    def begin(self) -> None:
        """Take the first step; its outcome is kept for the first ``send``."""
        try:
            waits_for = self._coro.send(None)
        except StopIteration as e:
            self._first = _raising(StopIteration(e.value))
        except BaseException as e:
            self._first = _raising(e)
        else:
            self._first = _Waiting(waits_for)

    def send(self, value: Any, /) -> Any:
        first, self._first = self._first, None
        return self._coro.send(value) if first is None else first()

    def throw(self, typ: Any, val: Any = None, tb: Any = None, /) -> Any:
        exc = typ if isinstance(typ, BaseException) else val if isinstance(val, BaseException) else typ()
        first, self._first = self._first, None
        if isinstance(first, _Waiting) and isinstance(exc, asyncio.CancelledError) and first.cancel():
            # As a task does that is cancelled while it waits: it goes on waiting for what it has cancelled.
            return first()
        return self._coro.throw(exc)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._coro.__await__()


class _Waiting:
    """What a coroutine waits for at first."""

    __slots__ = ("_future",)

    def __init__(self, future: Any) -> None:
        self._future = future

    def __call__(self) -> Any:
        if self._future is not None:  # a bare yield only lets others run
            self._future._asyncio_future_blocking = True
        return self._future

    def cancel(self) -> bool:
        return self._future is not None and bool(self._future.cancel())


def _raising(error: BaseException) -> Callable[[], Any]:
    def first() -> Any:
        raise error

    return first


def begin(loop: WorkflowLoop, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Make a task of a coroutine and run it up to where it first waits, in a context and as a task of its own.

    Raises:
      Evicted: the run is being dropped from memory.
    """
    begun = _Begun(coro)
    context = contextvars.copy_context()
    task: asyncio.Task[Any] = loop.create_task(begun, context=context)
    if _swap_current_task is not None:
        before = _swap_current_task(loop, task)
        try:
            context.run(begun.begin)
        finally:
            _swap_current_task(loop, before)
        return task
    before = asyncio.current_task(loop)
    if before is not None:
        asyncio_tasks._leave_task(loop, before)
    asyncio_tasks._enter_task(loop, task)
    try:
        context.run(begun.begin)
    finally:
        asyncio_tasks._leave_task(loop, task)
        if before is not None:
            asyncio_tasks._enter_task(loop, before)
    return task
