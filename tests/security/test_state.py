"""What scoped logins see of runs and topics: what is of the streams that they were granted, and nothing else."""

from __future__ import annotations

import json
from typing import Any

from dramatiq_durable.arrays import Ints, Texts, Uuid
from dramatiq_durable.workflow.events import Event
from tests.sql.api import Session, Worker, step

from .conftest import Grant
from .scene import ONE_TEXT, refusal


def start(session: Session, stream: int, workflow_id: str, worker: Worker, *events: tuple[str, str, str]) -> bytes:
    """A run that has taken one step, with events of (type, name, attributes as JSON)."""
    _, run = session.start(stream, workflow_id)
    claimed = worker.claim()
    (task,) = (c for c in claimed if c.kind == "s")
    worker.release(*(c for c in claimed if c is not task))
    advance = step(task, 1)
    advance.events = [
        Event(n, type, 1_700_000_000_000, n, name, b'"secret of %s"' % workflow_id.encode(), json.loads(facts))
        for n, (type, name, facts) in enumerate(events, 2)
    ]
    advance.last = 1 + len(events)
    assert worker.advance(advance) == ["ok"]
    return run


SEARCH = ("SearchUpserted", "", '{"search": {"who": "secret"}}')
ENTITY = ("EntityChanged", "set", '{"op": "put", "path": ["who"], "value": "secret"}')
OUTPUT = ("OutputWritten", "", '{"offset": 0}')
EMITTED = ("TopicEmitted", "t", "{}")


def listed(session: Session, filter: dict[str, Any]) -> list[str]:
    rows = session.call("list_workflows", json.dumps(filter), False, True, None, None, 100)
    counts = session.call("count_workflows", json.dumps(filter), None, None)
    assert sum(count for _, count in counts) == len(rows)
    return sorted(row[1] for row in rows)


def test_lists_have_only_what_was_granted(db: Session, grant: Grant) -> None:
    mine, out, theirs = db.stream("mine"), db.stream("out"), db.stream("theirs")
    for stream, name in ((mine, "m"), (out, "o"), (theirs, "t")):
        start(db, stream, name, db.register(stream), SEARCH, ENTITY)
    scoped = grant(consume=("mine",), produce=("out",))
    assert listed(scoped, {}) == ["m"]
    start(scoped, out, "own", db.register(out), SEARCH, ENTITY)
    filters: list[dict[str, Any]] = [
        {},
        {"search": '$.who == "secret"'},
        {"entity": '$.who == "secret"'},
        {"rest": '$.search.who == "secret"', "uses": ["search"]},
        {"queues": ["mine", "out", "theirs"]},
        {"workflow_like": "_"},
        {"statuses": ["running"]},
    ]
    for filter in filters:
        everybody = ["m", "o", "own", "t"] if filter != {"workflow_like": "_"} else ["m", "o", "t"]
        assert listed(db, filter) == everybody, filter
        assert listed(scoped, filter) == [name for name in everybody if name in ("m", "own")], filter
    for filter in (
        {"queues": ["theirs"]},
        {"workflow_id": "t"},
        {"workflow_id": "o"},
        {"workflow_ids": ["t"]},
        {"name": "wf", "queues": ["no"]},
    ):
        assert listed(scoped, filter) == []
    assert scoped.call("count_workflows", "{}", "queue_name", None) == [('"mine"', 1), ('"out"', 1)]
    nobody = grant()
    assert listed(nobody, {}) == []


def test_state_and_output_of_a_foreign_run_look_like_those_of_none(db: Session, grant: Grant) -> None:
    theirs = db.stream("theirs")
    run = start(db, theirs, "t", db.register(theirs), SEARCH, ENTITY, OUTPUT)
    scoped = grant(consume=("mine",))
    missing = Uuid(bytes(16))
    for run_id in (Uuid(run), missing):
        assert refusal(lambda run_id=run_id: scoped.call("get_state", run_id)) == ("answer", [])  # type: ignore[misc]
        look = refusal(lambda run_id=run_id: scoped.call("read_output", run_id, 0, 10, missing, 1000))  # type: ignore[misc]
        assert look == ("answer", [])
    assert db.sql("SELECT count(*) FROM durable.waiter") == [(0,)]
    assert len(db.call("read_output", Uuid(run), 0, 10, None, 0)) == 2


def test_a_subscriber_hears_only_the_streams_that_it_was_granted(db: Session, grant: Grant) -> None:
    scoped = grant(consume=("mine",), produce=("out",))
    streams = {name: db.stream(name) for name in ("mine", "out", "theirs")}
    assert subscribe(scoped, streams["mine"]) == [True]
    workers = {name: db.register(id) for name, id in streams.items()}
    listener = scoped.register(streams["mine"])
    for name in ("theirs", "out", "mine"):
        start(db, streams[name], f"run-{name}", workers[name], EMITTED)
    start(scoped, streams["out"], "started-here", workers["out"], EMITTED)
    heard = [c.payload for c in listener.claim() if c.kind == "p"]
    assert len(heard) == 2
    assert not any(b"theirs" in payload or b"run-out" in payload for payload in heard)
    # What an administrator subscribes hears everything, and is not the worker's to end.
    assert subscribe(db, streams["mine"]) == [False]
    start(db, streams["theirs"], "again", workers["theirs"], EMITTED)
    assert [c.kind for c in listener.claim()] == ["p"]
    assert scoped.call("unsubscribe", "t", streams["mine"], "listener") == [(False,)]
    assert db.call("unsubscribe", "t", streams["mine"], "listener") == [(True,)]


def test_subscriptions_need_the_right_to_consume(db: Session, grant: Grant) -> None:
    mine, out, theirs = db.stream("mine"), db.stream("out"), db.stream("theirs")
    scoped = grant(consume=("mine",), produce=("out",))
    for stream in (out, theirs, 99_999):
        assert subscribe(scoped, stream) == [None]
        told = refusal(lambda stream=stream: scoped.call("unsubscribe", "t", stream, "listener"))  # type: ignore[misc]
        assert told[:3] == ("error", "DD001", ONE_TEXT)
    assert subscribe(db, theirs) == [True]
    assert subscribe(scoped, mine) == [True]
    assert [row[2] for row in scoped.call("list_subscriptions")] == ["mine"]
    assert [row[2] for row in db.call("list_subscriptions")] == ["mine", "theirs"]
    assert grant().call("list_subscriptions") == []


def test_events_are_settled_under_ones_own_lease_only(db: Session, grant: Grant) -> None:
    mine, theirs = db.stream("mine"), db.stream("theirs")
    subscribe(db, theirs)
    victim = db.register(theirs)
    start(db, theirs, "t", victim, EMITTED, EMITTED)
    (event,) = victim.claim()
    attacker = grant(consume=("mine",)).register(mine)
    for procedure, more in (
        ("finish_events", ("{true}", "{NULL}", "{no}")),
        ("look_again", ()),
    ):
        assert attacker.settle(procedure, [event], *more) == [1]
    assert db.sql("SELECT count(*) FROM durable.topic_event") == [(2,)]
    assert victim.settle("finish_events", [event], "{false}", "{NULL}", "{NULL}") == []
    assert len(victim.claim()) == 1


def subscribe(session: Session, stream: int) -> list[bool | None]:
    answer: list[bool | None] = session.call("subscribe", Texts(["t"]), Ints([stream]), Texts(["listener"]), Ints([0]))[
        0
    ][0]
    return answer
