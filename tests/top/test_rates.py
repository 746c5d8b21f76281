"""How fast each stream moves, as `top` tells it: against what real workers did, and where it can only be estimated."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.cli.target import Target
from dramatiq_durable.cli.top.look import Look, Looker
from dramatiq_durable.settings import Settings
from tests.support import wait_until

pytestmark = pytest.mark.administrator


@pytest.fixture
def looker(database_url: str) -> Iterator[Looker]:
    looker = Looker(Target(database_url, None))
    yield looker
    looker.close()


def stream(look: Look, name: str) -> dict[str, Any]:
    return next(stream for stream in look.streams if stream["name"] == name)


@pytest.fixture
def numbers(database_url: str) -> Iterator[dict[str, Any]]:
    """Two actors on streams of their own, and how often each ran."""
    # A worker whose reclaim_delay is a second beats four times a second.
    broker = durable.DurableBroker(database_url, middleware=[], reclaim_delay=1.0, settings=Settings(poll_interval=0.1))
    done = {"fast": 0, "slow": 0}

    def count(name: str) -> None:
        done[name] += 1

    actors = {name: dramatiq.actor(count, actor_name=name, queue_name=name, broker=broker) for name in done}
    yield {"broker": broker, "done": done, **actors}
    broker.close()


def test_of_what_comes_and_goes(numbers: dict[str, Any], looker: Looker) -> None:
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.01):
            numbers["fast"].send("fast")
            numbers["fast"].send("fast")
            if sum(numbers["done"].values()) % 3 == 0:
                numbers["slow"].send("slow")

    worker = dramatiq.Worker(numbers["broker"], worker_timeout=50, worker_threads=1)
    worker.start()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        wait_until(lambda: numbers["done"]["slow"])
        begun, before = time.monotonic(), dict(numbers["done"])
        looks = []
        while time.monotonic() < begun + 6:
            looks.append(looker.look())
            time.sleep(0.25)
        took, after = time.monotonic() - begun, dict(numbers["done"])
    finally:
        ended.set()
        sender.join()
    # Whatever the machine can do: on the whole, that is what was shown.
    later = looks[len(looks) // 4 :]
    for name in ("fast", "slow"):
        true = (after[name] - before[name]) / took
        for direction in ("in_rate", "out_rate"):
            shown = [stream(look, name)[direction] for look in later]
            assert sum(shown) / len(shown) == pytest.approx(true, rel=0.35), (name, direction, true, shown)
            assert min(shown) >= 0
    total = sum(look.rates["out"] or 0 for look in later) / len(later)
    assert total == pytest.approx((sum(after.values()) - sum(before.values())) / took, rel=0.35)
    # Nothing comes any more, and then the worker goes.
    wait_until(lambda: looker.look().rates["out"] == 0)
    numbers["fast"].send("fast")
    wait_until(lambda: (looker.look().rates["out"] or 0) > 0)
    worker.stop()
    look = looker.look()
    assert look.workers == []
    assert look.rates["out"] == 0
    assert min(s["in_rate"] for s in look.streams) >= 0


def test_of_a_worker_that_was_killed(database_url: str, looker: Looker) -> None:
    """Nobody says for half a minute that it is dead; what it said last is no rate any more after two heartbeats."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{a}')")
        conn.execute(
            "INSERT INTO durable.worker (login, principal_id, host, pid, stream_ids, threads, reclaim_delay, "
            "reclaim_count, rates) VALUES (session_user, 1, 'h', 1, '{1}', 4, interval '30 s', 3, '{400}')"
        )
        assert stream(looker.look(), "a")["out_rate"] == 400
        conn.execute("UPDATE durable.worker SET beat_at = now() - interval '12 s'")
        look = looker.look()
    assert stream(look, "a")["out_rate"] == 0
    assert [worker["state"] for worker in look.workers] == ["live"]


def test_where_more_lies_than_is_counted(database_url: str, looker: Looker) -> None:
    """An estimate is too rough for a difference: what came and is still there tells what comes."""
    store = (
        "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload) "
        "SELECT gen_random_uuid(), 1, 0, clock_timestamp() - n * interval '1 ms' * %s, "
        "clock_timestamp() - n * interval '1 ms' * %s, 'a', '' FROM generate_series(1, %s) n"
    )
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{a}')")
        conn.execute(
            "INSERT INTO durable.worker (login, principal_id, host, pid, stream_ids, threads, reclaim_delay, "
            "reclaim_count, rates) VALUES (session_user, 1, 'h', 1, '{1}', 4, interval '30 s', 3, '{40}')"
        )
        conn.execute(store.encode(), (3600, 3600, 30_000))
        first = stream(looker.look(), "a")
        # A hundred came in the last ten seconds, and much less goes.
        conn.execute(store.encode(), (100, 100, 100))
        found = stream(looker.look(), "a")
    assert first["ready"] == pytest.approx(30_000, rel=0.1)
    assert first["in_rate"] <= 1
    assert found["in_rate"] == pytest.approx(10, rel=0.25)
    assert found["out_rate"] == 40
    assert found["change_rate"] == pytest.approx(-30, rel=0.25)
