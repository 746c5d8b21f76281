"""Interceptors: what an application puts around its workflows and what they call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from test_engine_support import Run, broker, charge, echo, ship

import dramatiq_durable as durable
from dramatiq_durable import CallContext, CallNext, WorkflowInterceptor
from dramatiq_durable.testing import Environment
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.activities import activity
from dramatiq_durable.workflow.commands import ContinueAsNew, ScheduleActivity, SendSignal, StartChild, StartTimer
from dramatiq_durable.workflow.converter import encode, loads
from dramatiq_durable.workflow.interceptors import Interceptors
from tests.support import wait_until
from tests.support.scoped import looking


@activity(broker=broker, queue_name="audits")
def audit(what: str) -> None: ...


def run_of(fn: Any, *args: Any, through: list[WorkflowInterceptor], **options: Any) -> Run:
    return Run(fn, *args, interceptors=Interceptors(through), **options)


class Trace(WorkflowInterceptor):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
        self.log.append(f"{self.name} in {ctx.name}{ctx.args}")
        try:
            return await call_next(ctx)
        finally:
            self.log.append(f"{self.name} out")

    async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
        self.log.append(f"{self.name} {ctx.name}{ctx.args}")
        return await call_next()


def test_the_first_is_outermost_and_all_of_it_is_replayed() -> None:
    log: list[str] = []

    async def order(n: int) -> Any:
        log.append("code")
        return await echo.execute(n)

    run = run_of(order, 5, through=[Trace("a", log), Trace("b", log)]).finish()
    assert run.result == 5
    once = ["a in order(5,)", "b in order(5,)", "code", "a echo(5,)", "b echo(5,)", "b out", "a out"]
    assert log == once
    run.replayed()
    assert log == once * 2


def test_arguments_and_outcomes_may_be_changed() -> None:
    class Change(WorkflowInterceptor):
        async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
            ctx.args = (ctx.args[0] * 10,)
            return [await call_next(ctx), "seen"]

        async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
            ctx.args, ctx.kwargs = (), {"value": ctx.args[0] + 1}
            return await call_next(ctx) * 2

    async def order(n: int) -> Any:
        return await echo.execute(n)

    run = run_of(order, 5, through=[Change()])
    (command,) = run.last
    assert loads(command.payload or b"") == {"args": [], "kwargs": {"value": 51}}
    run.complete(1, 51)
    assert run.result == [102, "seen"]
    run.replayed()


def test_an_interceptor_may_answer_fail_retry_and_catch() -> None:
    class Policy(WorkflowInterceptor):
        async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
            what = ctx.args[0]
            if what == "cached":
                return "from the cache"
            if what == "forbidden":
                raise PermissionError(what)
            try:
                return await call_next(ctx)
            except durable.ActivityFailed:
                await durable.sleep(1)
                return await call_next(ctx)

    async def order() -> Any:
        seen = [await echo.execute("cached")]
        try:
            await echo.execute("forbidden")
        except PermissionError as e:
            seen.append(str(e))
        seen.append(await echo.execute("flaky"))
        return seen

    run = run_of(order, through=[Policy()])
    run.fail(1)
    assert run.types == [events.TIMER_STARTED]
    run.fire(2)
    run.complete(3, "done")
    assert run.result == ["from the cache", "forbidden", "done"]
    run.replayed()


class Auditor(WorkflowInterceptor):
    """Calls an activity before everything."""

    async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
        await audit.execute(f"workflow {ctx.name}")
        return await call_next(ctx)

    async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
        await audit.execute(f"activity {ctx.name}")
        return await call_next(ctx)


def test_what_an_interceptor_calls_is_seen_by_those_further_in() -> None:
    log: list[str] = []

    async def order() -> Any:
        return await echo.execute(1)

    run = run_of(order, through=[Trace("out", log), Auditor(), Trace("in", log)]).finish()
    scheduled = [(c.name, c.args) for c in run.commands if isinstance(c, ScheduleActivity)]
    assert scheduled == [
        # Its call around the workflow is one of the workflow's, and audited, too.
        ("audit", ("activity audit",)),
        ("audit", ("workflow order",)),
        ("audit", ("activity echo",)),
        ("echo", (1,)),
    ]
    assert log == [
        "out in order()",
        "out audit('workflow order',)",
        "in audit('activity audit',)",
        "in audit('workflow order',)",
        "in in order()",
        "out echo(1,)",
        "in audit('activity echo',)",
        "in echo(1,)",
        "in out",
        "out out",
    ]
    run.replayed()


class Headers(WorkflowInterceptor):
    async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
        ctx.headers["tenant"] = "acme"
        return await call_next(ctx)

    async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
        ctx.headers = {**ctx.headers, "call": ctx.name}
        return await call_next(ctx)


def test_headers_travel() -> None:
    async def order() -> Any:
        assert durable.info().headers == {"a": 1, "tenant": "acme"}
        first = echo.options(headers={"b": 2}).start(1)
        child = ship.options(headers={"a": 3}).start("x")
        return [await first, await child]

    run = run_of(order, through=[Headers()], start=False)
    run.send(events.WORKFLOW_STARTED, attributes={"headers": {"a": 1}})
    activity_, child = run.last
    assert isinstance(activity_, ScheduleActivity)
    assert isinstance(child, StartChild)
    assert activity_.options["headers"] == {"a": 1, "tenant": "acme", "b": 2, "call": "echo"}
    assert child.options["facts"]["headers"] == {"a": 3, "tenant": "acme"}
    run.finish()
    run.replayed()
    # Without interceptors, they are passed on all the same.
    plain = Run(echo_twice, start=False)
    plain.send(events.WORKFLOW_STARTED, attributes={"headers": {"a": 1}})
    assert [c.options["headers"] for c in plain.last if isinstance(c, ScheduleActivity)] == [{"a": 1}, {"a": 1, "b": 2}]


async def echo_twice() -> None:
    await asyncio.gather(echo.execute(), echo.options(headers={"b": 2}).execute())


def test_headers_are_those_of_the_next_run() -> None:
    async def order(n: int) -> None:
        durable.continue_as_new(n + 1)

    run = run_of(order, 1, through=[Headers()])
    (command,) = run.last
    assert isinstance(command, ContinueAsNew)
    assert command.facts["headers"] == {"tenant": "acme"}
    run.replayed()


def test_a_child_of_an_interceptor_is_known_once_it_is_started() -> None:
    class First(WorkflowInterceptor):
        async def execute_child(self, ctx: CallContext, call_next: CallNext) -> Any:
            await audit.execute(ctx.workflow_id)
            return await call_next(ctx)

    async def order() -> Any:
        child = ship.options(workflow_id="s-1").start("x")
        await child.started()
        return child.run_id

    run = run_of(order, through=[First()])
    run.complete(1)
    assert run.types == [events.CHILD_STARTED, events.CHILD_START_AWAITED]
    run.send(events.CHILD_START_CONFIRMED, 3, attributes={"run_id": "r-9"})
    assert run.result == "r-9"
    run.replayed()


def test_bad_headers_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="headers is a dict"):
        echo.options(headers=["a"])  # type: ignore[typeddict-item]
    with pytest.raises(durable.NotEncodable, match="headers of 'echo'"):
        echo.options(headers={"a": object()})
    with pytest.raises(ValueError, match="headers is a dict"):
        ship.options(headers={1: 2})  # type: ignore[dict-item]


class Pass(WorkflowInterceptor):
    """Is there, and changes nothing."""

    async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
        return await call_next(ctx)

    async def execute_child(self, ctx: CallContext, call_next: CallNext) -> Any:
        return await call_next(ctx)


def test_commands_are_issued_at_the_call() -> None:
    async def order() -> Any:
        values = [1]
        first = echo.start(values)
        values.append(2)
        timer = asyncio.create_task(asyncio.sleep(1))
        second = charge.start("o", 5)
        child = ship.options(parent_close="abandon").start("x")
        ids.append((child.workflow_id, child.run_id))
        await asyncio.wait([timer])
        return [await second, await first]

    ids: list[Any] = []
    run = run_of(order, through=[Pass(), Pass()])
    assert [(c.seq, c.name) for c in run.last] == [(1, "echo"), (2, "charge"), (3, "ship"), (4, None)]
    assert loads(run.last[0].payload or b"")["args"] == [[1]]
    assert ids == [("wf-1.3", run.execution.child_ids(3)[1])]
    run.finish()
    run.replayed()


def test_what_is_never_awaited_is_done_all_the_same() -> None:
    async def order() -> str:
        echo.start(1)
        ship.options(parent_close="abandon").start("x")
        return "done"

    run = run_of(order, through=[Pass()])
    assert [c.event_type for c in run.last] == [
        events.ACTIVITY_SCHEDULED,
        events.CHILD_STARTED,
        events.WORKFLOW_COMPLETED,
    ]


def test_wrong_arguments_are_refused_at_the_call() -> None:
    async def order() -> Any:
        with pytest.raises(TypeError, match="charge"):
            charge.start("only one")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="ship"):
            ship.start()  # type: ignore[call-arg]
        return "ok"

    assert run_of(order, through=[Pass()]).result == "ok"


@pytest.mark.parametrize("early", [True, False])
def test_a_call_stays_cancellable(early: bool) -> None:
    async def order() -> Any:
        handle = echo.start(1)
        if not early:
            await asyncio.sleep(1)
        assert await handle.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handle
        assert handle.cancelled()
        return "went on"

    run = run_of(order, through=[Pass(), Pass()])
    if not early:
        run.fire(2)
    assert run.result == "went on"
    cancelled = [c.event_type for c in run.commands if c.event_type == events.ACTIVITY_CANCELLED]
    # What is taken back in the step in which it was asked for, was never asked for.
    assert len(cancelled) == (0 if early else 1)
    run.replayed()


def test_a_call_that_waits_for_its_cancel_does_so() -> None:
    async def order() -> Any:
        try:
            await asyncio.wait_for(echo.options(cancellation="wait").execute(1), 5)
        except TimeoutError:
            return "late"

    run = run_of(order, through=[Pass()])
    run.fire(2)
    assert run.types == [events.ACTIVITY_CANCEL_REQUESTED]
    run.fail(1, "ActivityCancelled", "")
    assert run.result == "late"
    run.replayed()


def test_an_interceptor_cleans_up_after_a_cancel() -> None:
    class CleanUp(WorkflowInterceptor):
        async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
            try:
                return await call_next(ctx)
            except asyncio.CancelledError:
                await audit.execute("cancelled")
                raise

    async def order() -> Any:
        await echo.execute(1)

    run = run_of(order, through=[CleanUp()])
    run.cancel()
    assert run.types == [events.ACTIVITY_CANCELLED, events.ACTIVITY_SCHEDULED]
    run.complete(2)
    assert run.types == [events.WORKFLOW_CANCELLED]
    run.replayed()


def test_timeouts_in_an_interceptor_are_its_own() -> None:
    class Deadline(WorkflowInterceptor):
        async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
            async with asyncio.timeout(5):
                return await call_next(ctx)

    async def order() -> Any:
        first, second = echo.start(1), echo.start(2)
        seen = [await second]
        try:
            await first
        except TimeoutError:
            seen.append("late")
        return seen

    run = run_of(order, through=[Deadline()])
    assert [c.seq for c in run.last] == [1, 2, 3, 4]
    run.complete(4, "second")
    run.fire(1)
    assert run.result == ["second", "late"]
    run.replayed()


def test_calls_fit_wherever_calls_fit() -> None:
    async def order() -> Any:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(echo.execute(n)) for n in range(3)]
        seen = [t.result() for t in tasks]
        seen += await asyncio.gather(echo.execute(3), asyncio.create_task(echo.execute(4)), echo.start(5))
        for done in asyncio.as_completed([echo.execute(6), echo.execute(7)]):
            seen.append(await done)
        done, _ = await asyncio.wait([echo.start(8), echo.start(9)])
        seen += sorted([d.result() for d in done])
        seen.append(await asyncio.shield(echo.execute(10)))
        return seen

    run = run_of(order, through=[Trace("a", []), Pass()]).finish()
    assert run.result == list(range(11))
    run.replayed()


async def _a_child_is_cancelled() -> Any:
    child = ship.start("x")
    await asyncio.sleep(1)
    cancelled = await child.cancel()
    try:
        await child
    except asyncio.CancelledError:
        return [cancelled, asyncio.current_task().cancelling()]  # type: ignore[union-attr]


async def _a_group_fails_after_a_timeout() -> Any:
    try:
        async with asyncio.timeout(3):
            await echo.execute(1)
    except TimeoutError:
        pass
    seen: list[Any] = [asyncio.current_task().cancelling()]  # type: ignore[union-attr]
    try:
        async with asyncio.TaskGroup() as group:
            for call in (echo.execute("fails"), echo.execute(3), ship.execute("a")):
                group.create_task(call)
    except* durable.ActivityFailed as e:
        seen.append(str(e.exceptions[0]))
    return seen


@pytest.mark.parametrize("fn", [_a_child_is_cancelled, _a_group_fails_after_a_timeout])
def test_interceptors_that_change_nothing_leave_the_same_history(fn: Any) -> None:
    def events_of(through: list[WorkflowInterceptor]) -> list[Any]:
        run = run_of(fn, through=through)
        while not run.execution.closed:
            asked = [c.seq for c in run.last if c.event_type == events.CHILD_CANCEL_REQUESTED]
            timers = [c.seq for c in run.open_commands() if isinstance(c, StartTimer)]
            fails = [c.seq for c in run.last if isinstance(c, ScheduleActivity) and c.args == ("fails",)]
            if asked:
                run.send(events.CHILD_CANCELLED, asked[0])
            elif fails:
                run.fail(fails[0] or 0)
            else:
                run.fire(timers[0] or 0)
        assert isinstance(run.result, list)
        run.replayed()
        return [(e.type, e.seq, e.name, e.payload) for e in run.history]

    assert events_of([Pass(), Pass()]) == events_of([])


def test_an_interceptor_that_waits_before_it_calls_on() -> None:
    class First(WorkflowInterceptor):
        async def execute_child(self, ctx: CallContext, call_next: CallNext) -> Any:
            await audit.execute("child")
            return await call_next(ctx)

    async def order() -> Any:
        child = ship.start("x")
        with pytest.raises(durable.DurableError, match="has no run_id yet"):
            _ = child.run_id
        outcome = await child
        return [outcome, child.workflow_id]

    run = run_of(order, through=[First()])
    run.complete(1)
    run.send(events.CHILD_COMPLETED, 2, payload=encode("x"))
    assert run.result == ["x", "wf-1.2"]
    run.replayed()


def test_a_dropped_run_runs_nothing_of_its_interceptors() -> None:
    log: list[str] = []

    class CleanUp(WorkflowInterceptor):
        async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
            try:
                return await call_next(ctx)
            finally:
                await audit.execute("workflow")
                log.append("ran on")

        async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
            try:
                return await call_next(ctx)
            finally:
                await audit.execute("activity")
                log.append("ran on")

    async def order() -> Any:
        return await echo.execute(1)

    run = run_of(order, through=[CleanUp()])
    run.execution.evict()
    assert log == []
    # At every event, a fresh execution comes to the same.
    run = run_of(order, through=[CleanUp()]).finish()
    for n in range(1, len(run.history) + 1):
        if n == len(run.history) or run.history[n].type in events.INPUT_TYPES:
            execution = run.fresh()
            execution.replay(run.history[:n])
            execution.evict()


def test_a_change_of_interceptors_is_nondeterminism() -> None:
    async def order() -> Any:
        return await echo.execute(1)

    run = run_of(order, through=[]).finish()
    run.options["interceptors"] = Interceptors([Auditor()])
    with pytest.raises(durable.Nondeterminism):
        run.replayed()


def test_the_workflows_failure_passes_its_interceptors() -> None:
    class Catch(WorkflowInterceptor):
        async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
            try:
                return await call_next(ctx)
            except ValueError as e:
                await audit.execute(str(e))
                raise RuntimeError("wrapped") from e

    async def order() -> Any:
        raise ValueError("boom")

    run = run_of(order, through=[Catch()]).finish()
    assert (run.failure["type"], run.failure["cause"]["message"]) == ("RuntimeError", "boom")
    run.replayed()

    async def picky(n: int) -> None: ...

    wrong = run_of(picky, 1, 2, through=[Catch()])
    assert wrong.failure["type"] == "TypeError"


class Stamp(WorkflowInterceptor):
    """Audits every signal, and changes what it says."""

    def __init__(self, audited: bool = True) -> None:
        self.audited = audited

    async def signal(self, ctx: CallContext, call_next: CallNext) -> Any:
        if self.audited:
            await audit.execute(f"{ctx.name} to {ctx.workflow_id}")
        ctx.args = ([ctx.args[0], ctx.headers],)
        try:
            return await call_next(ctx)
        except durable.WorkflowClosed:
            return "too late"


async def _signals() -> Any:
    child = ship.options(workflow_id="s-1", parent_close="abandon").start("x")
    return [await durable.signal_workflow("w-2", "go", 1), await child.signal("on")]


@pytest.mark.parametrize("audited", [True, False])
def test_signals_to_other_runs_pass_interceptors(audited: bool) -> None:
    run = run_of(_signals, through=[Headers(), Stamp(audited)])
    sent: list[SendSignal] = []
    for outcome in (events.MESSAGE_DELIVERED, events.MESSAGE_FAILED):
        if audited:
            (asked,) = [c for c in run.last if isinstance(c, ScheduleActivity)]
            assert asked.args == (("go to w-2",) if not sent else ("on to s-1",))
            run.complete(asked.seq or 0)
        (signal,) = [c for c in run.last if isinstance(c, SendSignal)]
        sent.append(signal)
        run.send(outcome, signal.seq, attributes={"reason": "closed"})
    assert [(s.workflow_id, s.name, s.child and s.child > 0) for s in sent] == [
        ("w-2", "go", None),
        ("s-1", "on", True),
    ]
    assert [loads(s.payload or b"") for s in sent] == [[1, {"tenant": "acme"}], [None, {"tenant": "acme"}]]
    assert run.result == [None, "too late"]
    run.replayed()


def test_a_signal_is_sent_at_the_call_and_its_name_checked() -> None:
    async def order() -> str:
        with pytest.raises(durable.InvalidName):
            durable.signal_workflow("w-2", "")
        durable.signal_workflow("w-2", "go")
        return "done"

    run = run_of(order, through=[Stamp(audited=False)])
    assert run.result == "done"
    assert [c.event_type for c in run.last] == [events.SIGNAL_SENT, events.WORKFLOW_COMPLETED]
    run.replayed()


def test_kinds_that_nobody_intercepts_cost_nothing() -> None:
    interceptors = Interceptors([Headers()])
    assert len(interceptors.activity) == 1
    assert interceptors.child == []

    async def order() -> Any:
        return type(ship.start("x")).__name__

    assert run_of(order, through=[Headers()]).result == "ChildHandle"


def test_what_is_no_interceptor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"make one, with \(\)"):
        Interceptors([Pass])
    with pytest.raises(TypeError, match="WorkflowInterceptor"):
        durable.DurableBroker("postgresql:///x", interceptors=[object()])  # type: ignore[list-item]


# --- on a real database -----------------------------------------------------------------------------------


def test_interceptors_and_headers_in_real_runs(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker]
) -> None:
    seen: list[Any] = []

    class Look(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            if message.actor_name in ("note", "step"):
                seen.append((message.actor_name, message.options.get("headers")))

    broker.add_middleware(Look())

    @durable.activity(queue_name="audits")
    def note(what: str) -> None: ...

    @durable.activity(queue_name="steps")
    def step(n: int) -> int:
        return n + 1

    class Both(Headers):
        async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
            await note.execute(f"begin {ctx.name}")
            return await super().execute_workflow(ctx, call_next)

    broker.interceptors = Interceptors([Both()])

    @durable.workflow(queue_name="runs")
    async def child(n: int) -> Any:
        return [await step.execute(n), durable.info().headers]

    @durable.workflow(queue_name="runs")
    async def parent(n: int) -> Any:
        await durable.wait_for_signal("go")
        return [await step.execute(n), await child.options(headers={"own": 1}).execute(n)]

    start_worker()
    handle = parent.options(headers={"trace": "t-1"}).start(1)
    wait_until(lambda: "ActivityCompleted" in [e.type for e in handle.history()])
    broker.runner.cache.clear()
    handle.signal("go")
    tenant = {"trace": "t-1", "tenant": "acme"}
    assert handle.result(timeout=30) == [2, [2, {**tenant, "own": 1}]]
    assert seen == [
        ("note", {"trace": "t-1", "call": "note"}),
        ("step", {**tenant, "call": "step"}),
        ("note", {**tenant, "own": 1, "call": "note"}),
        ("step", {**tenant, "own": 1, "call": "step"}),
    ]


def test_a_run_that_is_brought_back_for_a_query_has_its_interceptors(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker]
) -> None:
    @durable.activity(queue_name="steps")
    def note() -> None: ...

    class Notes(WorkflowInterceptor):
        async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
            await note.execute()
            return await call_next(ctx)

    broker.interceptors = Interceptors([Notes()])

    @durable.workflow(queue_name="runs")
    async def asked() -> int:
        @durable.on_query("state")
        def state() -> str:
            return "here"

        return 1

    start_worker()
    handle = asked.start()
    assert handle.result(timeout=30) == 1
    assert handle.query("state") == "here"


def test_schedules_give_their_runs_headers(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker]
) -> None:
    @durable.workflow(queue_name="runs")
    async def report() -> Any:
        return durable.info().headers

    durable.schedules.create("yearly", cron="0 0 1 1 *", target=report.options(headers={"tenant": "acme"}))
    start_worker()
    durable.schedules.trigger("yearly")
    known = durable.schedules.describe("yearly")
    wait_until(lambda: durable.schedules.describe("yearly").fired > known.fired or known.fired == 1)
    with looking(broker) as conn:
        wait_until(lambda: conn.execute("SELECT 1 FROM durable.run").fetchone() is not None)
        row = conn.execute("SELECT workflow_id FROM durable.run").fetchone()
    assert row is not None
    assert durable.get_handle(row[0]).result(timeout=30) == {"tenant": "acme"}


class Waits(WorkflowInterceptor):
    """Has the code wait for an activity, and then for a signal, before it begins."""

    def __init__(self, note: Any) -> None:
        self.note = note

    async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
        await self.note.execute()
        if await durable.wait_for_signal("permit") == "no":
            raise PermissionError("no permit")
        return await call_next(ctx)


def _waiting(broker: durable.DurableBroker) -> Any:
    @durable.activity(broker=broker, queue_name="steps")
    def note() -> None: ...

    broker.interceptors = Interceptors([Waits(note)])

    @durable.workflow(broker=broker, queue_name="runs")
    async def asked() -> list[int]:
        seen: list[int] = []

        def check(n: int) -> None:
            if n < 0:
                raise ValueError("negative")

        @durable.on_update("add", validator=check)
        def add(n: int) -> int:
            seen.append(n)
            return n * 2

        durable.on_query("seen")(lambda: seen)
        await durable.wait_condition(lambda: len(seen) == 2)
        return seen

    return asked


@pytest.mark.parametrize("evicted", [False, True])
def test_updates_and_queries_wait_until_interceptors_let_the_code_begin(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker], evicted: bool
) -> None:
    asked = _waiting(broker)
    handle = asked.options(with_update=("add", 1), update_id="first").start()
    query = threading.Thread(target=lambda: seen.append(handle.query("seen", timeout=30)))
    seen: list[Any] = []
    start_worker()
    wait_until(lambda: "ActivityCompleted" in [e.type for e in handle.history()])
    query.start()
    handle._request("add", (-1,), "second", "completed")
    handle._request("add", (2,), "third", "completed")
    with pytest.raises(durable.Timeout):
        handle.get_update("first").result(timeout=0.3)
    assert "permit" in (handle.describe().stack or "")
    if evicted:
        broker.runner.cache.clear()
    handle.signal("permit", "yes")
    assert handle.get_update("first").result(timeout=30) == 2
    with pytest.raises(durable.UpdateRejected, match="negative"):
        handle.get_update("second").result(timeout=30)
    assert handle.get_update("third").result(timeout=30) == 4
    assert handle.result(timeout=30) == [1, 2]
    query.join(30)
    assert seen[0] in ([], [1], [1, 2])
    # Whom the interceptors refuse, nobody answers.
    refused = asked.options(with_update=("add", 1), update_id="first").start()
    refused.signal("permit", "no")
    with pytest.raises(durable.WorkflowFailed, match="no permit"):
        refused.result(timeout=30)
    with pytest.raises(durable.WorkflowClosed):
        refused.get_update("first").result(timeout=30)


def test_updates_wait_in_an_environment_too(broker: durable.DurableBroker) -> None:
    asked = _waiting(broker)
    with Environment() as environment:
        handle = environment.start(asked)
        with pytest.raises(durable.Timeout):
            handle.update("add", 1, update_id="first")
        with pytest.raises(durable.QueryTimedOut):
            handle.query("seen")
        handle.signal("permit", "yes")
        assert handle.get_update("first").result() == 2
        assert handle.query("seen") == [1]
        assert handle.update("add", 2) == 4
        assert handle.result() == [1, 2]


def test_headers_of_a_run_that_cannot_be_carried_are_refused_at_the_call() -> None:
    class Odd(WorkflowInterceptor):
        async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
            ctx.headers["odd"] = object()
            return await call_next(ctx)

    async def order() -> list[str]:
        seen = []
        for call in (lambda: echo.execute(1), lambda: ship.start("x")):
            with pytest.raises(durable.NotEncodable, match=r"headers of '\w+', at \['odd'\]") as caught:
                call()
            seen.append(type(caught.value).__name__)
        return seen

    assert run_of(order, through=[Odd()]).result == ["NotEncodable"] * 2
