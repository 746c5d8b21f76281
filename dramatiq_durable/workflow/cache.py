"""Runs in memory: a bounded set of executions, each with the lock under which it is stepped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from ..operations import Advance
from .info import Info
from .replay import Execution

#: How many runs are kept in memory; the one that was not used for longest goes first.
CAPACITY = 2000


class CachedRun:
    """A run that may be in memory.

    Whoever steps the execution holds the lock from before the step until its outcome is queued for the commit, so that
    steps are committed in the order in which they were made.

    Attributes:
      taken(set): items of the inbox that the execution was given, and that may still be in it.
      shared(bool): others had taken the run further when this worker looked last: what is in memory may be old.
      computes(bool): its code has local activities, which an activity's outcome does not wait for.
      info(Info | None): what is known of the run without its history, once it was loaded.
      latest(Advance | None): the execution's latest step: the next one counts only if it is recorded.
    """

    __slots__ = ("_doomed", "computes", "execution", "info", "latest", "lock", "shared", "taken")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.execution: Execution | None = None
        self.info: Info | None = None
        self.taken: set[int] = set()
        self.latest: Advance | None = None
        self.computes = False
        self.shared = False
        self._doomed = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Hold the lock; what was given up meanwhile is dropped before and after."""
        with self.lock:
            if self._doomed:
                self.drop()
            try:
                yield
            finally:
                if self._doomed:
                    self.drop()

    @contextmanager
    def looking(self, timeout: float) -> Iterator[bool]:
        """As `stepping`, for who waits at most so many seconds; answers whether the lock is held."""
        held = self.lock.acquire(timeout=timeout)
        try:
            if held and self._doomed:
                self.drop()
            yield held
        finally:
            if held:
                if self._doomed:
                    self.drop()
                self.lock.release()

    def give_up(self) -> None:
        """Evict the execution now, or as soon as whoever holds the lock is done: workflow code may take its time, and
        the thread that commits for everybody must not wait for it."""
        self._doomed = True
        if self.lock.acquire(blocking=False):
            try:
                self.drop()
            finally:
                self.lock.release()

    @property
    def recorded(self) -> bool:
        """Whether every step of the execution is committed."""
        return self.latest is None or (self.latest.finished and self.latest.answer == "ok")

    def drop(self) -> None:
        """Evict the execution.  The lock is held."""
        self._doomed = False
        execution, self.execution = self.execution, None
        self.taken.clear()
        self.latest = None
        if execution is not None:
            execution.evict()


class RunCache:
    """The runs that this process has in memory."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._runs: OrderedDict[str, CachedRun] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, run_id: str) -> CachedRun:
        """A run's entry; new and empty if it was not in memory."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is not None:
                self._runs.move_to_end(run_id)
                return run
            run = self._runs[run_id] = CachedRun()
            overdue = [self._runs.popitem(last=False)[1] for _ in range(len(self._runs) - self._capacity)]
        for old in overdue:
            old.give_up()
        return run

    def peek(self, run_id: str) -> CachedRun | None:
        """A run's entry, if it is in memory."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is not None:
                self._runs.move_to_end(run_id)
            return run

    def forget(self, run_id: str) -> None:
        """Remove a run's entry; its execution, if any, is the caller's to drop."""
        with self._lock:
            self._runs.pop(run_id, None)

    def clear(self) -> None:
        """Evict everything."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs.clear()
        for run in runs:
            with run.stepping():
                run.drop()
