"""What a scoped login may do: each cell of the table in docs/scoped-workers.md, tried by a login of that kind.

Each row is tried where the login may, at a stream of its own, and at a foreign one.  Whatever is refused has to be
refused with an error of ours, and what is foreign has to look as if it were not there.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from typing import Any

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner
from dramatiq import group, pipeline
from dramatiq.rate_limits import ConcurrentRateLimiter
from dramatiq.results import ResultMissing, Results
from psycopg import sql

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.metrics.gauges import Gauges
from dramatiq_durable.settings import Settings
from tests.support import ROOT, wait_until

KINDS = ("worker", "activity", "workflow", "producer", "monitor")
MINE, FOREIGN = "mine", "foreign"
PAGE = ROOT / "docs" / "scoped-workers.md"


def table() -> dict[str, dict[str, str]]:
    """The page's table: feature, kind, what the cell says."""
    rows: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 1 + len(KINDS) and set(cells[1]) - {"-"} and cells[1] != "`worker`":
            rows[cells[0]] = dict(zip(KINDS, cells[1:], strict=True))
    return rows


class Unseen(Exception):
    """Nothing is there, as far as this login can see."""


IDLE = """
    SELECT 1 FROM durable.worker w WHERE %s = ANY (w.stream_ids) AND w.waiting_until > clock_timestamp()
      AND NOT EXISTS (SELECT 1 FROM durable.message m WHERE m.stream_id = %s AND m.lease_token IS NOT NULL)
      AND NOT EXISTS (SELECT 1 FROM durable.message m WHERE m.stream_id = %s AND m.kind <> 'c'
                      AND m.due_at BETWEEN clock_timestamp() AND clock_timestamp() + interval '1 hour')
"""

#: What a refusal looks like; anything else that is raised fails the test.
REFUSED = (
    durable.NotPermitted,
    durable.WorkflowNotFound,
    durable.EscalationNotFound,
    durable.ScheduleNotFound,
    Unseen,
)


def declare(broker: durable.DurableBroker, queue: str, acted: list[str]) -> dict[str, Any]:
    """The application, on one queue; in each broker that is to know it."""

    def flaky() -> str:
        if dramatiq.middleware.CurrentMessage.get_current_message().options.get("retries", 0) == 0:
            raise ValueError("once more")
        return "done"

    def effect() -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO public.effect VALUES (1)")

    def act() -> int:
        acted.append(queue)
        return 7

    async def steps() -> int:
        await durable.sleep(0.01)
        return int(await durable.wait_for_signal("go")) + 1

    async def stands() -> Any:
        durable.on_query("where")(lambda: "here")
        durable.on_update("change")(lambda n: n)
        return await durable.escalate(role="clerk", subject=queue)

    async def stateful() -> str:
        await durable.upsert_search({"customer": "c"})
        await durable.entity().set("a", 1)
        await durable.output("x")
        await durable.emit("topic", 1)
        with pytest.raises(durable.Timeout):
            await durable.escalate(role="nobody", timeout=0.01)
        return "done"

    options: dict[str, Any] = {"broker": broker, "queue_name": queue}
    return {
        "plain": dramatiq.actor(lambda: None, actor_name=f"plain_{queue}", **options),
        "flaky": dramatiq.actor(
            flaky, actor_name=f"flaky_{queue}", store_results=True, min_backoff=1, max_backoff=2, **options
        ),
        "effect": dramatiq.actor(effect, actor_name=f"effect_{queue}", **options),
        "act": durable.activity(actor_name=f"act_{queue}", **options)(act),
        "steps": durable.workflow(name=f"steps_{queue}", **options)(steps),
        "stands": durable.workflow(name=f"stands_{queue}", **options)(stands),
        "stateful": durable.workflow(name=f"stateful_{queue}", **options)(stateful),
    }


class World:
    """A database with an administrator's application on two queues, and a scoped login that was granted one of them."""

    def __init__(self, url: str, kind: str, stack: ExitStack) -> None:
        self.url, self.kind = url, kind
        self.look = stack.enter_context(psycopg.connect(url, autocommit=True))
        self.look.execute("CREATE TABLE public.effect (n int)")
        self.admin = stack.enter_context(closing(self.broker(url)))
        self.backend = durable.results.PostgresBackend(self.admin)
        self.theirs = {queue: declare(self.admin, queue, []) for queue in (MINE, FOREIGN)}
        self.token: list[str] = []
        #: Where the login's worker has run activities.
        self.acted: list[str] = []
        self.own = self._calls()
        self._prepare()
        consumes = [MINE] if kind in ("worker", "activity", "workflow") else []
        produces = [MINE] if kind != "monitor" else []
        self.credential = durable.provision_worker_role(url, name=kind, kind=kind, streams=consumes, produce=produces)
        stack.callback(durable.revoke_worker_role, kind, url=url)
        stack.callback(self._take_back)
        role = sql.Identifier(self.credential.role)
        self.look.execute(sql.SQL("GRANT INSERT ON public.effect TO {}").format(role))
        self.scoped = stack.enter_context(closing(self.broker(None, worker_credentials=self.credential)))
        self.ours = {queue: declare(self.scoped, queue, self.acted) for queue in (MINE, FOREIGN)}

    def broker(self, url: str | None, **options: Any) -> durable.DurableBroker:
        broker = durable.DurableBroker(url, settings=Settings(poll_interval=0.2), **options)
        broker.add_middleware(dramatiq.middleware.CurrentMessage())
        broker.add_middleware(Results(backend=durable.results.PostgresBackend(broker)))
        return broker

    def _calls(self) -> Any:
        """The administrator's own workflow: it calls the activities of the two queues, and waits for a token's end."""

        def parked() -> None:
            self.token.append(durable.complete_later())

        activity = durable.activity(broker=self.admin, queue_name="admin", actor_name="parked")(parked)

        async def calls(queue: str) -> Any:
            if queue == "parked":
                return await activity.execute()
            return await self.theirs[queue]["act"].execute()

        return durable.workflow(broker=self.admin, queue_name="admin", name="calls")(calls)

    def _prepare(self) -> None:
        """Runs that stand at an escalation, schedules, results; nothing of it is anybody's but the administrator's."""
        worker = dramatiq.Worker(self.admin, worker_timeout=20, worker_threads=2)
        worker.start()
        self.results = {}
        try:
            for queue in (MINE, FOREIGN):
                self.theirs[queue]["stands"].options(workflow_id=f"stands-{queue}").start()
                durable.schedules.create(
                    f"tick-{queue}", cron="0 0 1 1 *", target=self.theirs[queue]["plain"], broker=self.admin
                )
                self.results[queue] = self.theirs[queue]["flaky"].send()
            wait_until(lambda: len(self.escalations(self.admin)) == 2, timeout=30)
            for message in self.results.values():
                assert message.get_result(backend=self.backend, block=True, timeout=20_000) == "done"
        finally:
            worker.stop()

    def _take_back(self) -> None:
        self.look.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(self.credential.role)))

    def escalations(self, broker: durable.DurableBroker) -> dict[str, str]:
        return {e.subject or "": e.id for e in durable.escalations.list(role="clerk", broker=broker)}

    def work(self, queue: str, done: Callable[[], bool]) -> None:
        """A worker of the login takes what the queue has, until something is done.  Raises Unseen if it finds none."""
        stream = self.admin.stream_id(queue)
        # What a worker's consumer asks first, and its claimer.
        self.scoped.stream_id(queue)
        if self.kind == "producer":
            self.scoped.commit.call(
                lambda conn: self.scoped.procedures.register_worker(conn, "h", 1, 1, [stream], 30_000, 3)
            )
        worker = dramatiq.Worker(self.scoped, queues={queue}, worker_timeout=20, worker_threads=2)
        worker.start()
        looks: list[int] = []
        try:

            def settled() -> bool:
                if done():
                    return True
                # It waits to be woken, nothing is with it, and nothing of this (a retry, a timer) will come by itself;
                # and so it was through two looks of its own.
                claimer = self.scoped.claimer
                if claimer is None or not self.look.execute(IDLE, [stream] * 3).fetchone():
                    looks.clear()
                    return False
                looks.append(claimer._looks)
                if looks[-1] >= looks[0] + 3 and not done():
                    raise Unseen(queue)
                return False

            wait_until(settled, timeout=20, message=f"{self.kind} at {queue}")
        finally:
            worker.stop()


# --- the rows: each does something at a queue, and raises where that is refused ---------------------------------------


def end(handle: Any) -> None:
    with suppress(durable.WorkflowClosed):
        handle.terminate()


def sends(w: World, queue: str) -> None:
    plain = w.ours[queue]["plain"]
    plain.send_with_options(delay=86_400_000 * 2)
    plain.send_with_options(delay=86_400_000 * 2, broker_priority=3, unique_key=f"k{uuid.uuid4()}")
    w.scoped.enqueue_many([plain.message_with_options(delay=86_400_000 * 2) for _ in range(3)])
    pipeline([plain.message(), plain.message()], broker=w.scoped).run(delay=86_400_000 * 2)
    group([plain.message(), plain.message()], broker=w.scoped).run(delay=86_400_000 * 2)
    with psycopg.connect(w.credential.url) as conn, durable.using(conn):
        plain.send_with_options(delay=86_400_000 * 2)


def runs_actors(w: World, queue: str) -> None:
    message = w.theirs[queue]["flaky"].send()

    def done() -> bool:
        try:
            return bool(message.get_result(backend=w.backend) == "done")
        except ResultMissing:
            return False

    w.work(queue, done)


def transacts(w: World, queue: str) -> None:
    count = "SELECT count(*) FROM public.effect"
    before = w.look.execute(count).fetchone()
    w.theirs[queue]["effect"].send()
    w.work(queue, lambda: w.look.execute(count).fetchone() != before)


def runs_activities(w: World, queue: str) -> None:
    worker = dramatiq.Worker(w.admin, queues={"admin"}, worker_timeout=20, worker_threads=1)
    worker.start()
    try:
        handle = w.own.start(queue)
        wait_until(lambda: any(e.type == "ActivityScheduled" for e in handle.history()), timeout=20)
        w.work(queue, lambda: queue in w.acted)
        assert handle.result(timeout=20) == 7
    finally:
        end(handle)
        worker.stop()


def completes_by_token(w: World, queue: str) -> None:
    worker = dramatiq.Worker(w.admin, queues={"admin"}, worker_timeout=20, worker_threads=1)
    worker.start()
    try:
        w.token.clear()
        handle = w.own.start("parked")
        token = wait_until(lambda: w.token)[0]
        wait_until(lambda: w.look.execute("SELECT 1 FROM durable.activity WHERE token IS NOT NULL").fetchone())
        durable.heartbeat_activity(token, 1, broker=w.scoped)
        durable.complete_activity(token, 5, broker=w.scoped)
        assert handle.result(timeout=20) == 5
    finally:
        end(handle)
        worker.stop()


def runs_workflows(w: World, queue: str) -> None:
    handle = w.theirs[queue]["steps"].start()
    handle.signal("go", 1)
    try:
        w.work(queue, lambda: handle.status() == "completed")
    finally:
        end(handle)


def keeps_state(w: World, queue: str) -> None:
    handle = w.theirs[queue]["stateful"].start()
    try:
        w.work(queue, lambda: handle.status() == "completed")
    finally:
        end(handle)


def starts(w: World, queue: str) -> None:
    handle = w.ours[queue]["steps"].options(workflow_id=f"started-{queue}-{uuid.uuid4()}", delay=86_400).start()
    durable.get_handle(handle.workflow_id, broker=w.admin).terminate()


def handle_at(w: World, queue: str) -> Any:
    """A run at a queue: the administrator's, or (`own`) one that the login has started."""
    if queue != "own":
        return durable.get_handle(f"stands-{queue}", broker=w.scoped)
    workflow_id = f"own-{uuid.uuid4()}"
    w.ours[MINE]["steps"].options(workflow_id=workflow_id, delay=86_400).start()
    return durable.get_handle(workflow_id, broker=w.scoped)


def same(*calls: Callable[[], Any]) -> None:
    """All of these are allowed, or all are refused."""
    refused = []
    for call in calls:
        try:
            call()
        except (durable.QueryTimedOut, durable.Timeout):
            pass
        except REFUSED as e:
            refused.append(e)
    assert len(refused) in (0, len(calls)), refused
    if refused:
        raise refused[0]


def speaks(w: World, queue: str) -> None:
    handle = handle_at(w, queue)
    same(
        lambda: handle.signal("hello", 1),
        lambda: handle.query("where", timeout=0.05),
        lambda: handle.update("change", 1, timeout=0.05),
        handle.cancel if queue == "own" else lambda: handle.signal("bye"),
    )


def reads(w: World, queue: str) -> None:
    handle = handle_at(w, queue)
    same(
        handle.status,
        handle.describe,
        handle.history,
        handle.export,
        handle.children,
        lambda: handle.result(timeout=0.05),
        lambda: next(handle.follow()) if queue == "none" else handle.describe().search,
    )


def ends(w: World, queue: str) -> None:
    if queue == "own":
        handle_at(w, queue).terminate()
        return
    # A run of its own to be ended: what others stand at stays.
    workflow_id = f"ends-{queue}-{uuid.uuid4()}"
    theirs = w.theirs[queue]["steps"].options(workflow_id=workflow_id, delay=86_400).start()
    handle = durable.get_handle(workflow_id, broker=w.scoped)
    try:
        same(lambda: handle.reset(1), handle.terminate)
    finally:
        end(theirs)


def lists(w: World, queue: str) -> None:
    handle = handle_at(w, queue)
    where = f"workflow_id = '{handle.workflow_id}'"
    found = durable.list_workflows(where, broker=w.scoped)
    assert durable.count_workflows(where, broker=w.scoped) == len(found)
    assert durable.batch_signal(where, "many", broker=w.scoped) == len(found)
    if not found:
        raise Unseen(queue)


def decides(w: World, queue: str) -> None:
    ids = w.escalations(w.scoped)
    key = w.escalations(w.admin)[queue]
    durable.escalations.get(key, broker=w.scoped)
    durable.escalations.claim(key, by="me", broker=w.scoped)
    durable.escalations.release(key, by="me", broker=w.scoped)
    assert ids[queue] == key


def schedules(w: World, queue: str) -> None:
    name = f"mine-{queue}-{uuid.uuid4()}"
    durable.schedules.create(name, cron="0 0 1 1 *", target=w.ours[queue]["plain"], broker=w.scoped)
    durable.schedules.pause(name, broker=w.scoped)
    durable.schedules.describe(name, broker=w.scoped)
    durable.schedules.backfill(
        name, datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 6, 1, tzinfo=UTC), broker=w.scoped
    )
    durable.schedules.delete(name, broker=w.scoped)


def subscribes(w: World, queue: str) -> None:
    durable.topics.register(w.scoped, [("topic", queue, w.ours[queue]["plain"].actor_name, 0)])
    assert durable.unsubscribe("topic", w.ours[queue]["plain"])


def gets_results(w: World, queue: str) -> None:
    try:
        w.results[queue].copy().get_result(backend=durable.results.PostgresBackend(w.scoped))
    except ResultMissing as e:
        raise Unseen(queue) from e


def aborts(w: World, queue: str) -> None:
    message = w.theirs[queue]["plain"].send_with_options(delay=86_400_000 * 2)
    if durable.abort(message.message_id, broker=w.scoped) == "missing":
        raise Unseen(queue)


def limits(w: World, queue: str) -> None:
    limiter = ConcurrentRateLimiter(durable.rate_limits.PostgresBackend(w.scoped), f"limit-{queue}", limit=1)
    with limiter.acquire():
        pass


def counts(w: World, queue: str) -> None:
    def joins() -> None:
        with suppress(dramatiq.errors.QueueJoinTimeout):
            w.scoped.join(queue, timeout=20)

    same(lambda: w.scoped.get_queue_message_counts(queue), joins)


def command(w: World, *arguments: str) -> None:
    done = CliRunner().invoke(main, ["--url", w.credential.url, *arguments], catch_exceptions=False)
    if done.exit_code == 0:
        return
    assert "Traceback" not in done.output
    assert re.search("administrator|no such stream or workflow", done.output), done.output
    raise durable.NotPermitted(done.output)


def monitors(w: World, queue: str) -> None:
    def exports() -> None:
        with closing(Gauges(w.scoped.database, 60)) as gauges:
            gauges.check()

    same(
        lambda: command(w, "stream", "list"),
        lambda: command(w, "worker", "list"),
        lambda: command(w, "top", "--once", "--interval", "100ms"),
        exports,
    )


def operates(w: World, queue: str) -> None:
    same(
        lambda: command(w, "stream", "peek", queue),
        lambda: command(w, "stream", "pause", queue),
        lambda: command(w, "stream", "purge", queue, "--yes"),
        lambda: command(w, "dead-letter", "list"),
        lambda: command(w, "prune", "--yes", "--runs", "1d"),
        lambda: w.scoped.flush(queue),
        lambda: durable.list_worker_roles(url=w.credential.url),
        lambda: durable.provision_worker_role(w.credential.url, name="more", streams=[queue]),
        lambda: durable.revoke_worker_role(w.kind, url=w.credential.url),
    )


ROWS: dict[str, Callable[[World, str], None]] = {
    "send: delays, priorities, unique keys, groups, pipelines, `using`": sends,
    "take messages: actors with retries, results, time limits": runs_actors,
    "`transaction()`, on tables that their owner granted": transacts,
    "take activities": runs_activities,
    "end an activity by its token": completes_by_token,
    "carry runs: timers, signals, activities, children, updates, queries": runs_workflows,
    "inside a run: search attributes, `entity`, `output`, `emit`, `escalate`": keeps_state,
    "start workflows": starts,
    "`signal`, `cancel`, `query`, `update`": speaks,
    "`status`, `result`, `describe`, `history`, `export`, `children`": reads,
    "`terminate`, `reset`": ends,
    "`list_workflows`, `count_workflows`, `batch_signal` and its like": lists,
    "`escalations`: list, get, claim, release, resolve": decides,
    "`schedules`: create, pause, backfill, delete": schedules,
    "`subscribe`, `unsubscribe`": subscribes,
    "`message.get_result()`": gets_results,
    "`abort`": aborts,
    "rate limiters": limits,
    "`broker.join`, `get_queue_message_counts`": counts,
    "`stream list`, `worker list`, `top`, `exporter`": monitors,
    "peek, pause, purge, flush, dead letters, prune, roles": operates,
}
#: The rows in which it matters who has started a run.
OF_RUNS = (speaks, reads, ends, lists)


def outcome(w: World, do: Callable[[World, str], None], queue: str) -> str | None:
    """None, or why it was refused."""
    try:
        do(w, queue)
    except REFUSED as e:
        return str(e)
    return None


def tried(w: World, do: Callable[[World, str], None]) -> str:
    """What a cell has to say."""
    mine, foreign = outcome(w, do, MINE), outcome(w, do, FOREIGN)
    if mine is None:
        return "works" if foreign is None else "its streams"
    assert foreign is not None
    if do in OF_RUNS and w.kind != "monitor" and outcome(w, do, "own") is None:
        return "what it started"
    return "NotPermitted"


@pytest.fixture
def world(database_url: str, request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(database_url, request.param, stack)


def test_the_table_has_every_row() -> None:
    assert list(table()) == list(ROWS)


@pytest.mark.administrator
@pytest.mark.parametrize("world", KINDS, indirect=True)
def test_each_cell(world: World) -> None:
    found = {feature: tried(world, do) for feature, do in ROWS.items()}
    assert found == {feature: cells[world.kind] for feature, cells in table().items()}
