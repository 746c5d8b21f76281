"""Histories replay to the same commands; differences are found in both directions; eviction does nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dramatiq_durable import errors
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow import primitives as durable
from dramatiq_durable.workflow.events import Event
from dramatiq_durable.workflow.replay import current
from tests.workflow.test_engine_support import Run, charge, echo, ship


async def two_activities() -> Any:
    a = await echo.execute("a")
    b = await charge.execute("o", 5)
    return [a, b]


# --- nondeterminism ------------------------------------------------------------------------------------
async def another_name() -> Any:
    await charge.execute("a", 1)


async def other_arguments() -> Any:
    await echo.execute("z")


async def a_timer_instead() -> Any:
    await durable.sleep(5)


async def one_more() -> Any:
    await asyncio.gather(echo.execute("a"), echo.execute("more"))


async def nothing_at_all() -> Any:
    return None


async def stops_early() -> Any:
    await echo.execute("a")


async def waits_for_nothing() -> Any:
    await durable.wait_for_signal("x")


async def fails() -> Any:
    raise KeyError("new bug")


@pytest.mark.parametrize(
    ("code", "event_id", "expected", "got"),
    [
        (another_name, 2, "ActivityScheduled 'echo'", "ActivityScheduled 'charge'"),
        (other_arguments, 2, "ActivityScheduled 'echo' with arguments", "ActivityScheduled 'echo' with arguments"),
        (a_timer_instead, 2, "ActivityScheduled 'echo'", "TimerStarted"),
        (one_more, 3, "no more commands", "ActivityScheduled 'echo'"),
        (nothing_at_all, 2, "ActivityScheduled 'echo'", "WorkflowCompleted"),
        (stops_early, 4, "ActivityScheduled 'charge'", "WorkflowCompleted"),
        (waits_for_nothing, 2, "ActivityScheduled 'echo'", "nothing"),
        (fails, 2, "ActivityScheduled 'echo'", "WorkflowFailed (KeyError: 'new bug')"),
    ],
)
def test_differences_are_found(code: Any, event_id: int, expected: str, got: str) -> None:
    run = Run(two_activities)
    run.complete(1, "a")
    run.complete(2, "b")
    with pytest.raises(errors.Nondeterminism) as caught:
        run.replayed(code)
    assert caught.value.event_id == event_id
    assert caught.value.expected.startswith(expected)
    assert caught.value.got.startswith(got)


def test_one_more_command_at_the_end_of_history_is_found() -> None:
    run = Run(two_activities)
    with pytest.raises(errors.Nondeterminism) as caught:
        run.replayed(one_more)
    assert (caught.value.event_id, caught.value.expected) == (3, "no more commands")

    async def quiet() -> None:
        await durable.wait_for_signal("x")

    with pytest.raises(errors.Nondeterminism) as caught:
        Run(quiet).replayed(two_activities)
    assert (caught.value.event_id, caught.value.got) == (2, "ActivityScheduled 'echo'")


def test_another_order_and_another_child_id_are_found() -> None:
    async def old() -> Any:
        await asyncio.gather(echo.execute(1), charge.execute("o", 1))

    async def new() -> Any:
        await asyncio.gather(charge.execute("o", 1), echo.execute(1))

    with pytest.raises(errors.Nondeterminism):
        Run(old).replayed(new)

    async def old_child() -> Any:
        await ship.options(workflow_id="a").execute("o")

    async def new_child() -> Any:
        await ship.options(workflow_id="b").execute("o")

    with pytest.raises(errors.Nondeterminism, match="id 'a'"):
        Run(old_child).replayed(new_child)


def test_a_timer_may_change_its_length() -> None:
    async def old() -> None:
        await durable.sleep("30 days")

    async def new() -> None:
        await durable.sleep("10 days")

    Run(old).replayed(new)


def test_a_set_as_an_argument_is_no_nondeterminism() -> None:
    async def wf() -> None:
        await echo.execute({f"key-{i}" for i in range(50)})

    run = Run(wf)
    assert run.last[0].payload is not None
    keys = ",".join(sorted(f'"key-{i}"' for i in range(50)))
    assert keys.encode() in run.last[0].payload


# --- closing ----------------------------------------------------------------------------------------------
def test_pending_commands_come_before_the_closing_one_and_nothing_after() -> None:
    async def wf() -> str:
        echo.start("kept")
        asyncio.get_running_loop().call_soon(lambda: echo.start("never"))

        async def background() -> None:
            await asyncio.sleep(0)
            await echo.execute("never either")

        asyncio.create_task(background())  # noqa: RUF006
        return "done"

    run = Run(wf)
    assert run.types == ["ActivityScheduled", "WorkflowCompleted"]
    assert run.complete(1) == []
    assert run.signal("late") == []
    assert run.execution.closed


def test_failures_keep_their_chain() -> None:
    async def wf() -> None:
        try:
            await charge.execute("o", 5)
        except errors.ActivityFailed as e:
            caught.append(e)
            raise

    caught: list[errors.ActivityFailed] = []

    run = Run(wf)
    run.fail(1, attempt=3, cause={"type": "OSError", "message": "disk"})
    (e,) = caught
    assert (e.activity, e.attempt, e.type, e.message, e.retryable) == ("charge", 3, "ValueError", "boom", True)
    assert isinstance(e.__cause__, errors.Failure)
    assert e.__cause__.type == "OSError"
    failure = run.failure
    assert failure["type"] == "ActivityFailed"
    assert failure["cause"]["type"] == "ValueError"
    assert failure["cause"]["cause"]["type"] == "OSError"
    run.replayed()


def test_results_that_cannot_be_encoded_fail_the_run() -> None:
    async def wf() -> Any:
        return {"x": [object()]}

    failure = Run(wf).failure
    assert failure["type"] == "NotEncodable"
    assert "['x'][0]" in failure["message"]


def test_wrong_arguments_fail_the_run() -> None:
    assert Run(two_activities, 1, 2, 3).failure["type"] == "TypeError"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_no_failure_of_the_workflow(error: type[BaseException]) -> None:
    async def wf() -> None:
        raise error

    run = Run(wf, start=False)
    with pytest.raises(error):
        run.send(events.WORKFLOW_STARTED)
    run.execution.evict()


# --- cancelling ------------------------------------------------------------------------------------------
def test_cancel_runs_cleanup_durably() -> None:
    async def wf() -> None:
        try:
            await durable.sleep("1 day")
        finally:
            await echo.execute("cleanup")

    run = Run(wf)
    run.cancel()
    assert run.types == ["TimerCancelled", "ActivityScheduled"]
    run.complete(2)
    assert run.types == ["WorkflowCancelled"]
    run.replayed()


def test_a_second_cancel_is_delivered_after_a_swallowed_one() -> None:
    async def wf() -> str:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await durable.sleep("1 day")
        await durable.sleep("1 day")
        return "no"

    run = Run(wf)
    run.cancel()
    run.cancel()
    assert not run.execution.closed
    run.cancel()
    assert run.types == ["TimerCancelled", "WorkflowCancelled"]
    run.replayed()


def test_a_cancelled_error_of_ones_own_is_a_failure() -> None:
    async def wf() -> None:
        raise asyncio.CancelledError

    assert Run(wf).failure["type"] == "CancelledError"


def test_children() -> None:
    async def wf() -> Any:
        handle = ship.options(workflow_id="ship-1", parent_close="abandon").start("o")
        assert handle.workflow_id == "ship-1"
        assert len(handle.run_id) == 36
        outcomes = []
        for call in (handle, ship.execute("2"), ship.execute("3"), ship.execute("4")):
            try:
                outcomes.append(await call)
            except errors.ChildWorkflowFailed as e:
                outcomes.append(e.type)
            except errors.WorkflowAlreadyStarted as e:
                outcomes.append(type(e).__name__)
        return outcomes

    run = Run(wf)
    assert run.last[0].attributes()["options"] == {"parent_close": "abandon"}  # type: ignore[index]
    assert run.last[1].attributes()["workflow_id"] == "wf-1.2"  # type: ignore[index]
    run.send("ChildCompleted", 1, payload=b'"ok"')
    run.send("ChildCancelled", 2)
    run.send("ChildStartFailed", 3)
    run.send("ChildFailed", 4, attributes={"failure": {"type": "KeyError", "message": "x"}})
    assert run.result == ["ok", "WorkflowCancelled", "WorkflowAlreadyStarted", "KeyError"]
    run.replayed()


def test_a_childs_cancel_may_be_awaited() -> None:
    async def wf() -> Any:
        child = ship.start("o")
        await echo.execute()
        answer = await child.cancel()
        try:
            await child
        except asyncio.CancelledError:
            return [answer, await child.cancel()]

    run = Run(wf)
    run.complete(2)
    assert run.types == ["ChildCancelRequested"]
    run.send("ChildCancelled", 1)
    assert run.result == [True, False]
    run.replayed()


# --- what the run knows ----------------------------------------------------------------------------------
def test_clock_ids_and_random_numbers_are_the_same_on_replay() -> None:
    seen: list[Any] = []

    async def wf() -> Any:
        values = []
        for _ in range(3):
            values += [str(durable.now()), durable.random().random(), str(durable.uuid4())]
            values += [str(durable.uuid7()) for _ in range(5000)][::700]
            values += [durable.info().history_length, durable.info().history_bytes]
            await durable.sleep(1)
        ids = [v for v in values if isinstance(v, str) and len(v) == 36 and v[14] == "7"]
        assert ids == sorted(ids)
        seen.append((values, durable.is_replaying()))

    run = Run(wf).finish()
    run.replayed()
    (first, live), (second, replaying) = seen
    assert first == second
    assert (live, replaying) == (False, True)
    assert Run(wf, run_id="run-2").finish().execution.closed
    assert seen[2][0] != first


def test_the_clock_never_goes_back() -> None:
    async def wf() -> Any:
        before = durable.now()
        await echo.execute()
        return durable.now() == before

    run = Run(wf)
    run.send(events.ACTIVITY_COMPLETED, 1, after_ms=-5000)
    assert run.result is True


def test_logs_are_silent_on_replay_and_carry_ids(caplog: pytest.LogCaptureFixture) -> None:
    async def wf() -> None:
        durable.logger.warning("hello %s", "you")
        await echo.execute()

    with caplog.at_level(logging.INFO):
        run = Run(wf)
        run.replayed()
    (record,) = caplog.records
    assert (record.getMessage(), record.workflow_id, record.run_id) == ("hello you", "wf-1", "run-1")  # type: ignore[attr-defined]


def test_outside_a_workflow_everything_says_so() -> None:
    assert current() is None
    for call in (
        durable.now,
        durable.random,
        durable.uuid4,
        durable.uuid7,
        durable.info,
        durable.is_replaying,
        lambda: durable.sleep(1),
        lambda: durable.wait_for_signal("x"),
        lambda: durable.wait_condition(lambda: True),
        lambda: echo.execute(1),
        lambda: echo.start(1),
        lambda: ship.execute("x"),
    ):
        with pytest.raises(errors.NotInWorkflow, match="inside a workflow"):
            call()


def test_late_and_unknown_answers_change_nothing() -> None:
    async def wf() -> None:
        await durable.wait_for_signal("x")

    run = Run(wf)
    assert run.fire(99) == []
    assert run.complete(7) == []
    run.replayed()
    with pytest.raises(ValueError, match="no input"):
        run.execution.apply(Event(9, "TimerStarted", 0))


# --- eviction -----------------------------------------------------------------------------------------------
def test_eviction_is_inert_and_quiet(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    effects: list[str] = []

    async def stubborn() -> None:
        while True:
            try:
                await echo.execute("stubborn")
            except BaseException:
                await asyncio.sleep(1)

    async def helper() -> None:
        try:
            await echo.execute("helper")
        finally:
            effects.append("reached")
            ship.start("x")
            effects.append("child started")

    async def numbers() -> Any:
        try:
            yield 1
            await echo.execute("numbers")
        finally:
            await echo.execute("cleanup of the generator")

    async def wf() -> None:
        keep = numbers()
        async for _ in keep:
            break
        asyncio.create_task(helper())  # noqa: RUF006
        asyncio.create_task(stubborn())  # noqa: RUF006
        try:
            async with asyncio.TaskGroup() as group, asyncio.timeout(100):
                group.create_task(asyncio.sleep(100))
                await asyncio.gather(durable.wait_for_signal("x", timeout=5), echo.execute(1), helper())
        except GeneratorExit:
            effects.append("leaving")
            asyncio.create_task(helper())  # noqa: RUF006
            effects.append("task created")
        finally:
            await echo.execute("cleanup")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(wf)
        before = len(run.commands)
        assert not run.execution.closed
        run.execution.evict()
        run.execution.evict()
        with pytest.raises(RuntimeError, match="evicted"):
            run.signal("x")
        assert len(run.commands) == before
        run.execution = run.replayed()
        run.execution.evict()
        del run
        gc.collect()
    assert set(effects) == {"reached", "leaving"}
    assert caplog.records == []
    assert capsys.readouterr().err == ""


def test_closing_drops_background_tasks_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def wf() -> None:
        async def background() -> None:
            try:
                await durable.sleep(100)
            finally:
                await echo.execute("too late")

        asyncio.create_task(background())  # noqa: RUF006
        await echo.execute(1)

    run = Run(wf)
    run.complete(2 if run.last[0].event_type == "TimerStarted" else 1)
    assert run.types == ["WorkflowCompleted"]
    del run
    gc.collect()
    assert caplog.records == []


def test_ten_thousand_parked_runs_do_not_slow_each_other_down() -> None:
    # Tasks of all runs meet in asyncio's own sets: equal hashes there would make each start slower than the last.
    async def wf() -> None:
        await durable.wait_for_signal("x")

    def batch(start: int) -> float:
        before = time.process_time()
        runs.extend(Run(wf, run_id=f"run-{start + i}") for i in range(1000))
        return time.process_time() - before

    runs: list[Run] = []
    gc.disable()
    try:
        times = [batch(i * 1000) for i in range(10)]
    finally:
        gc.enable()
    assert min(times[7:]) < 5 * min(times[:3])
    for run in runs:
        run.execution.evict()


# --- random workflows ------------------------------------------------------------------------------------
programs = st.recursive(
    st.one_of(
        st.tuples(st.just("activity"), st.integers(0, 9)),
        st.tuples(st.just("sleep"), st.integers(0, 50)),
        st.tuples(st.just("child"), st.integers(0, 9)),
        st.tuples(st.just("signal"), st.integers(0, 2)),
        st.tuples(st.just("queue"), st.integers(1, 3)),
    ),
    lambda inner: st.one_of(
        st.tuples(
            st.sampled_from(["gather", "group", "seq", "race", "shield", "completed"]), st.lists(inner, max_size=4)
        ),
        st.tuples(st.just("timeout"), st.integers(0, 40), inner),
    ),
    max_leaves=12,
)


async def perform(program: Any, log: list[Any]) -> Any:
    kind, *rest = program
    if kind == "activity":
        log.append(await echo.execute(rest[0]))
    elif kind == "sleep":
        await asyncio.sleep(rest[0] / 10)
    elif kind == "child":
        log.append(await ship.execute(str(rest[0])))
    elif kind == "signal":
        log.append(await durable.wait_for_signal(str(rest[0]), timeout=60))
    elif kind == "queue":
        queue: asyncio.Queue[Any] = asyncio.Queue(1)
        putters = [asyncio.create_task(queue.put(await echo.execute(i))) for i in range(rest[0])]
        log.append([await queue.get() for _ in putters])
    elif kind == "timeout":
        try:
            async with asyncio.timeout(rest[0] / 10):
                await perform(rest[1], log)
        except TimeoutError:
            log.append("timeout")
    elif kind == "gather":
        await asyncio.gather(*(perform(p, log) for p in rest[0]), return_exceptions=True)
    elif kind == "group":
        async with asyncio.TaskGroup() as group:
            for p in rest[0]:
                group.create_task(perform(p, log))
    elif kind == "race" and rest[0]:
        tasks = {asyncio.create_task(perform(p, log)) for p in rest[0]}
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        log.append(len(done))
        await asyncio.gather(*done, *pending, return_exceptions=True)
    elif kind == "shield":
        await asyncio.gather(*(asyncio.shield(perform(p, log)) for p in rest[0]))
    elif kind == "completed":
        for future in asyncio.as_completed([perform(p, log) for p in rest[0]]):
            try:
                await future
            except Exception as e:
                log.append(type(e).__name__)
    else:
        for p in rest[0] if rest else []:
            await perform(p, log)


@settings(max_examples=300, deadline=None)
@given(program=programs, data=st.data())
def test_random_workflows_replay_to_the_same_commands(program: Any, data: st.DataObject) -> None:
    async def wf() -> Any:
        log: list[Any] = []
        try:
            await perform(program, log)
        except* Exception as group:
            log.append(len(group.exceptions))
        await echo.execute(log)
        return log

    run = Run(wf)
    for _ in range(200):
        if run.execution.closed:
            break
        pending = run.open_commands()
        choices = [*range(len(pending)), "signal"]
        if len(run.history) > 60:
            choices.append("cancel")
        choice = data.draw(st.sampled_from(choices))
        if choice == "cancel":
            run.cancel()
        elif choice == "signal":
            run.signal(str(data.draw(st.integers(0, 2))), 1)
        else:
            assert isinstance(choice, int)
            command = pending[choice]
            assert command.seq is not None
            if command.event_type == "TimerStarted":
                run.fire(command.seq)
            elif command.event_type == "ChildStarted":
                run.send(data.draw(st.sampled_from(["ChildCompleted", "ChildCancelled"])), command.seq, payload=b"1")
            elif data.draw(st.integers(0, 4)):
                run.complete(command.seq, 1)
            else:
                run.fail(command.seq)
        if data.draw(st.integers(0, 9)) == 0:  # dropped and brought back in the middle
            run.execution.evict()
            run.execution = run.replayed()
    replayed = run.replayed()
    assert (replayed.closed, replayed.last_event_id) == (run.execution.closed, run.execution.last_event_id)
    run.execution.evict()
    replayed.evict()
