"""transaction(): effect, result and ack commit together, or not at all."""

from __future__ import annotations

import threading
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq import pipeline

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Record, Rows


@pytest.fixture(autouse=True)
def effects(rows: Rows) -> None:
    rows("CREATE TABLE effect (n int)")


def stored(rows: Rows) -> list[int]:
    return [n for (n,) in rows("SELECT n FROM effect ORDER BY n")]


def test_effect_and_ack_are_one_commit(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker)
    def effect(n: int) -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n])
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n + 100])
        seen((stored(rows), rows.count()))

    start_worker(broker)
    effect.send(1)
    # Leaving the block has committed nothing.
    assert seen.wait(1) == [([], 1)]
    rows.drained()
    assert stored(rows) == [1, 101]
    assert rows("SELECT count(DISTINCT xmin::text) FROM effect") == [(1,)]


def test_an_async_actor_uses_async_with(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, max_retries=1)
    async def effect(n: int) -> None:
        async with durable.transaction() as conn:
            await conn.execute("INSERT INTO effect VALUES (%s)", [n])
        seen(stored(rows))
        if len(seen.values) == 1:
            raise ValueError("once")

    start_worker(broker)
    effect.send(1)
    assert seen.wait(2) == [[], []]
    rows.drained()
    assert stored(rows) == [1]


@pytest.mark.parametrize("where", ["inside", "after"])
def test_an_exception_rolls_the_effect_back(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, where: str
) -> None:
    @dramatiq.actor(broker=broker, max_retries=0)
    def effect(n: int) -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n])
            if where == "inside":
                raise ValueError("no")
        raise ValueError("no")

    start_worker(broker)
    effect.send(1)
    wait_until(rows.dead_letters)
    assert (stored(rows), rows.count()) == ([], 0)


def test_after_a_caught_exception_the_actor_may_begin_anew(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    @dramatiq.actor(broker=broker)
    def effect() -> None:
        try:
            with durable.transaction() as conn:
                conn.execute("INSERT INTO effect VALUES (1)")
                conn.execute("SELECT 1/0")
        except psycopg.errors.DivisionByZero:
            pass
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (2)")

    start_worker(broker)
    effect.send()
    rows.drained()
    assert stored(rows) == [2]


def test_a_lost_lease_rolls_the_effect_back(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker)
    def effect(n: int) -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n])
        rows("UPDATE durable.message SET lease_token = gen_random_uuid()")
        seen(n)

    start_worker(broker)
    effect.send(1)
    seen.wait(1)
    wait_until(lambda: "its transaction is rolled back" in caplog.text)
    assert (stored(rows), rows.count()) == ([], 1)


def test_a_transaction_whose_connection_is_lost_is_run_again(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, max_retries=0)
    def effect(n: int) -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n])
            seen(n)
            if len(seen.values) == 1:
                rows("SELECT pg_terminate_backend(%s)", conn.info.backend_pid)

    start_worker(broker)
    effect.send(1)
    assert seen.wait(2) == [1, 1]
    rows.drained()
    assert stored(rows) == [1]
    assert rows.dead_letters() == []


def test_what_hooks_send_rides_the_transaction(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def effect(n: int) -> int:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n])
        return n

    @dramatiq.actor(broker=broker, queue_name="unread")
    def follower(n: int) -> None: ...

    start_worker(broker, queues={"default"})
    pipeline([effect.message(1), follower.message()], broker=broker).run()
    wait_until(lambda: [m[0] for m in rows.messages()] == ["follower"])
    assert rows("SELECT e.xmin::text = m.xmin::text FROM effect e, durable.message m") == [(True,)]


def test_the_actor_cannot_commit_by_itself(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @dramatiq.actor(broker=broker, max_retries=0)
    def effect() -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (1)")
            conn.commit()

    start_worker(broker)
    effect.send()
    wait_until(rows.dead_letters)
    assert stored(rows) == []


def test_the_connections_go_back(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    go = threading.Event()

    @dramatiq.actor(broker=broker, max_retries=0)
    def effect(n: int) -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO effect VALUES (%s)", [n])
            go.wait(20)
            if n % 2:
                raise ValueError("no")

    start_worker(broker, threads=4)
    for n in range(40):
        effect.send(n)
    go.set()
    rows.drained()
    assert stored(rows) == list(range(0, 40, 2))
    assert rows(
        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%%' AND datname = current_database()"
    ) == [(0,)]


def test_outside_an_actor_it_is_an_error() -> None:
    with pytest.raises(durable.DurableError, match="inside a running actor"):
        durable.transaction()
