"""Which runs this process waits for."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..broker import DurableBroker


class Wakes(Protocol):
    """What is told that somebody should look, on the listener's thread: a `threading.Event`, or something like it."""

    def set(self) -> None: ...


class Waiters:
    """Who in this process waits for which run, and the one channel on which the database tells that one closed."""

    def __init__(self, broker: DurableBroker) -> None:
        self.channel = uuid.uuid4().bytes
        self._events: dict[str, list[Wakes]] = {}
        self._lock = threading.Lock()
        broker.listen(f"durable:c{uuid.UUID(bytes=self.channel)}", self._notified)

    @classmethod
    def of(cls, broker: DurableBroker) -> Waiters:
        waiters = broker.waiters
        if waiters is None:
            waiters = broker.waiters = cls(broker)
        return waiters

    @contextmanager
    def waiting(self, run_id: str, event: Wakes) -> Iterator[None]:
        """While it is entered, the event is set whenever a run of this process's interest closes."""
        self.add(run_id, event)
        try:
            yield
        finally:
            self.remove(run_id, event)

    def add(self, run_id: str, event: Wakes) -> None:
        """Have an event set whenever something becomes of a run of this process's interest."""
        with self._lock:
            self._events.setdefault(run_id, []).append(event)

    def remove(self, run_id: str, event: Wakes) -> None:
        """Take back what was added."""
        with self._lock:
            waiting = self._events[run_id]
            waiting.remove(event)
            if not waiting:
                del self._events[run_id]

    def _notified(self) -> None:
        with self._lock:
            events = [e for waiting in self._events.values() for e in waiting]
        for event in events:
            event.set()


class Told:
    """An event of the event loop that any thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), timeout)
        self._event.clear()
