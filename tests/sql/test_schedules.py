"""Schedules in SQL: ticks under leases, what is fired and what is not, and who may do it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Ints, Uuid
from dramatiq_durable.operations import Context, Due, FireSchedule, LookUpSchedule

from .api import Claimed, Session, in_background, step

#: A second, and milliseconds since the epoch long ago.
S = 1000
LONG_AGO = 1_600_000_000 * S


class Scene:
    """A schedule, and a worker on its stream."""

    def __init__(self, db: Session, **options: Any) -> None:
        self.db = db
        self.stream = db.stream()
        self.worker = db.register(self.stream)
        self.id = db.schedule("s", self.stream, **options)
        self.since(LONG_AGO)

    def since(self, ms: int) -> None:
        """As if its due times had been dealt with up to then."""
        self.db.sql("UPDATE durable.schedule SET seen_to = to_timestamp(%s)", ms / S)

    def tick(self) -> Claimed:
        """Claim the tick, and leave what it fired alone."""
        self.db.sql("UPDATE durable.message SET due_at = clock_timestamp() - interval '1 hour' WHERE kind = 'c'")
        tick, *others = sorted(self.worker.claim(1), key=lambda c: c.kind)
        assert (tick.kind, tick.message_id) == ("c", self.id)
        self.worker.release(*others)
        return tick

    def fire(self, *due: int) -> None:
        assert self.worker.fire(self.tick(), *due)

    def counts(self) -> tuple[int, int, int]:
        """(fired, skipped, missed)"""
        fired, skipped, missed = self.db.sql("SELECT fired, skipped, missed FROM durable.schedule")[0]
        return int(fired), int(skipped), int(missed)

    def sent(self) -> int:
        return int(self.db.value("SELECT count(*) FROM durable.message WHERE kind <> 'c'"))

    def drop(self) -> None:
        """All that it fired has ended."""
        self.db.sql("DELETE FROM durable.message WHERE kind <> 'c'")
        self.db.sql("UPDATE durable.run SET status = 'completed'")

    def waiting(self) -> int | None:
        at = self.db.value("SELECT extract(epoch FROM waiting)::bigint FROM durable.schedule")
        return None if at is None else int(at) * S

    def due_in(self) -> float:
        """Seconds until the tick is due."""
        return float(
            self.db.value(
                "SELECT extract(epoch FROM due_at - clock_timestamp())::float8 FROM durable.message WHERE kind = 'c'"
            )
        )


@pytest.fixture
def scene(db: Session) -> Callable[..., Scene]:
    return lambda **options: Scene(db, **options)


def test_a_tick_is_a_message_that_only_schedules_see(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    tick = made.tick()
    assert tick.payload == b""
    assert made.worker.bury(tick) == [1], "a tick is no dead letter"
    assert db.value("SELECT durable.stream_is_empty(%s)", made.stream)
    assert db.sql("SELECT ready, leased, delayed FROM durable.stream_counts()") == [(0, 0, 0)]
    assert made.worker.release(tick) == []
    assert db.sql("SELECT ready, leased, delayed FROM durable.stream_counts()") == [(0, 0, 0)]
    db.call("flush_streams", Ints([made.stream]))
    assert made.tick()


def test_ticks_take_nobodys_place(db: Session) -> None:
    """However many schedules a stream has, its messages are handed out."""
    streams = [db.stream("a"), db.stream("b")]
    for stream in streams:
        for n in range(5):
            db.schedule(f"{stream}.{n}", stream)
        db.enqueue(stream, b"1", b"2", b"3")
    worker = db.register(*streams)
    claimed = worker.claim(2)
    assert sorted(c.kind for c in claimed) == ["c"] * 5 + ["m"] * 2
    claimed = worker.claim(100)
    assert sorted(c.kind for c in claimed) == ["c"] * 5 + ["m"] * 4


def test_no_more_than_a_hundred_ticks_at_once(db: Session) -> None:
    stream = db.stream()
    for n in range(130):
        db.schedule(f"s{n}", stream)
    db.enqueue(stream, b"1", b"2")
    worker = db.register(stream)
    first = worker.claim(1)
    assert 100 <= len(first) <= 101
    second = worker.claim(2)
    assert sorted(c.kind for c in first + second) == ["c"] * 130 + ["m"] * 2


def test_a_worker_is_told_what_it_needs(scene: Callable[..., Scene]) -> None:
    made = scene(cron="0 6 * * *", template=b"what is sent", catch_up=60_000)
    facts = made.worker.look_up(made.tick())
    assert facts is not None
    assert facts[:-1] == [made.id, "s", "m", b"what is sent", "0 6 * * *", "UTC", 60_000, LONG_AGO, None]
    now = made.db.value("SELECT extract(epoch FROM clock_timestamp())::float8")
    assert now - 10 < facts[-1] / S <= now


def test_times_are_rounded_down(scene: Callable[..., Scene]) -> None:
    """A due time that follows by less than a millisecond is still to come."""
    made = scene()
    made.db.sql("UPDATE durable.schedule SET seen_to = to_timestamp(1600000000.9999)")
    facts = made.worker.look_up(made.tick())
    assert facts is not None
    assert facts[7] == 1_600_000_000_999


def test_each_due_time_is_fired_once_and_in_order(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    made.fire(*(LONG_AGO + n * S for n in (1, 2, 3)))
    assert made.counts() == (3, 0, 0)
    assert [c.payload for c in made.worker.claim()] == [b"payload"] * 3
    # Again, in the wrong order, not a whole second, in the future: none of it.
    made.fire(LONG_AGO + 2 * S, LONG_AGO + 3 * S, LONG_AGO + 4 * S + 1, LONG_AGO * 3)
    made.fire(LONG_AGO + 6 * S, LONG_AGO + 5 * S)
    assert made.counts() == (4, 0, 0)
    assert db.value("SELECT extract(epoch FROM last_due)::bigint FROM durable.schedule") * S == LONG_AGO + 6 * S


def test_the_tick_comes_back_at_the_next_due_time(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    now = int(db.value("SELECT floor(extract(epoch FROM clock_timestamp()))::bigint"))
    assert made.worker.fire(made.tick(), seen=now * S, missed=7, next=(now + 60) * S)
    assert 50 < made.due_in() <= 60
    assert made.counts() == (0, 0, 7)
    claimed, next_due = made.worker.look()
    assert claimed == []
    assert next_due is not None
    assert 50 * S < next_due <= 60 * S, "whoever claims learns when it is due"


def test_what_was_seen_is_not_in_the_future(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    assert made.worker.fire(made.tick(), seen=LONG_AGO * 3)
    assert db.value("SELECT seen_to <= clock_timestamp() FROM durable.schedule")


@pytest.mark.parametrize("change", ["pause", "resume", "delete", "update"])
def test_a_change_takes_the_lease_away(scene: Callable[..., Scene], db: Session, change: str) -> None:
    made = scene()
    tick = made.tick()
    if change == "update":
        db.schedule("s", made.stream, cron="0 0 * * *", if_exists="update")
    elif change == "resume":
        db.control("s", "pause")
        db.control("s", "resume")
    else:
        db.control("s", change)
    assert not made.worker.fire(tick, LONG_AGO + S)
    assert made.worker.look_up(tick) is None
    assert made.sent() == 0


def test_an_update_without_a_difference_changes_nothing(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    tick = made.tick()
    db.schedule("s", made.stream, if_exists="update")
    db.schedule("s", made.stream, cron="0 0 * * *", if_exists="keep")
    assert made.worker.fire(tick, LONG_AGO + S)
    assert db.sql("SELECT revision, cron FROM durable.schedule") == [(1, "* * * * * *")]


def test_an_update_goes_on_where_the_schedule_was(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    made.fire(LONG_AGO + S)
    db.schedule("s", made.stream, template=b"other", if_exists="update")
    assert made.counts() == (1, 0, 0)
    facts = made.worker.look_up(made.tick())
    assert facts is not None
    assert (facts[3], facts[7]) == (b"other", LONG_AGO + S), "what is due since then is caught up"
    db.schedule("s", made.stream, cron="0 0 * * *", if_exists="update")
    assert db.value("SELECT seen_to > clock_timestamp() - interval '1 minute' FROM durable.schedule")


def test_an_update_to_another_stream(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    other = db.stream("other")
    db.schedule("s", other, if_exists="update")
    assert made.worker.claim() == []
    (tick,) = db.register(other).claim()
    assert tick.message_id == made.id


def test_a_paused_schedule_stays_paused(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    db.control("s", "pause")
    db.control("s", "pause")
    assert db.sql("SELECT count(*) FROM durable.message") == [(0,)]
    db.schedule("s", made.stream, cron="0 0 * * *", if_exists="update")
    assert db.sql("SELECT count(*) FROM durable.message") == [(0,)]
    db.control("s", "resume")
    db.control("s", "resume")
    assert db.sql("SELECT count(*) FROM durable.message") == [(1,)]
    assert db.value("SELECT seen_to > clock_timestamp() - interval '1 minute' FROM durable.schedule"), (
        "nothing is caught up"
    )


def test_resume_brings_a_lost_tick_back(scene: Callable[..., Scene]) -> None:
    made = scene()
    assert made.worker.ack(made.tick()) == []
    made.db.control("s", "resume")
    assert made.tick()


def test_a_schedule_that_is_there_already(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    with pytest.raises(psycopg.Error, match="there is a schedule 's' already") as caught:
        db.schedule("s", made.stream)
    assert caught.value.sqlstate == "DD005"


@pytest.mark.parametrize("verb", ["pause", "resume", "delete"])
def test_a_schedule_that_is_missing(db: Session, verb: str) -> None:
    with pytest.raises(psycopg.Error, match="there is no schedule 'x'") as caught:
        db.control("x", verb)
    assert caught.value.sqlstate == "DD004"
    with pytest.raises(psycopg.Error, match="there is no schedule 'x'"):
        db.by_hand("x", None)


# --- overlap --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["m", "s"])
def test_skip(scene: Callable[..., Scene], kind: str) -> None:
    made = scene(overlap="skip", kind=kind)
    made.fire(LONG_AGO + S, LONG_AGO + 2 * S)
    assert (made.sent(), made.counts()) == (1, (1, 1, 0))
    made.fire(LONG_AGO + 3 * S)
    assert (made.sent(), made.counts()) == (1, (1, 2, 0))
    made.drop()
    made.fire(LONG_AGO + 4 * S)
    assert (made.sent(), made.counts()) == (1, (2, 2, 0))


@pytest.mark.parametrize("state", ["leased", "retried", "delayed"])
def test_a_message_is_live_as_long_as_it_is_there(scene: Callable[..., Scene], state: str) -> None:
    made = scene(overlap="skip")
    made.fire(LONG_AGO + S)
    claimed = made.worker.one()
    if state == "retried":
        made.worker.reschedule(claimed)
    elif state == "delayed":
        made.worker.reschedule(claimed, delay=3_600_000)
    made.fire(LONG_AGO + 2 * S)
    assert made.counts() == (1, 1, 0)
    made.drop()
    made.fire(LONG_AGO + 3 * S)
    assert made.counts() == (2, 1, 0)


def test_a_dead_letter_has_ended(scene: Callable[..., Scene]) -> None:
    made = scene(overlap="skip")
    made.fire(LONG_AGO + S)
    made.worker.bury(made.worker.one())
    made.fire(LONG_AGO + 2 * S)
    assert made.counts() == (2, 0, 0)


@pytest.mark.parametrize("kind", ["m", "s"])
def test_buffer_one(scene: Callable[..., Scene], kind: str) -> None:
    made = scene(overlap="buffer_one", kind=kind)
    made.fire(LONG_AGO + S)
    assert made.due_in() > 1000
    made.fire(LONG_AGO + 2 * S, LONG_AGO + 3 * S)
    assert (made.sent(), made.counts(), made.waiting()) == (1, (1, 1, 0), LONG_AGO + 2 * S)
    assert made.due_in() <= 1, "it is looked after every second"
    facts = made.worker.look_up(made.tick())
    assert facts is not None
    assert facts[8] == LONG_AGO + 2 * S
    made.worker.resync()
    made.fire(LONG_AGO + 2 * S, LONG_AGO + 4 * S)
    assert (made.sent(), made.counts(), made.waiting()) == (1, (1, 2, 0), LONG_AGO + 2 * S)
    made.drop()
    # What waited is fired, and what is due now waits for that.
    made.fire(LONG_AGO + 2 * S, LONG_AGO + 5 * S)
    assert (made.sent(), made.counts(), made.waiting()) == (1, (2, 2, 0), LONG_AGO + 5 * S)
    made.drop()
    made.fire(LONG_AGO + 5 * S)
    assert (made.sent(), made.counts(), made.waiting()) == (1, (3, 2, 0), None)
    assert made.due_in() > 1000


@pytest.mark.parametrize("change", ["pause", "update"])
def test_what_waits_may_be_skipped_after_all(scene: Callable[..., Scene], db: Session, change: str) -> None:
    made = scene(overlap="buffer_one")
    made.fire(LONG_AGO + S, LONG_AGO + 2 * S)
    assert made.waiting() is not None
    if change == "pause":
        db.control("s", "pause")
    else:
        db.schedule("s", made.stream, overlap="skip", if_exists="update")
    assert (made.counts(), made.waiting()) == ((1, 1, 0), None)


def test_allow(scene: Callable[..., Scene]) -> None:
    made = scene(kind="s")
    made.fire(LONG_AGO + S, LONG_AGO + 2 * S)
    assert (made.sent(), made.counts()) == (2, (2, 0, 0))
    ids = [row[0] for row in made.db.sql("SELECT workflow_id FROM durable.run ORDER BY 1")]
    assert ids == ["s:2020-09-13T12:26:41Z", "s:2020-09-13T12:26:42Z"]


def test_a_workflow_id_that_is_taken_is_left_alone(scene: Callable[..., Scene], db: Session) -> None:
    made = scene(kind="s")
    db.start(made.stream, "s:2020-09-13T12:26:41Z")
    made.fire(LONG_AGO + S, LONG_AGO + 2 * S)
    assert made.counts() == (1, 1, 0)


def test_a_run_that_ended_under_a_worker_has_ended(scene: Callable[..., Scene]) -> None:
    made = scene(kind="s", overlap="skip")
    made.fire(LONG_AGO + S)
    made.worker.advance(step(made.worker.one(), 1, ("WorkflowCompleted",), close="completed"))
    made.fire(LONG_AGO + 2 * S)
    assert made.counts() == (2, 0, 0)


# --- by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["m", "s"])
def test_by_hand_also_while_it_is_paused_and_something_runs(
    scene: Callable[..., Scene], db: Session, kind: str
) -> None:
    made = scene(overlap="skip", kind=kind)
    made.fire(LONG_AGO + S)
    db.control("s", "pause")
    assert db.by_hand("s", None) == [True]
    assert (made.sent(), made.counts()) == (2, (2, 0, 0))
    # What comes next finds both.
    db.control("s", "resume")
    made.since(LONG_AGO + S)
    assert len(db.call("list_schedules", "s")[0][16]) == 2
    made.fire(LONG_AGO + 2 * S)
    assert made.counts() == (2, 1, 0)


def test_what_is_fired_for_the_past_is_in_nobodys_way(scene: Callable[..., Scene], db: Session) -> None:
    made = scene(overlap="skip", kind="s")
    assert db.by_hand("s", LONG_AGO - S, LONG_AGO - 2 * S) == [True, True]
    assert db.by_hand("s", LONG_AGO - S) == [False], "it is still live"
    made.fire(LONG_AGO + S)
    assert made.counts() == (3, 0, 0)
    made.drop()
    assert db.by_hand("s", LONG_AGO - S) == [True]


def test_what_was_made_of_an_old_definition_is_not_fired(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    db.schedule("s", made.stream, template=b"other", if_exists="update")
    with pytest.raises(psycopg.Error, match="was changed in this moment"):
        db.by_hand("s", None, revision=1)
    assert made.sent() == 0
    assert db.by_hand("s", None, revision=2) == [True]


# --- leases and locks -------------------------------------------------------------------------------------


def test_a_dead_workers_tick_is_taken_by_another(scene: Callable[..., Scene], db: Session) -> None:
    made = scene()
    tick = made.tick()
    other = db.register(made.stream)
    db.silence(made.worker)
    assert other.reclaim(made.worker) == (1, 0)
    (again,) = other.claim()
    assert other.fire(again, LONG_AGO + S)
    with pytest.raises(psycopg.Error, match="not registered"):
        made.worker.fire(tick, LONG_AGO + S)
    assert made.counts() == (1, 0, 0)


def test_firing_waits_for_nobody_who_is_at_the_schedule(
    scene: Callable[..., Scene], db: Session, connect: Callable[..., Session]
) -> None:
    made = scene()
    tick = made.tick()
    other = connect()
    other.begin()
    assert other.by_hand("s", None) == [True]
    assert made.worker.fire(tick, LONG_AGO + S), "the tick is put back, for a second"
    assert 0 < made.due_in() <= 1
    assert made.counts() == (0, 0, 0)
    other.commit()
    made.fire(LONG_AGO + S)
    assert made.counts() == (2, 0, 0)


def test_a_pause_that_meets_a_tick_that_is_firing(
    scene: Callable[..., Scene], db: Session, connect: Callable[..., Session]
) -> None:
    made = scene()
    tick = made.tick()
    firing = connect()
    firing.begin()
    assert made.worker.over(firing).fire(tick, LONG_AGO + S)
    pausing = connect()
    pause = in_background(lambda: pausing.control("s", "pause"))
    firing.commit()
    pause()
    assert made.counts() == (1, 0, 0)
    assert db.value("SELECT count(*) FROM durable.message WHERE kind = 'c'") == 0


def test_two_make_the_same_schedule_at_once(db: Session, connect: Callable[..., Session]) -> None:
    stream = db.stream()
    one, other = connect(), connect()
    one.begin()
    one.schedule("s", stream)
    saved = in_background(lambda: other.schedule("s", stream, if_exists="update"))
    one.commit()
    saved()
    assert db.sql("SELECT count(*), max(revision) FROM durable.schedule") == [(1, 1)]
    assert db.sql("SELECT count(*) FROM durable.message") == [(1,)]


# --- plans ------------------------------------------------------------------------------------------------


def test_firing_stays_on_indexes(scene: Callable[..., Scene], db: Session) -> None:
    made = scene(overlap="skip")
    db.sql(
        "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload) "
        "SELECT gen_random_uuid(), %s, 0, clock_timestamp(), clock_timestamp(), 'a', '' FROM generate_series(1, 5000)",
        made.stream,
    )
    made.fire(LONG_AGO + S)
    tick = made.tick()
    db.begin()
    query = (
        "SELECT seq_scan::int, idx_tup_fetch::int FROM pg_stat_xact_user_tables "
        "WHERE relid = 'durable.message'::regclass"
    )
    before = db.sql(query)[0]
    assert made.worker.look_up(tick)
    assert made.worker.fire(tick, LONG_AGO + 2 * S)
    after = db.sql(query)[0]
    db.commit()
    assert made.counts() == (1, 1, 0)
    assert after[0] == before[0]
    assert after[1] - before[1] < 30


def test_many_ticks_in_one_call(db: Session) -> None:
    stream = db.stream()
    worker = db.register(stream)
    for n in range(5):
        db.schedule(f"s{n}", stream)
    db.sql("UPDATE durable.schedule SET seen_to = to_timestamp(%s)", LONG_AGO / S)
    ticks = worker.claim()
    context = Context(db.sender, db.batches)
    context.worker = Uuid(worker.token)
    found = [LookUpSchedule(t.message_id, t.lease) for t in ticks]
    LookUpSchedule.settle(found, db.call("schedules_of_leases", *LookUpSchedule.arguments(found, context)))
    assert [f.answer[0] for f in found] == [t.message_id for t in ticks]
    # As many due times as the tick's number; the lease of the third is gone.
    db.control(found[2].answer[1], "pause")
    fires = [
        FireSchedule(
            *(t.message_id, t.lease, 0, 0, LONG_AGO, t.stream_id),
            [Due(LONG_AGO + k * S, uuid.uuid4().bytes, b"%d" % n) for k in range(1, n + 1)],
        )
        for n, t in enumerate(ticks)
    ]
    FireSchedule.settle(fires, db.call("fire_schedules", *FireSchedule.arguments(fires, context)))
    assert [f.answer for f in fires] == [True, True, False, True, True]
    sent = [c.payload for c in worker.claim() if c.kind == "m"]
    assert sent == [b"1"] + [b"3"] * 3 + [b"4"] * 4
