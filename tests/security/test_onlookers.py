"""What a hostile login stores stops nobody from looking: not the page, not the commands, not the exporter."""

from __future__ import annotations

import json
import re
import tracemalloc
import uuid
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dramatiq_durable import escalations
from dramatiq_durable.arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from dramatiq_durable.cli import main
from dramatiq_durable.cli.target import Target
from dramatiq_durable.cli.top.look import Looker
from dramatiq_durable.database import Database
from dramatiq_durable.metrics.exporter import Exported
from dramatiq_durable.metrics.gauges import Gauges
from dramatiq_durable.operations import Advance, Context, SaveSchedule
from dramatiq_durable.workflow.listing import list_workflows
from tests.sql.api import Claimed, Session, Worker, new_id, step
from tests.ui.conftest import OpenSite, opened

from .conftest import Grant

__all__ = ["opened"]

#: For a terminal, a page and an exposition.
ODD = '\x1b]0;owned\x07\x1b[2J\n<script>alert(1)</script>\u202e\r{job="x"} 1\n# EOF\n'


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def message(**odd: Any) -> bytes:
    whole = {"queue_name": "own", "actor_name": "a", "args": [], "kwargs": {}, "options": {}, "message_id": "1"}
    return json.dumps({**whole, "message_timestamp": 1, **odd}).encode()


PAYLOADS = [
    *(message(args="HERE").replace(b'"HERE"', nested(depth)) for depth in (200, 700, 200_000)),
    message(kwargs=None),
    message(kwargs=[1]),
    message(options=[1]),
    message(options={"traceback": [1]}),
    message(options={"traceback": ODD}),
    message(args=5),
    message(args=["\ud800"], kwargs={"\ud800" + ODD: ODD}),
    message(actor_name=["a"]),
    message(args="HERE").replace(b'"HERE"', b"[" + b"9" * 5000 + b"]"),
    *(b"null", b"[]", b'"text"', b"\xff\x00", b""),
]
PUT = '{"op": "put", "path": ["a"], "value": '
FAILURES = [ODD, "<encoded by x> !!!", "<encoded by x> aGk=", "x" * 100_000]


def record(worker: Worker, task: Claimed, type: str, attributes: str, payload: bytes | None = None) -> None:
    """A step of one event, whose facts are any text."""
    arguments = Advance.arguments([step(task, 1, (type, 1, "clerk" + ODD, payload))], context(worker))
    at = next(n for n, a in enumerate(arguments) if isinstance(a, Texts) and list(a) == ["clerk" + ODD]) + 2
    arguments[at] = Texts([attributes])
    assert worker.session.call("advance", *arguments)[0][1] == "ok"


def context(worker: Worker) -> Context:
    made = Context(worker.session.sender, worker.session.batches)
    made.worker = Uuid(worker.token)
    return made


@pytest.fixture
def eve(db: Session, grant: Grant) -> Session:
    """Whoever stores what nobody else would."""
    db.stream("honest")
    eve = grant(consume=("own",), produce=("own",), kind="worker")
    stream = eve.stream("own")
    worker = eve.register(stream)
    for payload in PAYLOADS:
        eve.enqueue(stream, payload, actor=ODD)
    letters = worker.claim(1000)
    assert worker.settle("bury", letters, *_buried(len(letters))) == []
    for payload in PAYLOADS:
        eve.enqueue(stream, payload, actor=ODD)

    def task(workflow_id: str) -> Claimed:
        _, run = eve.start(stream, workflow_id, name=ODD)
        return next(c for c in worker.claim(1000) if c.run_id == run)

    deep = nested(5000).decode()
    for n, payload in enumerate((b"no json", nested(200_000), nested(700), b'"\\ud800"')):
        record(
            worker,
            task(f"e{n}{ODD}"),
            "EscalationOpened",
            json.dumps({"metadata": {ODD: ODD}, "subject": ODD}),
            payload,
        )
    record(worker, task("s1"), "SearchUpserted", '{"search": {"at": {"time": "garbage"}, "deep": ' + deep + "}}")
    record(worker, task("s2"), "SearchUpserted", json.dumps({"search": {ODD: ODD, "at": {"time": ODD}}}))
    record(worker, task("s3"), "EntityChanged", PUT + deep + "}")
    record(worker, task("s4"), "EntityChanged", PUT + nested(700).decode() + "}")
    record(worker, task("s5"), "SideEffectRecorded", '{"a": ' + deep + "}", nested(200_000))
    eve.start(stream, "m", options='{"memo": {"a": ' + deep + "}}")
    for n, failure in enumerate(FAILURES):
        failed = task(f"f{n}")
        worker.call("fail_task", Uuid(failed.message_id), Uuid(failed.lease), failure, 0)
    for n, (cron, zone) in enumerate([("garbage", "UTC"), ("* * * * *", "../../etc/passwd"), ("0 0 30 2 *", ODD)]):
        eve.operate(
            SaveSchedule(
                f"s{n}{ODD}", "fail", False, stream, "m", ODD, 0, b"", None, cron, zone, 31622400000000, "allow"
            )
        )
    eve.call("register_worker", ODD, 1, 2**31 - 1, Ints([stream]), 86_400_000, 3)
    eve.call("register_worker", ODD, 1, 2**31 - 1, Ints([stream]), 86_400_000, 3)
    return eve


def _buried(count: int) -> list[Any]:
    return [Blobs([None] * count), Texts([FAILURES[n % len(FAILURES)] for n in range(count)])]


def test_the_page(eve: Session, opened: OpenSite) -> None:
    client, seen = opened(), set()
    todo = ["/runs", "/streams", "/dead-letters", "/workers", "/schedules", "/escalations", "/escalations?status="]
    while todo:
        path = todo.pop()
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert not {"\x1b", "\x07", "\u202e"} & set(answer.text)
        assert "<script" not in answer.text
        found = re.findall(r'href="(/(?:runs|dead-letters|workers|escalations)/[^"?]+|/stream\?[^"]*)"', answer.text)
        todo += {link.replace("&amp;", "&") for link in found} - seen - set(todo)
    assert len([path for path in seen if path.startswith("/dead-letters/")]) == len(PAYLOADS)
    assert len([path for path in seen if path.startswith("/runs/")]) == 10 + len(FAILURES)


COMMANDS = [
    ("stream", "list"), ("stream", "peek", "own"), ("dead-letter", "list"), ("worker", "list"), ("worker", "show", "1"),
    ("schedule", "list"), ("workflow", "list"), ("escalation", "list"), ("top", "--once", "--interval", "100ms"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["table", "json"])
def test_the_commands(eve: Session, database_url: str, command: tuple[str, ...], more: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, ["--url", database_url, *command, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert not {"\x1b", "\x07", "\u202e"} & set(done.output)
    if more:
        json.loads(done.stdout)


def test_one_of_each(eve: Session, db: Session, database_url: str) -> None:
    letters = [str(row[0]) for row in db.sql("SELECT dead_letter_id FROM durable.dead_letter")]
    asked = [str(row[0]) for row in db.sql("SELECT escalation_id::text FROM durable.escalation")]
    for command in [("dead-letter", "show", n) for n in letters] + [("escalation", "show", id) for id in asked]:
        for more in ((), ("--json",)):
            done = CliRunner().invoke(main, ["--url", database_url, *command, *more], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            assert not {"\x1b", "\x07", "\u202e"} & set(done.output)


def test_the_api(eve: Session, database_url: str) -> None:
    target = Target(database_url, None)
    runs = list_workflows(broker=target.broker)
    assert len(runs) == 10 + len(FAILURES)
    assert len(list_workflows("search.at = 'x'", broker=target.broker)) == 0
    found = escalations.list(broker=target.broker)
    assert {e.payload if isinstance(e.payload, str) else None for e in found} == {
        "<no JSON, 7 bytes>",
        "<no JSON, 400,000 bytes>",
        "\ud800",
        None,
    }
    looker = Looker(target)
    looker.look()
    for kind, key in [("stream", "own"), ("worker", "1"), ("runs", "running"), *(("run", run.run_id) for run in runs)]:
        looker.detail(kind, key)
    looker.close()
    target.close()


def test_the_exporter(eve: Session, database_url: str) -> None:
    gauges = Gauges(Database(lambda: database_url), 60)
    registry = CollectorRegistry()
    registry.register(Exported(gauges))
    plain = list(text_string_to_metric_families(generate_latest(registry).decode()))
    open_ = list(read_openmetrics(generate_openmetrics(registry).decode()))
    for families in (plain, open_):
        samples = [s for family in families for s in family.samples]
        (role,) = {s.labels["role"] for s in samples if "role" in s.labels}
        assert role == "clerk" + ODD
        assert {s.labels["stream"] for s in samples if "stream" in s.labels} == {"own", "honest"}
        (threads,) = [s.value for s in samples if s.name == "dramatiq_durable_worker_threads"]
        assert threads < 100_000
    gauges.close()


def test_what_a_worker_says_that_it_runs_hides_nothing(db: Session, grant: Grant) -> None:
    honest = db.register(db.stream("honest"))
    db.enqueue(db.stream("honest"), b"x")
    run = honest.one()
    honest.call("report_running", Uuids([run.message_id]), Longs([60_000]))
    eve = grant(consume=("own",), produce=("own",), kind="worker")
    stream = eve.stream("own")
    worker = eve.register(stream)
    age = 300_000_000_000
    # What it never had; and what it had.
    fakes = [new_id() for _ in range(500)]
    worker.call("report_running", Uuids([*fakes, run.message_id]), Longs([age] * 501))
    assert db.value("SELECT cardinality(running) FROM durable.worker WHERE worker_id = %s", worker.id) == 0
    eve.enqueue(stream, *[b"x"] * 500)
    had = worker.claim(500)
    worker.call("report_running", Uuids([c.message_id for c in had]), Longs([age] * 500))
    assert worker.ack(*had[1:]) == []
    found = [row for row in db.call("find_stuck", 2000) if row[0] == "running"]
    assert {row[3] for row in found} == {str(uuid.UUID(bytes=c.message_id)) for c in (run, had[0])}
    # Nothing runs for longer than its worker.
    started = db.value("SELECT started_at FROM durable.worker WHERE worker_id = %s", worker.id)
    assert {row[7] for row in found if row[6] == worker.id} == {started}
    holds = {row[0]: row[9:11] for row in db.call("list_workers")}
    assert holds[honest.id][0] == holds[worker.id][0] == 1
    assert 59 < holds[honest.id][1] < 120


def test_what_a_worker_says_that_it_holds_is_bounded(db: Session, grant: Grant) -> None:
    eve = grant(consume=("own",), produce=("own",), kind="worker")
    stream = eve.stream("own")
    worker = eve.register(stream)
    # It never says that it has finished.
    for _ in range(3):
        eve.enqueue(stream, *[b"x"] * 50)
        worker.ack(*worker.claim(50))
    eve.enqueue(stream, *[b"x"] * 50)
    worker.claim(50)
    db.sql("UPDATE durable.worker SET held = held || held WHERE worker_id = %s", worker.id)
    leased = {row[1]: row[3] for row in db.call("read_gauges", 100) if row[0] == "stream_leased_messages"}
    assert leased == {"own": 50}
    # No more than the last ten thousand are looked for.
    db.sql(
        "UPDATE durable.worker SET held = held || ARRAY(SELECT gen_random_uuid() FROM generate_series(1, 10000))"
        " WHERE worker_id = %s",
        worker.id,
    )
    leased = {row[1]: row[3] for row in db.call("read_gauges", 100) if row[0] == "stream_leased_messages"}
    assert leased == {"own": 0}


def test_top_reads_little_of_what_is_large(db: Session, grant: Grant, database_url: str) -> None:
    eve = grant(consume=("own",), produce=("own",), kind="worker")
    stream = eve.stream("own")
    worker, large = eve.register(stream), b"x" * 16_000_000
    eve.enqueue(stream, large, large)
    dead = worker.claim(1)
    assert worker.settle("bury", dead, Blobs([None]), Texts(["y" * 900_000 + "\nat last"])) == []
    target = Target(database_url, None)
    looker = Looker(target)
    look = looker.look()
    assert "at last" in next(line["detail"] for line in look.stuck if "dead" in line["what"])
    tracemalloc.start()
    try:
        rows = looker.detail("stream", "own").rows
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
        looker.close()
        target.close()
    assert [row["last failure"] for row in rows] == ["", "at last"]
    assert all(str(row["what"]).startswith("xxx") for row in rows)
