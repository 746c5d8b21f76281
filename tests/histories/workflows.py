"""The workflows whose histories are kept, and what is said to their runs.  Nothing here is ever changed: only added."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import dramatiq_durable as durable
from dramatiq_durable.workflow.interceptors import Interceptors

Talk = Callable[[Any], Any]


class Color(Enum):
    RED = "red"


@dataclass
class Parcel:
    order_id: str
    color: Color
    due: date
    cents: Decimal
    label: bytes


@dataclass
class Feature:
    """A workflow, and what is said to its run: from outside, while it is recorded.

    Attributes:
      workflow: what is started, without arguments.
      talk: is given the handle; the run that it answers, or else the handle's, is the one that is kept.
      fails(bool): the run does not complete.
      interceptors: what is around it.
    """

    workflow: Any
    talk: Talk = lambda handle: None
    fails: bool = False
    interceptors: tuple[durable.WorkflowInterceptor, ...] = ()

    def surround(self) -> None:
        """Have its broker use the interceptors of this feature."""
        self.workflow.broker.interceptors = Interceptors(self.interceptors)


class Around(durable.WorkflowInterceptor):
    """Passes everything on, not always at once, and leaves its traces."""

    def __init__(self, echo: Any) -> None:
        self.echo = echo

    async def execute_workflow(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        await self.echo.execute(f"before {ctx.name}")
        return ["around", await call_next(ctx)]

    async def execute_activity(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        ctx.headers["tenant"] = "t-1"
        await durable.sleep(0.01)
        return await call_next(ctx)

    async def execute_child(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        return [await call_next(ctx), await self.echo.execute("child")]

    async def signal(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
        ctx.args = ("changed",)
        return await call_next(ctx)


def wait_for_event(handle: Any, type: str, count: int = 1) -> None:
    """Wait until the run's history has so many events of a type."""
    deadline = time.monotonic() + 20
    while [event.type for event in handle.history()].count(type) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{type} did not come: {handle.history()}")
        time.sleep(0.01)


def declare(broker: durable.DurableBroker) -> dict[str, Feature]:
    """Declare everything on a broker; answers the features by name."""
    activity = durable.activity(broker=broker, queue_name="work", max_retries=0)
    failed: set[str] = set()

    @activity
    def echo(value: Any = None) -> Any:
        return value

    @activity
    def pack(parcel: Any) -> Any:
        return parcel

    @activity
    def fail(message: str) -> None:
        raise ValueError(message)

    @durable.activity(broker=broker, queue_name="work", max_retries=3, min_backoff=1, max_backoff=5)
    def fail_once(key: str) -> str:
        if key not in failed:
            failed.add(key)
            raise ConnectionError("busy")
        return key

    @activity
    def slow(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @durable.workflow(broker=broker, queue_name="runs")
    async def child(n: int = 0, wait: bool = False) -> int:
        if n < 0:
            raise ValueError("negative")
        if wait:
            await durable.wait_for_signal("never")
        return n + 1

    # --- one for each feature ---------------------------------------------------------------------------------

    features: dict[str, Feature] = {}

    def feature(
        *talks: Talk, fails: bool = False, interceptors: tuple[Any, ...] = (), **options: Any
    ) -> Callable[[Any], Any]:
        def add(fn: Any) -> Any:
            made = durable.workflow(broker=broker, queue_name="runs", **options)(fn)
            features[fn.__name__] = Feature(made, *talks, fails=fails, interceptors=interceptors)
            return made

        return add

    @feature()
    async def activities() -> Any:
        seen: list[Any] = list(await asyncio.gather(echo.execute(1), echo.execute(value={"b": 2}), echo.execute()))
        try:
            await fail.execute("as asked")
        except durable.ActivityFailed as e:
            seen.append([e.type, e.message, e.attempt])
        seen.append(await fail_once.execute("once"))
        seen.append(await echo.options(delay=5, priority=3, max_retries=1).execute("later"))
        abandoned = echo.options(delay=60_000).start("never")
        abandoned.cancel()
        told = slow.options(cancellation="wait").start(0.05)
        left = slow.options(cancellation="abandon").start(0.05)
        await durable.sleep(0.02)
        told.cancel()
        left.cancel()
        done, _ = await asyncio.wait([told, left])
        return seen, len(done)

    @feature()
    async def values() -> Any:
        parcel = Parcel("o-1", Color.RED, date(2026, 1, 31), Decimal("1.10"), b"\x00\xff")
        packed = await pack.execute(parcel)
        others = await echo.execute(
            [datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=1), UUID(int=7), {3, 1, 2}, "ü\0", -0.0]
        )
        return packed, others

    @feature()
    async def timers() -> Any:
        seen: list[Any] = []
        await durable.sleep(0.01)
        await asyncio.sleep(0.01)
        await durable.sleep(0)
        try:
            async with asyncio.timeout(0.02):
                async with asyncio.timeout(60):
                    await durable.sleep("30 days")
        except TimeoutError:
            seen.append("timed out")
        seen.append(await asyncio.wait_for(echo.execute("in time"), 60))
        try:
            await durable.wait_for_signal("never", timeout="10ms")
        except durable.Timeout:
            seen.append("expired")
        return seen

    def send_signals(handle: Any) -> None:
        for n in range(4):
            handle.signal("item", n)
        handle.signal("other", {"k": None})
        handle.signal("item")
        wait_for_event(handle, "ActivityCompleted")
        handle.signal("last", [1])

    @feature(send_signals)
    async def signals() -> Any:
        items = [await durable.wait_for_signal("item", timeout=60) for _ in range(5)]
        other = await durable.wait_for_signal("other")
        await echo.execute("told")
        return items, other, await durable.wait_for_signal("last")

    @feature(lambda handle: handle.signal("go", 3))
    async def conditions() -> Any:
        state = {"n": 0}

        async def count() -> None:
            state["n"] = await durable.wait_for_signal("go")

        task = asyncio.create_task(count())
        await durable.wait_condition(lambda: state["n"] == 3, timeout=60)
        try:
            await durable.wait_condition(lambda: False, timeout=0.01)
        except durable.Timeout:
            await task
        return state

    @feature()
    async def children() -> Any:
        seen: list[Any] = list(await asyncio.gather(*[child.execute(n) for n in range(3)]))
        try:
            await child.execute(-1)
        except durable.ChildWorkflowFailed as e:
            seen.append([e.type, e.message])
        live = child.options(workflow_id="histories-child", parent_close="cancel", memo={"a": 1}).start(wait=True)
        await live.started()
        try:
            await child.options(workflow_id="histories-child").execute()
        except durable.WorkflowAlreadyStarted:
            seen.append("taken")
        cancelled = child.start(wait=True)
        await cancelled.started()
        cancelled.cancel()
        try:
            await cancelled
        except asyncio.CancelledError:
            seen.append("cancelled")
        return seen

    def cancel(handle: Any) -> None:
        wait_for_event(handle, "TimerStarted")
        handle.cancel()

    @feature(cancel, fails=True)
    async def cancellation() -> None:
        try:
            await asyncio.gather(durable.sleep(3600), child.execute(wait=True))
        finally:
            await asyncio.shield(echo.execute("cleaned"))
            with durable.uncancellable():
                await durable.sleep(0.01)

    def chain(handle: Any) -> Any:
        for n in range(3):
            handle.signal("item", n)
        handle.result(timeout=20)
        return handle

    @feature(chain, memo={"kept": "yes"}, fails=True)
    async def continued_as_new(n: int = 0) -> Any:
        item = await durable.wait_for_signal("item")
        if n < 2:
            durable.continue_as_new(n + 1)
        return item, durable.info().memo

    @feature()
    async def computed() -> Any:
        a = await durable.side_effect(lambda: 4)
        b = await durable.local(lambda x: x + 1, 41)
        try:
            await durable.local(lambda: 1 // 0)
        except durable.ActivityFailed as e:
            return a, b, e.type
        return None

    @feature()
    async def patches() -> Any:
        seen = []
        for _ in range(2):
            if durable.patched("first"):
                seen.append(await echo.execute("new"))
        await durable.sleep(0.01)
        if durable.patched("second"):
            seen.append(await echo.execute("newer"))
        return seen

    @feature()
    async def numbers() -> Any:
        drawn = [durable.random().random(), durable.random().randint(1, 6), str(durable.uuid4())]
        await echo.execute(drawn)
        await durable.sleep(0.005)
        return await echo.execute([str(durable.uuid7()), durable.random().choice("abc"), durable.now()])

    @feature()
    async def structured() -> Any:
        seen: list[Any] = []
        queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
        lock, limit, ready = asyncio.Lock(), asyncio.Semaphore(2), asyncio.Event()

        async def put(n: int) -> None:
            await ready.wait()
            async with limit, lock:
                await queue.put(await echo.execute(n))

        async def take() -> None:
            for _ in range(3):
                seen.append(await queue.get())

        async with asyncio.TaskGroup() as group:
            for n in range(3):
                group.create_task(put(n))
            group.create_task(take())
            ready.set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(durable.sleep(3600))
                group.create_task(echo.options(delay=60_000).execute("never"))
                group.create_task(fail.execute("in a group"))
        except* durable.ActivityFailed as group_error:
            seen.append(len(group_error.exceptions))
        for next_one in asyncio.as_completed([echo.execute("a"), durable.sleep(0.05), echo.execute("b")]):
            await next_one
        done, pending = await asyncio.wait(
            [asyncio.create_task(echo.execute("x")), asyncio.create_task(durable.sleep(3600))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in pending:
            task.cancel()
        return seen, len(done)

    @feature(fails=True)
    async def failure() -> None:
        try:
            await fail.execute("below")
        except durable.ActivityFailed as e:
            raise RuntimeError("above") from e

    def second_attempt(handle: Any) -> Any:
        handle.result(timeout=20)
        return durable.get_handle(handle.workflow_id, broker=broker)

    @feature(second_attempt, retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3), run_timeout=60)
    async def retried() -> Any:
        if durable.info().attempt == 1:
            raise ConnectionError("busy")
        return durable.info().attempt

    def reset(handle: Any) -> Any:
        handle.result(timeout=20)
        fired = next(event for event in handle.history() if event.type == "TimerFired")
        again = handle.reset(fired.event_id)
        again.result(timeout=20)
        return again

    @feature(reset)
    async def reset_to_a_timer() -> Any:
        first = durable.random().random()
        await echo.execute(first)
        await durable.sleep(0.01)
        return await echo.execute([durable.random().random(), await child.execute(1)])

    def answer(handle: Any) -> None:
        wait_for_event(handle, "EscalationOpened", 3)
        for escalation in durable.escalations.list(role="clerk", broker=broker):
            if escalation.subject == "cancel":
                durable.escalations.cancel(escalation.id, broker=broker)
            elif escalation.subject == "resolve":
                durable.escalations.resolve(escalation.id, {"ok": True}, by="Kim", broker=broker)

    @feature(answer)
    async def escalations() -> Any:
        asked = [
            asyncio.create_task(durable.escalate(role="clerk", subject="resolve", payload={"n": 1}, priority=2)),
            asyncio.create_task(durable.escalate(role="clerk", subject="cancel", type="yes-no", metadata={"a": 1})),
            asyncio.create_task(durable.escalate(role="nobody", timeout="20ms")),
        ]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        withdrawn = asyncio.create_task(durable.escalate(role="nobody"))
        await durable.sleep(0.01)
        withdrawn.cancel()
        await asyncio.wait([withdrawn])
        return [o if isinstance(o, dict) else type(o).__name__ for o in outcomes]

    # --- messages, limits, state ------------------------------------------------------------------------------

    def ask_updates(handle: Any) -> None:
        handle.update("add", 2, update_id="first")
        for wrong in (-1, 13):
            try:
                handle.update("add", wrong)
            except (durable.UpdateRejected, durable.UpdateFailed):
                pass
            else:
                raise AssertionError("it was neither rejected nor did it fail")
        handle.query("total")
        handle.signal("note", "a")
        handle.signal("note", "b")
        handle.signal("close")

    @feature(ask_updates)
    async def updates() -> Any:
        seen: list[Any] = []

        def check(n: int) -> None:
            if n < 0:
                raise ValueError("negative")

        @durable.on_update("add", validator=check)
        async def add(n: int) -> int:
            if await echo.execute(n) == 13:
                raise LookupError("no luck")
            seen.append(n)
            return len(seen)

        @durable.on_query("total")
        def total() -> int:
            return sum(seen)

        @durable.on_signal("note")
        async def note(text: str) -> None:
            await durable.sleep(0.01)
            seen.append(text)

        closed = False

        @durable.on_signal("close")
        def close() -> None:
            nonlocal closed
            closed = True

        await durable.wait_condition(lambda: closed)
        await durable.wait_condition(durable.all_handlers_finished)
        return seen

    @feature()
    async def activity_timeouts() -> Any:
        seen = []
        policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2, non_retryable=("KeyError",))
        for limit in ({"start_to_close": 0.1}, {"heartbeat": 0.1}, {"schedule_to_close": 0.15}):
            try:
                await slow.options(retry=policy, **limit).execute(0.8)
            except durable.ActivityFailed as e:
                seen.append([e.type, e.timeout, e.attempt])
        try:
            await nobody.options(schedule_to_start=0.1).execute()
        except durable.ActivityFailed as e:
            seen.append([e.type, e.timeout, e.attempt])
        return seen

    nobody = durable.activity_stub("nobody", queue_name="nobodys")

    @activity
    def beats(n: int) -> Any:
        for row in range(n):
            durable.heartbeat({"row": row})
        info = durable.activity_info()
        assert info is not None
        if info.attempt == 1:
            raise ConnectionError("busy")
        return info.heartbeat_details

    @feature()
    async def heartbeats() -> Any:
        policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2)
        return await beats.options(heartbeat=30, retry=policy).execute(3)

    @feature()
    async def local_activities() -> Any:
        seen = [await echo.options(local=True).execute({"a": 1})]
        try:
            policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2)
            await fail.options(local=True, retry=policy).execute("here")
        except durable.ActivityFailed as e:
            seen.append([e.type, e.attempt])
        return seen

    @feature()
    async def entity() -> Any:
        document = durable.entity()
        await document.set("customer.name", "Kim")
        await document.merge("customer", {"city": "Ulm"})
        await document.append("lines", {"sku": "pen"})
        await document.prepend("lines", "first")
        await document.remove("lines", 0)
        await document.delete("customer.city")
        return [await document.increment("total", 3), await document.toggle("open"), await document.get("lines")]

    @feature(search={"kind": "recorded"})
    async def search() -> Any:
        await durable.upsert_search({"customer": "Kim", "cents": 500, "when": datetime(2026, 1, 1, tzinfo=UTC)})
        await durable.upsert_search({"kind": None, "tags": ["a", "b"]})
        return sorted(durable.info().search)

    @feature()
    async def topics() -> Any:
        await durable.emit("histories", {"n": 1})
        await durable.emit("histories")
        return await echo.execute("emitted")

    @feature()
    async def output() -> Any:
        offsets = [await durable.output({"part": 1}), await durable.output(None)]
        await durable.sleep(0.01)
        return [*offsets, await durable.output("last")]

    @feature(lambda handle: handle.signal("go"), interceptors=(Around(echo),))
    async def intercepted() -> Any:
        seen = [await echo.execute(1), await child.execute(2)]
        waiting = child.options(workflow_id="histories-told").start(0, True)
        await waiting.signal("never", "now")
        seen.append(await waiting)
        await durable.wait_for_signal("go")
        return seen

    @feature()
    async def messages_between_runs() -> Any:
        seen = []
        listener = child.options(workflow_id="histories-listener").start(0, True)
        await listener.started()
        await durable.signal_workflow("histories-listener", "other", {"n": 1})
        await durable.cancel_workflow("histories-listener")
        try:
            await listener
        except durable.DurableError as e:
            seen.append(type(e).__name__)
        for send in (
            durable.signal_workflow("histories-listener", "other"),
            durable.cancel_workflow("nobody-has-this"),
        ):
            try:
                await send
            except durable.DurableError as e:
                seen.append(type(e).__name__)
        return seen

    def leave_unread(handle: Any) -> Any:
        run = durable.get_handle(run_id=handle.run_id, broker=broker)
        for n in range(3):
            handle.signal("item", n)
        handle.signal("go")
        handle.result(timeout=20)
        return run

    @feature(leave_unread)
    async def unread_signals(again: bool = False) -> Any:
        if not again:
            await durable.wait_for_signal("go")
            durable.continue_as_new(True)
        return [await durable.wait_for_signal("item") for _ in range(3)]

    def cancel_soon(handle: Any) -> None:
        wait_for_event(handle, "ActivityScheduled")
        handle.cancel()

    @feature(cancel_soon, fails=True)
    async def uncancellable() -> Any:
        async with durable.uncancellable():
            await slow.execute(0.3)
            await echo.execute("cleaned up")
        await durable.sleep(60)

    @feature()
    async def cancelled_activities() -> list[Any]:
        told = slow.options(cancellation="wait", delay=60_000).start(1)
        await durable.sleep(0.01)
        told.cancel()
        await asyncio.wait([told])
        return [told.cancelled(), await echo.execute("after it")]

    return features
