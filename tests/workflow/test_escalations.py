"""Human steps on a real database and a real worker: one winner in every race, and a clear answer for the other."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def declare(broker: durable.DurableBroker) -> durable.Workflow[Any, Any]:
    """A workflow that asks whatever it is told to ask."""

    @durable.workflow(queue_name="desk", broker=broker)
    async def ask(facts: dict[str, Any]) -> Any:
        try:
            return await durable.escalate(**facts)
        except durable.Timeout:
            return "timed out"
        except durable.EscalationCancelled:
            return "cancelled"

    return ask


@pytest.fixture
def ask(broker: durable.DurableBroker) -> durable.Workflow[Any, Any]:
    return declare(broker)


def opened(handle: durable.WorkflowHandle[Any]) -> escalations.Escalation:
    """The first escalation of a run, once it is there."""
    return wait_until(lambda: escalations.list(run_id=handle.run_id))[0]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def test_claim_and_resolve(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.options(workflow_id="o-1").start(
        {"role": "clerk", "subject": "o-1", "payload": {"cents": 5}, "type": "approval", "priority": 2,
         "metadata": {"region": "eu"}, "timeout": "1 day"}
    )  # fmt: skip
    found = opened(handle)
    assert (found.workflow_id, found.run_id, found.workflow) == ("o-1", handle.run_id, "ask")
    assert (found.role, found.subject, found.type, found.priority) == ("clerk", "o-1", "approval", 2)
    assert (found.payload, found.metadata, found.status) == ({"cents": 5}, {"region": "eu"}, "waiting")
    assert found.times_out_at is not None
    assert 86_000 < (found.times_out_at - found.opened_at).total_seconds() < 86_500
    assert found == escalations.get(found.id)
    claimed = escalations.claim(found.id, by="ann", timeout=60)
    assert (claimed.status, claimed.claimed_by) == ("claimed", "ann")
    assert escalations.stats("clerk") == escalations.Stats(0, 1, 0, 0, 0)
    done = escalations.resolve(found.id, {"ok": True}, by="ann")
    assert (done.status, done.resolved_by, done.result, done.claimed_by) == ("resolved", "ann", {"ok": True}, None)
    assert handle.result(timeout=10) == {"ok": True}
    assert types(handle) == ["WorkflowStarted", "EscalationOpened", "EscalationResolved", "WorkflowCompleted"]
    resolved = handle.history()[2]
    assert resolved.attributes["by"] == "ann"
    assert resolved.attributes["result"] == {"ok": True}
    assert handle.history()[1].attributes["payload"] == {"cents": 5}
    assert escalations.stats() == escalations.Stats(0, 0, 1, 0, 0)


def test_what_would_have_timed_it_out_is_gone_with_it(
    ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str
) -> None:
    start_worker()
    for act in (escalations.resolve, escalations.cancel):
        handle = ask.start({"role": "clerk", "timeout": "30 days"})
        act(opened(handle).id)
        handle.result(timeout=10)
    handle = ask.start({"role": "clerk", "timeout": "30 days"})
    opened(handle)
    handle.terminate()
    with psycopg.connect(database_url) as conn:
        wait_until(lambda: not conn.execute("SELECT FROM durable.message").fetchall())


def test_it_times_out(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.start({"role": "clerk", "timeout": 0.2})
    found = opened(handle)
    assert handle.result(timeout=10) == "timed out"
    assert types(handle) == ["WorkflowStarted", "EscalationOpened", "EscalationTimedOut", "WorkflowCompleted"]
    for act in (escalations.resolve, escalations.cancel):
        with pytest.raises(durable.EscalationConflict, match="timed out already") as e:
            act(found.id)
        assert (e.value.status, e.value.claimed_by) == ("timed_out", None)
    assert escalations.stats("clerk").timed_out == 1


def test_a_claim_does_not_stop_the_time(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.start({"role": "clerk", "timeout": 0.4})
    escalations.claim(opened(handle).id, by="ann")
    assert handle.result(timeout=10) == "timed out"
    assert opened(handle).claimed_by is None


def test_it_is_cancelled_from_outside(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.start({"role": "clerk"})
    found = opened(handle)
    escalations.claim(found.id, by="ann")
    assert escalations.cancel(found.id).status == "cancelled"
    assert handle.result(timeout=10) == "cancelled"
    assert types(handle)[2] == "EscalationCancelled"
    for act in (
        lambda: escalations.resolve(found.id, 1, by="ann"),
        lambda: escalations.claim(found.id, by="bob"),
        lambda: escalations.release(found.id, by="ann"),
        lambda: escalations.cancel(found.id),
        lambda: escalations.reassign(found.id, role="boss"),
    ):
        with pytest.raises(durable.EscalationConflict, match="is cancelled already") as e:
            act()
        assert e.value.status == "cancelled"


def test_cancelling_what_awaits_it_cancels_it(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def hurry() -> str:
        task = asyncio.create_task(durable.escalate(role="clerk", timeout="1 day"))  # type: ignore[arg-type]
        await durable.wait_for_signal("enough")
        task.cancel()
        await durable.wait_for_signal("end")
        return "done"

    start_worker()
    handle = hurry.start()
    found = opened(handle)
    handle.signal("enough")
    wait_until(lambda: escalations.get(found.id).status == "cancelled")
    assert types(handle)[-1] == "EscalationCancelled"
    with pytest.raises(durable.EscalationConflict):
        escalations.resolve(found.id)
    handle.signal("end")
    assert handle.result(timeout=10) == "done"


@pytest.mark.parametrize("end", ["cancel", "terminate", "complete"])
def test_a_run_that_ends_cancels_what_it_has_open(
    broker: durable.DurableBroker, start_worker: StartWorker, end: str
) -> None:
    @durable.workflow
    async def two() -> None:
        tasks = [asyncio.create_task(durable.escalate(role="clerk")) for _ in range(2)]  # type: ignore[arg-type]
        await durable.wait_for_signal("complete")
        assert tasks

    start_worker()
    handle = two.start()
    wait_until(lambda: escalations.stats("clerk").waiting == 2)
    (handle.signal("complete") if end == "complete" else getattr(handle, end)())
    wait_until(lambda: handle.status() != "running")
    assert escalations.stats("clerk") == escalations.Stats(0, 0, 0, 2, 0)


def test_a_child_that_ends_with_its_parent(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    child = declare(broker)

    @durable.workflow
    async def parent() -> None:
        await child.execute({"role": "clerk"})

    start_worker()
    handle = parent.start()
    wait_until(lambda: escalations.list(role="clerk"))
    handle.terminate()
    assert escalations.stats("clerk").cancelled == 1


# --- claims -----------------------------------------------------------------------------------------------------


def test_only_the_holder_resolves(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.start({"role": "clerk"})
    id = opened(handle).id
    escalations.claim(id, by="ann")
    for by in ("bob", None):
        with pytest.raises(durable.EscalationConflict, match="claimed by 'ann'") as e:
            escalations.resolve(id, 1, by=by)
        assert (e.value.status, e.value.claimed_by) == ("claimed", "ann")
    with pytest.raises(durable.EscalationConflict):
        escalations.claim(id, by="bob")
    with pytest.raises(durable.EscalationConflict):
        escalations.release(id, by="bob")
    # Its holder may claim it again: for longer, or for ever.
    assert escalations.claim(id, by="ann", timeout=60).claimed_until is not None
    assert escalations.claim(id, by="ann").claimed_until is None
    assert escalations.release(id, by="ann").status == "waiting"
    with pytest.raises(durable.EscalationConflict, match="nobody") as e:
        escalations.release(id, by="ann")
    assert (e.value.status, e.value.claimed_by) == ("waiting", None)
    assert escalations.claim(id, by="bob").claimed_by == "bob"
    assert escalations.resolve(id, None, "bob").result is None
    assert handle.result(timeout=10) is None


def test_a_claim_that_ran_out_is_none(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    worker = start_worker()
    handle = ask.start({"role": "clerk"})
    id = opened(handle).id
    worker.stop()  # Nothing sweeps.
    escalations.claim(id, by="ann", timeout=0.2)
    wait_until(lambda: escalations.get(id).status == "waiting")
    assert escalations.get(id).claimed_by is None
    assert [e.id for e in escalations.list(status="waiting")] == [id]
    assert escalations.list(status="claimed") == []
    with pytest.raises(durable.EscalationConflict) as e:
        escalations.release(id, by="ann")
    assert e.value.status == "waiting"
    assert escalations.claim(id, by="bob", timeout=0.2).claimed_by == "bob"
    wait_until(lambda: escalations.get(id).status == "waiting")
    assert escalations.resolve(id, 1).resolved_by is None


def test_reassign(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.start({"role": "clerk"})
    id = opened(handle).id
    escalations.claim(id, by="ann")
    moved = escalations.reassign(id, role="boss")
    assert (moved.role, moved.status) == ("boss", "waiting")
    assert escalations.claim_next(role="clerk", by="ann") is None
    assert escalations.stats("clerk") == escalations.Stats(0, 0, 0, 0, 0)
    assert escalations.stats("boss").waiting == 1
    escalations.resolve(id, "yes")
    assert handle.result(timeout=10) == "yes"


def test_filters_and_order(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    for subject, role, priority in (("a", "x", 5), ("b", "x", 1), ("c", "y", 0), ("d", "x", 1)):
        ask.start({"role": role, "subject": subject, "priority": priority, "metadata": {"s": subject, "n": 1}})
        wait_until(lambda s=subject: escalations.list(subject=s))

    def subjects(**facts: Any) -> str:
        return "".join(e.subject or "" for e in escalations.list(**facts))

    assert subjects() == "cbda"
    assert subjects(role="x") == "bda"
    assert subjects(role="x", limit=2) == "bd"
    assert subjects(subject="c") == "c"
    pages, last = "", None
    while page := escalations.list(limit=2, after=last):
        pages, last = pages + "".join(e.subject or "" for e in page), page[-1].id
    assert pages == "cbda"
    assert subjects(role="x", after=escalations.list(subject="b")[0].id) == "da"
    assert subjects(metadata={"s": "a"}) == "a"
    assert subjects(metadata={"n": 1}) == "cbda"
    assert subjects(type="t") == ""
    assert subjects(status="waiting") == "cbda"
    for claimed in "bda":
        found = escalations.claim_next(role="x", by="ann", timeout=60)
        assert found is not None
        assert found.subject == claimed
    assert escalations.claim_next(role="x", by="ann") is None
    assert subjects(status="claimed") == "bda"
    assert subjects(status="waiting") == "c"
    assert escalations.claim_next(role="y", by="ann", metadata={"s": "a"}) is None
    assert escalations.claim_next(role="y", by="ann", metadata={"s": "c"}) is not None
    assert escalations.stats() == escalations.Stats(0, 4, 0, 0, 0)


def test_bad_input(broker: durable.DurableBroker) -> None:
    unknown = str(uuid.uuid4())
    for call in (
        lambda: escalations.get(unknown),
        lambda: escalations.get("no uuid"),
        lambda: escalations.list(after=unknown),
        lambda: escalations.list(after="no uuid"),
        lambda: escalations.claim(unknown, by="ann"),
        lambda: escalations.resolve(unknown),
        lambda: escalations.cancel(unknown),
        lambda: escalations.release(unknown, by="ann"),
        lambda: escalations.reassign(unknown, role="r"),
    ):
        with pytest.raises(durable.EscalationNotFound):
            call()
    for wrong in (
        lambda: escalations.list(status="open"),  # type: ignore[arg-type]
        lambda: escalations.list(limit=0),
        lambda: escalations.list(role=""),
        lambda: escalations.claim(unknown, by=""),
        lambda: escalations.claim(unknown, by="ann", timeout="soon"),
        lambda: escalations.reassign(unknown, role="\0"),
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(durable.NotEncodable):
        escalations.resolve(unknown, object())


def test_not_inside_a_workflow(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def inside() -> str:
        try:
            escalations.list()
        except durable.ForbiddenInWorkflow:
            return "forbidden"
        return "allowed"

    start_worker()
    assert inside.start().result(timeout=10) == "forbidden"


def test_async_twins(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    handle = ask.start({"role": "clerk"})
    id = opened(handle).id

    async def client() -> str:
        assert (await escalations.aget(id)).status == "waiting"
        claimed = await escalations.aclaim_next(role="clerk", by="ann")
        assert claimed is not None
        await escalations.arelease(id, by="ann")
        await escalations.aclaim(id, by="bob")
        await escalations.areassign(id, role="boss")
        assert (await escalations.astats()).waiting == 1
        assert len(await escalations.alist(role="boss")) == 1
        await escalations.aresolve(id, "yes")
        with pytest.raises(durable.EscalationConflict):
            await escalations.acancel(id)
        return str(await handle.aresult(timeout=10))

    assert asyncio.run(client()) == "yes"


# --- transactions of the caller's own -----------------------------------------------------------------------------


def test_using(ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str) -> None:
    start_worker()
    handle = ask.start({"role": "clerk"})
    id = opened(handle).id
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            claimed = escalations.claim_next(role="clerk", by="ann", timeout=60)
            assert claimed is not None
            assert claimed.claimed_by == "ann"
            assert escalations.claim_next(role="clerk", by="ann") is None
            assert escalations.resolve(id, {"a": [1]}, by="ann").result == {"a": [1]}
            with pytest.raises(durable.EscalationConflict):
                escalations.cancel(id)
        assert escalations.get(id).status == "waiting"
        conn.rollback()
        assert escalations.get(id).status == "waiting"
        with durable.using(conn):
            escalations.resolve(id, "yes")
        conn.commit()
    assert handle.result(timeout=10) == "yes"


def test_using_a_connection_that_is_awaited(
    ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str
) -> None:
    start_worker()
    id = opened(ask.start({"role": "clerk"})).id

    async def client() -> None:
        conn = await psycopg.AsyncConnection.connect(database_url)
        async with conn, durable.using(conn):
            with pytest.raises(durable.DurableError, match="connection that blocks"):
                await escalations.aresolve(id)

    asyncio.run(client())
    assert escalations.get(id).status == "waiting"


def test_from_sql(ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str) -> None:
    start_worker()
    handle = ask.start({"role": "clerk"})
    id = opened(handle).id
    escalations.claim(id, by="ann")
    with psycopg.connect(database_url, autocommit=True) as conn:
        for arguments, state, message in (
            (f"'{id}', '1', 'bob'", "DD007", "claimed by 'ann'"),
            (f"'{id}'", "DD007", "claimed by 'ann'"),
            (f"'{uuid.uuid4()}'", "DD001", "no such escalation"),
        ):
            with pytest.raises(psycopg.Error, match=message) as e:
                conn.execute(f"SELECT durable.resolve_escalation({arguments})".encode())
            assert e.value.sqlstate == state
        conn.execute("SELECT durable.resolve_escalation(%s, %s, 'ann')", [id, json.dumps({"ok": "\N{SNOWMAN}"})])
        with pytest.raises(psycopg.Error, match="is resolved"):
            conn.execute("SELECT durable.resolve_escalation(%s)", [id])
    assert handle.result(timeout=10) == {"ok": "\N{SNOWMAN}"}


# --- races --------------------------------------------------------------------------------------------------------


def outcomes(*calls: Callable[[], Any]) -> list[Any]:
    """What calls that are made at the same moment answer or raise."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        ready.wait()
        try:
            return call()
        except durable.DurableError as e:
            return e

    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(run, call) for call in calls]]


def brokers_of(database_url: str, number: int) -> list[durable.DurableBroker]:
    """Each has a connection of its own, as other processes have."""
    return [durable.DurableBroker(database_url, middleware=[]) for _ in range(number)]


def test_claim_against_claim(ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str) -> None:
    start_worker()
    id = opened(ask.start({"role": "clerk"})).id
    others = brokers_of(database_url, 16)
    found = outcomes(*[lambda b=b, n=n: escalations.claim(id, by=f"p{n}", broker=b) for n, b in enumerate(others)])
    winners = [f for f in found if isinstance(f, escalations.Escalation)]
    assert len(winners) == 1
    losers = [f for f in found if isinstance(f, durable.EscalationConflict)]
    assert {(e.status, e.claimed_by) for e in losers} == {("claimed", winners[0].claimed_by)}
    assert len(losers) == 15
    for broker in others:
        broker.close()


def test_sixteen_take_the_next(ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str) -> None:
    start_worker()
    for _ in range(20):
        ask.start({"role": "clerk"})
    wait_until(lambda: escalations.stats("clerk").waiting == 20)
    others = brokers_of(database_url, 16)
    found = outcomes(
        *[lambda b=b: [escalations.claim_next(role="clerk", by="p", broker=b) for _ in range(2)] for b in others]
    )
    taken = [e.id for pair in found for e in pair if e is not None]
    assert len(taken) == len(set(taken)) == 20
    for broker in others:
        broker.close()


def test_resolve_against_resolve(ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str) -> None:
    start_worker()
    others = brokers_of(database_url, 4)
    for _ in range(5):
        handle = ask.start({"role": "clerk"})
        id = opened(handle).id
        found = outcomes(
            *[lambda b=b, n=n, i=id: escalations.resolve(i, n, by=f"p{n}", broker=b) for n, b in enumerate(others)]
        )
        (winner,) = [f for f in found if isinstance(f, escalations.Escalation)]
        assert sum(isinstance(f, durable.EscalationConflict) and f.status == "resolved" for f in found) == 3
        assert handle.result(timeout=10) == winner.result == escalations.get(id).result
        assert types(handle).count("EscalationResolved") == 1
    for broker in others:
        broker.close()


def test_resolve_against_timeout(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    """What the workflow sees is what the row says, whoever was first."""
    start_worker()
    runs = [(ask.start({"role": "clerk", "timeout": 0.5}), time.monotonic() + 0.5) for _ in range(40)]
    seen: dict[str, int] = {"resolved": 0, "timed_out": 0}
    ids = [(handle, opened(handle).id, due) for handle, due in runs]

    def resolve(n: int, id: str, due: float) -> str:
        # Some before the moment, some at it, some after it.
        time.sleep(max(due - time.monotonic() + (n - 20) * 0.005, 0))
        try:
            escalations.resolve(id, "resolved")
        except durable.EscalationConflict as e:
            return e.status
        return "resolved"

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(resolve, n, id, due) for n, (_, id, due) in enumerate(ids)]
    for (handle, id, _), answer in zip(ids, answers, strict=True):
        told = answer.result()
        assert handle.result(timeout=10).replace(" ", "_") == told
        assert escalations.get(id).status == told
        seen[told] += 1
    assert sum(seen.values()) == 40


@pytest.mark.parametrize("commit", [True, False])
def test_a_resolve_that_is_not_committed_holds_the_timeout_up(
    ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str, commit: bool
) -> None:
    start_worker()
    handle = ask.start({"role": "clerk", "timeout": 0.5})
    id = opened(handle).id
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            escalations.resolve(id, "in time")
        with psycopg.connect(database_url, autocommit=True) as other:
            late = "SELECT clock_timestamp() > times_out_at + interval '200 ms' FROM durable.escalation"
            wait_until(lambda: other.execute(late).fetchone() == (True,))
        assert handle.status() == "running"
        (conn.commit if commit else conn.rollback)()
    assert handle.result(timeout=10) == ("in time" if commit else "timed out")
    assert escalations.get(id).status == ("resolved" if commit else "timed_out")


def test_a_claim_that_is_not_committed_holds_the_timeout_up(
    ask: durable.Workflow[Any, Any], start_worker: StartWorker, database_url: str
) -> None:
    start_worker()
    handle = ask.start({"role": "clerk", "timeout": 0.3})
    id = opened(handle).id
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            escalations.claim(id, by="ann")
        with psycopg.connect(database_url, autocommit=True) as other:
            # The timer came, and was sent back.
            wait_until(lambda: other.execute("SELECT FROM durable.message WHERE attempt > 2").fetchall())
        with durable.using(conn):
            escalations.resolve(id, "in time", by="ann")
        conn.commit()
    assert handle.result(timeout=10) == "in time"
    assert types(handle) == ["WorkflowStarted", "EscalationOpened", "EscalationResolved", "WorkflowCompleted"]


def test_a_resolve_that_is_not_committed_holds_a_withdrawal_up(
    broker: durable.DurableBroker, start_worker: StartWorker, database_url: str
) -> None:
    @durable.workflow
    async def hurry() -> str:
        task = asyncio.create_task(durable.escalate(role="clerk"))  # type: ignore[arg-type]
        await durable.wait_for_signal("enough")
        return "gave up" if task.cancel() else str(task.result())

    start_worker()
    handle = hurry.start()
    id = opened(handle).id
    with psycopg.connect(database_url) as conn:
        with durable.using(conn):
            escalations.resolve(id, "in time")
        handle.signal("enough")
        with psycopg.connect(database_url, autocommit=True) as other:
            wait_until(lambda: other.execute("SELECT FROM durable.message WHERE attempt > 1").fetchall())
        conn.commit()
    assert handle.result(timeout=10) == "in time"
    assert escalations.get(id).status == "resolved"


def test_resolve_against_terminate(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    for _ in range(8):
        handle = ask.start({"role": "clerk"})
        id = opened(handle).id
        resolved, terminated = outcomes(lambda i=id: escalations.resolve(i, 1), lambda h=handle: h.terminate())
        status = wait_until(lambda h=handle: h.status() if h.status() != "running" else None)
        row = escalations.get(id).status
        if isinstance(resolved, durable.EscalationConflict):
            assert (resolved.status, row, status) == ("cancelled", "cancelled", "terminated")
        else:
            assert row == "resolved"
            assert status in ("completed", "terminated")
        assert terminated is None or isinstance(terminated, durable.WorkflowClosed)


def test_resolve_against_cancel_of_the_run(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    for _ in range(8):
        handle = ask.start({"role": "clerk"})
        id = opened(handle).id
        resolved, _ = outcomes(lambda i=id: escalations.resolve(i, 1), lambda h=handle: h.cancel())
        status = wait_until(lambda h=handle: h.status() if h.status() != "running" else None)
        if isinstance(resolved, durable.EscalationConflict):
            assert (resolved.status, status) == ("cancelled", "cancelled")
        else:
            assert escalations.get(id).status == "resolved"
            assert "EscalationResolved" in types(handle)
            assert status == "completed"


# --- reset --------------------------------------------------------------------------------------------------------


def test_a_reset_asks_again(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """What was open at that event is open for the new run, with the time that is left; what was answered is not."""

    @durable.workflow
    async def two() -> list[Any]:
        first = await durable.escalate(role="first")
        task = asyncio.create_task(durable.escalate(role="second", timeout="1 day"))  # type: ignore[arg-type]
        await durable.wait_for_signal("go")
        await durable.wait_for_signal("on")
        return [first, await task]

    start_worker()
    old = two.start()
    escalations.resolve(opened(old).id, 1)
    (second,) = wait_until(lambda: escalations.list(role="second"))
    old.signal("go")
    wait_until(lambda: "SignalReceived" in types(old))
    new = old.reset(types(old).index("SignalReceived") + 1)
    assert escalations.get(second.id).status == "cancelled"
    (again,) = wait_until(lambda: escalations.list(role="second", status="waiting"))
    assert again.run_id == new.run_id
    assert (again.times_out_at, again.opened_at) == (second.times_out_at, second.opened_at)
    new.signal("on")
    escalations.resolve(again.id, 2)
    assert new.result(timeout=10) == [1, 2]
    assert escalations.stats("first") == escalations.Stats(0, 0, 1, 0, 0)


def test_a_reset_keeps_the_time(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def late() -> str:
        task = asyncio.create_task(durable.escalate(role="clerk", timeout=1.5))  # type: ignore[arg-type]
        await durable.wait_for_signal("go")
        try:
            return str(await task)
        except durable.Timeout:
            return "late"

    start_worker()
    old = late.start()
    opened(old)
    old.signal("go")
    wait_until(lambda: "SignalReceived" in types(old))
    new = old.reset(types(old).index("SignalReceived") + 1)
    assert new.result(timeout=10) == "late"
    assert opened(new).status == "timed_out"


def test_a_reset_to_the_answer_gives_it_again(ask: durable.Workflow[Any, Any], start_worker: StartWorker) -> None:
    start_worker()
    old = ask.start({"role": "clerk", "timeout": "1 day"})
    escalations.resolve(opened(old).id, "yes")
    assert old.result(timeout=10) == "yes"
    new = old.reset(types(old).index("EscalationResolved") + 1)
    assert new.result(timeout=10) == "yes"
    assert escalations.stats("clerk") == escalations.Stats(0, 0, 1, 0, 0)
