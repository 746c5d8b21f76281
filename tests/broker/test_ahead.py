"""What is claimed ahead of the threads: the next claim is under way while they are handed what the last one brought."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.claimer import Claimer
from dramatiq_durable.pace import Pace
from tests.support import wait_until
from tests.support.cutter import Cutter

from .conftest import Record, Rows


def test_something_is_done_while_the_server_works(broker: durable.DurableBroker) -> None:
    done = Record()
    with broker.database.connect() as conn:
        conn.meanwhile = lambda: done(time.monotonic())
        began = time.monotonic()
        assert conn.execute("SELECT 7, pg_sleep(0.3)").fetchone() == (7, "")
        assert len(done.values) == 1
        assert done.values[0] - began < 0.2
        with pytest.raises(psycopg.errors.DivisionByZero):
            conn.execute("SELECT 1 / 0 FROM pg_sleep(0.01)")
        assert len(done.values) == 2
        with conn.pipeline():
            cursor = conn.execute("SELECT 8")
        assert cursor.fetchone() == (8,)


def test_what_fails_meanwhile_is_no_part_of_the_call(
    broker: durable.DurableBroker, caplog: pytest.LogCaptureFixture
) -> None:
    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    broker.commit.meanwhile = lambda: 1 / 0  # type: ignore[assignment,return-value]
    take.send()
    broker.commit.meanwhile = None
    take.send()
    assert "division by zero" in caplog.text
    assert broker.get_queue_message_counts("default")[0] == 2


def test_many_are_run_once_each_in_their_order(broker: durable.DurableBroker, rows: Rows, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(n: int) -> None:
        got(n)

    broker.enqueue_many([take.message(n) for n in range(5000)])
    start_worker(broker, threads=1)
    assert got.wait(5000, timeout=30) == list(range(5000))
    rows.drained()


@pytest.mark.parametrize("beat_first", [False, True])
def test_what_has_come_is_run_while_the_database_is_away(
    make_broker: Callable[..., durable.DurableBroker],
    database_url: str,
    rows: Rows,
    start_worker: Any,
    monkeypatch: pytest.MonkeyPatch,
    beat_first: bool,
) -> None:
    """It is leased to this worker, and nobody else may run it."""
    monkeypatch.setattr(Pace, "measure", lambda pace, threads: setattr(pace, "ahead", 400))
    cutter = Cutter(database_url)
    broker = make_broker(cutter.url)
    go, got = threading.Event(), Record()

    @dramatiq.actor(broker=broker)
    def take(n: int) -> None:
        go.wait(30)
        got(n)

    broker.enqueue_many([take.message(n) for n in range(600)])
    try:
        worker = start_worker(broker, threads=2)
        claimer: Any = broker.claimer
        wait_until(lambda: len(claimer.held) > 100 and len(claimer._coming) > 100, message="two claims")
        leased = len(claimer.held) + len(claimer._coming)
        assert rows("SELECT count(*) FROM durable.message WHERE lease_token IS NOT NULL") == [(leased,)]
        cutter.close()
        if beat_first:
            claimer.membership._next_beat = 0.0
            claimer._event.set()
            wait_until(lambda: not claimer._coming)
        go.set()
        assert sorted(got.wait(leased)) == list(range(leased))
        worker.stop(timeout=1)
    finally:
        go.set()
        cutter.close()
        claimer.stop(0)


def test_what_one_claim_brings_is_run_at_once_where_another_is_refused(
    broker: durable.DurableBroker, start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the worker's login has lost the right to the streams of its runs: it waits before it asks again."""
    got, left = Record(), Record()
    run_batch, arrived = broker.commit.run_batch, Claimer._arrived

    @dramatiq.actor(broker=broker)
    def take() -> None:
        got()

    @durable.workflow(broker=broker, queue_name="runs")
    async def nothing() -> None: ...

    def refuse_runs(*also: Any, give_up: Callable[[], bool]) -> None:
        run_batch(*also, give_up=give_up)
        for claim in also:
            if claim.of_runs:
                claim.error = durable.NotPermitted("no longer")

    def watch(claimer: Any, claims: list[Any]) -> None:
        try:
            arrived(claimer, claims)
        except durable.NotPermitted:
            left((sum(len(c.answer[0]) for c in claims), len(claimer._coming)))
            raise

    monkeypatch.setattr(broker.commit, "run_batch", refuse_runs)
    monkeypatch.setattr(Claimer, "_arrived", watch)
    take.send()
    start_worker(broker)
    got.wait(1)
    assert {coming for _, coming in left.values} == {0}
    assert 1 in {brought for brought, _ in left.values}


def test_a_rate_is_believed_when_every_thread_has_finished_several() -> None:
    pace = Pace()

    def look(finished: int, threads: int) -> int:
        pace.finished, pace._measured = finished, time.monotonic() - 0.006
        pace.measure(threads)
        return pace.ahead

    # Eight that end together, of threads that take a second for each, would else have many wait behind them.
    assert look(8, 64) < 8
    assert look(200, 8) > 200
    pace.finished = 0
    pace._measured = time.monotonic()
    before = pace.ahead
    pace.measure(8)
    assert pace.ahead == before  # too soon to tell
