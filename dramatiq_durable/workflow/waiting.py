"""Which runs this process waits for."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..broker import DurableBroker


class Waiters:
    """Who in this process waits for which run, and the one channel on which the database tells that one closed."""

    def __init__(self, broker: DurableBroker) -> None:
        self.channel = uuid.uuid4().bytes
        self._events: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()
        broker.listen(f"durable:c{uuid.UUID(bytes=self.channel)}", self._notified)

    @classmethod
    def of(cls, broker: DurableBroker) -> Waiters:
        waiters = broker.waiters
        if waiters is None:
            waiters = broker.waiters = cls(broker)
        return waiters

    def waiting(self, run_id: str) -> _Waiting:
        return _Waiting(self, run_id)

    def _notified(self) -> None:
        with self._lock:
            events = [e for waiting in self._events.values() for e in waiting]
        for event in events:
            event.set()


class _Waiting:
    """While it is entered, its event is set whenever a run of this process's interest closes."""

    def __init__(self, waiters: Waiters, run_id: str) -> None:
        self._waiters = waiters
        self._run_id = run_id
        self._event = threading.Event()

    def __enter__(self) -> threading.Event:
        with self._waiters._lock:
            self._waiters._events.setdefault(self._run_id, []).append(self._event)
        return self._event

    def __exit__(self, *_: object) -> None:
        with self._waiters._lock:
            waiting = self._waiters._events[self._run_id]
            waiting.remove(self._event)
            if not waiting:
                del self._waiters._events[self._run_id]
