"""Codecs around what runs are told and asked, what they put out, and what their activities and people say."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner
from dramatiq.results import ResultFailure, Results

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.delivery import current_delivery
from dramatiq_durable.results import PostgresBackend
from dramatiq_durable.workflow import asking
from examples.codecs import Compress
from tests.support import wait_until
from tests.workflow.encoded import KEY, SECRET, MakeBroker, encrypt, readable, working


def rows(url: str, query: str) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as conn:
        return conn.execute(query).fetchall()  # type: ignore[arg-type]


def ask(handle: durable.WorkflowHandle[Any], name: str, *args: Any) -> asking._Query:
    """A query that is asked, and whose answer nobody has taken yet."""
    query = asking._Query(handle, name, args, 30)
    handle._read(query.ask)
    return query


def taken(query: asking._Query) -> Any:
    return query.outcome(query.handle._read(lambda conn: query.handle.broker.procedures.take_answers(
        conn, [query.wanted()]))[query.wanted()])  # fmt: skip


def test_updates_queries_and_signals(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[Compress(), encrypt()])
    met: list[str] = []

    class Meet(durable.WorkflowInterceptor):
        async def execute_workflow(self, ctx: durable.CallContext, call_next: durable.CallNext) -> Any:
            # A query that brings the run back needs it, too.
            note.start()
            return await call_next(ctx)

    @durable.activity(broker=broker, queue_name="steps")
    def note() -> None:
        met.append("note")

    broker.interceptors = type(broker.interceptors)([Meet()])

    @durable.workflow(broker=broker, queue_name="runs")
    async def order() -> list[Any]:
        items: list[str] = []

        def refuse(item: str) -> None:
            if "bad" in item:
                raise ValueError(f"refused {item}")

        @durable.on_update("add", validator=refuse)
        def add(item: str) -> str:
            if "broken" in item:
                raise KeyError(item)
            items.append(item)
            return f"added {item}"

        @durable.on_query("find")
        def find(item: str) -> list[str]:
            if "bad" in item:
                raise LookupError(f"no {item}")
            return [i for i in items if i == item]

        items.append(await durable.wait_for_signal("end"))
        items.append(await durable.wait_for_signal("end"))
        return items

    handle = order.options(
        workflow_id="o", memo={"note": f"{SECRET} memo"}, with_update=("add", f"{SECRET} first"), update_id="u-1"
    ).start()
    other = order.options(workflow_id="p", with_signal=("end", f"{SECRET} with")).start()
    handle._request("add", (f"{SECRET} second",), "u-2", "completed")
    queries = [ask(handle, "find", f"{SECRET} first"), ask(handle, "find", f"{SECRET} bad")]
    assert durable.batch_signal("status = 'running'", "end", f"{SECRET} batch", broker=broker) == 2
    # Whom a batch tells, it need not understand.
    assert durable.batch_signal("workflow_id = 'o'", "other", broker=make_broker()) == 1
    assert SECRET not in readable(database_url)
    assert durable.list_workflows("workflow_id = 'o'", broker=broker)[0].memo == {"note": f"{SECRET} memo"}
    with working(broker):
        assert handle.get_update("u-1").result(timeout=30) == f"added {SECRET} first"
        assert handle.get_update("u-2").result(timeout=30) == f"added {SECRET} second"
        with pytest.raises(durable.UpdateRejected, match=f"refused {SECRET} bad"):
            handle.update("add", f"{SECRET} bad", timeout=30)
        with pytest.raises(durable.UpdateFailed, match=f"{SECRET} broken"):
            handle.update("add", f"{SECRET} broken", timeout=30)
        assert other.result(timeout=30) == [f"{SECRET} with", f"{SECRET} batch"]
        wait_until(lambda: rows(database_url, "SELECT answered FROM durable.run_query") == [(True,)] * 2)
        assert SECRET not in readable(database_url)
        assert taken(queries[0]) == [f"{SECRET} first"]
        with pytest.raises(durable.QueryFailed, match=f"no {SECRET} bad"):
            taken(queries[1])
        assert handle.describe().stack
        handle.signal("end", f"{SECRET} end")
        assert handle.result(timeout=30)[-1] == f"{SECRET} end"
        assert handle.query("find", f"{SECRET} end") == [f"{SECRET} end"]
        assert set(met) == {"note"}  # as often as the code was brought back
        with pytest.raises(durable.CodecFailed, match="'aes-gcm', and this broker does not know it"):
            durable.get_handle("o", broker=make_broker()).get_update("u-1").result()
        # Asked without the codecs, it is answered with them.
        with pytest.raises(durable.CodecFailed, match="'aes-gcm', and this broker does not know it"):
            durable.get_handle("o", broker=make_broker()).query("find", "nothing bad")
    assert SECRET not in readable(database_url)


@pytest.mark.administrator
def test_heartbeats_tokens_and_what_cannot_be_stored(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[encrypt()])
    tokens: dict[str, str] = {}
    found: list[Any] = []
    let = threading.Event()

    @durable.activity(broker=broker, queue_name="steps", max_retries=1, min_backoff=1, max_backoff=2)
    def copy() -> Any:
        info = durable.activity_info()
        assert info is not None
        if info.attempt == 1:
            durable.heartbeat({"at": f"{SECRET} page"})
            assert let.wait(30)
            raise ValueError(f"{SECRET} lost")
        found.append(info.heartbeat_details)
        return found[-1]

    @durable.activity(broker=broker, queue_name="steps")
    def later(name: str) -> None:
        tokens[name] = durable.complete_later()

    @durable.activity(broker=broker, queue_name="steps", max_retries=0)
    def stores() -> None:
        with durable.transaction() as conn:
            conn.execute("CREATE TABLE public.once (card text PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
            conn.execute("INSERT INTO public.once VALUES (%s), (%s)", (f"{SECRET} card",) * 2)

    @durable.workflow(broker=broker, queue_name="runs")
    async def run() -> list[Any]:
        storing = stores.start()
        calls = asyncio.gather(copy.execute(), later.execute("a"), later.execute("b"), return_exceptions=True)
        copied, first, second = await calls
        storing.cancel()
        assert isinstance(second, durable.ActivityFailed)
        return [copied, first, second.message]

    handle = run.start()
    with working(broker):
        details = "SELECT 1 FROM durable.activity WHERE details IS NOT NULL"
        wait_until(lambda: len(tokens) == 2 and bool(rows(database_url, details)))
        wait_until(lambda: bool(rows(database_url, "SELECT 1 FROM durable.message WHERE last_failure LIKE '<enc%'")))
        assert SECRET not in readable(database_url)
        pending = handle.describe().pending
        assert {"at": f"{SECRET} page"} in [p.heartbeat_details for p in pending]
        assert any(f"{SECRET} card" in (p.last_failure or "") for p in pending)
        durable.heartbeat_activity(tokens["a"], f"{SECRET} beat", broker=broker)
        assert f"{SECRET} beat" in [p.heartbeat_details for p in handle.describe().pending]
        assert SECRET not in readable(database_url)
        let.set()
        durable.complete_activity(tokens["a"], f"{SECRET} done", broker=broker)
        durable.fail_activity(tokens["b"], RuntimeError(f"{SECRET} declined"), broker=broker)
        assert SECRET not in readable(database_url)
        assert handle.result(timeout=30) == [{"at": f"{SECRET} page"}, f"{SECRET} done", f"{SECRET} declined"]
    assert SECRET not in readable(database_url)


@pytest.mark.administrator
def test_topics_and_output(make_broker: MakeBroker, database_url: str, tmp_path: Any, monkeypatch: Any) -> None:
    broker = make_broker(codecs=[Compress(), encrypt()])
    given: list[Any] = []

    @dramatiq.actor(broker=broker, queue_name="away", max_retries=1, min_backoff=1, max_backoff=2)
    def listen(payload: Any) -> None:
        info = durable.event_info()
        assert info is not None
        given.append((payload, info.workflow_id))
        if payload != f"{SECRET} good":
            raise ValueError(f"{SECRET} {payload}")

    durable.subscribe("news")(listen)

    @durable.workflow(broker=broker, queue_name="runs")
    async def emitter() -> None:
        await durable.output(f"{SECRET} line")
        await durable.output(None)
        await durable.emit("news", f"{SECRET} good")
        await durable.emit("news", f"{SECRET} bad")
        await durable.emit("news", None)

    with working(broker):
        pass
    handle = emitter.options(workflow_id="e").start()
    with working(broker, "runs"):
        assert list(handle.follow()) == [(0, f"{SECRET} line"), (1, None)]
        handle.result(timeout=30)
    assert SECRET not in readable(database_url)

    def letters() -> list[Any]:
        return rows(database_url, "SELECT failure FROM durable.dead_letter")

    with working(broker):
        wait_until(lambda: len(letters()) == 2)
    assert given == [(f"{SECRET} good", "e"), *[(f"{SECRET} bad", "e")] * 2, *[(None, "e")] * 2]
    assert SECRET not in readable(database_url)
    (tmp_path / "news_codecs_app.py").write_text(
        "import dramatiq_durable as durable\nfrom examples.codecs import Compress, Encrypt\n"
        f"broker = durable.DurableBroker(codecs=[Compress(), Encrypt({{'k1': {KEY!r}}}, 'k1')])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def cli(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["--url", database_url, *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    app = ("--app", "news_codecs_app:broker")
    for command in (("list", "--limit", "1"), ("show", "1")):
        assert "<encoded by " in cli("dead-letter", *command)
        shown = cli(*app, "dead-letter", *command)
        assert SECRET in shown
        assert "<encoded" not in shown
    # One that is brought back is given once more, and is sealed as before.
    cli("dead-letter", "redrive", "--yes", "--all")
    given.clear()
    with working(broker):
        wait_until(lambda: len(letters()) == 2)
    assert (f"{SECRET} bad", "e") in given
    assert SECRET not in readable(database_url)
    # Where the codecs are missing, it waits for who has them.
    emitter.start()
    with working(broker, "runs"):
        wait_until(lambda: rows(database_url, "SELECT count(*) FROM durable.message WHERE kind = 'p'") == [(1,)])
    other = make_broker()
    dramatiq.actor(broker=other, queue_name="away", actor_name="listen")(lambda payload: given.append("read"))
    with working(other):
        wait_until(
            lambda: bool(rows(database_url, "SELECT 1 FROM durable.message WHERE last_failure LIKE '%aes-gcm%'"))
        )
    assert "read" not in given


def test_escalations(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[encrypt()])
    escalations = durable.escalations

    @durable.workflow(broker=broker, queue_name="runs")
    async def order() -> Any:
        answer = await durable.escalate(role="boss", payload={"why": f"{SECRET} why"}, metadata={"region": "eu"})
        return [answer]

    handle = order.start()
    with working(broker):
        wait_until(lambda: bool(escalations.list(role="boss", broker=broker)))
        assert SECRET not in readable(database_url)
        (found,) = escalations.list(metadata={"region": "eu"}, broker=broker)
        assert found.payload == {"why": f"{SECRET} why"}
        assert escalations.get(found.id, broker=broker) == found
        claimed = escalations.claim_next(role="boss", by="ann", broker=broker)
        assert claimed is not None
        assert claimed.payload == found.payload
        resolved = escalations.resolve(found.id, f"{SECRET} answer", "ann", broker=broker)
        assert resolved.result == f"{SECRET} answer"
        assert SECRET not in readable(database_url)
        assert handle.result(timeout=30) == [f"{SECRET} answer"]
    assert SECRET not in readable(database_url)
    with pytest.raises(durable.CodecFailed, match="the payload of an escalation"):
        escalations.get(found.id, broker=make_broker())
    shown = CliRunner().invoke(main, ["--url", database_url, "escalation", "show", found.id], catch_exceptions=False)
    assert shown.output.count("<encoded by aes-gcm") == 2


def test_results_callbacks_and_how_things_ended(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[encrypt()])
    backend = PostgresBackend(broker)
    broker.add_middleware(Results(backend=backend))
    heard: list[Any] = []
    ids: list[str] = []

    # Nobody takes them yet: they can be looked at.
    @dramatiq.actor(broker=broker, queue_name="back", max_retries=1, min_backoff=1, max_backoff=2)
    def back(message: dict[str, Any], result: Any) -> None:
        heard.append((message["args"], result))
        if len(heard) == 1:
            raise ValueError(f"{SECRET} not yet")

    @durable.activity(broker=broker, queue_name="steps", store_results=True, on_success="back", max_retries=0)
    def charge(card: str) -> str:
        ids.append(str(current_delivery.get().message_id))  # type: ignore[union-attr]
        if "bad" in card:
            raise ValueError(card)
        return f"{SECRET} receipt"

    policy = durable.RetryPolicy(maximum_attempts=2, initial_interval=0.01)

    @durable.activity(broker=broker, queue_name="steps", start_to_close=0.5, retry=policy)
    def slow(card: str) -> None:
        if durable.activity_info().attempt == 1:  # type: ignore[union-attr]
            raise ValueError(f"{SECRET} first")
        for _ in range(1000):
            time.sleep(0.01)

    @durable.workflow(broker=broker, queue_name="runs")
    async def order() -> list[Any]:
        seen = [await charge.execute(f"{SECRET} card")]
        for call in (charge.execute(f"{SECRET} bad"), slow.execute(f"{SECRET} card")):
            try:
                await call
            except durable.ActivityFailed as e:
                seen.append((e.message, e.__cause__ and (e.__cause__.type, e.__cause__.message)))  # type: ignore[attr-defined]
        return seen

    with working(broker, "runs", "steps"):
        handle = order.start()
        assert handle.result(timeout=30) == [
            f"{SECRET} receipt",
            [f"{SECRET} bad", None],
            ["start_to_close: an attempt did not end within 0.5 s", ["ValueError", f"{SECRET} first"]],
        ]
        other = order.start()
        other.terminate(f"{SECRET} why")
        with pytest.raises(durable.WorkflowTerminated, match=f"{SECRET} why"):
            other.result(timeout=30)
        assert durable.batch_terminate("workflow_id = 'none'", f"{SECRET} why", broker=broker) == 0
    assert len(rows(database_url, "SELECT 1 FROM durable.message WHERE actor = 'back'")) >= 1
    assert len(rows(database_url, "SELECT 1 FROM durable.result")) >= 2
    assert SECRET not in readable(database_url)
    first, second = (dramatiq.Message("steps", "charge", (), {}, {}, message_id=i) for i in ids[:2])
    assert backend.get_result(first, block=True) == f"{SECRET} receipt"
    with pytest.raises(ResultFailure, match=f"{SECRET} bad"):
        backend.get_result(second)
    with pytest.raises(durable.CodecFailed, match="this broker does not know it"):
        PostgresBackend(make_broker()).get_result(first)
    failed = "SELECT 1 FROM durable.message WHERE actor = 'back' AND last_failure LIKE '<enc%'"
    before = len(rows(database_url, "SELECT 1 FROM durable.message WHERE actor = 'back'"))
    with working(broker, "back"):
        wait_until(lambda: bool(heard))
        wait_until(lambda: len(heard) == before + 1 or bool(rows(database_url, failed)))
        assert SECRET not in readable(database_url)
        wait_until(lambda: len(heard) == before + 1)
    assert heard[0] == ([f"{SECRET} card"], f"{SECRET} receipt")
