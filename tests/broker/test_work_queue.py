"""What lies between the deliveries and a Worker's threads."""

from __future__ import annotations

import random
import threading
import time
from queue import Empty
from types import SimpleNamespace
from typing import Any

import dramatiq
import pytest
from dramatiq.common import iter_queue
from dramatiq.middleware import TimeLimit
from dramatiq.middleware.time_limit import TimeLimitExceeded

import dramatiq_durable as durable
from dramatiq_durable import time_limits
from dramatiq_durable.work_queue import WorkQueue
from tests.support import wait_until

from .conftest import Record


@pytest.fixture
def queue() -> WorkQueue:
    return WorkQueue()


def test_the_first_by_priority_comes_first_and_within_one_the_oldest(queue: WorkQueue) -> None:
    for n, priority in enumerate((5, 0, 5, 0, -1, 7)):
        queue.put(SimpleNamespace(priority=priority, message=(priority, n)))
    assert queue.qsize() == 6
    assert not queue.empty()
    got = [item.message for item in iter_queue(queue)]
    assert got == [(-1, 4), (0, 1), (0, 3), (5, 0), (5, 2), (7, 5)]
    assert queue.empty()
    assert queue.qsize() == 0


def test_whoever_waits_is_answered_in_time(queue: WorkQueue) -> None:
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(block=False)
    began = time.monotonic()
    with pytest.raises(Empty):
        queue.get(timeout=0.1)
    assert 0.09 < time.monotonic() - began < 5
    # Who gave up is not woken in place of one who waits.
    got = Record()
    thread = threading.Thread(target=lambda: got(queue.get(timeout=30)))
    thread.start()
    wait_until(lambda: bool(queue._idle))
    queue.add(0, "item")
    thread.join(10)
    assert got.values == ["item"]


def test_join_waits_for_what_is_not_done(queue: WorkQueue) -> None:
    queue.join()
    queue.add(0, "one")
    queue.add(0, "two")
    assert queue.unfinished_tasks == 2
    joined = threading.Event()

    def join() -> None:
        queue.join()
        joined.set()

    thread = threading.Thread(target=join)
    thread.start()
    for _ in range(2):
        queue.get()
        assert not joined.is_set()
        queue.task_done()
    assert joined.wait(10)
    thread.join()
    with pytest.raises(ValueError, match="too many"):
        queue.task_done()


@pytest.mark.parametrize("timeout", [None, 30.0, 0.0005])
def test_nobody_sleeps_while_something_is_there(queue: WorkQueue, timeout: float | None) -> None:
    """Many threads take what many add, with pauses at the worst moments: everything is taken once, and at once."""
    threads, each = 6, 1500
    got: list[list[Any]] = [[] for _ in range(threads)]
    gaps: list[float] = []

    def take(mine: list[Any]) -> None:
        while True:
            try:
                item = queue.get(timeout=timeout)
            except Empty:
                continue
            if item == "end":
                return
            gaps.append(time.monotonic() - item[1])
            mine.append(item[0])
            queue.task_done()

    def add(start: int) -> None:
        chance = random.Random(start)
        for n in range(each):
            queue.add(chance.choice((0, 0, 0, 1)), (start + n, time.monotonic()))
            if chance.random() < 0.3:
                # Until all are asleep, or about to be.
                time.sleep(chance.choice((0, 0.0001, 0.001)))

    takers = [threading.Thread(target=take, args=(mine,)) for mine in got]
    adders = [threading.Thread(target=add, args=(n * each,)) for n in range(3)]
    for thread in (*takers, *adders):
        thread.start()
    for thread in adders:
        thread.join(60)
    queue.join()
    for _ in takers:
        queue.add(9, "end")
    for thread in takers:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(n for mine in got for n in mine) == list(range(3 * each))
    # One that was forgotten would have waited for the next one to be added at the least.
    assert not queue._idle
    assert len(gaps) == 3 * each


def test_all_threads_work_while_actors_block(broker: durable.DurableBroker, start_worker: Any) -> None:
    threads = 8
    together = threading.Barrier(threads + 1)

    @dramatiq.actor(broker=broker, queue_name="blocking", max_retries=0)
    def block() -> None:
        together.wait(20)

    for _ in range(threads):
        block.send()
    start_worker(broker, threads=threads)
    together.wait(20)


def test_time_limits_without_their_lock_still_end_actors(broker: durable.DurableBroker, start_worker: Any) -> None:
    ended = Record()

    @dramatiq.actor(broker=broker, queue_name="slow", max_retries=0, time_limit=200)
    def slow() -> None:
        try:
            for _ in range(2000):
                time.sleep(0.01)
        except TimeLimitExceeded:
            ended("ended")
            raise

    slow.send()
    start_worker(broker)
    manager: Any = next(m for m in broker.middleware if isinstance(m, TimeLimit)).manager
    assert type(manager.deadlines) is not dict
    assert ended.wait(1) == ["ended"]


def test_deadlines_can_be_looked_through_while_a_thread_adds_its_first() -> None:
    limit = TimeLimit()
    time_limits.unlock([limit])
    time_limits.unlock([limit])
    manager: Any = limit.manager
    manager.add_timeout(1, float("inf"))
    for n, _ in enumerate(manager.deadlines.items()):
        manager.add_timeout(100 + n, float("inf"))
    assert set(manager.deadlines) == {1, 100}
