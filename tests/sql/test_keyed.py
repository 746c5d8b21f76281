"""Unique keys, in the procedures: states, transactions that overlap, repetitions."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from .api import Session, in_background, new_id


@pytest.mark.parametrize("conflict", ["skip", "fail", "replace"])
def test_a_free_key(db: Session, conflict: str) -> None:
    id = new_id()
    assert db.enqueue_keyed(db.stream(), "key", conflict, id=id) == (1, id)
    assert db.value("SELECT count(*) FROM durable.message") == 1


@pytest.mark.parametrize("state", ["waiting", "delayed", "leased", "rescheduled"])
def test_a_key_that_is_taken(db: Session, state: str) -> None:
    stream = db.stream()
    worker = db.register(stream)
    first, second = new_id(), new_id()
    db.enqueue_keyed(stream, "key", id=first, delay=60_000 if state == "delayed" else 0)
    claimed = worker.claim() if state in ("leased", "rescheduled") else []
    if state == "rescheduled":
        worker.reschedule(*claimed, delay=60_000)
    for conflict in ("skip", "fail"):
        assert db.enqueue_keyed(stream, "key", conflict) == (0, first)
    assert db.enqueue_keyed(stream, "key", "replace", id=second) == (1, second)
    left = {id for (id,) in db.sql("SELECT message_id FROM durable.message")}
    assert left == ({first, second} if state == "leased" else {second})
    assert db.sql("SELECT unique_key FROM durable.message WHERE unique_key IS NOT NULL") == [("key",)]
    if state == "leased":
        assert worker.ack(*claimed) == []  # it ends as it would


def test_the_same_id_again(db: Session) -> None:
    stream, id = db.stream(), new_id()
    for key in ("key", None):
        for conflict in ("skip", "fail", "replace"):
            status, found = db.enqueue_keyed(stream, key, conflict, id=id)
            assert found == id
            assert status == (key == "key" and conflict == "skip")
    assert db.value("SELECT count(*) FROM durable.message") == 1


def test_what_another_transaction_stores_in_this_moment(db: Session, connect: Callable[..., Session]) -> None:
    stream, first = db.stream(), new_id()
    other = connect()
    other.begin()
    other.enqueue_keyed(stream, "key", id=first)
    # Briefly it is waited for; while it stays open, others are told that it is busy.
    with pytest.raises(psycopg.errors.LockNotAvailable):
        db.enqueue_keyed(stream, "key")
    assert db.enqueue_keyed(stream, "another key")[0] == 1
    waiting = in_background(lambda: db.enqueue_keyed(stream, "key"))
    other.commit()
    assert waiting() == (0, first)
    other.begin()
    other.sql("DELETE FROM durable.message WHERE unique_key = 'key'")
    waiting = in_background(lambda: db.enqueue_keyed(stream, "key", "fail"))
    other.commit()
    assert waiting()[0] == 1


def test_two_that_replace_one(db: Session, connect: Callable[..., Session]) -> None:
    """The second finds the first's, and replaces it: it must not only take its key."""
    stream, last = db.stream(), new_id()
    db.enqueue_keyed(stream, "key")
    other = connect()
    other.begin()
    other.enqueue_keyed(stream, "key", "replace")
    waiting = in_background(lambda: db.enqueue_keyed(stream, "key", "replace", id=last))
    other.sql("SELECT pg_sleep(0.05)")
    other.commit()
    assert waiting() == (1, last)
    assert db.sql("SELECT message_id FROM durable.message") == [(last,)]


def test_a_key_keeps_its_neighbours(db: Session) -> None:
    """Several streams, and messages without a key."""
    one, two = db.stream("one"), db.stream("two")
    for stream in (one, two):
        db.enqueue_keyed(stream, "key")
        db.enqueue(stream, b"plain")
    assert db.enqueue_keyed(one, "key", "replace")[0] == 1
    assert db.value("SELECT count(*) FROM durable.message") == 4
