"""Children and the life of a run, told by the page of the API alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("broker")
StartWorker = Callable[..., dramatiq.Worker]


def chain(e: BaseException | None) -> list[str]:
    found = []
    while e is not None:
        found.append(getattr(e, "type", type(e).__name__))
        e = e.__cause__
    return found


def test_a_child_s_failure_has_its_attributes(start_worker: StartWorker) -> None:
    @durable.activity(retry=durable.RetryPolicy(maximum_attempts=1))
    def breaks() -> None:
        raise KeyError("deep")

    @durable.workflow
    async def grandchild() -> None:
        await breaks.execute()

    @durable.workflow
    async def child() -> None:
        await grandchild.execute()

    seen: list[Any] = []

    @durable.workflow
    async def parent() -> None:
        try:
            await child.options(workflow_id="c-1").execute()
        except durable.ChildWorkflowFailed as e:
            seen[:] = [e.workflow_id, e.type, e.message, e.retryable, chain(e.__cause__)]
            raise

    start_worker()
    handle = parent.start()
    with pytest.raises(durable.WorkflowFailed) as failed:
        handle.result(timeout=15)
    assert seen[0] == "c-1"
    assert seen[1] == "ChildWorkflowFailed"
    assert seen[4][-1] == "KeyError"
    assert failed.value.type == "ChildWorkflowFailed"
    assert chain(failed.value)[-2:] == ["KeyError", "KeyError"] or chain(failed.value)[-1] == "KeyError"
    event = next(e for e in handle.history() if e.type == "ChildFailed")
    assert event.name == "child"
    (row,) = handle.children()
    assert row.workflow_id == "c-1"


def test_ends_of_children(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent() -> list[Any]:
        out: list[Any] = []
        for how in ("c-cancelled", "c-terminated"):
            try:
                await child.options(workflow_id=how).execute()
            except durable.DurableError as e:
                out.append([type(e).__name__, getattr(e, "type", None), chain(e.__cause__)])
            except asyncio.CancelledError:
                out.append(["CancelledError"])
        try:
            await child.options(run_timeout=0.3).execute()
        except durable.DurableError as e:
            out.append([type(e).__name__, getattr(e, "type", None), chain(e.__cause__)])
        return out

    start_worker()
    handle = parent.start()
    for how, end in (("c-cancelled", "cancel"), ("c-terminated", "terminate")):
        wait_until(lambda how=how: how in [c.workflow_id for c in handle.children()])
        getattr(durable.get_handle(how), end)()
    out = handle.result(timeout=15)
    assert [o[0] for o in out] == ["ChildWorkflowFailed"] * 3, out
    assert [o[1] for o in out] == ["WorkflowCancelled", "WorkflowTerminated", "WorkflowTimedOut"]
    types = [e.type for e in handle.history()]
    assert [t for t in types if t.startswith("Child") and t != "ChildStarted"] == [
        "ChildCancelled",
        "ChildTerminated",
        "ChildTimedOut",
    ]


def test_started_signal_and_cancel_of_a_child(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> Any:
        try:
            return await durable.wait_for_signal("n")
        except asyncio.CancelledError:
            await durable.sleep(0.01)
            return "cleaned"

    @durable.workflow
    async def parent() -> list[Any]:
        one = child.options(workflow_id="one").start()
        await one.started()
        await one.signal("n", {"x": 1})
        two = child.start()
        await two.started()
        await two.cancel()
        taken = child.options(workflow_id="taken").start()
        try:
            await taken.started()
        except durable.WorkflowAlreadyStarted:
            third = "taken"
        return [await one, await two, third, one.workflow_id]

    start_worker()
    other = child.options(workflow_id="taken").start()
    handle = parent.start()
    assert handle.result(timeout=15) == [{"x": 1}, "cleaned", "taken", "one"]
    assert "ChildStartFailed" in [e.type for e in handle.history()]
    other.terminate()


def test_awaiting_a_child_whose_id_is_taken(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("n")

    @durable.workflow
    async def parent() -> str:
        try:
            await child.options(workflow_id="taken").execute()
        except durable.WorkflowAlreadyStarted as e:
            return str(e)
        return "?"

    start_worker()
    other = child.options(workflow_id="taken").start()
    assert "taken" in parent.start().result(timeout=10)
    other.terminate()


@pytest.mark.parametrize(
    ("policy", "status"), [("terminate", "terminated"), ("cancel", "cancelled"), ("abandon", "running")]
)
@pytest.mark.parametrize("end", ["complete", "terminate", "continue"])
def test_close_policies(start_worker: StartWorker, policy: str, status: str, end: str) -> None:
    @durable.workflow
    async def child() -> None:
        await durable.wait_for_signal("never")

    @durable.workflow
    async def parent(again: bool) -> str:
        if again:
            return "again"
        handle = child.options(workflow_id="kid", parent_close=policy).start()
        await handle.started()
        await durable.wait_for_signal("end")
        if end == "continue":
            durable.continue_as_new(True)
        return "done"

    start_worker()
    handle = parent.start(False)
    wait_until(lambda: len(handle.children()) == 1)
    kid = durable.get_handle("kid")
    if end == "terminate":
        handle.terminate()
    else:
        handle.signal("end")
        handle.result(timeout=10)
    wait_until(lambda: kid.status() == status)
    if status == "running":
        kid.terminate()


def test_cancel_policies_of_children(start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> str:
        try:
            await durable.wait_for_signal("never")
        except asyncio.CancelledError:
            await durable.sleep(0.2)
            raise
        return "?"

    @durable.workflow
    async def parent() -> list[Any]:
        out: list[Any] = []
        for policy in ("wait", "try", "abandon"):
            c = child.options(cancellation=policy, workflow_id=policy, parent_close="abandon").start()
            await c.started()
            waiter = asyncio.create_task(_wait(c))
            await asyncio.sleep(0.01)
            waiter.cancel()
            began = durable.now()
            try:
                await waiter
            except asyncio.CancelledError:
                out.append([policy, durable.now() - began >= timedelta(seconds=0.2)])
            except durable.ChildWorkflowFailed as e:
                out.append([policy, e.type])
        return out

    async def _wait(c: Any) -> Any:
        return await c

    start_worker()
    try:
        out = parent.start().result(timeout=15)
    except durable.WorkflowFailed as e:
        # there is no such option for children: the page names it for activities and children
        raise AssertionError(str(e)) from e
    assert out == [["wait", True], ["try", False], ["abandon", False]]
    wait_until(lambda: durable.get_handle("try").status() == "cancelled")
    assert durable.get_handle("abandon").status() == "running"
    durable.get_handle("abandon").terminate()


def test_info_of_parents_and_children(start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="kids")
    async def child() -> list[Any]:
        info = durable.info()
        assert info.parent is not None
        return [info.parent.workflow_id, info.parent.run_id, info.name, info.queue_name, info.attempt, info.memo]

    @durable.workflow
    async def parent() -> list[Any]:
        info = durable.info()
        rest = [info.workflow_id, info.run_id, info.parent, info.history_length, info.continue_as_new_suggested]
        assert isinstance(info.started_at, datetime)
        assert info.started_at.tzinfo is not None
        assert info.history_bytes >= 0
        assert info.headers == {}
        return [await child.options(memo={"m": [1]}).execute(), rest]

    start_worker()
    handle = parent.options(workflow_id="p-1").start()
    (parent_id, parent_run, name, queue, attempt, memo), rest = handle.result(timeout=10)
    assert (parent_id, parent_run, name, queue, attempt, memo) == ("p-1", handle.run_id, "child", "kids", 1, {"m": [1]})
    assert rest[:3] == ["p-1", handle.run_id, None]
    assert rest[4] is False
    (kid,) = handle.children()
    assert kid.describe().parent.workflow_id == "p-1"


def test_ids_that_are_taken(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        if n == 0:
            await durable.wait_for_signal("end")
        return n

    start_worker()
    flow = flow.options(workflow_id="w")
    first = flow.start(0)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        flow.start(1)
    assert flow.options(id_conflict="use_existing").start(1).run_id == first.run_id
    second = flow.options(id_conflict="terminate_existing").start(0)
    assert second.run_id != first.run_id
    assert first.status() == "terminated"
    with pytest.raises(durable.WorkflowTerminated):
        first.result(timeout=5)
    second.signal("end")
    assert second.result(timeout=10) == 0
    with pytest.raises(durable.WorkflowAlreadyStarted):
        flow.options(id_reuse="reject").start(1)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        flow.options(id_reuse="allow_failed").start(1)
    third = flow.start(-1)
    with pytest.raises(durable.WorkflowFailed):
        third.result(timeout=10)
    assert flow.options(id_reuse="allow_failed").start(5).result(timeout=10) == 5
    with pytest.raises(durable.WorkflowAlreadyStarted):
        flow.options(id_reuse="allow_failed").start(6)
    # The handle of an id means its latest run; of a run, that run.
    assert durable.get_handle("w").result(timeout=5) == 5
    assert durable.get_handle("w", run_id=second.run_id).result(timeout=5) == 0


def test_continue_as_new_carries_and_sheds(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(n: int, seen: list[Any]) -> list[Any]:
        info = durable.info()
        seen.append([info.memo, info.search, info.history_length < 10])
        if n:
            await durable.upsert_search({"n": n})
            await durable.sleep(0.001)
            durable.continue_as_new(n - 1, seen)
        return seen

    start_worker()
    handle = flow.options(workflow_id="chain", memo={"m": 1}, search={"kind": "x"}).start(2, [])
    result = handle.result(timeout=15)
    assert result == [
        [{"m": 1}, {"kind": "x"}, True],
        [{"m": 1}, {"kind": "x", "n": 2}, True],
        [{"m": 1}, {"kind": "x", "n": 1}, True],
    ]
    assert handle.status() == "continued_as_new"
    assert [e.type for e in handle.history()][-1] == "WorkflowContinuedAsNew"
    latest = durable.get_handle("chain")
    assert latest.status() == "completed"
    assert latest.describe().run_id != handle.run_id
    assert latest.result(timeout=5) == result


def test_workflow_retry(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> int:
        attempt = durable.info().attempt
        if attempt < 3:
            raise ValueError(f"attempt {attempt}")
        return attempt

    @durable.workflow
    async def parent() -> int:
        return await flow.options(retry=durable.RetryPolicy(initial_interval=0.01)).execute()

    start_worker()
    policy = durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3)
    handle = flow.options(retry=policy).start()
    assert handle.result(timeout=15) == 3
    assert handle.status() == "failed"
    assert durable.get_handle(handle.workflow_id).status() == "completed"
    few = flow.options(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2)).start()
    with pytest.raises(durable.WorkflowFailed, match="attempt 2"):
        few.result(timeout=15)
    never = flow.options(retry=durable.RetryPolicy(non_retryable=("ValueError",))).start()
    with pytest.raises(durable.WorkflowFailed, match="attempt 1"):
        never.result(timeout=15)
    assert parent.start().result(timeout=15) == 3


def test_timeouts_of_runs(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        try:
            await durable.wait_for_signal("never")
        finally:
            pass

    start_worker()
    for option in ("run_timeout", "execution_timeout"):
        handle = flow.options(**{option: "0.3 s"}).start()
        with pytest.raises(durable.WorkflowTimedOut):
            handle.result(timeout=10)
        assert handle.status() == "timed_out"
        assert handle.history()[-1].type == "WorkflowTimedOut"


def test_terminate_says_why_and_cancels_what_runs(start_worker: StartWorker) -> None:
    running, told = threading.Event(), threading.Event()

    @durable.activity
    def work() -> None:
        running.set()
        try:
            while True:
                durable.heartbeat()
                time.sleep(0.01)
        except durable.ActivityCancelled:
            told.set()
            raise

    @durable.workflow
    async def flow() -> None:
        await work.execute()

    start_worker()
    handle = flow.start()
    assert running.wait(10)
    handle.terminate("no need")
    assert told.wait(10)
    assert handle.history()[-1].type == "WorkflowTerminated"
    assert "no need" in str(handle.history()[-1].attributes)
    with pytest.raises(durable.WorkflowTerminated, match="no need"):
        handle.result(timeout=5)
    with pytest.raises(durable.WorkflowClosed):
        handle.terminate()


def test_reset_to_an_event(start_worker: StartWorker) -> None:
    calls: list[int] = []

    @durable.activity
    def step(n: int) -> int:
        calls.append(n)
        return n

    @durable.workflow
    async def flow() -> list[Any]:
        out: list[Any] = [await step.execute(1)]
        out.append(await durable.wait_for_signal("s"))
        out.append(await step.execute(2))
        return out

    start_worker()
    handle = flow.options(workflow_id="r").start()
    handle.signal("s", "x")
    assert handle.result(timeout=10) == [1, "x", 2]
    event = next(e for e in handle.history() if e.type == "ActivityCompleted")
    again = handle.reset(event.event_id)
    assert again.run_id != handle.run_id
    assert again.result(timeout=10) == [1, "x", 2]
    assert calls == [1, 2, 2]
    assert again.workflow_id == "r"


def test_patches(start_worker: StartWorker, broker: durable.DurableBroker) -> None:
    def define(patched: bool) -> Any:
        @durable.workflow(name="flow")
        async def flow() -> list[str]:
            out = []
            if patched:
                out.append("new" if durable.patched("p") else "old")
                out.append("new" if durable.patched("p") else "old")
            await durable.wait_for_signal("go")
            if patched:
                out.append("new" if durable.patched("p") else "old")
            return out

        return flow

    @durable.activity
    def f() -> None: ...

    flow = define(True)
    start_worker()
    handle = flow.start()
    handle.signal("go")
    assert handle.result(timeout=10) == ["new"] * 3
    assert [e.type for e in handle.history()].count("PatchRecorded") == 1
    from dramatiq_durable.testing import Replayer

    Replayer([flow]).replay(handle.export())


def test_a_delayed_start(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        return durable.now().isoformat()

    start_worker()
    began = datetime.now(UTC)
    handle = flow.options(delay=500).start()
    other = flow.options(delay=timedelta(seconds=0.5)).start()
    assert handle.status() == "running"
    for h in (handle, other):
        assert datetime.fromisoformat(h.result(timeout=10)) >= began + timedelta(seconds=0.45)


def test_result_times_out_and_handles_differ(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        await durable.wait_for_signal("never")

    start_worker()
    handle = flow.start()
    with pytest.raises(durable.Timeout):
        handle.result(timeout=0.2)
    with pytest.raises(TimeoutError):
        asyncio.run(handle.aresult(timeout=0.2))
    for call in ("describe", "status", "history", "result", "cancel", "terminate", "export", "children"):
        with pytest.raises(durable.WorkflowNotFound):
            getattr(durable.get_handle("nobody"), call)()
    handle.terminate()


def test_what_a_workflow_may_raise(start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(kind: str) -> None:
        if kind == "timeout":
            raise TimeoutError("late")
        if kind == "cancelled":
            raise asyncio.CancelledError("own")
        if kind == "exit":
            raise SystemExit(3)
        if kind == "unprintable":

            class Odd(Exception):
                def __str__(self) -> str:
                    raise RuntimeError("no text")

            raise Odd
        assert kind == "?", "an assertion"

    start_worker()
    for kind, type in (("timeout", "TimeoutError"), ("assert", "AssertionError"), ("unprintable", "Odd")):
        handle = flow.start(kind)
        with pytest.raises(durable.WorkflowFailed) as failed:
            handle.result(timeout=10)
        assert failed.value.type == type
        assert handle.status() == "failed"


def test_what_is_described(start_worker: StartWorker) -> None:
    @durable.workflow(queue_name="q")
    async def flow(a: int, *, b: str = "x") -> dict[str, int]:
        await durable.entity().set("a.b", a)
        return {"a": a}

    start_worker()
    handle = flow.options(workflow_id="d", memo={"k": "v"}, search={"s": 1}).start(4, b="y")
    handle.result(timeout=10)
    d = handle.describe()
    assert (d.workflow_id, d.run_id, d.name, d.queue_name, d.status) == ("d", handle.run_id, "flow", "q", "completed")
    assert d.started_at.tzinfo is not None
    assert d.closed_at is not None
    assert d.closed_at >= d.started_at
    assert (d.parent, d.memo, d.search, d.entity) == (None, {"k": "v"}, {"s": 1}, {"a": {"b": 4}})
    assert (d.input, d.result, d.failure) == ({"args": [4], "kwargs": {"b": "y"}}, {"a": 4}, None)
    assert (d.history_length, d.pending, d.task_failure) == (len(handle.history()), [], None)


def test_a_saga_undoes_in_reverse(start_worker: StartWorker) -> None:
    log: list[str] = []

    @durable.activity(retry=durable.RetryPolicy(maximum_attempts=1))
    def do(what: str) -> None:
        if what == "car":
            raise RuntimeError("no car")
        log.append("do " + what)

    @durable.activity
    def undo(what: str) -> None:
        log.append("undo " + what)

    @durable.workflow
    async def trip() -> str:
        undos: list[str] = []
        try:
            for what in ("hotel", "flight", "car"):
                await do.execute(what)
                undos.append(what)
        except durable.ActivityFailed as e:
            for what in reversed(undos):
                await undo.execute(what)
            return f"undone: {e.message}"
        return "done"

    start_worker()
    assert trip.start().result(timeout=10) == "undone: no car"
    assert log == ["do hotel", "do flight", "undo flight", "undo hotel"]
