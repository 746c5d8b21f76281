"""After a lost answer: a batch is committed once, and its outcome can be looked up."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from dramatiq_durable.arrays import Uuid
from tests.support import wait_until

from .api import Session, in_background


def outcome(session: Session, sender: bytes, batch: int) -> bool:
    return bool(session.call("batch_outcome", Uuid(sender), batch)[0][0])


def test_a_committed_batch_is_known(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    db.enqueue(stream, b"2")
    assert outcome(db, db.sender, 1) is True
    assert outcome(db, db.sender, 2) is True
    assert outcome(db, db.sender, 2) is True


def test_a_batch_that_was_given_up_cannot_be_committed_late(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"1")
    assert outcome(db, db.sender, 2) is False
    with pytest.raises(psycopg.Error) as error:
        db.enqueue(stream, b"2")
    assert error.value.sqlstate == "DD003"
    assert db.enqueue(stream, b"3") == [1]
    assert [c.payload for c in db.register(stream).claim()] == [b"1", b"3"]


def test_the_outcome_stays_the_same_when_it_is_asked_again(db: Session) -> None:
    """Its own answer may be lost too; "committed" would then lose the messages."""
    stream = db.stream()
    for _ in range(3):
        assert outcome(db, db.sender, 1) is False
    next(db.batches)
    db.enqueue(stream, b"1")
    assert outcome(db, db.sender, 1) is False
    assert outcome(db, db.sender, 2) is True


def test_an_unknown_sender_has_committed_nothing(db: Session) -> None:
    assert outcome(db, bytes(16), 1) is False


def test_a_batch_under_way_is_waited_for(connect: Callable[..., Session]) -> None:
    one, other = connect(), connect()
    stream = one.stream()
    for commit in (True, False):
        number = 1 if commit else 2
        one.begin()
        one.enqueue(stream, b"1")
        asked = in_background(lambda n=number: outcome(other, one.sender, n))
        watcher = connect()
        wait_until(lambda w=watcher: w.is_blocked(other), message="the question waits for the batch")
        one.commit() if commit else one.rollback()
        assert asked() is commit
    assert one.messages(stream) == 1


def test_a_batch_that_comes_after_the_question_is_refused(connect: Callable[..., Session]) -> None:
    one, other = connect(), connect()
    stream = one.stream()
    other.begin()
    assert outcome(other, one.sender, 1) is False
    late = in_background(lambda: one.enqueue(stream, b"1"))
    wait_until(lambda: other.is_blocked(one), message="the late batch waits")
    other.commit()
    with pytest.raises(psycopg.Error) as error:
        late()
    assert error.value.sqlstate == "DD003"
    assert other.messages(stream) == 0


def test_a_rolled_back_batch_leaves_its_number_free(db: Session) -> None:
    stream = db.stream()
    db.begin()
    db.enqueue(stream, b"1")
    db.rollback()
    assert outcome(db, db.sender, 1) is False


def test_numbers_are_a_senders_own(connect: Callable[..., Session]) -> None:
    one, other = connect(), connect()
    stream = one.stream()
    for _ in range(5):
        next(one.batches)
    assert one.enqueue(stream, b"1") == [1]
    assert other.enqueue(stream, b"2") == [1]
