"""Eight processes start runs with the same workflow ids."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import dramatiq_durable as durable
from tests.support.processes import Processes

PROCESSES, ROUNDS = 8, 12

Race = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture
def race(run_process: Processes, database_url: str) -> Race:
    def race(conflict: str, reuse: str) -> list[dict[str, Any]]:
        command = (sys.executable, "-m", "tests.system.racing", conflict, reuse, str(ROUNDS))
        processes = [run_process(*command, env={"TEST_URL": database_url}) for _ in range(PROCESSES)]
        return [json.loads(process.wait_for('"counts"', timeout=60)) for process in processes]

    return race


def runs(database_url: str) -> Counter[tuple[str, str]]:
    """How many runs of each workflow id are in which status."""
    with psycopg.connect(database_url) as conn:
        return Counter(conn.execute("SELECT workflow_id, status FROM durable.run").fetchall())


def test_one_of_them_starts_each(race: Race, database_url: str) -> None:
    told = race("fail", "allow")
    assert sum(t["counts"].get("started", 0) for t in told) == ROUNDS
    assert sum(t["counts"].get("exists", 0) for t in told) == ROUNDS * (PROCESSES - 1)
    assert runs(database_url) == {(f"id-{n}", "running"): 1 for n in range(ROUNDS)}


def test_all_of_them_use_the_one_that_is_there(race: Race, database_url: str) -> None:
    told = race("use_existing", "allow")
    assert all(t["counts"] == {"started": ROUNDS} for t in told)
    assert len({tuple(outcome) for t in told for outcome in t["outcomes"]}) == ROUNDS
    assert runs(database_url) == {(f"id-{n}", "running"): 1 for n in range(ROUNDS)}


def test_the_last_one_stays(race: Race, database_url: str) -> None:
    told = race("terminate_existing", "allow")
    assert all(t["counts"] == {"started": ROUNDS} for t in told)
    counted = runs(database_url)
    for n in range(ROUNDS):
        assert counted[f"id-{n}", "running"] == 1
        assert counted[f"id-{n}", "terminated"] == PROCESSES - 1


def test_a_closed_one_is_not_started_again(race: Race, database_url: str) -> None:
    broker = durable.DurableBroker(database_url)

    @durable.workflow(queue_name="races", broker=broker)
    async def raced() -> Any: ...

    for n in range(ROUNDS):
        raced.options(workflow_id=f"id-{n}").start().terminate()
    broker.close()
    told = race("fail", "reject")
    assert all(t["counts"] == {"exists": ROUNDS} for t in told)
    told = race("fail", "allow_failed")
    assert sum(t["counts"].get("started", 0) for t in told) == ROUNDS


def test_twice_in_one_transaction(database_url: str) -> None:
    broker = durable.DurableBroker(database_url)

    @durable.workflow(queue_name="races", broker=broker)
    async def raced() -> Any: ...

    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            first = raced.options(workflow_id="one").start()
            with pytest.raises(durable.WorkflowAlreadyStarted):
                raced.options(workflow_id="one").start()
            second = raced.options(workflow_id="one", id_conflict="use_existing").start()
            third = raced.options(workflow_id="one", id_conflict="terminate_existing").start()
        conn.commit()
    assert second.run_id == first.run_id
    assert [first.status(), third.status()] == ["terminated", "running"]
    broker.close()
