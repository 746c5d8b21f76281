"""What every engine's suite begins with: greetings, sleeps, signals, loops, ids, failures."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


def test_hello_and_goodbye(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity(queue_name="greetings")
    def say(word: str, name: str = "you") -> str:
        return f"{word}, {name}!"

    @durable.activity(queue_name="greetings")
    async def say_async(word: str, *, name: str) -> str:
        await asyncio.sleep(0)
        return f"{word}, {name}!"

    @durable.workflow(queue_name="hellos", name="hello.goodbye")
    async def both(name: str, *, polite: bool = False) -> dict[str, Any]:
        first, second = await asyncio.gather(say.execute("hello", name=name), say_async.execute("bye", name=name))
        third = await say.execute("hm") if polite else None
        return {"first": first, "second": second, "third": third}

    start_worker()
    handle = both.start("Ann", polite=True)
    assert handle.result(timeout=10) == {"first": "hello, Ann!", "second": "bye, Ann!", "third": "hm, you!"}
    description = handle.describe()
    assert description.name == "hello.goodbye"
    assert description.queue_name == "hellos"
    assert description.status == "completed"
    assert description.input == {"args": ["Ann"], "kwargs": {"polite": True}}
    assert description.result == {"first": "hello, Ann!", "second": "bye, Ann!", "third": "hm, you!"}
    assert description.failure is None
    assert description.parent is None
    assert description.history_length == len(handle.history())
    assert description.pending == [] or not description.pending
    assert description.started_at <= description.closed_at
    assert handle.workflow_id
    scheduled = next(e for e in handle.history() if e.type == "ActivityScheduled")
    assert scheduled.name == "say"
    assert scheduled.at.tzinfo is not None


def test_everything_at_once(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def add(a: int, b: int) -> int:
        return a + b

    @durable.workflow
    async def child(n: int) -> int:
        await durable.sleep(0.01)
        return n * 10

    @durable.workflow
    async def everything(n: int) -> dict[str, Any]:
        log: list[Any] = []

        @durable.on_query("log")
        def show() -> list[Any]:
            return log

        @durable.on_update("put")
        async def put(value: int) -> int:
            log.append(await add.execute(value, 1))
            return len(log)

        started = child.options(workflow_id=f"{durable.info().workflow_id}-kid").start(n)
        await durable.upsert_search({"stage": "begun", "n": n})
        await durable.entity().set({"user": {"name": "a"}})
        await durable.output("one")
        value = await durable.side_effect(lambda: 7)
        local = await durable.local(lambda x: x + 1, 1)
        signal = await durable.wait_for_signal("go", timeout="20s")
        await durable.wait_condition(lambda: len(log) == 2, timeout=20)
        await durable.entity().increment("visits", 2)
        await durable.output("two")
        return {
            "child": await started,
            "signal": signal,
            "log": log,
            "value": value,
            "local": local,
            "ids": [str(durable.uuid4()), str(durable.uuid7())],
            "visits": await durable.entity().get("visits"),
        }

    start_worker()
    handle = everything.options(workflow_id="e-1", memo={"why": "test"}, search={"who": "me"}).start(4)
    assert handle.update("put", 1, timeout=20) == 1
    handle.signal("go", {"x": None})
    assert handle.update("put", 2, timeout=20) == 2
    result = handle.result(timeout=20)
    assert result["child"] == 40
    assert result["signal"] == {"x": None}
    assert result["log"] == [2, 3]
    assert (result["value"], result["local"], result["visits"]) == (7, 2, 2)
    assert len(set(result["ids"])) == 2
    assert list(handle.follow()) == [(0, "one"), (1, "two")]
    assert list(handle.follow(offset=1)) == [(1, "two")]
    assert handle.query("log") == [2, 3]
    described = handle.describe()
    assert described.memo == {"why": "test"}
    assert described.search == {"who": "me", "stage": "begun", "n": 4}
    assert described.entity == {"user": {"name": "a"}, "visits": 2}
    assert [c.workflow_id for c in handle.children()] == ["e-1-kid"]
    assert durable.get_handle("e-1-kid").describe().parent is not None


def test_sleeps_in_all_units(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def naps() -> list[float]:
        took = []
        for duration in (0.05, datetime.timedelta(milliseconds=60), "70ms", 0, "0s"):
            before = durable.now()
            await durable.sleep(duration)
            took.append((durable.now() - before).total_seconds())
        before = durable.now()
        await asyncio.sleep(0.08)
        took.append((durable.now() - before).total_seconds())
        return took

    start_worker()
    handle = naps.start()
    took = handle.result(timeout=20)
    for got, least in zip(took, (0.05, 0.06, 0.07, 0, 0, 0.08), strict=True):
        assert got >= least - 0.002
    assert types(handle).count("TimerFired") >= 4


@pytest.mark.parametrize("bad", ["soon", -1, "-3s", float("nan"), None, object(), "", float("inf"), True])
def test_a_sleep_that_is_none_is_an_error_at_the_call(broker: Any, start_worker: StartWorker, bad: Any) -> None:
    @durable.workflow
    async def nap() -> str:
        try:
            await durable.sleep(bad)
        except (ValueError, TypeError) as e:
            return f"refused {type(e).__name__}"
        return "slept"

    start_worker()
    assert nap.start().result(timeout=10).startswith("refused")


def test_two_signals_awaited_together(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def pair() -> list[Any]:
        return await asyncio.gather(
            durable.wait_for_signal("abc", timeout=20), durable.wait_for_signal("def", timeout=20), durable.sleep(0.05)
        )

    start_worker()
    handle = pair.options(workflow_id="pair").start()
    handle.signal("def", {"name": "def"})
    handle.signal("abc", {"name": "abc"})
    assert handle.result(timeout=20) == [{"name": "abc"}, {"name": "def"}, None]


def test_signal_that_comes_before_any_worker_and_before_the_wait(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def late() -> list[Any]:
        await durable.sleep(0.2)
        return [await durable.wait_for_signal("x"), await durable.wait_for_signal("x")]

    handle = late.start()
    handle.signal("x", 1)
    handle.signal("x", 2, id="two")
    handle.signal("x", 3, id="two")
    start_worker()
    assert handle.result(timeout=20) == [1, 2]
    assert types(handle).count("SignalReceived") == 2


def test_a_wait_that_times_out_then_the_signal_for_the_next(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def patient() -> list[Any]:
        seen: list[Any] = []
        try:
            seen.append(await durable.wait_for_signal("x", timeout=0.1))
        except durable.Timeout as e:
            assert isinstance(e, TimeoutError)
            seen.append("timeout")
        seen.append(await durable.wait_for_signal("x", timeout=20))
        return seen

    start_worker()
    handle = patient.start()
    wait_until(lambda: "TimerFired" in types(handle))
    handle.signal("x", "later")
    assert handle.result(timeout=20) == ["timeout", "later"]


def test_condition_with_timeout(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def conditions() -> list[Any]:
        state = {"n": 0}

        @durable.on_signal("bump")
        def bump(by: int) -> None:
            state["n"] += by

        await durable.wait_condition(lambda: state["n"] > 2)
        try:
            await durable.wait_condition(lambda: state["n"] > 100, timeout=0.05)
        except TimeoutError:
            return ["late", state["n"]]
        return ["never"]

    start_worker()
    handle = conditions.start()
    for _ in range(3):
        handle.signal("bump", 1)
    assert handle.result(timeout=20) == ["late", 3]


def test_activities_in_a_loop(broker: Any, start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity
    def count(n: int) -> int:
        calls.append(n)
        return n + 1

    @durable.workflow
    async def loop(until: int) -> int:
        n = 0
        while n < until:
            n = await count.execute(n)
            if n % 5 == 0:
                await durable.sleep(0.01)
        return n

    start_worker()
    assert loop.start(20).result(timeout=30) == 20
    assert calls == list(range(20))


def test_values_that_are_odd(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def echo(value: Any = "default") -> Any:
        return value

    @durable.workflow
    async def odd(values: list[Any]) -> list[Any]:
        return [await echo.execute(v) for v in values] + [await echo.execute()]

    start_worker()
    values = [None, "", 0, False, [], {}, {"a": {"b": [None]}}, "ü\u2028\U0001f600", 2**53, -0.5, 1e300]
    assert odd.start(values).result(timeout=20) == [*values, "default"]


def test_unknown_errors_and_results_that_are_none(broker: Any, start_worker: StartWorker) -> None:
    class Odd(Exception):
        def __init__(self, code: int, *, why: str) -> None:
            super().__init__()
            self.code = code

    @durable.activity(max_retries=0)
    def breaks() -> None:
        raise Odd(3, why="because")

    @durable.activity(max_retries=0)
    def unserializable() -> Any:
        return object()

    @durable.workflow
    async def caught() -> list[Any]:
        seen: list[Any] = []
        for each in (breaks, unserializable):
            try:
                seen.append(await each.execute())
            except durable.ActivityFailed as e:
                seen.append([e.activity, e.attempt, e.type, e.message, e.timeout, bool(e.traceback)])
        return seen

    start_worker()
    first, second = caught.start().result(timeout=20)
    assert first == ["breaks", 1, "Odd", "", None, True]
    assert second[0] == "unserializable"
    assert second[2] == "NotEncodable"


def test_a_duplicate_id_fails_and_the_first_goes_on(broker: Any, start_worker: StartWorker) -> None:
    ran: list[int] = []

    @durable.workflow
    async def once(n: int) -> int:
        return n + await durable.wait_for_signal("go")

    start_worker()
    first = once.options(workflow_id="dup").start(1)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        once.options(workflow_id="dup").start(2)
    same = once.options(workflow_id="dup", id_conflict="use_existing").start(3)
    assert same.run_id == first.run_id
    same.signal("go", 10)
    assert first.result(timeout=10) == 11
    with pytest.raises(durable.WorkflowAlreadyStarted):
        once.options(workflow_id="dup", id_reuse="reject").start(4)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        once.options(workflow_id="dup", id_reuse="allow_failed").start(4)
    again = once.options(workflow_id="dup").start(5)
    assert again.run_id != first.run_id
    third = once.options(workflow_id="dup", id_conflict="terminate_existing").start(6)
    assert durable.get_handle("dup", run_id=again.run_id).status() == "terminated"
    with pytest.raises(durable.WorkflowTerminated):
        again.result(timeout=10)
    third.signal("go", 1)
    assert durable.get_handle("dup").result(timeout=10) == 7
    assert not ran


def test_what_does_not_exist(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def none() -> None: ...

    missing = durable.get_handle("nobody")
    for call in (
        missing.status,
        missing.describe,
        missing.history,
        missing.cancel,
        missing.terminate,
        missing.result,
        missing.children,
        missing.export,
        lambda: missing.signal("x"),
        lambda: missing.query("q"),
        lambda: missing.update("u"),
        lambda: list(missing.follow()),
        lambda: missing.reset(1),
    ):
        with pytest.raises(durable.WorkflowNotFound):
            call()


def test_an_unknown_workflow_waits_until_a_worker_knows_it(broker: Any, start_worker: StartWorker) -> None:
    stub = durable.workflow_stub("comes_later", queue_name="default")
    handle = stub.start(5)

    @durable.workflow
    async def other() -> int:
        return 1

    worker = start_worker()
    assert other.start().result(timeout=10) == 1
    assert handle.status() == "running"
    worker.stop()

    @durable.workflow
    async def comes_later(n: int) -> int:
        return n

    start_worker()
    assert handle.result(timeout=30) == 5


def test_result_with_a_timeout(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def long() -> int:
        await durable.sleep("1 day")
        return 1

    start_worker()
    handle = long.start()
    before = time.monotonic()
    with pytest.raises(durable.Timeout):
        handle.result(timeout=0.2)
    assert time.monotonic() - before < 3
    with pytest.raises(TimeoutError):
        asyncio.run(handle.aresult(timeout="100ms"))
    handle.terminate("enough")
    with pytest.raises(durable.WorkflowTerminated, match="enough"):
        handle.result(timeout=5)
    for call in (handle.cancel, handle.terminate, lambda: handle.signal("x"), lambda: handle.update("x")):
        with pytest.raises(durable.WorkflowClosed):
            call()


def test_a_workflow_that_fails(broker: Any, start_worker: StartWorker) -> None:
    class Mine(Exception): ...

    @durable.workflow
    async def fails() -> None:
        try:
            raise KeyError("k")
        except KeyError as e:
            raise Mine("no") from e

    start_worker()
    handle = fails.start()
    with pytest.raises(durable.WorkflowFailed) as caught:
        handle.result(timeout=10)
    error: Any = caught.value
    assert (error.type, error.message) == ("Mine", "no")
    assert "raise Mine" in error.traceback
    assert error.__cause__.type == "KeyError"
    described = handle.describe()
    assert described.status == "failed"
    assert described.result is None
    assert described.failure is not None
    assert described.failure["type"] == "Mine"
    assert handle.history()[-1].type == "WorkflowFailed"
    [found] = durable.list_workflows("status = 'failed'")
    assert found.workflow_id == handle.workflow_id


def test_delay_of_a_start_and_signals_meanwhile(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def later() -> Any:
        return await durable.wait_for_signal("x", timeout=5)

    start_worker()
    before = time.monotonic()
    handle = later.options(delay=400).start()
    handle.signal("x", "early")
    assert handle.result(timeout=10) == "early"
    assert time.monotonic() - before >= 0.4
    cancelled = later.options(delay=datetime.timedelta(days=1)).start()
    cancelled.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        cancelled.result(timeout=10)


def test_random_is_the_runs_own_and_repeats_on_replay(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def dice() -> list[Any]:
        rolls: list[Any] = []
        for _ in range(3):
            rolls.append([durable.random().randint(1, 10**9), str(durable.uuid4())])
            await durable.sleep(0.01)
        return rolls

    start_worker()
    one, two = dice.start(), dice.start()
    first, second = one.result(timeout=10), two.result(timeout=10)
    assert first != second
    assert len({r[0] for r in first}) == 3
    from dramatiq_durable.testing import Replayer

    Replayer([dice]).replay(one.export())
