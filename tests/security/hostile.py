"""A valid login that takes what it can: ``python -m tests.security.hostile ATTACK URL OWN HONEST SESSIONS``.

Each line that it prints is JSON: how often its attempts came to their end so far, and how often it was thrown out or
refused.  It goes on until it is killed, and comes back whenever it is thrown out.  Its own work is done in the time
that nobody else wants, as if its machine were elsewhere: what is measured is what the server does for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.sql.api import Session

#: How many sessions the login may have.
CONNECTIONS = 4


@dataclass
class Hostile:
    """The login, and what came of its attempts."""

    url: str
    #: What it may send to: its own stream, and the honest one.
    streams: tuple[int, int]
    done: int = 0
    ended: int = 0

    def attack(self, what: Callable[[Hostile, Session], None]) -> None:
        while True:
            try:
                session = Session(self.url)
            except psycopg.OperationalError:
                self.ended += 1
                time.sleep(0.05)
                continue
            try:
                for setting in ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout"):
                    session.sql(f"SET {setting} = 0")
                while True:
                    what(self, session)
                    self.done += 1
            except psycopg.Error:
                self.ended += 1
            finally:
                session.close()


def hold(session: Session) -> None:
    """Do nothing, until the session is thrown out."""
    select.select([session.conn], [], [], 30)
    session.sql("SELECT 1")


def held_rows(hostile: Hostile, session: Session) -> None:
    """All that a call may lock, in a transaction that does not end."""
    mine, honest = hostile.streams
    session.begin()
    session.enqueue(mine, b"x")
    session.enqueue(honest, b"x", delay=3_600_000)
    session.enqueue_keyed(honest, "key")
    session.start(mine, "the-same-id", conflict="use_existing")
    session.call("limiter_change", "key", 1, None, None, 60_000)
    hold(session)


def idle_transactions(hostile: Hostile, session: Session) -> None:
    """Holds back vacuum, so that every claim meets the rows that are done."""
    session.sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
    session.sql("SELECT pg_current_xact_id()")
    hold(session)


def sleeping(hostile: Hostile, session: Session) -> None:
    session.sql("SELECT pg_sleep(60)")


def burning(hostile: Hostile, session: Session) -> None:
    session.sql("SELECT count(*) FROM generate_series(1, 1000000000000)")


def spilling(hostile: Hostile, session: Session) -> None:
    """Sorts what does not fit into memory, as often as it may."""
    session.sql("SET work_mem = '64kB'")
    session.sql("SELECT count(*) FROM (SELECT n FROM generate_series(1, 1000000000) n ORDER BY n DESC OFFSET 1) s")


def payloads(hostile: Hostile, session: Session) -> None:
    """16 MiB at a time; over its limit it is refused, and tries again at once."""
    with contextlib.suppress(psycopg.DatabaseError):
        session.enqueue(hostile.streams[0], bytes(16 * 1024 * 1024))


def messages(hostile: Hostile, session: Session) -> None:
    """As many as it may have on the honest stream itself, with delays that bring them to the front of nothing."""
    with contextlib.suppress(psycopg.DatabaseError):
        session.enqueue(hostile.streams[1], *[b"x"] * 50, delay=3_600_000)


def locks(hostile: Hostile, session: Session) -> None:
    with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
        session.sql("SELECT count(pg_advisory_lock(n)) FROM generate_series(1, 1000000) n")
    with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
        session.sql("SELECT count(lo_create(0)) FROM generate_series(1, 1000000) n")
    with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
        session.sql("SELECT pg_logical_emit_message(false, '', repeat('x', 100000000))")


def connections(hostile: Hostile, session: Session) -> None:
    time.sleep(0.2)


def notifications(hostile: Hostile, session: Session) -> None:
    """On the channels of the honest stream, and with as much as fits."""
    channel = f"durable:s{hostile.streams[1]}"
    session.sql("SELECT pg_notify(%s, n || repeat('x', 7000)) FROM generate_series(1, 20) n", channel)


def unread_notifications(hostile: Hostile, session: Session) -> None:
    """Whoever listens and does not read keeps the queue from being emptied."""
    session.sql("LISTEN c")
    other = Session(hostile.url)
    try:
        # Until the one that listens is thrown out.
        while other.sql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", session.pid):
            other.sql("SELECT pg_notify('c', n || repeat('x', 7900)) FROM generate_series(1, 200) n")
    finally:
        other.close()


#: In how many sessions each is made at once.
ATTACKS = {
    "held_rows": CONNECTIONS,
    "idle_transactions": CONNECTIONS,
    "sleeping": CONNECTIONS,
    "burning": 2,
    "spilling": 1,
    "payloads": 1,
    "messages": 2,
    "locks": 2,
    "connections": 2 * CONNECTIONS,
    "notifications": 1,
    "unread_notifications": 1,
}


def spare_time() -> None:
    """From now on this process runs where nobody else wants to."""
    with contextlib.suppress(OSError):
        os.nice(19)
        # The session's, where Linux shares the processor among sessions first.
        Path("/proc/self/autogroup").write_text("19")


def main() -> None:
    name, url, own, honest, sessions = sys.argv[1:]
    attack = globals()[name]
    spare_time()
    hostile = Hostile(url, (int(own), int(honest)))
    for _ in range(int(sessions)):
        threading.Thread(target=hostile.attack, args=[attack], daemon=True).start()
    while True:
        print(json.dumps({"done": hostile.done, "ended": hostile.ended}), flush=True)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
