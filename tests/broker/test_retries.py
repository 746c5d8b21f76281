"""Retries and dead letters: a retry is the same row, and what fails for good is kept with the reason."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.middleware import CurrentMessage, Middleware, Retries, SkipMessage, TimeLimit, TimeLimitExceeded

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.stored import message_in

from .conftest import Record, Rows, middleware


def test_a_retry_is_the_same_row(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, database_url: str
) -> None:
    """The message is never twice in the table, nor gone from it, while it is being retried."""
    got, counts = Record(), Record()

    @dramatiq.actor(broker=broker, max_retries=5, min_backoff=5, max_backoff=10)
    def flaky() -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        got((message.message_id, message.options.get("retries", 0)))
        counts(Rows_count())
        if len(got.values) < 4:
            raise ValueError("not yet")

    look = psycopg.connect(database_url, autocommit=True)

    def Rows_count() -> int:
        return look.execute("SELECT count(*) FROM durable.message").fetchall()[0][0]  # type: ignore[no-any-return]

    with look:
        start_worker(broker)
        sent = flaky.send()
        assert got.wait(4) == [(sent.message_id, n) for n in range(4)]
        rows.drained()
    assert counts.values == [1] * 4
    assert rows.dead_letters() == []


def test_the_backoff_is_honoured(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @dramatiq.actor(broker=broker, max_retries=5, min_backoff=100_000, max_backoff=100_000)
    def failing() -> None:
        raise ValueError("no")

    start_worker(broker)
    failing.send()
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("failing", 2, False)])
    # Dramatiq's jitter is half of the backoff.
    assert 40_000 < rows.messages()[0][3] <= 100_000
    assert rows("SELECT last_failure FROM durable.message") == [("ValueError: no",)]
    [(payload,)] = rows("SELECT payload FROM durable.message")
    options = json.loads(payload)["options"]
    assert options["retries"] == 1
    assert "ValueError: no" in options["traceback"]


def test_retries_that_run_out_end_in_the_dead_letters(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    got, exhausted = Record(), Record()

    @dramatiq.actor(broker=broker)
    def after(message: dict[str, Any], facts: dict[str, Any]) -> None:
        exhausted((message["args"], facts))

    @dramatiq.actor(broker=broker, max_retries=2, min_backoff=1, max_backoff=2, on_retry_exhausted="after")
    def failing(n: int) -> None:
        got(n)
        raise ValueError("a NUL \0 in a failure")

    start_worker(broker)
    failing.send(7)
    assert exhausted.wait(1) == [([7], {"retries": 2, "max_retries": 2})]
    assert got.values == [7] * 3
    rows.drained()
    assert rows.dead_letters() == [("failing", 3, "rejected", "ValueError: a NUL \N{SYMBOL FOR NULL} in a failure")]
    [(payload,)] = rows("SELECT payload FROM durable.dead_letter")
    assert message_in(payload).args == (7,)


def test_retry_with_a_delay_of_its_own(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def later() -> None:
        raise dramatiq.errors.Retry("later", delay=70_000)

    start_worker(broker)
    later.send()
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("later", 2, False)])
    assert 60_000 < rows.messages()[0][3] <= 70_000


def test_what_an_actor_throws_on_purpose_is_not_retried(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    @dramatiq.actor(broker=broker, throws=(KeyError,), max_retries=10)
    def throwing() -> None:
        raise KeyError("expected")

    start_worker(broker)
    throwing.send()
    wait_until(rows.dead_letters)
    assert rows.dead_letters() == [("throwing", 1, "rejected", "KeyError: 'expected'")]
    rows.drained()


def test_retry_when_decides(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, retry_when=lambda retries, e: retries < 1, min_backoff=1, max_backoff=1)
    def failing() -> None:
        got()
        raise ValueError("no")

    start_worker(broker)
    failing.send()
    wait_until(rows.dead_letters)
    assert len(got.values) == 2


def test_without_the_retries_middleware_a_failure_is_the_end(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    broker, got = make_broker(middleware=[]), Record()

    @dramatiq.actor(broker=broker)
    def failing() -> None:
        got()
        raise ValueError("no")

    start_worker(broker)
    failing.send()
    got.wait(1)
    rows.drained()  # as Dramatiq documents it: done, not failed
    assert rows.dead_letters() == []


@pytest.mark.parametrize("delay", [-1, 10**15, "soon"])
def test_a_retry_that_cannot_be_stored_loses_nothing(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, delay: Any
) -> None:
    """Dramatiq logs the error of the retries middleware and acks the message: it would be gone."""

    @dramatiq.actor(broker=broker)
    def failing() -> None:
        raise dramatiq.errors.Retry("later", delay=delay)

    start_worker(broker)
    failing.send()
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("failing", 2, False)])
    assert "its hooks failed" in rows("SELECT last_failure FROM durable.message")[0][0]


def test_a_dead_letter_whose_options_cannot_be_encoded_is_kept(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    class Spoil(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            message.options["spoilt"] = object()

    broker.add_middleware(Spoil())

    @dramatiq.actor(broker=broker, max_retries=0)
    def failing() -> None:
        raise ValueError("no")

    @dramatiq.actor(broker=broker, max_retries=1, min_backoff=1, max_backoff=1)
    def again() -> None:
        raise ValueError("no")

    start_worker(broker)
    failing.send()
    again.send()
    wait_until(lambda: len(rows.dead_letters()) == 2)
    # What can be stored is: without the count, a message would be retried for ever.
    assert {(actor, attempt) for actor, attempt, _, _ in rows.dead_letters()} == {("failing", 1), ("again", 2)}
    payloads = [json.loads(bytes(p)) for (p,) in rows("SELECT payload FROM durable.dead_letter")]
    assert all("spoilt" not in p["options"] and p["options"]["retries"] for p in payloads)


# --- dead letters without an actor's doing -----------------------------------------------------------------


def test_an_unknown_actor_is_a_dead_letter(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    sender, broker, got = make_broker(), make_broker(), Record()

    @dramatiq.actor(broker=sender)
    def elsewhere() -> None: ...

    @dramatiq.actor(broker=broker)
    def here() -> None:
        got()

    elsewhere.send()
    start_worker(broker)
    here.send()
    got.wait(1)
    wait_until(rows.dead_letters)
    [(actor, _, reason, failure)] = rows.dead_letters()
    assert (actor, reason) == ("elsewhere", "rejected")
    assert "ActorNotFound" in failure
    rows.drained()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\x00 no text",
        b"[]",
        b'{"queue_name": "default"}',
        b'{"queue_name":"default","actor_name":["here"],"args":[],"kwargs":{},"options":{},"message_id":"x"}',
        b'{"queue_name":"default","actor_name":"here","args":[],"kwargs":{},"options":[],"message_id":"x"}',
        b'{"queue_name":"default","actor_name":"here","args":[],"kwargs":{},"options":null,"message_id":"x"}',
        b"[" * 100_000,
    ],
    ids=range(8),
)
def test_a_payload_that_cannot_be_read_is_a_dead_letter(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, payload: bytes
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def here(n: int) -> None:
        got(n)

    here.send(1)
    rows("UPDATE durable.message SET payload = %s, priority = -1", payload)
    here.send(2)
    start_worker(broker)
    here.send(3)
    assert sorted(got.wait(2)) == [2, 3]
    wait_until(rows.dead_letters)
    [(_, _, reason, failure)] = rows.dead_letters()
    assert reason == "rejected"
    assert "cannot be decoded" in failure
    assert rows("SELECT payload FROM durable.dead_letter") == [(payload,)]
    rows.drained()


# --- limits ------------------------------------------------------------------------------------------------


def test_an_old_message_is_dead_lettered_unrun(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, max_age=50)
    def aging(n: int) -> None:
        got(n)

    aging.send_with_options(args=(1,), delay=100)
    start_worker(broker)
    wait_until(rows.dead_letters)
    [(actor, _, reason, failure)] = rows.dead_letters()
    assert (actor, reason, got.values) == ("aging", "rejected", [])
    assert "age limit" in failure
    rows.drained()


def test_a_skipped_message_is_done(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got, skipped = Record(), Record()

    class Skip(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            raise SkipMessage("not today")

        def after_skip_message(self, broker: Any, message: Any) -> None:
            skipped(message.actor_name)

    broker.add_middleware(Skip())

    @dramatiq.actor(broker=broker)
    def take() -> None:
        got()

    start_worker(broker)
    take.send()
    assert skipped.wait(1) == ["take"]
    rows.drained()
    assert (got.values, rows.dead_letters()) == ([], [])


def test_the_time_limit_interrupts_an_actor(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker, time_limit=100, max_retries=0)
    def endless() -> None:
        try:
            while True:
                time.sleep(0.005)
        except TimeLimitExceeded:
            got("interrupted")
            raise

    start_worker(broker)
    endless.send()
    assert got.wait(1) == ["interrupted"]
    wait_until(rows.dead_letters)
    assert rows.dead_letters()[0][3].startswith("TimeLimitExceeded")


def test_the_time_limit_interrupts_an_async_actor(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    import asyncio

    got = Record()

    @dramatiq.actor(broker=broker, time_limit=100, max_retries=0)
    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            got("cancelled")
            raise

    start_worker(broker)
    endless.send()
    assert got.wait(1) == ["cancelled"]
    wait_until(rows.dead_letters)


def test_an_interrupt_in_a_hook_loses_neither_the_message_nor_the_thread(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A time limit that runs out in after_process_message ends Dramatiq's thread, and the message is lost with it."""

    class Loop(Middleware):
        # The time limit is lifted in an after-hook too: this one comes before it.
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            if message.actor_name == "hooked":
                hanging()
                while True:
                    time.sleep(0.005)

    hanging, got = Record(), Record()
    broker.add_middleware(Loop())

    @dramatiq.actor(broker=broker, time_limit=100)
    def hooked() -> None: ...

    @dramatiq.actor(broker=broker)
    def plain(n: int) -> None:
        got(n)

    worker = start_worker(broker, threads=1)
    hooked.send()
    hanging.wait(1)
    plain.send(1)
    assert got.wait(1) == [1]  # the only thread is alive
    assert all(thread.is_alive() for thread in worker.workers)
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("hooked", 2, False)])
    assert rows.messages()[0][3] > 10_000  # not at once again
    assert rows.dead_letters() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interrupt_at_any_moment_loses_no_message(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    """Time limits land in the actor, in hooks and in between: each message ends, or is still there and free."""
    others = [m for m in middleware() if not isinstance(m, (TimeLimit, Retries))]
    broker = make_broker(middleware=[TimeLimit(interval=1), *others, Retries()])
    got, interrupted = Record(), Record()

    @dramatiq.actor(broker=broker, min_backoff=1, max_backoff=1, max_retries=1000, time_limit=8)
    def take(n: int) -> None:
        try:
            time.sleep(0.008)
            got(n)
        except TimeLimitExceeded:
            interrupted(n)
            raise

    worker = start_worker(broker, threads=4)
    broker.enqueue_many([take.message(n) for n in range(200)])
    wait_until(lambda: len(got.values) >= 100 or not any(t.is_alive() for t in worker.workers))
    worker.stop(timeout=5000)  # threads that Dramatiq lost leave their messages to the worker's end
    assert interrupted.values
    left = {json.loads(bytes(payload))["args"][0] for (payload,) in rows("SELECT payload FROM durable.message")}
    assert set(got.values) | left == set(range(200))
    assert not any(leased for _, _, leased, _ in rows.messages())
    assert rows.dead_letters() == []


def test_a_shutdown_is_notified(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    begun, got = threading.Event(), Record()

    @dramatiq.actor(broker=broker, notify_shutdown=True, max_retries=1, min_backoff=1, max_backoff=1)
    def long() -> None:
        begun.set()
        try:
            while True:
                time.sleep(0.005)
        except dramatiq.middleware.Shutdown:
            got("shutdown")
            raise

    worker = start_worker(broker)
    long.send()
    assert begun.wait(10)
    worker.stop(timeout=5000)
    assert got.values == ["shutdown"]
    assert [m[:3] for m in rows.messages()] == [("long", 2, False)]


def test_the_failure_of_one_hook_does_not_stop_the_others(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            raise RuntimeError("a hook of the application")

    broker.add_middleware(Broken())

    @dramatiq.actor(broker=broker, max_retries=0)
    def failing() -> None:
        raise ValueError("no")

    with caplog.at_level(logging.CRITICAL):
        start_worker(broker)
        failing.send()
        wait_until(rows.dead_letters)
    assert "a hook of the application" in caplog.text


def test_the_retries_middleware_is_the_stock_one(broker: durable.DurableBroker) -> None:
    assert [type(m) for m in broker.middleware if isinstance(m, Retries)] == [Retries]
