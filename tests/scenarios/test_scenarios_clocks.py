"""Schedules, environments, the replayer and what rides a transaction, told by the page of the API alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment, Replayer
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]


# --- schedules ------------------------------------------------------------------------------------------


def test_a_schedule_is_made_shown_paused_and_deleted(start_worker: StartWorker) -> None:
    ran: list[Any] = []

    @dramatiq.actor
    def actor(a: int, b: int = 0) -> None:
        ran.append([a, b])

    @durable.workflow
    async def flow(x: int) -> int:
        ran.append(x)
        return x

    start_worker()
    durable.schedules.create(
        "daily", cron="0 12 * * *", target=actor, args=(1,), kwargs={"b": 2}, timezone="Europe/Paris"
    )
    durable.schedules.create("yearly", cron="0 0 1 1 *", target=flow, args=(7,), paused=True)
    assert sorted(s.name for s in durable.schedules.list()) == ["daily", "yearly"]
    d = durable.schedules.describe("daily")
    assert (d.name, d.cron, d.timezone, d.overlap, d.paused) == ("daily", "0 12 * * *", "Europe/Paris", "skip", False)
    assert durable.schedules.describe("yearly").paused is True
    with pytest.raises(durable.ScheduleExists):
        durable.schedules.create("daily", cron="* * * * *", target=actor, args=(1,))
    durable.schedules.trigger("daily")
    wait_until(lambda: ran == [[1, 2]])
    durable.schedules.trigger("yearly")
    wait_until(lambda: ran == [[1, 2], 7])
    durable.schedules.pause("daily")
    assert durable.schedules.describe("daily").paused is True
    durable.schedules.resume("daily")
    assert durable.schedules.describe("daily").paused is False
    for name in ("daily", "yearly"):
        durable.schedules.delete(name)
    assert list(durable.schedules.list()) == []
    with pytest.raises(durable.ScheduleNotFound):
        durable.schedules.describe("daily")


def test_backfill_starts_what_was_due(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        return durable.now().isoformat()

    start_worker()
    durable.schedules.create("hourly", cron="0 * * * *", target=flow, overlap="allow")
    day = datetime(2024, 1, 1, tzinfo=UTC)
    durable.schedules.backfill("hourly", day, day + timedelta(hours=3))
    wait_until(lambda: durable.count_workflows("status = 'completed'") >= 3)
    runs = durable.list_workflows(order="started_at")
    assert len({r.workflow_id for r in runs}) == len(runs)
    assert 3 <= len(runs) <= 4


def test_wrong_schedules() -> None:
    @dramatiq.actor
    def actor() -> None: ...

    for wrong in (
        {"cron": "61 * * * *"},
        {"cron": "* * * * *", "timezone": "Mars/One"},
        {"cron": "* * * * *", "overlap": "x"},
    ):
        with pytest.raises(durable.InvalidSchedule):
            durable.schedules.create("s", target=actor, **wrong)
    for call in ("pause", "resume", "trigger", "delete", "describe"):
        with pytest.raises(durable.ScheduleNotFound):
            getattr(durable.schedules, call)("nobody")


# --- the environment ------------------------------------------------------------------------------------


def test_time_is_skipped() -> None:
    @durable.activity
    def charge(n: int) -> int:
        raise AssertionError("it is mocked")

    @durable.workflow
    async def child(n: int) -> int:
        await durable.sleep("10 days")
        return n * 2

    @durable.workflow
    async def flow(n: int) -> Any:
        began = durable.now()
        value = await charge.execute(n)
        await durable.sleep("30 days")
        value = await child.execute(value)
        try:
            await durable.wait_for_signal("x", timeout="2 days")
        except TimeoutError:
            return [value, (durable.now() - began).days]

    began = time.monotonic()
    with Environment(mocks={charge: lambda n: n + 1}) as env:
        before = env.now()
        assert env.run(flow, 1) == [4, 42]
        assert env.now() - before >= timedelta(days=42)
        handle = env.start(flow, 2)
        env.advance("31 days")
        assert handle.status() == "running"
        handle.signal("x")
        env.advance(timedelta(days=20))
        assert handle.status() == "completed"
        assert handle.result() is None
    assert time.monotonic() - began < 10


def test_mocked_children_failures_and_retries() -> None:
    tries: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval="1 hour", maximum_attempts=3))
    def act() -> int: ...

    @durable.workflow
    async def child(n: int) -> int:
        raise AssertionError("it is mocked")

    @durable.workflow
    async def flow() -> Any:
        began = durable.now()
        value = await act.execute()
        return [value, await child.execute(5), (durable.now() - began).total_seconds() // 3600]

    def flaky() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ValueError("not yet")
        return len(tries)

    async def kid(n: int) -> int:
        return n + 1

    with Environment(mocks={act: flaky, child: kid}) as env:
        assert env.run(flow) == [3, 6, 3]

    def broken() -> int:
        raise KeyError("always")

    with Environment(mocks={act: broken}) as env, pytest.raises(durable.WorkflowFailed) as failed:
        env.run(flow)
    assert failed.value.type == "ActivityFailed"
    cause = failed.value.__cause__
    while cause.__cause__ is not None:  # type: ignore[union-attr]
        cause = cause.__cause__  # type: ignore[union-attr]
    assert cause.type == "KeyError"  # type: ignore[union-attr]


def test_timeouts_and_heartbeats_in_the_environment() -> None:
    @durable.activity(retry=durable.RetryPolicy(maximum_attempts=1))
    def sleepy() -> str:
        info = durable.activity_info()
        assert info is not None
        assert info.workflow_id
        for n in range(10):
            time.sleep(60)
            durable.heartbeat(n)
        return "slept"

    @durable.workflow
    async def flow() -> Any:
        out: list[Any] = [await sleepy.execute()]
        for options in ({"start_to_close": 30}, {"heartbeat": "30 s"}):
            try:
                await sleepy.options(**options).execute()
            except durable.ActivityFailed as e:
                out.append(e.timeout)
        return out

    with Environment() as env:
        assert env.run(flow) == ["slept", "start_to_close", "heartbeat"]


# --- the replayer ---------------------------------------------------------------------------------------


def test_replaying_exported_histories(broker: durable.DurableBroker, start_worker: StartWorker, tmp_path: Path) -> None:
    def define(variant: int) -> Any:
        @durable.workflow(name="flow", broker=broker if variant == 0 else durable.DurableBroker("postgresql://nowhere"))
        async def flow(n: int) -> int:
            if variant == 1:
                await durable.sleep(1)
            if variant == 2:
                return n
            value = await act.options().execute(n if variant != 3 else n + 1)
            if variant == 4:
                await durable.sleep(0.01)
            return value

        return flow

    @durable.activity
    def act(n: int) -> int:
        return n

    flow = define(0)
    start_worker()
    handle = flow.start(3)
    handle.result(timeout=10)
    text = handle.export()
    path = tmp_path / "history.json"
    path.write_text(text)
    Replayer([flow]).replay(text)
    Replayer([flow]).replay(path)
    Replayer([flow]).replay(str(path))
    for variant in (1, 2, 3, 4):
        with pytest.raises(durable.Nondeterminism) as wrong:
            Replayer([define(variant)]).replay(text)
        assert wrong.value.event_id in (2, 3, 4), variant
        assert wrong.value.expected
        assert wrong.value.got
        assert str(wrong.value.event_id) in str(wrong.value)


def test_histories_of_every_end_replay(start_worker: StartWorker) -> None:
    @durable.activity(retry=durable.RetryPolicy(maximum_attempts=1))
    def breaks() -> None:
        raise ValueError("x")

    @durable.workflow
    async def fails() -> None:
        await breaks.execute()

    @durable.workflow
    async def waits(n: int) -> None:
        if n:
            await durable.sleep(0.001)
            durable.continue_as_new(n - 1)
        try:
            await durable.wait_for_signal("never")
        finally:
            await durable.sleep(0.001)

    start_worker()
    replayer = Replayer([fails, waits])
    failed = fails.start()
    with pytest.raises(durable.WorkflowFailed):
        failed.result(timeout=10)
    replayer.replay(failed.export())
    continued = waits.options(workflow_id="w").start(1)
    wait_until(lambda: continued.status() == "continued_as_new")
    replayer.replay(continued.export())
    latest = durable.get_handle("w")
    wait_until(lambda: latest.describe().stack)
    replayer.replay(latest.export())
    latest.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        latest.result(timeout=10)
    replayer.replay(latest.export())
    ended = waits.start(0)
    ended.terminate("x")
    replayer.replay(ended.export())
    timed = waits.options(run_timeout=0.2).start(0)
    with pytest.raises(durable.WorkflowTimedOut):
        timed.result(timeout=10)
    replayer.replay(timed.export())


# --- transactions ---------------------------------------------------------------------------------------


def test_start_and_signal_ride_a_transaction(start_worker: StartWorker, database_url: str) -> None:
    @durable.workflow
    async def flow() -> Any:
        return await durable.wait_for_signal("s")

    start_worker()
    with psycopg.connect(database_url) as conn, durable.using(conn):
        lost = flow.options(workflow_id="lost").start()
        conn.rollback()
    with pytest.raises(durable.WorkflowNotFound):
        lost.status()
    with psycopg.connect(database_url) as conn, durable.using(conn):
        kept = flow.options(workflow_id="kept").start()
        kept.signal("s", 4)
    assert kept.result(timeout=10) == 4

    async def ride() -> Any:
        async with await psycopg.AsyncConnection.connect(database_url) as conn, durable.using(conn):
            handle = await flow.options(workflow_id="async").astart()
            await handle.asignal("s", 5)
        return await handle.aresult(timeout=10)

    assert asyncio.run(ride()) == 5


def test_an_activity_s_transaction(start_worker: StartWorker, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("CREATE TABLE paid (n int)")

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2))
    def pay(n: int) -> int:
        info = durable.activity_info()
        assert info is not None
        with durable.transaction() as conn:
            conn.execute("INSERT INTO paid VALUES (%s)", (n,))
        if info.attempt == 1:
            raise RuntimeError("after the effect")
        return n

    @durable.workflow
    async def flow() -> int:
        return await pay.execute(3)

    start_worker()
    assert flow.start().result(timeout=10) == 3
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT n FROM paid").fetchall() == [(3,)]
