"""Somebody who may consume ``mine`` and produce to ``out``, and what belongs to somebody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

from tests.sql.api import Claimed, Session, Worker, send_activity, step

from .conftest import Grant, Scoped

ONE_TEXT = "no such stream or workflow, or this login may not use it"


class Scene(NamedTuple):
    """What there is: the attacker, and somebody else's stream with a run, a leased activity and a message."""

    db: Session
    attacker: Scoped
    mine: int
    out: int
    victim: Worker
    theirs: int
    run: bytes
    task: Claimed
    activity: Claimed
    message: Claimed


def set_up(db: Session, grant: Grant) -> Scene:
    attacker = grant(consume=("mine",), produce=("out",))
    theirs = db.stream("theirs")
    victim = db.register(theirs)
    _, run = db.start(theirs, "order-1")
    advance = step(victim.one(), 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(theirs, 1)]
    victim.advance(advance)
    activity = victim.one()
    db.post(run)
    task = victim.one()
    db.enqueue(theirs, b"secret")
    message = victim.one()
    return Scene(db, attacker, db.stream("mine"), db.stream("out"), victim, theirs, run, task, activity, message)


def everything(db: Session) -> list[Any]:
    """All that the victim has."""
    return [
        db.sql(f"SELECT * FROM durable.{table} ORDER BY 1, 2")
        for table in (
            "message",
            "run",
            "event",
            "inbox",
            "dead_letter",
            "stream",
            "stream_grant",
            "login",
            "signal_key",
            "escalation",
            "schedule",
            "waiter",
            "run_update",
            "update_waiter",
            "run_query",
            "activity",
            "activity_cancel",
            "follower",
        )
    ]


def refusal(call: Callable[[], Any]) -> tuple[Any, ...]:
    """What a call answers or raises, as far as a caller can see it."""
    try:
        return ("answer", call())
    except psycopg.Error as e:
        return ("error", e.sqlstate, e.diag.message_primary, e.diag.message_detail, e.diag.message_hint)
