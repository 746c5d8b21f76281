"""Group callbacks: sent exactly once, in the commit of the member that was the last, whoever dies in between."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq import group, pipeline
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import CurrentMessage, GroupCallbacks, Middleware, SkipMessage
from dramatiq.rate_limits.backends import StubBackend

import dramatiq_durable as durable
from dramatiq_durable.broker import DurableBroker
from dramatiq_durable.operations import Together
from dramatiq_durable.rate_limits import PostgresBackend
from tests.support import wait_until

from .conftest import Record, Rows, middleware


class Application:
    """Actors of a group, on one broker.

    Attributes:
      ran, called: what the members and the callbacks report.
    """

    def __init__(self, broker: DurableBroker) -> None:
        self.broker = broker
        self.ran, self.called = Record(), Record()
        self.tries: dict[Any, int] = {}

        @dramatiq.actor(broker=broker, max_retries=3)
        def member(n: int, what: str = "") -> int:
            self.tries[n] = tries = self.tries.get(n, 0) + 1
            if what == "fail" or (what == "retry" and tries < 3):
                raise KeyError(what)
            if what == "again" and tries < 3:
                broker.enqueue(CurrentMessage.get_current_message(), delay=1)  # type: ignore[arg-type]
            self.ran(n)
            return n

        @dramatiq.actor(broker=broker, queue_name="callbacks")
        def done(name: str) -> None:
            self.called(name)

        self.member, self.done = member, done

    def group(self, *members: Any, callbacks: int = 1) -> group:
        made = group(
            [self.member.message(m) if isinstance(m, int) else m for m in members],
            broker=self.broker,
        )
        for n in range(callbacks):
            made.add_completion_callback(self.done.message(f"done {n}"))
        return made

    def later(self, n: int) -> Any:
        """A member that is not due for a minute."""
        return self.member.message_with_options(args=(n,), eta=int(time.time() * 1000) + 60_000)

    def settled(self, queues: tuple[str, ...] = ("default", "callbacks")) -> list[Any]:
        """What the callbacks have reported when nothing is left to do."""
        for queue in queues:
            self.broker.join(queue, timeout=20_000)
        return sorted(self.called.values)


@pytest.fixture
def make(make_broker: Callable[..., DurableBroker]) -> Callable[..., Application]:
    def make(*more: Middleware, backend: Any = None) -> Application:
        broker = make_broker(middleware=[*middleware(), *more])
        broker.add_middleware(GroupCallbacks(PostgresBackend(broker) if backend is None else backend))
        return Application(broker)

    return make


@pytest.fixture
def app(make: Callable[..., Application]) -> Application:
    return make()


@pytest.mark.parametrize("size", [1, 2, 30])
@pytest.mark.parametrize("callbacks", [1, 3])
def test_callbacks_come_once(app: Application, start_worker: Any, size: int, callbacks: int) -> None:
    start_worker(app.broker, threads=8)
    app.group(*range(size), callbacks=callbacks).run()
    app.called.wait(callbacks)
    assert app.settled() == [f"done {n}" for n in range(callbacks)]
    assert sorted(app.ran.values) == list(range(size))


def test_a_group_of_a_thousand(app: Application, start_worker: Any, rows: Rows) -> None:
    start_worker(app.broker, threads=8)
    app.group(*range(1000)).run()
    app.called.wait(1, timeout=40)
    assert app.settled() == ["done 0"]
    assert len(app.ran.values) == 1000


def test_before_the_last_member_nothing_is_called(app: Application, start_worker: Any, rows: Rows) -> None:
    start_worker(app.broker)
    app.group(1, 2, app.later(3)).run()
    app.broker.enqueue(app.member.message(4))
    app.ran.wait(3)
    wait_until(lambda: rows.count() == 1)
    assert app.called.values == []
    rows("UPDATE durable.message SET due_at = clock_timestamp()")
    app.called.wait(1)
    assert app.settled() == ["done 0"]


def test_it_is_one_commit(app: Application, start_worker: Any, rows: Rows) -> None:
    """The end of the last member, its count and the callbacks."""
    rows("CREATE TABLE note (what text, tx text)")
    rows(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN"
        " INSERT INTO public.note VALUES (TG_ARGV[0], pg_current_xact_id()::text); RETURN NULL; END $$"
    )
    for event, table, condition in (
        ("DELETE", "message", "WHEN (OLD.actor = 'member')"),
        ("INSERT", "message", "WHEN (NEW.actor = 'done')"),
        ("UPDATE", "limiter", ""),
    ):
        rows(
            f"CREATE TRIGGER note_{event} AFTER {event} ON durable.{table} FOR EACH ROW {condition}"
            f" EXECUTE FUNCTION note('{event} {table}')"
        )
    start_worker(app.broker)
    app.group(1).run()
    app.called.wait(1)
    assert {what for what, _ in rows("SELECT what, tx FROM note")} == {
        "DELETE message",
        "INSERT message",
        "UPDATE limiter",
    }
    assert rows("SELECT count(DISTINCT tx), count(*) FROM note") == [(1, 3)]


def test_a_retried_member_counts_once(app: Application, start_worker: Any) -> None:
    start_worker(app.broker)
    app.group(1, app.member.message(2, "retry"), app.member.message(3, "retry")).run()
    app.called.wait(1)
    assert app.settled() == ["done 0"]
    assert app.tries == {1: 1, 2: 3, 3: 3}


def test_a_member_that_sends_itself_again_counts_when_it_ends(app: Application, start_worker: Any) -> None:
    start_worker(app.broker)
    app.group(app.member.message(1, "again"), app.later(2), 3).run()
    wait_until(lambda: app.tries.get(1) == 3 and 3 in app.ran.values)
    app.broker.enqueue(app.member.message(4))
    wait_until(lambda: 4 in app.ran.values)
    time.sleep(0.1)
    assert app.called.values == []  # one is missing yet


def test_a_failed_or_skipped_member_ends_no_group(make: Callable[..., Application], start_worker: Any) -> None:
    """As Dramatiq: only members that succeed count."""

    class Skips(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if message.args[1:] == ("skip",) or message.args[1:] == ["skip"]:
                raise SkipMessage

    app = make(Skips())
    start_worker(app.broker)
    app.group(1, app.member.message(2, "fail")).run()
    app.group(3, app.member.message(4, "skip")).run()
    app.group(5, 6).run()
    app.called.wait(1)
    assert app.settled() == ["done 0"]


def test_pipelines_as_members(app: Application, start_worker: Any) -> None:
    """A pipeline counts when its last message ends."""
    start_worker(app.broker, threads=4)
    last = app.member.message_with_options(pipe_ignore=True, args=(99,))
    nested = pipeline([pipeline([app.member.message(1), last], broker=app.broker), last], broker=app.broker)
    app.group(nested, 5, pipeline([app.member.message(6)], broker=app.broker)).run()
    app.called.wait(1)
    assert app.settled() == ["done 0"]
    assert sorted(app.ran.values) == [1, 5, 6, 99, 99]


def test_a_callback_may_be_a_group_of_its_own(app: Application, start_worker: Any) -> None:
    """Run from the callback's body, with a barrier of its own."""

    @dramatiq.actor(broker=app.broker, queue_name="callbacks")
    def more() -> None:
        app.group(11, 12).run()

    start_worker(app.broker)
    made = group([app.member.message(1), app.member.message(2)], broker=app.broker)
    made.add_completion_callback(more.message())
    made.run()
    app.called.wait(1)
    assert app.settled() == ["done 0"]
    assert sorted(app.ran.values) == [1, 2, 11, 12]


def test_a_group_run_twice_is_two_groups(app: Application, start_worker: Any) -> None:
    start_worker(app.broker)
    made = app.group(1, 2)
    made.run()
    app.called.wait(1)
    assert app.settled() == ["done 0"]
    made.run()
    app.called.wait(2)
    assert app.settled() == ["done 0", "done 0"]


def test_callbacks_with_a_unique_key_and_an_eta(app: Application, start_worker: Any, rows: Rows) -> None:
    """Two groups end: one live callback with the key; one that is delayed waits in the database."""
    made = []
    for n in range(2):
        each = group([app.member.message(n)], broker=app.broker)
        each.add_completion_callback(app.done.message_with_options(args=("key",), unique_key="k"))
        each.add_completion_callback(
            app.done.message_with_options(args=("later",), eta=int(time.time() * 1000) + 60_000)
        )
        made.append(each)
    start_worker(app.broker, queues={"default"})
    for each in made:
        each.run()
    app.broker.join("default", timeout=20_000)
    stored = rows("SELECT unique_key, due_at > clock_timestamp() + interval '50 seconds' FROM durable.message")
    assert sorted(stored, key=str) == [("k", False), (None, True), (None, True)]


def test_an_expired_barrier_still_counts(app: Application, start_worker: Any, rows: Rows) -> None:
    """Dramatiq calls back for every member that ends after it."""
    app.group(1, 2, 3).run()
    rows("UPDATE durable.limiter SET expires_at = clock_timestamp() - interval '1 day'")
    start_worker(app.broker)
    app.called.wait(1)
    assert app.settled() == ["done 0"]


def test_without_its_barrier_a_group_never_ends(app: Application, start_worker: Any, rows: Rows) -> None:
    app.group(1, 2).run()
    rows("DELETE FROM durable.limiter")
    start_worker(app.broker)
    app.ran.wait(2)
    assert app.settled() == []


@pytest.mark.parametrize("forbidden", [False, True], ids=["undeclared", "forbidden"])
def test_callbacks_that_cannot_be_sent_lose_no_group(
    app: Application, start_worker: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch, forbidden: bool
) -> None:
    """The member that cannot send them does not count: it is run again where, or when, that can be done."""
    app.group(1).run()
    # A worker whose login may not send to the callbacks' queue, or that does not know it.
    if forbidden:
        stream_id = app.broker.stream_id

        def refuse(name: str) -> int:
            if name == "callbacks":
                raise durable.NotPermitted("no such stream")
            return stream_id(name)

        monkeypatch.setattr(app.broker, "stream_id", refuse)
    else:
        monkeypatch.delitem(app.broker.queues, "callbacks")
    start_worker(app.broker, queues={"default"})
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("member", 2, False)])
    assert rows("SELECT value FROM durable.limiter") == [(1,)]
    monkeypatch.undo()
    rows("UPDATE durable.message SET due_at = clock_timestamp()")
    wait_until(lambda: [m[0] for m in rows.messages()] == ["done"])


def test_with_another_limiter_backend(make: Callable[..., Application], start_worker: Any, rows: Rows) -> None:
    """Dramatiq's own way: the callbacks commit with the ack all the same."""
    app = make(backend=StubBackend())
    start_worker(app.broker, threads=4)
    app.group(*range(20), callbacks=2).run()
    app.called.wait(2)
    assert app.settled() == ["done 0", "done 1"]
    assert rows("SELECT count(*) FROM durable.limiter") == [(0,)]


def test_on_a_broker_of_another_kind(database_url: str) -> None:
    stub = StubBroker(middleware=[])
    backend = PostgresBackend(database_url)
    stub.add_middleware(GroupCallbacks(backend))
    called = Record()

    @dramatiq.actor(broker=stub)
    def member(n: int) -> None: ...

    @dramatiq.actor(broker=stub)
    def done() -> None:
        called()

    worker = dramatiq.Worker(stub, worker_timeout=50, worker_threads=4)
    worker.start()
    made = group([member.message(n) for n in range(10)], broker=stub)
    made.add_completion_callback(done.message())
    made.run()
    called.wait(1)
    stub.join("default", timeout=10_000)  # type: ignore[call-arg]
    worker.stop()
    assert len(called.values) == 1
    backend.place.broker.close()


def test_two_brokers_end_the_last_two_members_at_once(
    make: Callable[..., Application], start_worker: Any, rows: Rows
) -> None:
    """Two workers with connections of their own, whose commits are let go in one moment, many times."""
    turns = 40
    client, first, second = make(), make(), make()
    gate = threading.Barrier(2)
    for app, side in ((first, "left"), (second, "right")):
        execute = app.broker.commit._execute

        def held(conn: Any, batch: list[Any], execute: Any = execute) -> None:
            if any(isinstance(o, Together) and o.parts[0].member for o in batch):  # type: ignore[attr-defined]
                gate.wait(20)
            execute(conn, batch)

        app.broker.commit._execute = held  # type: ignore[method-assign]
        app.broker.declare_queue(side)
        client.broker.declare_queue(side)
        start_worker(app.broker, threads=1, queues={side})
    for turn in range(turns):
        # An actor may be on any queue: a message says which.
        halves = [client.member.message(turn).copy(queue_name=side) for side in ("left", "right")]
        made = group(halves, broker=client.broker)
        made.add_completion_callback(client.done.message(f"group {turn}"))
        made.run()
        for side in ("left", "right"):
            client.broker.join(side, timeout=20_000)
        assert rows("SELECT count(*) FROM durable.message WHERE actor = 'done'") == [(turn + 1,)]


def test_a_barrier_of_that_name_is_nobody_elses_business(app: Application, start_worker: Any, rows: Rows) -> None:
    """Counting goes by the member's own row: a hook that asks for another key counts there."""
    backend = PostgresBackend(app.broker)
    key = str(uuid.uuid4())
    answers = Record()

    class Asks(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            if message.actor_name == "member":
                answers(backend.decr(key, 1, 1, 60_000))

    app.broker.add_middleware(Asks())
    backend.add(key, 2, 60_000)
    start_worker(app.broker, threads=1)
    app.group(1, 2).run()
    app.called.wait(1)
    assert answers.values == [True, False]
