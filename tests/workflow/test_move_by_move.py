"""Two workers at one run, move by move: whatever the one does while the other is at it, nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.arrays import Uuid
from dramatiq_durable.delivery import Delivery
from dramatiq_durable.incoming import delivery_of
from dramatiq_durable.operations import Claim
from tests.support import wait_until
from tests.support.waiting import lost
from tests.workflow.encoded import MakeBroker


class ByHand:
    """A worker whose every move the test makes: what it claims, when it takes it, and when that is committed."""

    def __init__(self, broker: durable.DurableBroker) -> None:
        self.broker = broker
        self._streams = [broker.stream_id("q")]
        token, _ = broker.commit.call(
            lambda conn: broker.procedures.register_worker(conn, "host", 1, 4, self._streams, 60_000, 3)
        )
        broker.commit.context.worker = Uuid(token)

    def claim(self, kind: str | None) -> Delivery:
        """Claim the next message, which has to be of this kind."""

        def row() -> Any:
            claim = Claim(self._streams, [1], 1, [], 0, True)
            self.broker.commit.submit(claim)
            return claim.answer[0]

        (claimed,) = wait_until(row, timeout=10)
        delivery = delivery_of(self.broker, claimed)
        assert delivery is not None
        assert kind in (None, delivery.kind)
        return delivery

    def take(self, delivery: Delivery) -> None:
        """Take the run's next step, which is not committed yet."""
        self.broker.runner._run_task(self.broker.workflows[delivery.actor_name], delivery)

    def commit(self) -> None:
        """Commit what waits for it, and what follows where that is refused."""
        while self.broker.commit.pending:
            self.broker.commit.run_batch(give_up=lambda: True)

    def do(self, kind: str | None) -> None:
        self.take(self.claim(kind))
        self.commit()


def declare(broker: durable.DurableBroker) -> Any:
    @durable.workflow(queue_name="q", broker=broker)
    async def both() -> Any:
        nap = asyncio.create_task(durable.sleep(2))
        said = await durable.wait_for_signal("go")
        await nap
        return said

    return both


@pytest.fixture
def workers(make_broker: MakeBroker) -> list[ByHand]:
    """Two workers; both is declared on each."""
    made = []
    for _ in range(2):
        broker = make_broker()
        declare(broker)
        made.append(ByHand(broker))
    return made


def test_what_a_refused_step_had_taken_keeps_its_task(workers: list[ByHand], database_url: str) -> None:
    one, other = workers
    run = one.broker.workflows["both"].start()
    other.do("s")
    run.signal("something else")
    # From now on the other has the run in memory as it is, and need not look at it anew when its timer is due.
    other.take(other.claim("t"))
    run.signal("go", "heard")
    task, timer = one.claim("t"), one.claim("w")
    one.take(timer)
    # Its news was taken with the timer, by a step that is about to be refused.
    one.take(task)
    other.commit()
    one.commit()
    with psycopg.connect(database_url, autocommit=True) as conn:
        assert lost(conn) == []
        for _ in range(4):
            if run.status() == "running":
                other.do(None)
                assert lost(conn) == []
    assert run.result(timeout=1) == "heard"


def test_a_task_that_brings_nothing_goes_with_the_step_that_took_its_news(
    workers: list[ByHand], database_url: str
) -> None:
    one, _ = workers
    run = one.broker.workflows["both"].start()
    one.do("s")
    run.signal("other", 1)
    run.signal("other", 2)
    first, second = one.claim("t"), one.claim("t")
    one.take(first)
    one.take(second)
    one.commit()
    with psycopg.connect(database_url) as conn:
        left = conn.execute("SELECT kind::text FROM durable.message").fetchall()
    assert left == [("w",)]


def test_a_task_that_comes_as_its_run_closes_is_done_with(workers: list[ByHand], database_url: str) -> None:
    one, _ = workers
    run = one.broker.workflows["both"].start()
    one.do("s")
    run.signal("go", "heard")
    one.do("t")
    timer = one.claim("w")
    run.cancel()
    task = one.claim("t")
    one.take(timer)
    one.take(task)
    one.commit()
    assert run.result(timeout=1) == "heard"
    one.do("t")
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(*) FROM durable.message").fetchone() == (0,)
