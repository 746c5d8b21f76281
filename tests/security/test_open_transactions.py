"""Whoever calls a procedure and keeps the transaction open holds nobody up on other streams, and nobody on its own for
longer than the procedures' lock_timeout."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Blobs, Bools, Ints, Longs, Texts, Uuid, Uuids
from dramatiq_durable.operations import Enqueue, ExpireRun, FinishActivity, ResetRun, Result
from tests.sql.api import Claimed, Session, Worker, derived, new_id, send_activity, send_limited, step
from tests.support import wait_until

from .conftest import Grant
from .test_catalogue import MONITOR, WORKER

#: The lock_timeout of the procedures, in seconds, and what a busy machine may add.
LOCK_TIMEOUT, MARGIN = 2.0, 4.0


class Side:
    """A login with a stream of its own and a worker, which has a message, an activity, a task, an event and a note."""

    def __init__(self, session: Session, db: Session, name: str, workflow_id: str) -> None:
        self.session, self.name = session, name
        self.stream = stream = db.stream(name)
        self.worker = session.register(stream)
        _, self.run = session.start(stream, workflow_id)
        session.call("subscribe", Texts(["t"]), Ints([stream]), Texts(["listener"]), Ints([0]))
        limits = {"options": {"durable_limits": {"start_to_close": 3_600_000, "schedule_to_close": 7_200_000}}}
        advance = step(
            self.worker.one(),
            1,
            ("ActivityScheduled", 1, "a"),
            ("ActivityScheduled", 2, "a", None, limits),
            ("ActivityScheduled", 3, "a", None, {"options": {"durable_limits": {"schedule_to_start": 1}}}),
            ("TopicEmitted", 4, "t"),
            ("EscalationOpened", 5, "clerk", b"1", {}),
        )
        advance.sends = [send_activity(stream, 1), send_limited(stream, 2), send_limited(stream, 3)]
        self.worker.advance(advance)
        db.sql(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, kind, run_id, seq, "
            "actor, payload) SELECT gen_random_uuid(), %s, 0, now(), now(), 'n', %s, subscription_id, 'listener', '' "
            "FROM durable.subscription WHERE stream_id = %s",
            stream,
            Uuid(self.run),
            stream,
        )
        self.escalation = derived(self.run, 5)
        leased: dict[tuple[str, int | None], Claimed] = {}
        wait_until(lambda: self._all_of_it(leased), message="all that the step sent")
        self.activity, self.limited, self.alarm = leased["a", 1], leased["a", 2], leased["d", 3]
        self.waiting = leased["a", 3]
        kinds = {c.kind: c for c in leased.values()}
        self.note, self.event = kinds["n"], kinds["p"]
        session.post(self.run)
        self.task = self.worker.one()
        session.ask(self.run)
        self.query = self.worker.one()
        session.enqueue(stream, b"leased", b"ready", b"ready")
        (self.message,) = self.worker.claim(1)
        session.schedule("s", stream)
        self.tick, *others = sorted(self.worker.claim(1), key=lambda c: c.kind)
        self.worker.release(*others)
        session.start(stream, f"{workflow_id}-short", options='{"run_timeout": 0}')
        self.deadline, *others = sorted(self.worker.claim(9), key=lambda c: c.kind)
        self.worker.release(*others)

    def _all_of_it(self, leased: dict[tuple[str, int | None], Claimed]) -> bool:
        leased.update({(c.kind, c.seq): c for c in self.worker.claim(6)})
        return len(leased) == 6

    def revision(self) -> int:
        return int(self.session.call("list_schedules", "s")[0][2])

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Each procedure once, on what this side has."""
        session, worker, run, task = self.session, self.worker, self.run, self.task
        peer: list[Worker] = []
        lease = Uuid(task.message_id), Uuid(task.lease)
        return {
            "schema_version": lambda: session.call("schema_version"),
            "namespace_identity": lambda: session.call("namespace_identity"),
            "open_streams": lambda: session.value("SELECT count(*) FROM durable.open_streams('{}')"),
            "enqueue_messages": lambda: session.enqueue(self.stream, b"x"),
            "enqueue_message": lambda: session.enqueue_one(self.stream),
            "batch_outcome": lambda: session.call("batch_outcome", *session.batch()),
            "enqueue": lambda: session.value("SELECT durable.enqueue(%s, 'a')", self.name),
            "start_workflow": lambda: session.value("SELECT durable.start_workflow(%s, 'w')", self.name),
            "start_runs": lambda: session.start(self.stream, f"new-{new_id().hex()}"),
            "start_runs_with": lambda: session.start_with(
                self.stream, f"with-{new_id().hex()}", "UpdateRequested", "u"
            ),
            "post": lambda: session.post(run),
            "request_updates": lambda: session.update(run, "u"),
            "get_updates": lambda: session.updates(run, "u", wait=1000),
            "ask_run": lambda: session.ask(run),
            "take_answers": lambda: session.call("take_answers", Uuids([self.query.message_id])),
            "withdraw_query": lambda: session.call("withdraw_query", Uuid(session.ask(run)[0])),
            "query_of_lease": lambda: worker.call(
                "query_of_lease", Uuid(self.query.message_id), Uuid(self.query.lease)
            ),
            "answer_queries": lambda: worker.answer(self.query),
            "get_run": lambda: session.call("get_run", Uuid(run), None),
            "get_closing": lambda: session.call("get_closing", Uuid(run)),
            "get_history": lambda: session.call("get_history", Uuid(run), 0),
            "await_run": lambda: session.call("await_run", Uuid(run), Uuid(new_id())),
            "register_worker": lambda: peer.append(session.register(self.stream)),
            "reclaim": lambda: worker.call("reclaim", worker.id + 1000, 0),
            "consume_streams": lambda: worker.call("consume_streams", Ints([self.stream])),
            "heartbeat": worker.heartbeat,
            "run_of_lease": lambda: worker.call("run_of_lease", *lease),
            "history_of_lease": lambda: worker.call("history_of_lease", *lease, 0),
            "claim": lambda: worker.claim(1),
            "mark_started": lambda: worker.mark_started(self.message),
            "complete_activities": lambda: worker.complete(self.activity),
            "start_activities": lambda: worker.settle("start_activities", [self.limited]),
            "beat_activities": lambda: worker.settle("beat_activities", [self.limited], Blobs([b"1"])),
            "doomed_activities": lambda: worker.call(
                "doomed_activities", Uuids([self.limited.message_id]), Uuids([self.limited.lease])
            ),
            "activity_of_lease": lambda: worker.call(
                "activity_of_lease", Uuid(self.limited.message_id), Uuid(self.limited.lease)
            ),
            "expire_activities": lambda: worker.settle("expire_activities", [self.alarm]),
            "defer_activity": lambda: worker.call(
                "defer_activity", Uuid(self.limited.message_id), Uuid(self.limited.lease), b"digest"
            ),
            "attempt_of_token": lambda: session.call("attempt_of_token", Uuid(run), 2, b"digest"),
            "beat_by_token": lambda: session.call("beat_by_token", Uuid(run), 2, b"digest", b"1"),
            "park_activities": lambda: worker.settle("park_activities", [self.limited]),
            "finish_activities": lambda: session.operate(
                FinishActivity(run, 2, b"digest", "ActivityCompleted", b"1", None)
            ),
            "pending_of": lambda: session.call("pending_of", Uuid(run)),
            "advance": lambda: worker.advance(step(task, 6, ("TimerStarted", 9))),
            "get_state": lambda: session.call("get_state", Uuid(run)),
            "read_output": lambda: session.call("read_output", Uuid(run), 0, 10, Uuid(new_id()), 1000),
            "list_workflows": lambda: session.call("list_workflows", "{}", False, True, None, None, 10),
            "count_workflows": lambda: session.call("count_workflows", "{}", "status", None),
            "list_subscriptions": lambda: session.call("list_subscriptions"),
            "look_again": lambda: worker.settle("look_again", [self.note]),
            "finish_events": lambda: worker.settle(
                "finish_events", [self.event], Bools([True]), Blobs([None]), Texts(["no"])
            ),
            "subscribe": lambda: session.call(
                "subscribe", Texts(["t", "new"]), Ints([self.stream] * 2), Texts(["listener"] * 2), Ints([0, 0])
            ),
            "unsubscribe": lambda: session.call("unsubscribe", "t", self.stream, "listener"),
            "abort_message": lambda: session.call("abort_message", Uuids([self.message.message_id]), True),
            "report_running": lambda: worker.call("report_running", Uuids([self.message.message_id]), Longs([1500])),
            "release": lambda: worker.release(self.message),
            "change_escalation": lambda: session.escalation("claim", self.escalation, by="ann"),
            "claim_escalation": lambda: session.claim_next("clerk", by="bob"),
            "get_escalation": lambda: session.call("get_escalation", Uuid(self.escalation)),
            "list_escalations": lambda: session.call("list_escalations", None, None, None, None, None, None, 9),
            "count_escalations": lambda: session.call("count_escalations", None),
            "resolve_escalation": lambda: session.value(
                "SELECT durable.resolve_escalation(%s, '1', 'ann') IS NULL", self.escalation.hex()
            ),
            "reschedule": lambda: worker.reschedule(*worker.claim(1)),
            "bury": lambda: worker.bury(*worker.claim(1)),
            "fail_settling": lambda: worker.fail_settling(*worker.claim(1)),
            "ack": lambda: worker.ack(*worker.claim(1)),
            "fail_task": lambda: worker.fail_task(task),
            "terminate_run": lambda: session.terminate(run),
            "list_children": lambda: session.call("list_children", Uuid(run), None),
            "reset_run": lambda: session.operate(ResetRun(run, None, 1, new_id())),
            "expire_runs": lambda: worker.operate(ExpireRun(self.deadline.message_id, self.deadline.lease)),
            "enqueue_keyed": lambda: session.enqueue_keyed(self.stream, "key", "replace"),
            "leave": lambda: worker.leave(
                *worker.claim(1),
                results=[Result("key", b"1", 1000)],
                sends=[Enqueue(self.stream, new_id(), "a", 0, 0, b"")],
            ),
            "store_result": lambda: session.call("store_result", "key", b"1", 1000),
            "get_results": lambda: session.call(
                "get_results", Texts(["key"]), Texts([self.name]), Uuid(new_id()), 1000
            ),
            "limiter_add": lambda: session.call("limiter_add", "key", 1, 1000),
            "limiter_change": lambda: session.call("limiter_change", "key", 1, None, None, 1000),
            "limiter_change_sum": lambda: session.call(
                "limiter_change_sum", "key@", "key@1", Texts(["key@1"]), 1, 9, 9
            ),
            "sweep": lambda: worker.call("sweep"),
            "schedules_of_leases": lambda: worker.look_up(self.tick),
            "fire_schedules": lambda: worker.fire(self.tick, 1000),
            "save_schedule": lambda: session.schedule("s", self.stream, overlap="skip", if_exists="update"),
            "list_schedules": lambda: session.call("list_schedules", None),
            "fire_by_hand": lambda: session.by_hand("s", None, 1000, revision=self.revision()),
            "control_schedule": lambda: session.control("s", "pause"),
            "resync": lambda: worker.resync(),
            "unregister_worker": lambda: worker.call("unregister_worker"),
        }


# What a monitor may call locks nothing.
NAMES = sorted(WORKER - MONITOR)


@pytest.fixture
def sides(db: Session, grant: Grant) -> tuple[Side, Side]:
    """The holder, and a login of another stream."""
    holder = grant(consume=("mine",), produce=("mine",))
    other = grant(consume=("theirs",), produce=("theirs",))
    return Side(holder, db, "mine", "w"), Side(other, db, "theirs", "w")


def test_all_at_once_hold_up_no_other_stream(sides: tuple[Side, Side], db: Session) -> None:
    holder, other = sides
    assert set(holder.calls()) == set(NAMES)
    holder.session.begin()
    for name, call in holder.calls().items():
        call()
        assert holder.session.conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS, name
    # A wait would end in an error: this is less than the procedures' lock_timeout.
    for session in (other.session, db):
        session.sql("SET statement_timeout = '1800ms'")
    for call in other.calls().values():
        call()
    # The operators' calls as well.
    for procedure in ("stream_counts", "list_workers"):
        db.call(procedure)
    db.stream("brand-new")
    db.sql("SELECT durable.grant_login('somebody', 'somebody', false, '{theirs}', '{theirs}')")
    holder.session.rollback()


@pytest.mark.parametrize("name", NAMES)
def test_each_holds_up_its_own_stream_no_longer_than_the_lock_timeout(
    db: Session, connect: Callable[..., Session], grant: Grant, name: str
) -> None:
    holder = Side(grant(consume=("mine",), produce=("mine",)), db, "mine", "w")
    colleague = grant(consume=("mine",), produce=("mine",))
    worker = colleague.register(holder.stream)
    holder.session.begin()
    holder.calls()[name]()
    attempts: dict[str, Callable[[], Any]] = {
        "claim": lambda: worker.claim(1),
        "enqueue": lambda: colleague.enqueue(holder.stream, b"x"),
        "start": lambda: colleague.start(holder.stream, "another"),
        "heartbeat": worker.heartbeat,
        "post": lambda: colleague.post(holder.run),
        "terminate": lambda: colleague.terminate(holder.run),
        "schedule": lambda: colleague.schedule("s", holder.stream),
    }
    must_not_wait = {"claim", "enqueue", "start", "heartbeat", "schedule"}
    for what, attempt in attempts.items():
        began = time.monotonic()
        try:
            attempt()
            waited = False
        except psycopg.errors.LockNotAvailable:
            waited = True
        assert time.monotonic() - began < LOCK_TIMEOUT + MARGIN, what
        assert not (waited and what in must_not_wait), what
    holder.session.rollback()


def test_a_claim_passes_by_what_another_is_claiming(db: Session, grant: Grant) -> None:
    one, other = (grant(consume=("mine",)) for _ in range(2))
    stream = db.stream("mine")
    db.enqueue(stream, *[b"%d" % n for n in range(10)])
    first, second = one.register(stream), other.register(stream)
    one.begin()
    held: list[Claimed] = first.claim(6)
    other.sql("SET statement_timeout = '1800ms'")
    assert [c.payload for c in second.claim(6)] == [b"6", b"7", b"8", b"9"]
    one.rollback()
    assert len(held) == len(second.claim(6)) == 6
