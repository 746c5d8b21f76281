"""More corners: what a careful user of other engines would try on the second day."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment, Replayer
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]
once = durable.RetryPolicy(maximum_attempts=1)


@dataclass
class Money:
    amount: int
    currency: str = "EUR"


def test_errors_of_ones_own_carry_their_attributes_as_text(start_worker: StartWorker) -> None:
    class Declined(Exception):
        def __init__(self, code: int) -> None:
            super().__init__(f"code {code}")
            self.code = code

    @durable.activity(retry=once)
    def pay() -> None:
        raise Declined(7)

    @durable.workflow
    async def flow() -> list[Any]:
        try:
            await pay.execute()
        except durable.ActivityFailed as e:
            return [e.type, e.message, str(e), e.__cause__ is None or e.__cause__.type]  # type: ignore[attr-defined]
        return []

    start_worker()
    out = flow.start().result(timeout=10)
    assert out[:2] == ["Declined", "code 7"]
    assert "code 7" in out[2]


def test_a_failed_activity_in_gather_leaves_the_others_running(start_worker: StartWorker) -> None:
    done: list[int] = []

    @durable.activity(retry=once)
    def good(n: int) -> int:
        time.sleep(0.3)
        done.append(n)
        return n

    @durable.activity(retry=once)
    def bad() -> None:
        raise ValueError("bad")

    @durable.workflow
    async def flow() -> Any:
        goods = [asyncio.create_task(good.execute(n)) for n in range(2)]
        try:
            await asyncio.gather(*goods, bad.execute())
        except durable.ActivityFailed:
            return await asyncio.gather(*goods)

    start_worker()
    assert flow.start().result(timeout=10) == [0, 1]
    assert sorted(done) == [0, 1]


def test_handles_left_unawaited_do_not_fail_the_run(start_worker: StartWorker) -> None:
    @durable.activity(retry=once)
    def bad() -> None:
        raise ValueError("bad")

    @durable.workflow
    async def child() -> None:
        raise ValueError("child")

    @durable.workflow
    async def flow() -> str:
        bad.start()
        child.start()
        await durable.sleep(0.5)
        return "fine"

    start_worker()
    assert flow.start().result(timeout=10) == "fine"


def test_the_second_of_two_cancels_ends_what_the_first_could_not(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[str]:
        out = []
        for n in range(2):
            try:
                await durable.wait_for_signal("never")
            except asyncio.CancelledError:
                out.append(f"cancel {n}")
        return out

    start_worker()
    handle = flow.start()
    wait_until(lambda: handle.describe().stack)
    handle.cancel()
    wait_until(lambda: [e.type for e in handle.history()].count("CancelRequested") == 1)
    time.sleep(0.3)
    handle.cancel()
    assert handle.result(timeout=10) == ["cancel 0", "cancel 1"]


def test_cleanup_in_uncancellable_blocks_under_two_cancels(start_worker: StartWorker) -> None:
    @durable.activity
    def clean(n: int) -> int:
        return n

    @durable.workflow
    async def flow() -> None:
        try:
            await durable.sleep("1 day")
        finally:
            async with durable.uncancellable():
                await clean.execute(1)
                await durable.wait_for_signal("go")
                await clean.execute(2)

    start_worker()
    handle = flow.start()
    handle.cancel()
    wait_until(lambda: [e.type for e in handle.history()].count("ActivityCompleted") == 1)
    handle.cancel()
    handle.signal("go")
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    assert [e.type for e in handle.history()].count("ActivityCompleted") == 2


def test_parents_cancel_waits_for_the_children(start_worker: StartWorker) -> None:
    @durable.activity
    def note(what: str) -> str:
        return what

    @durable.workflow
    async def child(n: int) -> None:
        try:
            await durable.sleep("1 day")
        finally:
            await note.execute(f"child {n}")

    @durable.workflow
    async def parent() -> None:
        async with asyncio.TaskGroup() as group:
            for n in range(2):
                group.create_task(child.options(workflow_id=f"kid-{n}").execute(n))

    start_worker()
    handle = parent.start()
    wait_until(lambda: len(handle.children()) == 2)
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=10)
    for n in range(2):
        kid = durable.get_handle(f"kid-{n}")
        assert kid.status() == "cancelled"
        assert "ActivityCompleted" in [e.type for e in kid.history()]


def test_a_child_of_a_continued_parent_is_found(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child(n: int) -> str:
        if n:
            durable.continue_as_new(n - 1)
        return durable.info().run_id

    @durable.workflow
    async def parent() -> list[Any]:
        handle = child.options(workflow_id="kid").start(3)
        first = await handle.started()
        return [await handle, first is None or True]

    start_worker()
    handle = parent.start()
    run_id = handle.result(timeout=10)[0]
    assert durable.get_handle("kid").describe().run_id == run_id
    types = [e.type for e in handle.history() if e.type.startswith("Child")]
    assert types.count("ChildCompleted") == 1


def test_typed_results_through_get_handle_and_stubs(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(m: Money) -> Money:
        return Money(m.amount + 1, m.currency)

    start_worker()
    handle = flow.options(workflow_id="m").start(Money(1))
    assert handle.result(timeout=10) == Money(2)
    assert durable.get_handle("m").result(timeout=5) == Money(2)
    assert asyncio.run(handle.aresult()) == Money(2)


def test_retry_backoff_is_bounded_and_grows(start_worker: StartWorker) -> None:
    at: list[float] = []

    @durable.activity(
        retry=durable.RetryPolicy(
            initial_interval=0.1, backoff_coefficient=3, maximum_interval="0.4 s", maximum_attempts=5
        )
    )
    def flaky() -> None:
        at.append(time.monotonic())
        raise ValueError("x")

    @durable.workflow
    async def flow() -> int:
        try:
            await flaky.execute()
        except durable.ActivityFailed as e:
            return e.attempt
        return 0

    start_worker()
    assert flow.start().result(timeout=20) == 5
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert gaps[0] >= 0.09
    assert gaps[1] >= 0.28
    assert all(g >= 0.38 for g in gaps[2:])
    assert sum(gaps) < 8


def test_reset_keeps_signals_that_came_later(start_worker: StartWorker) -> None:
    @durable.activity
    def act() -> int:
        return 1

    @durable.workflow
    async def flow() -> list[Any]:
        out: list[Any] = [await act.execute()]
        async for value in durable.signals("n"):
            if value == "end":
                return out
            out.append(value)
        return out

    start_worker()
    handle = flow.options(workflow_id="w").start()
    for value in (1, 2, "end"):
        handle.signal("n", value)
    assert handle.result(timeout=10) == [1, 1, 2]
    again = handle.reset(2)
    assert again.result(timeout=10) == [1, 1, 2]
    assert durable.get_handle("w").run_id in (None, again.run_id)
    # The old handle follows.
    assert handle.result(timeout=10) == [1, 1, 2]


def test_a_wrong_reset(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> int:
        await durable.sleep(0.001)
        return 1

    start_worker()
    handle = flow.start()
    handle.result(timeout=10)
    for wrong in (0, -1, 99):
        with pytest.raises((ValueError, durable.DurableError)):
            handle.reset(wrong)


def test_pending_shows_a_running_attempt_and_its_heartbeat(start_worker: StartWorker) -> None:
    go = threading.Event()

    @durable.activity(retry=once)
    def act() -> None:
        durable.heartbeat({"p": 1})
        while not go.wait(0.05):
            durable.heartbeat({"p": 2})

    @durable.workflow
    async def flow() -> None:
        await act.execute()

    start_worker()
    handle = flow.start()
    wait_until(lambda: handle.describe().pending and handle.describe().pending[0].heartbeat_details == {"p": 2})
    (p,) = handle.describe().pending
    assert (p.kind, p.name, p.attempt, p.last_failure, p.next_attempt_at) == ("activity", "act", 1, None, None)
    go.set()
    handle.result(timeout=10)


def test_priority_and_delay_of_activities(start_worker: StartWorker) -> None:
    @durable.activity
    def act() -> float:
        return time.time()

    @durable.workflow
    async def flow() -> list[float]:
        began = durable.now().timestamp()
        at = await act.options(delay=300, priority=3).execute()
        later = await act.options(delay=timedelta(milliseconds=300)).execute()
        return [at - began, later - at]

    start_worker()
    assert all(gap >= 0.28 for gap in flow.start().result(timeout=10))


def test_wrong_options_are_refused_where_they_are_given() -> None:
    @durable.activity
    def act() -> None: ...

    @durable.workflow
    async def flow() -> None: ...

    with pytest.raises(ValueError, match="RetryPolicy"):
        act.options(retry=once, max_retries=3)
    for wrong in ({"start_to_close": "soon"}, {"cancellation": "maybe"}, {"heartbeat": -1}):
        with pytest.raises(ValueError):
            act.options(**wrong)
    for wrong in ({"id_conflict": "x"}, {"id_reuse": "x"}, {"parent_close": "x"}, {"run_timeout": 0}):
        with pytest.raises(ValueError):
            flow.options(**wrong)
    with pytest.raises(TypeError):
        flow.options(nonsense=1)
    with pytest.raises((TypeError, durable.InvalidDefinition)):

        @durable.workflow
        def plain() -> None: ...

    for outside in (lambda: durable.sleep(1), durable.now, durable.info, durable.uuid4, lambda: durable.patched("x")):
        with pytest.raises(durable.NotInWorkflow):
            outside()
    assert durable.activity_info() is None


def test_now_and_timers_agree_in_the_environment() -> None:
    @durable.workflow
    async def flow() -> list[float]:
        began = durable.now()
        out = []
        for text in ("1h 30m", "3 days", "90 s", "500 ms"):
            await durable.sleep(text)
            out.append((durable.now() - began).total_seconds())
            began = durable.now()
        return out

    with Environment() as env:
        assert env.run(flow) == [5400, 259200, 90, 0.5]


def test_environment_runs_everything_that_waits_for_messages() -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        got: list[Any] = []

        @durable.on_signal("s")
        def s(n: int) -> None:
            got.append(n)

        @durable.on_update("u")
        async def u(n: int) -> int:
            await durable.sleep("1 day")
            got.append(n)
            return n * 2

        @durable.on_query("q")
        def q() -> int:
            return len(got)

        await durable.wait_condition(lambda: len(got) == 2, timeout="10 days")
        return got

    with Environment() as env:
        handle = env.start(flow)
        handle.signal("s", 1)
        assert handle.query("q") == 1
        assert handle.update("u", 5) == 10
        assert handle.result() == [1, 5]
        Replayer([flow]).replay(handle.export())


def test_search_attributes_are_checked_and_removed(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[str]:
        out = []
        for wrong in ({"a": {"b": 1}}, {"": 1}, {"a": object()}):
            try:
                await durable.upsert_search(wrong)
            except (TypeError, ValueError, durable.DurableError) as e:
                out.append(type(e).__mro__[-3].__name__ and "refused")
        await durable.upsert_search({"when": datetime(2020, 1, 1, tzinfo=UTC), "n": 1})
        await durable.upsert_search({"n": None})
        return [*out, str(durable.info().search.get("when").year), str("n" in durable.info().search)]  # type: ignore[union-attr]

    start_worker()
    handle = flow.start()
    assert handle.result(timeout=10) == ["refused"] * 3 + ["2020", "False"]
    assert handle.describe().search == {"when": datetime(2020, 1, 1, tzinfo=UTC)}


def test_using_the_same_workflow_id_on_two_streams(start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="one")
    async def one() -> str:
        return "one"

    @durable.workflow(queue_name="two")
    async def two() -> str:
        return "two"

    start_worker()
    a = one.options(workflow_id="same").start()
    b = two.options(workflow_id="same").start()
    assert (a.result(timeout=10), b.result(timeout=10)) == ("one", "two")


def test_a_hundred_children_and_activities_at_once(start_worker: StartWorker) -> None:
    @durable.activity
    def act(n: int) -> int:
        return n

    @durable.workflow
    async def child(n: int) -> int:
        return await act.execute(n) + 1

    @durable.workflow
    async def parent() -> int:
        return sum(await asyncio.gather(*(child.execute(n) for n in range(100))))

    start_worker()
    assert parent.start().result(timeout=60) == sum(range(100)) + 100


def test_semaphore_bounded_fan_out_with_a_slow_consumer(start_worker: StartWorker) -> None:
    now, most = 0, 0
    lock = threading.Lock()

    @durable.activity
    def act(n: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return n

    @durable.workflow
    async def flow() -> list[int]:
        semaphore = asyncio.Semaphore(2)

        async def one(n: int) -> int:
            async with semaphore:
                return await act.execute(n)

        return list(await asyncio.gather(*(one(n) for n in range(8))))

    start_worker()
    assert flow.start().result(timeout=20) == list(range(8))
    assert most <= 2
