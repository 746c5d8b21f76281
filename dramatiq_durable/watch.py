"""Waiting for results: however many threads of a process wait, one thread looks for all of them.

It is woken by notifications, on the process's one listening connection; and looks by itself every second, because
notifications may be lost.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from typing import TYPE_CHECKING

import psycopg

from .database import translate
from .errors import DatabaseUnavailable
from .procedures import Wanted

if TYPE_CHECKING:
    from .broker import DurableBroker

logger = logging.getLogger(__name__)

#: When it looks for a result, in seconds after the look before.  The first looks close the gap between the wish to be
#: notified and a commit that was under way beside it; the last one goes on.
LOOKS = (0.0, 0.003, 0.01, 0.05, 0.2, 1.0)

#: For how long a wish to be notified holds in the database, in seconds; it is renewed when half of that is over.
WISH = 120.0

#: How long the thread lives on when nobody waits, in seconds.
IDLE = 10.0

#: How long a caller sleeps at a stretch, in seconds: time limits and shutdowns interrupt it only in between.
STRETCH = 0.5


class _Wish:
    """One caller's waiting for one result."""

    __slots__ = ("asked", "done", "error", "looks", "next_look", "until", "value", "wanted")

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.done = threading.Event()
        #: Whether it was looked for at all, or tried to be.
        self.asked = False
        self.value: bytes | None = None
        #: Why it cannot be looked up; while the database is away, only for now.
        self.error: Exception | None = None
        self.next_look = 0.0
        self.looks = 0
        #: Until when the database knows of the wish.
        self.until = 0.0


class Watch:
    """What the threads of this process wait for, in one namespace."""

    def __init__(self, broker: DurableBroker) -> None:
        self._broker = broker
        self._channel = uuid.uuid4().bytes
        self._wishes: set[_Wish] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._notified = False
        self._thread: threading.Thread | None = None
        broker.listen(f"durable:c{uuid.UUID(bytes=self._channel)}", self._on_notify)

    @classmethod
    def of(cls, broker: DurableBroker) -> Watch:
        """The one of this process; a forked child makes its own."""
        return broker.shared("watch", lambda: cls(broker))

    def wait(self, wanted: Wanted, timeout: float | None) -> bytes | None:
        """Wait for a result, for so many seconds at the most; None is for ever.  It is looked for at least once.

        Returns:
          bytes | None: the stored bytes; None if they did not come in time.

        Raises:
          DatabaseUnavailable: the time is over, and the database was away at the end.
          NotPermitted, SchemaOutOfDate, NotConfigured: it cannot be looked up.
        """
        wish = _Wish(wanted)
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._wishes.add(wish)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dramatiq-durable-watch", daemon=True)
                self._thread.start()
        self._wake.set()
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
                wish.done.set()
            return
        for wish in new:
            wish.until = now + WISH / 2
            wish.looks = 0
        for wish in due:
            wish.error = None
            if wish.wanted in found:
                wish.value = found[wish.wanted]
                wish.done.set()
            wish.next_look = time.monotonic() + LOOKS[min(wish.looks, len(LOOKS) - 1)]
            wish.looks += 1

    def _find(self, wanted: list[Wanted], channel: bytes | None) -> dict[Wanted, bytes]:
        if not wanted:
            return {}
        try:
            with self._broker.database.connection() as conn:
                return self._broker.procedures.get_results(conn, list(set(wanted)), channel, int(WISH * 1000))
        except psycopg.Error as e:
            raise translate(e) from e
