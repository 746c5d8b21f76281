"""A role that may send to a stream does what it can to hold up another: the stream's messages come as they did before.

Times are compared with those of the same machine a moment before.  What is tolerated here is much, as others may be at
work on the machine; `make soak` measures for longer, prints the ratios, and wants them within 2.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from dramatiq_durable import provision_worker_role
from dramatiq_durable.check import check
from dramatiq_durable.embedded import Server
from dramatiq_durable.migrate import migrate
from tests.sql.api import Session
from tests.support import wait_until
from tests.support.processes import Process, Processes

pytestmark = [pytest.mark.xdist_group("starvation"), pytest.mark.timeout(300)]

#: How many sessions the hostile login may have.
CONNECTIONS = 4
MAX_LIVE = 200


@dataclass
class Hostile:
    """A valid login, and what it is up to until it is stopped; it comes back whenever it is thrown out."""

    url: str
    #: What it may send to: its own stream, and the honest one.
    streams: tuple[int, int]
    stop: threading.Event = field(default_factory=threading.Event)
    #: How often each of its attempts came to its end, and how often it was thrown out or refused.
    done: int = 0
    ended: int = 0

    def attack(self, what: Callable[[Hostile, Session], None], sessions: int) -> list[threading.Thread]:
        def run() -> None:
            while not self.stop.is_set():
                try:
                    session = Session(self.url)
                except psycopg.OperationalError:
                    self.ended += 1
                    self.stop.wait(0.05)
                    continue
                for setting in ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout"):
                    session.sql(f"SET {setting} = 0")
                try:
                    while not self.stop.is_set():
                        what(self, session)
                        self.done += 1
                except psycopg.Error:
                    self.ended += 1
                finally:
                    session.close()

        threads = [threading.Thread(target=run, daemon=True) for _ in range(sessions)]
        for thread in threads:
            thread.start()
        return threads


def held_rows(hostile: Hostile, session: Session) -> None:
    """All that a call may lock, in a transaction that does not end."""
    mine, honest = hostile.streams
    session.begin()
    session.enqueue(mine, b"x")
    session.enqueue(honest, b"x", delay=3_600_000)
    session.enqueue_keyed(honest, "key")
    session.start(mine, "the-same-id", conflict="use_existing")
    session.call("limiter_change", "key", 1, None, None, 60_000)
    hostile.stop.wait(30)


def idle_transactions(hostile: Hostile, session: Session) -> None:
    """Holds back vacuum, so that every claim meets the rows that are done."""
    session.sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
    session.sql("SELECT pg_current_xact_id()")
    hostile.stop.wait(30)


def sleeping(hostile: Hostile, session: Session) -> None:
    session.sql("SELECT pg_sleep(60)")


def burning(hostile: Hostile, session: Session) -> None:
    session.sql("SELECT count(*) FROM generate_series(1, 1000000000000)")


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


def connections(hostile: Hostile, session: Session) -> None:
    hostile.stop.wait(0.2)


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
        while not hostile.stop.is_set() and other.sql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", session.pid):
            other.sql("SELECT pg_notify('c', n || repeat('x', 7900)) FROM generate_series(1, 200) n")
    finally:
        other.close()


ATTACKS: dict[Callable[[Hostile, Session], None], int] = {
    held_rows: CONNECTIONS,
    idle_transactions: CONNECTIONS,
    sleeping: CONNECTIONS,
    burning: 2,
    payloads: 1,
    messages: 2,
    locks: 2,
    connections: 2 * CONNECTIONS,
    notifications: 1,
    unread_notifications: 1,
}


@pytest.fixture
def server(own_server: Server) -> Server:
    migrate(own_server.url)
    return own_server


@pytest.fixture
def hostile(server: Server) -> Iterator[Hostile]:
    """A login that may consume a stream of its own, and send there and to the honest one."""
    db = Session(server.url)
    made = provision_worker_role(
        server.url, name="hostile", streams=["own"], produce=["own", "honest"], connection_limit=CONNECTIONS,
        max_live=MAX_LIVE, max_statement="3s", max_transaction="1s",
    )  # fmt: skip
    for finding in check(server.url):
        if finding.name in ("shared_locks", "temporary", "create"):
            for statement in finding.fix.split("; "):
                db.sql(statement)
    hostile = Hostile(made.url, (db.stream("own"), db.stream("honest")))
    yield hostile
    hostile.stop.set()
    db.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", made.role)
    db.close()


class Honest:
    """The honest stream's process, and what it has measured so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.seen = 0

    def windows(self, n: int) -> list[float]:
        """The medians of the next windows; all of their messages have come."""
        last = self.seen + n
        self.process.wait_for('"median"', count=last, timeout=120)
        lines = self.lines()[self.seen : last]
        self.seen = last
        return [line["median"] for line in lines]

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.process.output.splitlines() if line.startswith("{")]

    def skip(self) -> None:
        """The next windows are those that begin from now on."""
        self.seen = len(self.lines()) + 1


@pytest.fixture
def honest(server: Server, hostile: Hostile, run_process: Processes) -> Honest:
    env = {"DRAMATIQ_DURABLE_URL": server.url}
    run_process(sys.executable, "-m", "dramatiq_durable.cli", "watchdog", env=env)
    honest = Honest(run_process(sys.executable, "-m", "tests.security.honest", env=env))
    with psycopg.connect(server.url, autocommit=True) as conn:
        query = b"SELECT count(*) FROM durable.watchdog"
        wait_until(lambda: (conn.execute(query).fetchone() or (0,))[0] == 1)
    return honest


def ratio(hostile: Hostile, honest: Honest, attack: Callable[[Hostile, Session], None], windows: int) -> float:
    """How many times as long a message takes while the attack lasts."""
    honest.windows(3)
    before = statistics.median(honest.windows(windows))
    threads = hostile.attack(attack, ATTACKS[attack])
    wait_until(lambda: hostile.done + hostile.ended > 0 or attack in (held_rows, idle_transactions, sleeping, burning))
    time.sleep(0.5)
    honest.skip()
    during = statistics.median(honest.windows(windows))
    hostile.stop.set()
    for thread in threads:
        thread.join(timeout=40)
    return during / before


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_stream_goes_on(server: Server, hostile: Hostile, honest: Honest, attack: Any) -> None:
    found = ratio(hostile, honest, attack, 10)
    assert found < 12
    with Session(server.url).conn as conn:
        counts = conn.execute(b"SELECT count(*) FROM durable.message WHERE lot LIKE 'dd%'").fetchone()
        assert counts is not None
        # What its other sessions have not committed yet is not seen.
        assert counts[0] <= MAX_LIVE + CONNECTIONS * 50


@pytest.mark.soak
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_stream_is_as_fast(
    server: Server, hostile: Hostile, honest: Honest, attack: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ratio(hostile, honest, attack, 60)
    with capsys.disabled():
        print(f"\n{attack.__name__}: {found:.2f} (attempts {hostile.done}, thrown out or refused {hostile.ended})")
    assert found < 2
