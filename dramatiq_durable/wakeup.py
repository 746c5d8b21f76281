"""One connection a process that listens: it turns notifications into calls.

Notifications carry no data and may be lost; whoever is called looks for himself, and looks now and then anyway.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

import psycopg
from psycopg import sql

from .errors import DurableError

logger = logging.getLogger(__name__)


class Listener(threading.Thread):
    """Listens on channels until it is stopped.  Without a connection it tries again; everybody is called when it has
    one again, because something may have been missed.

    Parameters:
      connect(Callable): makes a connection in autocommit mode; not one through a pooler in transaction mode, which
        would swallow the notifications.
    """

    def __init__(self, connect: Callable[[], psycopg.Connection[tuple[object, ...]]]) -> None:
        super().__init__(name="dramatiq-durable-listener", daemon=True)
        self._connect = connect
        self._channels: dict[str, Callable[[], None]] = {}
        self._listening: set[str] = set()
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        self._running = True

    def listen(self, channel: str, callback: Callable[[], None]) -> None:
        """Call back whenever the channel is notified; from this thread, so briefly."""
        with self._lock:
            self._channels[channel] = callback
        os.write(self._writer, b"x")

    def stop(self) -> None:
        """End the thread and close its connection."""
        self._running = False
        os.write(self._writer, b"x")
        self.join(5)
        if not self.is_alive():
            os.close(self._reader)
            os.close(self._writer)

    def run(self) -> None:
        delay = 0.1
        while self._running:
            try:
                with self._connect() as conn:
                    delay = 0.1
                    self._listening.clear()
                    self._serve(conn)
            except (psycopg.Error, DurableError, OSError) as e:
                logger.debug("the listening connection is away, polling meanwhile: %s", e)
            if self._running:
                select.select([self._reader], [], [], delay)
                delay = min(delay * 2, 5.0)

    def _serve(self, conn: psycopg.Connection[tuple[object, ...]]) -> None:
        while self._running:
            with self._lock:
                channels = dict(self._channels)
            new = [c for c in channels if c not in self._listening]
            for channel in new:
                conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                self._listening.add(channel)
            for channel in new:
                channels[channel]()
            readable, _, _ = select.select([conn.fileno(), self._reader], [], [], 60)
            if self._reader in readable:
                os.read(self._reader, 4096)
            if conn.fileno() in readable:
                for channel in {n.channel for n in conn.notifies(timeout=0)}:
                    if channel in channels:
                        channels[channel]()
            elif not readable:
                conn.execute("SELECT 1")
