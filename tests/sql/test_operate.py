"""What operators call: pause, peek, purge, and the dead letters' way back."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Longs, Uuid, Uuids

from .api import Session, Worker, new_id, send_activity, step
from .test_abort import started
from .test_advance import begin
from .test_plans import MANY, counting, fill

LAST = 2**62


def filters(**chosen: Any) -> list[Any]:
    """As arguments of a call."""
    if "letters" in chosen:
        chosen["letters"] = Longs(chosen["letters"])
    if "messages" in chosen:
        chosen["messages"] = Uuids(chosen["messages"])
    names = ("letters", "messages", "stream", "actor", "reason", "after", "before", "text")
    assert set(chosen) <= set(names)
    return [chosen.get(name) for name in names]


def redrive(db: Session, *, above: int = 0, limit: int = 500, **chosen: Any) -> tuple[int, int, int, list[int]]:
    """(matched, redriven, last, kept)"""
    return db.call("redrive_dead_letters", *filters(**chosen), above, LAST, limit)[0]  # type: ignore[return-value]


def listed(db: Session, limit: int = 100, **chosen: Any) -> list[tuple[Any, ...]]:
    return db.call("list_dead_letters", *filters(**chosen), limit)


def letters(db: Session, stream: int, count: int, **values: str) -> None:
    """Dead letters of a stream, made by hand."""
    columns = {
        "message_id": "gen_random_uuid()",
        "stream_id": str(stream),
        "priority": "0",
        "enqueued_at": "now()",
        "attempt": "3",
        "deaths": "0",
        "actor": "'actor'",
        "reason": "'rejected'",
        "failure": "'ValueError: no ' || n",
        "payload": "'p'::bytea",
    } | values
    db.sql(
        f"INSERT INTO durable.dead_letter ({', '.join(columns)}) "
        f"SELECT {', '.join(columns.values())} FROM generate_series(1, {count}) n"
    )


# --- pause ----------------------------------------------------------------------------------------------------


def test_a_paused_stream_hands_nothing_out(db: Session) -> None:
    stream, other = db.stream("s"), db.stream("other")
    db.enqueue([stream, stream, other], b"1", b"2", b"3")
    worker = db.register(stream, other)
    (running,) = worker.claim(1, streams=[stream])
    assert db.call("pause_stream", "s", True) == [(True,)]
    assert db.call("pause_stream", "s", True) == [(False,)]
    assert [c.payload for c in worker.claim()] == [b"3"]
    assert worker.reschedule(running) == []
    assert worker.claim() == []
    db.call("pause_stream", "s", False)
    assert len(worker.claim()) == 2


def test_a_paused_stream_hands_nothing_out_eagerly(db: Session) -> None:
    begun = begin(db)
    db.call("pause_stream", "s", True)
    advance = step(begun.task, 1, ("ActivityScheduled", 1, "a"))
    advance.sends = [send_activity(begun.stream, 1, eager=True)]
    assert begun.worker.advance(advance) == ["ok"]
    assert advance.eager == {}
    assert begun.worker.claim() == []


def test_a_resume_wakes_those_who_wait(db: Session) -> None:
    stream = db.stream("s")
    worker = db.register(stream)
    db.call("pause_stream", "s", True)
    worker.claim(wait=60_000)
    db.sql(f'LISTEN "durable:s{stream}"')
    db.call("pause_stream", "s", False)
    assert len(list(db.conn.notifies(timeout=5, stop_after=1))) == 1


def test_a_stream_that_does_not_exist_is_named(db: Session) -> None:
    for call in (("pause_stream", True), ("peek_messages", None, None, 1), ("count_waiting", None)):
        with pytest.raises(psycopg.Error, match='there is no stream named "nowhere"'):
            db.call(call[0], "nowhere", *call[1:])


# --- peek and purge -------------------------------------------------------------------------------------------


def test_a_peek_tells_all_and_changes_nothing(db: Session) -> None:
    stream = db.stream("s")
    db.enqueue(stream, b"1", b"2", b"3", delay=[0, 0, 60_000], priority=[5, 1, 0])
    worker = db.register(stream)
    (claimed,) = worker.claim(1)
    worker.call("report_running", Uuids([claimed.message_id]), [5000])
    before = db.sql("SELECT * FROM durable.message ORDER BY 1")
    rows = db.call("peek_messages", "s", None, None, 10)
    assert [(row[1], row[5], row[-1]) for row in rows] == [
        ("delayed", 0, b"3"),
        ("leased", 1, b"2"),
        ("waiting", 5, b"1"),
    ]
    leased = rows[1]
    assert (leased[10], leased[11]) == (worker.id, "host")
    assert timedelta(seconds=4) < datetime.now(UTC) - leased[13] < timedelta(minutes=1)
    for state in ("waiting", "delayed", "leased"):
        assert [row[1] for row in db.call("peek_messages", "s", state, "actor", 10)] == [state]
    assert db.call("peek_messages", "s", None, "nobody", 10) == []
    assert db.sql("SELECT * FROM durable.message ORDER BY 1") == before
    ((message_id, name, *_, since, _),) = db.call("worker_messages", worker.id)
    assert (message_id, name, since) == (claimed.message_id, "s", leased[13])


def test_a_purge_leaves_what_is_leased_new_or_of_a_run(db: Session) -> None:
    stream, other = db.stream("s"), db.stream("other")
    db.enqueue(stream, *[b"x"] * 8, delay=[0] * 6 + [60_000] * 2)
    db.enqueue(stream, b"y", actor="else")
    db.sql("UPDATE durable.message SET kind = 'j' WHERE actor = 'else'")
    db.enqueue(other, b"z")
    db.start(stream, "w")
    worker = db.register(stream)
    (leased,) = worker.claim(1, streams=[stream])
    assert leased.kind == "m"
    counted = db.call("count_waiting", "s", None)
    assert [row[:2] for row in counted] == [("actor", 7), ("else", 1)]
    assert [row[:2] for row in db.call("count_waiting", "s", "else")] == [("else", 1)]
    until = counted[0][2]
    db.enqueue(stream, b"new")
    assert db.call("purge_messages", "s", "else", until, 100) == [(1,)]
    assert db.call("purge_messages", "s", None, until, 3) == [(3,)]
    assert db.call("purge_messages", "s", None, until, 100) == [(4,)]
    left = db.sql(
        "SELECT kind::text, payload, lease_token IS NOT NULL FROM durable.message WHERE stream_id = %s", stream
    )
    assert sorted(left) == [("m", b"new", False), ("m", b"x", True), ("s", b"", False)]
    assert db.messages(other) == 1


# --- dead letters -----------------------------------------------------------------------------------------------


def buried(db: Session, *, times: int = 1) -> tuple[Worker, bytes]:
    """A message that has died after so many attempts, with a worker of its stream."""
    stream = db.stream("s")
    db.enqueue(stream, b"payload", ids=[message := new_id()], priority=7)
    worker = db.register(stream)
    for _ in range(times - 1):
        assert worker.reschedule(worker.one()) == []
    assert worker.bury(worker.one()) == []
    return worker, message


def test_what_is_redriven_is_what_it_was(db: Session) -> None:
    worker, message = buried(db, times=3)
    group = uuid.uuid4()
    db.sql("UPDATE durable.dead_letter SET kind = 'j', unique_key = 'k', group_id = %s, deaths = 9", group)
    enqueued_at = db.value("SELECT enqueued_at FROM durable.dead_letter")
    matched, redriven, _, kept = redrive(db)
    assert (matched, redriven, kept) == (1, 1, [])
    assert db.value("SELECT count(*) FROM durable.dead_letter") == 0
    columns = "priority, enqueued_at, deaths, last_failure, unique_key, group_id::text, kind::text"
    assert db.sql(f"SELECT {columns} FROM durable.message") == [(7, enqueued_at, 0, "no", "k", str(group), "j")]
    again = worker.one()
    assert (again.message_id, again.payload, again.attempt, again.actor) == (message, b"payload", 4, "actor")
    assert started(worker, again) == ([], [], [1]), "its retries are counted anew"
    assert worker.release(again) == []
    assert started(worker, worker.one()) == ([], [], [1]), "also when its first delivery came to nothing"


def test_the_retries_are_counted_anew_once(db: Session) -> None:
    worker, _ = buried(db)
    redrive(db)
    again = worker.one()
    started(worker, again)
    assert worker.reschedule(again, payload=b"with its count of retries") == []
    assert started(worker, worker.one()) == ([], [], [])


def test_poison_that_is_redriven_has_its_deaths_before_it(db: Session) -> None:
    stream = db.stream("s")
    db.enqueue(stream, b"1")
    watcher = db.register(stream)

    def die(first: bool = False) -> Worker:
        worker = db.register(stream, count=2)
        claimed = worker.one()
        assert claimed.reclaimed is not first
        worker.mark_started(claimed)
        db.silence(worker)
        return worker

    assert watcher.reclaim(die(first=True)) == (1, 0)
    assert watcher.reclaim(die()) == (0, 1)
    [(reason, attempt)] = db.sql("SELECT reason, attempt FROM durable.dead_letter")
    # The letter has the attempt that died, the message the next.
    assert (reason, attempt, redrive(db)[1]) == ("poison", 2, 1)
    assert db.sql("SELECT attempt, deaths::int FROM durable.message") == [(3, 0)]
    assert watcher.reclaim(die()) == (1, 0)
    assert watcher.reclaim(die()) == (0, 1)


def test_a_live_message_with_the_same_id_or_key_is_in_the_way(db: Session) -> None:
    _, message = buried(db)
    stream = db.stream("s")
    db.enqueue(stream, b"again", ids=[message])
    letters(db, stream, 1, unique_key="'k'")
    db.enqueue(stream, b"key", ids=[other := new_id()])
    db.sql("UPDATE durable.message SET unique_key = 'k' WHERE message_id = %s", Uuid(other))
    letters(db, stream, 1)
    numbers = [row[0] for row in reversed(listed(db))]
    assert redrive(db) == (3, 1, numbers[-1], numbers[:2])
    assert [row[0] for row in reversed(listed(db))] == numbers[:2]
    # Two letters of one id: the first comes back, the second is in its way.
    db.sql("DELETE FROM durable.message")
    letters(db, stream, 1, message_id=f"'{uuid.UUID(bytes=message)}'")
    numbers = [row[0] for row in reversed(listed(db))]
    assert redrive(db) == (3, 2, numbers[-1], numbers[2:])


def test_letters_are_redriven_in_batches_in_their_order(db: Session) -> None:
    stream = db.stream("s")
    letters(db, stream, 5, payload="n::text::bytea")
    first = redrive(db, limit=2)
    assert first[:2] == (2, 2)
    assert redrive(db, limit=2, above=first[2])[:2] == (2, 2)
    assert redrive(db, limit=2)[:2] == (1, 1)
    assert redrive(db)[:2] == (0, 0)
    assert [c.payload for c in db.register(stream).claim()] == [b"1", b"2", b"3", b"4", b"5"]


def test_a_redrive_wakes_those_who_wait(db: Session) -> None:
    worker, _ = buried(db)
    worker.claim(wait=60_000)
    db.sql(f'LISTEN "durable:s{worker.streams[0]}"')
    redrive(db)
    assert len(list(db.conn.notifies(timeout=5, stop_after=1))) == 1


def test_filters_hold_together(db: Session) -> None:
    one, other = db.stream("one"), db.stream("other")
    letters(db, one, 2)
    letters(db, one, 1, actor="'b'", reason="'poison'", failure="'it said 100%%_ OFF'")
    letters(db, other, 1, died_at="now() - interval '3 hours'", failure="NULL")
    numbers = [row[0] for row in reversed(listed(db))]
    message = db.value("SELECT message_id FROM durable.dead_letter WHERE dead_letter_id = %s", numbers[1])
    ago = datetime.now(UTC) - timedelta(hours=2)
    for chosen, expected in (
        ({}, numbers),
        ({"stream": "one"}, numbers[:3]),
        ({"stream": "nowhere"}, []),
        ({"actor": "b"}, [numbers[2]]),
        ({"reason": "rejected", "stream": "one"}, numbers[:2]),
        ({"after": ago}, numbers[:3]),
        ({"before": ago}, [numbers[3]]),
        ({"text": "%_ off"}, [numbers[2]]),
        ({"text": "VALUEERROR"}, numbers[:2]),
        ({"letters": [numbers[0]], "messages": [message]}, numbers[:2]),
        ({"letters": [numbers[0]], "messages": [], "actor": "b"}, []),
    ):
        assert [row[0] for row in reversed(listed(db, **chosen))] == expected, chosen
        counted = db.call("count_dead_letters", *filters(**chosen), 1000)
        assert sum(row[3] for row in counted) == len(expected)
    assert [row[0] for row in listed(db, 2)] == numbers[:1:-1]
    assert sum(row[3] for row in db.call("count_dead_letters", *filters(), 3)) == 3


def test_what_is_dropped_is_gone(db: Session) -> None:
    letters(db, db.stream("s"), 3)
    letters(db, db.stream("s"), 1, actor="'b'")
    numbers = [row[0] for row in reversed(listed(db))]
    assert db.call("drop_dead_letters", *filters(actor="actor"), 0, LAST, 2) == [(2, 2, numbers[1])]
    assert db.call("drop_dead_letters", *filters(actor="actor"), numbers[1], numbers[2] - 1, 2) == [(0, 0, None)]
    assert db.call("drop_dead_letters", *filters(actor="actor"), numbers[1], LAST, 2) == [(1, 1, numbers[2])]
    assert [row[0] for row in listed(db)] == numbers[3:]


def test_operators_calls_look_only_at_what_they_show(db: Session) -> None:
    stream = db.stream("s")
    fill(db, stream, delay="-1 second")
    fill(db, stream)
    letters(db, stream, MANY)
    db.sql("ANALYZE durable.message, durable.dead_letter")
    with counting(db) as counted:
        assert len(db.call("peek_messages", "s", None, None, 10)) == 10
        assert db.call("purge_messages", "s", None, datetime.now(UTC), 10) == [(10,)]
    assert counted["message"].seq_scans == 0
    assert counted["message"].rows < 100, counted
    numbers = [row[0] for row in listed(db, 10)]
    with counting(db, "dead_letter") as counted:
        listed(db, 10)
        listed(db, 10, stream="s", reason="rejected")
        listed(db, letters=[numbers[3]])
        redrive(db, above=numbers[5], limit=3, stream="s")
        db.call("drop_dead_letters", *filters(), numbers[9], LAST, 3)
    assert counted["dead_letter"].seq_scans == 0
    assert counted["dead_letter"].rows < 200, counted
