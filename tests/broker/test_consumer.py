"""The consumer's contract, with and without a Worker."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import dramatiq
import dramatiq.worker
import psycopg
import pytest
from dramatiq.errors import QueueNotFound

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from tests.support import wait_until

from .conftest import Record, Rows


@pytest.fixture
def numbers(broker: durable.DurableBroker) -> Any:
    @dramatiq.actor(broker=broker, queue_name="numbers")
    def numbers(n: int) -> None: ...

    return numbers


def take(consumer: Any, count: int) -> list[Any]:
    """The next messages; None comes where nothing is there within the consumer's timeout."""
    found: list[Any] = []
    deadline = time.monotonic() + 15
    while len(found) < count and time.monotonic() < deadline:
        message = next(consumer)
        if message is not None:
            found.append(message)
    assert len(found) == count
    return found


def test_messages_are_consumed_without_a_worker(broker: durable.DurableBroker, numbers: Any, rows: Rows) -> None:
    for n in range(3):
        numbers.send(n)
    consumer = broker.consume("numbers", prefetch=2, timeout=50)
    one, two = take(consumer, 2)
    assert (one.args, two.args, one.queue_name) == ((0,), (1,), "numbers")
    assert next(consumer) is None  # prefetch is the most that may be unacked
    assert [m[2] for m in rows.messages()] == [True, True, False]
    consumer.ack(one)
    [three] = take(consumer, 1)
    assert three.args == (2,)
    consumer.nack(two)
    consumer.ack(three)
    rows.drained()
    assert [d[:3] for d in rows.dead_letters()] == [("numbers", 1, "rejected")]
    consumer.close()


def test_no_eager_delivery_exceeds_a_prefetch_that_was_asked_for(broker: durable.DurableBroker, numbers: Any) -> None:
    broker.declare_queue("others")
    others: Any = broker.consume("others", prefetch=9, timeout=50)
    consumer: Any = broker.consume("numbers", prefetch=2, timeout=50)
    claimer = consumer.claimer
    numbers.send(1)
    [one] = take(consumer, 1)
    for swap in (True, False):
        wait_until(partial(claimer.reserve, consumer.stream_id, swap=swap))
        claimer.unreserve(1)
    numbers.send(2)
    [two] = take(consumer, 1)
    # As where the second one came eagerly, and nothing waits.
    consumer.drained = True
    assert not claimer.reserve(consumer.stream_id, swap=True)
    assert not claimer.reserve(consumer.stream_id, swap=False)
    consumer.ack(one)
    consumer.ack(two)
    consumer.close()
    others.close()


def test_next_answers_within_the_timeout(broker: durable.DurableBroker, numbers: Any) -> None:
    consumer = broker.consume("numbers", timeout=100)
    began = time.monotonic()
    assert next(consumer) is None
    assert 0.08 < time.monotonic() - began < 2
    consumer.close()


def test_an_undeclared_queue_cannot_be_consumed(broker: durable.DurableBroker) -> None:
    with pytest.raises(QueueNotFound):
        broker.consume("undeclared")


def test_requeued_messages_come_again_as_the_same_attempt(broker: durable.DurableBroker, numbers: Any) -> None:
    numbers.send(1)
    consumer = broker.consume("numbers", timeout=50)
    [message] = take(consumer, 1)
    consumer.requeue([message])
    [again] = take(consumer, 1)
    assert (again.message_id, again.attempt) == (message.message_id, 1)
    assert again.lease != message.lease
    consumer.ack(again)
    consumer.close()
    broker.join("numbers", timeout=5000)


def test_a_stale_outcome_changes_nothing(
    broker: durable.DurableBroker, numbers: Any, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    numbers.send(1)
    consumer = broker.consume("numbers", timeout=50)
    [message] = take(consumer, 1)
    rows("UPDATE durable.message SET lease_token = gen_random_uuid()")
    consumer.ack(message)
    wait_until(lambda: "the lease on" in caplog.text)
    assert rows.count() == 1
    consumer.close()


def test_a_successor_acks_what_its_predecessor_handed_out(
    broker: durable.DurableBroker, numbers: Any, rows: Rows
) -> None:
    for n in range(3):
        numbers.send(n)
    consumer = broker.consume("numbers", prefetch=2, timeout=50)
    one, two = take(consumer, 2)
    consumer.close()
    successor = broker.consume("numbers", prefetch=2, timeout=50)
    successor.ack(one)
    successor.nack(two)
    [three] = take(successor, 1)
    successor.ack(three)
    rows.drained()
    assert len(rows.dead_letters()) == 1
    successor.close()


def test_closing_a_consumer_gives_back_what_was_not_taken(
    broker: durable.DurableBroker, numbers: Any, rows: Rows
) -> None:
    for n in range(4):
        numbers.send(n)
    consumer = broker.consume("numbers", prefetch=4, timeout=50)
    take(consumer, 1)
    wait_until(lambda: [m[2] for m in rows.messages()] == [True] * 4)
    consumer.close()
    wait_until(lambda: sorted(m[2] for m in rows.messages()) == [False] * 3 + [True])


def test_closing_and_consuming_while_claims_are_on_their_way_loses_nothing(
    broker: durable.DurableBroker, numbers: Any, rows: Rows
) -> None:
    for n in range(40):
        numbers.send(n)
    for _ in range(30):
        consumer = broker.consume("numbers", prefetch=5, timeout=1)
        message = next(consumer)
        if message is not None:
            consumer.requeue([message])
        consumer.close()
    consumer = broker.consume("numbers", prefetch=40, timeout=50)
    assert {m.args[0] for m in take(consumer, 40)} == set(range(40))
    consumer.close()


def test_a_broker_that_goes_gives_its_messages_back(
    make_broker: Callable[..., durable.DurableBroker], broker: durable.DurableBroker, numbers: Any, rows: Rows
) -> None:
    numbers.send(1)
    other = make_broker()
    other.declare_queue("numbers")
    consumer = other.consume("numbers", timeout=50)
    take(consumer, 1)
    other.close()
    assert [m[:3] for m in rows.messages()] == [("numbers", 1, False)]
    assert rows("SELECT count(*) FROM durable.worker") == [(0,)]


def test_two_brokers_share_a_queue_and_each_message_goes_to_one(
    make_broker: Callable[..., durable.DurableBroker], broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    got = Record()
    brokers = [broker, make_broker()]
    for each in brokers:

        @dramatiq.actor(broker=each)
        def shared(n: int) -> None:
            got(n)

    for each in brokers:
        start_worker(each)
    broker.enqueue_many([broker.get_actor("shared").message(n) for n in range(300)])
    rows.drained()
    assert sorted(got.values) == list(range(300))


# --- the worker ---------------------------------------------------------------------------------------------


def test_pause_and_resume(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dramatiq.worker, "CONSUMER_RESTART_DELAY_SECS", 0.05)
    got = Record()

    @dramatiq.actor(broker=broker)
    def take_one(n: int) -> None:
        got(n)

    worker = start_worker(broker)
    take_one.send(1)
    got.wait(1)
    worker.pause()
    take_one.send(2)
    other = threading.Event()
    other.wait(0.6)  # longer than two polls: nothing may happen, so there is nothing to wait for
    assert got.values == [1]
    assert [m[2] for m in rows.messages()] == [False]
    worker.resume()
    assert got.wait(2) == [1, 2]


def test_a_paused_stream_hands_nothing_out(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, queue_name="held")
    def held() -> None:
        got("held")

    @dramatiq.actor(broker=broker, queue_name="free")
    def free() -> None:
        got("free")

    held.send()
    rows("UPDATE durable.stream SET paused = true WHERE name = 'held'")
    start_worker(broker)
    free.send()
    got.wait(1)
    broker.join("free", timeout=5000)
    assert got.values == ["free"]
    rows("UPDATE durable.stream SET paused = false")
    assert got.wait(2) == ["free", "held"]


def test_an_idle_worker_wakes_quickly(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def tick() -> None:
        got(time.monotonic())

    broker.settings = Settings(poll_interval=30)
    start_worker(broker)
    tick.send()
    got.wait(1)
    for turn in range(2, 5):
        threading.Event().wait(0.7)  # idle: this is what is tested
        sent = time.monotonic()
        tick.send()
        assert got.wait(turn)[-1] - sent < 1


def test_without_notifications_polling_finds_the_message(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any
) -> None:
    """The connection that listens cannot be made: everything still happens, within the poll interval."""
    broker, got = (
        make_broker(settings=Settings(poll_interval=0.25, listen_url="postgresql://127.0.0.1:1/none")),
        Record(),
    )

    @dramatiq.actor(broker=broker)
    def tick(n: int) -> None:
        got(n)

    start_worker(broker)
    for n in range(4):
        tick.send(n)
        assert got.wait(n + 1, timeout=5)[-1] == n


def test_an_ended_listener_comes_back(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def tick(n: int) -> None:
        got(n)

    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE query LIKE 'LISTEN%%' AND datname = current_database()"
    )
    start_worker(broker)
    for n in range(3):
        assert all(ended for (ended,) in wait_until(lambda: rows(end)))
        tick.send(n)
        assert got.wait(n + 1, timeout=5)[-1] == n


def test_one_slow_worker_does_not_sit_on_messages(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any
) -> None:
    begun, go, got = threading.Event(), threading.Event(), Record()
    slow, quick = make_broker(), make_broker()

    @dramatiq.actor(broker=slow)
    def work(n: int) -> None:
        if n > 200:
            begun.set()
            go.wait(30)
        got(n)

    @dramatiq.actor(broker=quick, actor_name="work")
    def work_too(n: int) -> None:
        got(n)

    start_worker(slow, threads=1)
    slow.enqueue_many([work.message(n) for n in range(200)])  # makes it claim ahead
    got.wait(150)
    slow.enqueue_many([work.message(1000)])
    assert begun.wait(10)
    slow.enqueue_many([work.message(n) for n in range(50)])
    start_worker(quick)
    claimer: Any = slow.claimer
    turns, turn = Record(), claimer._turn
    claimer._turn = lambda: (turns(), turn())
    try:
        got.wait(250, timeout=10)  # also what stood in the queue behind the slow one
        seen = len(turns.values)
        threading.Event().wait(0.5)
        assert len(turns.values) - seen < 20  # it has no place for more, and rests
    finally:
        go.set()


# --- no I/O too early, forks --------------------------------------------------------------------------------


def test_the_constructor_does_no_io(monkeypatch: pytest.MonkeyPatch, clean_environment: Callable[..., None]) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("I/O")

    for place, name in [(socket, "socket"), (psycopg, "connect"), (threading.Thread, "start")]:
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr("dramatiq_durable.embedded.acquire", refuse)
    for broker in (durable.DurableBroker("postgresql://nobody@nowhere.invalid/none"), durable.DurableBroker()):

        @dramatiq.actor(broker=broker, queue_name="early")
        def early() -> None: ...

        @durable.workflow(broker=broker, queue_name="early")
        async def flow() -> None: ...

        assert "early" in broker.get_declared_queues()
        broker.close()


FORK = """
import os, sys, threading, dramatiq
import dramatiq_durable as durable

broker = durable.DurableBroker(sys.argv[1])
dramatiq.set_broker(broker)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece: others write there too

@dramatiq.actor
def take(n):
    say("ran", n)

def work():
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
    worker.start()
    broker.join("default", timeout=10000)
    worker.stop()

def child(function):
    pid = os.fork()
    if not pid:
        try:
            function()
            os._exit(0)
        except BaseException as e:
            say("failed", repr(e))
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    say("child", status)

take.send("parent-1")                       # connections are open
child(lambda: take.send("child-1"))
child(work)
take.send("parent-2")                       # the parent's own connections were left alone
child(work)
worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
worker.start()                              # now a thread leads for everybody
take.send("parent-3")
child(lambda: take.send("child-2"))         # and it is not there in the child
broker.join("default", timeout=10000)
worker.stop()
broker.close()
say("end")
"""


def test_a_broker_that_was_used_before_a_fork_works_after_it(run_process: Any, database_url: str) -> None:
    process = run_process.python(FORK, database_url)
    assert process.wait(timeout=60) == 0, process.output
    lines = process.output.splitlines()
    assert [line for line in lines if line.startswith(("child", "failed"))] == ["child 0"] * 4, process.output
    ran = sorted(line.split()[1] for line in lines if line.startswith("ran"))
    assert ran == ["child-1", "child-2", "parent-1", "parent-2", "parent-3"]
