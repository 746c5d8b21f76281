"""Search attributes, entities, topics and output of runs, on a real database and a real worker."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.workflow.info import Parent
from examples.codecs import Encrypt
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]


def test_search_attributes_are_shown_and_found(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    due = datetime(2026, 1, 31, 12, tzinfo=UTC)

    @durable.workflow
    async def order(region: str) -> dict[str, Any]:
        before = dict(durable.info().search)
        await durable.upsert_search({"state": "paid", "cents": 500, "share": 0.5, "gift": True, "tags": ["a", "b"]})
        await durable.upsert_search({"due": due, "region": None, "state": "sent"})
        shown = dict(durable.info().search)
        await durable.wait_for_signal("go")
        return {"before": before, "due": shown.pop("due") == due, "shown": shown}

    start_worker()
    handle = order.options(workflow_id="o-1", search={"region": "eu"}, memo={"note": 1}).start("eu")
    other = order.options(workflow_id="o-2").start("us")
    attributes = {"state": "sent", "cents": 500, "share": 0.5, "gift": True, "tags": ["a", "b"], "due": due}
    wait_until(lambda: handle.describe().search == attributes and len(other.describe().search) == 6)
    for where in (
        "search.state = 'sent'",
        "search.cents >= 500 and search.cents < 501",
        "search.share = 0.5",
        "search.gift = true",
        "search.tags = 'b'",
        "search.tags in ('x', 'a')",
        "search.due = '2026-01-31T13:00:00+01:00'",
        "search.due > '2026-01-31' and search.due < '2026-02-01'",
        "search.region = null",
        "search.region != 'eu'",
        "not search.state = 'paid' and search.missing != 3",
    ):
        assert {run.workflow_id for run in durable.list_workflows(where)} == {"o-1", "o-2"}, where
    for where in ("search.state = 'paid'", "search.cents = '500'", "search.due < '2026-01-31'", "search.tags = 'ab'"):
        assert durable.list_workflows(where) == [], where
    (found,) = durable.list_workflows("search.state = 'sent' and workflow_id = 'o-1'")
    assert (found.run_id, found.search, found.memo) == (handle.run_id, attributes, {"note": 1})
    for run in (handle, other):
        run.signal("go")
    result = handle.result(timeout=10)
    assert result["before"] == {"region": "eu"}
    assert result["due"]
    assert result["shown"] == {k: v for k, v in attributes.items() if k != "due"}
    upserts = [e for e in handle.history() if e.type == "SearchUpserted"]
    assert upserts[1].attributes["search"] == {
        "due": {"time": "2026-01-31T12:00:00.000000"}, "region": None, "state": "sent"
    }  # fmt: skip


def test_an_entity_is_described_and_found(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.activity
    def nothing() -> None: ...

    @durable.workflow
    async def account(name: str) -> Any:
        entity = durable.entity()
        await entity.set({"owner": {"name": name}, "tags": ["new"]})
        await entity.increment("balance.cents", 250)
        await nothing.execute()
        await entity.append("tags", "checked")
        await entity.prepend("tags", "first")
        await entity.merge({"owner": {"age": 40}})
        await entity.toggle("open")
        await entity.set_if_not_exists("owner.name", "nobody")
        await entity.remove("tags", 1)
        await entity.set("gone", 1)
        await entity.delete("gone")
        await nothing.execute()
        return await entity.get()

    start_worker()
    handle = account.options(workflow_id="kim").start("Kim")
    account.start("Lee").result(timeout=10)
    expected = {
        "owner": {"name": "Kim", "age": 40}, "tags": ["first", "checked"], "balance": {"cents": 250}, "open": True
    }  # fmt: skip
    assert handle.result(timeout=10) == expected
    assert handle.describe().entity == expected
    assert [e.name for e in handle.history() if e.type == "EntityChanged"] == [
        "set", "increment", "append", "prepend", "merge", "toggle", "remove", "set", "delete"
    ]  # fmt: skip
    (found,) = durable.list_workflows("entity.owner.name = 'Kim' and entity.balance.cents > 200")
    assert found.workflow_id == "kim"
    assert len(durable.list_workflows("entity.tags = 'checked'")) == 2
    assert durable.count_workflows(group_by="entity.owner.name") == {"Kim": 1, "Lee": 1}


def test_output_is_followed(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def speak() -> int:
        for n in range(3):
            assert await durable.output({"n": n}) == n
        await durable.wait_for_signal("more")
        await durable.output("last")
        return 4

    start_worker()
    handle = speak.start()
    follower = handle.follow()
    assert [next(follower) for _ in range(3)] == [(n, {"n": n}) for n in range(3)]
    late = handle.follow(2)
    assert next(late) == (2, {"n": 2})
    # One that waits is told: long before it would look by itself.
    seen: list[Any] = []
    done = threading.Event()

    def wait() -> None:
        seen.extend(follower)
        done.set()

    threading.Thread(target=wait).start()
    handle.signal("more")
    assert done.wait(15)
    assert seen == [(3, "last")]
    assert list(late) == [(3, "last")]
    assert list(handle.follow(4)) == []
    assert [offset for offset, _ in handle.follow()] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="offset"):
        handle.follow(-1)
    with pytest.raises(durable.WorkflowNotFound):
        next(durable.get_handle("nobody").follow())

    async def following() -> list[Any]:
        return [pair async for pair in handle.afollow(2)]

    assert asyncio.run(following()) == [(2, {"n": 2}), (3, "last")]


def test_many_async_followers_hold_no_threads(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def speak() -> None:
        await durable.wait_for_signal("go")
        await durable.output("hello")

    start_worker()
    handle = speak.start()

    async def client() -> None:
        async def one() -> list[Any]:
            return [pair async for pair in handle.afollow()]

        before = threading.active_count()
        followers = [asyncio.create_task(one()) for _ in range(100)]
        await asyncio.sleep(0.5)
        # Those of the loop's executor, which has no more than these.
        assert threading.active_count() < before + 40
        await handle.asignal("go")
        assert await asyncio.wait_for(asyncio.gather(*followers), 20) == [[(0, "hello")]] * 100

    asyncio.run(client())


def test_subscribers_are_given_events_in_order(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    given: list[tuple[Any, ...]] = []
    failed: list[int] = []

    @durable.subscribe("steps")
    @durable.activity(queue_name="listeners", max_retries=3, min_backoff=10, max_backoff=50)
    def careful(payload: Any) -> None:
        info = durable.event_info()
        assert info is not None
        if payload["n"] == 2 and info.attempt < 3:
            failed.append(info.attempt)
            raise ValueError("not yet")
        given.append(("careful", info.workflow_id, payload["n"], info.topic, info.workflow))

    @dramatiq.actor(queue_name="others")
    def quick(payload: Any) -> None:
        assert durable.event_info() is not None
        given.append(("quick", payload["run"], payload["n"]))

    assert durable.subscribe("steps")(quick) is quick

    @durable.workflow
    async def emitter(run: str) -> None:
        for n in range(3):
            await durable.emit("steps", {"run": run, "n": n})
            await durable.emit("nobody listens", n)
        await durable.sleep(0.01)
        for n in range(3, 6):
            await durable.emit("steps", {"run": run, "n": n})

    start_worker()
    for run in ("a", "b"):
        emitter.options(workflow_id=run).start(run)
    wait_until(lambda: len(given) >= 24)
    assert sorted(failed) == [1, 1, 2, 2]
    for run in ("a", "b"):
        assert [g for g in given if g[:2] == ("careful", run)] == [
            ("careful", run, n, "steps", "emitter") for n in range(6)
        ]
        assert [g[2] for g in given if g[:2] == ("quick", run)] == list(range(6))
    assert durable.event_info() is None
    with looking(broker) as conn:
        wait_until(lambda: conn.execute("SELECT count(*) FROM durable.topic_event").fetchone() == (0,))


def test_an_event_that_fails_for_good_is_a_dead_letter(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    given: list[Any] = []

    @durable.subscribe("t")
    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def picky(payload: Any) -> None:
        if payload == "bad":
            raise ValueError(payload)
        given.append(payload)

    @durable.workflow
    async def emitter() -> None:
        for payload in ("good", "bad", None):
            await durable.emit("t", payload)

    start_worker()
    emitter.start().result(timeout=10)
    wait_until(lambda: given == ["good", None])
    with looking(broker) as conn:
        row = conn.execute("SELECT actor, reason, failure, attempt FROM durable.dead_letter").fetchone()
        assert row == ("picky", "rejected", "ValueError: bad", 2)


def test_subscriptions_outlive_workers_and_end_when_asked(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    given: list[Any] = []

    @dramatiq.actor(queue_name="away")
    def listener(payload: Any) -> None:
        given.append(payload)

    durable.subscribe("news")(listener)

    @durable.workflow(queue_name="here")
    async def emitter(first: int) -> None:
        for n in range(first, first + 3):
            await durable.emit("news", n)

    worker = start_worker()
    emitter.start(0).result(timeout=10)
    wait_until(lambda: given == [0, 1, 2])
    worker.stop()
    only_runs = dramatiq.Worker(broker, queues={"here"}, worker_timeout=50, worker_threads=2)
    only_runs.start()
    try:
        emitter.start(10).result(timeout=10)
        assert given == [0, 1, 2]
    finally:
        only_runs.stop()
    start_worker()
    wait_until(lambda: given == [0, 1, 2, 10, 11, 12])
    assert durable.unsubscribe("news", listener)
    assert not durable.unsubscribe("news", listener)
    emitter.start(20).result(timeout=10)
    with looking(broker) as conn:
        for table in ("subscription", "topic_lane", "topic_event"):
            assert conn.execute(f"SELECT count(*) FROM durable.{table}".encode()).fetchone() == (0,)
    assert given == [0, 1, 2, 10, 11, 12]


def test_a_running_worker_takes_new_subscriptions(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    given: list[Any] = []

    @durable.workflow
    async def emitter() -> None:
        await durable.emit("late", 1)

    start_worker()
    emitter.start().result(timeout=10)

    @durable.subscribe("late")
    @dramatiq.actor
    def listener(payload: Any) -> None:
        given.append(payload)

    emitter.start().result(timeout=10)
    wait_until(lambda: given == [1])


def test_pages_are_stable(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def one(n: int) -> int:
        return n

    handles = [one.options(workflow_id=f"w-{n:02}").start(n) for n in range(25)]
    described = [h.describe() for h in handles]
    ids = [d.workflow_id for d in sorted(described, key=lambda d: (d.started_at, d.run_id))]
    for order, expected in (("started_at", ids), ("-started_at", ids[::-1])):
        seen: list[str] = []
        after = None
        while True:
            page = durable.list_workflows("name = 'one'", order, limit=10, after=after)
            seen += [run.workflow_id for run in page]
            one.start(99)  # what is started meanwhile disturbs nothing
            after = page.next
            if after is None:
                break
        assert [id for id in seen if id.startswith("w-")] == expected
        assert len(set(seen)) == len(seen)
    start_worker()
    for handle in handles:
        handle.result(timeout=10)
    closed = [run.closed_at for run in durable.list_workflows("workflow_id like 'w-%'", "-closed_at", limit=1000)]
    assert len(closed) == 25
    assert closed == sorted(closed, reverse=True)  # type: ignore[type-var]
    first = durable.list_workflows("workflow_id like 'w-%'", "closed_at", limit=20)
    rest = durable.list_workflows("workflow_id like 'w-%'", "closed_at", limit=20, after=first.next)
    assert [r.closed_at for r in (*first, *rest)] == closed[::-1]
    assert rest.next is None
    for wrong in ({"order": "memo"}, {"limit": 0}, {"after": "x"}, {"after": first.next}):
        with pytest.raises(ValueError, match=r"order|limit|after"):
            durable.list_workflows(**wrong)  # type: ignore[arg-type]


def test_counts_by_group(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def one(fail: bool) -> None:
        await durable.upsert_search({"fail": fail, "tags": ["x"] if fail else None})
        if fail:
            raise ValueError

    @durable.workflow(queue_name="elsewhere")
    async def two() -> None:
        await durable.wait_for_signal("go")

    start_worker()
    for fail in (True, False, False):
        with suppress(durable.WorkflowFailed):
            one.start(fail).result(timeout=10)
    two.start()
    assert durable.count_workflows() == 4
    assert durable.count_workflows("name = 'one'") == 3
    assert durable.count_workflows("name = 'three'") == 0
    assert durable.count_workflows(group_by="status") == {"completed": 2, "failed": 1, "running": 1}
    assert durable.count_workflows("status != 'running'", group_by="name") == {"one": 3}
    assert durable.count_workflows(group_by="queue_name") == {"default": 3, "elsewhere": 1}
    assert durable.count_workflows(group_by="search.fail") == {True: 1, False: 2, None: 1}
    assert durable.count_workflows(group_by="search.tags") == {("x",): 1, None: 3}
    with looking(broker) as conn:
        conn.execute(
            "UPDATE durable.run_state SET entity = (ARRAY['{\"a\": null}', '{}', '{\"a\": [{\"b\": 1}]}'])[n]::jsonb "
            "FROM (SELECT run_id AS id, row_number() OVER () AS n FROM durable.run_state) x WHERE run_id = id"
        )
    assert durable.count_workflows(group_by="entity.a") == {None: 3, '[{"b": 1}]': 1}
    with pytest.raises(ValueError, match="group_by"):
        durable.count_workflows(group_by="memo")


def test_batches(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def patient(kind: str) -> Any:
        await durable.upsert_search({"kind": kind})
        return await durable.wait_for_signal("go")

    start_worker()
    runs = {kind: [patient.start(kind) for _ in range(5)] for kind in ("signal", "cancel", "terminate", "stay")}
    wait_until(lambda: durable.count_workflows("search.kind != null") == 20)
    assert durable.batch_signal("search.kind = 'signal'", "go", {"ok": True}) == 5
    assert [run.result(timeout=10) for run in runs["signal"]] == [{"ok": True}] * 5
    assert durable.batch_signal("search.kind = 'signal'", "go") == 0, "those have ended"
    assert asyncio.run(durable.abatch_cancel("search.kind = 'cancel'")) == 5
    for run in runs["cancel"]:
        with pytest.raises(durable.WorkflowCancelled):
            run.result(timeout=10)
    assert durable.batch_terminate("search.kind = 'terminate'", "enough") == 5
    for run in runs["terminate"]:
        with pytest.raises(durable.WorkflowTerminated, match="enough"):
            run.result(timeout=10)
    assert durable.count_workflows("status = 'running'") == 5
    for where in ("", "  ", None):
        with pytest.raises(durable.InvalidFilter, match="condition"):
            durable.batch_cancel(where)  # type: ignore[arg-type]


def test_twins(broker: durable.DurableBroker) -> None:
    @durable.workflow
    async def one() -> None: ...

    one.start()

    async def client() -> None:
        assert len(await durable.alist_workflows("name = 'one'")) == 1
        assert await durable.acount_workflows() == 1
        assert await durable.abatch_signal("name = 'one'", "x") == 1
        assert await durable.abatch_terminate("name = 'one'") == 1
        assert await durable.aunsubscribe("t", one_actor) is False

    @dramatiq.actor
    def one_actor() -> None: ...

    asyncio.run(client())


def test_times_bound_the_list(broker: durable.DurableBroker) -> None:
    @durable.workflow
    async def one() -> None: ...

    handle = one.start()
    at = handle.describe().started_at
    hour = timedelta(hours=1)
    for where, there in (
        (f"started_at = '{at.isoformat()}'", 1),
        (f"started_at > '{at.isoformat()}'", 0),
        (f"started_at >= '{(at - hour).isoformat()}' and started_at < '{(at + hour).isoformat()}'", 1),
        (f"started_at in ('{at.isoformat()}')", 1),
        (f"started_at != '{at.isoformat()}'", 0),
        ("closed_at = null", 1),
        ("closed_at < '2100-01-01'", 0),
        (f"run_id = '{handle.run_id}'", 1),
        ("run_id = 'no run'", 0),
        (f"run_id in ('{handle.run_id}', 'x') and queue_name = 'default'", 1),
        (f"workflow_id like '{handle.workflow_id[:8]}%'", 1),
        (f"workflow_id like '%{handle.workflow_id[4:]}'", 1),
        (f"workflow_id like '{handle.workflow_id[:8]}'", 0),
        ("workflow_id like '____________________________________'", 1),
        ("parent_id = null", 1),
        ("parent_id != 'x'", 1),
    ):
        assert len(durable.list_workflows(where)) == there, where


def test_children_are_found_by_their_parent(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def child() -> None: ...

    @durable.workflow
    async def parent() -> None:
        await child.execute()
        await child.execute()

    start_worker()
    handle = parent.options(workflow_id="p").start()
    handle.result(timeout=10)
    for where in (
        "parent_id = 'p'",
        f"parent_id = '{handle.run_id}'",
        "parent_id in ('p', 'q')",
        "parent_id like 'p%'",
    ):
        found = durable.list_workflows(where)
        assert [run.name for run in found] == ["child"] * 2, where
        assert [run.parent for run in found] == [Parent("p", handle.run_id)] * 2
    assert durable.count_workflows("parent_id = null and name = 'parent'") == 1


def test_a_dead_event_that_is_brought_back_is_still_an_event(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    given: list[Any] = []
    broken = True

    @durable.subscribe("t")
    @dramatiq.actor(max_retries=0)
    def listener(payload: Any) -> None:
        if broken:
            raise ValueError(payload)
        given.append((payload, durable.event_info()))

    @durable.workflow
    async def emitter() -> None:
        await durable.emit("t", {"n": 1})

    start_worker()
    handle = emitter.start()
    with looking(broker) as conn:
        wait_until(lambda: conn.execute("SELECT count(*) FROM durable.dead_letter").fetchone() == (1,))
        broken = False
        conn.execute(
            "SELECT durable.redrive_dead_letters(NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 1000000, 100)"
        )
    wait_until(lambda: given)
    ((payload, info),) = given
    assert (payload, info.topic, info.run_id) == ({"n": 1}, "t", handle.run_id)


def test_what_is_emitted_and_put_out_goes_through_codecs(database_url: str) -> None:
    codecs = [Encrypt({"k1": os.urandom(32)}, "k1")]
    given: list[Any] = []
    with closing(durable.DurableBroker(database_url, codecs=codecs)) as broker:

        @durable.subscribe("t")
        @dramatiq.actor(broker=broker, max_retries=1, min_backoff=1, max_backoff=2)
        def listener(payload: Any) -> None:
            if len(given) < 2:
                given.append(payload)
                raise ValueError("not yet: s3cret")
            given.append(payload)

        @durable.workflow(broker=broker, memo={"note": "s3cret"})
        async def f() -> Any:
            await durable.upsert_search({"state": "open"})
            await durable.output({"said": "s3cret"})
            await durable.emit("t", "s3cret 1")
            await durable.emit("t", "s3cret 2")
            return await durable.wait_for_signal("go")

        worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
        worker.start()
        try:
            handle = f.start()
            wait_until(lambda: given == ["s3cret 1", "s3cret 1", "s3cret 2"])
            (run,) = durable.list_workflows("search.state = 'open'", broker=broker)
            assert run.memo == {"note": "s3cret"}
            assert next(handle.follow()) == (0, {"said": "s3cret"})
            assert durable.batch_signal("search.state = 'open'", "go", "s3cret", broker=broker) == 1
            assert handle.result(timeout=10) == "s3cret"
        finally:
            worker.stop()
    with psycopg.connect(database_url) as conn:
        tables = [row[0] for row in conn.execute("SELECT tablename::text FROM pg_tables WHERE schemaname = 'durable'")]
        for table in tables:
            query = f"SELECT count(*) FROM durable.{table} t WHERE to_json(t)::text ~ 's3cret'"
            assert conn.execute(query.encode()).fetchone() == (0,), table
        for table, column in (("event", "payload"), ("dead_letter", "payload"), ("message", "payload")):
            query = f"SELECT count(*) FROM durable.{table} WHERE position('s3cret'::bytea IN {column}) > 0"
            assert conn.execute(query.encode()).fetchone() == (0,), table
        row = conn.execute("SELECT kind::text, reason FROM durable.dead_letter").fetchone()
        assert row == ("p", "rejected")
