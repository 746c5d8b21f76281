"""Real worker processes that are killed, paused, and the command line that looks after their runs."""

from __future__ import annotations

import importlib
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

Start = Callable[[], Any]


@pytest.fixture
def app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application, as a client has it: this process runs no worker."""
    before = dramatiq.broker.global_broker
    monkeypatch.setenv("TEST_URL", database_url)
    sys.modules.pop("tests.scenarios_other.application", None)
    application = importlib.import_module("tests.scenarios_other.application")
    with psycopg.connect(database_url) as conn:
        conn.execute("CREATE TABLE effect (name text)")
    yield application
    dramatiq.broker.global_broker = before
    application.broker.close()


@pytest.fixture
def worker(run_process: Any, database_url: str) -> Start:
    def start() -> Any:
        process = run_process.dramatiq(
            *("tests.scenarios_other.application:broker", "--processes", "1", "--threads", "4"),
            env={"TEST_URL": database_url, "dramatiq_worker_timeout": "200"},
        )
        process.wait_for("Worker process is ready")
        return process

    return start


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


def test_a_journey_over_many_dead_workers(app: Any, worker: Start, tmp_path: Path, database_url: str) -> None:
    handle = app.journey.options(workflow_id="j", memo={"m": 1}).start(str(tmp_path))
    first = worker()
    wait_until(lambda: (tmp_path / "hang-effect").exists())
    first.kill()
    second = worker()
    wait_until(lambda: (tmp_path / "hang-resume").exists(), timeout=30)
    wait_until(lambda: [p.heartbeat_details for p in handle.describe().pending] == [4], timeout=20)
    assert handle.update("add", "between", update_id="u", timeout=20) == 1
    update = handle.update("add", "late", update_id="v", wait="accepted", timeout=20)
    second.kill()
    third = worker()
    wait_until(lambda: "ChildStarted" in types(handle), timeout=30)
    third.kill()
    handle.signal("go", "now")
    fourth = worker()
    result = handle.result(timeout=60)
    assert update.result(timeout=10) == 2
    assert handle.update("add", "between", update_id="u", timeout=10) == 1
    assert result["pages"][0] == 4
    assert (result["kids"], result["signal"], result["seen"], result["stage"]) == (
        [0, 2, 4],
        "now",
        ["between", "late"],
        3,
    )
    assert list(handle.follow()) == [(0, "began"), (1, "effected"), (2, "done")]
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT name FROM effect").fetchall() == [("effect",)]
    assert [len((tmp_path / n).read_text().split()) for n in ("first", "last", "page-0", "page-5")] == [1, 1, 1, 1]
    assert len(handle.history()) == len({e.event_id for e in handle.history()})
    Replayer([app.journey]).replay(handle.export())
    assert handle.query("seen", timeout=20) == ["between", "late"]
    fourth.stop()


def test_chains_whose_workers_die_at_random(app: Any, worker: Start, tmp_path: Path) -> None:
    rng = random.Random(7)
    handles = [app.chain.options(workflow_id=f"c-{n}").start(str(tmp_path), 0, 12) for n in range(6)]
    processes = [worker(), worker()]
    for _ in range(3):
        time.sleep(rng.random() * 0.5)
        processes.pop(rng.randrange(2)).kill()
        processes.append(worker())
    assert [h.result(timeout=60) for h in handles] == [12] * 6
    assert durable.count_workflows("name = 'chain'", group_by="status") == {"continued_as_new": 72, "completed": 6}


def test_a_worker_that_is_stopped_for_a_while(app: Any, worker: Start, tmp_path: Path, database_url: str) -> None:
    """It sleeps through its lease; another takes over, and what it does when it wakes counts for nothing."""
    handle = app.journey.start(str(tmp_path))
    first = worker()
    wait_until(lambda: (tmp_path / "hang-effect").exists())
    first.signal(signal.SIGSTOP, group=True)
    try:
        worker()
        wait_until(lambda: (tmp_path / "hang-resume").exists(), timeout=40)
        first.signal(signal.SIGCONT, group=True)
        time.sleep(0.5)
        with psycopg.connect(database_url) as conn:
            assert conn.execute("SELECT name FROM effect").fetchall() == [("effect",)]
        assert types(handle).count("ActivityCompleted") == 2
    finally:
        first.signal(signal.SIGCONT, group=True)
        first.kill()


# --- the command line ------------------------------------------------------------------------------------


def cli(database_url: str, *arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(main, ["--url", database_url, *arguments])
    assert bool(done.exit_code) == bool(code), (arguments, done.output)
    if code:
        assert isinstance(done.exception, SystemExit), (arguments, done.exception)
        return done.output
    return json.loads(done.output) if "--json" in arguments else done.output


def test_a_run_by_the_command_line_alone(broker: Any, start_worker: Any, database_url: str) -> None:
    @durable.activity
    def double(n: int) -> int:
        return n * 2

    @durable.workflow(queue_name="hall")
    async def flow(n: int, *, extra: str = "") -> Any:
        @durable.on_query("state")
        def state(prefix: str = "") -> str:
            return f"{prefix}waiting"

        @durable.on_update("set")
        def set_(by: int) -> int:
            return n + by

        await durable.upsert_search({"n": n})
        got = await double.execute(n)
        answer = await durable.escalate(role="clerk", subject="it", payload={"n": n})
        return [got, extra, answer, await durable.wait_for_signal("go")]

    start_worker()
    run: Callable[..., Any] = lambda *a, **k: cli(database_url, *a, **k)  # noqa: E731
    started = run(
        *("workflow", "start", "flow", "--queue", "hall", "--args", "[4]", "--kwargs", '{"extra": "x"}'),
        *("--id", "w-1", "--memo", '{"m": 1}', "--json"),
    )
    assert started["workflow_id"] == "w-1"
    assert run("workflow", "query", "w-1", "state", '"p-"', "--json") in ("p-waiting", {"result": "p-waiting"})
    assert run("workflow", "update", "w-1", "set", "5", "--id", "u", "--json") is not None
    [task] = wait_until(lambda: run("escalation", "list", "--role", "clerk", "--status", "waiting", "--json"))
    assert (task["role"], task["subject"], task["payload"]) == ("clerk", "it", {"n": 4})
    claimed = run("escalation", "claim", task["id"], "--by", "ann", "--for", "10m", "--json")
    assert claimed["claimed_by"] == "ann"
    assert "ann" in run("escalation", "claim", task["id"], "--by", "bob", code=1)
    assert "ann" in run("escalation", "resolve", task["id"], "1", "--by", "bob", code=1)
    run("escalation", "release", task["id"], "--by", "ann")
    assert run("escalation", "reassign", task["id"], "--role", "boss", "--json")["role"] == "boss"
    assert run("escalation", "show", task["id"], "--json")["status"] == "waiting"
    run("escalation", "resolve", task["id"], '{"ok": true}', "--by", "bob", "--json")
    stats = run("escalation", "stats", "--json")
    assert "resolved" in json.dumps(stats)
    run("workflow", "signal", "w-1", "go", '"gone"', "--json")
    wait_until(lambda: durable.get_handle("w-1").status() == "completed")
    shown = run("workflow", "show", "w-1", "--json")
    assert shown["status"] == "completed"
    assert shown["result"] == [8, "x", {"ok": True}, "gone"]
    assert shown["memo"] == {"m": 1}
    assert shown["search"] == {"n": 4}
    events = run("workflow", "history", "w-1", "--json")
    assert [e["type"] for e in events][-1] == "WorkflowCompleted"
    assert {"event_id", "type", "name", "at", "attributes"} <= set(events[0])
    [listed] = run("workflow", "list", "--where", "search.n = 4 and status = 'completed'", "--json")
    assert listed["workflow_id"] == "w-1"
    assert "character 11" in run("workflow", "list", "--where", "search.n === 4", code=1)
    exported = json.loads(run("workflow", "export", "w-1"))
    assert exported["events"][0]["type"] == "WorkflowStarted"
    scheduled = next(e for e in events if e["type"] == "ActivityScheduled")
    again = run("workflow", "reset", "w-1", "--to", str(scheduled["event_id"]), "--yes", "--json")
    assert again["workflow_id"] == "w-1"
    run("workflow", "cancel", "w-1", "--json")
    wait_until(lambda: durable.get_handle("w-1").status() == "cancelled")
    third = run("workflow", "start", "flow", "--queue", "hall", "--args", "[5]", "--id", "w-2", "--json")
    run("workflow", "terminate", "w-2", "--reason", "enough", "--json")
    assert durable.get_handle("w-2", run_id=third["run_id"]).status() == "terminated"
    assert "w-2" in run("workflow", "show", "w-2")
    assert "enough" in run("workflow", "history", "w-2")
    for wrong in (
        ("workflow", "show", "nobody"),
        ("workflow", "signal", "nobody", "x"),
        ("workflow", "terminate", "w-2"),
        ("workflow", "start", "flow", "--queue", "hall", "--args", "{"),
        ("escalation", "show", "00000000-0000-0000-0000-000000000000"),
        ("escalation", "show", "no-uuid"),
    ):
        output = run(*wrong, code=1)
        assert "Traceback" not in output, output
        assert output.strip()


def test_many_at_once_by_the_command_line(broker: Any, start_worker: Any, database_url: str) -> None:
    @durable.workflow
    async def waits(n: int) -> Any:
        return await durable.wait_for_signal("go")

    start_worker()
    handles = [waits.options(search={"n": n}).start(n) for n in range(4)]
    assert cli(database_url, "workflow", "signal", "--where", "search.n < 1", "go", "7", "--yes", "--json") is not None
    assert handles[0].result(timeout=20) == 7
    cli(database_url, "workflow", "cancel", "--where", "search.n = 1", "--yes", "--json")
    wait_until(lambda: handles[1].status() == "cancelled")
    cli(database_url, "workflow", "terminate", "--where", "status = 'running'", "--yes", "--json")
    assert [h.status() for h in handles] == ["completed", "cancelled", "terminated", "terminated"]


@pytest.mark.administrator
def test_a_stream_is_paused_and_resumed(broker: Any, start_worker: Any, database_url: str) -> None:
    ran: list[int] = []

    @durable.activity(queue_name="slow")
    def work(n: int) -> int:
        ran.append(n)
        return n

    @durable.workflow
    async def flow() -> int:
        return await work.execute(1)

    start_worker()
    assert flow.start().result(timeout=20) == 1
    cli(database_url, "stream", "pause", "slow")
    handle = flow.start()
    wait_until(lambda: "ActivityScheduled" in types(handle))
    time.sleep(0.5)
    assert ran == [1]
    cli(database_url, "stream", "resume", "slow")
    assert handle.result(timeout=20) == 1
