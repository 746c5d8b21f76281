"""Sending and receiving: an actor gets what was sent, when it was due, in the order that was asked for."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import dramatiq
import pytest
from dramatiq.encoder import JSONEncoder, PickleEncoder
from dramatiq.errors import QueueJoinTimeout, QueueNotFound
from dramatiq.middleware import Middleware

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.stored import stored_messages

from .conftest import Record, Rows

VALUES: list[Any] = [
    "a NUL \0 in the middle",
    "\U0001f600 \u2028 \x7f",
    "half a pair: \ud83d",
    -0.0,
    1e308,
    2**70,
    {"z": 1, "a": {"y": [None, True], "b": ""}},
    [],
]


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_an_argument_comes_back_as_it_was_sent(broker: durable.DurableBroker, start_worker: Any, value: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(value: Any, *, named: Any) -> None:
        got((value, named))

    start_worker(broker)
    take.send(value, named=value)
    [(positional, named)] = got.wait(1)
    assert positional == named == value
    assert repr(positional) == repr(value)  # the sign of -0.0, and the order of keys


def test_a_message_is_kept_byte_for_byte(broker: durable.DurableBroker, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def take(*args: Any) -> None: ...

    message = take.send({"z": -0.0, "a": "\0"}, 1.0)
    assert [found.encode() for found in stored_messages(rows)] == [message.encode()]
    assert math.copysign(1, JSONEncoder().decode(message.encode())["args"][0]["z"]) == -1


def test_another_encoder_is_used(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(value: Any) -> None:
        got(value)

    before = dramatiq.get_encoder()
    dramatiq.set_encoder(PickleEncoder())
    try:
        start_worker(broker)
        take.send({(1, 2), b"\xff"})
        assert got.wait(1) == [{(1, 2), b"\xff"}]
        broker.join("default", timeout=5000)
    finally:
        dramatiq.set_encoder(before)


def test_priorities_are_honoured(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, priority=10)
    def late(n: int) -> None:
        got(("late", n))

    @dramatiq.actor(broker=broker, priority=-10)
    def early(n: int) -> None:
        got(("early", n))

    for n in range(3):
        late.send(n)
    for n in range(3):
        early.send(n)
    late.send_with_options(args=(3,), broker_priority=20)  # as with RabbitMQ, the highest is the first
    start_worker(broker, threads=1)
    # The message's own priority decides what is claimed first; among what is claimed, Dramatiq goes by the actor's.
    values = got.wait(7)
    assert [v for v in values if v != ("late", 3)] == [(a, n) for a in ("early", "late") for n in range(3)]
    assert values.index(("late", 3)) < values.index(("late", 0))


def test_a_priority_is_a_whole_number(broker: durable.DurableBroker) -> None:
    actor = dramatiq.actor(lambda: None, actor_name="work", broker=broker)
    with pytest.raises(ValueError, match="broker_priority is a whole number"):
        actor.send_with_options(broker_priority="high")


@pytest.mark.parametrize("delay", [300, 300.0, timedelta(milliseconds=300)], ids=repr)
def test_a_delayed_message_waits_in_the_database(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, delay: Any
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take() -> None:
        got(time.monotonic())

    start_worker(broker)
    sent = time.monotonic()
    message = take.send_with_options(delay=delay)
    assert message.options["eta"] >= message.message_timestamp + 300
    [(_, _, leased, due)] = rows.messages()
    assert not leased
    assert 0 < due <= 300
    [ran] = got.wait(1)
    assert 0.3 <= ran - sent < 2


def test_an_eta_without_a_delay_is_honoured(broker: durable.DurableBroker, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    message = take.message()
    broker.enqueue(message.copy(options={"eta": message.message_timestamp + 60_000}))
    [(_, _, _, due)] = rows.messages()
    assert 50_000 < due <= 60_000


def test_a_delayed_message_does_not_hold_back_others(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(n: int) -> None:
        got(n)

    for n in range(100):
        take.send_with_options(args=(n,), delay=60_000)
    start_worker(broker)
    take.send(1000)
    assert got.wait(1) == [1000]


def test_no_delay_queue_is_ever_declared(broker: durable.DurableBroker, start_worker: Any) -> None:
    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    worker = start_worker(broker)
    take.send_with_options(delay=10)
    broker.join("default", timeout=5000)
    assert set(worker.consumers) == {"default"}
    assert not broker.get_declared_delay_queues()


def test_async_actors_run(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    async def take(n: int) -> None:
        got(n)

    start_worker(broker)
    take.send(7)
    assert got.wait(1) == [7]
    broker.join("default", timeout=5000)


def test_a_sent_message_can_be_used_before_the_worker_knows_its_queue(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any
) -> None:
    got = Record()
    sender, receiver = make_broker(), make_broker()

    @dramatiq.actor(broker=sender, queue_name="far", actor_name="take")
    def stub(n: int) -> None:
        raise AssertionError("the sender does not run it")

    @dramatiq.actor(broker=receiver, queue_name="far")
    def take(n: int) -> None:
        got(n)

    stub.send(1)
    start_worker(receiver)
    stub.send(2)
    assert sorted(got.wait(2)) == [1, 2]


def test_the_same_message_again_is_stored_once_while_it_waits(broker: durable.DurableBroker, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    message = take.send()
    broker.enqueue(message)
    assert rows.count() == 1


@pytest.mark.parametrize("message_id", ["short", "x" * 300, "with a NUL \0"], ids=["short", "long", "nul"])
def test_message_ids_of_any_form(broker: durable.DurableBroker, start_worker: Any, message_id: str) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take() -> None:
        got(dramatiq.middleware.CurrentMessage.get_current_message().message_id)

    start_worker(broker)
    broker.enqueue(take.message().copy(message_id=message_id))
    assert got.wait(1) == [message_id]
    broker.join("default", timeout=5000)


# --- queues as a whole ----------------------------------------------------------------------------------


def test_join_waits_and_times_out(broker: durable.DurableBroker, start_worker: Any) -> None:
    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    take.send_with_options(delay=300)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=50)
    start_worker(broker)
    broker.join("default", timeout=5000)
    with pytest.raises(QueueNotFound):
        broker.join("undeclared")


@pytest.mark.administrator
def test_flush_drops_what_waits_on_that_queue_only(broker: durable.DurableBroker, rows: Rows) -> None:
    @dramatiq.actor(broker=broker, queue_name="one")
    def one() -> None: ...

    @dramatiq.actor(broker=broker, queue_name="two")
    def two() -> None: ...

    one.send()
    one.send_with_options(delay=60_000)
    two.send()
    broker.flush("one")
    assert [m[0] for m in rows.messages()] == ["two"]
    one.send()
    broker.flush_all()
    assert rows.count() == 0
    with pytest.raises(QueueNotFound):
        broker.flush("undeclared")


@pytest.mark.administrator
def test_flush_leaves_what_is_being_processed(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    begun, go, got = threading.Event(), threading.Event(), Record()

    @dramatiq.actor(broker=broker)
    def slow() -> None:
        begun.set()
        go.wait(20)
        got()

    start_worker(broker)
    slow.send()
    assert begun.wait(10)
    broker.flush("default")
    assert rows.count() == 1
    go.set()
    got.wait(1)
    rows.drained()


def test_a_closed_broker_can_be_used_again(broker: durable.DurableBroker, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def take() -> None: ...

    take.send()
    broker.close()
    broker.close()
    take.send()
    assert rows.count() == 2


def test_only_whitelisted_queues_are_consumed(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, queue_name="one")
    def one() -> None:
        got("one")

    @dramatiq.actor(broker=broker, queue_name="two")
    def two() -> None:
        got("two")

    two.send()
    one.send()
    start_worker(broker, queues={"one"})
    one.send()
    assert got.wait(2) == ["one", "one"]
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("two", 1, False)])


def test_a_queue_that_is_declared_late_is_consumed_too(broker: durable.DurableBroker, start_worker: Any) -> None:
    got = Record()
    start_worker(broker)

    @dramatiq.actor(broker=broker, queue_name="late")
    def late() -> None:
        got("late")

    late.send()
    assert got.wait(1) == ["late"]


def test_whoever_hears_of_messages_hears_of_each_of_many(broker: durable.DurableBroker, rows: Rows) -> None:
    """Also a hook that was put on the instance, as a mock is."""
    heard: list[tuple[str, int]] = []

    class Hears(Middleware):
        def before_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
            heard.append(("before", message.args[0]))

    late = Middleware()
    late.after_enqueue = lambda broker, message, delay: heard.append(("after", message.args[0]))  # type: ignore[method-assign]
    broker.add_middleware(Hears())
    broker.add_middleware(late)

    @dramatiq.actor(broker=broker)
    def number(n: int) -> None: ...

    broker.enqueue_many([number.message(n) for n in range(2)])
    assert heard == [("before", 0), ("before", 1), ("after", 0), ("after", 1)]
    assert rows.count() == 2


class ArgsFirst(JSONEncoder):
    """Its bytes begin as those of a row do whose message Dramatiq's own encoder made."""

    def encode(self, data: Any) -> bytes:
        return super().encode({"args": data["args"], **data})


class NoJson(JSONEncoder):
    def encode(self, data: Any) -> bytes:
        return b'{"args":' + super().encode(data)

    def decode(self, data: bytes) -> Any:
        return super().decode(data.removeprefix(b'{"args":'))


@pytest.mark.parametrize("encoder", [ArgsFirst, NoJson])
def test_an_encoder_whose_bytes_begin_like_a_rows(
    broker: durable.DurableBroker, start_worker: Any, encoder: type[JSONEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(*args: Any, **kwargs: Any) -> None:
        got((args, kwargs))

    take.send(1)
    monkeypatch.setattr("dramatiq.message.global_encoder", encoder())
    take.send(2, at=3)
    start_worker(broker)
    assert sorted(got.wait(2)) == [((1,), {}), ((2,), {"at": 3})]


def test_what_the_row_says_by_itself_is_not_stored_twice(broker: durable.DurableBroker, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def take(*args: Any, **kwargs: Any) -> None: ...

    message = take.send(1)
    at = message.message_timestamp
    take.send_with_options(args=(2,), kwargs={"n": 1}, max_retries=3)
    # An id that is no uuid is not the row's.
    broker.enqueue(message.copy(message_id="mine"))
    payloads = [bytes(payload).decode() for (payload,) in rows("SELECT payload FROM durable.message ORDER BY due_at")]
    assert payloads[0] == f'{{"args":[1],"at":{at}}}'
    assert json.loads(payloads[1]).keys() == {"args", "at", "kwargs", "options"}
    assert json.loads(payloads[2])["message_id"] == "mine"
