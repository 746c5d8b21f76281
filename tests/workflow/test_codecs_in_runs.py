"""Codecs on a real database: nothing of a workflow's values can be read there, and all of them arrive."""

from __future__ import annotations

import threading
from typing import Any

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from examples.codecs import Compress, Encrypt
from tests.support import wait_until
from tests.workflow.encoded import KEY, SECRET, MakeBroker, encrypt, readable, working


def test_nothing_can_be_read_and_everything_arrives(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[Compress(), encrypt()])
    failed = threading.Event()
    let = threading.Event()

    @durable.activity(broker=broker, queue_name="steps", max_retries=1, min_backoff=100, max_backoff=100)
    def charge(card: str) -> str:
        if not failed.is_set():
            failed.set()
            raise ValueError(f"try again with {card}")
        assert let.wait(30)
        return f"receipt {card}"

    @durable.activity(broker=broker, queue_name="steps", max_retries=0)
    def decline(card: str) -> None:
        try:
            raise KeyError(f"{SECRET} inner")
        except KeyError as e:
            raise RuntimeError(f"declined {card}") from e

    @durable.workflow(broker=broker, queue_name="runs")
    async def ship(what: str) -> str:
        memo = durable.info().memo["note"]
        raise LookupError(f"{what} {memo}")

    @durable.workflow(broker=broker, queue_name="runs")
    async def order(card: str) -> dict[str, Any]:
        seen: dict[str, Any] = {"memo": durable.info().memo["note"]}
        seen["signal"] = await durable.wait_for_signal("go")
        seen["receipt"] = await charge.execute(card)
        try:
            await decline.execute(card)
        except durable.ActivityFailed as e:
            seen["failure"] = [e.type, e.message, getattr(e.__cause__, "message", None)]
        try:
            await ship.options(memo={"note": f"{SECRET} child"}).execute(f"{SECRET} box")
        except durable.ChildWorkflowFailed as e:
            seen["child"] = [e.type, e.message]
        seen["local"] = await durable.local(str.upper, card)
        return seen

    handle = order.options(memo={"note": f"{SECRET} memo"}, workflow_id="o-1").start(f"{SECRET} card")
    assert SECRET not in readable(database_url)
    assert handle.describe().memo == {"note": f"{SECRET} memo"}
    with working(broker):
        handle.signal("go", f"{SECRET} signal")
        assert failed.wait(30)
        # Its first attempt has failed, its second is under way.
        wait_until(lambda: "last_failure" in readable(database_url) and "<encoded by" in readable(database_url))
        assert SECRET not in readable(database_url)
        let.set()
        assert handle.result(timeout=30) == {
            "memo": f"{SECRET} memo",
            "signal": f"{SECRET} signal",
            "receipt": f"receipt {SECRET} card",
            "failure": ["RuntimeError", f"declined {SECRET} card", f"'{SECRET} inner'"],
            "child": ["LookupError", f"{SECRET} box {SECRET} child"],
            "local": f"{SECRET} card".upper(),
        }
    everything = readable(database_url)
    assert SECRET not in everything
    assert SECRET.upper() not in everything
    assert "ValueError" not in everything
    history = handle.history()
    assert history[0].attributes["input"] == {"args": [f"{SECRET} card"], "kwargs": {}}
    # Another client, which has the codecs, reads all of it; one that has none says so.
    other = make_broker(codecs=[encrypt(), Compress()])
    assert durable.get_handle("o-1", broker=other).history() == history
    with pytest.raises(durable.CodecFailed, match="'aes-gcm', and this broker does not know it"):
        durable.get_handle("o-1", broker=make_broker()).result()


def test_a_run_that_is_dropped_from_memory_goes_on(make_broker: MakeBroker) -> None:
    broker = make_broker(codecs=[encrypt()])

    @durable.activity(broker=broker)
    def echo(value: str) -> str:
        return value

    @durable.workflow(broker=broker, queue_name="runs")
    async def order() -> list[Any]:
        seen = [await echo.execute("a"), await durable.local(str.upper, "b")]
        for _ in range(2):
            seen.append(await durable.wait_for_signal("more"))
            seen.append(await echo.execute(seen[-1]))
        return seen

    with working(broker):
        handle = order.start()
        for n in range(2):
            wait_until(lambda n=n: len(handle.history()) == 4 + 3 * n)  # type: ignore[misc]
            broker.runner.cache.clear()
            handle.signal("more", n)
        assert handle.result(timeout=30) == ["a", "B", 0, 0, 1, 1]


def test_codecs_come_and_go_under_running_workflows(make_broker: MakeBroker) -> None:
    def define(broker: durable.DurableBroker) -> durable.Workflow[[str], list[str]]:
        @durable.activity(broker=broker, queue_name="steps")
        def echo(value: str) -> str:
            return value

        @durable.workflow(broker=broker, queue_name="runs")
        async def order(value: str) -> list[str]:
            seen = [await echo.execute(value)]
            for _ in range(3):
                seen.append(await echo.execute(await durable.wait_for_signal("next")))
            return seen

        return order

    generations: list[list[Any]] = [[], [Compress()], [durable.decode_only(Compress()), encrypt()]]
    handle = None
    for n, codecs in enumerate(generations):
        broker = make_broker(codecs=codecs)
        order = define(broker)
        if n == 0:
            order.options(workflow_id="o").start("start")
        handle = durable.get_handle("o", broker=broker)
        with working(broker):
            handle.signal("next", f"signal {n}" * 100)
            wait_until(lambda n=n, h=handle: [e.type for e in h.history()].count("ActivityCompleted") == n + 2)  # type: ignore[misc]
    assert handle is not None
    assert handle.result(timeout=30) == ["start", *(f"signal {n}" * 100 for n in range(3))]


def test_without_its_codec_a_run_waits_and_says_why(make_broker: MakeBroker, database_url: str) -> None:
    def define(broker: durable.DurableBroker) -> durable.Workflow[[str], str]:
        @durable.activity(broker=broker, queue_name="steps", retry=policy, start_to_close=20)
        def echo(value: str) -> str:
            info = durable.activity_info()
            assert info is not None
            attempts.append(info.attempt)
            if info.attempt == 1:
                raise ValueError("once more")
            return value

        @durable.workflow(broker=broker, queue_name="runs")
        async def order(value: str) -> str:
            return await echo.execute(value)

        return order

    attempts: list[int] = []
    policy = durable.RetryPolicy(maximum_attempts=2, initial_interval=0.01)
    right, wrong = make_broker(codecs=[encrypt()]), make_broker()
    order = define(right)
    define(wrong)
    handle = order.options(workflow_id="o").start(SECRET)
    with working(wrong):
        wait_until(lambda: handle.describe().task_failure is not None)
        failure = handle.describe().task_failure
        assert failure is not None
        assert "codec 'aes-gcm'" in failure
        assert handle.status() == "running"
    with working(right, "runs"):
        wait_until(lambda: "ActivityScheduled" in [e.type for e in handle.history()])
    with working(wrong, "steps"), psycopg.connect(database_url, autocommit=True) as conn:

        def why() -> str | None:
            row = conn.execute("SELECT last_failure FROM durable.message WHERE kind = 'a'").fetchone()
            return row[0] if row else None

        wait_until(lambda: why() is not None)
        assert "codec 'aes-gcm'" in (why() or "")
        # It comes here again, ever later.
        wait_until(lambda: any(times > 2 for times in wrong.settler._sent_back.values()))
        assert handle.status() == "running"
    with working(right):
        assert handle.result(timeout=30) == SECRET
    assert attempts == [1, 2], "what was not tried is no attempt"


class Away(Encrypt):
    """Needs something that is away for a while."""

    def __init__(self) -> None:
        super().__init__({"k1": KEY}, "k1")
        self.away = threading.Event()

    def encode(self, data: bytes) -> bytes:
        if self.away.is_set():
            raise ConnectionError("the key service is away")
        return super().encode(data)


def test_a_codec_that_fails_for_a_while_fails_no_run(make_broker: MakeBroker) -> None:
    codec = Away()
    broker = make_broker(codecs=[codec])

    @durable.activity(broker=broker, queue_name="steps")
    def echo(value: str) -> str:
        return value

    @durable.workflow(broker=broker, queue_name="runs")
    async def order(value: str) -> str:
        return await echo.execute(value)

    handle = order.start("v")
    codec.away.set()
    with working(broker):
        wait_until(lambda: handle.describe().task_failure is not None)
        assert "the key service is away" in (handle.describe().task_failure or "")
        codec.away.clear()
        assert handle.result(timeout=30) == "v"
    codec.away.set()
    with pytest.raises(durable.CodecFailed, match="the arguments of 'order'"):
        order.start("v")


def test_another_codebase_with_the_same_codecs_runs_the_activity(make_broker: MakeBroker) -> None:
    here, there = make_broker(codecs=[encrypt()]), make_broker(codecs=[encrypt()])
    seen: list[Any] = []

    class Look(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
            seen.append((message.actor_name, message.args))

    there.add_middleware(Look())

    @dramatiq.actor(broker=there, queue_name="afar", actor_name="charge")
    def charge(cents: int) -> int:
        return cents * 2

    @durable.workflow(broker=here, queue_name="runs")
    async def order() -> Any:
        return await durable.activity_stub("charge", queue_name="afar").execute(21)

    with working(there), working(here):
        assert order.start().result(timeout=30) == 42
    assert seen == [("charge", (21,))]


@pytest.mark.administrator
def test_the_command_line_names_what_it_cannot_read(
    make_broker: MakeBroker, database_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = make_broker(codecs=[encrypt()])
    runner = CliRunner()

    def cli(*arguments: str) -> str:
        done = runner.invoke(main, ["--url", database_url, *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    @durable.workflow(broker=broker, queue_name="runs")
    async def order(card: str) -> Any:
        return await durable.activity_stub("charge", queue_name="afar").execute(card)

    @durable.workflow(broker=broker, queue_name="runs")
    async def fails(card: str) -> Any:
        raise ValueError(card)

    handle = order.options(workflow_id="o", memo={"a": SECRET}).start(SECRET)
    failing = fails.options(workflow_id="f").start(SECRET)
    with working(broker):
        wait_until(lambda: "ActivityScheduled" in [e.type for e in handle.history()])
        with pytest.raises(durable.WorkflowFailed, match=SECRET):
            failing.result(timeout=30)
    (tmp_path / "shop_codecs_app.py").write_text(
        "import dramatiq_durable as durable\nfrom examples.codecs import Encrypt\n"
        f"broker = durable.DurableBroker(codecs=[Encrypt({{'k1': {KEY!r}}}, 'k1')])\nother = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app = ("--app", "shop_codecs_app:broker")
    for command in (
        ("workflow", "show", "o"),
        ("workflow", "show", "f"),
        ("workflow", "history", "o"),
        ("workflow", "list", "--json"),
        ("stream", "peek", "afar"),
        ("stream", "peek", "afar", "--json"),
    ):
        plain, decoded = cli(*command), cli(*app, *command)
        assert SECRET not in plain
        assert "<encoded by aes-gcm, " in plain, plain
        assert SECRET in decoded
        assert "encoded" not in decoded
    cli(*app, "workflow", "signal", "o", "go", f'"{SECRET}"')
    cli(*app, "workflow", "start", "order", "--queue", "runs", "--args", f'["{SECRET}"]')
    assert SECRET not in readable(database_url)
    wrong = runner.invoke(main, ["--url", database_url, "--app", "shop_codecs_app:other", "workflow", "list"])
    assert wrong.exit_code == 2
    assert "name a DurableBroker" in wrong.output
    assert "No module" in runner.invoke(main, ["--app", "nowhere_at_all", "workflow", "list"]).output


def test_schedules_keep_what_they_start_encoded(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[encrypt()])

    @durable.workflow(broker=broker, queue_name="runs")
    async def report(who: str) -> list[Any]:
        return [who, durable.info().memo]

    durable.schedules.create(
        "daily", cron="0 0 1 1 *", target=report.options(memo={"m": SECRET}), args=[SECRET], broker=broker
    )
    assert SECRET not in readable(database_url)
    with working(broker):
        durable.schedules.trigger("daily", broker=broker)

        def runs() -> list[Any]:
            with psycopg.connect(database_url) as conn:
                return conn.execute("SELECT workflow_id FROM durable.run").fetchall()

        wait_until(lambda: bool(runs()))
        assert durable.get_handle(runs()[0][0], broker=broker).result(timeout=30) == [SECRET, {"m": SECRET}]
    assert SECRET not in readable(database_url)


def test_runs_that_go_on_for_others(make_broker: MakeBroker, database_url: str) -> None:
    broker = make_broker(codecs=[Compress(), encrypt()])
    tries: list[int] = []

    @durable.activity(broker=broker, queue_name="steps")
    def echo(value: str) -> str:
        return value

    @durable.workflow(broker=broker, queue_name="runs")
    async def counting(card: str, left: int) -> list[Any]:
        if left:
            durable.continue_as_new(await echo.execute(card), left - 1)
        seen = await durable.wait_for_signal("go")
        return [card, seen, durable.info().memo, durable.info().headers]

    @durable.workflow(broker=broker, queue_name="runs")
    async def flaky(card: str) -> list[Any]:
        tries.append(1)
        if durable.info().attempt == 1:
            raise ValueError(card)
        return [card, durable.info().memo, durable.info().headers]

    facts: Any = {"memo": {"m": f"{SECRET} memo"}, "headers": {"h": f"{SECRET} header"}}
    handle = counting.options(workflow_id="c", **facts).start(f"{SECRET} card", 2)
    retried = flaky.options(retry=durable.RetryPolicy(initial_interval=0.01), **facts).start(f"{SECRET} card")
    with working(broker):
        handle.signal("go", f"{SECRET} signal")
        expected = [f"{SECRET} card", facts["memo"], facts["headers"]]
        assert retried.result(timeout=30) == expected
        assert handle.result(timeout=30) == [expected[0], f"{SECRET} signal", *expected[1:]]
        assert SECRET not in readable(database_url)
        # What a reset takes over (the signal, too), it takes over as it is stored.
        again = durable.get_handle("c", broker=broker).reset(1)
        assert again.result(timeout=30) == [expected[0], f"{SECRET} signal", *expected[1:]]
    assert len(tries) == 2
    assert SECRET not in readable(database_url)


def test_updates_queries_and_what_comes_with_a_start(database_url: str, make_broker: MakeBroker) -> None:
    broker = make_broker(codecs=[encrypt()])

    @durable.workflow(broker=broker, queue_name="runs")
    async def keeps() -> list[str]:
        kept: list[str] = []

        def check(value: str) -> None:
            if value in kept:
                raise ValueError(f"{value} is there")

        @durable.on_update("keep", validator=check)
        def keep(value: str) -> str:
            if value == f"{SECRET}-odd":
                raise LookupError(value)
            kept.append(value)
            return f"{value} is kept"

        durable.on_signal("note")(kept.append)
        durable.on_query("kept")(lambda: kept)

        @durable.on_query("fail")
        def fail(value: str) -> None:
            raise KeyError(value)

        await durable.wait_for_signal("end")
        return kept

    secret = f"{SECRET}-1"
    handle = keeps.options(workflow_id="k", with_update=("keep", secret), update_id="u").start()
    keeps.options(workflow_id="k", with_signal=("note", f"{SECRET}-2")).start()
    query = threading.Thread(target=lambda: handle.query("kept", timeout=20))
    query.start()
    wait_until(lambda: b"kept" in readable(database_url).encode(), message="the query waits")
    with working(broker, "runs"):
        query.join()
        assert handle.get_update().result(timeout=10) == f"{secret} is kept"
        assert handle.query("kept") == [secret, f"{SECRET}-2"]
        with pytest.raises(durable.UpdateRejected, match=f"{secret} is there"):
            handle.update("keep", secret, timeout=10)
        with pytest.raises(durable.UpdateFailed, match=f"{SECRET}-odd"):
            handle.update("keep", f"{SECRET}-odd", timeout=10)
        with pytest.raises(durable.QueryFailed, match=SECRET) as caught:
            handle.query("fail", SECRET)
        assert caught.value.type == "KeyError"
        assert "wait_for_signal" in (handle.describe().stack or "")
        assert SECRET not in readable(database_url)
