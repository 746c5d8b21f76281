"""Tasks and futures of a run: hashed by numbers that are counted in it, and tasks sheltered from cancellation.

asyncio keeps them in sets, and the order of a set must be the same on replay.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import NotInWorkflow

if TYPE_CHECKING:
    from .loop import WorkflowLoop

T = TypeVar("T")


class Future(asyncio.Future[T]):
    """A future whose hash is a number counted in its run."""

    __slots__ = ("_hash",)

    def __init__(self, loop: WorkflowLoop, number: int | None = None) -> None:
        self._hash = loop.number_future() if number is None else number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._hash


class Task(asyncio.Task[T]):
    """A task whose hash is a number counted in its run, and whose cancellation can be held back."""

    __slots__ = ("_hash", "shelter")

    def __init__(self, coro: Any, hash: int, **options: Any) -> None:
        self._hash = hash  # first: asyncio puts the task into a set before its constructor returns
        self.shelter: Shelter | None = None
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._hash

    def cancel(self, msg: Any | None = None) -> bool:
        return self.cancel_from(None, msg)

    def cancel_from(self, shelter: Shelter | None, msg: Any | None = None) -> bool:
        """Cancel on behalf of what was entered while ``shelter`` was the task's innermost one: what was entered
        further inside holds the cancel back until it is left."""
        if self.shelter is shelter or self.shelter is None or self.done():
            return super().cancel(msg)
        self.shelter.held.append((shelter, msg))
        return True


class Shelter:
    """An ``async with`` block in which cancels of its task are held back: see ``uncancellable``."""

    __slots__ = ("_outer", "_task", "held")

    def __init__(self) -> None:
        self._task: Task[Any] | None = None
        self._outer: Shelter | None = None
        self.held: list[tuple[Shelter | None, Any]] = []

    async def __aenter__(self) -> None:
        if self._task is not None:
            raise RuntimeError("this uncancellable() block was entered before: call uncancellable() for each block.")
        task = asyncio.current_task()
        if not isinstance(task, Task):
            raise NotInWorkflow("durable.uncancellable() only works inside a workflow: elsewhere use asyncio.shield.")
        self._task, self._outer = task, task.shelter
        task.shelter = self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        task = self._task
        assert task is not None
        task.shelter = self._outer
        if not self.held or task.get_loop().is_closed() or (kind is not None and issubclass(kind, GeneratorExit)):
            return
        for shelter, msg in self.held:
            task.cancel_from(shelter, msg)
        # Where another block shelters the task as well, this only lets the others go first.
        await asyncio.sleep(0)
