"""Topics: each subscriber is given each event, those of a run one after the other, whoever else is at work."""

from __future__ import annotations

from collections.abc import Callable

from dramatiq_durable.arrays import Blobs, Bools, Ints, Texts, Uuid
from dramatiq_durable.workflow.events import Event

from .api import Claimed, Session, step


class Scene:
    """A run that emits, on one stream, and subscribed actors on another."""

    def __init__(self, db: Session, *actors: str) -> None:
        self.db = db
        self.runs, self.ears = db.stream("runs"), db.stream("ears")
        self.emitter, self.listener = db.register(self.runs), db.register(self.ears)
        for actor in actors or ("listener",):
            assert subscribe(db, "t", self.ears, actor) == [True]
        self.run, self.task, self.last = b"", None, 1
        self.begin("w")

    def begin(self, workflow_id: str) -> bytes:
        _, self.run = self.db.start(self.runs, workflow_id)
        self.task, self.last = self.emitter.one(), 1
        return self.run

    def emit(self, *payloads: bytes, over: Session | None = None, topic: str = "t") -> None:
        """A step that emits these, and whose task comes again."""
        assert self.task is not None
        advance = step(self.task, self.last)
        advance.events = [
            Event(n, "TopicEmitted", 1_700_000_000_000, n, topic, payload, {"hash": "0"})
            for n, payload in enumerate(payloads, self.last + 1)
        ]
        advance.last = self.last = self.last + len(payloads)
        worker = self.emitter if over is None else self.emitter.over(over)
        assert worker.advance(advance) == ["ok"]
        if over is None:
            self.wake()

    def wake(self) -> None:
        self.db.post(self.run)
        self.task = self.emitter.one()

    def given(self, limit: int = 100) -> list[Claimed]:
        return self.listener.claim(limit)

    def finish(self, *claimed: Claimed, over: Session | None = None, failed: bool = False) -> list[int]:
        worker = self.listener if over is None else self.listener.over(over)
        n = len(claimed)
        return worker.settle(
            "finish_events", claimed, Bools([failed] * n), Blobs([None] * n), Texts(["no" if failed else None] * n)
        )

    def waiting(self) -> int:
        return int(self.db.value("SELECT count(*) FROM durable.topic_event"))


def subscribe(session: Session, topic: str, stream: int, actor: str = "listener") -> list[bool | None]:
    answer: list[bool | None] = session.call("subscribe", Texts([topic]), Ints([stream]), Texts([actor]), Ints([0]))[0][
        0
    ]
    return answer


def value(claimed: Claimed) -> bytes:
    mark, facts, value = claimed.payload.split(b"\n", 2)
    assert mark == b"event"
    assert b'"topic" : "t"' in facts
    return value


def drain(scene: Scene) -> list[bytes]:
    """Everything that is still to be given to the listener, one after the other."""
    found = []
    while claimed := scene.given():
        for c in claimed:
            if c.kind == "n":
                assert scene.listener.settle("look_again", [c]) == []
            else:
                found.append(value(c))
                assert scene.finish(c) == []
    return found


def test_the_end_of_one_sends_the_next(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1", b"2")
    scene.emit(b"3")
    scene.emit(b"no", topic="another")
    for expected in (b"1", b"2", b"3"):
        (claimed,) = scene.given()
        assert (claimed.kind, claimed.actor, value(claimed)) == ("p", "listener", expected)
        assert scene.given() == []
        assert scene.finish(claimed) == []
        assert scene.finish(claimed) == [1], "its lease is gone"
    assert scene.given() == []
    assert scene.waiting() == 0


def test_a_retry_holds_back_its_run_for_its_subscriber_alone(db: Session) -> None:
    scene = Scene(db, "one", "other")
    scene.emit(b"1", b"2")
    first = {c.actor: c for c in scene.given()}
    scene.listener.reschedule(first["one"], delay=60_000)
    scene.finish(first["other"])
    (second,) = scene.given()
    assert (second.actor, value(second)) == ("other", b"2")
    scene.finish(second)
    scene.begin("another")
    scene.emit(b"3")
    assert sorted((c.actor, value(c)) for c in scene.given()) == [("one", b"3"), ("other", b"3")]


def test_a_failure_for_good_is_a_dead_letter_and_the_next_is_sent(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1", b"2")
    (claimed,) = scene.given()
    assert scene.finish(claimed, failed=True) == []
    assert db.sql("SELECT actor, reason, failure, kind::text FROM durable.dead_letter") == [
        ("listener", "rejected", "no", "p")
    ]
    assert drain(scene) == [b"2"]


def test_what_kills_its_workers_is_poison_and_the_next_is_sent(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1", b"2")
    for _ in range(4):
        (claimed,) = scene.given()
        if value(claimed) == b"2":
            break
        scene.listener.mark_started(claimed)
        db.silence(scene.listener)
        peer = db.register(scene.ears)
        peer.reclaim(scene.listener)
        scene.listener = peer
    assert value(claimed) == b"2"
    assert db.sql("SELECT reason, deaths::int FROM durable.dead_letter") == [("poison", 3)]


def test_an_emitter_waits_for_nobody_who_finishes(db: Session, connect: Callable[[], Session]) -> None:
    scene = Scene(db)
    scene.emit(b"1")
    (claimed,) = scene.given()
    slow = connect()
    slow.begin()
    scene.finish(claimed, over=slow)
    db.sql("SET statement_timeout = '1s'")
    scene.emit(b"2")  # finds the lane taken, and leaves a note
    (note,) = scene.given()
    assert note.kind == "n"
    assert scene.listener.settle("look_again", [note]) == []
    assert db.messages(scene.ears) == 2, "the note comes again as long as the lane is taken"
    slow.commit()
    db.sql("UPDATE durable.message SET due_at = now() WHERE kind = 'n'")
    assert drain(scene) == [b"2"]
    assert scene.waiting() == 0


def test_who_finishes_waits_for_no_emitter(db: Session, connect: Callable[[], Session]) -> None:
    scene = Scene(db)
    scene.emit(b"1")
    (claimed,) = scene.given()
    slow = connect()
    slow.begin()
    scene.emit(b"2", over=slow)  # its event waits behind the one that is with a worker
    db.sql("SET statement_timeout = '1s'")
    assert scene.finish(claimed) == []
    (note,) = scene.given()
    assert note.kind == "n"
    scene.listener.settle("look_again", [note])
    slow.commit()
    db.sql("UPDATE durable.message SET due_at = now() WHERE kind = 'n'")
    assert drain(scene) == [b"2"]


def test_an_emitter_that_rolls_back_leaves_nothing(db: Session, connect: Callable[[], Session]) -> None:
    scene = Scene(db)
    other = connect()
    other.begin()
    scene.emit(b"1", over=other)
    other.rollback()
    scene.last = 1
    scene.emit(b"2")
    assert drain(scene) == [b"2"]


def test_what_was_ended_otherwise_is_passed_by(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1", b"2")
    db.sql("DELETE FROM durable.message WHERE kind = 'p'")
    scene.emit(b"3")
    assert drain(scene) == [b"2", b"3"]


def test_only_what_is_emitted_from_then_on(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1")
    assert subscribe(db, "t", scene.ears, "late") == [True]
    assert subscribe(db, "t", scene.ears, "late") == [False]
    scene.emit(b"2")
    found = []
    while claimed := scene.given():
        found += [(c.actor, value(c)) for c in claimed]
        scene.finish(*claimed)
    assert sorted(found) == [("late", b"2"), ("listener", b"1"), ("listener", b"2")]


def test_unsubscribing_while_somebody_emits(db: Session, connect: Callable[[], Session]) -> None:
    scene = Scene(db)
    slow = connect()
    slow.begin()
    assert slow.call("unsubscribe", "t", scene.ears, "listener") == [(True,)]
    scene.emit(b"1")  # the subscription is still there for it, the lane is taken
    (note,) = scene.given()
    slow.commit()
    assert scene.listener.settle("look_again", [note]) == []
    assert (scene.waiting(), db.messages(scene.ears)) == (0, 0)
    scene.emit(b"2")
    assert scene.given() == []


def test_unsubscribing_withdraws_what_is_on_its_way(db: Session) -> None:
    scene = Scene(db, "listener", "other")
    scene.emit(b"1", b"2")
    assert db.call("unsubscribe", "t", scene.ears, "listener") == [(True,)]
    (claimed,) = scene.given()
    assert claimed.actor == "other"
    assert db.call("unsubscribe", "t", scene.ears, "other") == [(True,)]
    assert scene.finish(claimed) == [], "what a worker has is left to it"
    assert (scene.waiting(), db.messages(scene.ears)) == (0, 0)


def test_the_list_of_subscriptions(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1", b"2")
    ((topic, actor, queue, everywhere, _, waiting),) = db.call("list_subscriptions")
    assert (topic, actor, queue, everywhere, waiting) == ("t", "listener", "ears", True, 2)


def test_events_cannot_be_settled_as_something_else(db: Session) -> None:
    scene = Scene(db)
    scene.emit(b"1", b"2")
    (claimed,) = scene.given()
    assert scene.listener.bury(claimed) == [1]
    assert scene.listener.complete(claimed) == [1]
    assert not scene.listener.fail_task(claimed)
    assert scene.listener.settle("look_again", [claimed]) == [1]
    assert scene.listener.advance(step(claimed, scene.last, ("TimerStarted", 1))) != ["ok"]
    assert scene.finish(scene.task) == [1], "nor a task as an event"  # type: ignore[arg-type]
    assert db.run(scene.run) == ("running", scene.last)
    assert db.sql("SELECT count(*) FROM durable.event WHERE run_id = %s", Uuid(scene.run))[0][0] == scene.last
