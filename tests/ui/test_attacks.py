"""What somebody sends who wants to come in, or to break the page for others."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from starlette.datastructures import URL
from starlette.requests import Request

import dramatiq_durable as durable
from tests.support.postgres import Cluster
from tests.support.scratch import scratch
from tests.ui.conftest import Client, OpenSite
from tests.ui.test_pages import ORIGIN

TOKEN = "a-token-of-some-length"


def ask(app: Any, path: str, *headers: tuple[bytes, bytes], method: str = "GET", body: bytes = b"") -> int:
    """A request as no client would make it; its status."""
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    path, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": list(headers), "scheme": "http", "server": ("127.0.0.1", 9193), "client": ("10.0.0.1", 4711),
        "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert b"content-security-policy" in dict(answers[0]["headers"])
    return int(answers[0]["status"])


@pytest.mark.parametrize("host", [b"x/login?", b"x/login#", b"x/style.css?", b"[", b"", b"x/login?@x", b"login"])
def test_the_host_opens_no_door(opened: OpenSite, monkeypatch: pytest.MonkeyPatch, host: bytes) -> None:
    # As it was made before Starlette looked at the host.
    url = lambda request: URL(f"http://{request.headers.get('host', '')}{request.scope['path']}")  # noqa: E731
    monkeypatch.setattr(Request, "url", property(url))
    client = opened(host="0.0.0.0", token=TOKEN)
    for path in ("/runs", "/streams", "/nowhere"):
        assert ask(client.app, path, (b"host", host)) == 303
    assert ask(client.app, "/dead-letters/redrive", (b"host", host), method="POST") == 401
    assert ask(client.app, "/login", (b"host", host)) == 200


@pytest.mark.parametrize("origin", [b"http://[", b"http://[::1", b"//", b"\xff", b"http://localhost\\@evil.example"])
def test_an_origin_that_is_none(opened: OpenSite, origin: bytes) -> None:
    client = opened(allow_actions=True)
    headers = [(b"host", b"localhost"), (b"origin", origin)]
    assert ask(client.app, "/dead-letters/redrive", *headers, method="POST", body=b"letter=1") == 403


def test_another_site_loads_nothing(opened: OpenSite) -> None:
    for client in (opened(), opened(token=TOKEN)):
        expected = 200 if client.get("/runs").status_code == 200 else 303
        for site, mode, dest, status in (
            ("cross-site", "no-cors", "image", 403),
            ("cross-site", "navigate", "iframe", 403),
            ("same-site", "cors", "empty", 403),
            ("cross-site", "navigate", "document", expected),
            ("same-origin", "no-cors", "style", expected),
            ("none", "navigate", "document", expected),
        ):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
            assert client.get("/runs", headers=headers).status_code == status, (site, mode, dest)


def test_a_form_of_very_many_fields(opened: OpenSite) -> None:
    client = opened(allow_actions=True)
    token = _form_of(client)
    headers = {**ORIGIN, "Content-Type": "application/x-www-form-urlencoded"}
    for body in ("a&" * 900_000, f"form_token={token}&" + "letter=1&" * 1100, "a=" + "x" * 2_100_000):
        assert client.post("/dead-letters/redrive", content=body, headers=headers).status_code == 403


NASTY = [
    "(" * 5000, "not " * 5000 + "status = 'x'", "status = 'x' and " * 2000 + "status = 'x'", "9" * 5000, "-1", "1e309",
    "\u0661", "\u00b2", "\ud7ff\uffff", "%", "'", "\\",
    "search." + "a." * 5000 + "b = 1", "entity." + "a." * 900 + "b = 1",
    "started_at > '99999-01-01'", "started_at > '0001-01-01'", "started_at > '9999-12-31T23:59:59-23:59'",
    "status = " + "'" * 5001, "search.a = " + "9" * 4000, "search.a = 1e400", "2147483648", "9223372036854775807",
    *(base64.urlsafe_b64encode(text.encode()).decode() for text in (
        "[" * 3000, "[1,2,3]", '["-started_at", "infinity", "x"]', '["-started_at", 5, 6]', "{}", "null",
        '["-started_at", "0001-01-01T00:00:00+23:59", "00000000-0000-0000-0000-000000000000"]',
        '["-started_at", "9999-12-31T23:59:59-23:59", "00000000-0000-0000-0000-000000000000"]',
        '["-started_at", "-infinity", "00000000-0000-0000-0000-000000000000"]',
        '["-closed_at", "infinity", "00000000-0000-0000-0000-000000000000"]', '[["x"], 1, "2"]',
    )),
]  # fmt: skip
FIELDS = {
    "/runs": ("where", "name", "status", "order", "after"),
    "/stream": ("name", "state", "actor", "done"),
    "/dead-letters": ("stream", "actor", "reason", "text", "below", "redriven", "kept"),
    "/escalations": ("role", "subject", "type", "status", "after", "done"),
    "/runs/00000000-0000-4000-8000-000000000000": ("after", "stack"),
    "/workers": ("x",),
    "/schedules": ("x",),
}


def test_no_question_breaks_it(database_url: str, opened: OpenSite) -> None:
    client, broken = opened(), []
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{mail}')")
    for path, fields in FIELDS.items():
        for value in NASTY:
            for field in fields:
                status = client.get(f"{path}?{field}={quote(value)}").status_code
                if status not in (200, 400, 403, 404):
                    broken.append((status, path, field, value[:60]))
    for path in ("/runs/", "/dead-letters/", "/workers/", "/escalations/"):
        for value in NASTY:
            status = client.get(path + quote(value, safe="")).status_code
            if status not in (200, 400, 403, 404):
                broken.append((status, path, "", value[:60]))
    assert broken == []


@pytest.mark.administrator
def test_actions_of_a_login_that_may_not(cluster: Cluster, opened: OpenSite) -> None:
    with scratch(cluster, cluster.template()) as made:
        with psycopg.connect(made.url, autocommit=True) as conn:
            conn.execute("SELECT durable.open_streams('{mine,theirs}')")
            run, id = "00000000-0000-4000-8000-000000000001", "00000000-0000-8000-8000-000000000001"
            conn.execute(
                "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event)"
                " SELECT %s, 'w', stream_id, 'x', 'running', now(), 1 FROM durable.stream WHERE name = 'theirs'",
                [run],
            )
            conn.execute(
                "INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, priority, opened_at)"
                " SELECT %s, %s, 1, stream_id, 'clerk', 0, now() FROM durable.stream WHERE name = 'theirs'",
                [id, run],
            )
            conn.execute(
                "INSERT INTO durable.dead_letter (message_id, stream_id, priority, enqueued_at, attempt, deaths, actor,"
                " reason, payload) SELECT gen_random_uuid(), stream_id, 0, now(), 1, 0, 'a', 'rejected', ''"
                " FROM durable.stream"
            )
        for kind in ("worker", "activity", "workflow", "producer", "monitor"):
            rights = {"streams": ["mine"]} if kind not in ("producer", "monitor") else {}
            rights |= {"produce": ["mine"]} if kind != "monitor" else {}
            role = durable.provision_worker_role(made.url, name=kind, kind=kind, **rights)
            client = opened(role.url, allow_actions=True)
            token = _form_of(client)
            for path, fields in (
                ("/dead-letters/redrive", {"letter": "1"}),
                ("/dead-letters/drop", {"letter": "1", "sure": "on"}),
                ("/stream/pause", {"name": "theirs"}),
                ("/stream/pause", {"name": "mine"}),
                (f"/escalations/{id}/claim", {"by": "eve"}),
                (f"/escalations/{id}/resolve", {"by": "eve", "payload": "1"}),
            ):
                answer = client.post(path, data={**fields, "form_token": token}, headers=ORIGIN)
                assert answer.status_code in (403, 404), (kind, path, answer.text)
                assert "none of ours" not in answer.text
            assert client.get(f"/runs/{run}").status_code in (403, 404)
            assert client.get(f"/escalations/{id}").status_code in (403, 404)
        with psycopg.connect(made.url) as conn:
            assert conn.execute("SELECT status FROM durable.escalation").fetchall() == [("open",)]
            assert conn.execute("SELECT count(*) FROM durable.dead_letter").fetchall() == [(2,)]
            assert conn.execute("SELECT bool_or(paused) FROM durable.stream").fetchall() == [(False,)]


def _form_of(client: Client) -> str:
    """What a form of this browser carries; a login that may nothing sees none."""
    client.get("/workers")
    return str(client.app._secrets.form(client.cookies["dramatiq_durable_forms"]))
