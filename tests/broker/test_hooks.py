"""What a message leaves behind commits with its ack: pipelines, callbacks, whatever hooks send."""

from __future__ import annotations

import threading
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq import group, pipeline
from dramatiq.middleware import Callbacks, CurrentMessage, Middleware
from dramatiq.middleware.time_limit import TimeLimitExceeded
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

import dramatiq_durable as durable
from dramatiq_durable.group_commit import GroupCommit
from dramatiq_durable.operations import Ack, Leave, Together, parts_of
from tests.support import wait_until

from .conftest import Record, Rows


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Every batch that is committed, as the list of its operations."""
    seen: list[list[Any]] = []
    execute = GroupCommit._execute

    def record(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        execute(self, conn, batch)
        seen.append(list(batch))

    monkeypatch.setattr(GroupCommit, "_execute", record)
    return seen


def together(batches: list[list[Any]], actor: str) -> bool:
    """Whether the message to this actor was stored in one commit with an ack."""
    units = [parts_of([o]) for batch in batches for o in batch]
    [unit] = [u for u in units if any(isinstance(o, Leave) and [s.actor for s in o.sends] == [actor] for o in u)]
    return any(isinstance(o, Ack) for o in unit)


def test_a_pipeline_passes_results_on(
    broker: durable.DurableBroker, start_worker: Any, batches: list[list[Any]]
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def first(n: int) -> int:
        return n + 1

    @dramatiq.actor(broker=broker, queue_name="other")
    def second(n: int) -> None:
        got(n)

    start_worker(broker)
    pipeline([first.message(1), second.message()], broker=broker).run()
    assert got.wait(1) == [2]
    assert together(batches, "second")


def test_a_pipeline_may_wait(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @dramatiq.actor(broker=broker)
    def first() -> int:
        return 1

    @dramatiq.actor(broker=broker)
    def second(n: int) -> None: ...

    start_worker(broker)
    pipeline([first.message(), second.message_with_options(delay=60_000)], broker=broker).run()
    wait_until(lambda: [m[0] for m in rows.messages()] == ["second"])
    assert rows.messages()[0][3] > 50_000


def test_callbacks_commit_with_the_ack(
    broker: durable.DurableBroker, start_worker: Any, batches: list[list[Any]]
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def good(message: dict[str, Any], result: Any) -> None:
        got((message["actor_name"], result))

    @dramatiq.actor(broker=broker)
    def bad(message: dict[str, Any], failure: dict[str, Any]) -> None:
        got((message["actor_name"], failure["type"]))

    @dramatiq.actor(broker=broker)
    def works() -> int:
        return 5

    @dramatiq.actor(broker=broker, max_retries=0)
    def fails() -> None:
        raise KeyError("no")

    start_worker(broker)
    works.send_with_options(on_success=good, on_failure=bad)
    assert got.wait(1) == [("works", 5)]
    fails.send_with_options(on_success=good, on_failure=bad)
    assert got.wait(2)[1] == ("fails", "KeyError")
    assert together(batches, "good")


def test_what_cannot_be_sent_on_keeps_the_message(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    """Dramatiq logs it and acks the message: the rest of the pipeline would be gone."""

    @dramatiq.actor(broker=broker)
    def first() -> object:
        return object()  # JSON cannot carry it

    @dramatiq.actor(broker=broker)
    def second(value: object) -> None: ...

    start_worker(broker)
    pipeline([first.message(), second.message()], broker=broker).run()
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("first", 2, False)])
    [(failure,)] = rows("SELECT last_failure FROM durable.message")
    assert "cannot be encoded" in failure


def test_a_crash_before_the_commit_takes_ack_and_next_message_together(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever moment the process dies at, the first message or the second is there."""
    seen = Record()
    post = broker.commit.post

    def watched(operation: Any) -> None:
        if isinstance(operation, Together):
            # The hooks have run, the commit was not made.
            seen([m[0] for m in rows.messages()])
            then = operation.then

            def committed(done: Any) -> None:
                # The commit was made, in this very moment: nothing is between the two.
                seen([m[0] for m in rows.messages()])
                then(done)

            operation.then = committed
        post(operation)

    monkeypatch.setattr(broker.commit, "post", watched)

    @dramatiq.actor(broker=broker)
    def first() -> int:
        return 1

    @dramatiq.actor(broker=broker, queue_name="unread")
    def second(n: int) -> None: ...

    start_worker(broker, queues={"default"})
    pipeline([first.message(), second.message()], broker=broker).run()
    assert seen.wait(2) == [["first"], ["second"]]


def test_what_the_body_sends_is_committed_at_once(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    begun, go = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker, queue_name="unread")
    def other() -> None: ...

    @dramatiq.actor(broker=broker)
    def sends() -> None:
        other.send()
        begun.set()
        go.wait(20)

    start_worker(broker, queues={"default"})
    sends.send()
    assert begun.wait(10)
    assert sorted(m[0] for m in rows.messages()) == ["other", "sends"]
    go.set()
    wait_until(lambda: [m[0] for m in rows.messages()] == ["other"])


def test_what_an_async_body_sends_is_committed_at_once(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, queue_name="unread")
    def other() -> None: ...

    @dramatiq.actor(broker=broker)
    async def sends() -> None:
        other.send()
        seen(sorted(m[0] for m in rows.messages()))

    start_worker(broker, queues={"default"})
    sends.send()
    assert seen.wait(1) == [["other", "sends"]]


def test_a_hook_that_is_run_again_sends_once(broker: durable.DurableBroker, start_worker: Any) -> None:
    """Dramatiq runs the hooks again where one of them was interrupted."""
    got, tries = Record(), Record()

    class Interrupted(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            if message.actor_name == "works" and not tries.values:
                tries()
                raise SystemExit  # passes all that catches Exception, like an interrupt between two hooks

    # The last of the list is the first after a message; callbacks follow it.
    broker.middleware = [m for m in broker.middleware if not isinstance(m, Callbacks)]
    broker.middleware.insert(0, Interrupted())
    broker.middleware.append(Callbacks())

    @dramatiq.actor(broker=broker)
    def good(message: dict[str, Any], result: Any) -> None:
        got("good")

    @dramatiq.actor(broker=broker)
    def bad(message: dict[str, Any], failure: dict[str, Any]) -> None:
        got("bad")

    @dramatiq.actor(broker=broker, max_retries=0, throws=SystemExit)
    def works() -> None: ...

    start_worker(broker)
    works.send_with_options(on_success=good, on_failure=bad)
    got.wait(1)
    broker.join("default", timeout=5000)
    assert got.values == ["bad"]  # the second time they were told of a failure: only this counts


def test_groups_and_results_of_dramatiq_work(broker: durable.DurableBroker, start_worker: Any) -> None:
    backend = StubBackend()
    broker.add_middleware(Results(backend=backend))

    @dramatiq.actor(broker=broker, store_results=True)
    def double(n: int) -> int:
        return 2 * n

    @dramatiq.actor(broker=broker, store_results=True, max_retries=0)
    def fails() -> None:
        raise ValueError("no")

    start_worker(broker)
    assert list(
        group([double.message(n) for n in range(5)], broker=broker).run().get_results(block=True, timeout=10_000)
    ) == [0, 2, 4, 6, 8]
    with pytest.raises(dramatiq.results.ResultFailure, match="no"):
        fails.send().get_result(backend=backend, block=True, timeout=10_000)


def test_an_actor_that_sends_its_own_message_again_is_run_again(
    broker: durable.DurableBroker, start_worker: Any
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def again() -> None:
        message = CurrentMessage.get_current_message()
        assert message is not None
        got(message.options.get("turn", 0))
        if len(got.values) < 3:
            message.options["turn"] = len(got.values)
            broker.enqueue(message, delay=10)

    start_worker(broker)
    again.send()
    assert got.wait(3) == [0, 1, 2]
    broker.join("default", timeout=5000)
    assert len(got.values) == 3


def test_what_cannot_be_stored_forbids_the_ack(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    """Also when others are in the batch: the next of a pipeline is never lost while its first is acked."""
    ran = Record()

    @dramatiq.actor(broker=broker)
    def first() -> int:
        ran(1)
        return 1

    @dramatiq.actor(broker=broker, queue_name="other")
    def refused(n: int) -> None: ...

    @dramatiq.actor(broker=broker)
    def bystander() -> None:
        ran(2)

    rows("ALTER TABLE durable.message ADD CONSTRAINT no_such_actor CHECK (actor <> 'refused')")
    pipeline([first.message(), refused.message()], broker=broker).run()
    broker.enqueue_many([bystander.message() for _ in range(5)])
    start_worker(broker)
    wait_until(lambda: [m[:2] for m in rows.messages()] == [("first", 2)])
    [(failure,)] = rows("SELECT last_failure FROM durable.message")
    assert "what follows it could not be stored" in failure
    rows("ALTER TABLE durable.message DROP CONSTRAINT no_such_actor")


def in_the_end(rows: Rows) -> list[tuple[Any, ...]]:
    """The dead letters, once there is one; what waits for its next try has it at once."""

    def hurried() -> bool:
        # Woken as by a sender: the worker sleeps until the next one was due.
        due = rows(
            "UPDATE durable.message SET due_at = clock_timestamp() WHERE lease_token IS NULL "
            "AND due_at > clock_timestamp() RETURNING stream_id"
        )
        for (stream,) in due:
            rows(f"SELECT durable.wake('{{{stream}}}', true)")
        return bool(rows.dead_letters())

    wait_until(hurried, timeout=30)
    return rows.dead_letters()


def test_what_can_never_be_encoded_is_given_up_in_the_end(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    ran = Record()

    @dramatiq.actor(broker=broker)
    def first() -> object:
        ran()
        return object()  # JSON cannot carry it

    @dramatiq.actor(broker=broker)
    def second(value: object) -> None: ...

    start_worker(broker)
    pipeline([first.message(), second.message()], broker=broker).run()
    [(actor, attempt, reason, failure)] = in_the_end(rows)
    assert (actor, attempt, reason, len(ran.values)) == ("first", 5, "unsettled", 5)
    assert failure.startswith("its hooks failed")
    assert "cannot be encoded" in failure
    assert failure.endswith("(5 times)")
    assert rows.count() == 0


def test_what_the_database_always_refuses_is_given_up_in_the_end(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    @dramatiq.actor(broker=broker)
    def first() -> int:
        return 1

    @dramatiq.actor(broker=broker)
    def in_a_transaction() -> int:
        with durable.transaction():
            return 1

    @dramatiq.actor(broker=broker, queue_name="other")
    def refused(n: int) -> None: ...

    rows("ALTER TABLE durable.message ADD CONSTRAINT no_such_actor CHECK (actor <> 'refused')")
    start_worker(broker)
    for actor in (first, in_a_transaction):
        pipeline([actor.message(), refused.message()], broker=broker).run()
        [(name, attempt, reason, failure)] = in_the_end(rows)
        assert (name, attempt, reason) == (actor.actor_name, 5, "unsettled")
        assert "could not be stored" in failure
        rows("DELETE FROM durable.dead_letter")


def test_a_stale_ack_stores_nothing(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    """The message is somebody else's now: what follows it is for him to send."""
    ended = Record()

    @dramatiq.actor(broker=broker)
    def first() -> int:
        rows("UPDATE durable.message SET lease_token = gen_random_uuid() WHERE actor = 'first'")
        ended(1)
        return 1

    @dramatiq.actor(broker=broker, queue_name="unread")
    def second(n: int) -> None: ...

    settled = Record()
    run = GroupCommit._execute

    def watched(self: GroupCommit, conn: Any, batch: list[Any]) -> None:
        run(self, conn, batch)
        for unit in batch:
            if isinstance(unit, Together):
                settled(unit.answer)

    broker.commit._execute = watched.__get__(broker.commit)  # type: ignore[method-assign]
    start_worker(broker, queues={"default"})
    pipeline([first.message(), second.message()], broker=broker).run()
    assert settled.wait(1) == [False]
    assert [m[0] for m in rows.messages()] == ["first"]


def test_a_lock_in_the_way_does_not_run_the_actor_again(
    broker: durable.DurableBroker, start_worker: Any, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is done is done: only its record waits, and what follows it with it."""
    begun, go = threading.Event(), threading.Event()
    ran, got = Record(), Record()

    @dramatiq.actor(broker=broker)
    def first() -> int:
        ran(1)
        begun.set()
        go.wait(20)
        return 1

    @dramatiq.actor(broker=broker, queue_name="other")
    def second(n: int) -> None:
        got(n)

    start_worker(broker)
    pipeline([first.message(), second.message()], broker=broker).run()
    assert begun.wait(10)
    with psycopg.connect(database_url) as conn:
        conn.execute("LOCK TABLE durable.message IN EXCLUSIVE MODE")
        go.set()
        wait_until(lambda: "waits to be settled" in caplog.text)
    assert got.wait(1, timeout=20) == [1]
    broker.join("default", timeout=10_000)
    assert ran.values == [1]


def test_a_copy_of_the_message_itself_is_another_message(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    """Sent by its own body or hooks it has its id, whose row is still there: it must not be taken for a repetition."""
    got = Record()

    class Again(Middleware):
        def after_process_message(
            self, broker: Any, message: Any, *, result: Any = None, exception: Any = None
        ) -> None:
            if message.args[0] == 1:
                broker.enqueue(message.copy(args=(2,)))

    broker.add_middleware(Again())

    @dramatiq.actor(broker=broker)
    def turn(n: int) -> None:
        got(n)
        if n == 0:
            message = CurrentMessage.get_current_message()
            assert message is not None
            broker.enqueue(message.copy(args=(1,)))

    start_worker(broker)
    turn.send(0)
    assert got.wait(3) == [0, 1, 2]
    rows.drained()


def test_one_message_twice_in_a_pipeline(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def add(n: int) -> int:
        got(n)
        return n + 1

    start_worker(broker)
    message = add.message()
    pipeline([add.message(1), message, message], broker=broker).run()
    assert got.wait(3) == [1, 2, 3]
    rows.drained()


def test_an_interrupt_between_the_actor_and_its_hooks_does_not_ack(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends Dramatiq's thread, which acks the message on its way out although no hook has seen its failure."""
    crashed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)

    @dramatiq.actor(broker=broker)
    def fails() -> None:
        raise ValueError("no")

    after = broker.emit_after

    def interrupted(signal: str, *arguments: Any, **more: Any) -> None:
        if signal == "process_message":
            raise TimeLimitExceeded
        after(signal, *arguments, **more)

    monkeypatch.setattr(broker, "emit_after", interrupted)
    start_worker(broker)
    fails.send()
    wait_until(lambda: [m[:3] for m in rows.messages()] == [("fails", 2, False)])
    wait_until(lambda: [c.exc_type for c in crashed] == [TimeLimitExceeded])
