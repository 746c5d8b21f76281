"""Signals that a run was given and its code has not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from .converter import loads
from .events import Event
from .loop import WorkflowLoop


class Mailbox:
    """The signals of a run, by name: each is read once, oldest first, by the code that waited longest."""

    __slots__ = ("_given", "_inboxes", "_loop", "_waiters")

    def __init__(self, loop: WorkflowLoop) -> None:
        self._loop = loop
        self._inboxes: dict[str, deque[Event]] = {}
        #: Given to a waiter that has not gone on yet.
        self._given: dict[int, Event] = {}
        self._waiters: dict[str, deque[asyncio.Future[Any]]] = {}

    def put(self, signal: Event, first: bool = False) -> None:
        """Take a signal in, and wake who waits for it."""
        name = signal.name or ""
        waiters = self._waiters.get(name)
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                self._given[signal.event_id] = signal
                waiter.set_result(signal)
                return
        inbox = self._inboxes.setdefault(name, deque())
        if first:
            inbox.appendleft(signal)
        else:
            inbox.append(signal)

    def take(self, name: str) -> tuple[bool, Any]:
        """Return (True, value) of the oldest unread signal of that name, or (False, None)."""
        inbox = self._inboxes.get(name)
        if not inbox:
            return False, None
        return True, _value(inbox.popleft())

    async def next(self, name: str) -> Any:
        """Wait for the next signal of that name: each is given to one waiter, oldest to oldest."""
        future: asyncio.Future[Event] = self._loop.create_future()
        self._waiters.setdefault(name, deque()).append(future)
        try:
            signal = await future
            self._given.pop(signal.event_id, None)
            return _value(signal)
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                # Given to a waiter that was cancelled in the same step: the signal is not lost, the next one gets it.
                self._given.pop(future.result().event_id, None)
                self.put(future.result(), first=True)
            raise

    def unread(self) -> list[int]:
        """The signals that nobody has read, by the numbers of their events, in the order in which they came."""
        return sorted([*self._given, *(signal.event_id for inbox in self._inboxes.values() for signal in inbox)])

    def clear(self) -> None:
        """Forget everything: the run is dropped from memory."""
        self._inboxes.clear()
        self._given.clear()
        self._waiters.clear()


def _value(signal: Event) -> Any:
    return None if signal.payload is None else loads(signal.payload)
