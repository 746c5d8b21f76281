"""A role that may send to a stream does what it can to hold up another: the stream's messages come as they did before.

Times are compared with those of the same machine a moment before.  What is tolerated here is much, as others may be at
work on the machine; `make soak` measures for longer, prints the ratios, and wants them within 2.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg
import pytest

from dramatiq_durable import provision_worker_role
from dramatiq_durable.check import check
from dramatiq_durable.embedded import Server
from dramatiq_durable.migrate import migrate
from tests.sql.api import Session
from tests.support import wait_until
from tests.support.processes import Process, Processes

from .hostile import ATTACKS, CONNECTIONS

pytestmark = [pytest.mark.xdist_group("starvation"), pytest.mark.timeout(300)]

MAX_LIVE = 200


class Hostile(NamedTuple):
    """The login: where it connects, and what it may send to: its own stream, and the honest one."""

    url: str
    streams: tuple[int, int]


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
        if finding.name in ("shared_locks", "temporary", "temp_file_limit", "wal", "create"):
            for statement in finding.fix.removesuffix(", as a superuser").split("; "):
                db.sql(statement)
    yield Hostile(made.url, (db.stream("own"), db.stream("honest")))
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


class Found(NamedTuple):
    """How many times as long a message takes while the attack lasts, and how often it was made."""

    ratio: float
    done: int
    ended: int


@pytest.fixture
def measure(hostile: Hostile, honest: Honest, run_process: Processes) -> Callable[[str, int], Found]:
    def run(attack: str, windows: int) -> Found:
        honest.windows(3)
        before = statistics.median(honest.windows(windows))
        command = [
            "-m",
            "tests.security.hostile",
            attack,
            hostile.url,
            *map(str, hostile.streams),
            str(ATTACKS[attack]),
        ]
        attacker = run_process(sys.executable, *command)
        # Half a second after the first.
        attacker.wait_for('"done"', count=4)
        honest.skip()
        during = statistics.median(honest.windows(windows))
        last = json.loads(attacker.output.splitlines()[-1])
        return Found(during / before, **last)

    return run


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_stream_goes_on(server: Server, measure: Callable[[str, int], Found], attack: str) -> None:
    assert measure(attack, 10).ratio < 12
    with Session(server.url).conn as conn:
        counts = conn.execute(b"SELECT count(*) FROM durable.message WHERE lot LIKE 'dd%'").fetchone()
        assert counts is not None
        # What its other sessions have not committed yet is not seen.
        assert counts[0] <= MAX_LIVE + CONNECTIONS * 50


@pytest.mark.soak
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_stream_is_as_fast(
    measure: Callable[[str, int], Found], attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(attack, 60)
    with capsys.disabled():
        print(f"\n{attack}: {found.ratio:.2f} (attempts {found.done}, thrown out or refused {found.ended})")
    assert found.ratio < 2
