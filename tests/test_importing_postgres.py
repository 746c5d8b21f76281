"""Importing from the tables of dramatiq-postgres, which its own broker and worker have filled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import dramatiq_postgres as other
import psycopg
import pytest
from click.testing import CliRunner, Result
from dramatiq.middleware import Retries

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.importing import postgres as source
from tests.support import wait_until


@pytest.fixture
def rows(database_url: str) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield lambda query, *arguments: conn.execute(query.encode(), arguments).fetchall()


@pytest.fixture
def attempt(database_url: str) -> Callable[..., Result]:
    """Runs an import from the test's own database, which has the tables of both."""
    return lambda *arguments: CliRunner().invoke(
        main, ["--url", database_url, "import", "postgres", database_url, *arguments], catch_exceptions=False
    )


@pytest.fixture
def moved(attempt: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str) -> dict[str, Any]:
        done = attempt("--json", *arguments)
        assert done.exit_code == 0, done.output
        (report,) = json.loads(done.stdout)
        return dict(report)

    return run


@pytest.fixture
def old(database_url: str) -> Iterator[Any]:
    with psycopg.connect(database_url) as conn:
        other.init(conn.cursor(), "dramatiq", "")
    broker = other.PostgresBroker(
        url=f"{database_url}&maxconn=4", results=False, listen=False, middleware=[Retries(max_retries=0)]
    )
    yield broker
    broker.close()


def test_what_waits_is_moved_and_run(old: Any, moved: Any, rows: Any, database_url: str) -> None:
    note = dramatiq.actor(print, actor_name="note", queue_name="q", broker=old)
    sent = [note.send(n, text="ü") for n in range(7)]
    late = note.send_with_options(args=("late",), delay=3_600_000)
    report = moved("--batch", "3")
    assert (report["queue"], report["found"], report["delayed"], report["moved"]) == ("q", 8, 1, 8)
    assert rows("SELECT count(*) FROM dramatiq.queue") == [(0,)]
    ids = [row[0] for row in rows("SELECT message_id::text FROM durable.message ORDER BY due_at")]
    assert ids == [m.message_id for m in (*sent, late)]
    due = rows("SELECT extract(epoch FROM max(due_at))::float8 * 1000 FROM durable.message")[0][0]
    assert due == pytest.approx(late.options["eta"], abs=1)
    got: list[Any] = []
    broker = durable.DurableBroker(database_url)
    dramatiq.actor(lambda n, text: got.append((n, text)), actor_name="note", queue_name="q", broker=broker)
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    wait_until(lambda: len(got) == 7, message="the messages")
    worker.stop()
    broker.close()
    assert got == [(n, "ü") for n in range(7)]


def test_dead_letters_and_what_a_worker_has(old: Any, attempt: Any, moved: Any, rows: Any) -> None:
    def fail() -> None:
        raise RuntimeError("no luck")

    note = dramatiq.actor(fail, actor_name="note", queue_name="q", broker=old)
    dead, taken = note.send(), note.send()
    rows("UPDATE dramatiq.queue SET state = 'consumed' WHERE message_id::text = %s RETURNING 1", taken.message_id)
    worker = dramatiq.Worker(old, worker_timeout=50, worker_threads=1)
    old._maintenance_at = time.monotonic() + 3600
    worker.start()
    wait_until(lambda: rows("SELECT 1 FROM dramatiq.queue WHERE state = 'rejected'"), message="a dead letter")
    worker.stop()
    report = moved()
    assert (report["found"], report["dead"], report["in_flight"], report["dead_moved"]) == (0, 1, 1, 0)
    assert "1 message(s) are marked as taken" in attempt().stderr
    assert moved("--dead-letters")["dead_moved"] == 1
    assert rows("SELECT message_id::text, reason FROM durable.dead_letter") == [(dead.message_id, "rejected")]
    assert rows("SELECT message_id::text FROM dramatiq.queue") == [(taken.message_id,)]


def test_what_cannot_be_decoded_stays(old: Any, moved: Any, rows: Any) -> None:
    note = dramatiq.actor(print, actor_name="note", queue_name="q", broker=old)
    for _ in range(4):
        note.send()
    rows(
        "UPDATE dramatiq.queue SET message = CASE WHEN position < 3 THEN '[]'::jsonb END WHERE position < 4 RETURNING 1"
    )
    report = moved("--batch", "2")
    assert (report["moved"], report["undecodable"]) == (1, 3)
    assert rows("SELECT count(*) FROM dramatiq.queue") == [(3,)]


def test_what_is_large_is_taken_in_parts(old: Any, moved: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    note = dramatiq.actor(print, actor_name="note", queue_name="q", broker=old)
    for n in range(5):
        note.send("x" * 1000, n)
    monkeypatch.setattr(source, "MAX_BYTES", 3000)
    assert moved()["moved"] == 5
    assert rows("SELECT count(*) FROM dramatiq.queue") == [(0,)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--schema", "nowhere"), "the database has no table nowhere.queue"),
        (("--prefix", "x_"), "the database has no table dramatiq.x_queue"),
        (("--queue", "nope"), "Postgres has no queue 'nope'"),
    ],
)
def test_a_mistake_is_explained(old: Any, attempt: Any, arguments: tuple[str, ...], said: str) -> None:
    done = attempt(*arguments)
    assert done.exit_code == 1
    assert said in done.output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://localhost/x", "begins with postgresql://"),
        ("postgresql://user:secret@127.0.0.1:1/x", "the other database failed"),
        ("postgresql://localhost:port/x", "the other database failed"),
    ],
)
def test_a_wrong_url_is_explained(database_url: str, url: str, said: str) -> None:
    done = CliRunner().invoke(main, ["--url", database_url, "import", "postgres", url])
    assert done.exit_code == 1, done.output
    assert said in done.output
    assert "secret" not in done.output
