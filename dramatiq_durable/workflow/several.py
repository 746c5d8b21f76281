"""Waiting for several things inside a workflow: what takes the place of asyncio's functions there.

The standard library keeps what it waits for in sets, whose order is one of chance for coroutines, and for tasks depends
on how many of them were made before; between Python 3.11 and 3.14 it has also changed which tasks ``wait_for`` makes.
A history must not care about either.  Here everything has the order in which it was given.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar, cast

from ..errors import ForbiddenInWorkflow
from .deadlock import stepping
from .loop import WorkflowLoop, current_host
from .tasks import Future

T = TypeVar("T")


class OrderedSet(set[T]):
    """A set that iterates in the order in which it was filled at first."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        given = dict.fromkeys(items)
        super().__init__(given)
        self._rank = {item: n for n, item in enumerate(given)}

    def __iter__(self) -> Iterator[T]:
        rank, last = self._rank, len(self._rank)
        return iter(sorted(super().__iter__(), key=lambda item: rank.get(item, last + hash(item))))

    def pop(self) -> T:
        for item in self:
            self.discard(item)
            return item
        raise KeyError("pop from an empty set")

    def copy(self) -> OrderedSet[T]:
        return OrderedSet(self)

    def __and__(self, other: AbstractSet[object]) -> OrderedSet[T]:
        return OrderedSet(item for item in self if item in other)

    def __sub__(self, other: AbstractSet[object]) -> OrderedSet[T]:
        return OrderedSet(item for item in self if item not in other)

    def __or__(self, other: AbstractSet[Any]) -> OrderedSet[Any]:
        return OrderedSet([*self, *other])

    def __repr__(self) -> str:
        return repr(set(self))


def running_loop() -> WorkflowLoop:
    return cast(WorkflowLoop, asyncio.get_running_loop())


def _is_coroutine(thing: Any) -> bool:
    # What a call of an activity gives is a future and a coroutine in one.
    return asyncio.iscoroutine(thing) and not asyncio.isfuture(thing)


async def wait_for(awaitable: Awaitable[T], timeout: float | None) -> T:
    """``asyncio.wait_for`` inside a workflow: as from Python 3.12 on, it makes no task of its own."""
    if timeout is not None and timeout <= 0:
        future = asyncio.ensure_future(awaitable)
        if not future.done():
            future.cancel()
            await wait([future])
            if future.cancelled():
                raise TimeoutError
        return future.result()
    async with asyncio.timeout(timeout):
        return await awaitable


class _Gathered(Future[list[Any]]):
    """Waits for what was gathered; cancelled, it cancels that."""

    __slots__ = ("_children", "asked_to_cancel")

    def __init__(self, loop: WorkflowLoop, children: list[asyncio.Future[Any]]) -> None:
        super().__init__(loop)
        self._children = children
        self.asked_to_cancel = False

    def cancel(self, msg: Any | None = None) -> bool:
        if self.done():
            return False
        # No shortcut: every one of them is to be asked.
        asked = [child.cancel(msg) for child in self._children]
        if any(asked):
            self.asked_to_cancel = True
        return any(asked)


def gather(*aws: Any, return_exceptions: bool = False) -> asyncio.Future[list[Any]]:
    """``asyncio.gather`` inside a workflow: as from Python 3.12 on, what is done already is not waited for."""
    loop = running_loop()
    futures = {aw: asyncio.ensure_future(aw) for aw in dict.fromkeys(aws)}
    children = list(futures.values())
    outer = _Gathered(loop, children)
    left = len(children)

    def ended(child: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        failure = _failure_of(child)
        if outer.done():
            return
        if failure is not None and not return_exceptions:
            outer.set_exception(failure)
        elif left == 0:
            if outer.asked_to_cancel:
                outer.set_exception(asyncio.CancelledError())
            else:
                failures = {aw: _failure_of(future) for aw, future in futures.items()}
                outer.set_result([futures[aw].result() if failures[aw] is None else failures[aw] for aw in aws])

    if not children:
        outer.set_result([])
    done = [child for child in children if child.done()]
    for child in children:
        if not child.done():
            child.add_done_callback(ended)
    for child in done:
        ended(child)
    return outer


def _failure_of(future: asyncio.Future[Any]) -> BaseException | None:
    try:
        return future.exception()
    except asyncio.CancelledError as e:
        return e


async def wait(
    fs: Iterable[Any], *, timeout: float | None = None, return_when: str = asyncio.ALL_COMPLETED
) -> tuple[set[Any], set[Any]]:
    """``asyncio.wait`` inside a workflow; both sets iterate in the order in which their members were given."""
    if asyncio.isfuture(fs) or asyncio.iscoroutine(fs):
        raise TypeError(f"wait() takes several futures, not one {type(fs).__name__}")
    given = list(dict.fromkeys(fs))
    if not given:
        raise ValueError("wait() was given nothing to wait for")
    if return_when not in (asyncio.ALL_COMPLETED, asyncio.FIRST_COMPLETED, asyncio.FIRST_EXCEPTION):
        raise ValueError(f"there is no return_when={return_when!r}")
    if any(map(_is_coroutine, given)):
        raise TypeError("wait() takes no coroutines: make tasks of them with asyncio.create_task()")
    loop = running_loop()
    awake: asyncio.Future[None] = loop.create_future()
    left = len(given)

    def wake() -> None:
        if not awake.done():
            awake.set_result(None)

    def ended(future: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        failed = return_when == asyncio.FIRST_EXCEPTION and not future.cancelled() and future.exception() is not None
        if left == 0 or return_when == asyncio.FIRST_COMPLETED or failed:
            wake()

    timer = None if timeout is None else loop.call_later(timeout, wake)
    for future in given:
        future.add_done_callback(ended)
    try:
        await awake
    finally:
        if timer is not None:
            timer.cancel()
        for future in given:
            future.remove_done_callback(ended)
    return OrderedSet(f for f in given if f.done()), OrderedSet(f for f in given if not f.done())


class AsCompleted:
    """What ``as_completed`` gives inside a workflow, on every version of Python: an iterator of awaitables, and an
    asynchronous one of the futures themselves."""

    def __init__(self, fs: Iterable[Any], timeout: float | None) -> None:
        if asyncio.isfuture(fs) or asyncio.iscoroutine(fs):
            raise TypeError(f"as_completed() takes several awaitables, not one {type(fs).__name__}")
        given = list(dict.fromkeys(fs))
        if isinstance(fs, (set, frozenset)) and any(map(_is_coroutine, given)):
            for coro in filter(_is_coroutine, given):
                coro.close()
            raise ForbiddenInWorkflow(
                "as_completed() over a set of coroutines, whose order is one of chance, cannot be replayed, and is "
                "refused inside a workflow: pass a list."
            )
        self._left = len(given)
        self._running = 0
        self._ended: deque[asyncio.Future[Any] | None] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._futures = [asyncio.ensure_future(each) for each in given]
        self._timer = None
        for future in self._futures:
            self._running += 1
            future.add_done_callback(self._end)
        if timeout is not None and self._futures:
            self._timer = running_loop().call_later(timeout, self._expire)

    def _end(self, future: asyncio.Future[Any]) -> None:
        self._running -= 1
        self._ended.append(future)
        if self._running == 0 and self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _expire(self) -> None:
        for future in self._futures:
            if future.remove_done_callback(self._end):
                self._ended.append(None)
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _next(self) -> asyncio.Future[Any]:
        while not self._ended:
            waiter: asyncio.Future[None] = running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            finally:
                self._waiting.remove(waiter)
        future = self._ended.popleft()
        if future is None:
            raise TimeoutError
        return future

    async def _result(self) -> Any:
        return (await self._next()).result()

    def __iter__(self) -> Iterator[Coroutine[Any, Any, Any]]:
        return self

    def __next__(self) -> Coroutine[Any, Any, Any]:
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        return self._result()

    def __aiter__(self) -> AsyncIterator[asyncio.Future[Any]]:
        return self

    async def __anext__(self) -> asyncio.Future[Any]:
        if self._left == 0:
            raise StopAsyncIteration
        self._left -= 1
        return await self._next()


def as_completed(fs: Iterable[Any], *, timeout: float | None = None) -> AsCompleted:
    """``asyncio.as_completed`` inside a workflow."""
    return AsCompleted(fs, timeout)


def all_tasks(loop: Any = None) -> set[asyncio.Task[Any]]:
    """``asyncio.all_tasks`` inside a workflow: the tasks of this run, oldest first."""
    mine = running_loop()
    if loop is not None and loop is not mine:
        raise ForbiddenInWorkflow(
            "looking at another loop's tasks cannot be replayed, and is refused inside a workflow: ask for those of "
            "this run, with `asyncio.all_tasks()`."
        )
    return OrderedSet(mine.pending_tasks())


# --- in asyncio's place --------------------------------------------------------------------------------


def replacements() -> dict[Any, Any]:
    """Return asyncio's functions, each with the one that takes its place: inside a workflow it is ours."""
    return {
        real: _instead(real, ours)
        for real, ours in (
            (asyncio.gather, gather),
            (asyncio.wait, wait),
            (asyncio.wait_for, wait_for),
            (asyncio.as_completed, as_completed),
            (asyncio.all_tasks, all_tasks),
        )
    }


def _instead(real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    mark = getattr(inspect, "markcoroutinefunction", None)  # from Python 3.12 on

    @functools.wraps(real)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        if stepping and current_host() is not None:
            return ours(*args, **kwargs)
        return real(*args, **kwargs)

    return mark(chosen) if mark is not None and inspect.iscoroutinefunction(real) else chosen
