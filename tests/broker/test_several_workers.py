"""Several Workers of Dramatiq's on one broker object: whoever stops leaves the streams to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

from tests.support import wait_until


@pytest.mark.parametrize("first", [0, 1])
def test_the_one_that_stays_has_the_messages(
    make_broker: Callable[..., Any], start_worker: Callable[..., dramatiq.Worker], first: int
) -> None:
    broker = make_broker()
    done: list[int] = []

    @dramatiq.actor(broker=broker)
    def note(n: int) -> None:
        done.append(n)

    workers = [start_worker(broker), start_worker(broker)]
    for n in range(50):
        note.send(n)
    wait_until(lambda: len(done) == 50)
    for n in range(50, 100):
        note.send(n)
    workers.pop(first).stop()
    for n in range(100, 150):
        note.send(n)
    wait_until(lambda: len(done) == 150)
    assert sorted(done) == list(range(150))
    third = start_worker(broker)
    workers.pop().stop()
    note.send(150)
    wait_until(lambda: len(done) == 151)
    third.stop()
    assert broker.claimer is None
