"""State that can be looked for, human steps, exports, interceptors, codecs, emitted events."""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from tests.support import wait_until

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: Any) -> list[str]:
    return [e.type for e in handle.history()]


# --- entity and search ---------------------------------------------------------------------------------


def test_entity_operations(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def entity() -> dict[str, Any]:
        e = durable.entity()
        seen: dict[str, Any] = {}
        await e.set({"user": {"id": 1, "langs": ["en"]}, "hobbies": [], "count": 0, "on": False})
        await e.merge({"user": {"name": "Ann"}, "extra": {"deep": {"x": 1}}})
        seen["append"] = await e.append("hobbies", "chess")
        await e.append("hobbies", {"n": 1})
        await e.prepend("hobbies", "first")
        await e.remove("hobbies", 1)
        seen["increment"] = await e.increment("count", 5)
        seen["decrement"] = await e.increment("count", -2)
        await e.increment("fresh")
        seen["toggle"] = await e.toggle("on")
        await e.toggle("new_toggle")
        await e.delete("user.langs")
        await e.delete("not.there")
        seen["not set"] = await e.set_if_not_exists("user.name", "Bob")
        seen["set"] = await e.set_if_not_exists("user.role", "admin")
        seen["whole"] = await e.get()
        seen["path"] = await e.get("user.name")
        seen["none"] = await e.get("user.nothing")
        return seen

    start_worker()
    handle = entity.start()
    seen = handle.result(timeout=20)
    whole = {
        "user": {"id": 1, "name": "Ann", "role": "admin"},
        "hobbies": ["first", {"n": 1}],
        "count": 3,
        "fresh": 1,
        "on": True,
        "new_toggle": True,
        "extra": {"deep": {"x": 1}},
    }
    assert seen["whole"] == whole
    assert seen["path"] == "Ann"
    assert seen["none"] is None
    assert handle.describe().entity == whole
    assert types(handle).count("EntityChanged") >= 10
    [found] = durable.list_workflows("entity.user.role = 'admin' and entity.count >= 3 and entity.on = true")
    assert found.workflow_id == handle.workflow_id
    assert durable.list_workflows("entity.user.role = 'nobody'") == []
    assert durable.count_workflows("entity.extra.deep.x = 1") == 1
    assert durable.count_workflows("not (entity.count < 3)") == 1


def test_search_is_typed_and_found(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def enrich(n: int) -> int:
        await durable.upsert_search({"n": n, "even": n % 2 == 0, "label": f"it's {n}", "ratio": n / 2})
        if n == 3:
            await durable.upsert_search({"label": None})
        info = durable.info()
        assert info.search["n"] == n
        await durable.wait_for_signal("end")
        return n

    start_worker()
    handles = [enrich.options(search={"batch": "b"}).start(n) for n in range(4)]
    wait_until(lambda: durable.count_workflows("search.n >= 0") == 4)
    assert durable.count_workflows("search.even = true and search.batch = 'b'") == 2
    assert durable.count_workflows("search.n in (1, 2) and search.ratio < 1") == 1
    assert durable.count_workflows("search.label = 'it''s 2'") == 1
    assert durable.count_workflows("search.label like 'it%'") == 3
    assert durable.count_workflows("search.label = null") == 1
    assert durable.count_workflows("search.label != null") == 3
    assert durable.count_workflows("not search.even = true or search.n = 0") == 3
    assert durable.count_workflows("status = 'running' and name = 'enrich'", group_by="search.even") == {
        True: 2,
        False: 2,
    } or durable.count_workflows("name = 'enrich'", group_by="search.even") == {"true": 2, "false": 2}
    assert durable.count_workflows(group_by="status") == {"running": 4}
    assert durable.count_workflows(group_by="name") == {"enrich": 4}
    page = durable.list_workflows("name = 'enrich'", order="started_at", limit=3)
    assert [w.workflow_id for w in page] == [h.workflow_id for h in handles[:3]]
    rest = durable.list_workflows("name = 'enrich'", order="started_at", limit=3, after=page.next)
    assert [w.workflow_id for w in rest] == [handles[3].workflow_id]
    assert rest.next is None
    assert durable.batch_signal("search.even = true", "end", None) == 2
    for n in (0, 2):
        assert handles[n].result(timeout=20) == n
    assert durable.batch_cancel("search.n = 1") == 1
    with pytest.raises(durable.WorkflowCancelled):
        handles[1].result(timeout=20)
    assert durable.batch_terminate("status = 'running'", "the end") == 1
    with pytest.raises(durable.WorkflowTerminated, match="the end"):
        handles[3].result(timeout=20)
    assert durable.count_workflows(group_by="status") == {"completed": 2, "cancelled": 1, "terminated": 1}
    assert durable.batch_reset("status = 'terminated'", 1) == 1
    assert durable.count_workflows("status = 'running'") == 1


@pytest.mark.parametrize(
    ("where", "position"),
    [
        ("status == 'x'", None),
        ("status = ", None),
        ("nonsense = 1", 0),
        ("status = 'x' and", None),
        ("status = 'running'; DROP TABLE x", None),
        ("(status = 'x'", None),
        ("status = 'x", None),
        ("search. = 1", None),
        ("status like 1", None),
        ("started_at > 'soon'", None),
        ("search.x in ()", None),
        ("", None),
    ],
)
def test_mistakes_in_filters(broker: Any, where: str, position: int | None) -> None:
    with pytest.raises(durable.InvalidFilter) as caught:
        durable.list_workflows(where)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.position, int)
    if position is not None:
        assert caught.value.position == position


def test_times_in_filters(broker: Any) -> None:
    @durable.workflow
    async def quick() -> None: ...

    handle = quick.start()
    started = handle.describe().started_at
    assert durable.count_workflows(f"started_at >= '{started.isoformat()}'") == 1
    assert durable.count_workflows(f"started_at < '{started.isoformat()}'") == 0
    assert durable.count_workflows("started_at > '2020-01-01'") == 1
    assert durable.count_workflows("closed_at = null") == 1
    assert durable.count_workflows(f"run_id = '{handle.run_id}'") == 1
    assert durable.count_workflows("parent_id = null") == 1


# --- human steps ---------------------------------------------------------------------------------------


def ask() -> Any:
    @durable.workflow
    async def asks(timeout: Any = None, role: str = "clerk", priority: int = 0) -> Any:
        try:
            return await durable.escalate(
                role=role,
                subject="order-1",
                payload={"cents": 5},
                type="approval",
                priority=priority,
                timeout=timeout,
                metadata={"region": "eu"},
            )
        except durable.EscalationCancelled:
            return "cancelled"
        except durable.Timeout:
            return "timeout"

    return asks


def waiting(count: int = 1, **filters: Any) -> list[Any]:
    return wait_until(
        lambda: (found := escalations.list(status="waiting", **filters)) and len(found) == count and found
    )


def test_claim_and_resolve(broker: Any, start_worker: StartWorker) -> None:
    asks = ask()
    start_worker()
    handle = asks.start()
    [task] = waiting(role="clerk")
    assert (task.role, task.subject, task.payload, task.type, task.priority, task.status, task.metadata) == (
        "clerk",
        "order-1",
        {"cents": 5},
        "approval",
        0,
        "waiting",
        {"region": "eu"},
    )
    assert task.claimed_by is None
    claimed = escalations.claim(task.id, by="ann", timeout="10m")
    assert (claimed.status, claimed.claimed_by) == ("claimed", "ann")
    for call in (
        lambda: escalations.claim(task.id, by="bob"),
        lambda: escalations.resolve(task.id, 1, by="bob"),
        lambda: escalations.resolve(task.id, 1),
        lambda: escalations.release(task.id, by="bob"),
    ):
        with pytest.raises(durable.EscalationConflict) as caught:
            call()
        assert (caught.value.status, caught.value.claimed_by) == ("claimed", "ann")
    assert escalations.stats("clerk").claimed == 1
    escalations.release(task.id, by="ann")
    assert escalations.get(task.id).status == "waiting"
    escalations.claim(task.id, by="bob")
    escalations.resolve(task.id, {"ok": True}, by="bob")
    assert handle.result(timeout=20) == {"ok": True}
    done = escalations.get(task.id)
    assert done.status == "resolved"
    with pytest.raises(durable.EscalationConflict) as caught:
        escalations.resolve(task.id, {"ok": False}, by="bob")
    assert caught.value.status == "resolved"
    with pytest.raises(durable.EscalationConflict):
        escalations.cancel(task.id)
    stats = escalations.stats()
    assert {k: getattr(stats, k) for k in ("waiting", "claimed", "resolved", "cancelled", "timed_out")} == {
        "waiting": 0,
        "claimed": 0,
        "resolved": 1,
        "cancelled": 0,
        "timed_out": 0,
    }
    assert "EscalationOpened" in types(handle)
    assert "EscalationResolved" in types(handle)
    assert asks.start() is not None


def test_other_ends(broker: Any, start_worker: StartWorker) -> None:
    asks = ask()
    start_worker()
    late = asks.start(timeout=0.2)
    assert late.result(timeout=20) == "timeout"
    assert "EscalationTimedOut" in types(late)
    cancelled = asks.start()
    [task] = waiting()
    escalations.cancel(task.id)
    assert cancelled.result(timeout=20) == "cancelled"
    assert "EscalationCancelled" in types(cancelled)
    ended = asks.start()
    [task] = waiting()
    ended.cancel()
    with pytest.raises(durable.WorkflowCancelled):
        ended.result(timeout=20)
    assert escalations.get(task.id).status == "cancelled"
    killed = asks.start()
    [task] = waiting()
    killed.terminate()
    assert escalations.get(task.id).status == "cancelled"
    assert escalations.stats("clerk") == escalations.stats()
    with pytest.raises(durable.EscalationNotFound):
        escalations.get("00000000-0000-0000-0000-000000000000")


def test_reassign_priorities_and_lists(broker: Any, start_worker: StartWorker) -> None:
    asks = ask()
    start_worker()
    handles = [asks.start(priority=p) for p in (5, 1, 3)]
    tasks = waiting(3, role="clerk")
    assert [t.priority for t in tasks] == [1, 3, 5]
    assert len(escalations.list(role="clerk", limit=2)) == 2
    assert len(escalations.list(subject="order-1")) == 3
    assert escalations.list(subject="order-2") == []
    escalations.claim(tasks[0].id, by="ann")
    moved = escalations.reassign(tasks[0].id, role="boss")
    assert (moved.role, moved.status, moved.claimed_by) == ("boss", "waiting", None)
    assert escalations.stats("boss").waiting == 1
    assert escalations.stats(role="clerk").waiting == 2
    for task in tasks:
        escalations.resolve(task.id, task.priority)
    assert [h.result(timeout=20) for h in handles] == [5, 1, 3]


def test_a_claim_that_expires(broker: Any, start_worker: StartWorker) -> None:
    asks = ask()
    start_worker()
    handle = asks.start()
    [task] = waiting()
    escalations.claim(task.id, by="ann", timeout=0.1)
    wait_until(lambda: escalations.get(task.id).status == "waiting")
    escalations.claim(task.id, by="bob")
    with pytest.raises(durable.EscalationConflict):
        escalations.resolve(task.id, None, by="ann")
    escalations.resolve(task.id, by="bob")
    assert handle.result(timeout=20) is None


def test_races_have_one_winner(broker: Any, start_worker: StartWorker) -> None:
    asks = ask()
    start_worker()
    handle = asks.start()
    [task] = waiting()

    def attempt(n: int) -> Any:
        try:
            return escalations.claim(task.id, by=f"p{n}").claimed_by
        except durable.EscalationConflict as e:
            return e

    def resolve(n: int) -> Any:
        try:
            return escalations.resolve(task.id, n, by=winner)
        except durable.EscalationConflict as e:
            return e

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(8)))
        [winner] = [o for o in outcomes if isinstance(o, str)]
        assert {o.claimed_by for o in outcomes if not isinstance(o, str)} == {winner}
        ends = list(pool.map(resolve, range(8)))
    assert sum(not isinstance(e, Exception) for e in ends) == 1
    won = next(n for n, e in enumerate(ends) if not isinstance(e, Exception))
    assert handle.result(timeout=20) == won


def test_an_escalation_raced_by_a_signal(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def race() -> str:
        ask = asyncio.ensure_future(durable.escalate(role="r", subject="s"))
        other = asyncio.ensure_future(durable.wait_for_signal("skip"))
        done, pending = await asyncio.wait([ask, other], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return "asked" if ask in done else "skipped"

    start_worker()
    handle = race.start()
    [task] = waiting()
    handle.signal("skip")
    assert handle.result(timeout=20) == "skipped"
    wait_until(lambda: escalations.get(task.id).status == "cancelled")


# --- exports, follow, topics ---------------------------------------------------------------------------


def test_export_is_json_of_the_history(broker: Any, start_worker: StartWorker) -> None:
    @durable.activity
    def act(n: int) -> int:
        return n

    @durable.workflow
    async def flow() -> int:
        return await act.execute(1) + await durable.wait_for_signal("x")

    start_worker()
    handle = flow.start()
    handle.signal("x", 2)
    assert handle.result(timeout=20) == 3
    exported = json.loads(handle.export())
    assert [e["type"] for e in exported["events"]] == types(handle)
    event = handle.history()[0]
    assert (event.event_id, event.type) == (1, "WorkflowStarted")
    for e in handle.history():
        assert set(e.attributes) is not None
        json.dumps(e.attributes)


def test_following_output_while_it_is_written(broker: Any, start_worker: StartWorker) -> None:
    @durable.workflow
    async def tells() -> None:
        for n in range(5):
            await durable.output({"n": n})
            await durable.wait_for_signal("next")

    start_worker()
    handle = tells.start()
    seen = []
    for offset, value in handle.follow():
        assert offset == len(seen)
        seen.append(value["n"])
        handle.signal("next")
    assert seen == list(range(5))

    async def client() -> list[Any]:
        return [pair async for pair in handle.afollow(3)]

    assert asyncio.run(client()) == [(3, {"n": 3}), (4, {"n": 4})]


def test_emitted_events_reach_every_subscriber(broker: Any, start_worker: StartWorker) -> None:
    seen: list[Any] = []
    others: list[Any] = []

    @dramatiq.actor
    def first(payload: Any) -> None:
        seen.append(payload)

    @dramatiq.actor(queue_name="others")
    def second(payload: Any) -> None:
        others.append(payload)

    durable.subscribe("orders.done")(first)
    durable.subscribe("orders.done")(second)

    @durable.workflow
    async def emits(n: int) -> None:
        for i in range(n):
            await durable.emit("orders.done", {"i": i})
        await durable.emit("nobody.listens", None)

    start_worker()
    handle = emits.start(10)
    handle.result(timeout=20)
    wait_until(lambda: len(seen) == 10 and len(others) == 10)
    assert [p["i"] for p in seen] == list(range(10)) == [p["i"] for p in others]
    assert types(handle).count("TopicEmitted") == 11


# --- interceptors and codecs ---------------------------------------------------------------------------


def test_interceptors_in_order_with_activities(make_broker: Any) -> None:
    log: list[str] = []

    class Names(durable.WorkflowInterceptor):
        def __init__(self, name: str) -> None:
            self.name = name

        async def execute_workflow(self, ctx: Any, call_next: Any) -> Any:
            if not durable.is_replaying():
                log.append(f"{self.name} in {ctx.name}")
            await note.execute(f"before {self.name}")
            ctx.headers["trail"] = [*ctx.headers.get("trail", []), self.name]
            try:
                result = await call_next(ctx)
            except Exception as e:
                await note.execute(f"failed {self.name} {type(e).__name__}")
                raise
            await note.execute(f"after {self.name}")
            return [self.name, result]

        async def execute_activity(self, ctx: Any, call_next: Any) -> Any:
            if ctx.name == "work":
                ctx.args = (ctx.args[0] + 1,)
                result = await call_next(ctx)
                return result * 10
            return await call_next(ctx)

    broker = make_broker(interceptors=[Names("outer"), Names("inner")])
    dramatiq.set_broker(broker)
    notes: list[str] = []
    headers: list[Any] = []

    @durable.activity(queue_name="shared")
    def note(text: str) -> None:
        notes.append(text)

    @durable.activity(queue_name="shared", max_retries=0)
    def work(n: int) -> int:
        info = durable.activity_info()
        assert info is not None
        headers.append(info.headers.get("trail"))
        if n > 100:
            raise ValueError("too much")
        return n

    @durable.workflow
    async def flow(n: int) -> int:
        assert durable.info().headers.get("trail") == ["outer", "inner"]
        return await work.execute(n)

    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
    worker.start()
    try:
        assert flow.start(1).result(timeout=20) == ["outer", ["inner", 300]]
        assert notes == ["before outer", "before inner", "after inner", "after outer"]
        assert log == ["outer in flow", "inner in flow"]
        assert headers == [["outer", "inner"]]
        notes.clear()
        with pytest.raises(durable.WorkflowFailed):
            flow.start(1000).result(timeout=20)
        assert notes[2:] == ["failed inner ActivityFailed", "failed outer ActivityFailed"]
    finally:
        worker.stop()


class Zip:
    name = "zip"

    def encode(self, data: bytes) -> bytes:
        return zlib.compress(data)

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data)


class Hide:
    name = "hide"

    def encode(self, data: bytes) -> bytes:
        return base64.b85encode(bytes(b ^ 85 for b in data))

    def decode(self, data: bytes) -> bytes:
        return bytes(b ^ 85 for b in base64.b85decode(data))


def test_codecs_cover_every_value(make_broker: Any, database_url: str) -> None:
    import psycopg

    broker = make_broker(codecs=[Zip(), Hide()])
    dramatiq.set_broker(broker)

    @durable.activity(max_retries=0)
    def act(text: str) -> str:
        if "fail" in text:
            raise ValueError("SECRET in failure")
        return f"SECRET result of {text}"

    @durable.workflow
    async def flow(text: str) -> Any:
        @durable.on_update("u")
        def u(x: str) -> str:
            return x

        @durable.on_query("q")
        def q() -> str:
            return "SECRET query"

        await durable.output("SECRET output")
        await durable.emit("t", "SECRET emit")
        got = [await act.execute(text), await durable.wait_for_signal("s")]
        try:
            await act.execute("SECRET fail")
        except durable.ActivityFailed as e:
            got.append(e.message)
        got.append(await durable.side_effect(lambda: "SECRET effect"))
        got.append(await durable.local(lambda: "SECRET local"))
        got.append(await durable.escalate(role="r", subject="s", payload="SECRET ask"))
        return got

    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
    worker.start()
    try:
        handle = flow.options(memo={"m": "SECRET memo"}).start("SECRET input")
        assert handle.update("u", "SECRET update", timeout=20) == "SECRET update"
        assert handle.query("q", timeout=20) == "SECRET query"
        handle.signal("s", "SECRET signal")
        [task] = wait_until(lambda: escalations.list())
        assert task.payload == "SECRET ask"
        escalations.resolve(task.id, "SECRET answer")
        result = handle.result(timeout=20)
        assert result == [
            "SECRET result of SECRET input",
            "SECRET signal",
            "SECRET in failure",
            "SECRET effect",
            "SECRET local",
            "SECRET answer",
        ]
        assert handle.describe().memo == {"m": "SECRET memo"}
        assert handle.describe().result == result
        assert list(handle.follow()) == [(0, "SECRET output")]
    finally:
        worker.stop()
    with psycopg.connect(database_url) as conn:
        tables = conn.execute(
            "SELECT table_name FROM information_schema.tables "
            "WHERE table_schema = 'durable' AND table_type = 'BASE TABLE'"
        ).fetchall()
        for (table,) in tables:
            for (row,) in conn.execute(f"SELECT t::text FROM durable.{table} t").fetchall():  # type: ignore[attr-defined]
                assert "SECRET" not in row, table
                assert b"SECRET".hex() not in row, table
