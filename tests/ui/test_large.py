"""However much there is, a page is bounded: in rows that are read, in bytes, in time."""

from __future__ import annotations

import re
import uuid

import psycopg
import pytest

from dramatiq_durable.ui import app
from tests.test_cli_commands import run
from tests.ui.conftest import OpenSite
from tests.ui.test_pages import look

#: What a page has at the most, in bytes.
PAGE = 2_000_000

#: Of this, many pages could be made.
LARGE = 1_500_000


@pytest.fixture
def large(database_url: str) -> str:
    """Everything is as large as it may be; returns the id of a run."""
    run_id = str(uuid.uuid4())
    with psycopg.connect(database_url) as conn:
        conn.execute("SELECT durable.open_streams('{mail}')")
        conn.execute(
            "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, memo, "
            "task_failure) VALUES (%s, repeat('<', 200), 1, repeat('&', 200), 'running', now(), 400, "
            """json_build_object('k', repeat('<', %s)), repeat('"', %s))""",
            [run_id, LARGE, LARGE],
        )
        conn.execute(
            "INSERT INTO durable.run_state (run_id, search, entity) "
            "VALUES (%s, jsonb_build_object('s', repeat('<', 30000)), jsonb_build_object('e', repeat('<', 1000000)))",
            [run_id],
        )
        # Of all sizes, of characters that grow when they are escaped.
        conn.execute(
            "INSERT INTO durable.event (run_id, event_id, type, at, seq, name, payload, attributes) "
            "SELECT %s, n, CASE n %% 3 WHEN 0 THEN 'ActivityFailed' WHEN 1 THEN 'ActivityScheduled' "
            "ELSE 'SignalReceived' END, now(), n, repeat('<', 200), "
            "convert_to('\"' || repeat('<', CASE n %% 2 WHEN 0 THEN %s ELSE 65000 END) || '\"', 'UTF8'), "
            "json_build_object('failure', json_build_object('type', repeat('&', 20000), 'message', repeat('&', 20000), "
            "'traceback', repeat('&', 20000))) FROM generate_series(1, 400) n",
            [run_id, LARGE],
        )
        conn.execute(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, "
            "last_failure) SELECT gen_random_uuid(), 1, 0, now(), now(), repeat('<', 200), "
            "convert_to(repeat('<', %s), 'UTF8'), repeat('<', %s) FROM generate_series(1, 60) n",
            [LARGE, LARGE],
        )
        conn.execute(
            "INSERT INTO durable.dead_letter (message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, "
            "reason, failure, payload) SELECT gen_random_uuid(), 1, 0, now(), 1, 0, repeat('<', 200), 'rejected', "
            "repeat('<', %s), convert_to(repeat('<', %s), 'UTF8') FROM generate_series(1, 60) n",
            [LARGE, LARGE],
        )
        conn.execute(
            "INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, subject, priority, status, "
            "opened_at, payload) SELECT gen_random_uuid(), %s, n, 1, repeat('<', 200), repeat('<', 1000), 0, 'open', "
            "now(), convert_to('\"' || repeat('<', 100000) || '\"', 'UTF8') FROM generate_series(1, 60) n",
            [run_id],
        )
        conn.execute(
            "INSERT INTO durable.stream (name) SELECT 'stream' || n || repeat('<', 150) FROM generate_series(1, 1000) n"
        )
    return run_id


def test_a_page_of_large_things_is_small(large: str, opened: OpenSite) -> None:
    client = opened(allow_actions=True)
    for path in (
        *("/runs", f"/runs/{large}", f"/runs/{large}?after=200", "/streams", "/streams?from=200", "/stream?name=mail"),
        *("/dead-letters", "/dead-letters/1", "/escalations", "/workers", "/schedules"),
    ):
        look(client, path)
        assert len(client.get(path).content) < PAGE, path
    text = look(client, f"/runs/{large}").text
    assert "1,500,002 bytes, too many for this page" in text
    assert "cut off: the command line shows all" in text
    assert "1,500,000 bytes" in look(client, "/stream?name=mail").text
    # All are there, page by page.
    found: list[str] = []
    for begin in range(0, 1200, 200):
        page = look(client, f"/streams?from={begin}")
        found += [link for link in page.links if link.startswith("/stream?")]
    assert len(found) == len(set(found)) == 1001


def test_streams_are_counted_so_far_and_then_estimated(database_url: str, opened: OpenSite) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{few,many}')")
        conn.execute(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload) "
            "SELECT gen_random_uuid(), CASE WHEN n <= 7 THEN 1 ELSE 2 END, 0, now() - interval '1 minute', now(), 'a', "
            "'' FROM generate_series(1, 20007) n"
        )
        text = look(opened(), "/streams").text
    assert re.search(r"~\d\d,\d\d\d", text)
    assert "few7" in text


def test_what_takes_too_long_is_given_up(database_url: str, opened: OpenSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PATIENCE", 0.05)
    with psycopg.connect(database_url) as conn:
        conn.execute("SELECT durable.open_streams('{mail}')")
        conn.execute(
            "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event) "
            "SELECT gen_random_uuid(), 'w' || n, 1, 'n', 'running', now(), 1 FROM generate_series(1, 20000) n"
        )
    client = opened()
    page = look(client, "/runs?where=workflow_id+like+'%25none%25'+or+closed_at+<+'2000-01-01'", 503)
    assert "That takes too long" in page.text
    # The connection is none the worse.
    assert look(client, "/runs?where=workflow_id+%3D+'none'").text


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


#: How deep Python's own JSON goes is a matter of the frames that are there already.
DEPTHS = [100, 400, 900, 2_000]


@pytest.mark.parametrize("depth", DEPTHS)
def test_however_deep_something_is_the_page_is_there(database_url: str, opened: OpenSite, depth: int) -> None:
    run_id, deep = uuid.uuid4(), nested(depth)

    def inside(*names: str) -> str:
        return "{" + ", ".join(f'"{name}": {deep}' for name in names) + "}"

    with psycopg.connect(database_url) as conn:
        conn.execute("SELECT durable.open_streams('{mail}')")
        conn.execute(
            "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, memo) "
            "VALUES (%s, 'deep', 1, 'n', 'running', now(), 2, %s::text::json)",
            [run_id, inside("k")],
        )
        conn.execute(
            "INSERT INTO durable.run_state (run_id, search, entity) VALUES (%s, %s::text::jsonb, %s::text::jsonb)",
            [run_id, inside("s"), inside("e")],
        )
        conn.execute(
            "INSERT INTO durable.event (run_id, event_id, type, at, seq, payload, attributes) "
            "SELECT %s, n, CASE n WHEN 1 THEN 'WorkflowStarted' ELSE 'ActivityFailed' END, now(), n, "
            "convert_to(%s, 'UTF8'), %s::text::json FROM generate_series(1, 2) n",
            [run_id, deep, f'{{"failure": {inside("message", "cause")}, "options": {deep}}}'],
        )
        conn.execute(
            "INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, priority, status, opened_at, "
            "payload, metadata) VALUES (%s, %s, 1, 1, 'r', 0, 'open', now(), convert_to(%s, 'UTF8'), %s::text::jsonb)",
            [run_id, run_id, deep, inside("k")],
        )
    client = opened()
    for path in ("/runs", f"/runs/{run_id}", "/escalations", f"/escalations/{run_id}"):
        look(client, path)


PAYLOADS = [
    '{"args": [], "kwargs": {}, "options": []}',
    '{"args": [], "kwargs": [], "options": {}}',
    '{"args": {"a": 1}, "kwargs": {}, "options": {}}',
    '{"args": "text", "kwargs": {}, "options": null}',
    '{"args": [], "kwargs": {}, "options": {"traceback": [1]}}',
    "[1]",
    "\udcff",
    *(f'{{"args": {nested(depth)}, "kwargs": {{"k": {nested(depth)}}}, "options": {{}}}}' for depth in DEPTHS),
]


@pytest.mark.parametrize("kind", ["m", "j"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_whatever_a_message_carries_the_others_are_seen(
    database_url: str, opened: OpenSite, payload: str, kind: str
) -> None:
    known = '"queue_name": "mail", "actor_name": "a", "message_id": "i", "message_timestamp": 1, '
    data = payload.replace('{"args"', "{" + known + '"args"', 1).encode("utf-8", "surrogateescape")
    with psycopg.connect(database_url) as conn:
        conn.execute("SELECT durable.open_streams('{mail}')")
        for table, more, values in (
            ("message", "due_at", "now()"),
            ("dead_letter", "attempt, deaths, reason", "1, 0, 'rejected'"),
        ):
            conn.execute(
                f"INSERT INTO durable.{table} (message_id, stream_id, priority, enqueued_at, actor, kind, payload, "
                f"{more}) SELECT gen_random_uuid(), 1, 0, now(), 'a' || n, %s, CASE n WHEN 2 THEN %s ELSE '' END, "
                f"{values} FROM generate_series(1, 3) n".encode(),
                [kind, data],
            )
    client = opened()
    for path in ("/stream?name=mail", "/dead-letters"):
        text = look(client, path).text
        assert all(f"a{n}" in text for n in (1, 2, 3))
    look(client, "/dead-letters/2")
    for command in (("stream", "peek", "mail"), ("dead-letter", "list"), ("dead-letter", "show", "2")):
        run(database_url, *command)
        run(database_url, *command, "--json")
