"""What lies between a worker's deliveries and its threads.

Dramatiq's own is a `queue.PriorityQueue`: its locks, conditions and comparisons, and the thread that hands each message
over, are nearly half of what Dramatiq does for a message.  Deliveries come in order already, so that a line for each
priority will do, and appending to a deque needs no lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from queue import Empty
from typing import Any


class WorkQueue:
    """A Worker's queue: by priority, and within one in the order in which they came.

    It can be used as the `queue.PriorityQueue` in whose place it stands.
    """

    def __init__(self) -> None:
        self._lines: dict[int, deque[Any]] = {}
        #: The lines by priority; a new tuple whenever there is a new one, for those who read it meanwhile.
        self._in_order: tuple[deque[Any], ...] = ()
        #: Whoever waits, by the lock that wakes him.
        self._idle: deque[threading.Lock] = deque()
        #: As many elements as there are items that are not done.
        self._open: deque[None] = deque()
        self._new_line = threading.Lock()
        self._all_done = threading.Condition()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add one of Dramatiq's items, which has a priority.  There is always room."""
        self.add(item.priority, item)

    def add(self, priority: int, item: Any) -> None:
        """Add an item: whatever has a ``message``."""
        line = self._lines.get(priority)
        if line is None:
            line = self._line(priority)
        self._open.append(None)
        line.append(item)
        if self._idle:
            self._wake()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first item.

        Parameters:
          block(bool): wait for one.
          timeout(float | None): for so many seconds at the most.

        Raises:
          Empty: there was none.
        """
        item = self._take()
        if item is not None:
            return item
        if not block:
            raise Empty
        return self._wait(timeout)

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def task_done(self) -> None:
        """One item that was taken is done."""
        try:
            self._open.pop()
        except IndexError:
            raise ValueError("task_done() called too many times") from None
        if not self._open:
            with self._all_done:
                self._all_done.notify_all()

    def join(self) -> None:
        """Wait until everything that was put is done."""
        with self._all_done:
            while self._open:
                self._all_done.wait()

    @property
    def unfinished_tasks(self) -> int:
        return len(self._open)

    def qsize(self) -> int:
        return sum(len(line) for line in self._in_order)

    def empty(self) -> bool:
        return not any(self._in_order)

    def _line(self, priority: int) -> deque[Any]:
        with self._new_line:
            line = self._lines.setdefault(priority, deque())
            self._in_order = tuple(self._lines[each] for each in sorted(self._lines))
        return line

    def _take(self) -> Any:
        for line in self._in_order:
            if line:
                try:
                    return line.popleft()
                except IndexError:
                    # Somebody was quicker.
                    continue
        return None

    def _wait(self, timeout: float | None) -> Any:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            gate = threading.Lock()
            gate.acquire()
            # Whoever adds looks for the idle afterwards, and the idle look once more: one of the two sees the other.
            self._idle.append(gate)
            item = self._take()
            if item is None:
                gate.acquire(timeout=-1 if until is None else max(until - time.monotonic(), 0))
                item = self._take()
            try:
                self._idle.remove(gate)
            except ValueError:
                # It was woken for something, and that may be another item than the one it has: somebody else must look.
                if item is not None and not self.empty():
                    self._wake()
                    return item
            else:
                if item is None:
                    raise Empty
            if item is not None:
                return item

    def _wake(self) -> None:
        """Wake the one who came last: what he needs is still in the processor's caches."""
        try:
            gate = self._idle.pop()
        except IndexError:
            return
        gate.release()
