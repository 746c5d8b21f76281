"""Updates, queries, and messages that come with a start or with a step."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Texts, Uuid, Uuids
from dramatiq_durable.operations import Context, RequestUpdate
from dramatiq_durable.workflow.events import Event
from tests.support import wait_until

from .api import Claimed, Session, Worker, derived, in_background, new_id, start_child, step


def begin(db: Session, workflow_id: str = "w") -> tuple[bytes, Worker]:
    """A run that waits for something, and the worker of its stream."""
    stream = db.stream()
    _, run = db.start(stream, workflow_id)
    worker = db.register(stream)
    worker.ack(worker.one())
    return run, worker


def inbox_ids(db: Session, run: bytes) -> list[int]:
    return [row[0] for row in db.inbox(run)]


def said(task: Claimed, expected: int, type: str, id: str, **more: Any) -> Any:
    return step(task, expected, (type, None, "set", more.pop("payload", None), {"update_id": id, **more}))


# --- updates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["UpdateRejected", "UpdateAccepted"])
def test_who_comes_after_a_rejection_looks_again(db: Session, type: str) -> None:
    """A rejection leaves no event: the run is where it was, and yet somebody has had an answer."""
    run, worker = begin(db)
    db.update(run, "u")
    db.post(run, name="n")
    asked, signal = inbox_ids(db, run)
    one, other = worker.claim(5)
    attributes = {"update_id": "u", "failure": {"type": "No"}}
    first = step(one, 1, inbox=[asked])
    first.last = 1
    first.events = [Event(0, "UpdateRejected", 0, None, "set", None, attributes)]
    assert worker.advance(first) == ["ok"]
    second = said(other, 1, type, "u")
    second.inbox = [asked]
    third = step(other, 2, ("SignalReceived", None, "n"), inbox=[signal])
    third.before = second
    assert worker.advance(second, third) == ["refused", "refused"]
    assert db.updates(run, "u")[0][0] == "rejected"
    assert db.run(run) == ("running", 1)
    assert inbox_ids(db, run) == [signal]
    assert worker.advance(step(other, 1, ("SignalReceived", None, "n"), inbox=[signal])) == ["ok"]


def test_an_update_is_asked_for_once_and_answered_for_ever(db: Session) -> None:
    run, worker = begin(db)
    assert [db.update(run, "u"), db.update(run, "u"), db.update(None, "v", workflow_id="w")] == [
        "ok",
        "duplicate",
        "ok",
    ]
    assert [(row[1], row[5]) for row in db.inbox(run)] == [
        ("UpdateRequested", {"update_id": "u"}),
        ("UpdateRequested", {"update_id": "v"}),
    ]
    assert db.updates(run, "u", "v", "x") == [
        ("requested", None, None),
        ("requested", None, None),
        ("missing", None, None),
    ]
    one, other = worker.claim(5)
    first = said(one, 1, "UpdateAccepted", "u", payload=b"{}")
    first.events.append(first.events[0]._replace(event_id=3, type="UpdateCompleted", payload=b"7"))
    first.last = 3
    # What was rejected leaves no event.
    first.events.append(Event(0, "UpdateRejected", 0, None, "set", None, {"update_id": "v", "failure": {"type": "No"}}))
    first.inbox = inbox_ids(db, run)
    assert worker.advance(first) == ["ok"]
    assert db.events(run) == ["WorkflowStarted", "UpdateAccepted", "UpdateCompleted"]
    decided = [("completed", b"7", None), ("rejected", None, '{"type":"No"}')]
    assert db.updates(run, "u", "v") == decided
    closing = step(other, 3, ("WorkflowCompleted",))
    closing.close = "completed"
    assert worker.advance(closing) == ["ok"]
    assert db.updates(run, "u", "v") == decided
    assert db.update(run, "u") == "duplicate"


def test_no_run_closes_over_an_update_that_its_code_was_not_given(db: Session) -> None:
    run, worker = begin(db)
    db.post(run)
    task = worker.one()
    taken = inbox_ids(db, run)
    db.update(run, "u")
    closing = step(task, 1, ("WorkflowCompleted",))
    closing.close, closing.inbox = "completed", taken
    assert worker.advance(closing) == ["refused"]
    db.terminate(run)
    assert db.updates(run, "u") == [("closed", None, None)]
    with pytest.raises(Exception, match="takes no more signals and updates"):
        _raise(db, run, "v")


def _raise(db: Session, run: bytes, id: str) -> None:
    request = RequestUpdate(run, None, id, "set", b"{}")
    RequestUpdate.settle(
        [request], db.call("request_updates", *RequestUpdate.arguments([request], Context(db.sender, db.batches)))
    )
    assert request.error is not None
    raise request.error


def test_who_waits_for_an_update_is_notified(db: Session, connect: Callable[..., Session]) -> None:
    run, worker = begin(db)
    db.update(run, "u")
    listener = connect()
    channel = new_id()
    listener.sql(f'LISTEN "durable:c{uuid.UUID(bytes=channel)}"')
    db.call("get_updates", Uuids([run]), *_texts([None], ["u"]), Uuid(channel), 60_000)
    accepted = said(worker.one(), 1, "UpdateAccepted", "u")
    accepted.inbox = inbox_ids(db, run)
    worker.advance(accepted)
    assert len(list(listener.conn.notifies(timeout=5, stop_after=1))) == 1
    assert db.value("SELECT count(*) FROM durable.update_waiter") == 1
    db.post(run)
    done = said(worker.one(), 2, "UpdateCompleted", "u", failure={"type": "E"})
    done.inbox = inbox_ids(db, run)
    worker.advance(done)
    assert len(list(listener.conn.notifies(timeout=5, stop_after=1))) == 1
    assert db.value("SELECT count(*) FROM durable.update_waiter") == 0
    assert db.updates(run, "u") == [("completed", None, '{"type":"E"}')]


def _texts(*arrays: list[str | None]) -> list[Any]:
    return [Texts(a) for a in arrays]


# --- starts with a message -------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["SignalReceived", "UpdateRequested"])
def test_a_start_brings_its_message_once(db: Session, type: str) -> None:
    stream = db.stream()
    status, run = db.start_with(stream, "w", type, "k", conflict="use_existing")
    assert status == "started"
    assert db.start_with(stream, "w", type, "k", conflict="use_existing") == ("exists", run)
    assert db.start_with(stream, "w", type, "l", conflict="use_existing") == ("exists", run)
    assert db.start_with(stream, "w", type, "m", conflict="fail") == ("exists", run)
    assert [row[1] for row in db.inbox(run)] == [type, type]
    assert db.start_with(stream, "w2", "CancelRequested", "k")[0] == "denied"
    db.terminate(run)
    assert db.start_with(stream, "w", type, "new", conflict="use_existing", reuse="reject")[0] == "used"
    status, again = db.start_with(stream, "w", type, "k", conflict="use_existing")
    assert (status, again != run) == ("started", True)


def test_a_start_and_its_message_vanish_together(db: Session) -> None:
    stream = db.stream()
    db.begin()
    db.start_with(stream, "w", "SignalReceived", "k")
    db.rollback()
    assert db.value("SELECT count(*) FROM durable.run") == db.value("SELECT count(*) FROM durable.inbox") == 0


# --- from run to run -------------------------------------------------------------------------------------


def test_a_step_sends_signals_and_hears_what_became_of_them(db: Session) -> None:
    run, worker = begin(db, "sender")
    _, to = db.start(worker.streams[0], "receiver")
    worker.ack(worker.one())
    db.post(run)
    task = worker.one()
    taken = inbox_ids(db, run)
    sent = step(
        task,
        1,
        ("SignalSent", 1, "go", b"1", {"workflow_id": "receiver"}),
        ("CancelSent", 2, None, None, {"workflow_id": "nobody"}),
        ("ChildStarted", 3, "child", b"[]", {}),
        ("SignalSent", 4, "hi", b"2", {"workflow_id": "c", "child": 3}),
        ("SignalSent", 5, "self", None, {"workflow_id": "sender"}),
    )
    sent.children, sent.inbox = [start_child(worker.streams[0], 3, "c")], taken
    assert worker.advance(sent) == ["ok"]
    assert [row[1:5] for row in db.inbox(to)] == [("SignalReceived", None, "go", b"1")]
    assert [row[1:5] for row in db.inbox(derived(run, 3))] == [("SignalReceived", None, "hi", b"2")]
    assert [(row[1], row[2]) for row in db.inbox(run)] == [
        ("MessageDelivered", 1),
        ("MessageFailed", 2),
        ("MessageDelivered", 4),
        ("SignalReceived", None),
        ("MessageDelivered", 5),
    ]


def test_a_signal_reaches_who_goes_on_in_the_same_call(db: Session) -> None:
    run, worker = begin(db, "sender")
    _, to = db.start(worker.streams[0], "receiver")
    worker.ack(worker.one())
    db.post(run)
    db.post(to)
    task, other = worker.claim(2)
    if task.run_id != run:
        task, other = other, task
    goes_on = step(other, 1, ("WorkflowContinuedAsNew", None, "wf", b"{}", {"facts": {}}))
    goes_on.close, goes_on.inbox = "continued_as_new", inbox_ids(db, to)
    sent = step(task, 1, ("SignalSent", 1, "go", b"1", {"workflow_id": "receiver"}), ("WorkflowCompleted",))
    sent.close, sent.inbox = "completed", inbox_ids(db, run)
    assert worker.advance(sent, goes_on) == ["ok", "ok"]
    assert [row[1:4] for row in db.inbox(derived(to, "next"))] == [("SignalReceived", None, "go")]
    # Who has closed needs no news.
    assert db.inbox(run) == []


def test_a_step_waits_for_nobody_who_closes_the_other_run(db: Session, connect: Callable[..., Session]) -> None:
    run, worker = begin(db, "sender")
    _, to = db.start(worker.streams[0], "receiver")
    worker.ack(worker.one())
    db.post(run)
    task = worker.one()
    closer = connect()
    closer.begin()
    closer.terminate(to)
    sent = step(task, 1, ("SignalSent", 1, "go", b"1", {"workflow_id": "receiver"}))
    sent.inbox = inbox_ids(db, run)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        worker.advance(sent)
    assert db.run(run) == ("running", 1)
    closer.commit()
    assert worker.advance(sent) == ["ok"]
    assert [(row[1], row[5]) for row in db.inbox(run)] == [("MessageFailed", {"reason": "closed"})]


def test_a_signal_for_a_run_that_is_closing_waits_and_is_told(db: Session, connect: Callable[..., Session]) -> None:
    run, _ = begin(db)
    closer, sender = connect(), connect()
    closer.begin()
    closer.terminate(run)
    asked = in_background(lambda: _raise(sender, run, "u"))
    wait_until(lambda: db.is_blocked(sender), message="the update waits")
    closer.commit()
    with pytest.raises(Exception, match="has ended"):
        asked()


# --- queries ---------------------------------------------------------------------------------------------


def test_a_query_is_asked_answered_and_taken_once(db: Session) -> None:
    run, worker = begin(db)
    query, known, heard, queue = db.ask(run)
    assert (known, heard, queue) == (True, True, db.value("SELECT name FROM durable.stream"))
    asked = worker.one()
    assert (asked.kind, asked.message_id, asked.run_id) == ("q", query, run)
    assert worker.call("query_of_lease", Uuid(query), Uuid(asked.lease)) == [("how", b"{}", False, True)]
    assert db.call("take_answers", Uuids([query])) == []
    assert worker.answer(asked, b"42")
    assert not worker.answer(asked, b"43")
    assert db.call("take_answers", Uuids([query])) == [(query, b"42", None)]
    assert db.call("take_answers", Uuids([query])) == []
    assert db.events(run) == ["WorkflowStarted"]


def test_a_query_that_nobody_waits_for_is_gone(db: Session) -> None:
    run, worker = begin(db)
    db.call("withdraw_query", Uuid(db.ask(run)[0]))
    assert worker.claim() == []
    query = db.ask(run)[0]
    leased = worker.one()
    db.call("withdraw_query", Uuid(query))
    assert worker.call("query_of_lease", Uuid(query), Uuid(leased.lease)) == []
    assert worker.answer(leased)
    assert db.call("take_answers", Uuids([query])) == []
    db.ask(run, wait=0)
    late = worker.one()
    assert worker.call("query_of_lease", Uuid(late.message_id), Uuid(late.lease)) == []
    worker.call("sweep")
    assert db.value("SELECT count(*) FROM durable.run_query") == 0


def test_nothing_is_asked_where_nobody_listens(db: Session) -> None:
    _, run = db.start(db.stream(), "w")
    assert db.ask(run, heard=True)[:3] == (None, True, False)
    assert db.value("SELECT count(*) FROM durable.message WHERE kind = 'q'") == 0
    query, known, heard, _ = db.ask(run)
    assert (query is not None, known, heard) == (True, True, False)


def test_pending_news_and_a_run_that_has_not_begun_are_told(db: Session) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    worker = db.register(stream)
    first = worker.one()
    db.ask(run)
    asked = worker.one()
    look = lambda: worker.call("query_of_lease", Uuid(asked.message_id), Uuid(asked.lease))[0][2:]  # noqa: E731
    assert look() == (False, False)
    worker.ack(first)
    assert look() == (False, True)
    db.post(run)
    assert look() == (True, True)
