"""No middleware may expire, retry, skip or interrupt the tasks of a workflow; its activities are actors like others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import AgeLimit, Retries, ShutdownNotifications, TimeLimit

import dramatiq_durable as durable

from .conftest import Record, Rows, middleware

HARSH = [lambda: AgeLimit(max_age=1), lambda: Retries(max_retries=0), lambda: TimeLimit(time_limit=1, interval=1)]


@pytest.mark.parametrize("late", [False, True], ids=["given", "added later"])
def test_limits_of_the_broker_leave_tasks_alone(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows, late: bool
) -> None:
    broker = make_broker(middleware=[] if late else [make() for make in HARSH])

    @durable.workflow(broker=broker, queue_name="flows")
    async def flow(n: int) -> int:
        for _ in range(3):
            await asyncio.sleep(0.05)
        end = asyncio.get_running_loop().time()
        return n + int(end >= 0)

    if late:
        for make in HARSH:
            broker.add_middleware(make())
    start_worker(broker)
    handles = [flow.start(n) for n in range(5)]
    assert [handle.result(timeout=20) for handle in handles] == [1, 2, 3, 4, 5]
    assert rows.dead_letters() == []


def test_an_activity_fails_as_its_options_say(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @durable.activity(broker=broker, max_retries=2, min_backoff=1, max_backoff=2)
    def failing() -> None:
        got(durable.activity_info().attempt)  # type: ignore[union-attr]
        raise KeyError("always")

    @durable.activity(broker=broker, max_age=1)
    def old() -> None:
        got("never")

    @durable.workflow(broker=broker)
    async def flow() -> list[Any]:
        failures: list[Any] = []
        for call in (failing.execute(), old.options(delay=50).execute()):
            try:
                await call
            except durable.ActivityFailed as e:
                failures.append((e.type, e.attempt))
        return failures

    start_worker(broker)
    [first, second] = flow.start().result(timeout=20)
    assert first == ["KeyError", 3]
    assert second[1] == 1
    assert got.values == [1, 2, 3]
    # What failed is an event of the run, not a dead letter.
    assert (rows.dead_letters(), rows.count()) == ([], 0)


def test_an_activity_that_no_worker_knows_fails(broker: durable.DurableBroker, start_worker: Any) -> None:
    @durable.workflow(broker=broker)
    async def flow() -> str:
        try:
            await durable.activity_stub("nobody").execute()
        except durable.ActivityFailed as e:
            return e.type
        return "?"

    start_worker(broker)
    assert flow.start().result(timeout=20) == "ActorNotFound"


@pytest.mark.administrator
def test_flush_leaves_what_belongs_to_a_run(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def plain() -> None: ...

    @durable.workflow(broker=broker)
    async def flow() -> str:
        return "done"

    handle = flow.start()
    plain.send()
    broker.flush_all()
    assert rows.count() == 1
    start_worker(broker)
    assert handle.result(timeout=20) == "done"


def test_a_shutdown_notification_does_not_break_a_task(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any
) -> None:
    others = [m for m in middleware() if not isinstance(m, ShutdownNotifications)]
    broker = make_broker(middleware=[*others, ShutdownNotifications(notify_shutdown=True)])

    @durable.workflow(broker=broker)
    async def flow() -> str:
        await durable.wait_for_signal("go")
        return "done"

    handle = flow.start()
    for _ in range(3):
        start_worker(broker).stop(timeout=5000)
    handle.signal("go")
    start_worker(broker)
    assert handle.result(timeout=20) == "done"
