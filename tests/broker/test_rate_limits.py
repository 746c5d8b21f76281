"""`rate_limits.PostgresBackend`: exact under many processes, and the same as Dramatiq's own back ends, call by call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.rate_limits import (
    Barrier,
    BucketRateLimiter,
    ConcurrentRateLimiter,
    RateLimitExceeded,
    WindowRateLimiter,
)
from dramatiq.rate_limits.backends import StubBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dramatiq_durable as durable
from dramatiq_durable.rate_limits import MAX_KEY, PostgresBackend
from tests.support import unique_name, wait_until

from .conftest import Record, Rows, at_once, in_thread

LONG = 600_000


@pytest.fixture
def backend(broker: durable.DurableBroker) -> PostgresBackend:
    return PostgresBackend(broker)


# --- one by one -----------------------------------------------------------------------------------------------


def test_concurrent_limiter(backend: PostgresBackend) -> None:
    mutex = ConcurrentRateLimiter(backend, "mutex", limit=2)
    with mutex.acquire(), mutex.acquire():
        with mutex.acquire(raise_on_failure=False) as acquired:
            assert not acquired
        with pytest.raises(RateLimitExceeded), mutex.acquire():
            raise AssertionError("a third one")
    with mutex.acquire(), mutex.acquire():
        pass


def test_a_holder_that_died_is_forgotten_in_time(backend: PostgresBackend) -> None:
    mutex = ConcurrentRateLimiter(backend, "mutex", limit=1, ttl=200)
    assert mutex._acquire()

    def free() -> bool:
        with mutex.acquire(raise_on_failure=False) as acquired:
            return bool(acquired)

    assert not free()
    wait_until(free)


def test_bucket_and_window(backend: PostgresBackend) -> None:
    bucket = BucketRateLimiter(backend, "bucket", limit=3, bucket=3_600_000)
    window = WindowRateLimiter(backend, "window", limit=3, window=600)
    for limiter in (bucket, window):
        acquired = []
        for _ in range(6):
            with limiter.acquire(raise_on_failure=False) as got:
                acquired.append(got)
        assert acquired == [True, True, True, False, False, False], type(limiter)


def test_a_window_slides(backend: PostgresBackend) -> None:
    window = WindowRateLimiter(backend, "window", limit=1, window=1)

    def acquire() -> bool:
        with window.acquire(raise_on_failure=False) as got:
            return bool(got)

    assert acquire()
    wait_until(acquire)


def test_barrier(backend: PostgresBackend) -> None:
    barrier = Barrier(backend, "barrier", ttl=LONG)
    assert barrier.create(parties=3)
    assert not barrier.create(parties=3)
    assert not barrier.wait(block=False)
    assert not barrier.wait(timeout=20)
    waiting = in_thread(lambda: Barrier(backend, "other", ttl=LONG).backend.wait("other@events", 20_000))
    assert barrier.wait(block=False)
    # Who comes late finds that it was reached.
    assert backend.wait("barrier@events", 0)
    assert not backend.wait("nobody@events", 0)
    backend.wait_notify("other@events", LONG)
    assert waiting() is True


def test_an_actor_under_a_limiter_is_retried(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any
) -> None:
    got, inside = Record(), Record()
    mutex = ConcurrentRateLimiter(backend, "mutex", limit=1)

    @dramatiq.actor(broker=broker, max_retries=1000)
    def alone(n: int) -> None:
        with mutex.acquire():
            inside(1)
            assert sum(inside.values) == 1
            inside(-1)
            got(n)

    broker.enqueue_many([alone.message(n) for n in range(20)])
    start_worker(broker, threads=8)
    assert sorted(got.wait(20)) == list(range(20))


def test_what_an_actor_counts_is_counted_at_once(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, rows: Rows
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker)
    def counts() -> None:
        backend.add("key", 5, LONG)
        backend.decr("key", 2, 0, LONG)
        seen(rows("SELECT value FROM durable.limiter WHERE key = 'key'"))

    start_worker(broker)
    counts.send()
    assert seen.wait(1) == [[(3,)]]


@pytest.mark.parametrize("key", ["", "with \0 in it", "x" * (MAX_KEY + 1), "\U0001f600" * 250, 5, None, "\ud800"])
def test_keys_that_cannot_be(backend: PostgresBackend, key: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: backend.add(key, 1, 1000),
        lambda: backend.incr(key, 1, 1, 1000),
        lambda: backend.decr(key, 1, 1, 1000),
        lambda: backend.incr_and_sum(key, lambda: [key], 1, 1, 1000),
        lambda: backend.wait(key, 1000),
        lambda: backend.wait_notify(key, 1000),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


def test_the_longest_keys(backend: PostgresBackend) -> None:
    """What does not compress, in as many bytes as are allowed: with all that limiters add to it."""
    texts = ["".join(chr(0x4E00 + (n * 7919) % 20000) for n in range(MAX_KEY // 3)), "x" * MAX_KEY]
    for text in texts:
        barrier = Barrier(backend, text, ttl=LONG)
        assert barrier.create(1)
        assert barrier.wait(timeout=20_000)
        assert backend.incr_and_sum(text, lambda t=text: [t], 1, 10, LONG)  # type: ignore[misc]
    with pytest.raises(ValueError, match="bytes"):
        Barrier(backend, texts[1] + "x", ttl=LONG).create(1)


def test_numbers_as_callers_have_them(backend: PostgresBackend) -> None:
    assert backend.add("key", -5, LONG)
    assert backend.incr("key", 3, -1, 60_000.5)  # type: ignore[arg-type]
    assert not backend.incr("key", 2, -1, LONG)
    assert backend.incr("key", 1, 2**62, 10**30)
    assert backend.decr("key", -(2**40), -(2**62), LONG)
    assert not backend.decr("key", 2**50, 0, LONG)
    assert backend.incr("key", 2**40, 2**63 - 1, LONG)


def test_workflow_code_is_refused(broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any) -> None:
    @durable.workflow(broker=broker)
    async def flow() -> str:
        try:
            ConcurrentRateLimiter(backend, "mutex")._acquire()
        except durable.ForbiddenInWorkflow as e:
            return str(e)
        return ""

    start_worker(broker)
    assert "activity" in flow.start().result(timeout=20)


# --- as Dramatiq's own ----------------------------------------------------------------------------------------

KEYS = ["a@1", "a@2", "b"]
number = st.integers(-3, 6)
key = st.sampled_from(KEYS)
calls = st.one_of(
    st.tuples(st.just("add"), key, number, st.none()),
    st.tuples(st.just("incr"), key, number, number),
    st.tuples(st.just("decr"), key, number, number),
    st.tuples(st.just("incr_and_sum"), key, number, number),
    st.tuples(st.just("expire"), key, st.none(), st.none()),
)


@pytest.fixture
def outlasting(backend: PostgresBackend, rows: Rows) -> Iterator[Callable[[list[Any]], None]]:
    """Makes the same calls on Dramatiq's StubBackend and on ours, and compares the answers."""

    def compare(sequence: list[Any]) -> None:
        stub, prefix = StubBackend(), unique_name("k")
        for n, (call, name, amount, bound) in enumerate(sequence):
            full = f"{prefix}{name}"
            answers = []
            for each in (stub, backend):
                if call == "expire":
                    if each is stub:
                        stub.db.pop(full, None)
                    else:
                        rows("UPDATE durable.limiter SET expires_at = clock_timestamp() WHERE key = %s", full)
                    continue
                if call == "incr_and_sum":
                    others = [f"{prefix}{k}" for k in KEYS[:2]]
                    there = full in stub.db
                    answers.append(each.incr_and_sum(full, lambda o=others: o, amount, bound, LONG))  # type: ignore[misc]
                    if each is stub and not there and not answers[0]:
                        # What was refused leaves nothing behind, as with Dramatiq's Redis back end.
                        del stub.db[full]
                elif call == "add":
                    answers.append(each.add(full, amount, LONG))
                else:
                    answers.append(getattr(each, call)(full, amount, bound, LONG))
            assert len(set(answers)) <= 1, (sequence[: n + 1], answers)

    return compare


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(calls, max_size=12))
def test_the_same_calls_have_the_same_answers(outlasting: Callable[[list[Any]], None], sequence: list[Any]) -> None:
    outlasting(sequence)


@pytest.mark.soak
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(calls, max_size=30))
def test_the_same_calls_have_the_same_answers_at_length(
    outlasting: Callable[[list[Any]], None], sequence: list[Any]
) -> None:
    outlasting(sequence)


# --- many at once ---------------------------------------------------------------------------------------------


def test_threads_that_sum_at_once_never_exceed(backend: PostgresBackend, rows: Rows) -> None:
    """On different keys of one window: each sees what the others add."""
    names = [f"w@{n}" for n in range(8)]
    answers = at_once(
        8, lambda n: [backend.incr_and_sum(names[(n + k) % 8], lambda: names, 1, 25, LONG) for k in range(8)]
    )
    assert sum(sum(answer) for answer in answers) == 25
    assert rows("SELECT sum(value)::int FROM durable.limiter WHERE key LIKE 'w@_%%'") == [(25,)]


def test_no_two_wait_for_each_other(backend: PostgresBackend, rows: Rows) -> None:
    """Windows, buckets and plain counters over the same keys, in every order."""
    names = ["a@1", "a@2", "b@1", "b@2", "a@", "b@"]

    def hammer(n: int) -> None:
        for k in range(30):
            own = names[(n * 5 + k) % 6]
            backend.incr_and_sum(own, lambda n=n: names if n % 2 else names[::-1], 1, 10_000, LONG)  # type: ignore[misc]
            backend.incr(names[(n + k * 5) % 6], 1, 10_000, LONG)
            backend.decr(names[(n * k) % 6], 1, -10_000, LONG)

    assert at_once(8, hammer) == [None] * 8
    deadlocks = rows("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert deadlocks == [(0,)]


def test_somebody_elses_lock_is_waited_for_a_little_and_others_go_on(
    backend: PostgresBackend, database_url: str
) -> None:
    backend.add("held", 1, LONG)
    with psycopg.connect(database_url) as conn:
        conn.execute("UPDATE durable.limiter SET value = 5")
        began = time.monotonic()
        assert backend.incr("free", 1, 10, LONG)
        assert time.monotonic() - began < 2
        stuck = in_thread(lambda: backend.incr("held", 1, 10, LONG))
        with pytest.raises(durable.DatabaseUnavailable, match="lock"):
            stuck()
    assert backend.incr("held", 1, 10, LONG)


HAMMER = """
import os, sys, time
from dramatiq.rate_limits import *
from dramatiq_durable.rate_limits import PostgresBackend
import psycopg

backend = PostgresBackend(os.environ["TEST_URL"])
conn = psycopg.connect(os.environ["TEST_URL"], autocommit=True)
say = lambda text: os.write(1, (text + chr(10)).encode())

def together():
    # All begin at once: the test opens the gate.
    backend.add("warm", 1, 1000)
    conn.execute("INSERT INTO ready DEFAULT VALUES")
    while not conn.execute("SELECT count(*) FROM gate").fetchone()[0]:
        time.sleep(0.01)

kind = sys.argv[1]
if kind == "concurrent":
    mutex = ConcurrentRateLimiter(backend, "mutex", limit=3)
    together()
    done = 0
    while done < 5:
        with mutex.acquire(raise_on_failure=False) as acquired:
            if acquired:
                conn.execute("INSERT INTO inside VALUES (pg_backend_pid())")
                conn.execute("INSERT INTO seen SELECT count(*) FROM inside")
                conn.execute("DELETE FROM inside WHERE pid = pg_backend_pid()")
                done += 1
            else:
                time.sleep(0.002)
elif kind == "count":
    # Dramatiq's window is exact where all clocks show the same second: one that is behind does not see what is ahead.
    import dramatiq.rate_limits.window as window
    window.time = type("Clock", (), {"time": staticmethod(lambda: int(os.environ["SECOND"]))})
    limiters = [WindowRateLimiter(backend, "window", limit=50, window=3000),
                BucketRateLimiter(backend, "bucket", limit=50, bucket=10**12)]
    together()
    for n in range(10):
        for limiter in limiters:
            with limiter.acquire(raise_on_failure=False) as acquired:
                if acquired:
                    conn.execute("INSERT INTO acquired VALUES (%s)", [limiter.key])
elif kind == "barrier":
    together()
    plain, blocking = Barrier(backend, "plain", ttl=600_000), Barrier(backend, "blocking", ttl=600_000)
    conn.execute("INSERT INTO cleared VALUES ('plain', %s)", [plain.wait(block=False)])
    conn.execute("INSERT INTO cleared VALUES ('blocking', %s)", [blocking.wait(timeout=30_000)])
say("done")
backend.place.broker.close()
"""

PROCESSES = 16


def hammer(run_process: Any, rows: Rows, url: str, kind: str) -> None:
    for table in ("ready (n int)", "gate (n int)"):
        rows(f"CREATE TABLE {table}")
    second = str(int(time.time()))
    processes = [run_process.python(HAMMER, kind, env={"TEST_URL": url, "SECOND": second}) for _ in range(PROCESSES)]
    wait_until(lambda: rows("SELECT count(*) FROM ready") == [(PROCESSES,)], timeout=60)
    rows("INSERT INTO gate VALUES (1)")
    for process in processes:
        process.wait_for("done", timeout=60)
        assert process.wait() == 0, process.output


def test_sixteen_processes_and_a_concurrent_limiter(run_process: Any, rows: Rows, database_url: str) -> None:
    rows("CREATE TABLE inside (pid int)")
    rows("CREATE TABLE seen (n int)")
    hammer(run_process, rows, database_url, "concurrent")
    [(most, count)] = rows("SELECT max(n), count(*) FROM seen")
    assert most <= 3
    assert count == PROCESSES * 5
    assert rows("SELECT value FROM durable.limiter WHERE key = 'mutex'") == [(0,)]


def test_sixteen_processes_a_window_and_a_bucket(run_process: Any, rows: Rows, database_url: str) -> None:
    rows("CREATE TABLE acquired (key text)")
    hammer(run_process, rows, database_url, "count")
    assert sorted(rows("SELECT key, count(*) FROM acquired GROUP BY 1")) == [("bucket", 50), ("window", 50)]


def test_sixteen_processes_meet_at_a_barrier(
    run_process: Any, rows: Rows, database_url: str, backend: PostgresBackend
) -> None:
    rows("CREATE TABLE cleared (name text, cleared bool)")
    for name in ("plain", "blocking"):
        assert Barrier(backend, name, ttl=LONG).create(PROCESSES)
    hammer(run_process, rows, database_url, "barrier")
    assert sorted(rows("SELECT name, cleared, count(*) FROM cleared GROUP BY 1, 2")) == [
        ("blocking", True, PROCESSES),
        ("plain", False, PROCESSES - 1),
        ("plain", True, 1),
    ]


def test_a_barrier_is_reached_once_whoever_comes_at_once(backend: PostgresBackend) -> None:
    for turn in range(10):
        barrier = Barrier(backend, f"barrier-{turn}", ttl=LONG)
        barrier.create(8)
        assert sum(at_once(8, lambda n, b=barrier: b.wait(block=False))) == 1  # type: ignore[misc]


def test_a_blocking_barrier_outlives_a_broken_connection(backend: PostgresBackend, rows: Rows) -> None:
    barrier = Barrier(backend, "barrier", ttl=LONG)
    barrier.create(2)
    first = in_thread(lambda: barrier.wait(timeout=30_000))
    wait_until(lambda: rows("SELECT count(*) FROM durable.result_waiter") == [(1,)])
    rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert barrier.wait(timeout=30_000)
    assert first() is True
