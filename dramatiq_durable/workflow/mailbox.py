"""Signals that a run was given and its code has not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from .converter import loads
from .loop import WorkflowLoop


class Mailbox:
    """The signals of a run, by name: each is read once, oldest first, by the code that waited longest."""

    __slots__ = ("_inboxes", "_loop", "_waiters")

    def __init__(self, loop: WorkflowLoop) -> None:
        self._loop = loop
        self._inboxes: dict[str, deque[bytes | None]] = {}
        self._waiters: dict[str, deque[asyncio.Future[Any]]] = {}

    def put(self, name: str, payload: bytes | None, first: bool = False) -> None:
        """Take a signal in, and wake who waits for it."""
        waiters = self._waiters.get(name)
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(payload)
                return
        inbox = self._inboxes.setdefault(name, deque())
        if first:
            inbox.appendleft(payload)
        else:
            inbox.append(payload)

    def take(self, name: str) -> tuple[bool, Any]:
        """Return (True, value) of the oldest unread signal of that name, or (False, None)."""
        inbox = self._inboxes.get(name)
        if not inbox:
            return False, None
        payload = inbox.popleft()
        return True, None if payload is None else loads(payload)

    async def next(self, name: str) -> Any:
        """Wait for the next signal of that name: each is given to one waiter, oldest to oldest."""
        future: asyncio.Future[bytes | None] = self._loop.create_future()
        self._waiters.setdefault(name, deque()).append(future)
        try:
            payload = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                # Given to a waiter that was cancelled in the same step: the signal is not lost, the next one gets it.
                self.put(name, future.result(), first=True)
            raise
        return None if payload is None else loads(payload)

    def clear(self) -> None:
        """Forget everything: the run is dropped from memory."""
        self._inboxes.clear()
        self._waiters.clear()
