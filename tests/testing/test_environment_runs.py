"""The environment for tests: messages, the life of runs, children, and what it checks."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment

pytestmark = pytest.mark.usefixtures("broker")


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [event.type for event in handle.history()]


# --- messages and life cycle ---------------------------------------------------------------------------------


def test_signals_wait_conditions_and_timeouts(env: Environment) -> None:
    @durable.workflow
    async def approval() -> list[Any]:
        seen: list[Any] = []
        for _ in range(3):
            try:
                seen.append(await durable.wait_for_signal("decision", timeout="3 days"))
            except durable.Timeout:
                seen.append("expired")
        return seen

    handle = env.start(approval)
    handle.signal("decision", 1, id="once")
    handle.signal("decision", 1, id="once")
    env.advance("4 days")
    handle.signal("decision", 2)
    assert handle.status() == "completed"
    assert handle.result() == [1, "expired", 2]
    with pytest.raises(durable.WorkflowClosed):
        handle.signal("decision", 3)


def test_signals_from_inside_of_an_activity(env: Environment) -> None:
    @durable.activity
    def tell() -> None:
        handle.signal("news", "from the activity")
        with pytest.raises(durable.DurableError, match="nothing can be waited for"):
            handle.result()

    @durable.workflow
    async def waits() -> Any:
        await durable.sleep(1)
        await tell.execute()
        return await durable.wait_for_signal("news")

    handle = env.start(waits)
    assert handle.result() == "from the activity"


def test_a_run_that_waits_for_nobody_says_for_what(env: Environment) -> None:
    @durable.workflow
    async def waits() -> None:
        await durable.wait_for_signal("never")

    handle = env.start(waits)
    with pytest.raises(durable.Timeout, match="nothing else is going to happen"):
        handle.result()
    handle.terminate("enough")
    assert handle.status() == "terminated"
    with pytest.raises(durable.WorkflowTerminated, match="enough"):
        handle.result()


def test_cancel_and_durable_cleanup(env: Environment) -> None:
    cleaned: list[str] = []

    @durable.activity
    def clean() -> None:
        cleaned.append("clean")

    @durable.workflow
    async def child() -> None:
        await durable.sleep("1 day")

    @durable.workflow
    async def parent() -> None:
        try:
            await child.options(workflow_id="kid").execute()
        finally:
            await durable.sleep(5)
            await clean.execute()

    handle = env.start(parent)
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result()
    assert cleaned == ["clean"]
    assert env.get_handle("kid").status() == "cancelled"
    with pytest.raises(durable.WorkflowNotFound):
        env.get_handle("nobody").status()


def test_children_their_failures_ids_and_close_policies(env: Environment) -> None:
    @durable.workflow
    async def child(n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        await durable.sleep(n)
        return n + 1

    @durable.workflow
    async def parent() -> list[Any]:
        results: list[Any] = list(await asyncio.gather(*[child.execute(n) for n in range(3)]))
        try:
            await child.execute(-1)
        except durable.ChildWorkflowFailed as e:
            results.append((e.type, e.message))
        for policy in ("terminate", "cancel", "abandon"):
            child.options(workflow_id=policy, parent_close=policy).start(10)
        try:
            await child.options(workflow_id="abandon").execute(1)
        except durable.WorkflowAlreadyStarted:
            results.append("taken")
        return results

    assert env.run(parent) == [1, 2, 3, ["ValueError", "negative"], "taken"]
    statuses = {name: env.get_handle(name).status() for name in ("terminate", "cancel", "abandon")}
    env.advance(0)
    statuses["cancel"] = env.get_handle("cancel").status()
    assert statuses == {"terminate": "terminated", "cancel": "cancelled", "abandon": "running"}
    assert env.get_handle("abandon").result() == 11


def test_ids_conflict_and_reuse(env: Environment) -> None:
    @durable.workflow
    async def forever(fail: bool = False) -> None:
        await durable.wait_for_signal("end")
        if fail:
            raise ValueError("as asked")

    named = forever.options(workflow_id="one")
    first = env.start(named)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        env.start(named)
    assert env.start(named.options(id_conflict="use_existing")).run_id == first.run_id
    second = env.start(named.options(id_conflict="terminate_existing"), True)
    assert first.status() == "terminated"
    second.signal("end")
    with pytest.raises(durable.WorkflowAlreadyStarted):
        env.start(named.options(id_reuse="reject"))
    third = env.start(named.options(id_reuse="allow_failed"))
    third.signal("end")
    with pytest.raises(durable.WorkflowAlreadyStarted):
        env.start(named.options(id_reuse="allow_failed"))


def test_what_a_run_knows_and_what_is_described(env: Environment) -> None:
    @durable.workflow(queue_name="orders")
    async def knows(n: int) -> Any:
        info = durable.info()
        return info.workflow_id, info.name, info.queue_name, info.memo

    handle = env.start(knows.options(workflow_id="w-1", memo={"for": "people"}), 1)
    assert handle.result() == ["w-1", "knows", "orders", {"for": "people"}]
    described = handle.describe()
    assert (described.workflow_id, described.status, described.memo) == ("w-1", "completed", {"for": "people"})
    assert described.history_length == len(handle.history()) == 2
    assert described.closed_at == env.now()


def test_random_numbers_are_the_same_in_each_run_of_the_test() -> None:
    @durable.workflow
    async def draws() -> list[Any]:
        return [durable.random().random(), str(durable.uuid4())]

    def once() -> Any:
        with Environment() as env:
            return env.run(draws)

    assert once() == once()


def test_side_effects_local_functions_and_patches(env: Environment) -> None:
    calls: list[int] = []

    @durable.workflow
    async def mixed() -> Any:
        drawn = await durable.side_effect(lambda: len(calls))
        looked = await durable.local(lambda n: calls.append(n) or n + 1, 41)
        return drawn, looked, durable.patched("new")

    handle = env.start(mixed)
    assert handle.result() == [0, 42, True]
    assert calls == [41]
    assert types(handle) == [
        "WorkflowStarted",
        "SideEffectRecorded",
        "LocalActivityCompleted",
        "PatchRecorded",
        "WorkflowCompleted",
    ]


def test_the_awaited_twins(env: Environment) -> None:
    @durable.workflow
    async def waits() -> Any:
        return await durable.wait_for_signal("go")

    async def main() -> Any:
        handle = env.start(waits)
        await handle.asignal("go", 5)
        return await handle.aresult(), await handle.astatus()

    assert asyncio.run(main()) == (5, "completed")


# --- what is checked -----------------------------------------------------------------------------------------


def test_code_that_cannot_be_replayed_is_found(env: Environment) -> None:
    number = iter(range(100))

    @durable.activity
    def echo(n: int) -> int:
        return n

    @durable.workflow
    async def impure() -> int:
        return await echo.execute(next(number))

    with pytest.raises(durable.Nondeterminism, match="ActivityScheduled 'echo'") as error:
        env.run(impure)
    assert error.value.event_id == 2
    with Environment(replay=False) as careless:
        assert careless.run(impure) == 2


def test_open_runs_are_replayed_at_the_end() -> None:
    number = iter(range(100))

    @durable.workflow
    async def impure() -> None:
        if next(number) == 0:
            durable.patched("x")
        await durable.wait_for_signal("never")

    env = Environment()
    env.start(impure)
    with pytest.raises(durable.Nondeterminism):
        env.close()


def test_nothing_is_left_of_an_environment() -> None:
    @durable.activity
    def sleepy() -> None:
        time.sleep(3600)

    @durable.workflow
    async def naps() -> None:
        await sleepy.execute()

    with Environment() as env:
        handle = env.start(naps)
        assert handle.status() == "running"
        assert [t for t in threading.enumerate() if t.name == "durable-activity"]
    assert not [t for t in threading.enumerate() if t.name == "durable-activity"]


# --- life cycle ------------------------------------------------------------------------------------------------


def test_continue_as_new_takes_unread_signals_along(env: Environment) -> None:
    @durable.workflow
    async def counts(n: int) -> Any:
        first = await durable.wait_for_signal("go")
        if n < 3:
            await durable.sleep("1 day")
            durable.continue_as_new(n + 1)
        return n, first

    handle = env.start(counts.options(workflow_id="chain", memo={"kept": True}), 1)
    for value in "abc":
        handle.signal("go", value)
    assert handle.result() == [3, "c"]
    assert handle.status() == "continued_as_new"
    latest = env.get_handle("chain")
    assert latest.status() == "completed"
    assert latest.describe().memo == {"kept": True}
    assert latest.run_id is None


def test_timeouts_and_retries_of_workflows(env: Environment) -> None:
    @durable.workflow
    async def flaky() -> Any:
        attempt = durable.info().attempt
        if attempt == 1:
            raise ConnectionError("busy")
        if attempt == 2:
            await durable.sleep("1 hour")
        return attempt

    began = env.now()
    policy = durable.RetryPolicy(initial_interval=10, maximum_attempts=3)
    assert env.run(flaky.options(retry=policy, run_timeout=60)) == 3
    assert (env.now() - began).total_seconds() == 10 + 60 + 20
    with pytest.raises(durable.WorkflowFailed, match="busy"):
        env.run(flaky)
    with pytest.raises(durable.WorkflowTimedOut, match="execution_timeout"):
        env.run(flaky.options(retry=policy, execution_timeout=60))


def test_children_that_are_awaited_followed_and_go_on(env: Environment) -> None:
    @durable.workflow
    async def child(n: int) -> int:
        await durable.sleep(10)
        if n:
            durable.continue_as_new(n - 1)
        return 7

    @durable.workflow
    async def parent() -> list[Any]:
        handle = child.options(workflow_id="kid").start(2)
        await handle.started()
        same = child.options(workflow_id="kid", id_conflict="use_existing").start(5)
        taken = child.options(workflow_id="kid").start(5)
        with pytest.raises(durable.WorkflowAlreadyStarted):
            await taken.started()
        return [await handle, await same]

    handle = env.start(parent)
    assert handle.result() == [7, 7]
    assert {c.workflow_id for c in handle.children()} == {"kid"}
    assert handle.children()[0].result() == 7


def test_a_cancel_does_not_wait_for_a_delayed_start(env: Environment) -> None:
    @durable.workflow
    async def later() -> None:
        await durable.sleep(1)

    began = env.now()
    handle = env.start(later.options(delay=3_600_000))
    handle.cancel()
    assert handle.status() == "cancelled"
    assert env.now() == began


def test_escalations(env: Environment) -> None:
    @durable.workflow
    async def asks() -> list[Any]:
        seen: list[Any] = [await durable.escalate(role="clerk", subject="o-1", payload={"cents": 5})]
        for kind in ("cancelled", "expired"):
            try:
                await durable.escalate(role="clerk", subject=kind, timeout="3 days")
            except (durable.Timeout, durable.EscalationCancelled) as e:
                seen.append(type(e).__name__)
        await durable.escalate(role="nobody")
        return seen

    handle = env.start(asks)
    (waiting,) = env.escalations.list(role="clerk", status="waiting")
    assert (waiting.subject, waiting.payload, waiting.workflow) == ("o-1", {"cents": 5}, "asks")
    resolved = env.escalations.resolve(waiting.id, {"ok": True}, by="Kim")
    assert (resolved.status, resolved.resolved_by, resolved.result) == ("resolved", "Kim", {"ok": True})
    with pytest.raises(durable.EscalationConflict) as conflict:
        env.escalations.cancel(waiting.id)
    assert conflict.value.status == "resolved"
    with pytest.raises(durable.EscalationNotFound):
        env.escalations.resolve("nothing")
    env.escalations.cancel(env.escalations.list(subject="cancelled")[0].id)
    env.advance("4 days")
    assert env.escalations.list(subject="expired")[0].status == "timed_out"
    handle.cancel()
    assert env.escalations.list(role="nobody")[0].status == "cancelled"
    assert handle.status() == "cancelled"


def test_what_an_escalation_is_answered_with(env: Environment) -> None:
    @durable.workflow
    async def asks() -> Any:
        return await durable.escalate(role="clerk")

    handle = env.start(asks)
    env.escalations.resolve(env.escalations.list()[0].id, [1, 2])
    assert handle.result() == [1, 2]


@pytest.mark.parametrize("how", ["continue", "retry", "run_timeout"])
def test_what_no_code_has_read_is_given_to_the_run_that_follows(env: Environment, how: str) -> None:
    @durable.workflow
    async def work(rounds: int = 0) -> list[Any]:
        seen: list[Any] = []
        if how != "run_timeout":
            durable.on_signal("n")(seen.append)
        await durable.wait_for_signal("go")
        if rounds == 0 and how == "continue":
            durable.continue_as_new(1)
        if rounds + durable.info().attempt == 1:
            if how == "retry":
                raise ValueError("again")
            await durable.wait_for_signal("never")
        if how == "run_timeout":
            return [await durable.wait_for_signal("n"), await durable.wait_for_signal("n")]
        await durable.wait_condition(lambda: len(seen) == 2)
        return seen

    handle = env.start(work.options(delay=1000, run_timeout=60, retry=durable.RetryPolicy(maximum_attempts=2)))
    for name, value in (("go", 0), ("n", 1), ("n", 2), ("go", 3)):
        handle.signal(name, value)
    assert handle.result() == [1, 2]
