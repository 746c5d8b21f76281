from __future__ import annotations

import json
from collections.abc import Callable

import psycopg
import pytest

from dramatiq_durable.arrays import Uuid

from .api import Session, Worker, derived, new_id, send_activity, step


def die(db: Session, worker: Worker, peer: Worker) -> tuple[int, int]:
    db.silence(worker)
    return peer.reclaim(worker)


def test_a_dead_workers_messages_come_back(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2", b"3")
    worker, peer = db.register(stream), db.register(stream)
    first, second = worker.claim(2)
    worker.ack(first)
    assert die(db, worker, peer) == (1, 0)
    claimed = peer.claim()
    assert [(c.payload, c.attempt, c.reclaimed) for c in claimed] == [(b"2", 1, True), (b"3", 1, False)]
    assert worker.id not in peer.heartbeat()
    for call in (lambda: worker.ack(second), worker.claim, worker.heartbeat):
        with pytest.raises(psycopg.Error) as error:
            call()
        assert error.value.sqlstate == "DD002"
    assert peer.ack(*claimed) == []


def test_a_live_worker_is_not_reclaimed(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker, peer = db.register(stream, delay=60_000), db.register(stream)
    claimed = worker.one()
    assert peer.reclaim(worker) == (0, 0)
    assert worker.ack(claimed) == []


def test_a_beat_that_moved_saves_the_worker(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker, peer = db.register(stream), db.register(stream)
    claimed = worker.one()
    seen = peer.heartbeat()[worker.id]
    worker.heartbeat()
    db.silence(worker)
    assert peer.reclaim(worker, seen) == (0, 0)
    assert worker.ack(claimed) == []


def test_time_before_the_servers_start_does_not_count(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker, peer = db.register(stream), db.register(stream)
    worker.one()
    db.sql(
        "UPDATE durable.worker SET beat_at = beat_at - interval '10 years', "
        "reclaim_delay = clock_timestamp() - pg_postmaster_start_time() + interval '1 minute' WHERE worker_id = %s",
        worker.id,
    )
    assert peer.reclaim(worker) == (0, 0)
    db.silence(worker)
    assert peer.reclaim(worker) == (1, 0)


def test_two_peers_reclaim_once(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    worker, peer, other = db.register(stream), db.register(stream), db.register(stream)
    worker.one()
    seen = other.heartbeat()[worker.id]
    assert die(db, worker, peer) == (1, 0)
    assert other.reclaim(worker, seen) == (0, 0)


def test_what_was_only_prefetched_is_no_poison(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    peer = db.register(stream)
    for _ in range(6):
        worker = db.register(stream, count=1)
        assert worker.one().attempt == 1
        assert die(db, worker, peer) == (1, 0)
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 0


def test_a_message_that_keeps_killing_workers_is_poison(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"good", actor="killer")
    peer = db.register(stream)
    outcomes = []
    for _ in range(4):
        worker = db.register(stream, count=3)
        for claimed in worker.claim():
            # A worker records the beginning of a reclaimed delivery only; the others only die once.
            if claimed.reclaimed and claimed.payload == b"1":
                assert worker.mark_started(claimed) == []
        outcomes.append(die(db, worker, peer))
    assert outcomes == [(2, 0), (2, 0), (2, 0), (1, 1)]
    # Its first delivery was not known to have begun.
    dead = db.sql("SELECT reason, actor, deaths, attempt, payload FROM durable.dead_letter")
    assert dead == [("poison", "killer", 3, 3, b"1")]
    assert [c.payload for c in peer.claim()] == [b"good"]


def test_poison_takes_no_other_streams_message_of_the_same_id(db: Session) -> None:
    stream, other, message = db.stream(), db.stream("other"), new_id()
    db.enqueue([stream, other], b"killer", b"innocent", ids=[message, message])
    peer = db.register(stream)
    for _ in range(2):
        worker = db.register(stream, count=1)
        worker.mark_started(worker.one())
        outcome = die(db, worker, peer)
        if outcome == (0, 1):
            break
    assert outcome == (0, 1)
    assert [c.payload for c in db.register(other).claim()] == [b"innocent"]


def test_a_poison_activity_fails_in_its_run(db: Session) -> None:
    stream, activities = db.stream(), db.stream("activities")
    _, run = db.start(stream, "w")
    runner = db.register(stream)
    task = runner.one()
    advance = step(task, 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(activities, 1)]
    assert runner.advance(advance) == ["ok"]
    worker, peer = db.register(activities, count=1), db.register(activities)
    worker.mark_started(worker.one())
    assert die(db, worker, peer) == (0, 1)
    ((_, type, seq, _, _, attributes),) = db.inbox(run)
    assert (type, seq) == ("ActivityFailed", 1)
    failure = attributes["failure"] if isinstance(attributes, dict) else json.loads(attributes)["failure"]
    assert (failure["retryable"], failure["attempt"]) == (False, 1)
    assert runner.one().kind == "t"
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 0


def test_a_workflow_task_is_slowed_down_but_never_dead_lettered(db: Session) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    peer = db.register(stream)
    for deaths in range(1, 6):
        worker = db.register(stream, count=1)
        worker.mark_started(worker.one())
        assert die(db, worker, peer) == (1, 0)
        claimed, next_due = peer.look()
        assert claimed == []
        assert next_due is not None
        assert next_due >= 2 ** (deaths - 1) * 900
        db.sql("UPDATE durable.message SET due_at = clock_timestamp()")
    assert db.run(run) == ("running", 1)
    assert peer.one().message_id == run


def test_resync_gives_back_what_is_not_named(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2", b"3")
    worker, peer = db.register(stream), db.register(stream)
    first, second, third = worker.claim()
    worker.resync(second.message_id, None, new_id())
    assert db.held(worker) == {second.message_id}
    assert worker.ack(first, second, third) == [1, 3]
    claimed = peer.claim()
    assert [(c.payload, c.attempt, c.reclaimed) for c in claimed] == [(b"1", 1, False), (b"3", 1, False)]


def test_resync_without_names_gives_all_back(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    worker.claim()
    worker.resync(None)
    assert [c.payload for c in worker.claim()] == [b"1", b"2"]


def test_a_resync_ends_what_is_under_way_with_the_old_token(db: Session) -> None:
    stream = db.stream()
    worker = db.register(stream)
    before = Worker(db, worker.token, worker.id, worker.streams)
    worker.resync()
    with pytest.raises(psycopg.Error) as error:
        before.claim()
    assert error.value.sqlstate == "DD002"
    assert worker.claim() == []


def test_a_heartbeat_names_the_peers_of_shared_streams(db: Session) -> None:
    stream = db.stream()
    worker, peer = db.register(stream), db.register(stream)
    first = worker.heartbeat()[peer.id]
    peer.heartbeat()
    assert worker.heartbeat() == {peer.id: first + 1}


def test_ids_of_activities_are_derived(db: Session) -> None:
    stream = db.stream()
    _, run = db.start(stream, "w")
    worker = db.register(stream)
    advance = step(worker.one(), 1, ("ActivityScheduled", 7, "act"))
    advance.sends = [send_activity(stream, 7)]
    assert worker.advance(advance) == ["ok"]
    claimed = worker.one()
    assert (claimed.message_id, claimed.run_id, claimed.seq, claimed.kind) == (derived(run, 7), run, 7, "a")


def test_a_heartbeat_names_what_is_held_and_the_rest_goes_back(db: Session) -> None:
    stream = db.stream()
    worker, other = db.register(stream), db.register(stream)
    db.enqueue(stream, b"a", b"b", b"c")
    a, b, c = worker.claim()
    worker.heartbeat()
    assert other.claim() == []
    worker.heartbeat(holding=[a.message_id, None])
    again = other.claim()
    assert {d.message_id for d in again} == {b.message_id, c.message_id}
    assert worker.ack(a, b) == [2]
    # Naming what is not its own gives it nothing.
    worker.heartbeat(holding=[d.message_id for d in again])
    assert other.ack(*again) == []


def test_what_a_frozen_worker_has_locked_is_left_for_the_next_time(connect: Callable[..., Session]) -> None:
    db, frozen = connect(), connect()
    stream = db.stream()
    worker, peer = db.register(stream), db.register(stream)
    db.enqueue(stream, b"a", b"b")
    locked, free = worker.claim()
    db.silence(worker)
    with frozen.conn.transaction():
        frozen.sql("SELECT 1 FROM durable.message WHERE message_id = %s FOR UPDATE", Uuid(locked.message_id))
        assert peer.reclaim(worker) == (1, 0)
        assert [c.message_id for c in peer.claim()] == [free.message_id]
    assert peer.reclaim(worker) == (1, 0)
    assert [c.message_id for c in peer.claim()] == [locked.message_id]
    assert worker.id not in peer.heartbeat()
