"""Brokers in company, with other encoders, with other middleware, and after their close."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq import Message, Middleware, pipeline
from dramatiq.middleware import AsyncIO, Callbacks, Pipelines, Retries

import dramatiq_durable as durable
from dramatiq_durable.migrate import migrate
from tests.support import wait_until
from tests.support.stored import message_in

from .conftest import Record, Rows, middleware


class Compressed(dramatiq.JSONEncoder):
    """An encoder whose bytes are no text."""

    def encode(self, data: Any) -> bytes:
        return b"\x00\xff" + zlib.compress(super().encode(data))

    def decode(self, data: bytes) -> Any:
        assert data[:2] == b"\x00\xff"
        return super().decode(zlib.decompress(data[2:]))


@pytest.fixture
def compressed() -> Iterator[None]:
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(Compressed())
    yield
    dramatiq.set_encoder(before)


def test_a_binary_encoder_carries_everything(
    compressed: None, broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, max_retries=2, min_backoff=1, max_backoff=1)
    def fails() -> None:
        got("fails")
        raise KeyError("a")

    @dramatiq.actor(broker=broker)
    def add(a: int, b: int) -> int:
        return a + b

    @dramatiq.actor(broker=broker)
    def last(n: int) -> None:
        got(n)

    start_worker(broker)
    fails.send()
    wait_until(lambda: [d[:2] for d in rows.dead_letters()] == [("fails", 3)])
    assert got.values == ["fails"] * 3
    pipeline([add.message_with_options(args=(1, 2), delay=5), add.message(3), last.message()], broker=broker).run()
    assert got.wait(4)[3] == 6
    [(payload,)] = rows("SELECT payload FROM durable.dead_letter")
    assert message_in(payload).options["retries"] == 3
    rows.drained()


def test_two_workers_of_two_namespaces_in_one_process(make_broker: Any, start_worker: Any, database_url: str) -> None:
    migrate(database_url, "second")
    got = Record()
    brokers = [make_broker(namespace=name, middleware=middleware()) for name in ("durable", "second")]

    for broker in brokers:
        dramatiq.actor(lambda n, broker=broker: got((broker.namespace, n)), actor_name="work", broker=broker)
        start_worker(broker)
    for n, broker in enumerate(brokers):
        broker.get_actor("work").send(n)
    assert sorted(got.wait(2)) == [("durable", 0), ("second", 1)]


def test_a_hook_sends_through_another_broker(make_broker: Any, start_worker: Any, database_url: str) -> None:
    """It is stored where that broker keeps its messages, and not with the ack, which is elsewhere."""
    migrate(database_url, "second")
    got = Record()
    second = make_broker(namespace="second")
    # So that the same stream has another id there.
    dramatiq.actor(lambda: None, actor_name="early", queue_name="a-queue-of-its-own", broker=second).send()

    @dramatiq.actor(broker=second)
    def told(name: str) -> None:
        got(name)

    class Tell(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            told.send(message.actor_name)

    first = make_broker(middleware=[*middleware(), Tell()])

    @dramatiq.actor(broker=first)
    def work() -> None: ...

    start_worker(second)
    start_worker(first)
    work.send()
    assert got.wait(1) == ["work"]
    first.join("default", timeout=10_000)
    second.join("default", timeout=10_000)


def test_without_any_middleware(make_broker: Any, start_worker: Any, rows: Rows) -> None:
    """As Dramatiq says: without Retries, what fails is done."""
    got = Record()
    broker = make_broker(middleware=[])

    @dramatiq.actor(broker=broker)
    def work(fail: bool) -> None:
        got(fail)
        if fail:
            raise KeyError("a")

    start_worker(broker)
    work.send(True)
    work.send(False)
    got.wait(2)
    rows.drained()
    assert rows.dead_letters() == []


@pytest.mark.parametrize("declared", ["before", "after"])
def test_middleware_that_is_added_later(make_broker: Any, start_worker: Any, rows: Rows, declared: str) -> None:
    """To a broker that has actors already, or has none yet; next to Retries, on either side."""
    got = Record()
    broker = make_broker(middleware=[Retries(min_backoff=1, max_backoff=1)])

    async def work() -> int:
        got("work")
        if len(got.values) == 1:
            raise KeyError("a")
        return 3

    def called(message: Any, result: Any) -> None:
        got((message["actor_name"], result))

    def declare() -> None:
        dramatiq.actor(work, broker=broker)
        dramatiq.actor(called, broker=broker)

    if declared == "before":
        declare()
    broker.add_middleware(Callbacks(), before=Retries)
    broker.add_middleware(Pipelines(), after=Retries)
    broker.add_middleware(AsyncIO())
    if declared == "after":
        declare()
    start_worker(broker)
    message = broker.get_actor("work").message_with_options(on_success="called")
    pipeline([message, Message("default", "nobody", (), {}, {})], broker=broker).run()
    assert got.wait(3) == ["work", "work", ("work", 3)]
    wait_until(lambda: [d[0] for d in rows.dead_letters()] == ["nobody"])
    rows.drained()


def test_a_closed_broker_works_again_with_a_worker(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def work(n: int) -> None:
        got(n)

    for n in range(2):
        worker = start_worker(broker)
        work.send(n)
        got.wait(n + 1)
        worker.stop()
        broker.close()
        broker.close()
    work.send(2)
    assert broker.get_queue_message_counts("default") == (1, 0, 0)
