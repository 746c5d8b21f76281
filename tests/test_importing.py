"""Importing from another broker, which is a list here: what is stored, and that every crash is survived."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any
from uuid import UUID, uuid4

import dramatiq
import psycopg
import pytest
from click.testing import CliRunner
from dramatiq import Message

import dramatiq_durable as durable
from dramatiq_durable.cli import main
from dramatiq_durable.importing import importer as importing
from dramatiq_durable.importing.importer import Importer, Report
from dramatiq_durable.importing.source import Counts, Found, Place
from tests.support import free_port
from tests.support.stored import stored_messages


class Died(BaseException):
    """The import's process is no more."""


class Old:
    """Another broker, in memory: the queue "q" in its three places."""

    title = "Memory"
    lists = True

    def __init__(self) -> None:
        self.id = uuid4()
        self.places: dict[Place, list[bytes]] = {"ready": [], "delayed": [], "dead": []}
        self.hands: list[bytes] = []
        self.die_before: Callable[[str], bool] = lambda step: False

    def send(self, *messages: Message[Any] | bytes, place: Place = "ready") -> None:
        self.places[place] += [m if isinstance(m, bytes) else m.encode() for m in messages]

    def identity(self) -> UUID:
        return self.id

    def queues(self, candidates: Sequence[str]) -> list[str]:
        return ["q"]

    def count(self, queue: str) -> Counts:
        return Counts(*(len(messages) for messages in self.places.values()))

    def open(self, queue: str, place: Place) -> Box:
        return Box(self, self.places[place], 1_700_000_000_000 if place == "dead" else None)

    def close(self) -> None:
        pass

    def may_die(self, step: str) -> None:
        if self.die_before(step):
            raise Died(step)


class Box(AbstractContextManager["Box"]):
    def __init__(self, old: Old, messages: list[bytes], died: int | None) -> None:
        self.old, self.messages, self.died, self.left = old, messages, died, list[bytes]()

    def __exit__(self, *error: object) -> None:
        self.messages[:0] = self.left

    def take(self, limit: int) -> list[Found]:
        taken, self.messages[:] = self.messages[:limit], self.messages[limit:]
        self.old.hands = list(taken)
        return [Found(payload, payload, self.died) for payload in taken]

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        self.left += [found.handle for found in left]
        for found in moved:
            self.old.may_die("remove")
            self.old.hands.remove(found.handle)
        for found in left:
            self.old.hands.remove(found.handle)


def message(actor: str = "note", *args: Any, id: str | None = None, queue: str = "q", **options: Any) -> Message[Any]:
    return Message(queue, actor, args, {}, options, **({"message_id": id} if id else {}))


@pytest.fixture
def broker(database_url: str) -> Iterator[durable.DurableBroker]:
    with closing(durable.DurableBroker(database_url)) as broker:
        yield broker


@pytest.fixture
def rows(database_url: str) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield lambda query, *arguments: conn.execute(query.encode(), arguments).fetchall()


def move(broker: durable.DurableBroker, old: Old, *, batch: int = 3, dead_letters: bool = False) -> Report:
    actors = broker.actors
    importer = Importer(broker, old, batch=batch, dead_letters=dead_letters, actors=actors)
    report = importer.count("q")
    importer.move(report)
    return report


def work(broker: durable.DurableBroker) -> list[Any]:
    """Run what waits, and answer the arguments in the order of the runs."""
    done: list[Any] = []
    if "note" not in broker.actors:
        dramatiq.actor(lambda *args: done.append(args), actor_name="note", queue_name="q", broker=broker)
    else:
        broker.actors["note"].fn = lambda *args: done.append(args)
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        broker.join("q", timeout=15_000)
    finally:
        worker.stop()
    return [args[0] if len(args) == 1 else args for args in done]


def test_messages_are_stored_byte_for_byte_in_their_order(broker: durable.DurableBroker, rows: Any) -> None:
    old = Old()
    sent = [message("note", n, note="ü") for n in range(7)]
    old.send(*sent)
    report = move(broker, old)
    assert (report.found, report.moved, report.already_there, report.undecodable) == (7, 7, 0, 0)
    assert old.places["ready"] == []
    assert [found.encode() for found in stored_messages(rows)] == [m.encode() for m in sent]
    assert rows("SELECT message_id::text FROM durable.message ORDER BY due_at") == [(m.message_id,) for m in sent]
    assert rows("SELECT count(*) FROM durable.result") == [(0,)], "the journal is empty at the end"
    assert work(broker) == list(range(7))


def test_a_delay_goes_on_where_it_was(broker: durable.DurableBroker, rows: Any) -> None:
    old = Old()
    now = int(time.time() * 1000)
    etas = [now + 3_600_000, now - 5000, now + 400 * 86_400_000 * 1000]
    old.send(*(message("note", n, queue="q.DQ", eta=eta) for n, eta in enumerate(etas)), place="delayed")
    assert move(broker, old).moved == 3
    (late, soon, far) = rows("SELECT extract(epoch FROM due_at)::float8 * 1000 FROM durable.message ORDER BY payload")
    assert late[0] == pytest.approx(etas[0], abs=1)
    assert now - 1000 < soon[0] < now + 60_000
    assert now < far[0] <= now + 3651 * 86_400_000
    assert rows("SELECT DISTINCT name FROM durable.stream") == [("q",)]


def test_what_the_actor_gets_is_what_was_sent(broker: durable.DurableBroker) -> None:
    old = Old()
    got: list[Any] = []

    class Look(dramatiq.Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            got.append((message.queue_name, message.options, message.message_id))

    broker.add_middleware(Look())
    old.send(message("note", 1, id="not-a-uuid", queue="q.DQ", eta=1, retries=3, custom=[1]), place="delayed")
    move(broker, old)
    assert work(broker) == [1]
    assert got == [("q", {"retries": 3, "custom": [1]}, "not-a-uuid")]


def test_an_attempt_counts_the_retries_before(broker: durable.DurableBroker, rows: Any) -> None:
    old = Old()
    old.send(message(), message(retries=2), message(retries="many"), message(retries=-1))
    move(broker, old)
    assert rows("SELECT attempt FROM durable.message ORDER BY due_at") == [(1,), (3,), (1,), (1,)]


def test_priorities_keep_their_sense(broker: durable.DurableBroker, rows: Any) -> None:
    dramatiq.actor(print, actor_name="known", queue_name="q", priority=7, broker=broker)
    old = Old()
    old.send(message(), message(broker_priority=9), message("known"), message("known", broker_priority=1))
    move(broker, old)
    old.send(message("known", broker_priority=0), message(broker_priority=2**40), message(broker_priority="high"))
    move(broker, old)
    assert rows("SELECT priority FROM durable.message ORDER BY due_at") == [
        (0,), (-9,), (7,), (-1,), (7,), (-(2**31),), (0,)
    ]  # fmt: skip


def test_dead_letters_are_moved_when_asked_for(broker: durable.DurableBroker, rows: Any) -> None:
    old = Old()
    old.send(message("note", 1, retries=4, traceback="Traceback\0: boom"), message("note", 2), place="dead")
    report = move(broker, old)
    assert (report.dead, report.moved, report.dead_moved) == (2, 0, 0)
    assert len(old.places["dead"]) == 2
    report = move(broker, old, dead_letters=True)
    assert (report.dead, report.moved, report.dead_moved) == (2, 0, 2)
    assert old.places["dead"] == []
    assert rows(
        "SELECT attempt, reason, failure, extract(epoch FROM died_at)::int FROM durable.dead_letter ORDER BY 1"
    ) == [(1, "rejected", None, 1_700_000_000), (5, "rejected", "Traceback: boom", 1_700_000_000)]
    assert work(broker) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x04garbage",
        b"{}",
        b"[]",
        message("x" * 201).encode(),
        json.dumps({**message().asdict(), "options": None}).encode(),
        json.dumps({**message().asdict(), "message_id": 7}).encode(),
        json.dumps({**message().asdict(), "message_timestamp": "soon"}).encode(),
        message(eta=float("nan")).encode(),
    ],
)
def test_what_cannot_be_decoded_stays_where_it_is(broker: durable.DurableBroker, rows: Any, payload: bytes) -> None:
    old = Old()
    old.send(message("note", 1), payload, message("note", 2))
    report = move(broker, old)
    assert (report.found, report.moved, report.undecodable) == (3, 2, 1)
    assert len(report.problems) == 1
    assert old.places["ready"] == [payload]
    assert rows("SELECT count(*) FROM durable.message") == [(2,)]
    assert move(broker, old).undecodable == 1


def test_what_is_too_large_stays_where_it_is(broker: durable.DurableBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "MAX_PAYLOAD", 1000)
    old = Old()
    old.send(message("note", "x" * 1000), message("note", 2))
    report = move(broker, old)
    assert (report.moved, report.undecodable) == (1, 1)
    assert "more than 1000" in report.problems[0]


def test_large_messages_are_stored_in_several_transactions(
    broker: durable.DurableBroker, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MAX_BYTES", 2000)
    old = Old()
    old.send(*(message("note", n, "x" * 900) for n in range(10)))
    assert move(broker, old, batch=100).moved == 10
    assert broker.commit.batches >= 5
    assert rows("SELECT count(*) FROM durable.message") == [(10,)]


def test_a_message_that_waits_here_already_is_not_doubled(broker: durable.DurableBroker, rows: Any) -> None:
    old = Old()
    here = dramatiq.actor(print, actor_name="note", queue_name="q", broker=broker).send(1)
    old.send(here, message("note", 2))
    report = move(broker, old)
    assert (report.moved, report.already_there) == (1, 1)
    assert old.places["ready"] == []
    assert rows("SELECT count(*) FROM durable.message") == [(2,)]


@pytest.mark.parametrize("survives", range(8))
def test_an_import_that_dies_anywhere_loses_and_doubles_nothing(broker: durable.DurableBroker, survives: int) -> None:
    """Before the n-th message is removed at the source; what was stored is run to its end before the import goes on."""
    old = Old()
    sent = [message("note", n) for n in range(8)]
    old.send(*sent[:4])
    old.send(*sent[4:], place="delayed")
    steps = iter(range(100))
    old.die_before = lambda step: next(steps) == survives
    with pytest.raises(Died):
        move(broker, old)
    done = work(broker)
    # What nobody removed is found again.
    old.places["ready"][:0] = old.hands
    old.die_before = lambda step: False
    report = move(broker, old)
    assert report.already_there > 0
    assert sorted(done + work(broker)) == list(range(8))
    assert all(messages == [] for messages in old.places.values())


def test_an_import_that_dies_twice_goes_on_from_both(broker: durable.DurableBroker) -> None:
    old = Old()
    old.send(*(message("note", n) for n in range(6)))
    done: list[int] = []
    for _ in range(2):
        old.die_before = lambda step: True
        with pytest.raises(Died):
            move(broker, old, batch=2)
        done += work(broker)
        old.places["ready"] += old.hands  # at the other end: the second import meets them last
    old.die_before = lambda step: False
    move(broker, old, batch=2)
    assert sorted(done + work(broker)) == list(range(6))


def test_dead_letters_are_not_doubled_either(broker: durable.DurableBroker, rows: Any) -> None:
    old = Old()
    old.send(*(message("note", n) for n in range(3)), place="dead")
    old.die_before = lambda step: True
    with pytest.raises(Died):
        move(broker, old, dead_letters=True)
    old.places["dead"] = old.hands
    old.die_before = lambda step: False
    move(broker, old)
    assert rows("SELECT length(value) FROM durable.result") == [(48,)], "the dead letters' journal is kept"
    move(broker, old, dead_letters=True)
    assert rows("SELECT count(*) FROM durable.dead_letter") == [(3,)]
    assert rows("SELECT count(*) FROM durable.result") == [(0,)]


def test_a_message_that_comes_again_later_is_imported_again(broker: durable.DurableBroker) -> None:
    """The journal is forgotten once the source has nothing left: who goes back and comes again loses nothing."""
    old = Old()
    again = message("note", 1)
    for _ in range(2):
        old.send(again)
        assert move(broker, old).moved == 1
        assert work(broker) == [1]


def test_only_an_administrator_imports(database_url: str, rows: Any) -> None:
    from tests.support.scratch import Scratch

    made = Scratch(database_url)
    login, url = made.login()
    try:
        with closing(durable.DurableBroker(database_url)) as admin:
            admin.stream_id("q")
        runner = CliRunner()
        assert runner.invoke(main, ["--url", database_url, "role", "grant", login, "--produce", "q"]).exit_code == 0
        old = Old()
        old.send(message())
        with closing(durable.DurableBroker(url)) as broker, pytest.raises(durable.NotPermitted, match="administrator"):
            move(broker, old)
    finally:
        made.execute(f"DROP OWNED BY {login}")
        made.execute(f"DROP ROLE {login}")
    assert rows("SELECT count(*) FROM durable.message") == [(0,)]


# --- the command ----------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["import", *arguments], catch_exceptions=False)
    assert done.exit_code == 1, done.output
    assert done.output.startswith("Error: "), done.output
    assert done.output.count("\n") == 1, done.output
    return done.output


@pytest.mark.parametrize(("kind", "package"), [("redis", "redis"), ("rabbitmq", "pika")])
def test_a_missing_client_library_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(kind, "redis://x" if kind == "redis" else "amqp://x")
    assert f"the package '{package}' is needed" in said
    assert "pip install 'dramatiq-durable[import]'" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("redis", "amqp://localhost"), "begins with redis:// or rediss:// or unix://"),
        (("redis", "localhost:6379"), "begins with redis://"),
        (("rabbitmq", "redis://localhost"), "begins with amqp:// or amqps://"),
        (("rabbitmq", "amqp://localhost:port"), "the URL of RabbitMQ cannot be read"),
        (("redis", "redis://localhost:port"), "the URL of Redis cannot be read"),
    ],
)
def test_a_wrong_url_is_explained(arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(*arguments)


@pytest.mark.parametrize(("kind", "scheme"), [("redis", "redis"), ("rabbitmq", "amqp")])
def test_a_server_that_is_away_is_named(kind: str, scheme: str) -> None:
    said = refused(kind, f"{scheme}://guest:secret@127.0.0.1:{free_port()}")
    assert "Is it running" in said
    assert "secret" not in said


def test_a_module_that_cannot_be_imported_is_named() -> None:
    done = CliRunner().invoke(main, ["import", "redis", "redis://x", "--import", "no.such.module"])
    assert done.exit_code == 2
    assert "--import no.such.module: " in done.output
