"""The procedures of activities: who is first, who is skipped, what is left behind, and what they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from dramatiq_durable.arrays import Blobs, Uuid, Uuids
from dramatiq_durable.operations import Defer, FinishActivity, Park
from tests.support import wait_until

from .api import Claimed, Session, derived, send_limited, step
from .test_advance import Begun, begin
from .test_plans import counting, fill

HOUR = 3_600_000
DIGEST = hashlib.sha256(b"secret").digest()


def schedule(begun: Begun, **limits: Any) -> dict[str, Claimed]:
    """Let the run schedule an activity with limits, and claim what comes of it, by kind."""
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "act", None, {"options": {"durable_limits": limits}}))
    advance.sends = [send_limited(begun.stream, 1)]
    assert begun.worker.advance(advance) == ["ok"]
    return {c.kind: c for c in begun.worker.claim()}


def alarm(db: Session) -> tuple[int, bool] | None:
    """In how many milliseconds the alarm goes off, and whether somebody has it."""
    rows = db.sql(
        "SELECT (extract(epoch FROM due_at - clock_timestamp()) * 1000)::int, lease_token IS NOT NULL "
        "FROM durable.message WHERE kind = 'd'"
    )
    return rows[0] if rows else None


def due(db: Session, begun: Begun) -> Claimed:
    """The alarm, once it is due."""
    claimed: list[Claimed] = []

    def rings() -> bool:
        claimed.extend(c for c in begun.worker.claim() if c.kind == "d")
        return bool(claimed)

    wait_until(rings, timeout=10, message="the alarm goes off")
    return claimed[0]


def test_what_its_limits_are_kept_by(db: Session) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=HOUR, schedule_to_close=2 * HOUR, heartbeat=HOUR // 2)["a"]
    at, _ = alarm(db) or (0, True)
    assert 2 * HOUR - 5000 < at <= 2 * HOUR
    assert begun.worker.settle("start_activities", [activity]) == []
    at, _ = alarm(db) or (0, True)
    assert HOUR // 2 - 5000 < at <= HOUR // 2, "sooner, now that it runs"
    assert begun.worker.complete(activity) == []
    assert alarm(db) is None
    assert db.value("SELECT count(*) FROM durable.activity") == 0
    assert begun.worker.settle("start_activities", [activity]) == [1]


def test_without_limits_of_the_wait_there_is_no_alarm_before_it_begins(db: Session) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=1)["a"]
    assert alarm(db) is None
    begun.worker.settle("start_activities", [activity])
    assert alarm(db) is not None


@pytest.mark.parametrize(
    "wrong", [{"start_to_close": -5}, {"start_to_close": 10**18}, {"retry": {"coefficient": 1e300}}]
)
def test_limits_that_make_no_sense_are_none(db: Session, wrong: dict[str, Any]) -> None:
    begun = begin(db)
    activity = schedule(begun, **wrong)["a"]
    begun.worker.settle("start_activities", [activity])
    assert alarm(db) is None
    assert db.sql("SELECT start_to_close, retry_coefficient FROM durable.activity") == [(None, 2.0)]


def test_a_time_out_frees_the_message_for_its_next_attempt(db: Session) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=1, retry={"initial": 0, "coefficient": 1})["a"]
    begun.worker.settle("start_activities", [activity])
    assert begun.worker.settle("expire_activities", [due(db, begun)]) == []
    again = begun.worker.one()
    assert (again.kind, again.attempt, again.message_id) == ("a", 2, activity.message_id)
    assert begun.worker.complete(activity) == [1], "what the first attempt brings is refused"
    assert db.value("SELECT last_failure FROM durable.message WHERE kind = 'a'").startswith("Timeout: start_to_close: ")
    assert begun.worker.complete(again) == []


def test_a_time_out_for_good(db: Session) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=1, retry={"attempts": 1})["a"]
    begun.worker.settle("start_activities", [activity])
    begun.worker.settle("expire_activities", [due(db, begun)])
    ((_, kind, seq, name, _, attributes),) = db.inbox(begun.run)
    assert (kind, seq, name) == ("ActivityTimedOut", 1, "act")
    failure = json.loads(attributes)["failure"] if isinstance(attributes, str) else attributes["failure"]
    assert (failure["timeout"], failure["attempt"], failure["retryable"]) == ("start_to_close", 1, True)
    assert "0.001 s" in failure["message"]
    assert begun.worker.complete(activity) == [1]
    assert [c.kind for c in begun.worker.claim()] == ["t"]


def test_an_alarm_waits_for_nobody(db: Session, connect: Callable[..., Session]) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=1)["a"]
    begun.worker.settle("start_activities", [activity])
    bell = due(db, begun)
    other = connect()
    other.begin()
    begun.worker.over(other).complete(activity)
    db.sql("SET statement_timeout = '1s'")
    assert begun.worker.settle("expire_activities", [bell]) == []
    at, _ = alarm(db) or (0, True)
    assert at <= 100, "it looks again"
    other.commit()
    begun.worker.settle("expire_activities", [due(db, begun)])
    assert alarm(db) is None
    assert [row[1] for row in db.inbox(begun.run)] == ["ActivityCompleted"]


def test_a_cancel_waits_for_nobody_and_is_not_lost(db: Session, connect: Callable[..., Session]) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=HOUR)["a"]
    db.post(begun.run)
    task = begun.worker.one()
    other = connect()
    other.begin()
    begun.worker.over(other).call("beat_activities", *leases(activity), Blobs([b"1"]))
    db.sql("SET statement_timeout = '1s'")
    assert begun.worker.advance(step(task, 2, ("ActivityCancelRequested", 1, "act"))) == ["ok"]
    other.commit()
    assert begun.worker.call("doomed_activities", *leases(activity)) == [(1, "cancelled")]
    assert begun.worker.call("beat_activities", *leases(activity), Blobs([None])) == [(["cancelled"],)]


def leases(*claimed: Claimed) -> tuple[Any, Any]:
    return Uuids([c.message_id for c in claimed]), Uuids([c.lease for c in claimed])


@pytest.mark.parametrize("wait", [True, False])
def test_what_waits_is_withdrawn_with_all_that_belongs_to_it(db: Session, wait: bool) -> None:
    begun = begin(db)
    activity = schedule(begun, schedule_to_close=HOUR)["a"]
    begun.worker.release(activity)
    db.post(begun.run)
    task = next(c for c in begun.worker.claim() if c.kind == "t")
    begun.worker.resync(task.message_id)
    kind = "ActivityCancelRequested" if wait else "ActivityCancelled"
    assert begun.worker.advance(step(task, 2, (kind, 1, "act"))) == ["ok"]
    assert db.value("SELECT count(*) FROM durable.message WHERE kind IN ('a', 'd')") == 0
    assert db.value("SELECT count(*) FROM durable.activity") == 0
    assert [row[1] for row in db.inbox(begun.run) if row[1] != "SignalReceived"] == (["ActivityFailed"] if wait else [])


@pytest.mark.parametrize("end", ["close", "ActivityCancelled", "ActivityCancelRequested"])
def test_what_fails_when_nobody_wants_it_is_not_tried_again(db: Session, end: str) -> None:
    begun = begin(db)
    activity = schedule(begun, schedule_to_close=HOUR)["a"]
    if end == "close":
        assert db.terminate(begun.run) == "ok"
    else:
        db.post(begun.run)
        task = next(c for c in begun.worker.claim() if c.kind == "t")
        assert begun.worker.advance(step(task, 2, (end, 1, "act"))) == ["ok"]
    assert begun.worker.reschedule(activity) == []
    assert db.value("SELECT count(*) FROM durable.message WHERE kind IN ('a', 'd')") == 0
    assert db.value("SELECT count(*) FROM durable.activity") == 0
    assert db.value("SELECT count(*) FROM durable.activity_cancel") == 0
    news = [row[1] for row in db.inbox(begun.run) if row[1] != "SignalReceived"]
    assert news == ([] if end == "close" else ["ActivityFailed"])


@pytest.mark.parametrize("how", ["release", "reclaim", "poison"])
@pytest.mark.parametrize("end", ["close", "ActivityCancelled", "ActivityCancelRequested"])
def test_what_comes_back_when_nobody_wants_it_is_dropped(db: Session, end: str, how: str) -> None:
    begun = begin(db)
    activity = schedule(begun, schedule_to_close=HOUR)["a"]
    if end == "close":
        assert db.terminate(begun.run) == "ok"
    else:
        db.post(begun.run)
        task = next(c for c in begun.worker.claim() if c.kind == "t")
        assert begun.worker.advance(step(task, 2, (end, 1, "act"))) == ["ok"]
    if how == "release":
        assert begun.worker.settle("release", [activity]) == []
    else:
        held = "SELECT message_id FROM durable.message WHERE worker_id IS NOT NULL"
        db.sql(f"UPDATE durable.worker SET held = ARRAY({held})")
        db.sql("UPDATE durable.message SET started = true, deaths = %s WHERE kind = 'a'", 9 if how == "poison" else 0)
        db.sql("SELECT durable.take_back(worker_id, 3) FROM durable.worker")
    assert db.value("SELECT count(*) FROM durable.message WHERE kind IN ('a', 'd')") == 0
    assert db.value("SELECT count(*) FROM durable.activity") == 0
    assert db.value("SELECT count(*) FROM durable.activity_cancel") == 0
    news = [row[1] for row in db.inbox(begun.run) if row[1] != "SignalReceived"]
    assert news == ([] if end == "close" else ["ActivityFailed"])


def test_the_token_of_another_attempt_is_of_no_use(db: Session) -> None:
    begun = begin(db)
    activity = schedule(begun)["a"]
    assert begun.worker.operate(Defer(activity.message_id, activity.lease, DIGEST))
    begun.worker.reschedule(activity)
    finish = FinishActivity(begun.run, 1, DIGEST, "ActivityCompleted", b"1", None)
    assert db.operate(finish) == "missing"
    again = begun.worker.one()
    assert begun.worker.operate(Defer(again.message_id, again.lease, DIGEST))
    assert begun.worker.operate(Park(again.message_id, again.lease))
    assert begun.worker.claim() == [], "nobody gets what is parked"
    assert db.operate(finish) == "ok"
    assert db.value("SELECT count(*) FROM durable.activity") == 0


def test_they_are_found_by_their_keys(db: Session) -> None:
    begun = begin(db)
    activity = schedule(begun, start_to_close=HOUR, schedule_to_close=HOUR)["a"]
    fill(db, begun.stream)
    db.sql(
        "INSERT INTO durable.activity (run_id, seq, scheduled_at) "
        "SELECT gen_random_uuid(), 1, clock_timestamp() FROM generate_series(1, 20000)"
    )
    db.sql("INSERT INTO durable.activity_cancel SELECT gen_random_uuid(), 1 FROM generate_series(1, 20000)")
    tables = ("message", "run", "event", "activity", "activity_cancel")
    lease = Uuid(activity.message_id), Uuid(activity.lease)
    calls = {
        "start": lambda: begun.worker.settle("start_activities", [activity]),
        "beat": lambda: begun.worker.call("beat_activities", *leases(activity), Blobs([b"1"])),
        "doomed": lambda: begun.worker.call("doomed_activities", *leases(activity)),
        "look": lambda: begun.worker.call("activity_of_lease", *lease),
        "pending": lambda: db.call("pending_of", Uuid(begun.run)),
        "complete": lambda: begun.worker.complete(activity),
        "close": lambda: db.terminate(begun.run),
    }
    for name, call in calls.items():
        with counting(db, *tables) as counted:
            call()
        assert all(table.cheap for table in counted.values()), (name, counted)
    assert derived(begun.run, 1) == activity.message_id
