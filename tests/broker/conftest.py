"""A real broker and real workers on a real database, and what the database has of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.middleware import (
    AgeLimit,
    AsyncIO,
    Callbacks,
    CurrentMessage,
    Middleware,
    Pipelines,
    Retries,
    ShutdownNotifications,
    TimeLimit,
)

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from tests.support import wait_until


class Rows:
    """What is stored, as the superuser sees it; every look is a transaction of its own."""

    def __init__(self, url: str) -> None:
        self.conn = psycopg.connect(url, autocommit=True)

    def __call__(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        cursor = self.conn.execute(query.encode(), arguments)
        return cursor.fetchall() if cursor.description else []

    def messages(self) -> list[tuple[Any, ...]]:
        """(actor, attempt, leased?, milliseconds until it is due) of every message."""
        return self(
            "SELECT actor, attempt, lease_token IS NOT NULL,"
            " extract(epoch FROM due_at - clock_timestamp())::float8 * 1000 FROM durable.message ORDER BY due_at"
        )

    def count(self) -> int:
        return int(self("SELECT count(*) FROM durable.message")[0][0])

    def dead_letters(self) -> list[tuple[Any, ...]]:
        """(actor, attempt, reason, failure) of every dead letter, oldest first."""
        return self("SELECT actor, attempt, reason, failure FROM durable.dead_letter ORDER BY dead_letter_id")

    def drained(self, *, timeout: float = 15) -> None:
        """Wait until no message is left."""
        wait_until(lambda: self.count() == 0, timeout=timeout, message=f"no message is left: {self.messages()}")


class Record:
    """What actors report, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.values: list[Any] = []

    def __call__(self, value: Any = None) -> None:
        with self._lock:
            self.values.append(value)

    def wait(self, count: int, *, timeout: float = 15) -> list[Any]:
        wait_until(lambda: len(self.values) >= count, timeout=timeout, message=f"{count} reports, not {self.values}")
        return self.values


def at_once(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Call the function on as many threads at the same moment; answers what each returned or raised."""
    answers: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(n: int) -> None:
        barrier.wait()
        try:
            answers[n] = function(n)
        except Exception as e:
            answers[n] = e

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return answers


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run on a thread; the answer waits for its end, and returns or raises what it did."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as e:
            outcome.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(30)
        assert not thread.is_alive()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return join


@pytest.fixture
def rows(database_url: str) -> Iterator[Rows]:
    rows = Rows(database_url)
    yield rows
    rows.conn.close()


#: Notes, in the same transaction, what happens to messages and results.
NOTES = """
CREATE TABLE note (what text, tx text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN INSERT INTO public.note VALUES (TG_ARGV[0], pg_current_xact_id()::text); RETURN NULL; END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE ON durable.result FOR EACH ROW EXECUTE FUNCTION note('result');
CREATE TRIGGER note AFTER DELETE ON durable.message FOR EACH ROW EXECUTE FUNCTION note('end');
"""


@pytest.fixture
def notes(rows: Rows) -> Callable[[], list[tuple[str, str]]]:
    rows.conn.execute(NOTES.encode())
    return lambda: rows("SELECT what, tx FROM note ORDER BY tx, what")


def middleware() -> list[Middleware]:
    """Dramatiq's default middleware, with a time limit that is looked at often."""
    return [
        AgeLimit(),
        TimeLimit(interval=20),
        ShutdownNotifications(),
        Callbacks(),
        Pipelines(),
        Retries(min_backoff=1, max_backoff=20),
        CurrentMessage(),
        AsyncIO(),
    ]


@pytest.fixture
def make_broker(database_url: str) -> Iterator[Callable[..., durable.DurableBroker]]:
    """Makes brokers on the test's database; all are closed at its end."""
    made: list[durable.DurableBroker] = []

    def make(url: str = database_url, **options: Any) -> durable.DurableBroker:
        options.setdefault("middleware", middleware())
        options.setdefault("settings", Settings(poll_interval=0.25))
        broker = durable.DurableBroker(url, **options)
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
def broker(make_broker: Callable[..., durable.DurableBroker]) -> durable.DurableBroker:
    return make_broker()


@pytest.fixture
def start_worker(make_broker: Callable[..., Any]) -> Iterator[Callable[..., dramatiq.Worker]]:
    """Starts Dramatiq's own Worker in this process; each is stopped at the end of the test."""
    workers: list[dramatiq.Worker] = []

    def start(broker: durable.DurableBroker, *, threads: int = 2, queues: set[str] | None = None) -> dramatiq.Worker:
        broker.emit_after("process_boot")
        worker = dramatiq.Worker(broker, queues=queues, worker_timeout=50, worker_threads=threads)
        worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        if any(thread.is_alive() for thread in worker.consumers.values()):
            worker.stop(timeout=5000)
