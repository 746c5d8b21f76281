"""Escalations belong to their run's stream: others neither see nor change them, and cannot tell them from none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Uuid
from dramatiq_durable.errors import DurableError
from tests.sql.api import Session, derived, new_id, step

from .conftest import Grant, Scoped
from .scene import everything


def open_one(db: Session, stream: int) -> bytes:
    worker = db.register(stream)
    _, run = db.start(stream, f"w-{new_id().hex()}")
    advance = step(worker.one(), 1, ("EscalationOpened", 1, "clerk", b'"secret"', {"metadata": {"a": 1}}))
    assert worker.advance(advance) == ["ok"]
    return derived(run, 1)


def answers(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except psycopg.Error as e:
        return e.sqlstate, e.diag.message_primary
    except DurableError as e:
        return type(e)


def calls(session: Scoped, id: bytes) -> list[Callable[[], Any]]:
    return [
        *[
            lambda v=verb: session.escalation(v, id, by="eve", role="r")
            for verb in ("claim", "release", "resolve", "cancel", "reassign")
        ],
        lambda: session.call("get_escalation", Uuid(id)),
        lambda: session.call("list_escalations", None, None, None, None, None, None, 100, Uuid(id)),
        lambda: session.value("SELECT durable.resolve_escalation(%s)", id.hex()),
    ]


@pytest.mark.parametrize("foreign", ["theirs", "nobody's"])
def test_foreign_and_missing_look_the_same(db: Session, grant: Grant, foreign: str) -> None:
    eve = grant(consume=("mine",), produce=("mine",))
    there = open_one(db, db.stream("theirs"))
    before = everything(db)
    told = [answers(call) for call in calls(eve, there)]
    assert told == [answers(call) for call in calls(eve, new_id())]
    assert eve.call("list_escalations", None, None, None, None, None, None, 100) == []
    assert eve.call("count_escalations", None) == [(0, 0, 0, 0, 0)]
    assert eve.claim_next("clerk") is None
    assert everything(db) == before


@pytest.mark.parametrize("right", ["consume", "produce"])
def test_who_may_use_the_stream_may_work_on_them(db: Session, grant: Grant, right: str) -> None:
    ann = grant(**{right: ("theirs",)})
    theirs = db.stream("theirs")
    open_one(db, db.stream("others"))
    there = open_one(db, theirs)
    assert ann.call("count_escalations", None) == [(1, 0, 0, 0, 0)]
    assert len(ann.call("list_escalations", "clerk", "waiting", None, None, None, '{"a": 1}', 100)) == 1
    assert there.hex() in ann.claim_next("clerk", by="ann").replace("-", "")
    ann.escalation("resolve", there, by="ann", payload=b"1")
    assert ann.call("count_escalations", "clerk") == [(0, 0, 1, 0, 0)]


def test_a_worker_cannot_open_one_for_another_run(db: Session, grant: Grant) -> None:
    """What a step opens is its own run's, whatever it says."""
    eve = grant(consume=("mine",), produce=("mine",))
    mine, theirs = db.stream("mine"), db.stream("theirs")
    there = open_one(db, theirs)
    before = db.sql("SELECT * FROM durable.escalation WHERE stream_id = %s", theirs)
    worker = eve.register(mine)
    eve.start(mine, "w")
    facts = {"run_id": str(new_id()), "stream_id": theirs, "subject": "x"}
    assert worker.advance(step(worker.one(), 1, ("EscalationOpened", 1, "clerk", None, facts))) == ["ok"]
    assert db.value("SELECT count(*) FROM durable.escalation WHERE stream_id = %s", mine) == 1
    assert db.sql("SELECT * FROM durable.escalation WHERE stream_id = %s", theirs) == before
    assert there
