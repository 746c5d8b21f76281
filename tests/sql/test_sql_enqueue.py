"""enqueue() and start_workflow(), as a trigger or another language calls them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.database import Database
from dramatiq_durable.roles import grant_login
from tests.support import ROOT
from tests.support.postgres import Cluster
from tests.support.scratch import scratch

from .api import Session, Worker, in_background


def payload(db: Session, message: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        db.value("SELECT payload FROM durable.message WHERE message_id = %s", uuid.UUID(bytes=message))
    )
    return found


def test_with_nothing_but_a_name(db: Session) -> None:
    message = db.value("SELECT durable.enqueue('emails', 'send_email')")
    (claimed,) = db.register(db.stream("emails")).claim()
    assert (claimed.message_id, claimed.kind, claimed.actor, claimed.attempt) == (message, "j", "send_email", 1)
    fields = json.loads(claimed.payload)
    now = db.value("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
    assert 0 <= now - fields.pop("message_timestamp") < 10_000
    assert fields == {
        "queue_name": "emails",
        "actor_name": "send_email",
        "args": [],
        "kwargs": {},
        "options": {},
        "message_id": str(uuid.UUID(bytes=message)),
    }
    assert uuid.UUID(bytes=message).version == 4


def test_with_everything(db: Session) -> None:
    message = db.value(
        "SELECT durable.enqueue('emails', 'send_email', jsonb_build_array(1, 'a \"b\" \\ \N{SNOWMAN}', null),"
        " p_kwargs => '{\"cents\": 12345678901234567890, \"rate\": 1.50}', p_delay => '1 hour', p_priority => -5,"
        " p_options => '{\"max_retries\": 3}', p_unique_key => 'k')"
    )
    fields = payload(db, message)
    assert fields["args"] == [1, 'a "b" \\ \N{SNOWMAN}', None]
    assert fields["kwargs"] == {"cents": 12345678901234567890, "rate": 1.5}
    assert fields["options"] == {"max_retries": 3}
    row = db.sql(
        "SELECT priority, unique_key, extract(epoch FROM due_at - enqueued_at)::int, kind::text FROM durable.message"
    )
    assert row == [(-5, "k", 3600, "j")]


def test_it_commits_and_vanishes_with_the_callers_transaction(db: Session, connect: Callable[..., Session]) -> None:
    stream, other = db.stream("emails"), connect()
    db.begin()
    db.sql("SELECT durable.enqueue('emails', 'a')")
    assert other.messages(stream) == 0
    db.rollback()
    assert db.messages(stream) == 0


def test_an_administrators_stream_comes_into_being(db: Session) -> None:
    db.sql("SELECT durable.enqueue('brand-new', 'a')")
    assert db.messages(db.stream("brand-new")) == 1


def test_messages_come_by_priority_and_then_in_order(db: Session) -> None:
    for n, priority in enumerate([0, 5, -5, 0]):
        db.sql("SELECT durable.enqueue('s', 'a', jsonb_build_array(%s::int), p_priority => %s)", n, priority)
    claimed = db.register(db.stream("s")).claim()
    assert [json.loads(c.payload)["args"] for c in claimed] == [[2], [0], [3], [1]]


@pytest.mark.parametrize(
    ("arguments", "text", "hint"),
    [
        ("NULL, 'a'", "NULL is no name of a stream", "queue_name"),
        ("'', 'a'", "'' is no name of a stream", "queue_name"),
        ("'a b', 'a'", "'a b' is no name of a stream", "queue_name"),
        ("E's\\n', 'a'", "is no name of a stream", "queue_name"),
        ("'\N{LATIN SMALL LETTER E WITH ACUTE}', 'a'", "is no name of a stream", "queue_name"),
        ("repeat('s', 201), 'a'", "is no name of a stream", "200"),
        ("'s', NULL", "1 to 200 characters, not NULL", None),
        ("'s', ''", "1 to 200 characters, not 0", None),
        ("'s', repeat('a', 201)", "1 to 200 characters, not 201", None),
        ("'s', 'a', '{}'", "p_args is a JSON array, not object", "jsonb_build_array"),
        ("'s', 'a', '1'", "p_args is a JSON array, not number", "jsonb_build_array"),
        ("'s', 'a', NULL", "p_args is a JSON array, not NULL", "jsonb_build_array"),
        ("'s', 'a', p_kwargs => '[]'", "p_kwargs is a JSON object, not array", "jsonb_build_object"),
        ("'s', 'a', p_kwargs => NULL", "p_kwargs is a JSON object, not NULL", "jsonb_build_object"),
        ("'s', 'a', p_options => 'null'", "p_options is a JSON object, not null", "jsonb_build_object"),
        ("'s', 'a', p_options => NULL", "p_options is a JSON object, not NULL", "jsonb_build_object"),
        ("'s', 'a', p_priority => NULL", "p_priority is a number", "0"),
        ("'s', 'a', p_delay => '-1 second'", "a delay is between nothing and ten years", None),
        ("'s', 'a', p_delay => '11 years'", "a delay is between nothing and ten years", None),
        ("'s', 'a', p_unique_key => ''", "p_unique_key has 1 to 200 characters, not 0", None),
        ("'s', 'a', p_unique_key => repeat('k', 201)", "not 201", None),
    ],
)
def test_what_cannot_be_sent_is_said(db: Session, arguments: str, text: str, hint: str | None) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        db.sql(f"SELECT durable.enqueue({arguments})")
    assert text in str(refused.value.diag.message_primary)
    assert (hint or "") in (refused.value.diag.message_hint or "")
    assert db.sql("SELECT * FROM durable.message") == []


def test_a_message_over_the_cap(db: Session) -> None:
    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="more than 16777216") as refused:
        db.sql("SELECT durable.enqueue('s', 'a', jsonb_build_array(repeat('x', 16777216)))")
    assert "send its key" in str(refused.value.diag.message_hint)


# --- unique keys ---------------------------------------------------------------------------------------------

KEYED = "SELECT durable.enqueue('s', 'a', p_unique_key => 'k')"


def test_a_live_key_is_one_message(db: Session) -> None:
    first = db.value(KEYED)
    assert db.value(KEYED) == first
    assert db.value("SELECT durable.enqueue('other', 'a', p_unique_key => 'k')") != first, "keys are a stream's own"
    assert db.value("SELECT durable.enqueue('s', 'a', p_unique_key => 'l')") != first
    assert db.messages(db.stream("s")) == 2
    worker = db.register(db.stream("s"))
    claimed = worker.claim()
    assert db.value(KEYED) == first, "it lives until its ack"
    worker.ack(*claimed)
    assert db.value(KEYED) != first


def test_a_key_that_is_being_taken_is_not_waited_for_long(db: Session, connect: Callable[..., Session]) -> None:
    other = connect()
    db.stream("s")
    other.begin()
    other.sql(KEYED)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        db.sql(KEYED)
    waiting = in_background(lambda: db.value(KEYED))
    other.rollback()
    assert waiting() is not None
    assert db.messages(db.stream("s")) == 1


# --- what workers do with it ---------------------------------------------------------------------------------


@pytest.fixture
def worker(db: Session) -> Worker:
    return db.register(db.stream("s"))


def test_it_is_settled_as_any_message_is(db: Session, worker: Worker) -> None:
    db.sql("SELECT durable.enqueue('s', 'a') FROM generate_series(1, 4)")
    first, second, third, fourth = worker.claim()
    assert worker.ack(first) == worker.release(second) == []
    assert worker.reschedule(third) == worker.reschedule(fourth, payload=b"the worker's encoder's") == []
    kinds = {c.message_id: (c.kind, c.payload[:5]) for c in worker.claim()}
    assert kinds == {
        second.message_id: ("j", b'{"que'),
        third.message_id: ("j", b'{"que'),
        fourth.message_id: ("m", b"the w"),
    }


def test_a_dead_letter_remembers_what_it_is(db: Session, worker: Worker) -> None:
    db.sql("SELECT durable.enqueue('s', 'a') FROM generate_series(1, 2)")
    first, second = worker.claim()
    assert worker.bury(first) == worker.bury(second, payload=b"the worker's encoder's") == []
    assert db.sql("SELECT kind::text, payload = %s FROM durable.dead_letter ORDER BY 1", first.payload) == [
        ("j", True),
        ("m", False),
    ]


def test_it_can_be_poison(db: Session) -> None:
    stream = db.stream("s")
    message = db.value("SELECT durable.enqueue('s', 'a')")
    watch = db.register(stream)
    victim = db.register(stream, count=1)
    assert victim.mark_started(victim.one()) == []
    db.silence(victim)
    assert watch.reclaim(victim) == (0, 1)
    assert db.messages(stream) == 0
    assert db.sql("SELECT message_id, kind::text, reason FROM durable.dead_letter") == [(message, "j", "poison")]


def test_it_is_purged(db: Session) -> None:
    stream = db.stream("s")
    db.sql("SELECT durable.enqueue('s', 'a')")
    db.call("flush_streams", [stream])
    assert db.messages(stream) == 0


def test_it_wakes_whoever_waits_at_the_commit(db: Session, connect: Callable[..., Session]) -> None:
    """Nobody waits when it is called: the worker begins to before the commit."""
    stream = db.stream("s")
    listener, worker = connect(), connect().register(stream)
    listener.sql(f'LISTEN "durable:s{stream}"')
    for statement in (KEYED, "SELECT durable.start_workflow('s', 'wf')"):
        db.begin()
        db.sql(statement)
        assert list(listener.conn.notifies(timeout=0.05)) == []
        db.commit()
        assert len(list(listener.conn.notifies(timeout=5, stop_after=1))) == 1
    assert len(worker.claim()) == 2


def test_where_there_is_no_worker_nobody_is_woken(db: Session, connect: Callable[..., Session]) -> None:
    stream, listener = db.stream("s"), connect()
    db.register(db.stream("another"))
    listener.sql(f'LISTEN "durable:s{stream}"')
    db.sql(KEYED)
    listener.sql("SELECT 1")
    assert list(listener.conn.notifies(timeout=0.05)) == []


# --- triggers and grants -------------------------------------------------------------------------------------


def test_the_trigger_of_the_documentation(db: Session) -> None:
    (trigger,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "transactional.md").read_text(), re.DOTALL)
    db.conn.execute(trigger)
    db.sql("INSERT INTO orders (email) VALUES ('kim@example.com'), ('lee@example.com')")
    with pytest.raises(psycopg.errors.NotNullViolation):
        db.sql("INSERT INTO orders (email) VALUES ('undone@example.com'), (NULL)")
    claimed = db.register(db.stream("emails")).claim()
    assert [json.loads(c.payload)["args"] for c in claimed] == [[1, "kim@example.com"], [2, "lee@example.com"]]


def test_a_login_of_an_application_sends_through_its_trigger(cluster: Cluster) -> None:
    (trigger,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "transactional.md").read_text(), re.DOTALL)
    with scratch(cluster, cluster.template()) as shop:
        login, url = shop.login()
        shop.execute(trigger)
        shop.execute(f"GRANT INSERT ON orders TO {login}")
        insert = "INSERT INTO orders (email) VALUES ('kim@example.com')"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            shop.execute(insert, url=url)
        database = Database(lambda: shop.url)
        grant_login(database, login, produce=["another"])
        with pytest.raises(psycopg.Error) as refused:
            shop.execute(insert, url=url)
        assert refused.value.sqlstate == "DD001"
        grant_login(database, login, produce=["emails"])
        shop.execute(insert, url=url)
        database.close()
        assert shop.execute("SELECT actor FROM durable.message") == [("confirm",)]
        assert shop.execute("SELECT count(*) FROM orders") == [(1,)]


# --- workflows -----------------------------------------------------------------------------------------------


def test_a_run_is_started(db: Session) -> None:
    run = db.value(
        "SELECT durable.start_workflow('orders', 'order', '[\"o-1\"]', '{\"cents\": 500}', p_workflow_id => 'w-1')"
    )
    (row,) = db.sql("SELECT workflow_id, name, status FROM durable.run WHERE run_id = %s", uuid.UUID(bytes=run))
    assert row == ("w-1", "order", "running")
    assert json.loads(db.value("SELECT payload FROM durable.event")) == {"args": ["o-1"], "kwargs": {"cents": 500}}
    (task,) = db.register(db.stream("orders")).claim()
    assert (task.kind, task.run_id) == ("s", run)


def test_without_an_id_it_has_the_runs(db: Session) -> None:
    run = db.value("SELECT durable.start_workflow('orders', 'order', p_delay => '1 hour')")
    assert db.value("SELECT workflow_id FROM durable.run") == str(uuid.UUID(bytes=run))
    assert db.register(db.stream("orders")).claim() == []


def test_a_workflow_id_that_is_taken(db: Session) -> None:
    start = "SELECT durable.start_workflow('orders', 'order', p_workflow_id => 'w', p_id_conflict => %s)"
    first = db.value(start, "fail")
    with pytest.raises(psycopg.errors.UniqueViolation, match="a run has the workflow id 'w' already"):
        db.value(start, "fail")
    assert db.value(start, "use_existing") == first
    second = db.value(start, "terminate_existing")
    assert second != first
    assert db.sql("SELECT run_id, status FROM durable.run ORDER BY started_at") == [
        (first, "terminated"),
        (second, "running"),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("'a b', 'w'", "no name of a stream"),
        ("'s', ''", "1 to 200 characters"),
        ("'s', 'w', '1'", "p_args is a JSON array"),
        ("'s', 'w', p_kwargs => '1'", "p_kwargs is a JSON object"),
        ("'s', 'w', p_workflow_id => ''", "a workflow id has 1 to 200 characters, not 0"),
        ("'s', 'w', p_id_conflict => 'maybe'", "not 'maybe'"),
        ("'s', 'w', p_id_conflict => NULL", "not NULL"),
        ("'s', 'w', p_delay => '-1 day'", "a delay is between"),
    ],
)
def test_what_cannot_be_started_is_said(db: Session, arguments: str, text: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=text):
        db.sql(f"SELECT durable.start_workflow({arguments})")
    assert db.sql("SELECT * FROM durable.run") == []
