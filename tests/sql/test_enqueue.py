from __future__ import annotations

import psycopg
import pytest

from dramatiq_durable.arrays import Blobs, Ints, Longs, Texts, Uuids

from .api import Session, derived, new_id


def test_messages_of_a_call_keep_their_order(db: Session) -> None:
    stream = db.stream()
    payloads = [b"%d" % n for n in range(200)]
    assert db.enqueue(stream, *payloads) == [1] * 200
    assert [c.payload for c in db.register(stream).claim(200)] == payloads


def test_messages_of_successive_calls_keep_their_order(db: Session) -> None:
    stream = db.stream()
    payloads = [b"%d" % n for n in range(50)]
    for payload in payloads:
        db.enqueue(stream, payload)
    assert [c.payload for c in db.register(stream).claim(50)] == payloads


def test_a_delayed_message_is_not_handed_out_before_its_time(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"late", b"now", delay=[60_000, 0])
    claimed, next_due = db.register(stream).look()
    assert [c.payload for c in claimed] == [b"now"]
    assert next_due is not None
    assert 50_000 < next_due <= 60_001


def test_a_delay_is_capped_at_ten_years_and_never_negative(db: Session) -> None:
    stream = db.stream()
    db.enqueue(stream, b"far", b"past", delay=[2**62, -(2**62)])
    days = db.value("SELECT max(extract(epoch FROM due_at - enqueued_at))::float8 / 86400 FROM durable.message")
    assert 3649 < days < 3651
    assert [c.payload for c in db.register(stream).claim()] == [b"past"]


def test_the_same_id_twice_is_one_message(db: Session) -> None:
    stream, other, message = db.stream(), db.stream("other"), new_id()
    assert db.enqueue(stream, b"1", ids=[message]) == [1]
    assert db.enqueue(stream, b"2", ids=[message]) == [0]
    assert db.enqueue(other, b"3", ids=[message]) == [1], "ids are unique within a stream, not across streams"
    assert [c.payload for c in db.register(stream).claim()] == [b"1"]


def test_each_answer_belongs_to_its_stream(db: Session) -> None:
    stream, other, message = db.stream(), db.stream("other"), new_id()
    db.enqueue(other, b"1", ids=[message])
    assert db.enqueue([stream, other], b"2", b"3", ids=[message, message]) == [1, 0]


def test_an_id_is_free_again_after_the_ack(db: Session) -> None:
    stream, message = db.stream(), new_id()
    db.enqueue(stream, b"1", ids=[message])
    worker = db.register(stream)
    assert worker.ack(worker.one()) == []
    assert db.enqueue(stream, b"2", ids=[message]) == [1]


def test_a_missing_stream_fails_alone(db: Session) -> None:
    stream = db.stream()
    assert db.enqueue([stream, 2**31 - 1, stream], b"1", b"2", b"3") == [1, -1, 1]
    assert db.messages(stream) == 2


@pytest.mark.parametrize("actor", ["", "a" * 201])
def test_a_name_that_is_too_long_or_empty_stores_nothing(db: Session, actor: str) -> None:
    stream = db.stream()
    with pytest.raises(psycopg.errors.CheckViolation):
        db.enqueue(stream, b"1", actor=actor)
    assert db.messages(stream) == 0


def test_a_payload_over_the_cap_stores_nothing(db: Session) -> None:
    stream = db.stream()
    assert db.enqueue(stream, bytes(16 * 1024 * 1024)) == [1]
    with pytest.raises(psycopg.errors.CheckViolation):
        db.enqueue(stream, bytes(16 * 1024 * 1024 + 1))
    assert db.messages(stream) == 1


def test_a_call_has_a_cap(db: Session) -> None:
    stream = db.stream()
    with pytest.raises(psycopg.errors.ProgramLimitExceeded):
        db.enqueue(stream, *[b""] * 10_001)
    assert db.messages(stream) == 0


def test_an_empty_call_stores_nothing(db: Session) -> None:
    assert db.enqueue(db.stream()) == []


def test_arrays_of_different_lengths_store_nothing(db: Session) -> None:
    stream = db.stream()
    with pytest.raises(psycopg.errors.NotNullViolation):
        db.call(
            "enqueue_messages",
            *db.batch(),
            Ints([stream, stream]),
            Uuids([new_id()]),
            Texts(["a"]),
            Ints([0]),
            Longs([0]),
            Blobs([b""]),
        )
    assert db.messages(stream) == 0


def test_payloads_are_kept_byte_for_byte(db: Session) -> None:
    stream = db.stream()
    payload = bytes(range(256)) * 100
    db.enqueue(stream, payload, b"")
    assert [c.payload for c in db.register(stream).claim()] == [payload, b""]


def test_a_message_that_is_alone(db: Session) -> None:
    stream = db.stream()
    id = new_id()
    assert db.enqueue_one(stream, id=id) == 1
    assert db.enqueue_one(stream, id=id) == 0, "the stream has it"
    assert db.enqueue_one(stream + 1000) == -1
    assert db.enqueue_one(stream, id=derived(new_id(), 1)) == -1, "ids of version 8 are the database's"
    assert db.enqueue_one(stream, delay=60_000) == 1
    claimed, next_due = db.register(stream).look(9)
    assert [c.message_id for c in claimed] == [id]
    assert next_due is not None
    assert 50_000 < next_due <= 60_000


def test_a_message_that_is_alone_has_its_batch(db: Session) -> None:
    """A batch that was given up cannot be committed late, and one that was committed is known."""
    stream = db.stream()
    assert db.enqueue_one(stream) == 1
    sender, last = db.batch()
    assert db.call("batch_outcome", sender, last - 1)[0][0] is True
    assert db.call("batch_outcome", sender, last + 5)[0][0] is False
    with pytest.raises(psycopg.Error) as e:
        db.enqueue_one(stream)
    assert e.value.sqlstate == "DD003"
    assert db.messages(stream) == 1
