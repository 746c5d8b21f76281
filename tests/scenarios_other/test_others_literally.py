"""The page on the API taken at its word: names, defaults, odd but lawful values."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


def test_actors_that_were_there_and_actors_elsewhere(broker: Any, start_worker: StartWorker) -> None:
    @dramatiq.actor(queue_name="legacy", max_retries=0)
    def legacy(n: int) -> int:
        return n + 1

    adapted = durable.activity(legacy)
    remote = durable.activity_stub("legacy", queue_name="legacy")
    optioned = adapted.options(start_to_close="10s", delay=50, priority=3)

    @durable.workflow
    async def flow() -> list[int]:
        handle = adapted.start(10)
        begun = durable.now()
        late = await optioned.execute(20)
        assert (durable.now() - begun).total_seconds() >= 0.045
        return [
            await handle,
            late,
            await remote.execute(30),
            await adapted.options(delay=datetime.timedelta(0)).execute(1),
        ]

    start_worker()
    assert flow.start().result(timeout=20) == [11, 21, 31, 2]
    assert adapted(4) == 5
    adapted.send(5)
    legacy.send(6)
    broker.join("legacy", timeout=10_000)


def test_activities_as_clients(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def other(n: int) -> int:
        return n + await durable.wait_for_signal("more")

    @durable.activity
    def client() -> int:
        info = durable.activity_info()
        assert info is not None
        own = durable.get_handle(info.workflow_id)
        own.signal("hello", own.status())
        handle = other.options(workflow_id="from an activity").start(4)
        handle.signal("more", 3)
        return int(handle.result(timeout=10))

    @durable.workflow
    async def flow() -> list[Any]:
        return [await client.execute(), await durable.wait_for_signal("hello")]

    start_worker()
    assert flow.start().result(timeout=20) == [7, "running"]
    assert durable.get_handle("from an activity").describe().parent is None


def test_continue_with_options(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int, *, word: str = "") -> Any:
        info = durable.info()
        if n == 0:
            durable.continue_as_new(1, word="x", memo={"new": True}, search={"s": 2}, run_timeout="1h")
        return [n, word, info.memo, info.search]

    start_worker()
    try:
        result = flow.options(memo={"old": True}, search={"s": 1, "t": 1}).start(0).result(timeout=10)
    except durable.WorkflowFailed as e:
        # Named arguments are the options' names: the workflow's own are given by position.
        assert "word" in e.message
    else:
        assert result[:2] == [1, "x"]


def test_continue_keeps_or_replaces(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int) -> Any:
        info = durable.info()
        if n == 0:
            durable.continue_as_new(1)
        if n == 1:
            durable.continue_as_new(2, memo={"new": True}, search={"t": 2})
        return [n, info.memo, info.search, info.attempt]

    start_worker()
    handle = flow.options(memo={"old": True}, search={"s": 1}).start(0)
    n, memo, search, attempt = handle.result(timeout=10)
    assert (n, attempt) == (2, 1)
    assert memo["new"] is True
    assert search["t"] == 2


@pytest.mark.parametrize("name", ["a b", "ü/ñ:1", "x" * 200, "100%", "'; DROP TABLE x; --", '"quoted"', "_", "%"])
def test_ids_and_names_of_any_kind(broker: Any, start_worker: StartWorker, name: str) -> None:
    @durable.workflow
    async def flow() -> Any:
        @durable.on_query("q" + name[:50])
        def q() -> str:
            return name

        return await durable.wait_for_signal(name)

    start_worker()
    handle = flow.options(workflow_id=name).start()
    assert handle.query("q" + name[:50], timeout=20) == name
    quoted = name.replace("'", "''")
    assert durable.count_workflows(f"workflow_id = '{quoted}'") == 1
    durable.get_handle(name).signal(name, name)
    assert handle.result(timeout=20) == name


@pytest.mark.parametrize("bad", ["", "a\0b", 5, "x" * 5000])
def test_ids_that_are_none(broker: Any, bad: Any) -> None:
    @durable.workflow
    async def flow() -> None: ...

    with pytest.raises((ValueError, TypeError)):
        flow.options(workflow_id=bad).start()
    with pytest.raises((ValueError, TypeError)):
        durable.get_handle(bad)


def test_wrong_calls_are_errors_where_they_are_made(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def act(n: int) -> int:
        return n

    @durable.workflow
    async def flow(what: str) -> str:
        try:
            match what:
                case "args":
                    await act.execute(1, 2)  # type: ignore[call-arg]
                case "kwargs":
                    await act.execute(m=2)  # type: ignore[call-arg]
                case "option":
                    act.options(nonsense=1)  # type: ignore[call-arg]
                case "cancellation":
                    act.options(cancellation="maybe")  # type: ignore[arg-type]
                case "both":
                    act.options(retry=durable.RetryPolicy(), max_retries=2)
                case "search":
                    await durable.upsert_search({"a": object()})
                case "nested":
                    await durable.upsert_search({"a": {"b": 1}})
                case "handlers":
                    durable.on_query("q")(_async)
        except (TypeError, ValueError, durable.DurableError) as e:
            return f"{type(e).__name__}: {e}"
        return "accepted"

    async def _async() -> None: ...

    start_worker()
    for what in ("args", "kwargs", "option", "cancellation", "both", "search", "nested", "handlers"):
        assert flow.start(what).result(timeout=20) != "accepted", what
    for options in (
        {"id_conflict": "x"},
        {"id_reuse": "x"},
        {"parent_close": "x"},
        {"run_timeout": -1},
        {"nonsense": 1},
        {"retry": 5},
        {"delay": "soon"},
        {"memo": 5},
        {"search": 5},
        {"with_signal": "x"},
        {"execution_timeout": "x"},
    ):
        with pytest.raises((TypeError, ValueError)):
            flow.options(**options).start("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        flow.start()  # type: ignore[call-arg]
    with pytest.raises((TypeError, durable.DurableError)):
        durable.workflow(lambda: None)  # type: ignore[arg-type,return-value]


def test_waits_of_no_time(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        try:
            await durable.wait_for_signal("x", timeout=0)
            seen.append("?")
        except durable.Timeout:
            seen.append("no signal")
        try:
            await durable.wait_condition(lambda: False, timeout=0)
        except durable.Timeout:
            seen.append("no condition")
        await durable.wait_condition(lambda: True, timeout=0)
        try:
            await asyncio.wait_for(durable.wait_for_signal("x"), 0)
        except TimeoutError:
            seen.append("no wait")
        await durable.sleep(0)
        seen.append(await durable.wait_for_signal("y", timeout=None))
        return seen

    start_worker()
    handle = flow.start()
    handle.signal("y")
    assert handle.result(timeout=20) == ["no signal", "no condition", "no wait", None]
    Replayer([flow]).replay(handle.export())


def test_handlers_come_before_waits_and_get_what_waited(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        await durable.wait_for_signal("ready")

        @durable.on_signal("x")
        def first(value: Any) -> None:
            seen.append(value)

        try:
            await durable.wait_for_signal("x", timeout=0.2)
            seen.append("waited")
        except durable.Timeout:
            pass
        return seen

    start_worker()
    handle = flow.start()
    for n in range(3):
        handle.signal("x", n)
    handle.signal("ready")
    wait_until(lambda: "TimerStarted" in types(handle))
    handle.signal("x", 3)
    assert handle.result(timeout=20) == [0, 1, 2, 3]


def test_search_attributes_of_all_types(broker: Any, start_worker: StartWorker) -> None:
    at = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)

    @durable.workflow
    async def flow() -> Any:
        await durable.upsert_search({"i": 1, "f": 1.5, "b": True, "t": "x", "big": 2**40})
        await durable.upsert_search({"at": datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)})
        await durable.upsert_search({})
        await durable.upsert_search({"t": None})
        return durable.info().search

    start_worker()
    handle = flow.start()
    result = handle.result(timeout=20)
    assert (result["i"], result["f"], result["b"], result["big"]) == (1, 1.5, True, 2**40)
    assert "t" not in result or result["t"] is None
    assert durable.count_workflows("search.at > '2026-01-01' and search.at < '2026-06-01T00:00:00Z'") == 1
    assert durable.count_workflows(f"search.at = '{at.isoformat()}'") == 1
    assert durable.count_workflows("search.b = true and search.f >= 1.5 and search.big > 1e9") == 1


def test_logger_is_quiet_in_replay(broker: Any, start_worker: StartWorker, caplog: pytest.LogCaptureFixture) -> None:
    @durable.workflow
    async def flow() -> None:
        durable.logger.warning("first line")
        await durable.sleep(0.01)
        durable.logger.warning("second line")

    worker = start_worker()
    with caplog.at_level(logging.INFO):
        handle = flow.start()
        handle.result(timeout=20)
        worker.stop()
        broker.runner.cache.clear()
        Replayer([flow]).replay(handle.export())
    assert caplog.text.count("first line") == caplog.text.count("second line") == 1


def test_cancel_and_terminate_fight(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        await durable.sleep("1h")

    start_worker()
    for _ in range(5):
        handle = flow.start()
        outcomes: list[Any] = []

        def end(call: Callable[[], Any], outcomes: list[Any] = outcomes) -> None:
            try:
                outcomes.append(call())
            except durable.WorkflowClosed:
                outcomes.append("closed")

        threads = [threading.Thread(target=end, args=(c,)) for c in (handle.cancel, handle.terminate, handle.cancel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises((durable.WorkflowCancelled, durable.WorkflowTerminated)):
            handle.result(timeout=20)
        assert sum(t in ("WorkflowCancelled", "WorkflowTerminated") for t in types(handle)) == 1


def test_two_namespaces_know_nothing_of_each_other(database_url: str, start_worker: StartWorker, broker: Any) -> None:
    from dramatiq_durable.migrate import migrate

    migrate(database_url, namespace="second")
    second = durable.DurableBroker(database_url, namespace="second")

    @durable.workflow
    async def flow() -> str:
        return "one"

    try:
        flow.options(workflow_id="w").start()
        assert durable.count_workflows() == 1
        assert durable.count_workflows(broker=second) == 0
        with pytest.raises(durable.WorkflowNotFound):
            durable.get_handle("w", broker=second).status()
        start_worker()
        assert durable.get_handle("w").result(timeout=10) == "one"
    finally:
        second.close()


def test_policies_of_all_shapes(broker: Any, start_worker: StartWorker) -> None:
    at: list[float] = []
    policy = durable.RetryPolicy(
        initial_interval=datetime.timedelta(milliseconds=100),
        backoff_coefficient=10,
        maximum_interval="150ms",
        maximum_attempts=4,
    )

    @durable.activity
    def act() -> None:
        at.append(time.monotonic())
        raise OSError

    @durable.workflow
    async def flow() -> Any:
        try:
            await act.options(retry=policy).execute()
        except durable.ActivityFailed as e:
            return [e.attempt, e.retryable]

    start_worker()
    assert flow.start().result(timeout=20)[0] == 4
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert 0.095 <= gaps[0] < 1
    assert all(0.145 <= gap < 1.2 for gap in gaps[1:])
    default = durable.RetryPolicy()
    assert (default.maximum_attempts, default.maximum_interval, tuple(default.non_retryable)) == (None, None, ())
    for bad in (
        {"initial_interval": -1},
        {"backoff_coefficient": 0.5},
        {"maximum_attempts": 0},
        {"maximum_interval": "x"},
        {"non_retryable": 5},
    ):
        with pytest.raises((TypeError, ValueError)):
            durable.RetryPolicy(**bad)  # type: ignore[arg-type]


def test_dramatiqs_own_options_of_activities(broker: Any, start_worker: StartWorker) -> None:
    attempts: list[int] = []

    @durable.activity(max_retries=2, min_backoff=10, max_backoff=20)
    def act() -> None:
        info = durable.activity_info()
        assert info is not None
        attempts.append(info.attempt)
        raise OSError("x")

    @durable.activity(max_retries=0, time_limit=300)
    def slow() -> None:
        for _ in range(300):
            time.sleep(0.01)

    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        for each in (act, act.options(max_retries=0), slow):
            try:
                await each.execute()
            except durable.ActivityFailed as e:
                seen.append([e.attempt, e.type, e.timeout])
        return seen

    broker.emit_after("process_boot")  # Dramatiq's time limits begin with the process
    start_worker()
    assert flow.start().result(timeout=30) == [
        [3, "OSError", None],
        [1, "OSError", None],
        [1, "TimeLimitExceeded", None],
    ]
    assert attempts == [1, 2, 3, 1]


def test_the_end_of_a_parent_and_the_information_of_its_child(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> Any:
        parent = durable.info().parent
        assert parent is not None
        return [parent.workflow_id, parent.run_id, durable.info().headers]

    @durable.workflow
    async def flow() -> Any:
        child = kid.options(headers={"h": 1}).start()
        await child.started()
        assert child.workflow_id
        assert child.run_id
        return await child

    start_worker()
    handle = flow.options(workflow_id="p").start()
    assert handle.result(timeout=20) == ["p", handle.run_id, {"h": 1}]


def test_many_children_and_many_signals(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid(n: int) -> int:
        return n + await durable.wait_for_signal("x")

    @durable.workflow
    async def flow(n: int) -> int:
        kids = [kid.options(workflow_id=f"k-{i}").start(i) for i in range(n)]
        await asyncio.gather(*(k.started() for k in kids))
        await asyncio.gather(*(k.signal("x", 1) for k in kids))
        return sum(await asyncio.gather(*kids))

    start_worker()
    assert flow.start(60).result(timeout=60) == sum(range(60)) + 60
