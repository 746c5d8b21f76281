"""Queues as a whole: counted, flushed and waited for as with Dramatiq's own brokers; and how many are prefetched."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.errors import ActorNotFound, QueueJoinTimeout, QueueNotFound, Retry
from dramatiq.middleware import SkipMessage

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from tests.support import wait_until

from .conftest import Record, Rows


@pytest.fixture
def failing_fast(make_broker: Any) -> durable.DurableBroker:
    broker: durable.DurableBroker = make_broker(fail_fast_default=True)
    return broker


def test_counts_are_those_of_rabbitmq(broker: durable.DurableBroker, start_worker: Any) -> None:
    release, running = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker, max_retries=0)
    def work(fail: bool) -> None:
        running.set()
        release.wait(30)
        assert not fail

    assert broker.get_queue_message_counts("default") == (0, 0, 0)
    work.send(True)
    work.send(False)
    work.send_with_options(args=(False,), delay=60_000)
    assert broker.get_queue_message_counts("default") == (2, 1, 0)
    start_worker(broker, threads=1)
    running.wait(30)
    wait_until(lambda: broker.get_queue_message_counts("default")[1:] == (1, 0))
    release.set()
    wait_until(lambda: broker.get_queue_message_counts("default") == (0, 1, 1))
    with pytest.raises(QueueNotFound):
        broker.get_queue_message_counts("undeclared")


@pytest.mark.administrator
def test_a_flush_drops_what_waits_and_the_dead_letters(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    @dramatiq.actor(broker=broker, max_retries=0)
    def work() -> None:
        raise KeyError("a")

    @dramatiq.actor(broker=broker, queue_name="other", max_retries=0)
    def other() -> None:
        raise KeyError("a")

    worker = start_worker(broker)
    work.send()
    other.send()
    wait_until(lambda: len(rows.dead_letters()) == 2)
    worker.stop()
    work.send()
    work.send_with_options(delay=60_000)
    other.send()
    broker.flush("default")
    assert broker.get_queue_message_counts("default") == (0, 0, 0)
    assert broker.get_queue_message_counts("other") == (1, 0, 1)
    broker.flush_all()
    assert broker.get_queue_message_counts("other") == (0, 0, 0)
    with pytest.raises(QueueNotFound):
        broker.flush("undeclared")


def test_join_takes_what_other_brokers_take(broker: durable.DurableBroker) -> None:
    @dramatiq.actor(broker=broker)
    def work() -> None: ...

    broker.join("default", 10, 1)  # RabbitMQ's min_successes and idle_time
    broker.join("default", min_successes=2, idle_time=1, timeout=1000)
    broker.join("default", interval=1, timeout=1000)  # Redis's
    broker.join("default", fail_fast=True)  # the StubBroker's
    broker.join(queue_name="default", timeout=1000, fail_fast=False)
    work.send()
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", interval=5, timeout=50)
    with pytest.raises(QueueNotFound):
        broker.join("undeclared", fail_fast=True)


@pytest.mark.administrator
def test_join_raises_what_a_message_failed_with(failing_fast: durable.DurableBroker, start_worker: Any) -> None:
    class Special(Exception):
        pass

    @dramatiq.actor(broker=failing_fast, max_retries=1, min_backoff=1, max_backoff=1)
    def work(fail: bool) -> None:
        if fail:
            raise Special("on purpose")

    @dramatiq.actor(broker=failing_fast, max_age=1)
    def old() -> None: ...

    start_worker(failing_fast)
    work.send(False)
    failing_fast.join("default", timeout=10_000)
    work.send(True)
    with pytest.raises(Special, match="on purpose") as raised:
        failing_fast.join("default", timeout=10_000)
    assert any(entry.name == "work" for entry in raised.traceback)  # where it failed
    failing_fast.join("default", timeout=10_000)  # it was raised once
    work.send(True)
    failing_fast.join("default", timeout=10_000, fail_fast=False)
    message = old.message()
    failing_fast.enqueue(message.copy(message_timestamp=message.message_timestamp - 1000))
    with pytest.raises(SkipMessage):
        failing_fast.join("default", timeout=10_000)
    failing_fast.enqueue(Message("default", "nobody", (), {}, {}))
    with pytest.raises(ActorNotFound, match="nobody"):
        failing_fast.join("default", timeout=10_000)
    work.send(True)
    wait_until(lambda: failing_fast.failures)
    failing_fast.flush_all()
    failing_fast.join("default", timeout=10_000)


def test_join_raises_only_where_it_is_asked_to(broker: durable.DurableBroker, start_worker: Any) -> None:
    begin = threading.Event()

    @dramatiq.actor(broker=broker, max_retries=0)
    def work() -> None:
        begin.wait(30)
        raise KeyError("a")

    start_worker(broker)
    work.send()
    begin.set()
    broker.join("default", timeout=10_000)
    begin.clear()
    work.send()
    threading.Timer(0.2, begin.set).start()
    with pytest.raises(KeyError):
        broker.join("default", timeout=10_000, fail_fast=True)
    assert broker.failures == {}


@pytest.mark.parametrize("max_retries", [0, 1])
def test_an_exception_is_let_go(
    broker: durable.DurableBroker, start_worker: Any, max_retries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its traceback holds whatever the actor had in its hands."""
    caplog.set_level(logging.CRITICAL)  # a captured record would hold it, too
    raised: list[weakref.ref[Exception]] = []

    class Special(Exception):
        def __init__(self) -> None:
            raised.append(weakref.ref(self))

    @dramatiq.actor(broker=broker, max_retries=max_retries, min_backoff=1, max_backoff=1)
    def work() -> None:
        raise Special

    worker = start_worker(broker)
    gc.collect()
    gc.disable()
    try:
        work.send()
        broker.join("default", timeout=10_000)
        worker.join()
        wait_until(lambda: all(reference() is None for reference in raised))
        assert len(raised) == max_retries + 1
    finally:
        gc.enable()


def test_acks_of_unknown_messages_are_ignored(broker: durable.DurableBroker, rows: Rows) -> None:
    actor = dramatiq.actor(lambda: None, actor_name="work", broker=broker)
    message = actor.send()
    consumer = broker.consume("default")
    consumer.ack(MessageProxy(message))
    consumer.nack(MessageProxy(message))
    assert [m[0] for m in rows.messages()] == ["work"]
    assert rows.dead_letters() == []
    consumer.close()


def test_a_prefetch_that_was_asked_for_is_kept(broker: durable.DurableBroker, rows: Rows, start_worker: Any) -> None:
    """``dramatiq_queue_prefetch`` sets it: so many go to the worker, no more, and Dramatiq sorts them by priority."""
    got = Record()

    @dramatiq.actor(broker=broker, priority=10)
    def low(n: int) -> None:
        got(("low", n))

    @dramatiq.actor(broker=broker, priority=0)
    def high(n: int) -> None:
        got(("high", n))

    worker = dramatiq.Worker(broker, worker_timeout=20, worker_threads=1)
    worker.queue_prefetch = 6
    broker.emit_after("process_boot")
    worker.start()
    try:
        for thread in worker.workers:
            thread.pause()
            thread.paused_event.wait()
        for n in range(3):
            low.send(n)
        for n in range(3):
            high.send(n)
        wait_until(lambda: worker.work_queue.qsize() == 6)
        high.send(3)
        assert rows("SELECT count(*) FROM durable.message WHERE lease_token IS NULL") == [(1,)]
        worker.resume()
        values = got.wait(7)
        assert [v for v in values if v != ("high", 3)] == [(a, n) for a in ("high", "low") for n in range(3)]
    finally:
        worker.stop()


def test_a_prefetch_of_one_leaves_the_rest_to_others(
    broker: durable.DurableBroker, make_broker: Any, start_worker: Any
) -> None:
    """With eight threads Dramatiq's brokers still run one message of the queue at a time."""
    begun, end = Record(), threading.Event()

    def work() -> None:
        begun()
        end.wait(30)

    actor = dramatiq.actor(work, broker=broker)
    worker = dramatiq.Worker(broker, worker_timeout=20, worker_threads=8)
    worker.queue_prefetch = 1
    worker.start()
    try:
        for _ in range(3):
            actor.send()
        begun.wait(1)
        other = make_broker()
        dramatiq.actor(work, broker=other)
        start_worker(other, threads=2)
        begun.wait(3)
        end.set()
        broker.join("default", timeout=10_000)
    finally:
        end.set()
        worker.stop()


def test_a_retry_wakes_another_worker(make_broker: Any, start_worker: Any, rows: Rows) -> None:
    """The worker that reschedules a message may have no time for it; one that sleeps has to learn when it is due."""
    times, fail = Record(), threading.Event()

    def work() -> None:
        times(time.monotonic())
        if len(times.values) == 1:
            fail.wait(30)
            raise Retry(delay=300)

    def start() -> tuple[Any, dramatiq.Worker]:
        broker = make_broker(settings=Settings(poll_interval=30))
        return dramatiq.actor(work, broker=broker), start_worker(broker, threads=1)

    actor, first = start()
    actor.send()
    times.wait(1)
    start()
    asleep = "SELECT count(*) FROM durable.worker WHERE waiting_until IS NOT NULL AND held = '{}'"
    wait_until(lambda: rows(asleep) == [(1,)])
    for child in (*first.workers, *first.consumers.values()):
        child.pause()
    failed = time.monotonic()
    fail.set()
    assert 0.3 <= times.wait(2)[1] - failed < 3


def test_what_a_worker_sends_to_itself_needs_no_notification(
    make_broker: Any, start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that stores it claims it: a message, a retry, what a hook sends."""
    monkeypatch.setattr(durable.DurableBroker, "_wake_claimer", lambda self: None)
    broker = make_broker(settings=Settings(poll_interval=30))
    got = Record()

    @dramatiq.actor(broker=broker, min_backoff=0, on_success="called")
    def work() -> None:
        got("work")
        if len(got.values) < 3:
            raise KeyError("a")

    @dramatiq.actor(broker=broker)
    def called(message: Any, result: Any) -> None:
        got("called")

    start_worker(broker)
    for _ in range(2):  # the second time it sleeps for sure
        work.send()
        assert got.wait(4, timeout=10) == ["work", "work", "work", "called"]
        broker.join("default", timeout=5000)
        got.values.clear()
        wait_until(lambda: broker.claimer._asleep)
