"""Abort: what waits does not run, what runs is interrupted, and nobody else is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import CurrentMessage, Middleware, Retries
from dramatiq.results import ResultFailure, Results
from dramatiq.results.backends import StubBackend

import dramatiq_durable as durable
from dramatiq_durable import interrupts
from dramatiq_durable.settings import Settings
from tests.support import ROOT, wait_until

from .conftest import Record, Rows, middleware


def spin(seconds: float = 20) -> None:
    """Work in Python, where an exception from outside can come up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.001)


@pytest.fixture
def seen() -> Record:
    return Record()


# --- what waits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [None, 3_600_000])
@pytest.mark.parametrize("mode", ["abort", "cancel"])
def test_what_waits_never_runs(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record, delay: int | None, mode: Any
) -> None:
    @dramatiq.actor(broker=broker)
    def work(n: int) -> None:
        seen(n)

    message = work.send_with_options(args=(1,), delay=delay)
    assert durable.abort(message.message_id, mode=mode, broker=broker) == "queued"
    assert durable.abort(message.message_id, mode=mode, broker=broker) == "queued", "again, it is the same"
    work.send(2)
    start_worker(broker)
    rows.drained()
    assert seen.values == [2]
    assert rows.dead_letters() == [("work", 1, "aborted", "Abort: the message was aborted")]


def test_what_waits_for_its_retry_is_not_tried_again(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record
) -> None:
    @dramatiq.actor(broker=broker, min_backoff=3_600_000, max_backoff=3_600_000)
    def fails() -> None:
        seen()
        raise ValueError("no")

    start_worker(broker)
    message = fails.send()
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("fails", 2, False)])
    assert durable.abort(message.message_id, broker=broker) == "queued"
    rows.drained()
    assert len(seen.values) == 1
    assert [letter[:3] for letter in rows.dead_letters()] == [("fails", 2, "aborted")]


def test_an_abort_while_a_message_fails_spares_it_the_wait_for_its_retry(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record
) -> None:
    """The worker does not know yet, and asks for another attempt."""

    @dramatiq.actor(broker=broker, min_backoff=3_600_000, max_backoff=3_600_000)
    def fails() -> None:
        seen()
        rows("UPDATE durable.message SET abort_at = now(), reclaimed = true")
        raise ValueError("no")

    start_worker(broker)
    broker.claimer._report = lambda: None  # type: ignore[method-assign,union-attr]
    fails.send()
    rows.drained()
    assert len(seen.values) == 1
    assert [letter[1:3] for letter in rows.dead_letters()] == [(2, "aborted")]


def test_hooks_see_what_waited_fail(broker: durable.DurableBroker, start_worker: Any, seen: Record) -> None:
    backend = StubBackend()
    broker.add_middleware(Results(backend=backend))

    @dramatiq.actor(broker=broker)
    def bad(message: dict[str, Any], failure: dict[str, Any]) -> None:
        seen(failure)

    @dramatiq.actor(broker=broker, store_results=True)
    def work() -> int:
        return 1

    message = work.send_with_options(on_failure=bad)
    durable.abort(message.message_id, broker=broker)
    start_worker(broker)
    assert seen.wait(1) == [{"type": "Abort", "message": "the message was aborted"}]
    with pytest.raises(ResultFailure, match="the message was aborted"):
        message.get_result(backend=backend, block=True, timeout=10_000)


def test_unknown_and_finished_messages_are_missing(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    @dramatiq.actor(broker=broker)
    def work() -> None: ...

    message = work.send()
    start_worker(broker)
    rows.drained()
    for unknown in (message.message_id, "no uuid", "00000000-0000-0000-0000-000000000000"):
        assert durable.abort(unknown, broker=broker) == "missing"
    assert asyncio.run(durable.aabort(message.message_id, broker=broker)) == "missing"


def test_ids_need_be_no_uuids(broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record) -> None:
    @dramatiq.actor(broker=broker)
    def work() -> None:
        seen()

    broker.enqueue(work.message().copy(message_id="mine"))
    assert durable.abort("mine", broker=broker) == "queued"
    start_worker(broker)
    rows.drained()
    assert seen.values == []


def test_bad_input_is_told(broker: durable.DurableBroker) -> None:
    with pytest.raises(ValueError, match='mode="abort" or mode="cancel"'):
        durable.abort("x", mode="now", broker=broker)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"like message\.message_id"):
        durable.abort(12, broker=broker)  # type: ignore[arg-type]


# --- what runs --------------------------------------------------------------------------------------------


def test_what_runs_is_interrupted_and_not_retried(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    begun = threading.Event()

    @dramatiq.actor(broker=broker, max_retries=5)
    def work() -> None:
        begun.set()
        try:
            spin()
        except durable.Abort:
            seen("cleaned up")
            raise

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    assert durable.abort(message.message_id, mode="cancel", broker=broker) == "running"
    assert rows("SELECT abort_at FROM durable.message") == [(None,)], "a cancel leaves alone what has begun"
    at = time.monotonic()
    assert durable.abort(message.message_id, broker=broker) == "running"
    seen.wait(1)
    assert time.monotonic() - at < 5
    rows.drained()
    assert rows.dead_letters() == [("work", 1, "aborted", "Abort: the message was aborted")]
    assert "Failed to process message work() with expected exception Abort." in caplog.messages
    assert [r for r in caplog.records if r.exc_info] == [], "somebody wanted it: no traceback"


def test_without_notifications_a_worker_finds_out_by_itself(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "_listen_for_worker", lambda worker_id: None)
    begun = threading.Event()

    @dramatiq.actor(broker=broker)
    def work() -> None:
        begun.set()
        spin()

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    durable.abort(message.message_id, broker=broker)
    rows.drained()
    assert [letter[2] for letter in rows.dead_letters()] == ["aborted"]


def test_what_a_thread_has_not_begun_does_not_begin(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record
) -> None:
    """It is leased, and lies in the worker's own queue behind another."""
    begun, go = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker)
    def work(n: int) -> None:
        seen(n)
        begun.set()
        go.wait(20)

    worker = start_worker(broker, threads=1)
    work.send(1)
    assert begun.wait(10)
    claimer = broker.claimer
    assert claimer is not None
    claimer.pace.ahead = 5
    monkeyed, claimer.pace.measure = claimer.pace.measure, lambda threads: None  # type: ignore[method-assign]
    message = work.send(2)
    wait_until(lambda: len(claimer.held) == 2, message="the second is claimed ahead")
    [second] = [d for d in claimer.held.values() if d.message_id == message.message_id]
    assert durable.abort(message.message_id, broker=broker) == "running"
    wait_until(lambda: second.interruption is not None or second.settled)
    go.set()
    claimer.pace.measure = monkeyed  # type: ignore[method-assign]
    rows.drained()
    assert seen.values == [1]
    assert worker.work_queue.unfinished_tasks == 0


def test_who_catches_it_and_returns_is_done(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record
) -> None:
    begun = threading.Event()

    @dramatiq.actor(broker=broker)
    def work() -> None:
        begun.set()
        try:
            spin()
        except durable.Abort:
            seen("caught")

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    durable.abort(message.message_id, broker=broker)
    seen.wait(1)
    rows.drained()
    assert rows.dead_letters() == []


def test_who_fails_while_cleaning_up_is_not_retried(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record
) -> None:
    begun = threading.Event()

    @dramatiq.actor(broker=broker, max_retries=5)
    def work() -> None:
        begun.set()
        try:
            spin()
        finally:
            raise KeyError("while cleaning up")

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    durable.abort(message.message_id, broker=broker)
    rows.drained()
    assert rows.dead_letters() == [("work", 1, "aborted", "KeyError: 'while cleaning up'")]


def test_async_actors_are_cancelled(broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record) -> None:
    begun = threading.Event()

    @dramatiq.actor(broker=broker)
    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            seen("cancelled")
            raise

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    durable.abort(message.message_id, broker=broker)
    assert seen.wait(1) == ["cancelled"]
    rows.drained()
    assert rows.dead_letters() == [("work", 1, "aborted", "Abort: the message was aborted")]


def test_a_transaction_of_what_is_aborted_is_rolled_back(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    begun = threading.Event()
    rows("CREATE TABLE public.effect (n int)")

    @dramatiq.actor(broker=broker)
    def work() -> None:
        with durable.transaction() as conn:
            conn.execute("INSERT INTO public.effect VALUES (1)")
            begun.set()
            spin()

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    durable.abort(message.message_id, broker=broker)
    rows.drained()
    assert rows("SELECT count(*) FROM public.effect") == [(0,)]


def test_a_retry_middleware_of_somebodys_own_does_not_bring_it_back(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    class Again(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            if exception is not None:
                broker.enqueue(message, delay=1)

    broker = make_broker(middleware=[m for m in middleware() if not isinstance(m, Retries)] + [Again()])
    begun = threading.Event()

    @dramatiq.actor(broker=broker)
    def work() -> None:
        begun.set()
        spin()

    start_worker(broker)
    message = work.send()
    assert begun.wait(10)
    durable.abort(message.message_id, broker=broker)
    rows.drained()
    assert [letter[:3] for letter in rows.dead_letters()] == [("work", 1, "aborted")]


def test_a_dead_workers_message_that_was_aborted_is_not_run_by_the_next(
    make_broker: Callable[..., durable.DurableBroker],
    start_worker: Any,
    rows: Rows,
    seen: Record,
    run_process: Any,
    database_url: str,
) -> None:
    broker = make_broker(reclaim_delay=1)

    @dramatiq.actor(broker=broker, actor_name="forever")
    def forever() -> None:
        seen()

    process = run_process.python(
        "import sys, time, dramatiq, dramatiq_durable as durable\n"
        "broker = durable.DurableBroker(sys.argv[1], middleware=[], reclaim_delay=1)\n"
        "@dramatiq.actor(broker=broker)\n"
        "def forever():\n"
        "    print('begun', flush=True)\n"
        "    while True: time.sleep(60)\n"
        "dramatiq.Worker(broker, worker_timeout=50, worker_threads=1).start()\n"
        "time.sleep(600)\n",
        database_url,
        env={"PYTHONPATH": str(ROOT)},
    )
    message = forever.send()
    wait_until(lambda: "begun" in process.output, timeout=20)
    assert durable.abort(message.message_id, broker=broker) == "running"
    process.kill()  # it sits in a system call and never heard of it
    start_worker(broker)
    rows.drained(timeout=20)
    assert seen.values == []
    assert [letter[2] for letter in rows.dead_letters()] == ["aborted"]


# --- activities ---------------------------------------------------------------------------------------------


def test_an_aborted_activity_fails_in_its_run(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, seen: Record
) -> None:
    @durable.activity(broker=broker, max_retries=5)
    def charge() -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        seen(message.message_id)
        spin()

    @durable.workflow(broker=broker)
    async def order() -> str:
        try:
            await charge.execute()
        except durable.ActivityFailed as e:
            return f"{e.type}, retryable: {e.retryable}"
        return "done"

    start_worker(broker)
    handle = order.start()
    [message_id] = seen.wait(1)
    [(key,)] = rows("SELECT message_id::text FROM durable.message WHERE kind = 'a'")
    assert durable.abort(handle.run_id, broker=broker) == "missing", "a run is cancelled, not aborted"
    assert durable.abort(key, broker=broker) == "running"
    assert handle.result(timeout=10) == "Abort, retryable: False"
    assert len(seen.values) == 1
    assert rows.dead_letters() == []
    assert message_id


# --- the window ---------------------------------------------------------------------------------------------


def test_an_exception_that_comes_too_late_hits_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was decided on while the actor still ran, and is raised when that has ended."""
    deciding, ending = threading.Event(), threading.Event()
    raise_really = interrupts.raise_thread_exception

    def slow(thread: int, exception: Any) -> None:
        deciding.set()
        assert ending.wait(10)
        time.sleep(0.1)  # whoever does not wait for us goes on, and is hit
        raise_really(thread, exception)

    monkeypatch.setattr(interrupts, "raise_thread_exception", slow)
    run = interrupts.Interruptible()
    interrupter = threading.Thread(target=run.interrupt, args=[durable.Abort])
    with suppress(durable.Abort):  # as Dramatiq's worker does
        try:
            run.begin()
            interrupter.start()
            assert deciding.wait(10)
        finally:
            ending.set()
            run.end()
    # The hooks, the ack, and the thread's next message: an exception here would fail the test.
    interrupter.join()
    spin(0.2)
    assert run.interruption is durable.Abort


def test_threads_go_on_whenever_an_abort_comes(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows, seen: Record
) -> None:
    """Short messages, each aborted at some moment of its life: every one is done or among the dead letters."""
    broker = make_broker(settings=Settings(poll_interval=0.05))
    count = 300

    @dramatiq.actor(broker=broker)
    def work(n: int) -> None:
        spin(0.004)
        seen(n)

    messages = [work.message(n) for n in range(count)]
    worker = start_worker(broker, threads=4)
    broker.enqueue_many(messages)
    answers = [durable.abort(message.message_id, broker=broker) for message in messages]
    rows.drained(timeout=30)
    assert all(thread.is_alive() for thread in worker.workers)
    dead = rows.dead_letters()
    assert {letter[2] for letter in dead} <= {"aborted"}
    assert len(seen.values) + len(dead) == count, (len(seen.values), len(dead))
    assert answers.count("queued") <= len(dead)
    work.send(-1)
    wait_until(lambda: -1 in seen.values)


# --- gevent --------------------------------------------------------------------------------------------------


def test_greenlets_are_interrupted_where_they_wait() -> None:
    """In a process of its own: gevent replaces the standard library's threads."""
    pytest.importorskip("gevent")
    code = """
from gevent import monkey; monkey.patch_all()
import gevent, dramatiq_durable as durable
from dramatiq_durable.interrupts import Interruptible

said = []
def work(run, body):
    try:
        try:
            run.begin()
            body()
        finally:
            run.end()
        gevent.sleep(0.05)  # what follows is not to be hit
        said.append("done")
    except durable.Abort:
        said.append("aborted")

running, ending = Interruptible(), Interruptible()
greenlets = [
    gevent.spawn(work, running, lambda: gevent.sleep(20)),
    gevent.spawn(work, ending, lambda: ending.interrupt(durable.Abort)),  # it ends before the hub has its turn
]
gevent.sleep(0.01)
running.interrupt(durable.Abort)
gevent.joinall(greenlets, timeout=5)
print(sorted(said))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['aborted', 'done']\n", done.stderr
