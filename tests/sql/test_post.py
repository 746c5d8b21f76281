from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.support import wait_until

from .api import Session, in_background, new_id, step


def test_a_signal_lies_in_the_inbox_and_a_task_follows(db: Session) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    worker = db.register(stream)
    worker.ack(worker.one())
    assert db.post(run, name="go", payload=b"x") == "ok"
    assert [row[1:5] for row in db.inbox(run)] == [("SignalReceived", None, "go", b"x")]
    task = worker.one()
    assert (task.kind, task.run_id) == ("t", run)


def test_by_workflow_id_the_live_run_is_meant_and_else_the_latest(db: Session) -> None:
    stream = db.stream()
    _, first = db.start(stream, "w")
    db.terminate(first)
    assert db.post(None, workflow_id="w") == "closed"
    _, second = db.start(stream, "w")
    assert db.post(None, workflow_id="w") == "ok"
    assert (len(db.inbox(first)), len(db.inbox(second))) == (0, 1)


def test_the_same_key_twice_is_one_signal(db: Session) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    _, other = db.start(stream, "w2")
    assert [db.post(run, key="k"), db.post(run, key="k"), db.post(run, key="l")] == ["ok", "duplicate", "ok"]
    assert db.post(other, key="k") == "ok", "a key is the run's own"
    assert len(db.inbox(run)) == 2


def test_the_same_key_at_once_is_one_signal(connect: Callable[..., Session]) -> None:
    one, other, watcher = connect(), connect(), connect()
    _, run = one.start(one.stream(), "w")
    one.begin()
    assert one.post(run, key="k") == "ok"
    second = in_background(lambda: other.post(run, key="k"))
    wait_until(lambda: watcher.is_blocked(other), message="the second signal waits")
    one.commit()
    assert second() == "duplicate"
    assert len(watcher.inbox(run)) == 1


def test_signals_of_different_keys_do_not_wait_for_each_other(connect: Callable[..., Session]) -> None:
    one, other = connect(), connect()
    _, run = one.start(one.stream(), "w")
    one.begin()
    assert one.post(run, key="k") == "ok"
    assert other.post(run, key="l") == "ok"
    one.commit()
    assert len(other.inbox(run)) == 2


def test_closed_and_missing(db: Session) -> None:
    _, run = db.start(db.stream(), "w")
    db.terminate(run)
    assert db.post(run) == "closed"
    assert db.post(new_id()) == "missing"
    assert db.post(None, workflow_id="nobody") == "missing"
    assert db.terminate(run) == "closed"
    assert db.terminate(new_id()) == "missing"
    assert db.inbox(run) == []


@pytest.mark.parametrize("type", ["ActivityCompleted", "ChildCompleted", "TimerFired", "WorkflowStarted", ""])
def test_nobody_can_post_an_event_of_the_engine(db: Session, type: str) -> None:
    _, run = db.start(db.stream(), "w")
    assert db.post(run, type=type) == "missing"
    assert db.inbox(run) == []


def test_a_signals_name_and_key_are_capped(db: Session) -> None:
    _, run = db.start(db.stream(), "w")
    for too_long in ({"name": "n" * 201}, {"key": "k" * 201}, {"key": ""}, {"payload": bytes(16 * 1024 * 1024 + 1)}):
        with pytest.raises(psycopg.errors.CheckViolation):
            db.post(run, **too_long)  # type: ignore[arg-type]
    assert db.inbox(run) == []


def test_a_signal_in_an_open_transaction_does_not_hold_up_a_step_but_the_close(connect: Callable[..., Session]) -> None:
    sender, db = connect(), connect()
    stream = db.stream()
    _, run = db.start(stream, "w")
    worker = db.register(stream)
    task = worker.one()
    sender.begin()
    assert sender.post(run, name="late") == "ok"
    # Both are answered at once: statement_timeout would end a wait.
    db.sql("SET lock_timeout = '50ms'")
    assert worker.advance(step(task, 1, ("TimerStarted", 1))) == ["ok"]
    assert db.post(run, name="other") == "ok"
    task = worker.one()
    took = [row[0] for row in db.inbox(run)]
    closing = step(
        task, 2, ("SignalReceived", None, "other"), ("WorkflowCompleted", None), close="completed", inbox=took
    )
    assert worker.advance(closing) == ["refused"]
    assert db.run(run) == ("running", 2)
    sender.commit()
    assert worker.advance(closing) == ["refused"], "the signal is there now, and unread"
    took = [row[0] for row in db.inbox(run)]
    closing.inbox = took
    assert worker.advance(closing) == ["ok"]
    assert db.run(run) == ("completed", 4)
    assert db.inbox(run) == []


def test_a_signal_to_a_run_that_is_closing_waits_and_finds_it_closed(connect: Callable[..., Session]) -> None:
    one, other, watcher = connect(), connect(), connect()
    _, run = one.start(one.stream(), "w")
    one.begin()
    assert one.terminate(run) == "ok"
    posted = in_background(lambda: other.post(run))
    wait_until(lambda: watcher.is_blocked(other), message="the signal waits")
    one.commit()
    assert posted() == "closed"
    assert watcher.inbox(run) == []
