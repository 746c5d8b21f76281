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
