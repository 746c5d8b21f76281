"""`send_with_options(unique_key=…)`: a stream has one live message with a key, whatever state it is in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq import pipeline

import dramatiq_durable as durable
from dramatiq_durable.errors import DatabaseUnavailable
from dramatiq_durable.group_commit import GroupCommit
from tests.support import wait_until
from tests.support.stored import message_in

from .conftest import Record, Rows, at_once, in_thread


class Application:
    """An actor whose messages have keys; it works until it is told."""

    def __init__(self, broker: durable.DurableBroker) -> None:
        self.broker = broker
        self.ran = Record()
        self.begun, self.go = threading.Event(), threading.Event()

        @dramatiq.actor(broker=broker, max_retries=1, min_backoff=60_000, max_backoff=60_000)
        def work(n: int, what: str = "") -> int:
            if what == "wait":
                self.begun.set()
                assert self.go.wait(20)
            if what == "fail":
                raise KeyError(n)
            self.ran(n)
            return n

        @dramatiq.actor(broker=broker, queue_name="other")
        def other(n: int) -> None: ...

        self.work, self.other = work, other

    def send(self, n: int, what: str = "", conflict: str | None = None, **options: Any) -> Any:
        if conflict is not None:
            options["unique_conflict"] = conflict
        return self.work.send_with_options(args=(n, what), unique_key="key", **options)


@pytest.fixture
def app(broker: durable.DurableBroker) -> Application:
    return Application(broker)


def stored(rows: Rows) -> list[int]:
    """The first arguments of the messages that are there, oldest first."""
    found = rows("SELECT payload FROM durable.message ORDER BY enqueued_at")
    return [message_in(payload).args[0] for (payload,) in found]


# --- what becomes of a second ---------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [None, 60_000], ids=["waiting", "delayed"])
def test_while_one_waits(app: Application, rows: Rows, delay: int | None) -> None:
    first = app.send(1, delay=delay)
    assert app.send(2).message_id == first.message_id  # skip: it stands for the one that is there
    with pytest.raises(durable.MessageExists, match=f"{first.message_id}.*unique_conflict") as info:
        app.send(3, conflict="fail")
    assert info.value.message_id == first.message_id
    assert stored(rows) == [1]
    replacing = app.send(4, conflict="replace")
    assert replacing.message_id != first.message_id
    assert stored(rows) == [4]
    assert app.send(5).message_id == replacing.message_id


def test_while_one_runs(app: Application, rows: Rows, start_worker: Any) -> None:
    start_worker(app.broker)
    first = app.send(1, "wait")
    assert app.begun.wait(10)
    assert app.send(2).message_id == first.message_id
    with pytest.raises(durable.MessageExists):
        app.send(3, conflict="fail")
    replacing = app.send(4, conflict="replace", delay=60_000)
    # The running one ends as it would; the key is the new one's.
    assert app.send(5).message_id == replacing.message_id
    app.go.set()
    assert app.ran.wait(1) == [1]
    wait_until(lambda: stored(rows) == [4])


def test_while_one_waits_for_its_retry(app: Application, rows: Rows, start_worker: Any) -> None:
    start_worker(app.broker)
    first = app.send(1, "fail")
    wait_until(lambda: [m[1] for m in rows.messages()] == [2])
    assert app.send(2).message_id == first.message_id
    replacing = app.send(3, conflict="replace", delay=60_000)
    assert stored(rows) == [3]
    assert app.send(4).message_id == replacing.message_id


def test_when_one_is_done_or_dead_the_key_is_free(app: Application, rows: Rows, start_worker: Any) -> None:
    start_worker(app.broker)
    first = app.send(1)
    rows.drained()
    second = app.send(2, "fail", max_retries=0)
    assert second.message_id != first.message_id
    wait_until(lambda: len(rows.dead_letters()) == 1)
    app.send(3, conflict="fail")
    assert app.ran.wait(2) == [1, 3]


def test_a_key_is_one_streams(app: Application, rows: Rows) -> None:
    app.send(1)
    app.other.send_with_options(args=(2,), unique_key="key", unique_conflict="fail")
    app.work.send_with_options(args=(3,), unique_key="KEY", unique_conflict="fail")
    app.work.send(4)
    assert stored(rows) == [1, 2, 3, 4]


def test_the_same_message_sent_again_is_no_conflict(app: Application, rows: Rows) -> None:
    """As after an unknown outcome: it is there, and nothing is wrong."""
    for conflict in ("fail", "skip", "replace"):
        message = app.work.message_with_options(args=(1,), unique_key=conflict, unique_conflict=conflict)
        for _ in range(3):
            assert app.broker.enqueue(message).message_id == message.message_id
    assert stored(rows) == [1, 1, 1]


@pytest.mark.parametrize("key", ["", 5, "x" * 201, "with \0 in it", b"bytes", "\ud800"])
def test_keys_that_cannot_be(app: Application, rows: Rows, key: Any) -> None:
    with pytest.raises((durable.DurableError, ValueError), match=r"unique.key|surrogates"):
        app.work.send_with_options(args=(1,), unique_key=key)
    assert rows.count() == 0


def test_conflicts_that_cannot_be(app: Application, rows: Rows) -> None:
    for conflict in ("ignore", "look", None, 5):
        with pytest.raises(ValueError, match="skip, fail, replace"):
            app.work.send_with_options(args=(1,), unique_key="key", unique_conflict=conflict)
    assert rows.count() == 0


def test_no_key_at_all(app: Application, rows: Rows) -> None:
    for n in range(3):
        app.work.send_with_options(args=(n,), unique_key=None)
    assert stored(rows) == [0, 1, 2]


# --- many at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conflict", ["skip", "fail", "replace"])
def test_eight_at_once(make_broker: Callable[..., durable.DurableBroker], rows: Rows, conflict: str) -> None:
    """On two brokers, so that they are not simply in one batch."""
    apps = [Application(make_broker()) for _ in range(2)]
    for turn in range(5):
        answers = at_once(
            8,
            lambda n, turn=turn: apps[n % 2].work.send_with_options(  # type: ignore[misc]
                args=(n,), unique_key=f"key {turn}", unique_conflict=conflict
            ),
        )
        [(there,)] = rows("SELECT message_id::text FROM durable.message WHERE unique_key = %s", f"key {turn}")
        ids = [a.message_id for a in answers if not isinstance(a, Exception)]
        if conflict == "skip":
            assert set(ids) == {there}
            assert len(ids) == 8
        elif conflict == "fail":
            assert ids == [there]
            errors = [a for a in answers if isinstance(a, Exception)]
            assert {type(e) for e in errors} == {durable.MessageExists}
        else:
            assert len(set(ids)) == 8
            assert there in ids
    assert rows.count() == 5


def test_many_in_one_call(app: Application, rows: Rows) -> None:
    messages = [
        app.work.message_with_options(args=(n,), unique_key=f"key {n % 3}", unique_conflict="skip") for n in range(9)
    ]
    sent = app.broker.enqueue_many(messages)
    assert [m.message_id for m in sent] == [messages[n % 3].message_id for n in range(9)]
    assert stored(rows) == [0, 1, 2]
    replaced = app.broker.enqueue_many(
        [app.work.message_with_options(args=(n,), unique_key="key 0", unique_conflict="replace") for n in (10, 11)]
    )
    assert sorted(stored(rows)) == [1, 2, 11]
    assert len({m.message_id for m in replaced}) == 2
    with pytest.raises(durable.MessageExists):
        app.broker.enqueue_many(
            [
                app.work.message(20),
                app.work.message_with_options(args=(21,), unique_key="key 0", unique_conflict="fail"),
                app.work.message(22),
            ]
        )
    assert {20, 22} <= set(stored(rows))  # as its docstring says: some may be stored
    assert 21 not in stored(rows)


def test_keys_in_opposite_orders_hold_up_nobody(make_broker: Callable[..., Any], rows: Rows) -> None:
    """Two batches that store the same keys in opposite orders wait for each other: both get through."""
    apps = [Application(make_broker()) for _ in range(2)]

    def send(n: int) -> None:
        keys = [f"key {k}" for k in range(50)]
        messages = [
            apps[n].work.message_with_options(args=(n,), unique_key=k, unique_conflict="replace")
            for k in (keys if n else keys[::-1])
        ]
        for _ in range(4):
            apps[n].broker.enqueue_many(messages)

    assert at_once(2, send) == [None, None]
    assert rows.count() == 50


def test_somebody_elses_open_transaction_holds_a_key(app: Application, rows: Rows, database_url: str) -> None:
    """It delays those who want the key, a little; others do not wait."""
    app.send(0)
    rows("DELETE FROM durable.message")
    with psycopg.connect(database_url) as conn:
        conn.execute(
            "INSERT INTO durable.message"
            " (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, unique_key)"
            " SELECT gen_random_uuid(), stream_id, 0, now(), now(), 'work', '', 'key' FROM durable.stream"
            " WHERE name = 'default'"
        )
        stuck = in_thread(lambda: app.send(1))
        others = [app.work.send_with_options(args=(n,), unique_key=f"other {n}") for n in range(2, 5)]
        assert len(others) == 3
        with pytest.raises(DatabaseUnavailable, match="locked"):
            stuck()
        assert sorted(stored(rows)) == [2, 3, 4]
    # (Leaving the block commits: the key has its message now.)
    assert app.send(5).message_id not in {m.message_id for m in others}
    assert rows.count() == 4


# --- hooks, lost answers --------------------------------------------------------------------------------------


def test_the_next_of_a_pipeline_has_a_key(app: Application, rows: Rows, start_worker: Any) -> None:
    """Two pipelines whose second messages have one key: the second of the second is left out, its first is done."""

    @dramatiq.actor(broker=app.broker, queue_name="unread")
    def second(n: int) -> None: ...

    start_worker(app.broker, queues={"default"})
    ids = []
    for n in range(2):
        following = second.message_with_options(unique_key="key")
        ids.append(following.message_id)
        pipeline([app.work.message(n), following], broker=app.broker).run()
        wait_until(lambda: all(m[0] == "second" for m in rows.messages()))
    app.ran.wait(2)
    broker = app.broker
    broker.join("default", timeout=10_000)
    assert rows("SELECT message_id::text, unique_key FROM durable.message") == [(ids[0], "key")]


@pytest.mark.parametrize("kind", ["skip", "fail", "replace", "group"])
@pytest.mark.parametrize("meanwhile", ["waits", "done"])
def test_after_a_lost_answer_nothing_is_stored_again(
    app: Application, rows: Rows, monkeypatch: pytest.MonkeyPatch, kind: str, meanwhile: str
) -> None:
    """The commit's answer is lost, and the message may be done before anybody asks: to store it again would run it,
    and count it for its group, a second time."""
    app.work.send(0)
    rows("DELETE FROM durable.message")
    rows("CREATE TABLE note (n int)")
    rows(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        " $$ BEGIN INSERT INTO public.note VALUES (1); RETURN NULL; END $$"
    )
    rows("CREATE TRIGGER note AFTER INSERT ON durable.message FOR EACH ROW EXECUTE FUNCTION note()")
    execute, lost = GroupCommit._execute, Record()

    def lose(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        execute(self, conn, batch)
        if not lost.values:
            lost()
            if meanwhile == "done":
                rows("DELETE FROM durable.message")
            conn.close()
            raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(GroupCommit, "_execute", lose)
    if kind == "group":
        message = app.work.message_with_options(args=(1,), group_completion_uuid="5c0f1b6e-98ab-4b8e-9f5c-3a5f1d5c1a11")
    else:
        message = app.work.message_with_options(args=(1,), unique_key="key", unique_conflict=kind)
    assert app.broker.enqueue(message).message_id == message.message_id
    assert len(lost.values) == 1
    assert rows("SELECT count(*) FROM note") == [(1,)]
    assert stored(rows) == ([1] if meanwhile == "waits" else [])


def test_after_a_lost_answer_a_skipped_one_says_who_is_there(
    app: Application, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = app.send(0)
    execute, lost = GroupCommit._execute, Record()

    def lose(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        execute(self, conn, batch)
        if len(lost.values) % 2 == 0:
            lost()
            conn.close()
            raise psycopg.OperationalError("the connection is lost")
        lost()

    monkeypatch.setattr(GroupCommit, "_execute", lose)
    assert app.send(1).message_id == first.message_id
    with pytest.raises(durable.MessageExists):
        app.send(2, conflict="fail")
    assert len(lost.values) == 4
    assert stored(rows) == [0]


@pytest.mark.parametrize("conflict", ["skip", "fail"])
def test_after_a_lost_answer_a_skipped_one_is_stored_once_there_is_room(
    app: Application, rows: Rows, monkeypatch: pytest.MonkeyPatch, conflict: str
) -> None:
    """What was in its way has ended before anybody asks: nobody must believe that it was this message."""
    first = app.send(0)
    execute, lost = GroupCommit._execute, Record()

    def lose(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        execute(self, conn, batch)
        lost()
        if len(lost.values) == 1:
            rows("DELETE FROM durable.message")
            conn.close()
            raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(GroupCommit, "_execute", lose)
    assert app.send(1, conflict=conflict).message_id != first.message_id
    assert stored(rows) == [1]


@pytest.mark.parametrize("conflict", ["skip", "fail"])
def test_after_a_lost_answer_one_that_was_stored_is_not_taken_for_its_successor(
    app: Application, rows: Rows, monkeypatch: pytest.MonkeyPatch, conflict: str
) -> None:
    """It is done, and another has its key, before anybody asks."""
    app.work.send(0)
    rows("DELETE FROM durable.message")
    message = app.work.message_with_options(args=(1,), unique_key="key", unique_conflict=conflict)
    execute, lost = GroupCommit._execute, Record()

    def lose(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        execute(self, conn, batch)
        lost()
        if len(lost.values) == 1:
            rows("UPDATE durable.message SET message_id = gen_random_uuid()")
            conn.close()
            raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(GroupCommit, "_execute", lose)
    assert app.broker.enqueue(message).message_id == message.message_id
    assert len(lost.values) == 1


def test_a_follower_that_waits_for_a_key_holds_up_nobody_else(
    app: Application, rows: Rows, start_worker: Any, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the end of the message that it follows waits, and its actor does not run again."""

    @dramatiq.actor(broker=app.broker, queue_name="unread")
    def second(n: int) -> None: ...

    @dramatiq.actor(broker=app.broker)
    def first() -> int:
        app.ran("first")
        return 1

    second.send(0)
    rows("DELETE FROM durable.message")
    worker = start_worker(app.broker, threads=4, queues={"default"})
    with psycopg.connect(database_url) as conn:
        conn.execute(
            "INSERT INTO durable.message"
            " (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, unique_key)"
            " SELECT gen_random_uuid(), stream_id, 0, now(), now(), 'second', '', 'key' FROM durable.stream"
            " WHERE name = 'unread'"
        )
        pipeline([first.message(), second.message_with_options(unique_key="key")], broker=app.broker).run()
        wait_until(lambda: "waits to be settled" in caplog.text)
        for n in range(25):
            app.work.send(n)
            wait_until(lambda n=n: app.ran.values[-1] == n)  # type: ignore[misc]
        wait_until(lambda: [m[0] for m in rows.messages()] == ["first"], timeout=5)
        assert app.broker.claimer is not None
        assert app.broker.commit.leased_messages()  # a heartbeat names it: it is not given to others
        conn.rollback()
    wait_until(lambda: [m[0] for m in rows.messages()] == ["second"])
    assert app.ran.values.count("first") == 1
    worker.stop()
