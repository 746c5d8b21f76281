"""Children: how they start, what their parent learns, and what becomes of them when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from test_engine_support import Run, ship

import dramatiq_durable as durable
from dramatiq_durable.workflow import events
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def exists(workflow_id: str) -> bool:
    try:
        durable.get_handle(workflow_id).describe()
    except durable.WorkflowNotFound:
        return False
    return True


# --- the engine alone ----------------------------------------------------------------------------------


def test_started_asks_and_is_answered() -> None:
    async def parent() -> list[Any]:
        child = ship.start("o")
        await child.started()
        known = child.run_id
        await child.started()  # known: nothing is asked again
        return [known, await child]

    run = Run(parent)
    assert run.types == [events.CHILD_STARTED, events.CHILD_START_AWAITED]
    run.send(events.CHILD_START_CONFIRMED, 2, attributes={"child": 1, "run_id": "the-run"})
    assert run.types == []
    run.send(events.CHILD_COMPLETED, 1, payload=b'"r"')
    assert run.result == ["the-run", "r"]
    run.replayed()


def test_started_raises_where_the_id_is_taken() -> None:
    async def parent() -> list[str]:
        child = ship.start("o")
        seen = []
        for _ in range(2):
            try:
                await child.started()
            except durable.WorkflowAlreadyStarted as e:
                seen.append(str(e))
        try:
            await child
        except durable.WorkflowAlreadyStarted as e:
            seen.append(str(e))
        return seen

    run = Run(parent)
    run.send(events.CHILD_START_FAILED, 1, attributes={"workflow_id": "wf-1.1"})
    assert len(set(run.result)) == 1
    assert len(run.result) == 3
    run.replayed()


def test_started_of_a_child_that_has_ended_and_its_cancel() -> None:
    async def parent() -> str:
        child = ship.start("o")
        asked = asyncio.create_task(child.started())
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        await child
        await child.started()
        return "cancelled" if asked.cancelled() else "done"

    run = Run(parent)
    run.send(events.CHILD_COMPLETED, 1)
    assert run.result == "cancelled"
    run.replayed()


@pytest.mark.parametrize(("policy", "commands", "ends"), [("try", 1, True), ("wait", 1, False), ("abandon", 0, True)])
def test_cancellation_of_a_child(policy: Any, commands: int, ends: bool) -> None:
    async def parent() -> None:
        await ship.options(cancellation=policy).execute("o")

    run = Run(parent)
    run.cancel()
    assert [t for t in run.types if t == events.CHILD_CANCEL_REQUESTED] == [events.CHILD_CANCEL_REQUESTED] * commands
    assert run.execution.closed is ends
    if not ends:
        run.send(events.CHILD_CANCELLED, 1)
        assert run.types == [events.WORKFLOW_CANCELLED]
    run.replayed()


# --- on a database -------------------------------------------------------------------------------------


def test_a_failure_crosses_with_its_causes(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity(max_retries=0)
    def broken() -> None:
        raise ValueError("root") from KeyError("deeper")

    @durable.workflow
    async def grandchild() -> None:
        await broken.execute()

    @durable.workflow
    async def child() -> None:
        await grandchild.execute()

    @durable.workflow
    async def parent() -> list[Any]:
        try:
            await child.execute()
        except durable.ChildWorkflowFailed as e:
            chain: list[Any] = []
            link: BaseException | None = e
            while isinstance(link, durable.Failure):
                chain.append(link.type)
                link = link.__cause__
            return [*chain, e.workflow_id]
        return []

    start_worker()
    handle = parent.options(workflow_id="p").start()
    assert handle.result(timeout=20) == ["ChildWorkflowFailed", "ActivityFailed", "ValueError", "KeyError", "p.1"]


@pytest.mark.parametrize("how", ["cancel", "terminate", "time"])
def test_other_ends_of_a_child(broker: durable.DurableBroker, start_worker: StartWorker, how: str) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent() -> str:
        try:
            await child.options(workflow_id="kid", run_timeout=0.3 if how == "time" else None).execute()
        except durable.ChildWorkflowFailed as e:
            return e.type
        return "no"

    start_worker()
    handle = parent.start()
    wait_until(lambda: handle.children())
    if how != "time":
        getattr(handle.children()[0], how)()
    expected = {"cancel": "WorkflowCancelled", "terminate": "WorkflowTerminated", "time": "WorkflowTimedOut"}
    assert handle.result(timeout=20) == expected[how]


def test_started_and_a_taken_id(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> str:
        return str(await durable.wait_for_signal("go"))

    @durable.workflow
    async def parent() -> Any:
        first = child.options(workflow_id="one").start()
        await first.started()
        second = child.options(workflow_id="one").start()
        try:
            await second.started()
        except durable.WorkflowAlreadyStarted:
            return [first.run_id, await first]
        return "no"

    start_worker()
    handle = parent.start()
    wait_until(lambda: "ChildStartFailed" in types(handle))
    kid = durable.get_handle("one")
    kid.signal("go", "went")
    assert handle.result(timeout=20) == [kid.describe().run_id, "went"]


def test_a_child_follows_the_run_that_is_there(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def shared(n: int) -> Any:
        if n == 0:
            durable.continue_as_new(1)
        return await durable.wait_for_signal("go")

    @durable.workflow
    async def parent() -> Any:
        child = shared.options(workflow_id="shared", id_conflict="use_existing").start(0)
        await child.started()
        return await child

    start_worker()
    runs = [parent.start() for _ in range(4)]
    for run in runs:
        wait_until(lambda run=run: "ChildStartConfirmed" in types(run))
    durable.get_handle("shared").signal("go", 42)
    assert [run.result(timeout=20) for run in runs] == [42] * 4


def test_id_conflict_and_id_reuse_of_children(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def child(fail: bool = False) -> str:
        if fail:
            raise ValueError("as asked")
        return str(await durable.wait_for_signal("go", timeout=60))

    @durable.workflow
    async def parent() -> list[str]:
        seen = []
        named = child.options(workflow_id="kid")
        first = named.start()
        second = named.options(id_conflict="terminate_existing").start(True)
        for handle in (first, second):
            try:
                await handle
            except durable.ChildWorkflowFailed as e:
                seen.append(e.type)
        for reuse in ("reject", "allow_failed"):
            third = named.options(id_reuse=reuse).start(True)
            try:
                await third
            except (durable.WorkflowAlreadyStarted, durable.ChildWorkflowFailed) as e:
                seen.append(type(e).__name__)
        return seen

    start_worker()
    assert parent.start().result(timeout=20) == [
        "WorkflowTerminated",
        "ValueError",
        "WorkflowAlreadyStarted",
        "ChildWorkflowFailed",
    ]


def _family(policy: Any) -> Any:
    @durable.workflow
    async def grandchild() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def child() -> None:
        await grandchild.options(workflow_id="grandchild", parent_close=policy).execute()

    @durable.workflow
    async def parent(how: str) -> None:
        child.options(workflow_id="child", parent_close=policy).start()
        if how == "failed":
            await durable.wait_for_signal("end")
            raise ValueError("as asked")
        await durable.wait_for_signal("end")

    return parent


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled", "terminated", "timed_out"])
@pytest.mark.parametrize(
    ("policy", "status"), [("terminate", "terminated"), ("cancel", "cancelled"), ("abandon", "running")]
)
def test_a_family_ends_as_its_policies_say(
    broker: durable.DurableBroker, start_worker: StartWorker, how: str, policy: str, status: str
) -> None:
    parent = _family(policy)
    start_worker()
    handle = parent.options(run_timeout="700ms" if how == "timed_out" else None).start(how)
    wait_until(lambda: exists("grandchild"))
    if how in ("completed", "failed"):
        handle.signal("end")
    elif how == "cancelled":
        handle.cancel()
    elif how == "terminated":
        handle.terminate()
    wait_until(lambda: handle.status() == how)
    for name in ("child", "grandchild"):
        wait_until(lambda name=name: durable.get_handle(name).status() == status)
