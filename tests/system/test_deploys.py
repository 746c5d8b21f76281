"""New code is deployed while runs are under way: real worker processes of different versions on one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.processes import Process, Processes

Deploy = Callable[[str], Process]


@pytest.fixture
def client(database_url: str) -> Iterator[durable.DurableBroker]:
    broker = durable.DurableBroker(database_url)
    yield broker
    broker.close()


@pytest.fixture
def order(client: durable.DurableBroker) -> Any:
    """The workflow, as a client knows it: by its name and stream."""

    @durable.workflow(queue_name="shop", broker=client)
    async def order() -> Any: ...

    return order


@pytest.fixture
def deploy(run_process: Processes, database_url: str) -> Deploy:
    def deploy(version: str) -> Process:
        process = run_process.dramatiq(
            "tests.system.deployed:broker",
            *("--processes", "1", "--threads", "2"),
            env={"TEST_URL": database_url, "TEST_VERSION": version, "dramatiq_worker_timeout": "100"},
        )
        process.wait_for("registered as worker")
        return process

    return deploy


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def has_printed(handle: durable.WorkflowHandle[Any]) -> None:
    wait_until(lambda: "ActivityCompleted" in types(handle), timeout=30)


def test_runs_under_way_stay_with_the_old_branch(order: Any, deploy: Deploy) -> None:
    old = deploy("old")
    before = order.start()
    has_printed(before)
    old.stop()

    new = deploy("patched")
    after = order.start()
    has_printed(after)
    before.signal("paid")
    assert before.result(timeout=30) == ["plain by old", "plain by patched"]
    new.stop()

    deploy("clean")
    last = order.start()
    has_printed(last)
    for handle in (after, last):
        handle.signal("paid")
    assert after.result(timeout=30) == ["fancy by patched", "fancy by clean"]
    assert last.result(timeout=30) == ["fancy by clean", "fancy by clean"]
    assert types(after).count("PatchRecorded") == 1


def test_both_versions_work_side_by_side_while_they_are_exchanged(order: Any, deploy: Deploy) -> None:
    """A run of the new code is put off by workers of the old, and ends once only new ones are left."""
    old = deploy("old")
    before = [order.start() for _ in range(5)]
    for handle in before:
        has_printed(handle)
    deploy("patched")
    after = [order.start() for _ in range(5)]
    for handle in after:
        wait_until(lambda handle=handle: "ActivityCompleted" in types(handle), timeout=30)
    for handle in (*before, *after):
        handle.signal("paid")
    for handle in before:
        assert [text.split()[0] for text in handle.result(timeout=30)] == ["plain", "plain"]
    old.stop()
    for handle in after:
        kinds = {text.split()[0] for text in handle.result(timeout=60)}
        assert kinds == ({"fancy"} if "PatchRecorded" in types(handle) else {"plain"})


def test_code_that_does_not_fit_leaves_the_run_open_and_says_why(order: Any, deploy: Deploy) -> None:
    old = deploy("old")
    handle = order.start()
    has_printed(handle)
    old.stop()
    careless = deploy("careless")
    handle.signal("paid")
    failure = wait_until(lambda: handle.describe().task_failure, timeout=30)
    assert "print_receipt" in str(failure)
    assert handle.status() == "running"
    careless.stop()
    deploy("old")
    assert handle.result(timeout=60) == ["plain by old", "plain by old"]


def test_a_reset_with_mended_code(order: Any, deploy: Deploy) -> None:
    """What was decided wrongly is taken again by the new code, in another process."""
    old = deploy("old")
    handle = order.start()
    handle.signal("paid")
    assert handle.result(timeout=30) == ["plain by old", "plain by old"]
    old.stop()
    deploy("patched")
    first_printed = next(e.event_id for e in handle.history() if e.type == "ActivityCompleted")
    assert handle.reset(first_printed).result(timeout=30) == ["plain by old", "plain by patched"]
    assert handle.reset(1).result(timeout=30) == ["fancy by patched", "fancy by patched"]
