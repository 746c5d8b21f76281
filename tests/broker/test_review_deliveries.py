"""Deliveries at the edges: what cannot be decoded, what is interrupted, what outlives its worker."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.database import Database
from tests.support import wait_until

from .conftest import Record, Rows

BROKEN = {
    "a number of too many digits": b'{"queue_name": "q", "args": [' + b"1" * 5000 + b"]}",
    "nested too deep": b"[" * 200_000,
    "a NUL in the name of a field": rb'{"a\u0000b": 1}',
    "half a character in the name of a field": rb'{"\ud800": 1}',
}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_decoded_is_dead_lettered_and_disturbs_nobody(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, payload: bytes
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, queue_name="q")
    def count(n: int) -> None:
        seen(n)

    count.send(0)
    rows(
        "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)"
        " SELECT %s, stream_id, -1, now(), now(), 'count', %s FROM durable.message LIMIT 1",
        uuid.uuid4(),
        payload,
    )
    for n in range(1, 4):
        count.send(n)
    start_worker(broker)
    assert sorted(seen.wait(4)) == [0, 1, 2, 3]
    rows.drained()
    assert [(actor, reason) for actor, _, reason, _ in rows.dead_letters()] == [("count", "rejected")]


def test_an_effect_is_not_committed_when_the_hooks_fail(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    rows("CREATE TABLE effect (n int)")

    class Sends(dramatiq.Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            broker.enqueue(message._message.copy(message_id=str(uuid.uuid4()), args=(object(),)))

    @dramatiq.actor(broker=broker)
    def effect() -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (1)")

    broker.add_middleware(Sends())
    effect.send()
    start_worker(broker)
    wait_until(lambda: [attempt for _, attempt, _, _ in rows.messages()] == [2])
    assert rows("SELECT n FROM effect") == []


def test_an_async_transaction_that_cannot_begin_ends_no_thread(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, max_retries=1)
    async def effect() -> None:
        seen()
        if len(seen.values) == 1:
            monkeypatch.setattr(psycopg.AsyncConnection, "connect", refuse)
        else:
            monkeypatch.undo()
        async with durable.transaction():
            pass

    async def refuse(*args: Any, **kwargs: Any) -> Any:
        raise psycopg.OperationalError("the server is away")

    worker = start_worker(broker, threads=1)
    effect.send()
    seen.wait(2)
    rows.drained()
    assert all(thread.is_alive() for thread in worker.workers)


def test_an_interrupted_leader_leaves_nobody_waiting(
    broker: durable.DurableBroker, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dramatiq.actor(broker=broker)
    def nothing() -> None: ...

    nothing.send()
    broker.commit.drop_connection()
    connect, leading, followed = Database.connect, threading.Event(), threading.Event()

    def interrupted(self: Database) -> Any:
        monkeypatch.setattr(Database, "connect", connect)
        raise KeyboardInterrupt

    # While the first one's batch is held up, two more gather behind it; then the leader is interrupted.
    def held_up(self: Database) -> Any:
        leading.set()
        followed.wait(10)
        monkeypatch.setattr(Database, "connect", interrupted)
        raise durable.DatabaseUnavailable("away")

    monkeypatch.setattr(Database, "connect", held_up)
    errors: list[BaseException] = []

    def send() -> None:
        try:
            nothing.send()
        except BaseException as e:
            errors.append(e)

    first = threading.Thread(target=send, daemon=True)
    first.start()
    assert leading.wait(10)
    others = [threading.Thread(target=send, daemon=True) for _ in range(2)]
    for thread in others:
        thread.start()
    wait_until(lambda: len(broker.commit._waiting) == 2)
    followed.set()
    for thread in (first, *others):
        thread.join(10)
        assert not thread.is_alive()
    assert [type(e) for e in errors] == [KeyboardInterrupt]
    assert rows.count() >= 3


def test_a_stream_of_runs_that_a_login_may_not_use_hinders_no_other(
    broker: durable.DurableBroker, start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Record()

    @durable.workflow(queue_name="foreign", broker=broker)
    async def elsewhere() -> None: ...

    @dramatiq.actor(broker=broker, queue_name="ours")
    def here() -> None:
        seen()

    stream_id = broker.stream_id

    def permitted(name: str) -> int:
        if name == "foreign":
            raise durable.NotPermitted("no such stream")
        return stream_id(name)

    monkeypatch.setattr(broker, "stream_id", permitted)
    here.send()
    start_worker(broker, queues={"ours"})
    seen.wait(1)


def test_after_a_pause_the_first_message_is_not_given_back(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker)
    def at_once() -> None:
        seen()

    start_worker(broker)
    at_once.send()
    seen.wait(1)
    time.sleep(1.5)
    given_back: list[Any] = []
    claimer = broker.claimer
    assert claimer is not None
    give_back = claimer.give_back

    def note(delivery: Any) -> None:
        given_back.append(delivery)
        give_back(delivery)

    claimer.give_back = note  # type: ignore[method-assign]
    for _ in range(4):
        at_once.send()
    seen.wait(5)
    assert given_back == []
