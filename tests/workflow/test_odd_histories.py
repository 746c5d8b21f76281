"""What no worker of ours writes into a history is shown as far as it can be, and hides nothing else."""

from __future__ import annotations

import json
import uuid

import psycopg
import pytest

import dramatiq_durable as durable
from tests.test_cli_commands import run

DEEP = "[" * 100_000 + "]" * 100_000


def forge(url: str, *events: tuple[str, int | None, str, bytes | None], status: str = "running") -> str:
    """Make a run of these events: (type, seq, attributes, payload)."""
    run_id = uuid.uuid4()
    with psycopg.connect(url) as conn:
        conn.execute("SELECT durable.open_streams('{desk}')")
        conn.execute(
            "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, closed_at, last_event) "
            "VALUES (%s, 'odd', 1, 'odd', %s, now(), CASE WHEN %s <> 'running' THEN now() END, %s)",
            [run_id, status, status, max(len(events), 1)],
        )
        for number, (type, seq, attributes, payload) in enumerate(events, 1):
            conn.execute(
                "INSERT INTO durable.event (run_id, event_id, type, at, seq, name, attributes, payload) "
                "VALUES (%s, %s, %s, now() + %s * interval '1 second', %s, 'n', %s::text::json, %s)",
                [run_id, number, type, number, seq, attributes, payload],
            )
    return str(run_id)


@pytest.mark.parametrize("payload", [b"no json", b"\xff\xfe", DEEP.encode()])
def test_a_value_that_is_no_json_is_named(database_url: str, payload: bytes) -> None:
    shown = f"<no JSON, {len(payload):,} bytes>"
    started = ("WorkflowStarted", None, "{}", payload)
    run_id = forge(database_url, started, ("WorkflowCompleted", None, "{}", payload), status="completed")
    broker = durable.DurableBroker(database_url)
    handle = durable.get_handle(run_id=run_id, broker=broker)
    told = handle.describe()
    assert (told.input, told.result) == (shown, shown)
    assert [event.attributes for event in handle.history()] == [{"input": shown}, {"result": shown}]
    broker.close()


@pytest.mark.parametrize("status", ["running", "completed", "failed"])
def test_a_run_without_events_is_described(database_url: str, status: str) -> None:
    run_id = forge(database_url, status=status)
    broker = durable.DurableBroker(database_url)
    told = durable.get_handle(run_id=run_id, broker=broker).described(ask=False)
    assert (told.status, told.input, told.result, told.failure) == (status, None, None, None)
    broker.close()


def test_search_attributes_that_are_no_times(database_url: str) -> None:
    run_id = forge(database_url, ("WorkflowStarted", None, "{}", b"null"))
    with psycopg.connect(database_url) as conn:
        conn.execute(
            "INSERT INTO durable.run_state (run_id, search) VALUES (%s, %s)", [run_id, '{"when": {"time": "noon"}}']
        )
    broker = durable.DurableBroker(database_url)
    (told,) = durable.list_workflows("workflow_id = 'odd'", broker=broker)
    assert told.search == {"when": {"time": "noon"}}
    broker.close()


@pytest.mark.parametrize(
    ("type", "seq", "attributes", "payload"),
    [
        ("TimerStarted", 1, '{"ms": "soon"}', None),
        ("TimerStarted", 1, '{"ms": 1e999}', None),
        ("TimerStarted", 1, '{"ms": -1}', None),
        ("TimerStarted", None, '{"ms": 1, "seq": [1]}', None),
        ("ActivityScheduled", None, '{"seq": {}}', b'{"args": 1, "kwargs": 2}'),
        ("ActivityFailed", None, '{"seq": [], "failure": [1]}', b"\xff"),
        ("SignalReceived", None, "[1]", None),
        ("nonsense", 7, "1", b"{}"),
    ],
)
def test_a_timeline_of_odd_events(
    database_url: str, type: str, seq: int | None, attributes: str, payload: bytes | None
) -> None:
    run_id = forge(
        database_url,
        ("WorkflowStarted", None, "{}", b"null"),
        (type, seq, attributes, payload),
        ("SignalReceived", None, '{"seq": 1}', b"1"),
    )
    for command in ("show", "history"):
        out = run(database_url, "workflow", command, "--run-id", run_id).stdout
        assert "odd" in out or type in out
    events = json.loads(run(database_url, "workflow", "history", "--run-id", run_id, "--json").stdout)
    assert [event["type"] for event in events] == ["WorkflowStarted", type, "SignalReceived"]
    assert all(isinstance(event["attributes"].get("seq"), int | None) for event in events)
