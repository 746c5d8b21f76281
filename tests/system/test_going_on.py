"""A chain of runs whose workers are killed again and again ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from typing import Any

import psycopg

import dramatiq_durable as durable
from tests.support.processes import Process, Processes
from tests.support.waiting import assert_nothing_is_lost

SIGNALS = 40


def test_a_chain_survives_its_workers(run_process: Processes, database_url: str) -> None:
    client = durable.DurableBroker(database_url)

    @durable.workflow(queue_name="going", broker=client)
    async def collect(seen: list[int], end: int) -> Any: ...

    def start() -> Process:
        process = run_process.dramatiq(
            "tests.system.going_on:broker",
            *("--processes", "1", "--threads", "2"),
            env={"TEST_URL": database_url, "dramatiq_worker_timeout": "100"},
        )
        process.wait_for("registered as worker")
        return process

    handle = collect.options(workflow_id="chain").start([], SIGNALS)
    workers = [start(), start()]
    dice = random.Random(4)
    for n in range(SIGNALS):
        handle.signal("n", n)
        if n % 8 == 7:
            time.sleep(dice.random() * 0.3)  # wherever they are by then
            workers.pop(0).kill()
            workers.append(start())
            assert_nothing_is_lost(database_url)
    assert handle.result(timeout=90) == list(range(SIGNALS))
    with psycopg.connect(database_url) as conn:
        counted = dict(
            conn.execute("SELECT status, count(*) FROM durable.run WHERE name = 'collect' GROUP BY 1").fetchall()
        )
        assert counted == {"continued_as_new": SIGNALS - 1, "completed": 1}
        open_runs = conn.execute("SELECT count(*) FROM durable.run WHERE status = 'running'").fetchone()
        assert open_runs == (0,)
    client.close()
