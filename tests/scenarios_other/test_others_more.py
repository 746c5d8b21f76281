"""More of the edges: interceptors, schedules, streams of output, starts that collide, long waits in the middle."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from dramatiq_durable.testing import Environment, Replayer
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


@pytest.fixture
def with_interceptors(make_broker: Any) -> Any:
    workers: list[Any] = []
    before = dramatiq.broker.global_broker

    def make(*interceptors: Any) -> tuple[Any, Callable[[], None]]:
        broker = make_broker(interceptors=list(interceptors))
        dramatiq.set_broker(broker)

        def start() -> None:
            worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
            worker.start()
            workers.append(worker)

        return broker, start

    yield make
    for worker in workers:
        worker.stop(timeout=5000)
    dramatiq.broker.global_broker = before


def test_an_interceptor_that_audits_retries_and_caches(with_interceptors: Any) -> None:
    audit: list[str] = []

    class Audit(durable.WorkflowInterceptor):
        async def execute_workflow(self, ctx: Any, call_next: Any) -> Any:
            await durable.upsert_search({"audited": ctx.name})
            began = durable.now()
            try:
                return await call_next(ctx)
            finally:
                async with durable.uncancellable():
                    await log.execute(f"{ctx.name} took {(durable.now() - began).total_seconds() >= 0}")

    class Again(durable.WorkflowInterceptor):
        async def execute_workflow(self, ctx: Any, call_next: Any) -> Any:
            for attempt in range(3):
                try:
                    return await call_next(ctx)
                except durable.ActivityFailed:
                    if attempt == 2:
                        raise
                    await durable.sleep(0.01)
            return None

    class Cache(durable.WorkflowInterceptor):
        async def execute_activity(self, ctx: Any, call_next: Any) -> Any:
            if ctx.name == "shaky" and ctx.kwargs.get("cached"):
                return "from the cache"
            ctx.headers["by"] = "cache"
            return await call_next(ctx)

    _, start = with_interceptors(Audit(), Again(), Cache())
    calls: list[Any] = []

    @durable.activity(queue_name="audit")
    def log(text: str) -> None:
        audit.append(text)

    @durable.activity(max_retries=0)
    def shaky(*, cached: bool = False) -> str:
        info = durable.activity_info()
        assert info is not None
        calls.append(info.headers["by"])
        if len(calls) < 3:
            raise OSError
        return "fresh"

    @durable.workflow
    async def flow() -> list[Any]:
        return [await shaky.execute(cached=True), await shaky.execute()]

    @durable.workflow
    async def waits() -> None:
        await durable.sleep("1h")

    start()
    handle = flow.start()
    assert handle.result(timeout=20) == ["from the cache", "fresh"]
    assert calls == ["cache"] * 3
    assert audit == ["flow took True"]
    assert durable.count_workflows("search.audited = 'flow'") == 1
    Replayer([flow]).replay(handle.export())
    cancelled = waits.start()
    wait_until(lambda: "TimerStarted" in types(cancelled))
    cancelled.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        cancelled.result(timeout=20)
    assert audit[1:] == ["waits took True"]


def test_interceptors_and_what_goes_through_them(with_interceptors: Any) -> None:
    class Twice(durable.WorkflowInterceptor):
        async def execute_workflow(self, ctx: Any, call_next: Any) -> Any:
            assert ctx.info.workflow_id
            ctx.args = tuple(a + 1 for a in ctx.args)
            return await call_next(ctx)

    _, start = with_interceptors(Twice())

    @durable.workflow
    async def kid(n: int) -> int:
        return n

    @durable.workflow
    async def flow(n: int) -> list[int]:
        if n < 3:
            durable.continue_as_new(n)
        return [n, await kid.execute(10)]

    start()
    handle = flow.start(0)
    assert handle.result(timeout=20) == [3, 11]


def test_starts_with_an_id_that_is_just_closing(broker: Any, start_worker: StartWorker) -> None:
    """Each start is one run, or the run that is there: none is lost, none is two."""
    count: list[int] = []

    @durable.activity
    def effect() -> None:
        count.append(1)

    @durable.workflow
    async def flow() -> None:
        await durable.wait_for_signal("bump")
        await effect.execute()

    start_worker()
    runs: set[str] = set()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                handle = flow.options(workflow_id="w", id_conflict="use_existing", with_signal=("bump", None)).start()
                runs.add(handle.run_id)
                durable.get_handle("w", run_id=handle.run_id).result(timeout=20)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert durable.count_workflows("workflow_id = 'w' and status = 'completed'") == len(runs) == len(count)


def test_signals_at_the_moment_of_closing(broker: Any, start_worker: StartWorker) -> None:
    """A signal either is read, or its sender is told."""

    @durable.workflow
    async def flow() -> int:
        got = 0
        try:
            while True:
                await durable.wait_for_signal("x", timeout=0.05)
                got += 1
        except TimeoutError:
            return got

    start_worker()
    for _ in range(5):
        handle = flow.start()
        sent = 0
        try:
            while True:
                handle.signal("x")
                sent += 1
                time.sleep(0.02 + 0.01 * (sent % 5))
        except durable.WorkflowClosed:
            pass
        got = handle.result(timeout=10)
        received = types(handle).count("SignalReceived")
        assert received == sent
        assert got <= sent


def test_schedules_and_overlaps(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def long() -> None:
        await durable.wait_for_signal("end")

    start_worker()
    for overlap in ("skip", "buffer_one", "allow"):
        durable.schedules.create(overlap, cron="0 0 1 1 *", target=long, overlap=overlap)
        for _ in range(3):
            durable.schedules.trigger(overlap)
    wait_until(lambda: durable.count_workflows("status = 'running'") >= 5)
    time.sleep(0.5)
    running = durable.count_workflows("status = 'running'")
    assert running in (5, 9)
    for _ in range(3):
        durable.batch_signal("status = 'running'", "end", None)
        time.sleep(0.3)
    wait_until(lambda: durable.count_workflows("status = 'running'") == 0)
    with pytest.raises(durable.ScheduleExists):
        durable.schedules.create("skip", cron="* * * * *", target=long)
    with pytest.raises(durable.InvalidSchedule):
        durable.schedules.create("bad", cron="61 * * * *", target=long)
    with pytest.raises((durable.InvalidSchedule, ValueError)):
        durable.schedules.create("bad", cron="* * * * *", target=long, overlap="never")
    with pytest.raises((durable.InvalidSchedule, ValueError)):
        durable.schedules.create("bad", cron="* * * * *", target=long, timezone="Mars/Base")
    for call in (
        durable.schedules.pause,
        durable.schedules.resume,
        durable.schedules.trigger,
        durable.schedules.delete,
    ):
        with pytest.raises(durable.ScheduleNotFound):
            call("none")


def test_output_is_followed_by_many_over_a_chain(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int) -> None:
        await durable.output({"n": n, "run": durable.info().run_id})
        await durable.sleep(0.02)
        if n < 5:
            durable.continue_as_new(n + 1)
        await durable.output(None)

    start_worker()
    handle = flow.options(workflow_id="w").start(0)
    seen: list[list[Any]] = [[], [], []]

    def follow(k: int) -> None:
        seen[k] = [(offset, value and value["n"]) for offset, value in handle.follow(offset=k)]

    threads = [threading.Thread(target=follow, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = [*((n, n) for n in range(6)), (6, None)]
    assert seen == [expected, expected[1:], expected[2:]]
    assert list(handle.follow(100)) == []
    with pytest.raises(ValueError):
        list(handle.follow(-1))


def test_emit_and_entity_with_a_run_that_fails_its_step(broker: Any, start_worker: StartWorker) -> None:
    """What a step asked for before the run failed is there, once."""
    heard: list[Any] = []

    @dramatiq.actor
    def hear(payload: Any) -> None:
        heard.append(payload)

    durable.subscribe("t")(hear)

    @durable.workflow
    async def flow() -> None:
        await durable.entity().increment("n")
        await durable.emit("t", 1)
        await durable.output("o")
        await durable.upsert_search({"s": 1})
        raise ValueError("end")

    start_worker()
    handle = flow.start()
    with pytest.raises(durable.WorkflowFailed):
        handle.result(timeout=20)
    assert handle.describe().entity == {"n": 1}
    assert handle.describe().search == {"s": 1}
    assert list(handle.follow()) == [(0, "o")]
    wait_until(lambda: heard == [1])


def test_transactions_with_sends_and_starts_inside(broker: Any, start_worker: StartWorker, database_url: str) -> None:
    with psycopg.connect(database_url) as conn:
        conn.execute("CREATE TABLE effect (n int)")
    sent: list[int] = []

    @dramatiq.actor
    def plain(n: int) -> None:
        sent.append(n)

    @durable.workflow
    async def other(n: int) -> int:
        return n

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3))
    def act() -> str:
        info = durable.activity_info()
        assert info is not None
        with durable.transaction() as conn, durable.using(conn):
            conn.execute("INSERT INTO effect VALUES (%s)", (info.attempt,))
            plain.send(info.attempt)
            other.options(workflow_id=f"o-{info.attempt}").start(info.attempt)
            durable.get_handle("target").signal("x", info.attempt)
        if info.attempt == 1:
            raise OSError
        return "done"

    @durable.workflow
    async def target() -> Any:
        return await durable.wait_for_signal("x")

    @durable.workflow
    async def flow() -> str:
        return await act.execute()

    start_worker()
    target.options(workflow_id="target").start()
    assert flow.start().result(timeout=20) == "done"
    assert durable.get_handle("target").result(timeout=20) == 2
    assert durable.get_handle("o-2").result(timeout=20) == 2
    wait_until(lambda: sent == [2])
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle("o-1").status()
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT n FROM effect").fetchall() == [(2,)]


def test_escalations_bad_filters_and_ids(broker: Any) -> None:
    assert escalations.list(role="nobody", status="claimed", subject="x", limit=1) == []
    stats = escalations.stats("nobody")
    assert (stats.waiting, stats.claimed, stats.resolved, stats.cancelled, stats.timed_out) == (0, 0, 0, 0, 0)
    with pytest.raises(ValueError):
        escalations.list(status="open")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        escalations.list(limit=0)
    missing = "00000000-0000-0000-0000-000000000000"
    for call in (
        lambda: escalations.claim(missing, by="a"),
        lambda: escalations.release(missing, by="a"),
        lambda: escalations.resolve(missing),
        lambda: escalations.cancel(missing),
        lambda: escalations.reassign(missing, role="r"),
    ):
        with pytest.raises(durable.EscalationNotFound):
            call()


def test_a_claim_again_and_many_of_a_queue(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def asks(n: int) -> Any:
        return await durable.escalate(role="clerk", subject=str(n), payload=n)

    start_worker()
    handles = [asks.start(n) for n in range(12)]
    wait_until(lambda: escalations.stats("clerk").waiting == 12)
    again = escalations.list(limit=1)[0]
    first = escalations.claim(again.id, by="ann", timeout="1m")
    longer = escalations.claim(again.id, by="ann", timeout="1h")
    assert longer.claimed_until > first.claimed_until
    escalations.release(again.id, by="ann")
    taken: list[str] = []

    def clerk(name: str) -> None:
        while (task := escalations.claim_next(role="clerk", by=name)) is not None:
            taken.append(task.id)
            escalations.resolve(task.id, [name, task.payload], by=name)

    threads = [threading.Thread(target=clerk, args=(f"c{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 12
    assert [h.result(timeout=20)[1] for h in handles] == list(range(12))


def test_the_same_in_an_environment(broker: Any) -> None:
    @durable.activity
    async def act(n: int) -> int:
        return n

    @durable.workflow
    async def kid(n: int) -> int:
        await durable.sleep("1 day")
        return await act.execute(n)

    @durable.workflow
    async def flow() -> Any:
        kids = await asyncio.gather(*(kid.execute(n) for n in range(3)))
        try:
            await durable.wait_for_signal("x", timeout="30 days")
        except durable.Timeout:
            kids.append(-1)
        try:
            await durable.escalate(role="r", subject="s", timeout="1 day")
        except durable.Timeout:
            kids.append(-2)
        return kids

    with Environment(mocks={act: lambda n: n * 10}) as env:
        begun = env.now()
        assert env.run(flow) == [0, 10, 20, -1, -2]
        assert env.now() - begun >= datetime.timedelta(days=32)


def test_long_histories_are_read_in_pages(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int) -> int:
        total = 0
        for i in range(n):
            total += await durable.side_effect(lambda i=i: i)
            if i % 400 == 399:
                await durable.sleep(0)
                await durable.sleep(0.001)
        return total

    start_worker()
    handle = flow.start(1500)
    assert handle.result(timeout=60) == 1500 * 1499 // 2
    assert [e.event_id for e in handle.history()] == list(range(1, len(handle.history()) + 1))
    Replayer([flow]).replay(handle.export())


def test_deadlines_of_nested_scopes(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def slow() -> str:
        time.sleep(0.3)
        return "slow"

    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        try:
            async with asyncio.timeout(5):
                try:
                    async with asyncio.timeout(0.05):
                        await slow.execute()
                except TimeoutError:
                    seen.append("inner")
                async with asyncio.TaskGroup() as group:
                    group.create_task(slow.execute())
                    group.create_task(fail())
        except* ZeroDivisionError as group_error:
            seen.append(len(group_error.exceptions))
        first = await next(iter(asyncio.as_completed([durable.sleep("1h"), slow.execute()])))
        seen.append(first)
        return seen

    async def fail() -> None:
        await durable.sleep(0.05)
        1 / 0  # noqa: B018

    start_worker()
    handle = flow.start()
    assert handle.result(timeout=20) == ["inner", 1, "slow"]
    Replayer([flow]).replay(handle.export())
