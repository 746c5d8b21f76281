"""Activities in processes of their own, which are killed, stopped and told from here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]
Worker = Callable[..., Any]


@pytest.fixture
def elsewhere(run_process: Any, database_url: str) -> Worker:
    """Starts a process that runs the application's actors."""

    def start(*, gevent: bool = False, **env: str) -> Any:
        env = {"TEST_URL": database_url, "dramatiq_worker_timeout": "200", **env}
        if gevent:
            command = Path(sys.executable).parent / "dramatiq-gevent"
            process = run_process(
                *(sys.executable, command, "tests.workflow.activities_application:broker"),
                *("--processes", "1", "--threads", "4"),
                env=env,
            )
        else:
            process = run_process.dramatiq(
                "tests.workflow.activities_application:broker", "--processes", "1", "--threads", "4", env=env
            )
        process.wait_for("Worker process is ready")
        return process

    return start


def stub(name: str, **options: Any) -> Any:
    return durable.activity_stub(name, queue_name="elsewhere").options(**options)


def test_a_killed_worker_s_activity_goes_on_where_it_was(
    broker: durable.DurableBroker, start_worker: StartWorker, elsewhere: Worker
) -> None:
    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        return await stub("count_up").execute(120)

    first = elsewhere()
    start_worker()
    handle = run.start()
    first.wait_for("hangs")
    # What was said last is told by and by.
    wait_until(lambda: handle.describe().pending[0].heartbeat_details >= 100, timeout=10, message="details")
    first.kill()
    elsewhere()
    start, most = handle.result(timeout=30)
    assert (start >= 100, most) == (True, 120)


@pytest.mark.parametrize("limit", ["start_to_close", "heartbeat", "schedule_to_close"])
def test_limits_hold_when_the_worker_is_killed(
    broker: durable.DurableBroker, start_worker: StartWorker, elsewhere: Worker, limit: str
) -> None:
    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        try:
            await stub("hang", retry=durable.RetryPolicy(maximum_attempts=1), **{limit: 1.0}).execute()
        except durable.ActivityFailed as e:
            return e.timeout

    # The dead worker itself is noticed much later.
    process = elsewhere(TEST_RECLAIM="60")
    start_worker()
    handle = run.start()
    process.wait_for("hangs")
    process.kill()
    assert handle.result(timeout=15) == limit


@pytest.mark.parametrize("gevent", [False, True])
@pytest.mark.parametrize("how", ["cancel", "terminate"])
def test_code_in_another_process_is_told(
    broker: durable.DurableBroker, start_worker: StartWorker, elsewhere: Worker, gevent: bool, how: str
) -> None:
    @durable.workflow(queue_name="runs")
    async def run() -> None:
        await stub("hang").execute()

    process = elsewhere(gevent=gevent)
    start_worker()
    handle = run.start()
    process.wait_for("hangs")
    began = time.monotonic()
    getattr(handle, how)()
    process.wait_for("was cancelled", timeout=5)
    assert time.monotonic() - began < 3
    broker.declare_queue("elsewhere")
    broker.join("elsewhere", timeout=10_000)


def test_a_worker_s_stop_counts_no_attempt_of_a_policy(
    broker: durable.DurableBroker, start_worker: StartWorker, elsewhere: Worker
) -> None:
    @durable.workflow(queue_name="runs")
    async def run() -> Any:
        return await stub("stopped", retry=durable.RetryPolicy(maximum_attempts=1)).execute()

    process = elsewhere()
    start_worker()
    handle = run.start()
    process.wait_for("attempt 1 hangs")
    assert process.stop() == 0
    elsewhere(TEST_SECOND="1")
    assert handle.result(timeout=15) == "attempt 1"
