"""Importing from real servers, which Dramatiq's own brokers and workers have filled."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import CurrentMessage, GroupCallbacks, Retries
from dramatiq.rate_limits.backends import RedisBackend as RedisLimits

import dramatiq_durable as durable
from tests.support import unique_name, wait_until
from tests.support.stored import stored_messages
from tests.system.old_brokers import Old, ours, working

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("servers")]


# --- what is moved ----------------------------------------------------------------------------------------------


def test_what_waits_is_moved_and_run(old: Old, moved: Any, rows: Any, database_url: str) -> None:
    note = old.actor(print)
    sent = [note.send(n, {"text": "ü\0"}, key=[n]) for n in range(25)]
    report = moved("--batch", "10")
    assert (report["found"], report["moved"], report["already_there"], report["undecodable"]) == (25, 25, 0, 0)
    assert old.counts() == (0, 0, 0)
    assert rows("SELECT message_id::text FROM durable.message ORDER BY due_at") == [(m.message_id,) for m in sent]
    assert [found.encode() for found in stored_messages(rows)] == [m.encode() for m in sent]
    got: list[Any] = []

    def receive(*args: Any, **kwargs: Any) -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        got.append((message.message_id, message.queue_name, args, kwargs))

    with ours(database_url, old, receive):
        wait_until(lambda: len(got) >= 25, message="the messages")
    assert sorted(got, key=lambda g: g[2][0]) == [
        (m.message_id, old.queue, (n, {"text": "ü\0"}), {"key": [n]}) for n, m in enumerate(sent)
    ]
    assert moved()["moved"] == 0


def test_a_delayed_message_comes_when_it_was_due(old: Old, moved: Any, rows: Any, database_url: str) -> None:
    note = old.actor(print)
    late = note.send_with_options(args=("late",), delay=3_600_000)
    note.send_with_options(args=("soon",), delay=1500)
    note.send("now")
    started = time.time()
    report = moved()
    assert (report["found"], report["delayed"], report["moved"]) == (3, 2, 3)
    due = rows("SELECT extract(epoch FROM due_at)::float8 * 1000 FROM durable.message WHERE message_id::text = %s", late.message_id)  # fmt: skip  # noqa: E501
    assert due[0][0] == pytest.approx(late.options["eta"], abs=1)
    got: list[Any] = []

    def receive(text: str) -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        got.append((text, message.queue_name, "eta" in message.options, time.time() - started))

    with ours(database_url, old, receive):
        wait_until(lambda: len(got) >= 2, message="the messages")
    assert [g[:3] for g in got] == [("now", old.queue, False), ("soon", old.queue, False)]
    assert got[1][3] > 1.0
    assert rows("SELECT count(*) FROM durable.message") == [(1,)]


class Sent(dramatiq.Middleware):
    """The delays with which messages were sent."""

    def __init__(self) -> None:
        self.delays: list[int | None] = []

    def after_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
        self.delays.append(delay)


def test_retries_go_on_where_they_were(old: Old, moved: Any, rows: Any, database_url: str) -> None:
    """A worker of the other broker fails three times; ours makes the fourth attempt, which is the last."""
    actor: Any = None
    failed: list[int] = []

    def fail(n: int) -> None:
        failed.append(n)
        if len(failed) == 3:
            actor.options.update(min_backoff=7_200_000, max_backoff=7_200_000)
        raise RuntimeError(f"no luck with {n}")

    retried = Sent()
    broker = old.broker(middleware=[Retries(max_retries=3, min_backoff=1, max_backoff=1), retried])
    actor = old.actor(fail, broker)
    sent = actor.send(1)
    with working(broker):
        wait_until(lambda: (retried.delays[-1] or 0) > 1_000_000, timeout=30, message="the third retry")
    report = moved()
    assert (report["moved"], report["delayed"]) == (1, 1)
    assert rows("SELECT message_id::text, attempt FROM durable.message") == [(sent.message_id, 4)]
    rows("UPDATE durable.message SET due_at = now() RETURNING 1")
    seen: list[Any] = []

    def receive(n: int) -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        seen.append((message.options["retries"], "no luck with 1" in message.options["traceback"]))
        raise RuntimeError("still no luck")

    with ours(database_url, old, receive, max_retries=3):
        wait_until(lambda: rows("SELECT 1 FROM durable.dead_letter"), message="the dead letter")
    assert seen == [(3, True)]


def test_dead_letters_are_moved_when_asked_for(old: Old, moved: Any, rows: Any, database_url: str) -> None:
    def fail(n: int) -> None:
        raise RuntimeError(f"no luck with {n}")

    broker = old.broker(middleware=[Retries(max_retries=1, min_backoff=1, max_backoff=1)])
    note = old.actor(fail, broker)
    sent = {note.send(n).message_id for n in range(3)}
    before = time.time()
    with working(broker):
        wait_until(lambda: old.counts()[2] == 3, timeout=30, message="dead letters")
    note.send(7)
    report = moved()
    assert (report["moved"], report["dead"], report["dead_moved"]) == (1, 3, 0)
    assert old.counts() == (0, 0, 3)
    report = moved("--dead-letters", "--batch", "2")
    assert (report["moved"], report["dead"], report["dead_moved"]) == (0, 3, 3)
    assert old.counts() == (0, 0, 0)
    letters = rows(
        "SELECT message_id::text, actor, attempt, reason, failure, extract(epoch FROM died_at)::float8"
        " FROM durable.dead_letter"
    )
    assert {letter[0] for letter in letters} == sent
    for _, actor, attempts, reason, failure, died in letters:
        assert (actor, attempts, reason) == ("note", 2, "rejected")
        assert "RuntimeError: no luck with" in failure
        assert before - 2 < died < time.time() + 1


def test_what_cannot_be_decoded_stays_until_its_encoder_is_known(
    old: Old, attempt: Any, moved: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = old.actor(print)
    note.send(1)
    with monkeypatch.context() as patch:
        patch.setattr(dramatiq.message, "global_encoder", dramatiq.PickleEncoder())
        pickled = [note.send({n}) for n in range(7)]
    note.send(2)
    # Several more than are taken at once.
    report = moved("--batch", "2")
    assert (report["found"], report["moved"], report["undecodable"]) == (9, 2, 7)
    wait_until(lambda: old.counts() == (7, 0, 0), message="the seven")
    told = attempt(*old.arguments())
    assert f"{old.queue}: 7 message(s) cannot be decoded" in told.stderr
    wait_until(lambda: old.counts() == (7, 0, 0), message="the seven")

    module = unique_name("encoding")
    (tmp_path / f"{module}.py").write_text("import dramatiq\ndramatiq.set_encoder(dramatiq.PickleEncoder())\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dramatiq.broker, "global_broker", old.broker())
    monkeypatch.setattr(dramatiq.message, "global_encoder", dramatiq.JSONEncoder())
    report = moved("--import", module)
    assert (report["moved"], report["undecodable"]) == (7, 0)
    payloads = [row[0] for row in rows("SELECT payload FROM durable.message ORDER BY due_at OFFSET 2")]
    assert [pickle.loads(payload)["args"] for payload in payloads] == [m.args for m in pickled]


def test_priorities_of_rabbitmq_are_kept(rabbitmq: Old, attempt: Any, database_url: str) -> None:
    note = rabbitmq.actor(print, rabbitmq.broker(max_priority=10))
    for n, priority in enumerate([0, 9, 5, None, 9]):
        note.send_with_options(args=(n,), broker_priority=priority)
    assert attempt(*rabbitmq.arguments()).exit_code == 0
    got: list[int] = []
    broker = durable.DurableBroker(database_url)
    dramatiq.actor(got.append, actor_name="note", queue_name=rabbitmq.queue, broker=broker)
    with working(broker, threads=1):
        wait_until(lambda: len(got) == 5, message="the messages")
    broker.close()
    assert got == [1, 4, 2, 0, 3]


def test_a_group_that_is_under_way_completes(redis: Old, attempt: Any, database_url: str) -> None:
    """Its members are counted where they were sent, as long as GroupCallbacks keeps that back end."""
    limits = RedisLimits(url=redis.url)
    sender = redis.broker(middleware=[GroupCallbacks(limits)])
    note = redis.actor(print, sender)
    done = dramatiq.actor(print, actor_name="done", queue_name=redis.queue, broker=sender)
    together = dramatiq.group([note.message(n) for n in range(3)], broker=sender)
    together.add_completion_callback(done.message("all"))
    together.run()
    told = attempt(*redis.arguments())
    assert "3 message(s) belong to groups with callbacks" in told.stderr
    got: list[Any] = []
    broker = durable.DurableBroker(database_url, middleware=[GroupCallbacks(limits)])
    for name in ("note", "done"):
        dramatiq.actor(got.append, actor_name=name, queue_name=redis.queue, broker=broker)
    with working(broker):
        wait_until(lambda: len(got) == 4, message="the callback")
    broker.close()
    limits.client.close()
    assert got[-1] == "all"
    assert sorted(got[:-1]) == [0, 1, 2]


# --- what is not touched ------------------------------------------------------------------------------------------


def dump(client: Any, namespace: str) -> dict[bytes, Any]:
    return {key: (client.type(key), client.dump(key)) for key in client.keys(f"{namespace}:*")}


def test_a_dry_run_counts_and_changes_nothing(old: Old, attempt: Any, moved: Any, rows: Any) -> None:
    def fail(n: int) -> None:
        raise RuntimeError

    broker = old.broker()
    note = old.actor(fail, broker)
    note.send(1)
    with working(broker):
        wait_until(lambda: old.counts()[2] == 1, timeout=30, message="a dead letter")
    for n in range(3):
        note.send(n)
    note.send_with_options(args=(4,), delay=3_600_000)
    client = broker.client if old.kind == "redis" else None
    before = dump(client, old.namespace) if client else old.counts()
    report = moved("--dry-run", "--dead-letters")
    assert (report["found"], report["delayed"], report["dead"], report["moved"]) == (4, 1, 1, 0)
    assert (dump(client, old.namespace) if client else old.counts()) == before
    assert old.counts() == (3, 1, 1)
    assert rows("SELECT count(*) FROM durable.stream") == [(0,)]
    assert "moved" not in attempt(*old.arguments("--dry-run")).stdout


def test_what_a_living_worker_holds_is_left_to_it(old: Old, attempt: Any, moved: Any, database_url: str) -> None:
    broker = old.broker(middleware=[])
    note = old.actor(print, broker)
    note.send("held")
    consumer = broker.consume(old.queue, prefetch=1, timeout=500)
    held = wait_until(lambda: next(consumer), message="the message")
    note.send("free")
    report = moved("--dry-run")
    assert (report["found"], report["in_flight"]) == (1, 1 if old.kind == "redis" else None)
    assert report["readers"] == 1
    told = attempt(*old.arguments("--dry-run"))
    assert "1 worker(s)" in told.stderr
    if old.kind == "rabbitmq":
        # It would have been pushed to the other consumer, had that one room for more.
        assert moved()["moved"] == 1
        consumer.close()
        assert moved()["moved"] == 1, "what a dead worker held comes back by itself"
    else:
        assert moved()["moved"] == 1
        consumer.ack(held)
        assert moved()["found"] == 0


def test_what_a_dead_worker_held_is_moved(redis: Old, attempt: Any, rows: Any) -> None:
    broker = redis.broker()
    note = redis.actor(print, broker)
    sent = [note.send(n) for n in range(3)] + [note.send_with_options(args=(3,), delay=3_600_000)]
    for name in (redis.queue, f"{redis.queue}.DQ"):
        consumer = broker.consume(name, prefetch=10, timeout=100)
        wait_until(lambda consumer=consumer: next(consumer), message="the messages")
    client = broker.client
    client.zadd(f"{redis.namespace}:__heartbeats__", {broker.broker_id: (time.time() - 61) * 1000})
    (report,) = json.loads(attempt(*redis.arguments("--json")).stdout)
    assert (report["found"], report["in_flight"], report["moved"]) == (4, 0, 4)
    assert {row[0] for row in rows("SELECT message_id::text FROM durable.message")} == {m.message_id for m in sent}
    left = {key.decode().partition(":")[2] for key in client.keys(f"{redis.namespace}:*")}
    assert left == {"__heartbeats__", "__import__"}


def test_other_keys_of_redis_are_no_queues(redis: Old, attempt: Any) -> None:
    client = redis.broker().client
    client.set(f"{redis.namespace}:aborts:x", "1")
    client.set(f"{redis.namespace}x:other.msgs", "1")
    done = attempt(*redis.arguments(all_queues=True))
    assert "Redis has no queue" in done.output


# --- which queues -------------------------------------------------------------------------------------------------


def test_all_queues_of_redis_are_found(redis: Old, attempt: Any) -> None:
    broker = redis.broker()
    for queue in ("one", "two.parts", "three"):
        dramatiq.actor(print, actor_name=queue, queue_name=queue, broker=broker).send_with_options(
            args=(1,), delay=60_000 if queue == "three" else None
        )
    reports = json.loads(attempt(*redis.arguments("--json", all_queues=True)).stdout)
    assert [(r["queue"], r["moved"], r["delayed"]) for r in reports] == [
        ("one", 1, 0), ("three", 1, 1), ("two.parts", 1, 0)
    ]  # fmt: skip


def test_the_queues_of_rabbitmq_are_those_of_streams_and_actors(
    rabbitmq: Old, attempt: Any, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rabbitmq.actor(print).send(1)
    assert "no queue of Dramatiq's that is known here" in attempt(*rabbitmq.arguments(all_queues=True)).output
    module = unique_name("declaring")
    (tmp_path / f"{module}.py").write_text(
        f"import dramatiq\n@dramatiq.actor(queue_name={rabbitmq.queue!r}, priority=3)\ndef note(n): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    broker = durable.DurableBroker(database_url)
    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
    (report,) = json.loads(attempt(*rabbitmq.arguments("--json", "--import", module, all_queues=True)).stdout)
    assert (report["queue"], report["moved"]) == (rabbitmq.queue, 1)
    (report,) = json.loads(attempt(*rabbitmq.arguments("--json", all_queues=True)).stdout)
    assert (report["queue"], report["moved"]) == (rabbitmq.queue, 0)


def test_an_unknown_queue_is_named(old: Old, attempt: Any) -> None:
    old.actor(print).send(1)
    done = attempt(*old.arguments("--queue", "nope"))
    assert done.exit_code == 1
    assert "has no queue 'nope'; it has " in done.output
    assert old.queue in done.output
    assert old.counts()[0] == 1


# --- what is refused ----------------------------------------------------------------------------------------------


def test_two_imports_from_one_redis_are_refused(redis: Old, attempt: Any) -> None:
    from dramatiq_durable.importing.redis import RedisSource

    redis.actor(print).send(1)
    first = RedisSource(redis.url, redis.namespace)
    done = attempt(*redis.arguments())
    assert done.exit_code == 1
    assert "another import is reading from this Redis" in done.output
    first.close()
    done = attempt(*redis.arguments())
    assert done.exit_code == 0, done.output


def test_a_wrong_password_is_explained(old: Old, attempt: Any) -> None:
    url = old.url.replace("127.0.0.1", "who:secret@127.0.0.1") if old.kind == "redis" else old.url.replace("guest:guest", "who:secret")  # fmt: skip  # noqa: E501
    done = attempt("import", old.kind, url)
    assert done.exit_code == 1
    assert "refused the login" in done.output
    assert "secret" not in done.output


def test_a_wrong_virtual_host_is_explained(rabbitmq: Old, attempt: Any) -> None:
    done = attempt("import", "rabbitmq", rabbitmq.url + "/nowhere")
    assert done.exit_code == 1
    assert "is the virtual host right?" in done.output
