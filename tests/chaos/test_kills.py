"""Workers are killed all the time: nothing is lost, nothing is recorded twice, and only what was leased at a kill is
executed again."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.support import wait_until
from tests.support.waiting import lost

TABLES = """
CREATE TABLE execution (message_id uuid, what text, pid int, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE effect (what text)
"""


class Chaos:
    """The application, its database and its workers.

    Attributes:
      leased: how often each message was leased by a worker at the moment of its death.
    """

    def __init__(self, url: str, run_process: Any) -> None:
        self.url = url
        self.conn = psycopg.connect(url, autocommit=True)
        for statement in TABLES.split(";"):
            self.conn.execute(statement.encode())
        self.leased: Counter[str] = Counter()
        self.deaths = 0
        self._run_process = run_process

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        return self.conn.execute(query.encode(), arguments).fetchall()

    def start_worker(self) -> Any:
        return self._run_process.dramatiq(
            "tests.chaos.application:broker",
            *("--processes", "1", "--threads", "4"),
            env={"TEST_URL": self.url, "dramatiq_worker_timeout": "200"},
        )

    def kill(self, process: Any) -> None:
        """SIGKILL; what the server then still has under its leases was leased at the kill: nobody takes it back in
        less than the reclaim delay."""
        group = os.getpgid(process.pid)
        workers = [
            worker_id
            for worker_id, pid in self.rows("SELECT worker_id, pid FROM durable.worker")
            if _in_group(pid, group)
        ]
        process.kill()
        self.deaths += 1
        # (A claim whose answer the dead never got may still come to be: it has executed nothing of that.)
        for (message_id,) in self.rows("SELECT message_id FROM durable.message WHERE worker_id = ANY (%s)", workers):
            self.leased[str(message_id)] += 1
        assert lost(self.conn) == []

    def check(self, messages: int, orders: int) -> None:
        """The database tells that each message and each order ended once, as it should."""
        assert self.rows("SELECT count(*) FROM durable.message") == [(0,)]
        assert self.rows("SELECT count(*) FROM durable.dead_letter") == [(0,)]
        effects = Counter(what for (what,) in self.rows("SELECT what FROM effect"))
        assert effects == Counter([f"message {n}" for n in range(messages)] + [f"charge o{n}" for n in range(orders)])
        # Every result was recorded once.
        assert self.rows("SELECT status, count(*) FROM durable.run GROUP BY 1") == [("completed", orders)]
        assert (
            self.rows(
                "SELECT run_id, seq, count(*) FROM durable.event"
                " WHERE type IN ('ActivityCompleted', 'ActivityFailed', 'TimerFired') GROUP BY 1, 2 HAVING count(*) > 1"
            )
            == []
        )
        assert self.rows(
            "SELECT type, count(*) FROM durable.event WHERE type LIKE 'Activity%%' GROUP BY 1 ORDER BY 1"
        ) == [
            ("ActivityCompleted", 3 * orders),
            ("ActivityScheduled", 3 * orders),
        ]
        # Executed more than once: only what was leased at a kill, and not more often than that.
        executions = self.rows("SELECT message_id::text, what, count(*) FROM execution GROUP BY 1, 2")
        assert len(executions) == messages + 3 * orders
        again = {what: (count, self.leased[message_id]) for message_id, what, count in executions if count > 1}
        assert {what: x for what, x in again.items() if x[0] > 1 + x[1]} == {}


def _in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


@pytest.fixture
def chaos(database_url: str, run_process: Any) -> Iterator[Chaos]:
    chaos = Chaos(database_url, run_process)
    yield chaos
    chaos.conn.close()


@pytest.fixture
def application(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application's module as a client has it, on this test's database."""
    import importlib
    import sys

    import dramatiq

    before = dramatiq.broker.global_broker
    monkeypatch.setenv("TEST_URL", database_url)
    sys.modules.pop("tests.chaos.application", None)
    module = importlib.import_module("tests.chaos.application")
    yield module
    module.broker.close()
    sys.modules.pop("tests.chaos.application", None)
    dramatiq.broker.global_broker = before


@contextmanager
def feeding(application: Any, messages: int, orders: int, seconds: float) -> Iterator[Callable[[], bool]]:
    """Send everything, evenly over the time, from a thread; yields a function that says whether all is sent."""
    failed: list[BaseException] = []

    def feed() -> None:
        try:
            began = time.monotonic()
            total = messages + orders
            for n in range(total):
                # The orders are spread among the messages.
                if n * orders // total != (n + 1) * orders // total:
                    application.order.start(f"o{n * orders // total}")
                else:
                    application.message.send(n - n * orders // total)
                time.sleep(max(0.0, began + seconds * n / total - time.monotonic()))
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=feed)
    thread.start()
    yield lambda: not thread.is_alive()
    thread.join(120)
    assert failed == []
    assert not thread.is_alive()


def finished(chaos: Chaos, orders: int) -> bool:
    return chaos.rows(
        "SELECT (SELECT count(*) FROM durable.message), (SELECT count(*) FROM durable.run WHERE status <> 'running')"
    ) == [(0, orders)]


def kill_test(chaos: Chaos, application: Any, *, messages: int, orders: int, seconds: float, every: float) -> None:
    workers = [chaos.start_worker(), chaos.start_worker()]
    wait_until(lambda: chaos.rows("SELECT count(*) FROM durable.worker") == [(2,)], timeout=30)
    with feeding(application, messages, orders, seconds) as all_sent:
        began = time.monotonic()
        turn = 0
        while time.monotonic() - began < seconds:
            time.sleep(every)
            chaos.kill(workers[turn % 2])
            workers[turn % 2] = chaos.start_worker()
            turn += 1
        wait_until(all_sent, timeout=60)
    wait_until(lambda: finished(chaos, orders), timeout=60, message="all is done")
    for worker in workers:
        assert worker.stop() == 0
        assert "claimer failed" not in worker.output
    assert chaos.deaths >= seconds / every / 3
    assert chaos.leased, "no kill met a lease: the test tests nothing"
    chaos.check(messages, orders)


def test_workers_that_are_killed_lose_nothing(chaos: Chaos, application: Any) -> None:
    kill_test(chaos, application, messages=300, orders=30, seconds=8, every=0.8)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_kill_every_second_for_half_a_minute(chaos: Chaos, application: Any) -> None:
    kill_test(chaos, application, messages=2000, orders=200, seconds=30, every=1.0)


def test_two_workers_share_the_same_runs(chaos: Chaos, application: Any) -> None:
    """Steps of one run are taken here and there, and none is refused for good or taken twice."""
    workers = [chaos.start_worker(), chaos.start_worker()]
    wait_until(lambda: chaos.rows("SELECT count(*) FROM durable.worker") == [(2,)], timeout=30)
    handles = [application.order.start(f"o{n}") for n in range(60)]
    assert [h.result(timeout=60) for h in handles] == [
        [f"receipt o{n}", len(f"o{n}"), len(f"o{n}!")] for n in range(60)
    ]
    wait_until(lambda: finished(chaos, 60), timeout=30)
    for worker in workers:
        assert worker.stop() == 0
    chaos.check(0, 60)
    assert len(chaos.rows("SELECT DISTINCT pid FROM execution")) == 2
