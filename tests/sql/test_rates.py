"""What workers say that they get done, and how fast a stream moves."""

from __future__ import annotations

import math
from collections.abc import Callable

import psycopg
import pytest

from dramatiq_durable.arrays import Ints, Uuid, Uuids

from .api import Session, Worker, step
from .test_advance import begin
from .test_plans import counting, fill, statistics  # noqa: F401  (a fixture)


def say(worker: Worker, rates: dict[int, float | None]) -> None:
    worker.call("heartbeat", Uuids([]), Ints(list(rates)), list(rates.values()))


def rates(db: Session, *, seconds: float = 10.0, most: int = 100) -> dict[str, tuple[float, float]]:
    return {name: (ended, came) for name, ended, came in db.call("stream_rates", seconds, most)}


def test_a_streams_rate_is_the_sum_of_what_its_workers_say(db: Session) -> None:
    a, b, c = db.stream("a"), db.stream("b"), db.stream("c")
    first, second = db.register(a, b, delay=60_000), db.register(b, c, delay=60_000)
    assert rates(db) == {"a": (0, 0), "b": (0, 0), "c": (0, 0)}
    say(first, {b: 2.5, a: 1.0})
    say(second, {b: 4.0})
    assert rates(db) == {"a": (1.0, 0), "b": (6.5, 0), "c": (0, 0)}
    # Each says what it did lately, and nothing of what it did before.
    say(first, {})
    assert rates(db) == {"a": (0, 0), "b": (4.0, 0), "c": (0, 0)}
    first.heartbeat()
    say(second, {c: 3.0})
    second.call("unregister_worker")
    assert rates(db) == {"a": (0, 0), "b": (0, 0), "c": (0, 0)}


def test_who_is_not_heard_of_for_two_heartbeats_does_nothing(db: Session) -> None:
    a = db.stream("a")
    worker, other = db.register(a, delay=60_000), db.register(a, delay=8_000)
    for said in (worker, other):
        say(said, {a: 5.0})
    db.sql("UPDATE durable.worker SET beat_at = beat_at - interval '5 seconds'")
    assert rates(db)["a"][0] == 5.0, "the other one beats every two seconds"
    db.sql("UPDATE durable.worker SET beat_at = beat_at - interval '6 seconds'")
    assert rates(db)["a"][0] == 0


def test_what_is_said_of_other_streams_is_not_believed(db: Session) -> None:
    a, b = db.stream("a"), db.stream("b")
    worker = db.register(a, delay=60_000)
    say(worker, {b: 1000.0, 2**31 - 1: 5.0, 0: 1.0, a: 1.0})
    assert rates(db) == {"a": (1.0, 0), "b": (0, 0)}
    worker.call("consume_streams", Ints([b]))
    assert rates(db) == {"a": (0, 0), "b": (0, 0)}, "what was said was said of another stream"


@pytest.mark.parametrize(
    ("said", "believed"),
    [(-5.0, 0), (math.nan, 1e6), (math.inf, 1e6), (-math.inf, 0), (1e300, 1e6), (None, 0), (0.0, 0), (0.125, 0.125)],
)
def test_nonsense_is_bounded(db: Session, said: float | None, believed: float) -> None:
    a = db.stream("a")
    worker = db.register(a, delay=60_000)
    say(worker, {a: said})
    assert rates(db)["a"][0] == believed


def test_too_much_is_refused(db: Session) -> None:
    a = db.stream("a")
    worker = db.register(a, delay=60_000)
    worker.call("heartbeat", Uuids([]), Ints([a] * 10_000), [1.0])
    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="at most 10000 items"):
        worker.call("heartbeat", Uuids([]), Ints([a] * 10_001), [1.0])


def test_a_heartbeat_that_tells_is_a_hot_update(db: Session) -> None:
    a = db.stream("a")
    worker = db.register(a, delay=60_000)
    with counting(db, "worker") as counted:
        say(worker, {a: 5.0})
    assert (counted["worker"].updates, counted["worker"].hot) == (1, 1)


def test_what_came_and_is_still_there(db: Session) -> None:
    a, b = db.stream("a"), db.stream("b")
    db.sql(
        "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload) "
        "SELECT gen_random_uuid(), %s, n %% 2, now() - interval '1 hour', now() - interval '1 hour', 'a', '' "
        "FROM generate_series(1, 50) n",
        a,
    )
    for _ in range(4):
        db.enqueue(a, *[b"1"] * 5)
    db.enqueue(b, b"1", delay=60_000)
    assert rates(db, seconds=10) == {"a": (0, pytest.approx(2.0)), "b": (0, 0)}
    # One that was put off came long ago; one that is leased came all the same.
    db.sql("UPDATE durable.message SET enqueued_at = enqueued_at - interval '1 hour' WHERE stream_id = %s", b)
    db.sql("UPDATE durable.message SET due_at = now() WHERE stream_id = %s", b)
    db.register(a).claim(10)
    assert rates(db, seconds=10) == {"a": (0, pytest.approx(2.0)), "b": (0, 0)}


def test_of_more_than_it_looks_at_the_latest_tell(db: Session) -> None:
    a = db.stream("a")
    db.sql(
        "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload) "
        "SELECT gen_random_uuid(), %s, 0, t, t, 'a', '' "
        "FROM (SELECT clock_timestamp() - n * interval '2 ms' AS t FROM generate_series(1, 2000) n) x",
        a,
    )
    # 500 a second, of which it sees those of the last fifth of a second.
    assert 250 < rates(db, seconds=10, most=100)["a"][1] <= 510


def test_rates_are_read_along_the_index(db: Session, statistics: Callable[[], None]) -> None:  # noqa: F811
    stream = db.stream()
    fill(db, stream)
    fill(db, stream, delay="-1 hour")
    fill(db, stream, delay="-1 second", priority="1")
    statistics()
    with counting(db) as counted:
        assert rates(db, most=200)["s"][1] > 0
    assert counted["message"].seq_scans == 0
    assert counted["message"].rows < 400, counted


def test_a_run_that_fails_is_found_among_many(db: Session, statistics: Callable[[], None]) -> None:  # noqa: F811
    begun = begin(db)
    many = (
        "INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event, task_failure) "
        "SELECT gen_random_uuid(), 'w' || n, %s, 'wf', s, now() - interval '1 day', 1, f "
        "FROM generate_series(1, 20000) n, (VALUES ('running', NULL), ('failed', 'no')) x (s, f)"
    )
    db.sql(many, begun.stream)
    statistics()
    assert begun.worker.fail_task(begun.task)
    with counting(db) as counted:
        found = [row[3] for row in db.call("find_stuck", 100) if row[0] == "task_failure"]
    assert found == ["w"]
    assert counted["run"].cheap, counted


def test_only_a_task_that_fails_or_fails_no_more_changes_an_index(db: Session) -> None:
    begun = begin(db)
    with counting(db) as counted:
        assert begun.worker.fail_task(begun.task)
    assert (counted["run"].updates, counted["run"].hot) == (1, 0)
    with counting(db) as counted:
        assert begun.worker.fail_task(begun.worker.one())
    assert (counted["run"].updates, counted["run"].hot) == (1, 1), "the same failure again"
    with counting(db) as counted:
        assert begun.worker.advance(step(begun.worker.one(), 1, ("TimerStarted", 1))) == ["ok"]
    assert (counted["run"].updates, counted["run"].hot) == (1, 0)
    assert db.value("SELECT task_failure FROM durable.run WHERE run_id = %s", Uuid(begun.run)) is None
