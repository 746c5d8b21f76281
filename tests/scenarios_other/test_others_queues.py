"""What suites of engines on Postgres look at: recovery, messages by topic, limits of queues, unique keys, schedules,
transactions, forks."""

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
from dramatiq.rate_limits import BucketRateLimiter, ConcurrentRateLimiter

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


# --- messages and events between runs --------------------------------------------------------------------


def test_two_runs_talk(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def ponger() -> list[Any]:
        got = []
        while len(got) < 3:
            message = await durable.wait_for_signal("ping", timeout=20)
            got.append(message["n"])
            await durable.signal_workflow(message["from"], "pong", message["n"] * 2)
        return got

    @durable.workflow
    async def pinger(other: str) -> list[Any]:
        me = durable.info().workflow_id
        got = []
        for n in range(3):
            await durable.signal_workflow(other, "ping", {"n": n, "from": me})
            got.append(await durable.wait_for_signal("pong", timeout=20))
        return got

    start_worker()
    pong = ponger.options(workflow_id="pong").start()
    ping = pinger.options(workflow_id="ping").start("pong")
    assert ping.result(timeout=20) == [0, 2, 4]
    assert pong.result(timeout=20) == [0, 1, 2]
    assert types(ping).count("SignalSent") == 3


def test_signals_by_topic_keep_their_order_each(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def reads() -> dict[str, Any]:
        seen: dict[str, list[Any]] = {"a": [], "b": []}
        for name in ("b", "a", "a", "b", "b"):
            seen[name].append(await durable.wait_for_signal(name))
        try:
            await durable.wait_for_signal("c", timeout=0.05)
        except TimeoutError:
            seen["c"] = []
        return seen

    handle = reads.start()
    for n in range(3):
        handle.signal("a", n)
        handle.signal("b", n)
    start_worker()
    assert handle.result(timeout=20) == {"a": [0, 1], "b": [0, 1, 2], "c": []}


def test_signalling_what_is_not_there(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def closed() -> None: ...

    @durable.workflow
    async def sends(whom: str) -> str:
        try:
            await durable.signal_workflow(whom, "x", 1)
        except (durable.WorkflowNotFound, durable.WorkflowClosed) as e:
            return type(e).__name__
        return "sent"

    @durable.workflow
    async def cancels(whom: str) -> str:
        try:
            await durable.cancel_workflow(whom)
        except (durable.WorkflowNotFound, durable.WorkflowClosed) as e:
            return type(e).__name__
        return "cancelled"

    start_worker()
    closed.options(workflow_id="closed").start().result(timeout=10)
    assert sends.start("nobody").result(timeout=20) == "WorkflowNotFound"
    assert sends.start("closed").result(timeout=20) == "WorkflowClosed"
    assert cancels.start("nobody").result(timeout=20) == "WorkflowNotFound"
    assert cancels.start("closed").result(timeout=20) in ("WorkflowClosed", "cancelled")


def test_a_fan_in_of_concurrent_senders_loses_nothing(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def collects(count: int) -> int:
        got = []
        async for value in durable.signals("item"):
            got.append(value)
            if len(got) == count:
                return len(set(got))
        return -1

    start_worker()
    handle = collects.start(100)

    def send(k: int) -> None:
        for n in range(25):
            handle.signal("item", k * 100 + n, id=f"{k}-{n}")
            if n % 5 == 0:
                handle.signal("item", k * 100 + n, id=f"{k}-{n}")

    threads = [threading.Thread(target=send, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handle.result(timeout=30) == 100


# --- idempotence -----------------------------------------------------------------------------------------


def test_many_starts_of_one_id_run_once(broker: Any, start_worker: StartWorker) -> None:
    ran: list[int] = []

    @durable.activity
    def effect(n: int) -> int:
        ran.append(n)
        return n

    @durable.workflow
    async def once(n: int) -> int:
        return await effect.execute(n)

    handles: list[Any] = []
    errors: list[Any] = []

    def start(n: int) -> None:
        try:
            handles.append(once.options(workflow_id="one", id_conflict="use_existing", id_reuse="reject").start(n))
        except durable.WorkflowAlreadyStarted as e:
            errors.append(e)

    start_worker()
    threads = [threading.Thread(target=start, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({h.run_id for h in handles}) == 1
    assert len({h.result(timeout=20) for h in handles}) == 1
    assert len(ran) == 1
    assert len(handles) + len(errors) == 10


def test_an_update_is_once_by_its_id(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def counter() -> int:
        total = {"n": 0}

        def positive(by: int) -> None:
            if by < 0:
                raise ValueError("negative")

        @durable.on_update("add", validator=positive)
        def add(by: int) -> int:
            total["n"] += by
            if by == 99:
                raise RuntimeError("no 99")
            return total["n"]

        await durable.wait_for_signal("end")
        return total["n"]

    start_worker()
    handle = counter.start()
    assert [handle.update("add", 5, update_id="u", timeout=20) for _ in range(3)] == [5, 5, 5]
    length = len(handle.history())
    with pytest.raises(durable.UpdateRejected) as rejected:
        handle.update("add", -1, timeout=20)
    assert rejected.value.type == "ValueError"
    assert "negative" in str(rejected.value)
    with pytest.raises(durable.UpdateRejected):
        handle.update("unknown", -1, timeout=20)
    assert len(handle.history()) == length
    with pytest.raises(durable.UpdateFailed, match="no 99"):
        handle.update("add", 99, timeout=20)
    assert handle.get_update("u").result(timeout=10) == 5
    accepted = handle.update("add", 1, wait="accepted", update_id="v", timeout=20)
    assert accepted.result(timeout=10) == 105
    handle.signal("end")
    assert handle.result(timeout=20) == 105
    assert handle.get_update("u").result(timeout=10) == 5
    with pytest.raises(durable.WorkflowClosed):
        handle.update("add", 1, timeout=10)


def test_start_with_signal_and_with_update(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def cart() -> list[Any]:
        items: list[Any] = []

        @durable.on_update("add")
        def add(item: str, count: int) -> int:
            items.append([item, count])
            return len(items)

        await durable.wait_for_signal("pay")
        return items

    start_worker()
    first = cart.options(
        workflow_id="cart", id_conflict="use_existing", with_update=("add", "a", 1), update_id="u1"
    ).start()
    again = cart.options(
        workflow_id="cart", id_conflict="use_existing", with_update=("add", "b", 2), update_id="u2"
    ).start()
    same = cart.options(
        workflow_id="cart", id_conflict="use_existing", with_update=("add", "b", 2), update_id="u2"
    ).start()
    assert first.run_id == again.run_id == same.run_id
    assert again.get_update("u2").result(timeout=20) == 2
    cart.options(workflow_id="cart", id_conflict="use_existing", with_signal=("pay", None)).start()
    assert first.result(timeout=20) == [["a", 1], ["b", 2]]


# --- limits ----------------------------------------------------------------------------------------------


def test_concurrency_of_activities_by_a_limiter(broker: Any, start_worker: StartWorker) -> None:
    limiter = ConcurrentRateLimiter(durable.rate_limits.PostgresBackend(broker), "few", limit=2, ttl=60_000)
    running: list[int] = []
    most: list[int] = [0]
    lock = threading.Lock()

    @durable.activity(max_retries=None, min_backoff=10, max_backoff=50)
    def limited(n: int) -> int:
        with limiter.acquire():
            with lock:
                running.append(n)
                most[0] = max(most[0], len(running))
            time.sleep(0.05)
            with lock:
                running.remove(n)
        return n

    @durable.workflow
    async def many() -> list[int]:
        return await asyncio.gather(*(limited.execute(n) for n in range(8)))

    start_worker(threads=8)
    assert many.start().result(timeout=60) == list(range(8))
    assert most[0] <= 2


def test_a_rate_by_a_bucket(broker: Any) -> None:
    bucket = BucketRateLimiter(durable.rate_limits.PostgresBackend(broker), "rate", limit=3, bucket=60_000)
    taken = 0
    for _ in range(10):
        with bucket.acquire(raise_on_failure=False) as got:
            taken += bool(got)
    assert taken in (3, 4, 5, 6)


# --- schedules -------------------------------------------------------------------------------------------


def test_a_schedule_starts_runs_once_each(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def tick(word: str, *, n: int) -> str:
        return word * n

    durable.schedules.create("ticks", cron="* * * * *", target=tick, args=("a",), kwargs={"n": 2}, paused=True)
    start_worker()
    durable.schedules.trigger("ticks")
    wait_until(lambda: durable.count_workflows("name = 'tick' and status = 'completed'") == 1)
    end = datetime.datetime.now(datetime.UTC).replace(second=30, microsecond=0)
    durable.schedules.backfill("ticks", end - datetime.timedelta(minutes=5), end)
    durable.schedules.backfill("ticks", end - datetime.timedelta(minutes=5), end)
    wait_until(lambda: durable.count_workflows("name = 'tick' and status = 'completed'") >= 6)
    time.sleep(0.3)
    assert durable.count_workflows("name = 'tick'") == 6
    [listed] = durable.schedules.list()
    assert listed.name == "ticks"
    assert durable.schedules.describe("ticks").paused
    durable.schedules.delete("ticks")
    with pytest.raises(durable.ScheduleNotFound):
        durable.schedules.describe("ticks")


# --- effects in one commit -------------------------------------------------------------------------------


def test_effects_of_transactions_are_there_once(broker: Any, start_worker: StartWorker, database_url: str) -> None:
    with psycopg.connect(database_url) as conn:
        conn.execute("CREATE TABLE effect (n int, attempt int)")
    tries: list[int] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=4))
    def effect(n: int) -> int:
        tries.append(n)
        info = durable.activity_info()
        assert info is not None
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s, %s)", (n, info.attempt))
            if info.attempt < 3:
                raise ConnectionError("rolled back")
        return n

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=4))
    async def effect_async(n: int) -> int:
        info = durable.activity_info()
        assert info is not None
        async with durable.transaction() as conn:
            await conn.execute("INSERT INTO effect VALUES (%s, %s)", (n, info.attempt))
        if info.attempt < 2:
            raise ConnectionError("rolled back")
        return n

    @dramatiq.actor(max_retries=3, min_backoff=1, max_backoff=10)
    def plain(n: int) -> None:
        tries.append(n)
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s, 0)", (n,))
        if tries.count(n) == 1:
            raise ConnectionError("rolled back")

    @durable.workflow
    async def flow() -> list[int]:
        return await asyncio.gather(effect.execute(1), effect.execute(2), effect_async.execute(3))

    start_worker()
    plain.send(4)
    assert flow.start().result(timeout=30) == [1, 2, 3]

    def rows() -> Any:
        with psycopg.connect(database_url) as conn:
            return conn.execute("SELECT n, attempt FROM effect ORDER BY n").fetchall()

    wait_until(lambda: len(rows()) == 4)
    assert rows() == [(1, 3), (2, 3), (3, 2), (4, 0)]


def test_start_and_signal_with_the_callers_transaction(
    broker: Any, start_worker: StartWorker, database_url: str
) -> None:
    @durable.workflow
    async def flow(n: int) -> Any:
        return [n, await durable.wait_for_signal("x", timeout=20)]

    start_worker()
    with psycopg.connect(database_url) as conn:
        with pytest.raises(RuntimeError), conn.transaction(), durable.using(conn):
            flow.options(workflow_id="rolled back").start(1)
            raise RuntimeError
        with conn.transaction(), durable.using(conn):
            handle = flow.options(workflow_id="kept").start(2)
            handle.signal("x", "y")
    assert handle.result(timeout=20) == [2, "y"]
    with pytest.raises(durable.WorkflowNotFound):
        durable.get_handle("rolled back").status()


# --- fork, cancel, list ----------------------------------------------------------------------------------


def test_a_run_is_taken_up_again_from_a_step(broker: Any, start_worker: StartWorker) -> None:
    calls: dict[str, int] = {}
    broken = [True]

    @durable.activity(max_retries=0)
    def act(name: str) -> str:
        calls[name] = calls.get(name, 0) + 1
        if name == "third" and broken[0]:
            raise RuntimeError("bug")
        return f"{name}{calls[name]}"

    @durable.workflow
    async def flow() -> list[str]:
        return [await act.execute(n) for n in ("first", "second", "third")]

    start_worker()
    handle = flow.options(workflow_id="fork").start()
    with pytest.raises(durable.WorkflowFailed):
        handle.result(timeout=20)
    broken[0] = False
    second = next(e for e in handle.history() if e.type == "ActivityCompleted" and e.attributes["result"] == "second1")
    again = handle.reset(second.event_id)
    assert again.workflow_id == "fork"
    assert again.run_id != handle.run_id
    assert again.result(timeout=20) == ["first1", "second1", "third2"]
    assert calls == {"first": 1, "second": 1, "third": 2}
    whole = again.reset(1)
    assert whole.result(timeout=20) == ["first2", "second2", "third3"]
    with pytest.raises((ValueError, durable.DurableError)):
        again.reset(9999)


def test_lists(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def good(n: int) -> int:
        return n

    @durable.workflow(queue_name="other")
    async def bad() -> None:
        raise ValueError

    start_worker()
    begun = datetime.datetime.now(datetime.UTC)
    handles: list[Any] = [good.options(workflow_id=f"g-{n}").start(n) for n in range(5)]
    handles.append(bad.options(workflow_id="b-0").start())
    for handle in handles:
        wait_until(lambda handle=handle: handle.status() != "running")
    everything = durable.list_workflows()
    assert [w.workflow_id for w in everything] == ["b-0", "g-4", "g-3", "g-2", "g-1", "g-0"]
    assert {(w.name, w.status, w.queue_name) for w in everything} == {
        ("good", "completed", "default"),
        ("bad", "failed", "other"),
    }
    assert len(durable.list_workflows("workflow_id like 'g-%'")) == 5
    assert len(durable.list_workflows("workflow_id in ('g-1', 'g-3', 'x')")) == 2
    assert len(durable.list_workflows("queue_name = 'other' or name = 'good' and workflow_id = 'g-0'")) == 2
    assert len(durable.list_workflows(f"started_at >= '{begun.isoformat()}'", limit=2)) == 2
    assert durable.count_workflows(group_by="status") == {"completed": 5, "failed": 1}
    assert durable.count_workflows("status != 'completed'") == 1
    pages = []
    after = None
    while True:
        page = durable.list_workflows(order="closed_at", limit=4, after=after)
        pages.append(len(page))
        after = page.next
        if after is None:
            break
    assert pages == [4, 2]


def test_timeouts_pass_on_to_children(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> None:
        await durable.sleep("1h")

    @durable.workflow
    async def parent() -> None:
        await kid.options(workflow_id="kid").execute()

    start_worker()
    handle = parent.options(run_timeout=0.5).start()
    with pytest.raises(durable.WorkflowTimedOut):
        handle.result(timeout=20)
    wait_until(lambda: durable.get_handle("kid").status() == "terminated")


# --- await first, emit later, and the other way round ----------------------------------------------------


def test_a_task_waits_for_an_event_with_a_limit(broker: Any, start_worker: StartWorker) -> None:
    steps: list[str] = []

    @durable.activity
    def step(name: str) -> str:
        steps.append(name)
        return name

    @durable.workflow
    async def task() -> dict[str, Any]:
        first = await step.execute("prepare")
        try:
            async with asyncio.timeout(0.1):
                await durable.wait_for_signal("shipment")
            event = "?"
        except TimeoutError:
            event = "none"
        second = await durable.wait_for_signal("shipment")
        await step.execute("finish")
        return {"first": first, "event": event, "second": second}

    start_worker()
    handle = task.start()
    wait_until(lambda: "TimerFired" in types(handle))
    handle.signal("shipment", {"id": 1})
    assert handle.result(timeout=20) == {"first": "prepare", "event": "none", "second": {"id": 1}}
    assert steps == ["prepare", "finish"]


def test_a_later_token_completes(broker: Any, start_worker: StartWorker) -> None:
    tokens: list[Any] = []

    @durable.activity(max_retries=0)
    def parked() -> str:
        tokens.append(durable.complete_later())
        return "ignored"

    @durable.workflow
    async def flow() -> list[Any]:
        got: list[Any] = [await parked.execute()]
        try:
            await parked.execute()
        except durable.ActivityFailed as e:
            got.append([e.type, e.message])
        return got

    start_worker()
    handle = flow.start()
    wait_until(lambda: len(tokens) == 1)
    durable.heartbeat_activity(tokens[0], {"p": 1})
    wait_until(lambda: [p.heartbeat_details for p in handle.describe().pending] == [{"p": 1}])
    durable.complete_activity(tokens[0], {"v": 1})
    wait_until(lambda: len(tokens) == 2)
    durable.fail_activity(tokens[1], ValueError("outside"))
    assert handle.result(timeout=20) == [{"v": 1}, ["ValueError", "outside"]]
    with pytest.raises(durable.UnknownToken):
        durable.complete_activity(tokens[0], 2)


def test_heartbeats_resume(broker: Any, start_worker: StartWorker) -> None:
    seen: list[Any] = []

    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3))
    def pages() -> int:
        info = durable.activity_info()
        assert info is not None
        seen.append(info.heartbeat_details)
        page = (info.heartbeat_details or {"page": 0})["page"]
        durable.heartbeat({"page": page + 10})
        if info.attempt < 3:
            raise OSError
        return page

    @durable.workflow
    async def flow() -> int:
        return await pages.execute()

    start_worker()
    assert flow.start().result(timeout=20) == 20
    assert seen == [None, {"page": 10}, {"page": 20}]
