"""Every page on a real database: what it says, that it is well-formed, and that nothing in it runs."""

from __future__ import annotations

import html
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from urllib.parse import urljoin

import httpx
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from dramatiq_durable.cli.target import Target
from dramatiq_durable.ui.app import create_app
from dramatiq_durable.ui.html import Html, render, tag, visible
from dramatiq_durable.ui.style import SHEET
from tests.support import wait_until
from tests.support.postgres import Cluster
from tests.support.scratch import scratch
from tests.ui.conftest import HOSTILE, Client, OpenSite, Site

VOID = {"input", "link", "meta", "br", "rect"}
NAMES = """
html head meta title link body a header strong nav ul li span main h1 h2 p form div label input select option button
table caption thead tbody tr th td section dl dt dd pre time code details summary svg rect textarea br
"""


class Read(HTMLParser):
    """Reads a page, and fails where it is not well-formed or has something that we never write."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.fields: set[str] = set()
        self.hidden: dict[str, str] = {}
        self.said = ""
        self._box = 0
        self.seen: list[str] = []
        self.feed(text)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids)), self.ids
        assert self.fields <= self.labelled, "a field has no label"

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert name in NAMES.split(), name
        assert not any(key.startswith("on") or key == "style" for key in given), given
        if self.open[-1:] == ["table"] and "caption" not in self.seen:
            assert name == "caption", "a table has no caption"
        self.seen = [*self.seen, name] if name != "table" else []
        assert name != "th" or given["scope"] == "col"
        if name not in VOID:
            self.open.append(name)
        if given.get("role") in ("status", "alert"):
            self._box = len(self.open)
        if (id := given.get("id")) is not None:
            self.ids.append(id)
        if name == "label":
            self.labelled.add(given["for"] or "")
        if name in ("input", "select", "textarea") and given.get("type") != "hidden" and "aria-label" not in given:
            self.fields.add(given["id"] or "")
        if given.get("type") == "hidden":
            self.hidden[given["name"] or ""] = given["value"] or ""
        if name == "a":
            href = given["href"] or ""
            assert href.startswith(("/", "#")), href
            assert not href.startswith("//"), href
            self.links.add(href)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name
        if len(self.open) < self._box:
            self._box = 0

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._box:
            self.said += data


def look(client: Client, path: str, status: int = 200) -> Read:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-store"
    page = Read(answer.text)
    assert not {"\u202e", "\u2028", "\x07"} & set(page.text)
    return page


def test_every_page_that_can_be_reached_from_the_first(site: Site, opened: OpenSite) -> None:
    client = opened(allow_actions=True)
    assert client.get("/").headers["location"] == "/runs"
    seen: set[str] = set()
    todo = ["/runs"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        page = look(client, path)
        todo += [urljoin(path, link) for link in page.links if not link.startswith("#") and "stack=" not in link]
    first = {re.sub(r"[0-9a-f-]{36}|\d+", "X", path.partition("?")[0]) for path in seen}
    assert first == {
        *("/runs", "/runs/X", "/streams", "/stream", "/dead-letters", "/dead-letters/X", "/workers", "/workers/X"),
        *("/schedules", "/escalations", "/escalations/X"),
    }


def test_a_run_that_completed(site: Site, opened: OpenSite) -> None:
    client = opened()
    page = look(client, f"/runs/{site.runs['good']}")
    for said in ("completed", "TimerStarted", "ChildStarted", "SignalReceived", "ActivityCompleted", "Result", "Input"):
        assert said in page.text
    assert visible(HOSTILE).splitlines()[0] in page.text.replace('\\"', '"')
    assert client.get(f"/runs/{site.runs['good']}").text.count("<rect ") == 3


def test_a_failure_has_its_traceback_and_what_waits_its_next_attempt(site: Site, opened: OpenSite) -> None:
    client = opened()
    failed = look(client, f"/runs/{site.runs['bad']}").text
    assert "Traceback (most recent call last)" in failed
    assert "Failure" in failed
    waits = look(client, f"/runs/{site.runs['tries']}").text
    assert "flaky" in waits
    assert re.search(r"in (59m|1h)", waits)
    assert "RuntimeError" in waits
    asks = look(client, f"/runs/{site.runs['ask']}").text
    assert asks.count("waits for clerk") == 1
    assert asks.count("escalation") == 1
    code = look(client, f"/runs/{site.runs['ask']}?stack=1").text
    assert "conftest.py" in code


def test_a_long_history_has_pages(site: Site, opened: OpenSite) -> None:
    run = uuid.UUID(site.runs["good"])
    with psycopg.connect(site.url) as conn:
        (last,) = conn.execute("SELECT last_event FROM durable.run WHERE run_id = %s", [run]).fetchone() or (0,)
        conn.execute(
            "INSERT INTO durable.event (run_id, event_id, type, at, name) "
            "SELECT %s, n, 'SignalReceived', now(), 'more' FROM generate_series(%s::int, 450) n",
            [run, last + 1],
        )
        conn.execute("UPDATE durable.run SET last_event = 450 WHERE run_id = %s", [run])
    client, path, found = opened(), f"/runs/{run}", []
    first = look(client, path)
    assert "Events 1 to 200 of 450." in first.text
    assert f"/runs/{run}?after=250" in first.links
    assert "Events 251 to 450 of 450." in look(client, f"/runs/{run}?after=250").text
    while path:
        answer = client.get(path)
        found += [
            int(n) for n in re.findall(r'<td role="cell" class="number" data-name="event">(\d+)</td>', answer.text)
        ]
        more = re.search(r'<a href="([^"]*)">Next page', answer.text)
        path = html.unescape(more[1]) if more else ""
    assert found == list(range(1, 451))


@pytest.mark.parametrize(
    ("type", "attributes", "payload"),
    [
        ("TimerStarted", '{"ms": "soon", "seq": [1]}', None),
        ("ChildStarted", '{"run_id": "../../login?x=<b>", "workflow_id": 1}', b'{"args": 1, "kwargs": 2}'),
        ("ActivityFailed", '{"failure": "text"}', None),
        ("ActivityFailed", '{"failure": {"cause": [1], "type": {}, "traceback": 7}}', None),
        ("SignalReceived", '{"seq": {}}', b"no json \xff"),
        ("<script>", '{"<script>": "<script>"}', b'"\\ud800"'),
    ],
)
def test_an_odd_event_hides_no_other(
    site: Site, opened: OpenSite, type: str, attributes: str, payload: bytes | None
) -> None:
    run = uuid.UUID(site.runs["good"])
    with psycopg.connect(site.url) as conn:
        conn.execute(
            "UPDATE durable.event SET type = %s, attributes = %s::text::json, payload = %s "
            "WHERE run_id = %s AND event_id = 4",
            [type, attributes, payload, run],
        )
    page = look(opened(), f"/runs/{run}").text
    assert type in page
    assert "ActivityCompleted" in page


def test_what_is_no_json_and_a_run_without_events(site: Site, opened: OpenSite) -> None:
    with psycopg.connect(site.url) as conn:
        conn.execute("UPDATE durable.event SET payload = '\\xff' WHERE event_id = 1 OR type LIKE 'Workflow%%'")
        conn.execute("DELETE FROM durable.event WHERE run_id = %s", [site.runs["tries"]])
    client = opened()
    for name in ("good", "bad", "ask"):
        assert "<no JSON, 1 bytes>" in look(client, f"/runs/{site.runs[name]}").text
    assert "There are no events here" in look(client, f"/runs/{site.runs['tries']}").text


def test_when_a_task_that_failed_comes_again(site: Site, opened: OpenSite) -> None:
    with psycopg.connect(site.url) as conn:
        conn.execute("UPDATE durable.run SET task_failure = 'Nondeterminism: x' WHERE run_id = %s", [site.runs["ask"]])
        conn.execute(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, actor, "
            "payload, attempt, last_failure) SELECT gen_random_uuid(), r.stream_id, -1, now() + interval '2 hours', "
            "now(), 't', r.run_id, r.name, '', 3, 'Nondeterminism: x' FROM durable.run r WHERE r.run_id = %s",
            [site.runs["ask"]],
        )
    client = opened()
    assert "its task fails" in look(client, "/runs").text
    page = look(client, f"/runs/{site.runs['ask']}").text
    assert "Nondeterminism: x" in page
    assert re.search(r"Attempt \d of the task: .* \(in 1h 59m\)", page)


def test_many_runs_have_pages_and_filters(site: Site, opened: OpenSite) -> None:
    with psycopg.connect(site.url) as conn:
        conn.execute(
            "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, closed_at, last_event) "
            "SELECT gen_random_uuid(), 'w' || n, (SELECT min(stream_id) FROM durable.stream), 'many', 'completed', "
            "now() - n * interval '1 second', now(), 1 FROM generate_series(1, 120) n"
        )
    client, path, found = opened(), "/runs?name=many&status=completed", []
    while path:
        answer = client.get(path)
        assert answer.status_code == 200
        found += re.findall(r'<a href="/runs/[^"]*">(w\d+)</a>', answer.text)
        more = re.search(r'<a href="([^"]*)">Next page', answer.text)
        path = html.unescape(more[1]) if more else ""
    assert found == [f"w{n}" for n in range(1, 121)]
    assert "There are no such runs" in look(client, "/runs?where=workflow_id+%3D+'nobody'").text


def test_many_dead_letters_have_pages_and_filters(database_url: str, opened: OpenSite) -> None:
    with psycopg.connect(database_url) as conn:
        conn.execute("SELECT durable.open_streams('{mail,other}')")
        # All at one moment: the pages go by number.
        conn.execute(
            "INSERT INTO durable.dead_letter (message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, "
            "reason, failure, payload) SELECT gen_random_uuid(), 1 + n % 2, 0, now(), 1, 0, 'a', 'rejected', "
            "'why ' || n, '' FROM generate_series(1, 240) n"
        )
    client, path, found = opened(), "/dead-letters?stream=other&reason=rejected&actor=a&text=WHY", []
    while path:
        answer = client.get(path)
        assert answer.status_code == 200
        found += [int(n) for n in re.findall(r'<a href="/dead-letters/(\d+)">', answer.text)]
        more = re.search(r'<a href="([^"]*)">Next page', answer.text)
        path = html.unescape(more[1]) if more else ""
    assert found == list(range(239, 0, -2))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/runs?where=nonsense", 400),
        ("/runs?where=status+%3D+'running')+or+(status+%3D+'failed'", 400),
        ("/runs?order=sideways", 400),
        ("/runs?after=%3Cscript%3E", 400),
        ("/runs?where=%00", 400),
        ("/runs/nobody", 404),
        ("/runs/00000000-0000-4000-8000-000000000000", 404),
        ("/runs/00000000-0000-4000-8000-000000000000?after=x", 404),
        ("/stream", 404),
        ("/stream?name=%3Cscript%3E", 403),
        ("/stream?name=mail&state=odd", 400),
        ("/dead-letters?below=x", 400),
        ("/dead-letters/x", 404),
        ("/dead-letters/99999999999999999999", 404),
        ("/dead-letters/4711", 404),
        ("/workers/4711", 404),
        ("/escalations?status=odd", 400),
        ("/escalations/nobody", 404),
        ("/%3Cscript%3E", 404),
        ("/runs/", 404),
    ],
)
def test_what_makes_no_sense_gets_a_page_that_says_so(
    database_url: str, opened: OpenSite, path: str, status: int
) -> None:
    client = opened()
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{mail}')")
    assert 'role="alert"' in client.get(path).text
    look(client, path, status)


def test_empty(opened: OpenSite) -> None:
    client = opened()
    for path in ("/runs", "/streams", "/dead-letters", "/workers", "/schedules", "/escalations"):
        assert re.search(r"There are no|No worker", look(client, path).text)


@pytest.mark.administrator
def test_what_a_login_may_not_see_is_said(cluster: Cluster, opened: OpenSite) -> None:
    with scratch(cluster, cluster.template()) as made:
        role = durable.provision_worker_role(made.url, name="watching", kind="monitor")
        client = opened(role.url)
        for path in ("/streams", "/workers"):
            look(client, path)
        for path in ("/runs", "/dead-letters", "/schedules", "/escalations"):
            assert "login" in look(client, path, 403).text


def test_a_mistake_of_ours_is_a_page_too(opened: OpenSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise LookupError("<secret>")

    client = opened()
    monkeypatch.setattr(Target, "rows", breaks)
    text = look(client, "/streams", 500).said
    assert "LookupError" in text
    assert "secret" not in text


def test_only_what_there_is_can_be_done(opened: OpenSite) -> None:
    client = opened(allow_actions=True)
    for path in ("/runs", "/streams", "/runs/0"):
        for method in ("POST", "PUT", "DELETE"):
            answer = client.ask(method, path, headers=ORIGIN)
            assert (answer.status_code, {*answer.headers["allow"].split(", ")}) == (405, {"GET", "HEAD"})
            assert Read(answer.text).said


def test_a_database_that_is_away() -> None:
    target = Target("postgresql://127.0.0.1:1/none?connect_timeout=1", None)
    look(Client(create_app(target), "http://localhost"), "/runs", 503)
    target.close()


# --- acting ---------------------------------------------------------------------------------------------------


def form_token(client: Client, path: str) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', client.get(path).text)
    assert found
    return found[1]


ORIGIN = {"Origin": "http://localhost"}


def letter(site: Site) -> int:
    with psycopg.connect(site.url) as conn:
        ((number,),) = conn.execute("SELECT dead_letter_id FROM durable.dead_letter").fetchall()
    return int(number)


def test_redrive(site: Site, opened: OpenSite) -> None:
    client = opened(allow_actions=True)
    number = letter(site)
    page = client.get(f"/dead-letters/{number}").text
    assert "ValueError" in page
    token = form_token(client, "/dead-letters")
    done = client.post("/dead-letters/redrive", data={"letter": [number, 10**9], "form_token": token}, headers=ORIGIN)
    assert done.headers["location"] == "/dead-letters?redriven=1&kept=1"
    assert "1 went back" in look(client, done.headers["location"]).text
    # It fails again, and is another letter.
    wait_until(lambda: str(number) != str(newest(site)) and newest(site))
    none = client.post("/dead-letters/redrive", data={"form_token": token}, headers=ORIGIN)
    assert none.status_code == 400


def newest(site: Site) -> int | None:
    with psycopg.connect(site.url) as conn:
        rows = conn.execute("SELECT max(dead_letter_id) FROM durable.dead_letter").fetchall()
    return None if rows[0][0] is None else int(rows[0][0])


def test_escalations_have_pages(site: Site, opened: OpenSite) -> None:
    with psycopg.connect(site.url) as conn:
        conn.execute(
            "INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, subject, priority, status, "
            "opened_at) SELECT gen_random_uuid(), %s, 1000 + n, 1, 'many', 's' || n, n %% 2, "
            "CASE WHEN n > 120 THEN 'resolved' ELSE 'open' END, now() FROM generate_series(1, 130) n",
            [site.runs["ask"]],
        )
    client = opened()
    for query, count in (("role=many", 120), ("role=many&status=any", 130), ("role=many&status=resolved", 10)):
        path, found = f"/escalations?{query}", []
        while path:
            look(client, path)
            text = client.get(path).text
            found += re.findall(r">s(\d+)</a>", text)
            more = re.search(r'<a href="([^"]*)">Next page', text)
            path = html.unescape(more[1]) if more else ""
        assert len(found) == len(set(found)) == count
    look(client, "/escalations?after=x", 404)
    gone = look(client, "/escalations?after=00000000-0000-4000-8000-000000000000", 404)
    assert "begin with the first page" in gone.text


def test_claim_release_and_resolve(site: Site, opened: OpenSite) -> None:
    client = opened(allow_actions=True)
    (asked,) = escalations.list(run_id=site.runs["ask"])
    here = f"/escalations/{asked.id}"

    def post(action: str, **fields: str) -> tuple[int, str]:
        token = form_token(client, here)
        answer = client.post(f"{here}/{action}", data={"form_token": token, **fields}, headers=ORIGIN)
        return answer.status_code, answer.headers.get("location") or html.unescape(answer.text)

    assert post("claim", by="")[0] == 400
    assert post("claim", by="ann", timeout="nonsense")[0] == 400
    assert post("claim", by="ann", timeout="1 hour") == (303, f"{here}?done=claimed")
    assert "It is claimed" in look(client, f"{here}?done=claimed").text
    status, text = post("claim", by="bob")
    assert (status, "claimed by 'ann'" in text) == (409, True)
    assert post("release", by="ann") == (303, f"{here}?done=released")
    status, text = post("resolve", by="ann", payload="{not json </textarea><script>")
    assert (status, "no JSON" in text) == (409, True)
    assert post("resolve", by="ann", payload='{"ok": "<b>"}') == (303, f"{here}?done=resolved")
    page = look(client, here)
    assert "resolved by" in page.text
    assert "Resolve" not in page.text
    assert escalations.get(asked.id).result == {"ok": "<b>"}


def test_of_two_who_answer_at_once_one_wins(site: Site, opened: OpenSite) -> None:
    (asked,) = escalations.list(run_id=site.runs["ask"])
    here, clients = f"/escalations/{asked.id}", [opened(allow_actions=True) for _ in range(4)]
    tokens = [form_token(client, here) for client in clients]

    def answer(number: int) -> httpx.Response:
        fields = {"form_token": tokens[number], "by": f"p{number}", "payload": str(number)}
        return clients[number].post(f"{here}/resolve", data=fields, headers=ORIGIN)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(answer, range(4)))
    assert sorted(answer.status_code for answer in answers) == [303, 409, 409, 409]
    won = next(number for number, answer in enumerate(answers) if answer.status_code == 303)
    assert escalations.get(asked.id).result == won
    for lost in (answer for answer in answers if answer.status_code == 409):
        assert "is resolved already" in Read(lost.text).said
    # And by whom it was, is there to be seen.
    assert f"p{won}" in look(clients[0], here).text
    # Once more, by the same.
    assert answer(won).status_code == 409


def test_a_stream_is_paused_and_goes_on(site: Site, opened: OpenSite) -> None:
    client, page = opened(allow_actions=True), "/stream?name=mail"

    def post(verb: str, name: str = "mail") -> httpx.Response:
        fields = {"form_token": form_token(client, page), "name": name}
        return client.post(f"/stream/{verb}", data=fields, headers=ORIGIN)

    for verb, done, before in (("pause", "paused", "active"), ("resume", "resumed", "paused")):
        assert before in look(client, page).text
        assert f"<button>{verb.title()}" in client.get(page).text
        for said in (done, f"{done}-before"):
            # Sent twice, it says that it was so before.
            assert post(verb).headers["location"] == f"/stream?name=mail&done={said}"
            assert Read(client.get(f"/stream?name=mail&done={said}").text).said
        with psycopg.connect(site.url) as conn:
            rows = conn.execute("SELECT paused FROM durable.stream WHERE name = 'mail'").fetchall()
        assert rows == [(verb == "pause",)]
    assert post("pause", "nowhere").status_code == 403
    assert Read(client.get("/stream?name=mail&done=<b>").text).said == ""


def test_a_letter_is_dropped_by_who_is_sure(site: Site, opened: OpenSite) -> None:
    client, number = opened(allow_actions=True), letter(site)
    token = form_token(client, f"/dead-letters/{number}")

    def post(**fields: str) -> httpx.Response:
        fields = {"form_token": token, "letter": str(number), **fields}
        return client.post("/dead-letters/drop", data=fields, headers=ORIGIN)

    assert post().status_code == 400
    assert "Drop" in look(client, f"/dead-letters/{number}").text
    assert newest(site) == number
    for done, text in (("dropped", "was dropped"), ("dropped-before", "no such letter any more")):
        assert post(sure="on").headers["location"] == f"/dead-letters?done={done}"
        assert text in look(client, f"/dead-letters?done={done}").said
    assert newest(site) is None
    look(client, f"/dead-letters/{number}", 404)


ACTIONS = [
    ("/stream/pause", {"name": "mail"}),
    ("/stream/resume", {"name": "mail"}),
    ("/dead-letters/drop", {"letter": "1", "sure": "on"}),
    ("/dead-letters/redrive", {"letter": "1"}),
    ("/escalations/{id}/claim", {"by": "ann"}),
    ("/escalations/{id}/release", {"by": "ann"}),
    ("/escalations/{id}/resolve", {"by": "ann", "payload": "1"}),
]


@pytest.mark.parametrize(("path", "fields"), ACTIONS)
def test_nothing_is_done_for_other_sites_and_nothing_read_only(
    site: Site, opened: OpenSite, path: str, fields: dict[str, str]
) -> None:
    (asked,) = escalations.list(run_id=site.runs["ask"])
    path = path.format(id=asked.id)
    client, reader = opened(allow_actions=True), opened()
    page = f"/escalations/{asked.id}"
    token = form_token(client, page)
    good = {**fields, "form_token": token}
    attempts = [
        client.post(path, data=good),
        client.post(path, data=good, headers={"Origin": "null"}),
        client.post(path, data=good, headers={"Origin": "http://evil.example"}),
        client.post(path, data=good, headers={"Origin": "http://localhost:81"}),
        client.post(path, data=fields, headers=ORIGIN),
        client.post(path, data={**fields, "form_token": "0" * 64}, headers=ORIGIN),
        client.post(path, data={**fields, "form_token": "ü"}, headers=ORIGIN),
        client.post(path, json=good, headers=ORIGIN),
        # Another browser's.
        opened(allow_actions=True).post(path, data=good, headers=ORIGIN),
    ]
    assert {answer.status_code for answer in attempts} == {403}
    assert client.get(path).status_code in (404, 405)
    reader.cookies.update(client.cookies)
    assert reader.post(path, data=good, headers=ORIGIN).status_code == 403
    assert "<button>Resolve" not in reader.get(page).text
    assert "read-only" in reader.get(page).text
    assert escalations.get(asked.id).status == "waiting"
    assert newest(site) == letter(site)
    with psycopg.connect(site.url) as conn:
        assert conn.execute("SELECT bool_or(paused) FROM durable.stream").fetchall() == [(False,)]


# --- who looks ------------------------------------------------------------------------------------------------


def test_the_token(opened: OpenSite) -> None:
    token = "a-token-of-some-length"
    client = opened(host="0.0.0.0", base="http://pages.example:9193", token=token)
    assert client.get("/").headers["location"] == "/login"
    assert client.get("/runs").headers["location"] == "/login?next=%2Fruns"
    assert client.post("/dead-letters/redrive").status_code == 401
    assert "<strong>durable<" not in client.get("/login").text
    assert "read-only" not in client.get("/login").text
    origin = {"Origin": "http://pages.example:9193"}
    form = form_token(client, "/login")
    for wrong in ("", "ü", token[:-1], token + "x"):
        answer = client.post("/login", data={"token": wrong, "form_token": form}, headers=origin)
        assert answer.status_code == 403
        Read(answer.text)
    assert client.post("/login", data={"token": token, "form_token": form}).status_code == 403
    answer = client.post("/login", data={"token": token, "form_token": form}, headers=origin)
    assert answer.headers["location"] == "/runs"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert token not in cookie
    assert client.get("/runs").status_code == 200
    for forged in ("", "9999999999.", "9999999999." + "0" * 64, "0." + "0" * 64, "x.y", "1.ü"):
        other = opened(host="0.0.0.0", base="http://pages.example:9193", token=token)
        headers = {"Cookie": f"dramatiq_durable_session={forged}".encode("latin-1")}
        assert other.get("/runs", headers=headers).status_code == 303


OURS = ["/streams", "/stream?name=a%20b", "/runs?status=failed&name=x", "/runs/0?after=5", "/workers/1"]
OTHERS = [
    *("", "/", "/login", "/nowhere", "runs", "/runsx", "//evil.example", "/\\evil.example", "///runs", " /runs"),
    *("https://evil.example/runs", "javascript:alert(1)", "/runs/\\evil", "/runs\r\nSet-Cookie: a=b", "/runs/\u202e"),
    *("\t//evil.example", "/runs?" + "x" * 3000, "/%2Fevil.example", "/stream@evil.example"),
]


@pytest.mark.parametrize(("wanted", "then"), [*((path, path) for path in OURS), *((path, "/runs") for path in OTHERS)])
def test_the_token_leads_to_the_page_that_was_asked_for(opened: OpenSite, wanted: str, then: str) -> None:
    token, base = "a-token-of-some-length", "http://pages.example"
    client = opened(host="0.0.0.0", base=base, token=token)
    form = form_token(client, "/login")
    # From the address to the form, and from there on.
    page = Read(client.get("/login", params={"next": wanted}).text)
    assert page.hidden["next"] == then
    for next in (wanted, page.hidden["next"]):
        fields = {"token": token, "form_token": form, "next": next}
        answer = client.post("/login", data=fields, headers={"Origin": base})
        assert answer.headers["location"] == then
        assert "a" not in answer.cookies


def test_a_link_leads_through_the_token_to_its_page(opened: OpenSite) -> None:
    client = opened(host="0.0.0.0", base="http://pages.example", token="a-token-of-some-length")
    asked = client.get("/runs?where=name+%3D+'a+b'&status=failed").headers["location"]
    page = Read(client.get(asked).text)
    fields = {**page.hidden, "token": "a-token-of-some-length"}
    done = client.post("/login", data=fields, headers={"Origin": "http://pages.example"})
    assert done.headers["location"] == "/runs?where=name+%3D+'a+b'&status=failed"
    assert client.get(done.headers["location"]).status_code == 200


def test_without_a_token_only_this_machines_names_are_answered_to(opened: OpenSite) -> None:
    for base in ("http://localhost:9193", "http://127.0.0.1:9193", "http://[::1]:9193"):
        assert opened(base=base).get("/runs").status_code == 200
    for base in ("http://evil.example", "http://localhost.evil.example", "http://10.0.0.1"):
        assert opened(base=base).get("/runs").status_code == 421
    for host in ("0.0.0.0", "::", "10.0.0.1", "pages.example"):
        with pytest.raises(ValueError, match="a token is needed"):
            opened(host=host)
    with pytest.raises(ValueError, match="too short"):
        opened(token="short")


# --- HTML -----------------------------------------------------------------------------------------------------


def test_what_is_read_can_be_told_from_what_is_behind_it() -> None:
    """The contrasts of WCAG 2, AA: 4.5 for text, 3 for what else has to be seen."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for look in re.findall(r":root \{(.*?)\}", SHEET, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", look))
        assert len(colours) == 12
        for behind in ("page", "card", "code"):
            for name, least in (
                *((text, 4.5) for text in ("ink", "soft", "link", "open", "good", "bad")),
                # Bars, the frames of fields (soft), and of what has the focus.
                *((shape, 3) for shape in ("bar", "open", "bad", "soft", "focus")),
            ):
                light, dark = sorted((luminance(colours[name]), luminance(colours[behind])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (name, behind)


def test_everything_is_escaped() -> None:
    assert render(["<b>", None, 1, [2.5], Html("<i>")]) == "&lt;b&gt;12.5<i>"
    assert tag("a", "<", href='"><script>', class_="x", aria_label=None, hidden=True) == (
        '<a href="&quot;&gt;&lt;script&gt;" class="x" hidden>&lt;</a>'
    )
    assert render("a\x00\ud800\u202e\ufeff\u2028é\u200d\n") == "a\\x00\\ud800\\u202e\\ufeff\\u2028é\u200d\n"
    assert tag("input", value="\ud800") == '<input value="?">'
