"""What a real broker does with a login that has as much as its max_live allows: who is over is told at his call, nobody
beside him loses anything, and what waits goes on when there is room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.middleware import CurrentMessage, Pipelines, Retries
from dramatiq.results import Results

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from tests.broker.conftest import Rows, at_once
from tests.support import wait_until
from tests.support.postgres import Cluster
from tests.support.scratch import scratch

LIMIT = 12
OVER = "max_live.*Wait until some are done, or let an administrator raise max_live"
#: What makes room: messages that are not due for an hour are done.
ROOM = "DELETE FROM durable.message WHERE actor = 'filler'"


class Site:
    """A database, and a broker whose login may have so much."""

    def __init__(self, url: str) -> None:
        self.rows = Rows(url)
        made = durable.provision_worker_role(
            url, name="limited", streams=["work"], produce=["work"], max_live=LIMIT, max_statement=None
        )
        self.url = made.url
        middleware = [CurrentMessage(), Pipelines(), Retries(min_backoff=1, max_backoff=20)]
        self.broker = durable.DurableBroker(made.url, middleware=middleware, settings=Settings(poll_interval=0.25))
        self.workers: list[dramatiq.Worker] = []

    def declare(self) -> tuple[Any, list[int]]:
        """An actor, and what it has seen."""
        seen: list[int] = []
        return dramatiq.actor(seen.append, actor_name="work", queue_name="work", broker=self.broker), seen

    def fill(self, count: int = LIMIT) -> None:
        """So many messages that nobody is given."""
        messages = [dramatiq.Message("work", "filler", (), {}, {}) for _ in range(count)]
        self.broker.enqueue_many(messages, delay=3_600_000)

    def start_worker(self) -> None:
        self.broker.emit_after("process_boot")
        worker = dramatiq.Worker(self.broker, worker_timeout=50, worker_threads=2)
        worker.start()
        self.workers.append(worker)

    def count(self, table: str = "message") -> int:
        return int(self.rows(f"SELECT count(*) FROM durable.{table}")[0][0])


@pytest.fixture
def site(cluster: Cluster) -> Iterator[Site]:
    before = dramatiq.broker.global_broker
    with scratch(cluster, cluster.template()) as made:
        site = Site(made.url)
        dramatiq.set_broker(site.broker)
        yield site
        for worker in site.workers:
            worker.stop(timeout=5000)
        dramatiq.broker.global_broker = before
        site.broker.close()
        site.rows.conn.close()


def sleeper() -> Any:
    @durable.workflow(name="sleeper", queue_name="work")
    async def sleeper() -> str:
        return str(await durable.wait_for_signal("go"))

    return sleeper


SENDS: dict[str, Callable[[Any, Any], Any]] = {
    "send": lambda actor, flow: actor.send(1),
    "asend": lambda actor, flow: asyncio.run(actor.asend(1)),
    "delayed": lambda actor, flow: actor.send_with_options(args=(1,), delay=60_000),
    "keyed": lambda actor, flow: actor.send_with_options(args=(1,), unique_key="k"),
    "start": lambda actor, flow: flow.start(),
    "signal with start": lambda actor, flow: flow.options(with_signal=("go", 1)).start(),
    "trigger": lambda actor, flow: durable.schedules.trigger("nightly"),
    "schedule": lambda actor, flow: durable.schedules.create("second", cron="0 6 * * *", target=actor, args=[1]),
}


@pytest.mark.parametrize("how", SENDS)
def test_whoever_is_over_is_told_at_his_call(site: Site, how: str) -> None:
    actor = durable.activity(dramatiq.actor(print, actor_name="work", queue_name="work"))
    flow = sleeper()
    if how == "trigger":
        durable.schedules.create("nightly", cron="0 6 * * *", target=actor, args=[1])
    site.fill(LIMIT - site.count())
    tables = ("message", "run", "inbox", "schedule")
    before = [site.count(table) for table in tables]
    with pytest.raises(durable.LimitReached, match=OVER):
        SENDS[how](actor, flow)
    assert [site.count(table) for table in tables] == before
    site.rows(ROOM)
    SENDS[how](actor, flow)
    assert site.count() > before[0] - LIMIT


def test_who_sends_at_the_same_time_loses_nothing(site: Site) -> None:
    """They share commits: one that is over takes nobody with it, and who was told that it is stored finds it stored."""
    actor, _ = site.declare()
    answers = at_once(3 * LIMIT, lambda n: actor.send(n))
    sent = [answer.message_id for answer in answers if isinstance(answer, dramatiq.Message)]
    assert {type(answer) for answer in answers} == {dramatiq.Message, durable.LimitReached}
    assert len(sent) == LIMIT
    assert {str(row[0]) for row in site.rows("SELECT message_id FROM durable.message")} == set(sent)


def test_signals_are_stored_beside_sends_that_are_over(site: Site) -> None:
    """A signal for a run that has a task needs room for itself; it comes in the same batch as what has none."""
    actor, _ = site.declare()
    run = sleeper().start()
    site.rows("UPDATE durable.message SET lot = NULL")
    site.fill(LIMIT - 4)
    answers = at_once(16, lambda n: actor.send(n) if n % 2 else run.signal("other", n))
    stored = [answer for answer in answers if not isinstance(answer, Exception)]
    assert {type(answer) for answer in answers if isinstance(answer, Exception)} == {durable.LimitReached}
    signals = site.rows("SELECT count(*) FROM durable.inbox")[0][0]
    messages = site.rows("SELECT count(*) FROM durable.message WHERE actor = 'work'")[0][0]
    assert signals + messages == len(stored)
    assert messages == sum(isinstance(answer, dramatiq.Message) for answer in stored)


def test_of_many_those_that_fit_are_stored_and_sent_again_none_twice(site: Site) -> None:
    actor, seen = site.declare()
    site.fill(LIMIT // 2)
    messages = [actor.message(n) for n in range(LIMIT)]
    with pytest.raises(durable.LimitReached, match=OVER):
        site.broker.enqueue_many(messages)
    assert site.count() == LIMIT
    site.rows(ROOM)
    site.broker.enqueue_many(messages)
    assert site.count() == LIMIT
    site.start_worker()
    wait_until(lambda: site.count() == 0)
    assert sorted(seen) == list(range(LIMIT))


def test_in_a_transaction_of_ones_own(site: Site) -> None:
    actor, _ = site.declare()
    site.fill()
    with psycopg.connect(site.url) as conn, pytest.raises(durable.LimitReached, match="max_live"), durable.using(conn):
        actor.send(1)
    assert site.count() == LIMIT


def failure(handle: Any) -> str:
    wait_until(lambda: handle.describe().task_failure is not None)
    return str(handle.describe().task_failure)


def test_a_step_that_is_over_is_shown_and_goes_on_when_there_is_room(site: Site) -> None:
    @durable.activity(queue_name="work")
    def double(n: int) -> int:
        return 2 * n

    @durable.workflow(queue_name="work")
    async def many() -> int:
        return sum(await asyncio.gather(*(double.execute(n) for n in range(4))))

    site.fill(LIMIT - 2)
    run = many.start()
    site.start_worker()
    assert failure(run).startswith("LimitReached: max_live")
    assert run.describe().status == "running"
    assert len(run.history()) == 1, "nothing of the step is stored"
    site.rows(ROOM)
    assert run.result(timeout=20) == 12
    assert run.describe().task_failure is None


def test_children_that_are_over(site: Site) -> None:
    child = sleeper()

    @durable.workflow(queue_name="work")
    async def parent() -> int:
        children = [child.start() for _ in range(4)]
        for started in children:
            await started.started()
        return len(children)

    site.fill(LIMIT - 2)
    run = parent.start()
    site.start_worker()
    assert failure(run).startswith("LimitReached: max_live")
    assert site.count("run") == 1
    site.rows(ROOM)
    assert run.result(timeout=20) == 4


def test_a_signal_that_is_over_waits(site: Site) -> None:
    flow = sleeper()
    asleep = flow.options(workflow_id="asleep").start()

    @durable.workflow(queue_name="work")
    async def caller() -> str:
        await durable.signal_workflow("asleep", "go", "now")
        return "sent"

    site.start_worker()
    wait_until(lambda: site.count() == 0)
    site.fill(LIMIT - 1)
    run = caller.start()
    assert failure(run).startswith("LimitReached: max_live")
    site.rows(ROOM)
    assert run.result(timeout=20) == "sent"
    assert asleep.result(timeout=20) == "now"


def test_what_is_under_way_ends_without_room(site: Site) -> None:
    """What ends makes room, and needs none: a login that has all that it may is not stuck."""
    go = durable.activity(dramatiq.actor(lambda: "done", actor_name="go", queue_name="work"))

    @durable.workflow(queue_name="work")
    async def one() -> str:
        await durable.sleep(0.5)
        return str(await go.execute())

    runs = [one.start() for _ in range(3)]
    site.fill(LIMIT - 3)
    site.start_worker()
    assert [run.result(timeout=20) for run in runs] == ["done"] * 3


def test_pipelines_go_on_without_room(site: Site) -> None:
    """What follows a message takes its place."""
    actor, seen = site.declare()
    first = dramatiq.actor(lambda n: n, actor_name="first", queue_name="work")
    site.broker.enqueue_many([(first.message(n) | actor.message()).messages[0] for n in range(LIMIT)])
    assert site.count() == LIMIT
    site.start_worker()
    wait_until(lambda: sorted(seen) == list(range(LIMIT)))
    wait_until(lambda: site.count() == 0)


def test_what_a_message_leaves_behind_waits_for_room(site: Site) -> None:
    """A message that would leave more than there is room for goes back; those that end with it do not."""
    actor, seen = site.declare()

    class Many(dramatiq.Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            for n in range(3 if message.actor_name == "first" else 0):
                broker.enqueue(actor.message(n))

    site.broker.add_middleware(Many())
    ran: list[int] = []
    first = dramatiq.actor(lambda: ran.append(1), actor_name="first", queue_name="work")
    actor.send_with_options(args=(10,))
    first.send()
    actor.send_with_options(args=(11,))
    site.fill(LIMIT - 3)
    # What is done meanwhile makes no room.
    site.rows("UPDATE durable.message SET lot = NULL WHERE actor = 'work'")
    site.fill(2)
    site.start_worker()
    put_back = "SELECT last_failure FROM durable.message WHERE unsettled = 1 AND actor = 'first'"
    wait_until(lambda: site.rows(put_back))
    assert "max_live" in site.rows(put_back)[0][0]
    wait_until(lambda: sorted(seen) == [10, 11])
    wait_until(lambda: site.rows("SELECT count(*) FROM durable.message WHERE actor = 'work'") == [(0,)])
    site.rows(ROOM)
    site.rows("UPDATE durable.message SET due_at = now()")
    wait_until(lambda: sorted(seen) == [0, 1, 2, 10, 11])
    assert ran == [1, 1]


def test_a_schedule_does_not_fire_for_whoever_has_no_room(site: Site) -> None:
    actor, seen = site.declare()
    durable.schedules.create("often", cron="* * * * * *", target=actor, args=[1])
    site.fill(LIMIT - site.count())
    site.start_worker()
    wait_until(lambda: site.rows("SELECT count(*) FROM durable.schedule WHERE skipped > 0") == [(1,)])
    assert seen == []
    site.rows(ROOM)
    wait_until(lambda: len(seen) > 0)


def test_results_are_stored_or_their_message_runs_again(site: Site) -> None:
    backend = durable.results.PostgresBackend(site.broker)
    site.broker.add_middleware(Results(backend=backend))
    actor = dramatiq.actor(lambda n: n, actor_name="kept", queue_name="work", store_results=True)
    site.start_worker()
    messages = [actor.send(n) for n in range(LIMIT)]
    assert [message.get_result(block=True, timeout=20_000) for message in messages] == list(range(LIMIT))
