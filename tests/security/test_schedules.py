"""Schedules of logins that may use some streams only."""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.api import Session

from .conftest import Grant
from .scene import ONE_TEXT


@pytest.mark.parametrize("stream", ["theirs", "missing"])
def test_a_schedule_sends_only_where_its_maker_may(db: Session, grant: Grant, stream: str) -> None:
    db.stream("theirs")
    login = grant(consume=("mine", "theirs"), produce=("mine",))
    streams = dict(db.sql("SELECT name, stream_id FROM durable.stream"))
    with pytest.raises(psycopg.Error, match=ONE_TEXT):
        login.schedule("s", streams.get(stream, 10_000))
    # Neither can an existing one be moved there.
    login.schedule("s", streams["mine"])
    with pytest.raises(psycopg.Error, match=ONE_TEXT):
        login.schedule("s", streams.get(stream, 10_000), if_exists="update")


def test_the_same_name_is_everybodys_own(db: Session, grant: Grant) -> None:
    one, other = grant(produce=("mine",)), grant(produce=("mine",))
    stream = db.stream("mine")
    for session in (db, one, other):
        session.schedule("s", stream)
    one.control("s", "delete")
    with pytest.raises(psycopg.Error, match="there is no schedule"):
        one.control("s", "pause")
    assert one.call("list_schedules", None) == []
    for session in (db, other):
        assert len(session.call("list_schedules", None)) == 1
        session.control("s", "pause")


def test_two_logins_of_one_principal_share_theirs(db: Session, grant: Grant) -> None:
    one, other = (grant(produce=("mine",), principal="together") for _ in range(2))
    one.schedule("s", db.stream("mine"))
    other.control("s", "pause")
    assert [row[11] for row in one.call("list_schedules", "s")] == [True]


def test_a_tick_is_for_those_who_hold_its_lease(db: Session, grant: Grant) -> None:
    holder, other = (grant(consume=("mine",), produce=("mine",)) for _ in range(2))
    stream = db.stream("mine")
    holder.schedule("s", stream)
    tick = holder.register(stream).one()
    stranger = other.register(stream)
    assert stranger.look_up(tick) is None
    assert not stranger.fire(tick, 1_000_000)
    assert db.value("SELECT fired FROM durable.schedule") == 0


def test_a_message_that_is_no_tick_fires_nothing(db: Session, grant: Grant) -> None:
    login = grant(consume=("mine",), produce=("mine",))
    stream = db.stream("mine")
    login.enqueue(stream, b"x")
    worker = login.register(stream)
    message = worker.one()
    assert worker.look_up(message) is None
    assert not worker.fire(message, 1_000_000)


def test_the_id_of_a_tick_cannot_be_taken(db: Session, grant: Grant) -> None:
    login = grant(consume=("mine",), produce=("mine",))
    stream = db.stream("mine")
    id = login.schedule("s", stream)
    assert login.enqueue(stream, b"x", ids=[id]) == [-1]


def test_what_a_maker_who_lost_the_stream_left_behind_stops(db: Session, grant: Grant) -> None:
    login = grant(produce=("mine",))
    stream = db.stream("mine")
    login.schedule("s", stream)
    db.schedule("s", stream)
    db.sql("UPDATE durable.schedule SET seen_to = to_timestamp(0)")
    db.sql("DELETE FROM durable.stream_grant")
    worker = db.register(stream)
    for tick in worker.claim():
        assert worker.fire(tick, 1_000_000)
    rows = db.sql("SELECT space = 0, paused, fired::int, failure FROM durable.schedule ORDER BY space")
    assert rows == [(True, False, 1, None), (False, True, 0, "whoever made it may no longer send to the stream")]
    assert db.value("SELECT count(*) FROM durable.message WHERE kind = 'c'") == 1
    for attempt in (lambda: login.by_hand("s", None), lambda: login.schedule("s", stream, if_exists="update")):
        with pytest.raises(psycopg.Error, match=ONE_TEXT):
            attempt()
    login.control("s", "delete")
