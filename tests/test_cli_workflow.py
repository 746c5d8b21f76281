"""``dramatiq-durable workflow``: timelines, reset, export and replay, on real runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.cli.workflow.timeline import bars_of, open_of
from dramatiq_durable.workflow.export import load_history
from tests.support import ROOT, wait_until
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch
from tests.test_cli_commands import attempt, listed, refused, run, working

NOWHERE = "postgresql://nowhere.invalid/x"

APP = """
import dramatiq_durable as durable

@durable.activity
def double(n: int) -> int:
    return n * 2

@durable.workflow(queue_name="hall")
async def twice(n: int) -> int:
    first = await double.execute(n)
    await durable.wait_for_signal("go")
    return await double.execute(first)
"""


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


@pytest.fixture
def previous_broker() -> Iterator[None]:
    broker = dramatiq.broker.global_broker
    yield
    dramatiq.broker.global_broker = broker


def event(number: int, type: str, seconds: float, seq: int | None = None, name: str | None = None) -> Any:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return durable.HistoryEvent(number, type, name, at, {} if seq is None else {"seq": seq})


def test_bars_show_from_when_to_when_things_took() -> None:
    events = [
        event(1, "WorkflowStarted", 0),
        event(2, "ActivityScheduled", 0, 1, "a"),
        event(3, "TimerStarted", 0, 2),
        event(4, "ActivityCompleted", 4, 1, "a"),
        event(5, "ChildStarted", 4, 3, "c"),
        event(6, "ChildCancelRequested", 5, 3, "c"),
        event(7, "SignalReceived", 10, None, "s"),
    ]
    assert bars_of(events, 10) == {2: "━━━━━", 3: "━━━━━━━━━▶", 5: "    ━━━━━▶"}
    assert [e.event_id for e in open_of(events)] == [3, 5]
    assert open_of([*events, event(8, "WorkflowTerminated", 11)]) == []


def test_a_run_is_exported_and_replayed(
    made: Scratch, previous_broker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = durable.DurableBroker(made.url, middleware=[])
    dramatiq.set_broker(broker)
    name = "app_of_test_cli_workflow"
    (tmp_path / f"{name}.py").write_text(APP)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    with working(broker):
        handle = module.twice.options(workflow_id="t-1").start(2)
        wait_until(lambda: [e.type for e in handle.history()].count("ActivityCompleted") == 1)
        handle.signal("go")
        assert handle.result(timeout=10) == 8
    file = tmp_path / "history.json"
    assert run(made, "workflow", "export", "t-1", "-o", str(file)).output == ""
    assert run(made, "workflow", "export", "--run-id", handle.run_id).output == file.read_text()
    assert handle.export() == file.read_text()
    info, events = load_history(file.read_text())
    assert (info.workflow_id, info.run_id, info.name, info.queue_name) == ("t-1", handle.run_id, "twice", "hall")
    assert [e.type for e in events] == [e.type for e in handle.history()]
    assert json.loads(file.read_text())["info"]["status"] == "completed"
    assert "there is no workflow" in refused(made, "workflow", "export", "nobody")

    assert replayed(tmp_path, str(file), "--app", name) == (0, f"{file}: the code does what the history says\n")


def replayed(directory: Path, *arguments: str) -> tuple[int, str]:
    """What the command says in a process of its own, where no broker is set and no database is to be had."""
    done = subprocess.run(
        [sys.executable, "-m", "dramatiq_durable.cli", "--url", NOWHERE, "workflow", "replay", *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_other_code_is_told_the_first_difference(tmp_path: Path) -> None:
    history = {
        "format": "dramatiq-durable-history",
        "version": 1,
        "info": {"workflow_id": "w", "run_id": "00000000-0000-4000-8000-000000000000", "name": "naps",
                 "queue_name": "default", "started_at": "2026-01-01T00:00:00+00:00"},
        "events": [
            {"event_id": 1, "type": "WorkflowStarted", "at": 0, "name": "naps", "value": {"args": [], "kwargs": {}}},
            {"event_id": 2, "type": "TimerStarted", "at": 0, "seq": 1, "attributes": {"ms": 5}},
        ],
    }  # fmt: skip
    file = tmp_path / "naps.json"
    file.write_text(json.dumps(history))
    code = "import dramatiq_durable as durable\n@durable.workflow\nasync def naps():\n    {}\n"
    for name, body in (("good", "await durable.sleep(1)"), ("bad", "await durable.wait_for_signal('x')")):
        (tmp_path / f"{name}_naps.py").write_text(code.format(body))
    (tmp_path / "empty_naps.py").write_text("")
    assert replayed(tmp_path, str(file), "--app", "good_naps") == (0, f"{file}: the code does what the history says\n")
    status, output = replayed(tmp_path, str(file), "--app", "bad_naps")
    assert status == 1
    assert output.startswith(f"{file}: the code differs at event 2\n  history: TimerStarted\n  code:    nothing\n")
    status, output = replayed(tmp_path, str(file), str(file), "--app", "bad_naps", "--json")
    assert status == 1
    first, second = json.loads(output)
    assert first == second
    assert (first["ok"], first["event_id"], first["expected"], first["got"]) == (False, 2, "TimerStarted", "nothing")
    assert "declares no workflow" in replayed(tmp_path, str(file), "--app", "empty_naps")[1]
    assert "there is no module 'nobodys'" in replayed(tmp_path, str(file), "--app", "nobodys")[1]
    file.write_text("{}")
    status, output = replayed(tmp_path, str(file), "--app", "good_naps")
    assert status == 1
    assert "no exported history" in output


def test_a_run_is_reset(made: Scratch, previous_broker: None) -> None:
    broker = durable.DurableBroker(made.url, middleware=[])
    dramatiq.set_broker(broker)

    @durable.workflow(queue_name="hall")
    async def greet(name: str) -> str:
        return f"{name} {await durable.wait_for_signal('go')}"

    with working(broker):
        old = greet.options(workflow_id="g-1").start("Ada")
        old.signal("go", 1)
        assert old.result(timeout=10) == "Ada 1"
        made_new = listed(made, "workflow", "reset", "g-1", "--to", "1")
        assert made_new["workflow_id"] == "g-1"
        assert made_new["run_id"] != old.run_id
        assert durable.get_handle("g-1").result(timeout=10) == "Ada 1"
        assert "goes on from event 1" in run(made, "workflow", "reset", "g-1", "--to", "1").output
    done = attempt(made, "workflow", "reset", "g-1", "--to", "99")
    assert done.exit_code == 2
    assert "--to: " in done.output


def test_a_run_carries_a_memo(made: Scratch) -> None:
    run(made, "workflow", "start", "x", "--queue", "q", "--id", "m-1", "--memo", '{"customer": "c-7"}')
    assert listed(made, "workflow", "show", "m-1")["memo"] == {"customer": "c-7"}
    assert "--memo is an object" in attempt(made, "workflow", "start", "x", "--queue", "q", "--memo", "[]").output


def test_everything_has_json(made: Scratch) -> None:
    started = listed(made, "workflow", "start", "x", "--queue", "q", "--id", "j-1")
    assert listed(made, "workflow", "signal", "j-1", "go", "1") == {"workflow_id": "j-1", "signal": "go"}
    assert listed(made, "workflow", "cancel", "j-1") == {"workflow_id": "j-1", "run_id": None}
    assert listed(made, "workflow", "terminate", "--run-id", started["run_id"])["run_id"] == started["run_id"]


# --- many at once -------------------------------------------------------------------------------------------------


def test_runs_are_listed_by_a_filter_and_in_pages(made: Scratch) -> None:
    for n in range(5):
        run(made, "workflow", "start", "odd" if n % 2 else "it's", "--queue", "q", "--id", f"l-{n}")
    ids = [row["workflow_id"] for row in listed(made, "workflow", "list", "--where", "workflow_id > 'l-2'")]
    assert sorted(ids) == ["l-3", "l-4"]
    assert len(listed(made, "workflow", "list", "--name", "it's", "--where", "name = 'odd' or name != 'odd'")) == 3
    assert listed(made, "workflow", "list", "--name", "it's", "--status", "completed") == []
    seen: list[str] = []
    more: list[str] = []
    while True:
        done = attempt(made, "workflow", "list", "--limit", "2", "--order", "started_at", "--json", *more)
        seen += [row["workflow_id"] for row in json.loads(done.stdout)]
        if not done.stderr:
            break
        assert done.stderr.startswith("there are more: --after ")
        more = ["--after", done.stderr.split()[-1]]
    assert seen == [f"l-{n}" for n in range(5)]
    assert "at character 6" in refused(made, "workflow", "list", "--where", "name ~ 'x'", "--name", "y")
    assert attempt(made, "workflow", "list", "--after", "x").exit_code == 2


def test_many_are_told_at_once(made: Scratch) -> None:
    for n in range(4):
        run(made, "workflow", "start", "w", "--queue", "q", "--id", f"b-{n}")
    some = ("--where", "workflow_id in ('b-0', 'b-1') or workflow_id = 'b-2'")
    assert run(made, "workflow", "cancel", *some, "--dry-run").output == "cancel would be done to 3 running runs\n"
    assert listed(made, "workflow", "cancel", *some, "--dry-run") == {"runs": 3, "dry_run": True}
    done = attempt(made, "workflow", "terminate", *some)
    assert done.exit_code == 2
    assert "add --yes" in done.output
    assert listed(made, "workflow", "signal", "go", '{"a": 1}', *some, "--yes") == {"runs": 3}
    assert run(made, "workflow", "cancel", *some, "--yes").output == "3 runs asked to cancel themselves\n"
    assert made.execute("SELECT type, count(*) FROM durable.inbox GROUP BY 1 ORDER BY 1") == [
        ("CancelRequested", 3),
        ("SignalReceived", 3),
    ]
    assert listed(made, "workflow", "terminate", *some, "--reason", "why", "--yes") == {"runs": 3}
    assert listed(made, "workflow", "terminate", *some, "--yes") == {"runs": 0}
    assert run(made, "workflow", "reset", *some, "--to", "1", "--dry-run").output == (
        "reset to event 1 would be done to 3 runs\n"
    )
    assert listed(made, "workflow", "reset", *some, "--to", "1", "--yes") == {"runs": 3}
    assert len(listed(made, "workflow", "list", "--status", "running")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cancel", "w", "--where", "name = 'x'"), "in one way"),
        (("cancel", "w", "--dry-run"), "goes with --where"),
        (("signal", "go"), "WORKFLOW_ID NAME [JSON]"),
        (("signal", "w", "go", "1", "--where", "name = 'x'"), "it is NAME [JSON]"),
        (("signal", "go", "--id", "k", "--where", "name = 'x'"), "--id goes with one run"),
    ],
)
def test_wrong_usage_of_batches(arguments: tuple[str, ...], message: str) -> None:
    done = attempt(NOWHERE, "workflow", *arguments)
    assert done.exit_code == 2
    assert message in done.output
