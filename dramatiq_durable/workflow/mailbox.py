"""Signals that a run was given and its code has not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from .events import Event
from .loop import WorkflowLoop


class Mailbox:
    """The signals of a run, by name: each is read once, oldest first, by its handler or else by the code that waited
    longest."""

    __slots__ = ("_given", "_handlers", "_inboxes", "_loop", "_waiters")

    def __init__(self, loop: WorkflowLoop) -> None:
        self._loop = loop
        self._handlers: dict[str, Callable[[Event], None]] = {}
        self._inboxes: dict[str, deque[Event]] = {}
        self._waiters: dict[str, deque[asyncio.Future[Any]]] = {}
        #: Given to code that has not come to take it: while it has not, the signal is unread.
        self._given: dict[asyncio.Future[Any], Event] = {}

    def put(self, signal: Event, first: bool = False) -> None:
        """Take a signal in, and give it to its handler or to who waits for it."""
        name = signal.name or ""
        handler = self._handlers.get(name)
        if handler is not None:
            handler(signal)
            return
        waiters = self._waiters.get(name)
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                self._given[waiter] = signal
                waiter.set_result(None)
                return
        inbox = self._inboxes.setdefault(name, deque())
        if first:
            inbox.appendleft(signal)
        else:
            inbox.append(signal)

    def handle(self, name: str, handler: Callable[[Event], None]) -> list[Event]:
        """Have every further signal of that name given to a handler; answers the unread ones, oldest first."""
        self._handlers[name] = handler
        return list(self._inboxes.pop(name, ()))

    def take(self, name: str) -> tuple[bool, bytes | None]:
        """Return (True, payload) of the oldest unread signal of that name, or (False, None)."""
        inbox = self._inboxes.get(name)
        if not inbox:
            return False, None
        return True, inbox.popleft().payload

    async def next(self, name: str) -> bytes | None:
        """Wait for the next signal of that name: each is given to one waiter, oldest to oldest."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiters.setdefault(name, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            signal = self._given.pop(future, None)
            if signal is not None:
                # Given to a waiter that was cancelled in the same step: the signal is not lost, the next one gets it.
                self.put(signal, first=True)
            raise
        return self._given.pop(future).payload

    def unread(self) -> list[int]:
        """The signals that neither code has read nor a handler was given, by the numbers of their events."""
        kept = [signal for inbox in self._inboxes.values() for signal in inbox]
        return [signal.event_id for signal in (*kept, *self._given.values())]

    def clear(self) -> None:
        """Forget everything: the run is dropped from memory."""
        self._handlers.clear()
        self._inboxes.clear()
        self._waiters.clear()
        self._given.clear()
