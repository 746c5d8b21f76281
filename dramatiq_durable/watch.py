"""Waiting for what the database will have: however many threads of a process wait, one thread looks for all of them.

It is woken by notifications, on the process's one listening connection; and looks by itself every second, because
notifications may be lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .errors import DatabaseUnavailable
from .procedures import Procedures, Wanted

if TYPE_CHECKING:
    from .broker import DurableBroker

logger = logging.getLogger(__name__)

#: Looks for what is wanted: given the procedures, a connection, what is wanted, and (or None) a channel that is to be
#: notified for so many milliseconds.  Answers what is there.
Find = Callable[[Procedures, Any, Sequence[Any], "bytes | None", int], "dict[Any, Any]"]

#: When it looks for a result, in seconds after the look before.  The first looks close the gap between the wish to be
#: notified and a commit that was under way beside it; the last one goes on.
LOOKS = (0.0, 0.003, 0.01, 0.05, 0.2, 1.0)

#: For how long a wish to be notified holds in the database, in seconds; it is renewed when half of that is over.
WISH = 120.0

#: How long the thread lives on when nobody waits, in seconds.
IDLE = 10.0

#: How long a caller sleeps at a stretch, in seconds: time limits and shutdowns interrupt it only in between.
STRETCH = 0.5


def find_results(
    procedures: Procedures, conn: Any, wanted: Sequence[Wanted], channel: bytes | None, wait: int
) -> dict[Wanted, bytes]:
    """Those of these results that are there."""
    return procedures.get_results(conn, wanted, channel, wait)


class _Wish:
    """One caller's waiting for one thing."""

    __slots__ = ("asked", "done", "error", "looks", "next_look", "tell", "until", "value", "wanted")

    def __init__(self, wanted: Any) -> None:
        self.wanted = wanted
        self.done = threading.Event()
        #: Called once it is done, on the looking thread.
        self.tell: Callable[[], Any] | None = None
        #: Whether it was looked for at all, or tried to be.
        self.asked = False
        self.value: Any = None
        #: Why it cannot be looked up; while the database is away, only for now.
        self.error: Exception | None = None
        self.next_look = 0.0
        self.looks = 0
        #: Until when the database knows of the wish.
        self.until = 0.0

    def finish(self) -> None:
        self.done.set()
        if self.tell is not None:
            self.tell()


class Watch:
    """What the threads of this process wait for, of one kind and in one namespace."""

    def __init__(self, broker: DurableBroker, find: Find = find_results) -> None:
        self._broker = broker
        self._look_for = find
        self._channel = uuid.uuid4().bytes
        self._wishes: set[_Wish] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._notified = False
        self._thread: threading.Thread | None = None
        broker.listen(f"durable:c{uuid.UUID(bytes=self._channel)}", self._on_notify)

    @classmethod
    def of(cls, broker: DurableBroker, find: Find = find_results) -> Watch:
        """The one of this process for what a function finds; a forked child makes its own."""
        return broker.shared(f"watch {find.__name__}", lambda: cls(broker, find))

    @property
    def channel(self) -> bytes:
        """Where notifications make it look at once."""
        return self._channel

    def wait(self, wanted: Any, timeout: float | None) -> Any:
        """Wait for something, for so many seconds at the most; None is for ever.  It is looked for at least once.

        Returns:
          What was found; None if it did not come in time.

        Raises:
          DatabaseUnavailable: the time is over, and the database was away at the end.
          NotPermitted, SchemaOutOfDate, NotConfigured: it cannot be looked up.
        """
        wish = _Wish(wanted)
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._add(wish)
        try:
            while not wish.done.wait(min(max(deadline - time.monotonic(), 0.01), STRETCH)):
                if wish.asked and time.monotonic() >= deadline:
                    break
        finally:
            with self._lock:
                self._wishes.discard(wish)
        if wish.error is not None:
            raise wish.error
        return wish.value

    async def async_wait(self, wanted: Any, timeout: float | None) -> Any:
        """As `wait`, without a thread for each that waits."""
        wish = _Wish(wanted)
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout

        def tell() -> None:
            # A loop that was closed has nobody who waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set)

        wish.tell = tell
        self._add(wish)
        try:
            while not wish.done.is_set() and not (wish.asked and time.monotonic() >= deadline):
                try:
                    left = max(deadline - time.monotonic(), 0.01)
                    await asyncio.wait_for(done.wait(), None if left == float("inf") else left)
                except TimeoutError:
                    pass
        finally:
            with self._lock:
                self._wishes.discard(wish)
        if wish.error is not None:
            raise wish.error
        return wish.value

    def _add(self, wish: _Wish) -> None:
        with self._lock:
            self._wishes.add(wish)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dramatiq-durable-watch", daemon=True)
                self._thread.start()
        self._wake.set()

    def _on_notify(self) -> None:
        self._notified = True
        self._wake.set()

    def _run(self) -> None:
        idle_since = time.monotonic()
        while True:
            now = time.monotonic()
            with self._lock:
                wishes = list(self._wishes)
                if wishes:
                    idle_since = now
                elif now - idle_since > IDLE:
                    self._thread = None
                    return
            next_look = min((w.next_look for w in wishes), default=now + IDLE)
            if next_look > now and not self._notified:
                self._wake.wait(next_look - now)
            self._wake.clear()
            notified = self._notified
            if notified:
                self._notified = False
            now = time.monotonic()
            with self._lock:
                due = [w for w in self._wishes if notified or w.next_look <= now]
                if due:
                    # Those who have waited for some time need not be on time: they are looked for together.
                    due += [w for w in self._wishes - set(due) if w.looks >= len(LOOKS) and w.next_look < now + 0.5]
            if due:
                self._look(due, now)
                for wish in due:
                    wish.asked = True

    def _look(self, due: list[_Wish], now: float) -> None:
        try:
            new = [w for w in due if w.until < now]
            found = self._find([w.wanted for w in new], self._channel)
            found.update(self._find([w.wanted for w in due if w.until >= now], None))
        except DatabaseUnavailable as e:
            logger.debug("the database is away, looking for results again: %s", e)
            for wish in due:
                wish.error = e
                wish.next_look = time.monotonic() + 0.5
            return
        except Exception as e:
            for wish in due:
                wish.error = e
                wish.finish()
            return
        for wish in new:
            wish.until = now + WISH / 2
            wish.looks = 0
        for wish in due:
            wish.error = None
            if wish.wanted in found:
                wish.value = found[wish.wanted]
                wish.finish()
            wish.next_look = time.monotonic() + LOOKS[min(wish.looks, len(LOOKS) - 1)]
            wish.looks += 1

    def _find(self, wanted: list[Any], channel: bytes | None) -> dict[Any, Any]:
        if not wanted:
            return {}
        with self._broker.database.calling() as conn:
            return self._look_for(self._broker.procedures, conn, list(set(wanted)), channel, int(WISH * 1000))
