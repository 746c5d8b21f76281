"""Escalations in SQL: calls that stay on their indexes, whatever else the table has."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

import pytest

from dramatiq_durable.arrays import Uuid

from .api import Session, derived, new_id, send_timer, step
from .test_plans import counting

MANY = 20_000


@pytest.fixture
def crowd(db: Session) -> int:
    """A stream with a run that has very many escalations that are over, and as many that wait for other roles."""
    stream = db.stream("crowd")
    _, run = db.start(stream, "crowd")
    db.sql(
        "INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, subject, priority, metadata, "
        "status, opened_at) SELECT gen_random_uuid(), r.run_id, n, r.stream_id, 'role' || n %% 5, 's' || n, n %% 3, "
        "jsonb_build_object('n', n), CASE WHEN n %% 2 = 0 THEN 'open' ELSE 'resolved' END, "
        "clock_timestamp() - n * interval '1 second' "
        "FROM durable.run r, generate_series(1, %s) n WHERE r.run_id = %s",
        MANY,
        Uuid(run),
    )
    db.sql("ANALYZE durable.escalation")
    return stream


def open_one(db: Session, stream: int, *, timer: bool = False, **facts: object) -> bytes:
    worker = db.register(stream)
    _, run = db.start(stream, f"w-{new_id().hex()}")
    task = next(c for c in worker.claim(100) if c.run_id == run)
    advance = step(task, 1, ("EscalationOpened", 1, "clerk", b"1", facts))
    advance.sends = [send_timer(stream, 1)] if timer else []
    assert worker.advance(advance) == ["ok"]
    return derived(run, 1)


def test_what_is_done_with_one_looks_at_one(db: Session, crowd: int) -> None:
    id = open_one(db, crowd, subject="mine", metadata={"mine": True})
    for call in (
        lambda: db.claim_next("clerk", metadata='{"mine": true}'),
        lambda: db.escalation("claim", id, by="ann"),
        lambda: db.escalation("release", id, by="ann"),
        lambda: db.call("get_escalation", Uuid(id)),
        lambda: db.call("list_escalations", "clerk", "waiting", None, None, None, None, 10),
        lambda: db.call("list_escalations", None, None, "mine", None, None, None, 10),
        lambda: db.call("list_escalations", None, None, None, None, None, '{"mine": true}', 10),
        lambda: db.escalation("reassign", id, role="boss"),
        lambda: db.escalation("resolve", id, by="ann", payload=b"1"),
    ):
        with counting(db, "escalation") as counted:
            call()
        assert counted["escalation"].cheap, counted


def test_a_page_of_a_long_list_looks_at_a_page(db: Session, crowd: int) -> None:
    for filters in (("role1", "waiting"), (None, "waiting"), ("role2", "resolved"), (None, None)):
        places, last = [], None
        for _ in range(3):
            with counting(db, "escalation") as counted:
                rows = db.call("list_escalations", *filters, None, None, None, None, 10, last)
            assert len(rows) == 10
            # Of each status a page; and one more row where it goes on.
            assert counted["escalation"].seq_scans == 0
            assert counted["escalation"].rows <= 45, counted
            shown = [json.loads(row[0]) for row in rows]
            places += [(e["priority"], e["opened_at"], e["id"]) for e in shown]
            last = Uuid(uuid.UUID(shown[-1]["id"]).bytes)
        assert len(set(places)) == 30
        assert places == sorted(places)


def test_the_end_of_a_run_looks_at_its_own(db: Session, crowd: int) -> None:
    _, run = db.start(crowd, "other")
    with counting(db, "escalation") as counted:
        assert db.terminate(run) == "ok"
    assert counted["escalation"].cheap, counted


def test_a_call_that_is_repeated_is_answered_as_before(db: Session) -> None:
    id = open_one(db, db.stream("s"))
    for verb in ("claim", "release", "claim", "resolve"):
        call = new_id()
        first = db.escalation(verb, id, by="ann", call=call)
        assert db.escalation(verb, id, by="ann", call=call) == first
    assert db.value("SELECT count(*) FROM durable.inbox") == 1


def test_a_claim_of_the_next_that_is_repeated_is_the_same(db: Session) -> None:
    stream = db.stream("s")
    for _ in range(2):
        open_one(db, stream)
    call = [Uuid(new_id())]
    first = db.call("claim_escalation", *db.batch(), *call, 0, "clerk", None, "ann", None)
    assert db.call("claim_escalation", *db.batch(), *call, 1, "clerk", None, "ann", None) == first
    assert db.call("count_escalations", None)[0][:2] == (1, 1)


def test_a_step_that_takes_back_what_is_closed_is_refused(db: Session) -> None:
    stream = db.stream("s")
    for event in ("EscalationTimedOut", "EscalationWithdrawn"):
        worker = db.register(stream)
        _, run = db.start(stream, event)
        task = worker.one()
        assert worker.advance(step(task, 1, ("EscalationOpened", 1, "clerk", b"1", {}))) == ["ok"]
        db.escalation("resolve", derived(run, 1))
        task = worker.one()
        assert worker.advance(step(task, 2, (event, 1, "clerk"))) == ["refused"]
        assert json.loads(db.call("get_escalation", Uuid(derived(run, 1)))[0][0])["status"] == "resolved"


def test_one_step_may_open_and_withdraw(db: Session) -> None:
    stream = db.stream("s")
    worker = db.register(stream)
    _, run = db.start(stream, "w")
    made = step(worker.one(), 1, ("EscalationOpened", 1, "clerk", b"1", {}), ("EscalationWithdrawn", 1, "clerk"))
    assert worker.advance(made) == ["ok"]
    assert json.loads(db.call("get_escalation", Uuid(derived(run, 1)))[0][0])["status"] == "cancelled"


def test_claims_from_many_sessions(db: Session, connect: Callable[..., Session]) -> None:
    """Nobody is given what another one has, also while transactions stay open."""
    stream = db.stream("s")
    for _ in range(3):
        open_one(db, stream)
    sessions = [connect() for _ in range(4)]
    taken = []
    for session in sessions:
        session.begin()
        session.sql("SET LOCAL statement_timeout = '1s'")
        taken.append(session.claim_next("clerk"))
    ids = [json.loads(t)["id"] for t in taken[:3]]
    assert len(set(ids)) == 3
    assert taken[3] is None
    for session in sessions:
        session.rollback()
    assert db.call("count_escalations", None)[0][0] == 3


def test_pruning_forgets_them_with_their_run(db: Session) -> None:
    stream = db.stream("s")
    open_one(db, stream, timer=True)
    for (run,) in db.sql("SELECT run_id FROM durable.run"):
        db.terminate(run)
    assert db.value("SELECT count(*) FROM durable.escalation WHERE status = 'cancelled'") == 1
    assert db.value("SELECT count(*) FROM durable.message WHERE kind = 'w'") == 0
    db.call("prune_runs", *db.sql("SELECT clock_timestamp(), NULL::timestamptz, NULL::uuid, 100")[0])
    assert db.value("SELECT count(*) FROM durable.escalation") == 0
