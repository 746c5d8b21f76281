"""The commands of ``dramatiq-durable``, on real databases, runs and workers."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import dramatiq
import pytest
from click.testing import CliRunner, Result

import dramatiq_durable as durable
from dramatiq_durable.cli import COMMANDS, main
from dramatiq_durable.cli.output import duration
from tests.support import ROOT, wait_until
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


@pytest.fixture
def previous_broker() -> Iterator[None]:
    broker = dramatiq.broker.global_broker  # get_broker() would make one of Dramatiq's own
    yield
    dramatiq.broker.global_broker = broker


def run(made: Scratch | str, *arguments: str) -> Result:
    """Run a command that has to succeed."""
    done = attempt(made, *arguments)
    assert done.exit_code == 0, done.output
    return done


def attempt(made: Scratch | str, *arguments: str) -> Result:
    url = made if isinstance(made, str) else made.url
    return CliRunner().invoke(main, ["--url", url, *arguments], catch_exceptions=False)


def listed(made: Scratch, *arguments: str) -> Any:
    return json.loads(run(made, *arguments, "--json").output)


def refused(made: Scratch | str, *arguments: str) -> str:
    """Run a command that has to fail with one line, and return that."""
    done = attempt(made, *arguments)
    assert done.exit_code == 1, done.output
    assert done.output.startswith("Error: "), done.output
    assert done.output.count("\n") == 1, done.output
    return done.output


@contextmanager
def working(broker: durable.DurableBroker) -> Iterator[dramatiq.Worker]:
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        broker.close()


# --- the program ------------------------------------------------------------------------------------------


def test_the_program_starts_without_what_only_its_commands_need() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nimport atexit; atexit.register(lambda: print(sorted(sys.modules)))\n"
    code += "from dramatiq_durable.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    assert "'rich.table'" not in done.stdout
    assert "'psycopg_pool'" not in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["nothing"]).exit_code == 2


def test_the_environment_says_where(made: Scratch, clean_environment: Any) -> None:
    clean_environment(URL=made.url, NAMESPACE="second")
    assert "created namespace second" in CliRunner().invoke(main, ["migrate"]).output
    assert CliRunner().invoke(main, ["stream", "list"]).output == "there are no streams yet\n"
    clean_environment(URL=made.url, NAMESPACE="Wrong Name")
    done = CliRunner().invoke(main, ["stream", "list"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: DRAMATIQ_DURABLE_NAMESPACE='Wrong Name'")


def test_migrate_says_what_it_did(cluster: Cluster) -> None:
    with scratch(cluster) as empty:
        assert "created namespace durable, owned by" in run(empty, "migrate").output
        assert run(empty, "migrate").output == "the namespace durable is up to date\n"


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("stream", "list"),
        ("worker", "list"),
        ("dead-letter", "list"),
        ("workflow", "list"),
        ("workflow", "show", "x"),
        ("workflow", "start", "x", "--queue", "q"),
        ("role", "grant", "x", "--admin"),
    ],
)
def test_a_database_without_the_namespace_is_one_clear_line(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    with cluster.database() as url:
        assert "has no namespace 'durable'" in refused(url, *arguments)


def test_an_unreachable_server_is_one_clear_line() -> None:
    said = refused("postgresql://me:secret@127.0.0.1:1/x", "stream", "list")
    assert "cannot connect to me@127.0.0.1:1/x" in said
    assert "secret" not in said
    assert "cannot connect to" in refused("postgresql://me:secret@127.0.0.1:1/x", "migrate")


def test_a_malformed_url_is_one_clear_line() -> None:
    assert "--url is no URL of a Postgres database" in refused("mysql://x/y", "stream", "list")
    assert "--url is no URL of a Postgres database" in refused("mysql://x/y", "migrate")


def test_listings_are_for_administrators(made: Scratch) -> None:
    login, url = made.login()
    run(made, "role", "grant", login, "--consume", "default")
    for group in ("stream", "worker", "dead-letter"):
        assert re.search("permission denied|needs an administrator", refused(url, group, "list"))


# --- streams, workers, dead letters --------------------------------------------------------------------------


def test_streams_workers_and_dead_letters_are_listed(made: Scratch) -> None:
    for group in ("stream", "worker", "dead-letter"):
        assert run(made, group, "list").output.startswith(("there are no", "no worker"))
        assert listed(made, group, "list") == []

    broker = durable.DurableBroker(made.url, middleware=[dramatiq.middleware.Retries(max_retries=0)])

    def fail(text: str) -> None:
        raise ValueError(f"[red]{text}[/red] \x1b[31m")

    bad = dramatiq.actor(fail, actor_name="bad", queue_name="one", broker=broker)
    bad.send("no")
    bad.send_with_options(args=("later",), delay=3_600_000)
    (stream,) = listed(made, "stream", "list")
    assert stream.pop("oldest") >= 0
    assert stream == {"name": "one", "paused": False, "ready": 1, "leased": 0, "delayed": 1, "dead": 0, "workers": 0}

    with working(broker):
        (letter,) = wait_until(lambda: listed(made, "dead-letter", "list"), message="the dead letter")
        (worker,) = listed(made, "worker", "list")
        (consumed,) = listed(made, "stream", "list")
        shown = run(made, "worker", "list").output
    assert (letter["stream"], letter["actor"], letter["reason"]) == ("one", "bad", "rejected")
    assert json.loads(letter["payload"])["args"] == ["no"]
    datetime.fromisoformat(letter["died_at"])
    assert consumed["workers"] == 1
    table = run(made, "dead-letter", "list", "--stream", "one").output
    assert "[red]no[/red]" in table
    assert "\x1b" not in table
    assert listed(made, "dead-letter", "list", "--stream", "two") == []
    assert (worker["streams"], worker["threads"]) == (["one"], 2)
    assert str(worker["pid"]) in shown
    (stream,) = listed(made, "stream", "list")
    assert (stream["ready"], stream["delayed"], stream["dead"]) == (0, 1, 1)
    assert " one " in run(made, "stream", "list").output
    assert listed(made, "worker", "list") == []


# --- workflows ------------------------------------------------------------------------------------------------


def test_a_workflow_is_started_signalled_and_looked_at_without_its_code(made: Scratch, previous_broker: None) -> None:
    started = listed(made, "workflow", "start", "greet", "--queue", "hall", "--id", "g-1", "--args", '["Ada"]', "--kwargs", '{"n": 2}')  # fmt: skip  # noqa: E501
    assert started["status"] == "started"
    (row,) = listed(made, "workflow", "list", "--name", "greet", "--status", "running")
    assert (row["workflow_id"], row["run_id"], row["queue_name"]) == ("g-1", started["run_id"], "hall")
    assert "g-1" in run(made, "workflow", "list").output
    assert listed(made, "workflow", "list", "--status", "completed") == []
    assert "a run has the workflow id 'g-1' already" in refused(made, "workflow", "start", "greet", "--queue", "hall", "--id", "g-1")  # fmt: skip  # noqa: E501
    again = listed(
        made, "workflow", "start", "greet", "--queue", "hall", "--id", "g-1", "--id-conflict", "use_existing"
    )
    assert again == {"workflow_id": "g-1", "run_id": started["run_id"], "status": "exists"}
    assert "sent to g-1" in run(made, "workflow", "signal", "g-1", "go", '{"ok": true}', "--id", "once").output
    run(made, "workflow", "signal", "g-1", "go", '{"ok": false}', "--id", "once")

    broker = durable.DurableBroker(made.url, middleware=[])
    dramatiq.set_broker(broker)

    @durable.activity(queue_name="hall")
    def shout(text: str) -> str:
        return text.upper()

    @durable.workflow(queue_name="hall")
    async def greet(name: str, n: int) -> list[Any]:
        word = await shout.execute(f"hello {name}")
        await durable.sleep(0.01)
        return [word, n, await durable.wait_for_signal("go")]

    with working(broker):
        assert durable.get_handle("g-1").result(timeout=15) == ["HELLO ADA", 2, {"ok": True}]

    shown = listed(made, "workflow", "show", "g-1")
    assert shown["status"] == "completed"
    assert shown["input"] == {"args": ["Ada"], "kwargs": {"n": 2}}
    assert shown["result"] == ["HELLO ADA", 2, {"ok": True}]
    assert shown["failure"] is None
    assert '["HELLO ADA", 2, {"ok": true}]' in run(made, "workflow", "show", "--run-id", shown["run_id"]).output

    events = listed(made, "workflow", "history", "g-1")
    assert [event["event_id"] for event in events] == list(range(1, len(events) + 1))
    types = [event["type"] for event in events]
    assert types[0] == "WorkflowStarted"
    assert types[-1] == "WorkflowCompleted"
    assert types.count("SignalReceived") == 1
    timeline = run(made, "workflow", "history", "g-1").output
    assert timeline.startswith("greet, started ")
    lines = [line for line in timeline.splitlines() if line.strip()[:1].isdigit()]
    assert [line.split()[3] for line in lines] == types
    assert '("Ada", n=2)' in lines[0]
    scheduled = next(line for line in lines if "ActivityScheduled" in line)
    completed = next(line for line in lines if "ActivityCompleted" in line)
    assert scheduled.split()[4:6] == ["1", "shout"]
    assert completed.split()[4] == "1"
    assert '"HELLO ADA"' in completed


def test_a_failure_is_shown(made: Scratch, previous_broker: None) -> None:
    broker = durable.DurableBroker(made.url, middleware=[])
    dramatiq.set_broker(broker)

    @durable.workflow(queue_name="hall")
    async def stumble() -> None:
        await asyncio.sleep(0)
        raise LookupError("no stairs")

    with working(broker):
        handle = stumble.options(workflow_id="s-1").start()
        with pytest.raises(durable.WorkflowFailed):
            handle.result(timeout=15)
    assert "LookupError: no stairs" in run(made, "workflow", "show", "s-1").output
    assert "LookupError: no stairs" in run(made, "workflow", "history", "s-1").output
    assert listed(made, "workflow", "show", "s-1")["failure"]["type"] == "LookupError"


def test_a_run_is_cancelled_and_terminated(made: Scratch) -> None:
    run(made, "workflow", "start", "greet", "--queue", "hall", "--id", "g-1", "--delay", "1 hour")
    assert "asked g-1 to cancel" in run(made, "workflow", "cancel", "g-1").output
    assert made.execute("SELECT type FROM durable.inbox") == [("CancelRequested",)]
    run(made, "workflow", "terminate", "g-1", "--reason", "a mistake")
    shown = listed(made, "workflow", "show", "g-1")
    assert (shown["status"], shown["reason"]) == ("terminated", "a mistake")
    for command in (("cancel", "g-1"), ("terminate", "g-1"), ("signal", "g-1", "go")):
        assert "the workflow 'g-1' has ended" in refused(made, "workflow", *command)
    for command in (("show",), ("history",), ("cancel",), ("terminate",)):
        assert "there is no workflow 'nobody'" in refused(made, "workflow", *command, "nobody")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("workflow", "start", "x", "--queue", "q", "--args", "[1"), "--args is no JSON"),
        (("workflow", "start", "x", "--queue", "q", "--args", "{}"), "--args is a list"),
        (("workflow", "start", "x", "--queue", "q", "--kwargs", "[]"), "--kwargs is an object"),
        (("workflow", "start", "x", "--queue", "q", "--delay", "soon"), "--delay: "),
        (("workflow", "start", "x"), "--queue"),
        (("workflow", "signal", "x", "go", "yes"), "the payload is no JSON"),
        (("workflow", "show"), "name the workflow"),
        (("workflow", "show", "--run-id", "x"), "--run-id"),
        (("workflow", "list", "--limit", "0"), "--limit"),
        (("role", "grant", "x"), "say what to grant"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(made: Scratch, arguments: tuple[str, ...], said: str) -> None:
    done = attempt(made, *arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_what_cannot_be_a_name_is_refused_before_it_is_stored(made: Scratch) -> None:
    assert "is no queue name" in refused(made, "workflow", "start", "x", "--queue", "a b")
    assert "1 to 200 characters" in refused(made, "workflow", "start", "x" * 201, "--queue", "q")
    assert "1 to 200 characters" in refused(made, "workflow", "start", "x", "--queue", "q", "--id", "y" * 201)
    assert made.execute("SELECT count(*) FROM durable.stream") == [(0,)]


# --- roles ------------------------------------------------------------------------------------------------------


def test_a_login_can_do_what_it_was_granted_and_nothing_else(made: Scratch) -> None:
    login, url = made.login()
    said = run(made, "role", "grant", login, "--consume", "in,both", "--produce", "both").output
    assert f"{login} may consume in" in said
    broker = durable.DurableBroker(url, middleware=[])
    done: list[str] = []
    actor = dramatiq.actor(done.append, actor_name="note", queue_name="both", broker=broker)
    actor.send("hello")
    for queue_name in ("in", "foreign"):
        with pytest.raises(durable.NotPermitted):
            dramatiq.actor(done.append, actor_name=f"to_{queue_name}", queue_name=queue_name, broker=broker).send("no")
    broker.close()
    consumer = durable.DurableBroker(url, middleware=[])
    dramatiq.actor(done.append, actor_name="note", queue_name="both", broker=consumer)
    with working(consumer):
        wait_until(lambda: done == ["hello"], message="the message")


def test_a_grant_only_adds(made: Scratch) -> None:
    (own,) = made.execute("SELECT login::text FROM durable.login")[0]
    run(made, "role", "grant", own, "--consume", "one")
    run(made, "role", "grant", own, "--produce", "one")
    assert made.execute("SELECT consume, produce FROM durable.stream_grant") == [(True, True)]
    assert made.execute("SELECT is_admin FROM durable.principal") == [(True,)]


def test_an_administrator_looks_at_everything(made: Scratch) -> None:
    login, url = made.login()
    assert "administers the namespace durable" in run(made, "role", "grant", login, "--admin").output
    run(url, "workflow", "start", "x", "--queue", "q")
    assert " q " in run(url, "stream", "list").output
    for group in ("worker", "dead-letter", "workflow"):
        run(url, group, "list")


def test_a_login_must_exist_to_be_granted_anything(made: Scratch) -> None:
    assert "the login 'nobody' does not exist" in refused(made, "role", "grant", "nobody", "--consume", "one")
    (role,) = made.execute("SELECT worker::text FROM durable.roles")[0]
    assert "cannot log in" in refused(made, "role", "grant", str(role), "--admin")
    assert made.execute("SELECT count(*) FROM durable.login") == [(1,)]


def test_only_administrators_grant(made: Scratch) -> None:
    login, url = made.login()
    run(made, "role", "grant", login, "--consume", "one")
    assert "is no administrator" in refused(url, "role", "grant", login, "--admin")
    assert made.execute("SELECT count(*) FROM durable.principal WHERE is_admin") == [(1,)]


# --- output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0.0s"), (0.44, "0.4s"), (12.9, "12s"), (200, "3m 20s"), (187_200, "2d 4h"), (86_401, "1d 1s")],
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
