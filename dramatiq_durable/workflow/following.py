"""Following a run's output: reading what is there, and waiting for more.

The database tells whoever waits that there is more; it is asked again after a while all the same, because what tells
may be lost.  Between two looks nothing is held: no connection, and for ``async for`` no thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import DatabaseUnavailable
from .converter import loads
from .waiting import Told, Waiters

if TYPE_CHECKING:
    from .handle import WorkflowHandle

#: How many values are read at once.
CHUNK = 500

#: How often a follower looks by itself, in seconds: at first, and at the longest.
LOOKS = (0.05, 5.0)

#: For how long the database is to tell of more, in milliseconds; each look asks anew.
WAIT = 30_000

#: How long the database may stay away, in seconds.
PATIENCE = 60


def follow(handle: WorkflowHandle[Any], offset: int) -> Iterator[tuple[int, Any]]:
    """As `WorkflowHandle.follow`."""
    return _follow(_Follower(handle, offset))


def _follow(follower: _Follower) -> Iterator[tuple[int, Any]]:
    follower.resolve()
    told = threading.Event()
    with follower.waiters.waiting(follower.run_id, told):
        while True:
            yield from (found := follower.look())
            if follower.ended:
                return
            if not found:
                told.wait(follower.pause())
                told.clear()


def afollow(handle: WorkflowHandle[Any], offset: int) -> AsyncIterator[tuple[int, Any]]:
    """As `WorkflowHandle.afollow`."""
    return _afollow(_Follower(handle, offset))


async def _afollow(follower: _Follower) -> AsyncIterator[tuple[int, Any]]:
    await asyncio.to_thread(follower.resolve)
    told = Told()
    first = follower.run_id
    follower.waiters.add(first, told)
    try:
        while True:
            found = await asyncio.to_thread(follower.look)
            for pair in found:
                yield pair
            if follower.ended:
                return
            if not found:
                await told.wait(follower.pause())
    finally:
        follower.waiters.remove(first, told)


class _Follower:
    """How far somebody has followed a run.

    Attributes:
      run_id(str): the run whose output is read, once it was looked up: where others go on for it, one after the other.
      ended(bool): the last of them has closed, and all that it put out was read.
    """

    def __init__(self, handle: WorkflowHandle[Any], offset: int) -> None:
        if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < 2**31:
            raise ValueError(f"an offset is a whole number from 0 on, not {offset!r:.60}.")
        self._handle = handle
        self._offset = offset
        self._pause = LOOKS[0]
        self._registered = False
        self._away_since: float | None = None
        self._done: set[bytes] = set()
        self.run_id = ""
        self.ended = False

    def resolve(self) -> None:
        """Find the run.  Raises WorkflowNotFound."""
        self.run_id = self._handle._resolve()
        self.waiters = Waiters.of(self._handle.broker)

    def look(self) -> list[tuple[int, Any]]:
        """Read what is there and was not read yet."""
        handle = self._handle
        procedures = handle.broker.procedures
        # The wish to be told is stored once there is nothing more to read, and then it is read again.
        channel = self.waiters.channel if self._registered else None
        try:
            rows, end = handle._read(
                lambda conn: procedures.read_output(
                    conn, uuid.UUID(self.run_id).bytes, self._offset, CHUNK, channel, WAIT
                )
            )
        except DatabaseUnavailable:
            # An outage is no reason to forget what is being waited for; but not for ever.
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > PATIENCE:
                raise
            self._registered = True
            return []
        self._away_since = None
        if end is None:
            raise handle._not_found()
        status, run, following = end
        self.run_id = str(uuid.UUID(bytes=run))
        if rows:
            self._offset = rows[-1][0] + 1
            self._registered = False
            self._pause = LOOKS[0]
        elif following is not None and run not in self._done:
            self._done.add(run)
            self.run_id = str(uuid.UUID(bytes=following))
            return self.look()
        elif status != "running":
            self.ended = True
        elif not self._registered:
            self._registered = True
            return self.look()
        decode = handle.broker.codecs.decode
        return [(place, None if payload is None else loads(decode(payload, "an output"))) for place, payload in rows]

    def pause(self) -> float:
        """For how many seconds to wait, at the most, before the next look."""
        pause, self._pause = self._pause, min(self._pause * 1.5, LOOKS[1])
        return pause
