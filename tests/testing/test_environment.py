"""The environment for tests: time, activities, mocks."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment

pytestmark = pytest.mark.usefixtures("broker")


def type_of(error: Any) -> str:
    return str(error.type)


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [event.type for event in handle.history()]


# --- time -----------------------------------------------------------------------------------------------------


def test_thirty_days_take_milliseconds(env: Environment) -> None:
    @durable.workflow
    async def patient() -> str:
        began = durable.now()
        await durable.sleep("30 days")
        await asyncio.sleep(86_400)
        return str(durable.now() - began)

    began = time.monotonic()
    assert env.run(patient) == "31 days, 0:00:00"
    assert time.monotonic() - began < 2


def test_now_and_advance(env: Environment) -> None:
    @durable.workflow
    async def daily() -> int:
        for day in range(3):
            await durable.sleep("1 day")
            assert durable.now() >= env_started + timedelta(days=day + 1)
        return 3

    env_started = env.now()
    assert env_started.utcoffset() == timedelta(0)
    assert abs(env_started.timestamp() - time.time()) < 60
    handle = env.start(daily)
    assert env.now() == env_started  # a start takes no time
    env.advance("36 hours")
    assert env.now() == env_started + timedelta(hours=36)
    assert types(handle).count("TimerFired") == 1
    env.advance(timedelta(hours=11, minutes=59, seconds=59))
    assert types(handle).count("TimerFired") == 1
    env.advance(1)
    assert types(handle).count("TimerFired") == 2
    assert handle.status() == "running"
    assert handle.result() == 3
    assert env.now() == env_started + timedelta(days=3)
    with pytest.raises(ValueError, match="negative"):
        env.advance(-1)


def test_a_delayed_start_and_what_comes_before_it(env: Environment) -> None:
    @durable.workflow
    async def later() -> Any:
        return durable.now().isoformat(), await durable.wait_for_signal("go")

    began = env.now()
    handle = env.start(later.options(delay=timedelta(hours=1)))
    handle.signal("go", 1)
    assert types(handle) == ["WorkflowStarted"]
    at, signal = handle.result()
    assert datetime.fromisoformat(at) == began + timedelta(hours=1)
    assert signal == 1


# --- activities ---------------------------------------------------------------------------------------------


@dataclass
class Parcel:
    order_id: str
    due: datetime


def test_activities_run_and_values_cross_the_converter(env: Environment) -> None:
    seen: list[Any] = []

    @durable.activity
    def pack(parcel: Parcel, *, fragile: bool = False) -> Parcel:
        seen.append((parcel, fragile))
        return Parcel(parcel.order_id + "!", parcel.due + timedelta(days=1))

    @durable.activity
    async def weigh(parcel: Parcel) -> tuple[int, str]:
        await asyncio.sleep(0)
        return 3, parcel.order_id

    @durable.workflow
    async def ship(order_id: str, due: datetime) -> Parcel:
        packed = await pack.execute(Parcel(order_id, due), fragile=True)
        assert await weigh.execute(packed) == (3, "o-1!")
        return packed

    due = datetime(2026, 1, 1)
    assert env.run(ship, "o-1", due) == Parcel("o-1!", due + timedelta(days=1))
    assert seen == [(Parcel("o-1", due), True)]
    assert env.calls == [
        ("pack", (Parcel("o-1", due),), {"fragile": True}),
        ("weigh", (Parcel("o-1!", due + timedelta(days=1)),), {}),
    ]


def test_retries_are_the_actors_and_take_no_time(env: Environment) -> None:
    attempts: list[Any] = []

    @durable.activity(max_retries=3, min_backoff=60_000, max_backoff=3_600_000)
    def flaky() -> str:
        info = durable.activity_info()
        assert info is not None
        attempts.append((env.now(), info.attempt))
        if len(attempts) < 4:
            raise ConnectionError("busy")
        return "done"

    @durable.workflow
    async def persistent() -> str:
        return await flaky.execute()

    assert env.run(persistent) == "done"
    assert [attempt for _, attempt in attempts] == [1, 2, 3, 4]
    assert attempts[-1][0] - attempts[0][0] >= timedelta(minutes=2)  # Dramatiq's backoff has some chance in it


def test_an_activity_that_fails_for_good(env: Environment) -> None:
    @durable.activity(max_retries=1, min_backoff=10)
    def charge() -> None:
        try:
            raise KeyError("card")
        except KeyError as e:
            raise ValueError("declined") from e

    @durable.workflow
    async def order() -> None:
        await charge.execute()

    @durable.workflow
    async def careful() -> list[Any]:
        try:
            await charge.execute()
        except durable.ActivityFailed as e:
            return [e.activity, e.attempt, e.type, e.message, e.retryable, type_of(e.__cause__)]
        return []

    assert env.run(careful) == ["charge", 2, "ValueError", "declined", False, "KeyError"]
    with pytest.raises(durable.WorkflowFailed) as failed:
        env.run(order)
    assert failed.value.type == "ActivityFailed"


def test_throws_and_retry_when_decide(env: Environment) -> None:
    @durable.activity(throws=(ValueError,))
    def throws() -> None:
        raise ValueError

    @durable.activity(retry_when=lambda retries, error: retries < 2)
    def while_asked() -> None:
        raise ValueError

    @durable.workflow
    async def both() -> list[int]:
        outcomes = await asyncio.gather(throws.execute(), while_asked.execute(), return_exceptions=True)
        return [o.attempt for o in outcomes if isinstance(o, durable.ActivityFailed)]

    assert env.run(both) == [1, 3]


def test_activities_that_sleep_take_the_environments_time(env: Environment) -> None:
    @durable.activity
    def bakes(minutes: int) -> int:
        time.sleep(minutes * 60)
        return minutes

    @durable.activity
    async def rises(minutes: int) -> int:
        async with asyncio.timeout(86_400):
            await asyncio.gather(asyncio.sleep(minutes * 60), asyncio.sleep(1))
        return minutes

    @durable.workflow
    async def bread() -> list[Any]:
        began = durable.now()
        got: list[Any] = []
        for next_one in asyncio.as_completed([bakes.execute(50), rises.execute(20), bakes.execute(30)]):
            got.append(await next_one)
            got.append((durable.now() - began).total_seconds() / 60)
        try:
            await asyncio.wait_for(rises.execute(600), 3600)
        except TimeoutError:
            got.append((durable.now() - began).total_seconds() / 60)
        return got

    began = time.monotonic()
    assert env.run(bread) == [20, 20, 30, 30, 50, 50, 110]
    assert time.monotonic() - began < 3


def test_cancelling_a_sleeping_activity(env: Environment) -> None:
    ends: list[str] = []

    @durable.activity
    def sleepy(name: str) -> None:
        try:
            time.sleep(3600)
        except durable.ActivityCancelled:
            ends.append(name)
            raise

    @durable.activity
    async def drowsy(name: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ends.append(name)

    @durable.workflow
    async def short() -> str:
        tasks = [
            asyncio.create_task(sleepy.execute("sync")),
            asyncio.create_task(drowsy.execute("async")),
            asyncio.create_task(sleepy.options(cancellation="wait").execute("waited")),
        ]
        await durable.sleep(60)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return ",".join(type(o).__name__ for o in outcomes)

    handle = env.start(short)
    env.advance(59)
    assert ends == []
    assert handle.result() == "CancelledError,CancelledError,CancelledError"
    assert sorted(ends) == ["async", "sync", "waited"]
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name == "durable-activity"]


def test_time_sleep_elsewhere_is_real(env: Environment) -> None:
    began = time.monotonic()
    time.sleep(0.02)
    assert time.monotonic() - began >= 0.02
    with pytest.raises(TypeError):
        time.sleep("a while")  # type: ignore[arg-type]


def test_real_threads_and_io_of_an_async_activity(env: Environment) -> None:
    @durable.activity
    async def works() -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with asyncio.timeout(30):  # must not be skipped while something real is under way
            slow = await asyncio.to_thread(lambda: (time.sleep(0.05), "thread")[1])
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"io\n")
            line = await reader.readline()
            writer.close()
            server.close()
        return slow + line.decode().strip()

    @durable.workflow
    async def uses() -> str:
        return await works.execute()

    assert env.run(uses) == "threadio"


# --- mocks ---------------------------------------------------------------------------------------------------


def test_mocks_by_actor_stub_workflow_and_name() -> None:
    @dramatiq.actor
    def plain(n: int) -> int:
        raise AssertionError("not mocked")

    adapted = durable.activity(plain)
    stub = durable.activity_stub("remote", queue_name="elsewhere")

    @durable.activity
    def named(n: int) -> int:
        raise AssertionError("not mocked")

    @durable.workflow
    async def child(n: int) -> int:
        raise AssertionError("not mocked")

    @durable.workflow
    async def parent() -> list[int]:
        return [
            await adapted.execute(1),
            await stub.execute(2),
            await named.execute(n=3),
            await child.execute(4),
        ]

    async def of_child(n: int) -> int:
        await asyncio.sleep(3600)
        return n * 10

    mocks = {plain: lambda n: n * 10, stub: lambda n: n * 10, "named": lambda n: n * 10, child: of_child}
    with Environment(mocks=mocks) as env:
        began = env.now()
        assert env.run(parent) == [10, 20, 30, 40]
        assert env.now() - began == timedelta(hours=1)
        assert env.calls == [("plain", (1,), {}), ("remote", (2,), {}), ("named", (), {"n": 3}), ("child", (4,), {})]


def test_a_mock_that_fails_is_retried_and_then_fails_the_activity() -> None:
    @durable.activity(max_retries=2)
    def charge() -> None: ...

    @durable.workflow
    async def child() -> None: ...

    @durable.workflow
    async def order() -> list[str]:
        seen = []
        for call in (charge, child):
            try:
                await call.execute()
            except (durable.ActivityFailed, durable.ChildWorkflowFailed) as e:
                seen.append(f"{type(e).__name__} {e.type} {e.message}")
        return seen

    def refuse() -> None:
        raise ValueError("as asked")

    with Environment(mocks={charge: refuse, child: refuse}) as env:
        assert env.run(order) == ["ActivityFailed ValueError as asked", "ChildWorkflowFailed ValueError as asked"]
        assert [name for name, _, _ in env.calls] == ["charge"] * 3 + ["child"]


def test_what_is_not_mocked_and_not_here(env: Environment) -> None:
    stub = durable.activity_stub("remote")

    @durable.workflow
    async def calls() -> None:
        await stub.execute()

    with pytest.raises(durable.DurableError, match=r"'remote'.*its code is not here: mock it"):
        env.run(calls)


def test_mocks_that_make_no_sense() -> None:
    @durable.activity
    def charge() -> None: ...

    with pytest.raises(TypeError, match="the mock of 'charge' is a function"):
        Environment(mocks={charge: 7})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="mocks are for activities"):
        Environment(mocks={7: lambda: None})
    with Environment() as env, pytest.raises(TypeError, match="starts workflows"):
        env.start(charge)  # type: ignore[arg-type]


def test_an_assertion_of_pytest_in_a_mock_fails_the_test_itself() -> None:
    @durable.activity
    def charge() -> None: ...

    @durable.workflow
    async def order() -> None:
        await charge.execute()

    with Environment(mocks={charge: lambda: pytest.fail("never charge")}) as env:
        with pytest.raises(pytest.fail.Exception, match="never charge"):
            env.run(order)


def test_what_needs_a_database_says_so(env: Environment) -> None:
    @durable.activity(max_retries=0)
    def writes() -> None:
        with durable.transaction():
            pass

    @durable.workflow
    async def order() -> None:
        await writes.execute()

    with pytest.raises(durable.WorkflowFailed, match="Environment has no database"):
        env.run(order)
