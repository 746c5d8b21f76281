"""A worker that stops while an actor still runs: it waits, and does not burn a processor meanwhile."""

from __future__ import annotations

import threading

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until


def test_a_draining_claimer_sleeps(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = durable.DurableBroker(database_url)
    begun, finish = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker)
    def slow() -> None:
        begun.set()
        finish.wait(20)

    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=2)
    try:
        worker.start()
        slow.send()
        assert begun.wait(10)
        claimer = broker.claimer
        assert claimer is not None
        turns: list[float] = []
        turn = claimer._turn
        monkeypatch.setattr(claimer, "_turn", lambda: (turns.append(0), turn()))
        claimer.drain()
        # What a message for this worker does now: it is woken, and may not claim.
        claimer.wake()
        wait_until(lambda: len(turns) > 0, message="a turn of the claimer")
        before = claimer.membership._next_beat
        wait_until(lambda: claimer.membership._next_beat != before, message="a heartbeat, which comes in seconds")
        assert len(turns) < 100
    finally:
        finish.set()
        worker.stop()
        broker.close()


def test_a_backlog_is_drained_without_a_pause(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an idle stream of runs: what is known to wait is claimed once there is room, not at the next poll."""
    broker = durable.DurableBroker(database_url)
    done = threading.Semaphore(0)

    @dramatiq.actor(broker=broker, queue_name="plain")
    def noop() -> None:
        done.release()

    @durable.workflow(broker=broker, queue_name="runs")
    async def idle() -> None: ...

    broker.enqueue_many([noop.message() for _ in range(2000)])
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
    paused: list[float] = []
    try:
        worker.start()
        claimer = broker.claimer
        assert claimer is not None
        event = claimer._event
        wait = event.wait

        def watched(timeout: float) -> bool:
            woken = wait(timeout)
            if not woken and timeout > 0.1:
                paused.append(timeout)
            return woken

        monkeypatch.setattr(event, "wait", watched)
        for _ in range(2000):
            assert done.acquire(timeout=20)
        assert len(paused) <= 2
    finally:
        worker.stop()
        broker.close()
