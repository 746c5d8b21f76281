"""Signals that a run was given and its code has not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from .loop import WorkflowLoop


class Letter(NamedTuple):
    """A signal, and its place among the signals of its run."""

    number: int
    name: str
    payload: bytes | None


class Mailbox:
    """The signals of a run, by name: each is read once, oldest first, by its handler or else by the code that waited
    longest."""

    __slots__ = ("_count", "_given", "_handlers", "_inboxes", "_loop", "_waiters")

    def __init__(self, loop: WorkflowLoop) -> None:
        self._loop = loop
        self._count = 0
        self._handlers: dict[str, Callable[[bytes | None], None]] = {}
        self._inboxes: dict[str, deque[Letter]] = {}
        self._waiters: dict[str, deque[asyncio.Future[Any]]] = {}
        #: Given to code that has not come to take it: while it has not, the signal is unread.
        self._given: dict[asyncio.Future[Any], Letter] = {}

    def put(self, name: str, payload: bytes | None) -> None:
        """Take a signal in, and give it to its handler or to who waits for it."""
        self._count += 1
        letter = Letter(self._count, name, payload)
        if not self._hand_over(letter):
            self._inboxes.setdefault(name, deque()).append(letter)

    def _hand_over(self, letter: Letter) -> bool:
        handler = self._handlers.get(letter.name)
        if handler is not None:
            handler(letter.payload)
            return True
        waiters = self._waiters.get(letter.name)
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                self._given[waiter] = letter
                waiter.set_result(None)
                return True
        return False

    def handle(self, name: str, handler: Callable[[bytes | None], None]) -> list[bytes | None]:
        """Have every further signal of that name given to a handler; answers the unread ones, oldest first."""
        self._handlers[name] = handler
        return [letter.payload for letter in self._inboxes.pop(name, ())]

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
            letter = self._given.pop(future, None)
            if letter is not None and not self._hand_over(letter):
                # Given to a waiter that was cancelled in the same step: the signal is not lost, the next one gets it.
                self._inboxes.setdefault(name, deque()).appendleft(letter)
            raise
        return self._given.pop(future).payload

    def unread(self) -> list[tuple[str, bytes | None]]:
        """The signals that no code has read, in the order in which they came: what the run's successor is given."""
        letters = [letter for inbox in self._inboxes.values() for letter in inbox]
        return [(letter.name, letter.payload) for letter in sorted([*letters, *self._given.values()])]

    def clear(self) -> None:
        """Forget everything: the run is dropped from memory."""
        self._handlers.clear()
        self._inboxes.clear()
        self._waiters.clear()
        self._given.clear()
