from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import psycopg
import pytest

from dramatiq_durable.arrays import Uuid
from tests.support import wait_until

from .api import Claimed, Session, Worker, derived, in_background, send_activity, send_timer, start_child, step


class Begun(NamedTuple):
    """A run whose first task is leased."""

    stream: int
    run: bytes
    worker: Worker
    task: Claimed


def begin(db: Session, *streams: int, workflow_id: str = "w") -> Begun:
    stream = db.stream()
    _, run = db.start(stream, workflow_id)
    worker = db.register(stream, *streams)
    return Begun(stream, run, worker, worker.one())


@pytest.fixture
def begun(db: Session) -> Begun:
    return begin(db)


def test_a_step_records_its_events_and_ends_its_task(db: Session, begun: Begun) -> None:
    advance = step(begun.task, 1, ("TimerStarted", 1, "t", b"p", {"ms": 5}), ("ActivityScheduled", 2, "act"))
    advance.sends = [send_timer(begun.stream, 1), send_activity(begun.stream, 2)]
    assert begun.worker.advance(advance) == ["ok"]
    assert db.run(begun.run) == ("running", 3)
    assert db.events(begun.run) == ["WorkflowStarted", "TimerStarted", "ActivityScheduled"]
    (activity,) = begun.worker.claim()
    assert (activity.kind, activity.seq, activity.payload) == ("a", 2, b"payload")
    assert db.messages(begun.stream) == 2, "the task is gone"


def test_who_does_not_know_the_last_event_may_not_go_on(db: Session, begun: Begun) -> None:
    for expected in (0, 2):
        advance = step(begun.task, expected, ("TimerStarted", 1))
        advance.sends = [send_timer(begun.stream, 1)]
        assert begun.worker.advance(advance) == ["refused"]
    assert db.run(begun.run) == ("running", 1)
    assert db.events(begun.run) == ["WorkflowStarted"]
    assert db.messages(begun.stream) == 1
    assert begun.worker.advance(step(begun.task, 1, ("TimerStarted", 1))) == ["ok"], "the lease is live still"


def test_a_stale_lease_changes_nothing(db: Session, begun: Begun) -> None:
    begun.worker.release(begun.task)
    again = begun.worker.one()
    assert begun.worker.advance(step(begun.task, 1, ("WorkflowCompleted", None), close="completed")) == ["stale"]
    assert db.run(begun.run) == ("running", 1)
    assert begun.worker.advance(step(again, 1, ("TimerStarted", 1))) == ["ok"]
    assert begun.worker.advance(step(again, 2, ("TimerStarted", 2))) == ["stale"], "a repeated call is a no-op"
    assert db.events(begun.run) == ["WorkflowStarted", "TimerStarted"]


def test_another_workers_lease_is_stale(db: Session, begun: Begun) -> None:
    other = db.register(begun.stream)
    assert other.advance(step(begun.task, 1, ("TimerStarted", 1))) == ["stale"]


def test_one_bad_step_fails_alone(db: Session, begun: Begun) -> None:
    _, run2 = db.start(begun.stream, "w2")
    _, run3 = db.start(begun.stream, "w3")
    second, third = begun.worker.claim()
    assert begun.worker.advance(
        step(begun.task, 1, ("TimerStarted", 1)),
        step(second, 5, ("TimerStarted", 1)),
        step(third, 1, ("TimerStarted", 1)),
    ) == ["ok", "refused", "ok"]
    assert [db.run(r)[1] for r in (begun.run, run2, run3)] == [2, 1, 2]


def two_activities(db: Session, begun: Begun) -> list[Claimed]:
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"), ("ActivityScheduled", 2, "b"))
    advance.sends = [send_activity(begun.stream, 1), send_activity(begun.stream, 2)]
    assert begun.worker.advance(advance) == ["ok"]
    return begun.worker.claim()


def test_two_steps_of_a_run_in_one_call(db: Session, begun: Begun) -> None:
    first, second = two_activities(db, begun)
    one = step(first, 3, ("ActivityCompleted", 1, "a", b"1"), ("ActivityScheduled", 3, "c"))
    one.sends = [send_activity(begun.stream, 3)]
    two = step(second, 5, ("ActivityCompleted", 2, "b", b"2"))
    assert begun.worker.advance(one, two) == ["ok", "ok"]
    assert db.run(begun.run) == ("running", 6)
    assert db.events(begun.run)[3:] == ["ActivityCompleted", "ActivityScheduled", "ActivityCompleted"]
    assert [c.seq for c in begun.worker.claim()] == [3]


def test_a_step_on_a_refused_step_is_refused(db: Session, begun: Begun) -> None:
    first, second = two_activities(db, begun)
    one = step(first, 99, ("ActivityCompleted", 1, "a"))
    two = step(second, 100, ("ActivityCompleted", 2, "b"))
    assert begun.worker.advance(one, two) == ["refused", "refused"]
    assert db.run(begun.run) == ("running", 3)


def test_a_step_on_a_closing_step_is_refused(db: Session, begun: Begun) -> None:
    first, second = two_activities(db, begun)
    one = step(first, 3, ("ActivityCompleted", 1, "a"), ("WorkflowCompleted", None), close="completed")
    two = step(second, 5, ("ActivityCompleted", 2, "b"))
    assert begun.worker.advance(one, two) == ["ok", "refused"]
    assert db.run(begun.run) == ("completed", 5)


def test_one_delivery_is_good_for_one_step(db: Session, begun: Begun) -> None:
    one, two = step(begun.task, 1, ("TimerStarted", 1)), step(begun.task, 2, ("TimerStarted", 2))
    with pytest.raises(psycopg.errors.SerializationFailure):
        begun.worker.advance(one, two)
    assert db.run(begun.run) == ("running", 1)


def test_a_run_that_another_transaction_steps_is_refused_at_once(connect: Callable[..., Session]) -> None:
    db, other = connect(), connect()
    begun = begin(db)
    first, second = two_activities(db, begun)
    other.begin()
    assert begun.worker.over(other).advance(step(first, 3, ("ActivityCompleted", 1, "a"))) == ["ok"]
    db.sql("SET lock_timeout = '50ms'")
    assert begun.worker.advance(step(second, 3, ("ActivityCompleted", 2, "b"))) == ["refused"]
    assert begun.worker.complete(second) == [], "the outcome alone is recorded without waiting"
    other.commit()
    assert db.run(begun.run) == ("running", 4)
    assert [row[1:3] for row in db.inbox(begun.run)] == [("ActivityCompleted", 2)]


def test_a_lease_that_is_lost_meanwhile_records_nothing(connect: Callable[..., Session]) -> None:
    """The activity is handed out again: its outcome would be recorded twice."""
    db, one, other = connect(), connect(), connect()
    begun = begin(one)
    first, _ = two_activities(one, begun)
    peer = other.register(begun.stream)
    beat = peer.heartbeat()[begun.worker.id]
    db.silence(begun.worker)
    other.begin()
    assert peer.reclaim(begun.worker, beat) == (2, 0)
    late = in_background(lambda: begun.worker.advance(step(first, 3, ("ActivityCompleted", 1, "a"))))
    wait_until(lambda: db.is_blocked(one), message="the step waits for the reclaim")
    other.commit()
    with pytest.raises(psycopg.errors.SerializationFailure):
        late()
    assert db.run(begun.run) == ("running", 3)
    assert {c.seq for c in peer.claim()} == {1, 2}


# --- handing out ------------------------------------------------------------------------------------------


def test_an_eager_activity_is_leased_at_once(db: Session, begun: Begun) -> None:
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "act"), ("ActivityScheduled", 2, "act"))
    advance.sends = [send_activity(begun.stream, 1, eager=True), send_activity(begun.stream, 2)]
    assert begun.worker.advance(advance) == ["ok"]
    assert list(advance.eager) == [1]
    message = derived(begun.run, 1)
    assert message in db.held(begun.worker)
    (other,) = db.register(begun.stream).claim()
    assert other.seq == 2
    eager = Claimed(message, advance.eager[1], begun.stream, "a", begun.run, 1, 1, False, "act", b"payload", 0.0)
    assert begun.worker.advance(step(eager, 3, ("ActivityCompleted", 1, "act"))) == ["ok"]
    assert db.run(begun.run) == ("running", 4)


def test_an_eager_activity_of_a_dead_worker_comes_back(db: Session, begun: Begun) -> None:
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(begun.stream, 1, eager=True)]
    begun.worker.advance(advance)
    peer = db.register(begun.stream)
    db.silence(begun.worker)
    assert peer.reclaim(begun.worker) == (1, 0)
    assert peer.one().seq == 1


def test_eager_never_hands_out_what_a_claim_would_not(db: Session) -> None:
    paused = db.stream("paused")
    begun = begin(db, paused)
    db.sql("UPDATE durable.stream SET paused = true WHERE stream_id = %s", paused)
    advance = step(begun.task, 1, *[("ActivityScheduled", n, "act") for n in (1, 2, 3)])
    advance.sends = [
        send_activity(paused, 1, eager=True),
        send_activity(begun.stream, 2, eager=True, delay=60_000),
        send_activity(begun.stream, 3, eager=True),
    ]
    assert begun.worker.advance(advance) == ["ok"]
    assert list(advance.eager) == [3]
    assert begun.worker.claim() == []


def test_a_dropped_command_is_withdrawn(db: Session, begun: Begun) -> None:
    advance = step(begun.task, 1, ("TimerStarted", 1), ("TimerStarted", 2), ("ActivityScheduled", 3, "a"))
    advance.sends = [send_timer(begun.stream, 1), send_timer(begun.stream, 2), send_activity(begun.stream, 3)]
    begun.worker.advance(advance)
    (activity,) = begun.worker.claim()
    db.post(begun.run)
    task = begun.worker.one()
    dropping = step(task, 4, ("TimerCancelled", 1), drops=[1, 3, 77])
    assert begun.worker.advance(dropping) == ["ok"]
    left = db.sql("SELECT seq FROM durable.message WHERE seq IS NOT NULL ORDER BY seq")
    assert left == [(2,), (3,)], "what is leased is left to its worker"
    assert begun.worker.complete(activity) == []


def test_a_drop_finds_what_a_step_before_it_in_the_call_sends(db: Session, begun: Begun) -> None:
    """Two activities end together: what follows from the first starts a timer, from the second its cancel."""
    scheduling = step(begun.task, 1, ("ActivityScheduled", 1, "a"), ("ActivityScheduled", 2, "a"))
    scheduling.sends = [send_activity(begun.stream, 1), send_activity(begun.stream, 2)]
    begun.worker.advance(scheduling)
    one, two = begun.worker.claim(2)
    starting = step(one, 3, ("ActivityCompleted", 1), ("TimerStarted", 3))
    starting.sends = [send_timer(begun.stream, 3)]
    dropping = step(two, 5, ("ActivityCompleted", 2), ("TimerCancelled", 3), drops=[3])
    dropping.before = starting
    assert begun.worker.advance(starting, dropping) == ["ok", "ok"]
    assert db.sql("SELECT seq FROM durable.message WHERE kind = 'w'") == []


def test_a_drop_does_not_wait_for_a_claim_under_way(connect: Callable[..., Session]) -> None:
    db, other = connect(), connect()
    begun = begin(db)
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"))
    advance.sends = [send_activity(begun.stream, 1)]
    begun.worker.advance(advance)
    claimer = other.register(begun.stream)
    other.begin()
    claimed = claimer.one()
    db.post(begun.run)
    task = begun.worker.one()
    db.sql("SET lock_timeout = '50ms'")
    assert begun.worker.advance(step(task, 2, ("ActivityCancelRequested", 1), drops=[1])) == ["ok"]
    other.commit()
    assert claimer.complete(claimed) == []


def test_taken_inbox_items_are_gone_and_others_stay(db: Session, begun: Begun) -> None:
    db.post(begun.run, name="one")
    db.post(begun.run, name="two")
    first = db.inbox(begun.run)[0][0]
    advance = step(begun.task, 1, ("SignalReceived", None, "one"), inbox=[first])
    assert begun.worker.advance(advance) == ["ok"]
    assert [row[3] for row in db.inbox(begun.run)] == ["two"]


def test_inbox_items_of_another_run_cannot_be_taken(db: Session, begun: Begun) -> None:
    _, other = db.start(begun.stream, "other")
    db.post(other)
    foreign = db.inbox(other)[0][0]
    assert begun.worker.advance(step(begun.task, 1, ("SignalReceived", None, "go"), inbox=[foreign])) == ["refused"]
    assert len(db.inbox(other)) == 1


# --- activities that end without a step -------------------------------------------------------------------


def test_an_outcome_alone_goes_into_the_inbox(db: Session, begun: Begun) -> None:
    first, second = two_activities(db, begun)
    assert begun.worker.complete(first, payload=b"42") == []
    assert begun.worker.complete(second, type="ActivityFailed") == []
    assert [row[1:5] for row in db.inbox(begun.run)] == [
        ("ActivityCompleted", 1, "act", b"42"),
        ("ActivityFailed", 2, "act", b"2"),
    ]
    tasks = begun.worker.claim()
    assert [t.kind for t in tasks] == ["t", "t"]
    assert begun.worker.complete(first) == [1], "repeated: refused, and nothing is recorded twice"
    assert len(db.inbox(begun.run)) == 2


@pytest.mark.parametrize("type", ["SignalReceived", "ChildCompleted", "TimerFired", "WorkflowCompleted"])
def test_an_activity_cannot_record_anything_but_its_outcome(db: Session, begun: Begun, type: str) -> None:
    first, _ = two_activities(db, begun)
    assert begun.worker.complete(first, type=type) == [1]
    assert db.inbox(begun.run) == []


def test_a_task_is_not_an_activity(db: Session, begun: Begun) -> None:
    assert begun.worker.complete(begun.task) == [1]
    assert begun.worker.fail_task(begun.task) is True


def test_an_activity_of_a_closed_run_leaves_nothing(db: Session, begun: Begun) -> None:
    first, _ = two_activities(db, begun)
    db.terminate(begun.run)
    assert begun.worker.complete(first) == []
    assert db.inbox(begun.run) == []
    assert begun.worker.advance(step(begun.task, 4, ("TimerStarted", 1))) == ["stale"]


def test_a_failed_task_comes_again_and_shows_why(db: Session, begun: Begun) -> None:
    assert begun.worker.fail_task(begun.task, 60_000) is True
    assert db.value("SELECT task_failure FROM durable.run WHERE run_id = %s", Uuid(begun.run)) == "broken"
    assert begun.worker.claim() == []
    assert begun.worker.fail_task(begun.task) is False
    db.sql("UPDATE durable.message SET due_at = clock_timestamp()")
    again = begun.worker.one()
    assert again.attempt == 2
    assert begun.worker.advance(step(again, 1, ("TimerStarted", 1))) == ["ok"]
    assert db.value("SELECT task_failure FROM durable.run WHERE run_id = %s", Uuid(begun.run)) is None


# --- children ---------------------------------------------------------------------------------------------


def test_a_child_is_a_run_that_knows_its_parent(db: Session, begun: Begun) -> None:
    other = db.stream("other")
    advance = step(begun.task, 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(other, 1, "c-1")]
    assert begun.worker.advance(advance) == ["ok"]
    child = derived(begun.run, 1)
    assert db.run(child) == ("running", 1)
    assert db.sql("SELECT parent_run_id, parent_seq FROM durable.run WHERE run_id = %s", Uuid(child)) == [
        (begun.run, 1)
    ]
    worker = db.register(other)
    closing = step(worker.one(), 1, ("WorkflowCompleted", None, "child", b"7"), close="completed")
    assert worker.advance(closing) == ["ok"]
    assert [row[1:5] for row in db.inbox(begun.run)] == [("ChildCompleted", 1, "child", b"7")]
    assert begun.worker.one().kind == "t"


def test_a_child_whose_workflow_id_is_taken(db: Session, begun: Begun) -> None:
    _, live = db.start(begun.stream, "c-1")
    advance = step(begun.task, 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(begun.stream, 1, "c-1")]
    assert begun.worker.advance(advance) == ["ok"]
    assert [row[1:4] for row in db.inbox(begun.run)] == [("ChildStartFailed", 1, "child")]
    assert db.run(live) == ("running", 1)
    assert {c.run_id for c in begun.worker.claim()} == {live, begun.run}


def test_a_child_can_be_cancelled(db: Session, begun: Begun) -> None:
    advance = step(begun.task, 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(begun.stream, 1, "c-1")]
    begun.worker.advance(advance)
    db.post(begun.run)
    task = next(c for c in begun.worker.claim() if c.run_id == begun.run)
    cancelling = step(task, 2, ("ChildCancelRequested", 1), cancels=[1, 5])
    assert begun.worker.advance(cancelling) == ["ok"]
    assert [row[1] for row in db.inbox(derived(begun.run, 1))] == ["CancelRequested"]


def test_a_step_to_a_missing_stream_is_refused_whole(db: Session, begun: Begun) -> None:
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"))
    advance.sends = [send_activity(2**31 - 1, 1)]
    with pytest.raises(psycopg.Error) as error:
        begun.worker.advance(advance)
    assert error.value.sqlstate == "DD001"
    assert db.run(begun.run) == ("running", 1)
