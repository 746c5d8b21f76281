"""Somebody else's lock on a message that a worker has in hand: its end waits, and nothing else of that worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from tests.support import wait_until

from .conftest import Record, Rows

ABORT = "SELECT durable.abort_message(array_agg(message_id), true) FROM durable.message WHERE lease_token IS NOT NULL"


def aborts(conn: psycopg.Connection[Any], actor: dramatiq.Actor[..., Any]) -> None:
    conn.execute(ABORT)


def replaces(conn: psycopg.Connection[Any], actor: dramatiq.Actor[..., Any]) -> None:
    with durable.using(conn):
        actor.send_with_options(args=("done",), unique_key="key", unique_conflict="replace")


@pytest.mark.parametrize("locks", [aborts, replaces])
@pytest.mark.parametrize("ends", ["ack", "retry", "bury"])
def test_whoever_locks_a_message_in_hand_holds_up_nothing_else(
    broker: durable.DurableBroker,
    rows: Rows,
    start_worker: Any,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    locks: Callable[..., None],
    ends: str,
) -> None:
    ran, begun, go = Record(), threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker, min_backoff=60_000, max_backoff=600_000, max_retries=0 if ends == "bury" else 1)
    def slow(how: str) -> None:
        begun.set()
        assert go.wait(20)
        if how != "done" and ends != "ack":
            raise ValueError(how)

    @dramatiq.actor(broker=broker)
    def quick(n: int) -> None:
        ran(n)

    slow.send_with_options(args=("first",), unique_key="key")
    worker = start_worker(broker, threads=4)
    assert begun.wait(10)
    with psycopg.connect(database_url) as conn:
        locks(conn, slow)
        go.set()
        wait_until(lambda: "waits to be settled" in caplog.text, timeout=5)
        for n in range(25):
            quick.send(n)
            wait_until(lambda n=n: ran.values[-1:] == [n], timeout=5)  # type: ignore[misc]
        wait_until(lambda: [m[0] for m in rows.messages()] == ["slow"], timeout=5)
        assert broker.claimer is not None
        assert broker.commit.leased_messages()  # a heartbeat names it: it is not given to others
        conn.rollback()
    left = {"ack": 0, "retry": 1, "bury": 0}[ends]
    wait_until(lambda: rows("SELECT count(*) FROM durable.message WHERE lease_token IS NULL")[0][0] == left)
    wait_until(lambda: rows("SELECT count(*) FROM durable.dead_letter")[0][0] == (ends == "bury"))
    wait_until(lambda: rows("SELECT count(*) FROM durable.message")[0][0] == left)
    worker.stop()
