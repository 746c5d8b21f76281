"""The commands of operators, on real databases, brokers and workers."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner, Result
from dramatiq.middleware import Retries

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.settings import Settings
from tests.support import ROOT, wait_until


@pytest.fixture
def cli(database_url: str) -> Callable[..., Result]:
    """Runs a command; its exit code has to be the one that is expected."""

    def run(*arguments: object, code: int = 0) -> Result:
        done = CliRunner().invoke(main, ["--url", database_url, *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    return run


@pytest.fixture
def listed(cli: Callable[..., Result]) -> Callable[..., Any]:
    def run(*arguments: object, code: int = 0) -> Any:
        return json.loads(cli(*arguments, "--json", code=code).stdout)

    return run


@pytest.fixture
def broker(database_url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(
        database_url, middleware=[Retries(max_retries=0)], settings=Settings(poll_interval=0.2)
    )
    yield broker
    broker.close()


class Actors:
    """An actor that fails until it is mended, and one that runs until it is let go."""

    def __init__(self, broker: durable.DurableBroker) -> None:
        self.broken = True
        self.done: list[Any] = []
        self.begun, self.go = threading.Event(), threading.Event()

        def flaky(*args: Any, **kwargs: Any) -> None:
            if self.broken:
                raise ValueError(f"could not do {args}")
            self.done.append((args, kwargs))

        def slow() -> None:
            self.begun.set()
            while not self.go.wait(0.01):
                pass

        self.flaky = dramatiq.actor(flaky, queue_name="one", broker=broker)
        self.slow = dramatiq.actor(slow, queue_name="two", broker=broker)


@pytest.fixture
def actors(broker: durable.DurableBroker) -> Actors:
    return Actors(broker)


@pytest.fixture
def work(broker: durable.DurableBroker, actors: Actors) -> Iterator[Callable[[], dramatiq.Worker]]:
    """Starts a worker, which does one message after the other."""
    workers: list[dramatiq.Worker] = []

    def start() -> dramatiq.Worker:
        workers.append(dramatiq.Worker(broker, worker_timeout=50, worker_threads=1))
        workers[-1].start()
        return workers[-1]

    yield start
    actors.go.set()
    for worker in workers:
        worker.stop()


@pytest.fixture
def three_dead(actors: Actors, work: Any, listed: Callable[..., Any]) -> list[dict[str, Any]]:
    """Three dead letters, oldest first."""
    for n in range(3):
        actors.flaky.send(n, key="v")
    work()
    wait_until(lambda: len(listed("dead-letter", "list")) == 3)
    return list(reversed(listed("dead-letter", "list")))


# --- peek, pause, purge -----------------------------------------------------------------------------------------


def test_peek(broker: durable.DurableBroker, actors: Actors, work: Any, cli: Any, listed: Any) -> None:
    running = actors.slow.send()
    work()
    assert actors.begun.wait(10)
    waiting = actors.flaky.send_with_options(args=("[red]a\x1b", 1), kwargs={"key": None}, delay=3_600_000)
    [found] = listed("stream", "peek", "one")
    assert (found["message_id"], found["state"], found["attempt"]) == (waiting.message_id, "delayed", 1)
    assert (found["args"], found["kwargs"]) == (["[red]a\x1b", 1], {"key": None})
    shown = cli("stream", "peek", "one").output
    assert '"[red]a\\u001b", 1, key=null' in shown
    assert "in 59m 59s" in shown
    wait_until(lambda: listed("stream", "peek", "two")[0]["since"], message="since when it runs")
    [found] = listed("stream", "peek", "two", "--state", "leased", "--actor", "slow")
    assert (found["message_id"], found["pid"]) == (running.message_id, os.getpid())
    assert f"pid {os.getpid()}" in cli("stream", "peek", "two").output
    assert listed("stream", "peek", "two", "--state", "waiting") == []
    assert "--limit" not in shown
    actors.flaky.send_with_options(args=("b", 2), delay=3_600_000)
    assert "no more than 1 shown: see --limit" in cli("stream", "peek", "one", "--limit", "1").output
    assert "there is no such message" in cli("stream", "peek", "two", "--actor", "x").output
    assert cli("stream", "peek", "nowhere", code=1).output == 'Error: there is no stream named "nowhere"\n'


def test_peek_shows_what_cannot_be_decoded_as_bytes(
    broker: durable.DurableBroker, actors: Actors, cli: Any, listed: Any
) -> None:
    from dramatiq_durable.operations import Enqueue

    stream = broker.stream_id("one")
    broker.commit.submit(Enqueue(stream, os.urandom(6) + b"\x40" + os.urandom(9), "flaky", 0, 0, b"\x80pickle\x00"))
    [found] = listed("stream", "peek", "one")
    assert found["bytes"] == "\\x80pickle\x00"
    assert "\\x80pickle\\x00" in cli("stream", "peek", "one").output


def test_pause_and_resume(actors: Actors, work: Any, cli: Any, listed: Any) -> None:
    actors.broken = False
    actors.flaky.send(0)
    work()
    wait_until(lambda: len(actors.done) == 1)
    assert cli("stream", "pause", "one", "two").output == "one is paused\ntwo is paused\n"
    assert cli("stream", "pause", "one").output == "one was paused already\n"
    actors.flaky.send(1)
    time.sleep(0.5)  # two polls of the worker: nothing can be awaited that must not happen
    assert len(actors.done) == 1
    assert [(s["name"], s["paused"], s["ready"]) for s in listed("stream", "list")] == [
        ("one", True, 1),
        ("two", True, 0),
    ]
    assert cli("stream", "resume", "one").output == "one is not paused\n"
    wait_until(lambda: len(actors.done) == 2)
    assert 'no stream named "x"' in cli("stream", "pause", "x", code=1).output


def test_purge(broker: durable.DurableBroker, actors: Actors, cli: Any, listed: Any) -> None:
    broker.enqueue_many([actors.flaky.message(n) for n in range(5)])
    actors.flaky.send_with_options(delay=60_000)
    other = dramatiq.actor(lambda: None, actor_name="other", queue_name="one", broker=broker)
    other.send()
    table = cli("stream", "purge", "one", "--dry-run").output
    assert " flaky " in table
    said = listed("stream", "purge", "one", "--actor", "flaky", "--dry-run")
    assert (said["matched"], said["dropped"]) == (6, 0)
    assert len(listed("stream", "peek", "one")) == 7
    refused = cli("stream", "purge", "one", code=2).output
    assert "Drop 7 messages that wait on 'one'?" in refused
    assert "add --yes" in refused
    assert len(listed("stream", "peek", "one")) == 7
    assert cli("stream", "purge", "one", "--actor", "flaky", "--yes").output == "dropped 6 messages\n"
    assert [row["actor"] for row in listed("stream", "peek", "one")] == ["other"]
    assert listed("stream", "purge", "one", "--yes")["dropped"] == 1
    assert cli("stream", "purge", "one", "--yes").output == "nothing waits on one\n"


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0)])
def test_at_a_terminal_a_purge_asks(database_url: str, actors: Actors, listed: Any, answer: bytes, left: int) -> None:
    actors.flaky.send()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dramatiq_durable.cli", "--url", database_url, "stream", "purge", "one"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.write(ours, answer)
    output, _ = process.communicate(timeout=60)
    os.close(theirs)
    os.close(ours)
    assert b"Drop 1 messages that wait on 'one'? [y/N]" in output
    assert process.returncode == (1 if left else 0)
    assert len(listed("stream", "peek", "one")) == left


# --- dead letters -------------------------------------------------------------------------------------------------


def test_dead_letters_are_listed_by_what_they_are(three_dead: list[Any], cli: Any, listed: Any) -> None:
    first, second, third = three_dead
    assert (first["args"], first["kwargs"], first["reason"]) == ([0], {"key": "v"}, "rejected")
    table = cli("dead-letter", "list").output
    assert '0, key="v"' in table
    assert "ValueError: could not do (0,)" in table
    for arguments, expected in (
        ([first["dead_letter_id"], third["message_id"]], [third, first]),
        (["--text", "DO (1"], [second]),
        (
            ["--stream", "one", "--actor", "flaky", "--reason", "rejected", "--after", "1h", "--limit", "2"],
            [third, second],
        ),
        (["--before", "1h"], []),
        (["--after", datetime.fromisoformat(second["died_at"]).astimezone().replace(tzinfo=None)], [third, second]),
        (["--stream", "two"], []),
    ):
        assert listed("dead-letter", "list", *arguments) == expected, arguments
    assert cli("dead-letter", "list", "--before", "1h").output == "there are no dead letters like these\n"
    assert listed("dead-letter", "list", "999999", code=1) == []
    assert "neither a time" in cli("dead-letter", "list", "--after", "yesterday", code=2).output


def test_a_dead_letter_is_shown_whole(three_dead: list[Any], cli: Any, listed: Any) -> None:
    shown = listed("dead-letter", "show", three_dead[0]["dead_letter_id"])
    assert shown["message_id"] == three_dead[0]["message_id"]
    assert shown["options"]["retries"] == 1
    assert "ValueError: could not do (0,)" in shown["failure"]
    table = cli("dead-letter", "show", three_dead[0]["message_id"]).output
    assert "Traceback (most recent call last)" in table
    assert "there is no dead letter 999999" in cli("dead-letter", "show", 999999, code=1).output


def test_redrive(three_dead: list[Any], actors: Actors, cli: Any, listed: Any) -> None:
    first = three_dead[0]
    cli("dead-letter", "redrive", code=2)
    cli("dead-letter", "redrive", "--all", "--actor", "x", code=2)
    assert "Redrive 3 dead letters?" in cli("dead-letter", "redrive", "--all", code=2).output
    said = listed("dead-letter", "redrive", "--all", "--dry-run")
    assert (said["matched"], said["redriven"]) == (3, 0)
    assert said["letters"] == [{"stream": "one", "actor": "flaky", "reason": "rejected", "letters": 3}]
    assert len(listed("dead-letter", "list")) == 3
    actors.broken = False
    done = cli("dead-letter", "redrive", first["message_id"], "--yes")
    assert done.output == "redriven 1 dead letters\n"
    wait_until(lambda: actors.done == [((0,), {"key": "v"})])
    assert cli("dead-letter", "redrive", "--actor", "flaky", "--limit", "1", "--yes").output.startswith("redriven 1 ")
    wait_until(lambda: len(actors.done) == 2)
    assert actors.done[1][0] == (1,)
    assert [row["args"] for row in listed("dead-letter", "list")] == [[2]]
    assert listed("dead-letter", "redrive", first["message_id"], "--yes", code=1)["matched"] == 0
    assert cli("dead-letter", "redrive", "--actor", "nobody", "--yes").output == "no dead letter matches\n"


def test_what_is_redriven_keeps_its_id_and_its_history(
    actors: Actors, broker: durable.DurableBroker, work: Any, cli: Any, listed: Any
) -> None:
    """And it has all its retries before it, whatever encoder made it."""
    message = actors.flaky.send_with_options(max_retries=2, min_backoff=1, max_backoff=1)
    work()

    def dead() -> Any:
        return wait_until(lambda: listed("dead-letter", "list"), message="the dead letter")[0]

    assert dead()["attempt"] == 3
    cli("stream", "pause", "one")
    payload = listed("dead-letter", "list")[0]["payload"]
    cli("dead-letter", "redrive", "--all", "--yes")
    [waiting] = listed("stream", "peek", "one")
    assert (waiting["message_id"], waiting["attempt"]) == (message.message_id, 4)
    assert "could not do" in waiting["last_failure"]
    assert json.loads(payload)["options"] == waiting["options"]
    cli("stream", "resume", "one")
    again = dead()
    assert (again["message_id"], again["attempt"]) == (message.message_id, 6)


def test_letters_that_are_in_the_way_are_told(
    three_dead: list[Any], actors: Actors, broker: Any, cli: Any, listed: Any
) -> None:
    cli("stream", "pause", "one")
    broker.enqueue(actors.flaky.message().copy(message_id=three_dead[1]["message_id"]))
    number = three_dead[1]["dead_letter_id"]
    done = cli("dead-letter", "redrive", number, "--yes", code=1)
    assert f"1 stay, because a live message has their id or unique key: {number}" in done.stderr
    assert listed("dead-letter", "redrive", "--all", "--yes")["kept"] == [number]
    assert len(listed("stream", "peek", "one")) == 3


def test_drop(three_dead: list[Any], cli: Any, listed: Any) -> None:
    cli("dead-letter", "drop", code=2)
    assert "Drop 3 dead letters?" in cli("dead-letter", "drop", "--all", code=2).output
    assert " 3" in cli("dead-letter", "drop", "--all", "--dry-run").output
    assert cli("dead-letter", "drop", three_dead[1]["dead_letter_id"], "--yes").output == "dropped 1 dead letters\n"
    assert len(listed("dead-letter", "list")) == 2
    assert listed("dead-letter", "drop", "--before", "1h", "--yes")["dropped"] == 0
    assert listed("dead-letter", "drop", "--all", "--yes")["dropped"] == 2


def test_many_are_done_in_batches(
    actors: Actors, broker: durable.DurableBroker, cli: Any, listed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dramatiq_durable.cli import dead_letter, stream

    monkeypatch.setattr(dead_letter, "BATCH", 3)
    monkeypatch.setattr(stream, "BATCH", 3)
    broker.enqueue_many([actors.flaky.message(n) for n in range(10)])
    with broker.database.connection() as conn:
        conn.execute(
            "WITH gone AS (DELETE FROM durable.message RETURNING *) INSERT INTO durable.dead_letter "
            "(message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, payload) "
            "SELECT message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, 'rejected', payload "
            "FROM gone ORDER BY due_at"
        )
    assert listed("dead-letter", "redrive", "--all", "--limit", "4", "--yes")["redriven"] == 4
    assert listed("dead-letter", "redrive", "--all", "--yes")["redriven"] == 6
    assert [row["args"] for row in listed("stream", "peek", "one")] == [[n] for n in range(10)]
    assert listed("stream", "purge", "one", "--yes")["dropped"] == 10


# --- workers, abort ---------------------------------------------------------------------------------------------


def test_workers_and_what_they_hold(actors: Actors, work: Any, cli: Any, listed: Any) -> None:
    assert cli("worker", "list").output == "no worker is registered\n"
    message = actors.slow.send()
    work()
    assert actors.begun.wait(10)
    [worker] = wait_until(lambda: [w for w in listed("worker", "list") if w["oldest"]], message="since when it runs")
    assert (worker["state"], worker["holds"], worker["pid"]) == ("live", 1, os.getpid())
    shown = listed("worker", "show", worker["worker_id"])
    [held] = shown["messages"]
    assert (held["message_id"], held["stream"], held["actor"]) == (message.message_id, "two", "slow")
    assert datetime.fromisoformat(held["since"])
    table = cli("worker", "show", worker["worker_id"]).output
    assert message.message_id in table
    assert " live " in cli("worker", "list").output
    assert "no worker 999 is registered" in cli("worker", "show", 999, code=1).output


def test_messages_are_aborted(actors: Actors, work: Any, cli: Any, listed: Any) -> None:
    running = actors.slow.send()
    work()
    assert actors.begun.wait(10)
    waiting = actors.flaky.send_with_options(delay=60_000)
    assert "left alone" in cli("message", "abort", running.message_id, "--cancel").output
    said = cli("message", "abort", running.message_id, waiting.message_id).output
    assert said == (
        f"{running.message_id}: a worker has it: it is being interrupted\n"
        f"{waiting.message_id}: it was waiting, and will not run\n"
    )
    wait_until(lambda: len(listed("dead-letter", "list", "--reason", "aborted")) == 2)
    assert {letter["actor"] for letter in listed("dead-letter", "list")} == {"slow", "flaky"}
    assert listed("message", "abort", running.message_id, code=1) == {running.message_id: "missing"}


def test_operators_are_administrators(cli: Any) -> None:
    """The rights themselves are tested in tests/security."""
    for command in ("peek", "pause", "resume", "purge"):
        assert 'no stream named "x"' in cli("stream", command, "x", code=1).output


# --- pruning ----------------------------------------------------------------------------------------------------


def test_what_is_over_for_long_is_pruned(
    cli: Any, listed: Any, three_dead: list[dict[str, Any]], database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(
            "WITH closed AS ("
            "  INSERT INTO durable.run "
            "    (run_id, workflow_id, stream_id, name, status, started_at, closed_at, last_event) "
            "  SELECT gen_random_uuid(), 'w' || n, 1, 'w', 'completed', now(), now() - n * interval '1 day', 1 "
            "  FROM generate_series(1, 500) n RETURNING run_id) "
            "INSERT INTO durable.event (run_id, event_id, type, at) "
            "SELECT run_id, 1, 'WorkflowStarted', now() FROM closed"
        )
        conn.execute(
            "UPDATE durable.dead_letter SET died_at = died_at - interval '100 days' WHERE dead_letter_id = %s",
            [three_dead[0]["dead_letter_id"]],
        )
        conn.execute(
            "INSERT INTO durable.sender VALUES (gen_random_uuid(), session_user, 1, 0, now() - interval '1 year')"
        )
    ages = ("--runs", "30d", "--dead-letters", "90 days")
    found = {"runs": 471, "dead_letters": 1, "results": 0, "waiters": 0, "limiters": 0, "senders": 1, "kept": 0}
    assert listed("prune", *ages, "--dry-run") == {"dry_run": True, **found}
    assert "471" in cli("prune", *ages, "--dry-run").output
    assert "add --yes" in cli("prune", *ages, code=2).output
    assert listed("prune", *ages, "--yes") == {"dry_run": False, **found}
    assert "deleted" in cli("prune", *ages, "--yes").output
    # Nothing is asked where nothing that anybody could miss is deleted.
    assert listed("prune") == {"dry_run": False, **dict.fromkeys(found, 0)}
    assert len(listed("dead-letter", "list")) == 2
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(*) FROM durable.event").fetchone() == (29,)


@pytest.mark.parametrize("age", ["30", " 30.5 ", "a month", "-1d"])
def test_an_age_has_a_unit(cli: Any, age: str) -> None:
    said = cli("prune", f"--runs={age}", code=2).output
    assert ('say "30' if "30" in age else "is not a duration") in " ".join(said.split())
