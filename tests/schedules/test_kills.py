"""Workers are killed while they fire: every due time is fired once."""

from __future__ import annotations

import importlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

import dramatiq
import psycopg
import pytest

from dramatiq_durable import schedules
from dramatiq_durable.cron import Cron
from tests.broker.conftest import Rows
from tests.support import wait_until

EVERY_SECOND = "* * * * * *"


@pytest.fixture
def application(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application's module as a client has it, on this test's database."""
    before = dramatiq.broker.global_broker
    monkeypatch.setenv("TEST_URL", database_url)
    sys.modules.pop("tests.schedules.application", None)
    module = importlib.import_module("tests.schedules.application")
    yield module
    module.broker.close()
    sys.modules.pop("tests.schedules.application", None)
    dramatiq.broker.global_broker = before


@pytest.fixture
def start(run_process: Any, database_url: str, rows: Rows) -> Callable[[], Any]:
    rows("CREATE TABLE effect (due timestamptz)")

    def start() -> Any:
        return run_process.dramatiq(
            "tests.schedules.application:broker",
            *("--processes", "1", "--threads", "2"),
            env={"TEST_URL": database_url, "dramatiq_worker_timeout": "200"},
        )

    return start


def workers(rows: Rows) -> int:
    """How many live: the dead have not been heard of for a while."""
    return int(
        rows("SELECT count(*) FROM durable.worker WHERE beat_at > clock_timestamp() - interval '1 second'")[0][0]
    )


def create(application: Any) -> None:
    schedules.create("reports", cron=EVERY_SECOND, target=application.report, overlap="allow")
    schedules.create("orders", cron=EVERY_SECOND, target=application.order, overlap="allow")


def check(rows: Rows, application: Any) -> int:
    """Every due time up to the last one was fired once; how many there were."""
    for name in ("reports", "orders"):
        schedules.pause(name, broker=application.broker)
    rows.drained(timeout=30)
    known = [schedules.describe(name, broker=application.broker) for name in ("reports", "orders")]
    due = []
    for one in known:
        assert one.last_due is not None
        last = one.last_due
        due.append([*takewhile(lambda at, last=last: at <= last, Cron(EVERY_SECOND).after(one.created_at))])
        assert (one.fired, one.skipped, one.missed) == (len(due[-1]), 0, 0)
    effects = rows("SELECT due FROM effect ORDER BY due")
    assert [at.astimezone(UTC) for (at,) in effects] == due[0]
    runs = rows("SELECT workflow_id, status FROM durable.run ORDER BY workflow_id")
    assert runs == [(at.strftime("orders:%Y-%m-%dT%H:%M:%SZ"), "completed") for at in due[1]]
    assert rows.dead_letters() == []
    return len(due[0])


def test_every_due_time_once_under_kills(application: Any, start: Callable[[], Any], rows: Rows) -> None:
    """Two at a time of three workers are killed again and again, as often as not at the turn of a second."""
    create(application)
    alive = [start() for _ in range(3)]
    wait_until(lambda: workers(rows) == 3, timeout=30)
    rng = random.Random(5)
    kills = 0
    began = time.time()
    while time.time() - began < 9:
        # A tick is held for some milliseconds after each full second.
        time.sleep(1 - time.time() % 1 + rng.choice([0.0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 0.5]))
        for _ in range(2):
            alive.pop(0).kill()
            kills += 1
        alive += [start() for _ in range(2)]
    fired = len(rows("SELECT due FROM effect"))
    # A slow machine is behind by the time that the last of them are up.
    wait_until(lambda: len(rows("SELECT due FROM effect")) >= max(fired + 1, 9), timeout=60)
    assert check(rows, application) >= 9
    assert kills >= 10
    for worker in alive:
        assert worker.stop() == 0
        assert "claimer failed" not in worker.output


@pytest.fixture
def gate(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A session that holds up whoever fires: behind all that is fired, before the commit."""
    with psycopg.connect(database_url) as conn:
        yield conn


#: Whoever stands at the gate, holding a tick.
FIRING = (
    "SELECT a.pid FROM pg_stat_activity a WHERE a.wait_event_type = 'Lock' AND a.query LIKE '%%fire_schedules%%' "
    "AND EXISTS (SELECT FROM durable.message m WHERE m.kind = 'c' AND m.lease_token IS NOT NULL)"
)


def close(gate: psycopg.Connection[Any]) -> None:
    # A lookup goes through, the record of what was fired does not.
    gate.execute("LOCK TABLE durable.schedule IN SHARE MODE")


def test_a_kill_between_the_firing_and_its_commit(
    application: Any, start: Callable[[], Any], rows: Rows, gate: psycopg.Connection[Any]
) -> None:
    create(application)
    victim = start()
    wait_until(lambda: len(rows("SELECT due FROM effect")) >= 1, timeout=30)
    close(gate)
    wait_until(lambda: rows(FIRING))
    victim.kill()
    gate.rollback()
    heir = start()
    passed = datetime.now(UTC)
    wait_until(lambda: rows("SELECT due FROM effect WHERE due > %s", passed), timeout=30)
    check(rows, application)
    assert heir.stop() == 0


def test_a_connection_that_breaks_while_it_fires(
    application: Any, start: Callable[[], Any], rows: Rows, gate: psycopg.Connection[Any]
) -> None:
    create(application)
    worker = start()
    wait_until(lambda: len(rows("SELECT due FROM effect")) >= 1, timeout=30)
    close(gate)
    (pid,) = wait_until(lambda: rows(FIRING))[0]
    rows("SELECT pg_terminate_backend(%s)", pid)
    gate.rollback()
    passed = datetime.now(UTC)
    wait_until(lambda: rows("SELECT due FROM effect WHERE due > %s", passed), timeout=30)
    check(rows, application)
    assert worker.stop() == 0
