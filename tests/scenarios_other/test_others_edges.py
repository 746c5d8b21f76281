"""Edges and combinations that suites of other engines end with."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from dramatiq_durable.testing import Replayer
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


# --- errors ----------------------------------------------------------------------------------------------


def test_errors_of_local_activities_side_effects_and_the_like(broker: Any, start_worker: StartWorker) -> None:
    def bad(n: int) -> None:
        raise LookupError(f"local {n}")

    @durable.activity(max_retries=0)
    def act() -> None:
        raise OSError("act")

    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        try:
            await durable.local(bad, 1)
        except durable.ActivityFailed as e:
            seen.append(["local", e.activity, e.attempt, e.type, e.message, e.timeout])
        try:
            await act.options(local=True).execute()
        except durable.ActivityFailed as e:
            seen.append(["local=True", e.activity, e.attempt, e.type, e.message, e.timeout])
        try:
            await durable.side_effect(lambda: 1 // 0)
        except Exception as e:
            seen.append(["side_effect", type(e).__name__])
        try:
            await durable.wait_condition(lambda: 1 // 0 == 1)
        except ZeroDivisionError:
            seen.append("condition")
        return seen

    start_worker()
    handle = flow.start()
    result = handle.result(timeout=30)
    assert result[0] == ["local", "bad", 1, "LookupError", "local 1", None]
    assert result[1] == ["local=True", "act", 1, "OSError", "act", None]
    assert result[2][0] == "side_effect"
    assert result[3] == "condition"
    Replayer([flow]).replay(handle.export())


def test_a_chain_of_causes_over_three_runs(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity(max_retries=0)
    def act() -> None:
        try:
            raise KeyError("root")
        except KeyError as e:
            raise OSError("disk") from e

    @durable.workflow
    async def kid() -> None:
        await act.execute()

    @durable.workflow
    async def parent() -> None:
        await kid.options(workflow_id="kid").execute()

    start_worker()
    with pytest.raises(durable.WorkflowFailed) as caught:
        parent.start().result(timeout=20)
    chain: list[Any] = []
    error: Any = caught.value
    while error is not None:
        chain.append((type(error).__name__, error.type))
        error = error.__cause__
    assert chain[0] == ("WorkflowFailed", "ChildWorkflowFailed")
    assert [c[1] for c in chain][-2:] == ["OSError", "KeyError"]
    assert "ActivityFailed" in [c[1] for c in chain]
    found: Any = caught.value.__cause__
    assert found.type in ("ChildWorkflowFailed", "ActivityFailed")


def test_time_is_over_after_attempts_that_failed(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity(retry=durable.RetryPolicy(initial_interval=0.05, backoff_coefficient=1))
    def act() -> None:
        raise OSError("again")

    @durable.workflow
    async def flow() -> list[Any]:
        try:
            await act.options(schedule_to_close=0.4).execute()
        except durable.ActivityFailed as e:
            return [e.timeout, e.activity, e.attempt > 1, e.type, str(e.__cause__)]
        return []

    start_worker()
    timeout, activity, more, type_, cause = flow.start().result(timeout=20)
    assert (activity, more) == ("act", True)
    assert timeout == "schedule_to_close" or type_ == "OSError"
    assert "again" in cause or type_ == "OSError"


def test_values_that_cannot_be_carried(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def act(x: Any) -> Any:
        return x

    @durable.workflow
    async def returns_object() -> Any:
        return object()

    @durable.workflow
    async def passes_object() -> str:
        try:
            await act.execute(object())
        except durable.NotEncodable as e:
            return str(e)
        return "?"

    @durable.workflow
    async def waits() -> Any:
        return await durable.wait_for_signal("x")

    @durable.workflow
    async def takes(x: Any) -> None: ...

    start_worker()
    with pytest.raises(durable.WorkflowFailed) as caught:
        returns_object.start().result(timeout=20)
    assert caught.value.type == "NotEncodable"
    assert "object" in passes_object.start().result(timeout=20)
    handle = waits.start()
    with pytest.raises(durable.NotEncodable):
        handle.signal("x", object())
    with pytest.raises(durable.NotEncodable):
        takes.start(object())
    with pytest.raises(durable.NotEncodable):
        waits.options(memo={"x": object()}).start()
    handle.signal("x", "x" * 1_000_000)
    assert len(handle.result(timeout=20)) == 1_000_000


class Colour(Enum):
    RED = "red"


@dataclass
class Item:
    id: int
    colour: Colour
    at: datetime.datetime


def test_types_on_both_sides(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def paint(item: Item) -> Item:
        assert isinstance(item, Item)
        assert item.colour is Colour.RED
        return Item(item.id + 1, item.colour, item.at + datetime.timedelta(1))

    @durable.workflow
    async def flow(item: Item) -> Item:
        @durable.on_update("u")
        def u(other: Item) -> Item:
            assert isinstance(other, Item)
            return other

        @durable.on_query("q")
        def q() -> Item:
            return item

        @durable.on_signal("s")
        def s(other: Item) -> None:
            seen.append(other)

        seen: list[Item] = []
        await durable.wait_condition(lambda: bool(seen))
        assert isinstance(seen[0], Item)
        return await paint.execute(item)

    start_worker()
    at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    item = Item(1, Colour.RED, at)
    handle = flow.options(workflow_id="typed").start(item)
    updated = handle.update("u", item, timeout=20)
    queried = handle.query("q", timeout=20)
    handle.signal("s", item)
    result = handle.result(timeout=20)
    assert result == Item(2, Colour.RED, at + datetime.timedelta(1))
    assert updated in (item, {"id": 1, "colour": "red", "at": updated["at"] if isinstance(updated, dict) else None})
    assert queried in (item, {"id": 1, "colour": "red", "at": queried["at"] if isinstance(queried, dict) else None})


# --- state -----------------------------------------------------------------------------------------------


def test_entity_operations_that_do_not_fit(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        e = durable.entity()
        await e.set({"s": "text", "l": [1, 2], "n": 1})
        seen: list[Any] = []
        for operation in (
            lambda: e.append("s", 1),
            lambda: e.increment("s"),
            lambda: e.toggle("s"),
            lambda: e.increment("s.deep"),
            lambda: e.remove("l", 9),
            lambda: e.remove("s", 0),
            lambda: e.prepend("n", 1),
            lambda: e.increment("n", "x"),
        ):
            try:
                seen.append(["ok", await operation()])
            except Exception as error:
                seen.append([type(error).__name__])
        return [seen, await e.get()]

    start_worker()
    handle = flow.start()
    _seen, whole = handle.result(timeout=20)
    assert whole["s"] == "text"
    assert whole["n"] == 1
    assert handle.describe().entity == whole
    Replayer([flow]).replay(handle.export())


def test_filters_of_families_and_types(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> None:
        await durable.wait_for_signal("x")

    @durable.workflow
    async def parent() -> None:
        await durable.entity().set({"a": {"b": "x"}, "z": [1]})
        await asyncio.gather(*(kid.options(search={"k": k}).execute() for k in (1, "one", True, 1.5, None)))

    start_worker()
    handle = parent.options(workflow_id="it's").start()
    wait_until(lambda: durable.count_workflows("parent_id = 'it''s'") == 5)
    assert durable.count_workflows("parent_id != null") == 5
    assert durable.count_workflows("parent_id in ('it''s', 'x') and name = 'kid'") == 5
    assert durable.count_workflows("search.k = 1") == 1
    assert durable.count_workflows("search.k = 'one'") == 1
    assert durable.count_workflows("search.k = true") == 1
    assert durable.count_workflows("search.k > 1") == 1
    assert durable.count_workflows("search.k in (1, 'one', true, 7)") == 3
    assert durable.count_workflows("name LIKE 'k%' AND NOT (search.k = 1 OR search.k = 'one')") == 3
    assert durable.count_workflows("entity.a.b = 'x'") == 1
    assert durable.count_workflows(group_by="entity.a.b")["x"] == 1
    assert durable.count_workflows("name = 'kid'", group_by="search.k") is not None
    assert [k.status() for k in handle.children()] == ["running"] * 5
    for bad in ("nonsense", "search", "", "entity."):
        with pytest.raises(ValueError):
            durable.count_workflows(group_by=bad)
    for bad_order in ("nonsense", "", "- started_at"):
        with pytest.raises(ValueError):
            durable.list_workflows(order=bad_order)
    with pytest.raises(ValueError):
        durable.list_workflows(limit=0)
    with pytest.raises(ValueError):
        durable.list_workflows(after="nonsense")


# --- messages --------------------------------------------------------------------------------------------


def test_ids_are_known_in_the_next_run_of_a_chain(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow(total: int, runs: int) -> int:
        got = {"n": total}

        @durable.on_signal("add")
        def add(by: int) -> None:
            got["n"] += by

        @durable.on_update("plus")
        def plus(by: int) -> int:
            got["n"] += by
            return got["n"]

        await durable.wait_for_signal("next")
        if runs:
            durable.continue_as_new(got["n"], runs - 1)
        return got["n"]

    start_worker()
    handle = flow.options(workflow_id="w").start(0, 1)
    latest = durable.get_handle("w")
    latest.signal("add", 1, id="s")
    assert latest.update("plus", 10, update_id="u", timeout=20) == 11
    latest.signal("next")
    wait_until(lambda: durable.count_workflows("workflow_id = 'w'") == 2)
    latest.signal("add", 1, id="s2")
    assert latest.update("plus", 10, update_id="u2", timeout=20) == 22
    latest.signal("next")
    assert handle.result(timeout=20) == 22
    assert latest.get_update("u2").result(timeout=10) == 22


def test_two_waiters_of_one_name_take_turns(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        first = asyncio.ensure_future(durable.wait_for_signal("x"))
        second = asyncio.ensure_future(durable.wait_for_signal("x"))
        third = asyncio.ensure_future(durable.wait_for_signal("x"))
        await asyncio.sleep(0)
        second.cancel()
        got = await asyncio.gather(first, second, third, return_exceptions=True)
        return [str(g) if isinstance(g, BaseException) else g for g in got]

    start_worker()
    handle = flow.start()
    handle.signal("x", 1)
    handle.signal("x", 3)
    assert handle.result(timeout=20) == [1, "", 3]


def test_a_wait_that_was_cancelled_takes_no_signal(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[Any]:
        seen: list[Any] = []
        while len(seen) < 3:
            try:
                async with asyncio.timeout(0.05):
                    seen.append(await durable.wait_for_signal("x"))
            except TimeoutError:
                pass
        return seen

    start_worker()
    handle = flow.start()
    for n in range(3):
        handle.signal("x", n)
        time.sleep(0.06)
    assert handle.result(timeout=20) == [0, 1, 2]
    Replayer([flow]).replay(handle.export())


def test_an_update_that_nobody_answers_in_time(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> str:
        @durable.on_update("slow")
        async def slow() -> str:
            await durable.wait_for_signal("go")
            return "went"

        await durable.wait_for_signal("end")
        return "ended"

    handle = flow.start()
    with pytest.raises(durable.Timeout):
        handle.update("slow", update_id="u", timeout=0.2)
    start_worker()
    with pytest.raises(durable.Timeout):
        handle.update("slow", update_id="u", timeout=0.5)
    handle.signal("go")
    assert handle.get_update("u").result(timeout=20) == "went"
    unfinished = handle.update("slow", update_id="v", wait="accepted", timeout=20)
    handle.signal("end")
    assert handle.result(timeout=20) == "ended"
    with pytest.raises(durable.WorkflowClosed):
        unfinished.result(timeout=10)
    with pytest.raises(durable.DurableError):
        handle.get_update("nothing").result(timeout=1)


# --- cancels ---------------------------------------------------------------------------------------------


def test_a_cancel_waits_for_what_is_uncancellable(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> list[str]:
        seen: list[str] = []
        try:
            async with durable.uncancellable():
                await durable.wait_for_signal("inner")
                seen.append("inner")
                async with durable.uncancellable():
                    await durable.sleep(0.01)
            seen.append("after")
            await durable.sleep("1h")
        except asyncio.CancelledError:
            seen.append("cancelled")
        return seen

    start_worker()
    handle = flow.start()
    wait_until(lambda: len(handle.history()) >= 1 and handle.describe().stack)
    handle.cancel()
    wait_until(lambda: "CancelRequested" in types(handle))
    handle.signal("inner")
    result = handle.result(timeout=20)
    assert result in (["inner", "after", "cancelled"], ["inner", "cancelled"])
    Replayer([flow]).replay(handle.export())


def test_abandoned_activities_and_cancelled_children(broker: Any, start_worker: StartWorker) -> None:
    finished = threading.Event()
    begun = threading.Event()
    told = threading.Event()

    @durable.activity(max_retries=0)
    def long() -> None:
        begun.set()
        assert told.wait(30)
        durable.heartbeat()
        finished.set()

    @durable.workflow
    async def kid() -> str:
        try:
            await durable.sleep("1h")
        except asyncio.CancelledError:
            await durable.sleep(0.1)
            raise
        return "?"

    @durable.workflow
    async def flow(policy: str) -> str:
        if policy == "abandon":
            await durable.sleep(0)
            task = asyncio.ensure_future(long.options(cancellation="abandon").execute())
        else:
            child = kid.options(workflow_id="kid").start()
            await child.started()
            task = asyncio.ensure_future(child)  # type: ignore[arg-type]
        await durable.wait_for_signal("cancel")
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "?"

    start_worker()
    handle = flow.start("abandon")
    assert begun.wait(10)
    handle.signal("cancel")
    assert handle.result(timeout=20) == "cancelled"
    told.set()
    handle = flow.start("kid")
    wait_until(lambda: durable.count_workflows("workflow_id = 'kid'") == 1)
    handle.signal("cancel")
    assert handle.result(timeout=20) == "cancelled"
    assert durable.get_handle("kid").status() == "cancelled"


def test_a_cancelled_run_is_taken_up_again(broker: Any, start_worker: StartWorker) -> None:
    ran: list[str] = []

    @durable.activity
    def step(name: str) -> str:
        ran.append(name)
        return name

    @durable.workflow
    async def flow() -> list[str]:
        one = await step.execute("one")
        await durable.wait_for_signal("go")
        return [one, await step.execute("two")]

    start_worker()
    handle = flow.start()
    wait_until(lambda: "ActivityCompleted" in types(handle))
    handle.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        handle.result(timeout=20)
    completed = next(e for e in handle.history() if e.type == "ActivityCompleted")
    again = handle.reset(completed.event_id)
    again.signal("go")
    assert again.result(timeout=20) == ["one", "two"]
    assert ran == ["one", "two"]
    assert durable.get_handle(handle.workflow_id, run_id=handle.run_id).status() == "cancelled"


# --- limits and retries of runs --------------------------------------------------------------------------


def test_the_execution_timeout_is_of_the_whole_chain(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        await durable.sleep(0.1)
        durable.continue_as_new()

    start_worker()
    begun = time.monotonic()
    handle = flow.options(workflow_id="w", execution_timeout=1).start()
    with pytest.raises(durable.WorkflowTimedOut):
        handle.result(timeout=20)
    assert 0.9 < time.monotonic() - begun < 10
    assert durable.get_handle("w").status() == "timed_out"


def test_a_child_that_is_retried(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def kid() -> int:
        attempt = durable.info().attempt
        if attempt < 3:
            raise OSError(f"attempt {attempt}")
        return attempt

    @durable.workflow
    async def parent() -> int:
        return await kid.options(
            workflow_id="kid", retry=durable.RetryPolicy(initial_interval=0.02, maximum_attempts=5)
        ).execute()

    start_worker()
    handle = parent.start()
    assert handle.result(timeout=20) == 3
    assert types(handle).count("ChildCompleted") == 1
    assert "ChildFailed" not in types(handle)


# --- information -----------------------------------------------------------------------------------------


def test_what_runs_and_activities_know_of_themselves(broker: Any, start_worker: StartWorker) -> None:
    infos: list[Any] = []

    @durable.activity(queue_name="acts", max_retries=2, time_limit=5000)
    def act() -> None:
        infos.append(durable.activity_info())

    @dramatiq.actor
    def plain() -> None:
        infos.append(durable.activity_info())

    @durable.workflow(queue_name="flows", name="named")
    async def flow() -> dict[str, Any]:
        await act.options(start_to_close="10s", headers={"own": 1}).execute()
        info = durable.info()
        assert info.started_at is not None
        return {
            "workflow_id": info.workflow_id,
            "run_id": info.run_id,
            "name": info.name,
            "queue_name": info.queue_name,
            "attempt": info.attempt,
            "parent": info.parent is None,
            "memo": info.memo,
            "search": info.search,
            "headers": info.headers,
            "length": info.history_length > 0,
            "bytes": info.history_bytes > 0,
            "suggested": info.continue_as_new_suggested,
            "age": (durable.now() - info.started_at).total_seconds() >= 0,
            "replaying": durable.is_replaying(),
        }

    start_worker()
    handle = flow.options(workflow_id="w", memo={"m": 1}, search={"s": 1}, headers={"h": 1}).start()
    result = handle.result(timeout=20)
    assert result == {
        "workflow_id": "w",
        "run_id": handle.run_id,
        "name": "named",
        "queue_name": "flows",
        "attempt": 1,
        "parent": True,
        "memo": {"m": 1},
        "search": {"s": 1},
        "headers": {"h": 1},
        "length": True,
        "bytes": True,
        "suggested": False,
        "age": True,
        "replaying": False,
    }
    [info] = infos
    assert (info.workflow_id, info.run_id, info.activity, info.attempt) == ("w", handle.run_id, "act", 1)
    assert info.heartbeat_details is None
    assert info.headers["own"] == 1
    assert info.scheduled_at.tzinfo is not None
    assert info.deadline is None or info.deadline > info.scheduled_at
    assert info.is_last_attempt is False
    plain.send()
    wait_until(lambda: len(infos) == 2)
    assert infos[1] is None


def test_descriptions_of_live_runs(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def flow() -> None:
        await asyncio.gather(durable.wait_for_signal("here"), durable.sleep("1h"))

    start_worker()
    handle = flow.options(workflow_id="w").start()
    description = wait_until(lambda: (d := handle.describe()).stack and d)
    assert "wait_for_signal" in description.stack or "flow" in description.stack
    assert description.status == "running"
    assert description.closed_at is None
    assert description.result is None
    assert [p.kind for p in description.pending] == ["timer"]
    [listed] = durable.list_workflows("workflow_id = 'w'")
    assert (listed.status, listed.history_length) == ("running", description.history_length)


# --- escalations in odd places ---------------------------------------------------------------------------


def test_questions_in_handlers_children_and_under_a_timeout(
    broker: Any, start_worker: StartWorker, database_url: str
) -> None:
    @durable.workflow
    async def kid() -> Any:
        return await durable.escalate(role="kids", subject="k")

    @durable.workflow
    async def flow() -> list[Any]:
        @durable.on_update("ask")
        async def ask(what: str) -> Any:
            return await durable.escalate(role="handlers", subject=what)

        seen: list[Any] = []
        try:
            async with asyncio.timeout(0.1):
                await durable.escalate(role="late", subject="l")
        except TimeoutError:
            seen.append("late")
        try:
            await durable.escalate(role="late", subject="l2", timeout=datetime.timedelta(milliseconds=100))
        except durable.Timeout:
            seen.append("late too")
        seen.append(await kid.execute())
        await durable.wait_condition(durable.all_handlers_finished)
        return seen

    start_worker()
    handle = flow.start()
    update = handle.update("ask", "why", wait="accepted", timeout=20)
    [task] = wait_until(lambda: escalations.list(role="handlers"))
    [child] = wait_until(lambda: escalations.list(role="kids"), timeout=20)
    assert child.workflow == "kid"
    with psycopg.connect(database_url) as conn:
        with pytest.raises(ZeroDivisionError):
            _roll_back(conn, task.id)
        assert escalations.get(task.id).status == "waiting"
    escalations.resolve(task.id, "because")
    assert update.result(timeout=20) == "because"
    escalations.resolve(child.id, "kid's")
    assert handle.result(timeout=20) == ["late", "late too", "kid's"]
    stats = escalations.stats(role="late")
    assert (stats.waiting, stats.cancelled, stats.timed_out) == (0, 1, 1)
    with pytest.raises(durable.EscalationConflict) as caught:
        escalations.resolve(escalations.list(role="late", status="timed_out")[0].id, 1)
    assert caught.value.status == "timed_out"
    assert caught.value.claimed_by is None


def _roll_back(conn: Any, id: str) -> None:
    with conn.transaction(), durable.using(conn):
        1 / 0  # noqa: B018


def test_a_claim_outlives_nothing(broker: Any, start_worker: StartWorker) -> None:
    """The question's own time is over while somebody has claimed it."""

    @durable.workflow
    async def flow() -> str:
        try:
            await durable.escalate(role="r", subject="s", timeout=0.6)
        except durable.Timeout:
            return "timeout"
        return "?"

    start_worker()
    handle = flow.start()
    [task] = wait_until(lambda: escalations.list(role="r"))
    escalations.claim(task.id, by="ann", timeout="1h")
    assert handle.result(timeout=20) == "timeout"
    with pytest.raises(durable.EscalationConflict) as caught:
        escalations.resolve(task.id, 1, by="ann")
    assert caught.value.status == "timed_out"
    with pytest.raises(durable.EscalationConflict):
        escalations.release(task.id, by="ann")


@pytest.mark.parametrize("bad", [{"role": ""}, {"role": None}, {"role": 5}, {"priority": "high"}, {"timeout": -1}])
def test_bad_questions(broker: Any, start_worker: StartWorker, bad: dict[str, Any]) -> None:
    @durable.workflow
    async def flow() -> str:
        try:
            await durable.escalate(**{"role": "r", "subject": "s", **bad})
        except (ValueError, TypeError) as e:
            return type(e).__name__
        return "?"

    start_worker()
    assert flow.start().result(timeout=10) in ("ValueError", "TypeError", "InvalidName")


# --- dramatiq's own --------------------------------------------------------------------------------------


def test_runs_in_groups_and_pipelines(broker: Any, start_worker: StartWorker) -> None:
    got: list[Any] = []

    @dramatiq.actor
    def before(n: int) -> int:
        return n + 1

    @dramatiq.actor
    def tell(x: Any) -> None:
        got.append(x)

    @durable.workflow
    async def flow(n: int) -> int:
        return n * 2

    start_worker()
    assert flow.send(4).result(timeout=20) == 8
    dramatiq.pipeline([before.message(1), before.message(), tell.message()]).run()
    wait_until(lambda: got == [3])
    handles = [flow.send(n) for n in range(3)]
    assert [h.result(timeout=20) for h in handles] == [0, 2, 4]


def test_retried_subscribers_keep_the_order(broker: Any, start_worker: StartWorker) -> None:
    seen: list[int] = []
    failed: list[int] = []

    @dramatiq.actor(max_retries=5, min_backoff=10, max_backoff=20)
    def hear(payload: int) -> None:
        if payload == 2 and len(failed) < 2:
            failed.append(payload)
            raise OSError
        seen.append(payload)

    durable.subscribe("t")(hear)

    @durable.workflow
    async def flow() -> None:
        for n in range(5):
            await durable.emit("t", n)

    start_worker()
    flow.start().result(timeout=20)
    wait_until(lambda: len(seen) == 5)
    assert seen == list(range(5))
