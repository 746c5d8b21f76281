"""Workers are killed while runs emit: every subscriber is given every event, those of a run in order; entities count
once; whoever follows the output misses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import psycopg

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.processes import Processes

RUNS, EVENTS, KILLS = 12, 12, 5


@contextmanager
def client(url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(url, middleware=[])
    yield broker
    broker.close()


def test_nothing_emitted_is_lost_or_given_out_of_order(database_url: str, run_process: Processes) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn, client(database_url) as broker:
        conn.execute("CREATE TABLE given (id serial, listener text, workflow_id text, n int)")

        def start() -> Any:
            return run_process.dramatiq(
                "tests.chaos.emitting:broker",
                *("--processes", "1", "--threads", "3"),
                env={"TEST_URL": database_url, "dramatiq_worker_timeout": "200"},
            )

        def given() -> int:
            row = conn.execute("SELECT count(*) FROM given").fetchone()
            return int(row[0]) if row else 0

        workers = [start(), start()]
        wait_until(lambda: conn.execute("SELECT count(*) FROM durable.subscription").fetchone() == (2,), timeout=30)

        @durable.workflow(queue_name="runs", broker=broker)
        async def emitter() -> int: ...

        handles = [emitter.options(workflow_id=f"run-{n}").start() for n in range(RUNS)]
        seen: list[tuple[int, int]] = []
        follower = threading.Thread(target=lambda: seen.extend(handles[0].follow()))
        follower.start()
        total = 2 * RUNS * EVENTS
        for kill in range(KILLS):
            wait_until(lambda kill=kill: given() >= total * (kill + 1) // (KILLS + 2), timeout=60)  # type: ignore[misc]
            workers.pop(0).kill()
            workers.append(start())
        assert [handle.result(timeout=60) for handle in handles] == [EVENTS] * RUNS
        wait_until(lambda: conn.execute("SELECT count(*) FROM durable.topic_event").fetchone() == (0,), timeout=60)
        for listener in ("careful", "clumsy"):
            for run in range(RUNS):
                rows = conn.execute(
                    "SELECT n FROM given WHERE listener = %s AND workflow_id = %s ORDER BY id", (listener, f"run-{run}")
                )
                # Each note commits with the end of its message: here at least once is once.
                assert [n for (n,) in rows] == list(range(EVENTS)), (listener, run)
        assert conn.execute("SELECT count(*) FROM durable.dead_letter").fetchone() == (0,)
        follower.join(15)
        assert seen == [(n, n) for n in range(EVENTS)]
        entities = durable.count_workflows(group_by="entity.emitted", broker=broker)
        assert entities == {EVENTS: RUNS}


def test_two_workers_share_runs_that_emit(database_url: str) -> None:
    """Each has its own copy of the runs in memory, and takes events of the same runs."""
    given: dict[str, list[int]] = {}
    lock = threading.Lock()
    brokers = [durable.DurableBroker(database_url) for _ in range(2)]
    workers = []
    for broker in brokers:

        @durable.subscribe("t")
        @dramatiq.actor(queue_name="q", broker=broker)
        def listener(n: int) -> None:
            info = durable.event_info()
            assert info is not None
            with lock:
                given.setdefault(info.workflow_id, []).append(n)

        @durable.workflow(queue_name="q", broker=broker)
        async def emitter() -> None:
            for n in range(20):
                await durable.emit("t", n)
                if n % 4 == 0:
                    await durable.sleep(0.005)

        worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
        worker.start()
        workers.append(worker)
    try:
        handles = [brokers[n % 2].workflows["emitter"].start() for n in range(10)]
        for handle in handles:
            handle.result(timeout=30)
        wait_until(lambda: sum(map(len, given.values())) >= 200, timeout=30)
        assert given == {handle.workflow_id: list(range(20)) for handle in handles}
    finally:
        for worker in workers:
            worker.stop()
        for broker in brokers:
            broker.close()
