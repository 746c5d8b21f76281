"""`results.PostgresBackend` under Dramatiq's Results: stored with the ack, waited for without a storm, never wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest
from dramatiq import group, pipeline
from dramatiq.encoder import PickleEncoder
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.results import ResultFailure, ResultMissing, Results, ResultTimeout

import dramatiq_durable as durable
from dramatiq_durable.delivery import MAX_PAYLOAD
from dramatiq_durable.results import PostgresBackend
from tests.support import wait_until

from .conftest import Record, Rows, in_thread, middleware


@pytest.fixture
def backend(broker: durable.DurableBroker) -> PostgresBackend:
    backend = PostgresBackend(broker)
    broker.add_middleware(Results(backend=backend))
    return backend


def results(rows: Rows) -> int:
    return int(rows("SELECT count(*) FROM durable.result")[0][0])


# --- stored with the end of the message -----------------------------------------------------------------------


def test_a_result_commits_with_the_ack(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, notes: Any
) -> None:
    @dramatiq.actor(broker=broker, store_results=True)
    def plain(n: int) -> int:
        return n + 1

    @dramatiq.actor(broker=broker, store_results=True)
    async def on_the_loop(n: int) -> int:
        return n + 1

    @dramatiq.actor(broker=broker, store_results=True)
    def in_a_transaction(n: int) -> int:
        with durable.transaction() as conn:
            conn.execute("SELECT 1")
        return n + 1

    @dramatiq.actor(broker=broker, store_results=True)
    async def in_an_async_transaction(n: int) -> int:
        async with durable.transaction() as conn:
            await conn.execute("SELECT 1")
        return n + 1

    @dramatiq.actor(broker=broker, store_results=True, max_retries=0)
    def fails(n: int) -> int:
        raise KeyError("no")

    start_worker(broker)
    for n, actor in enumerate((plain, on_the_loop, in_a_transaction, in_an_async_transaction, fails)):
        message = actor.send(n)
        if actor is fails:
            with pytest.raises(ResultFailure):
                message.get_result(backend=backend, block=True, timeout=20_000)
        else:
            assert message.get_result(backend=backend, block=True, timeout=20_000) == n + 1
        noted = notes()
        # One result each, written once, by the transaction that ended the message.
        assert [what for what, _ in noted] == ["end", "result"] * (n + 1)
        assert len({tx for _, tx in noted}) == n + 1
    broker.join("default", timeout=10_000)
    assert len(notes()) == 10  # what Dramatiq does after the nack stored nothing again


def test_from_outside_there_is_the_message_or_its_result(
    broker: durable.DurableBroker,
    backend: PostgresBackend,
    start_worker: Any,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Record()

    @dramatiq.actor(broker=broker, store_results=True)
    def answer() -> int:
        return 42

    execute = broker.commit._execute

    def watched(conn: Any, batch: list[Any]) -> None:
        ends = any(type(o).__name__ == "Together" for o in batch)
        if ends:
            seen((rows.count(), results(rows)))
        execute(conn, batch)
        if ends:
            seen((rows.count(), results(rows)))

    monkeypatch.setattr(broker.commit, "_execute", watched)
    start_worker(broker)
    assert answer.send().get_result(backend=backend, block=True, timeout=20_000) == 42
    assert seen.wait(2) == [(1, 0), (0, 1)]


def test_a_stale_workers_result_is_not_stored(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, rows: Rows
) -> None:
    told = Record()

    class Told(Middleware):
        def after_ack(self, broker: Any, message: Any) -> None:
            told()

        def after_nack(self, broker: Any, message: Any) -> None:
            told()

    broker.add_middleware(Told())

    def stolen() -> None:
        rows("UPDATE durable.message SET lease_token = gen_random_uuid()")

    @dramatiq.actor(broker=broker, store_results=True)
    def works() -> int:
        stolen()
        return 1

    @dramatiq.actor(broker=broker, store_results=True, max_retries=0)
    def fails() -> int:
        stolen()
        raise KeyError("no")

    worker = start_worker(broker)
    for n, actor in enumerate((works, fails), 1):
        message = actor.send()
        told.wait(n)
        wait_until(lambda: not broker.commit.leased_messages())
        assert rows.count() == 1
        assert results(rows) == 0
        with pytest.raises(ResultMissing):
            message.get_result(backend=backend)
        rows("DELETE FROM durable.message")
    assert rows.dead_letters() == []
    worker.stop()


def test_a_retried_message_stores_its_last_outcome_only(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, notes: Any
) -> None:
    tries = Record()

    @dramatiq.actor(broker=broker, store_results=True, max_retries=3)
    def at_last() -> str:
        tries()
        if len(tries.values) < 3:
            raise KeyError("not yet")
        return "done"

    @dramatiq.actor(broker=broker, store_results=True, max_retries=2)
    def never() -> None:
        raise KeyError("never")

    start_worker(broker)
    assert at_last.send().get_result(backend=backend, block=True, timeout=20_000) == "done"
    with pytest.raises(ResultFailure, match="never"):
        never.send().get_result(backend=backend, block=True, timeout=20_000)
    assert [what for what, _ in notes()] == ["end", "result"] * 2


def test_a_skipped_message_stores_none(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, notes: Any
) -> None:
    class Skips(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            raise SkipMessage("not today")

    broker.add_middleware(Skips())

    @dramatiq.actor(broker=broker, store_results=True)
    def skipped() -> int:
        return 1

    start_worker(broker)
    assert skipped.send().get_result(backend=backend, block=True, timeout=20_000) is None
    [(_, one), (_, other)] = notes()
    assert one == other


def test_an_expired_message_fails(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, notes: Any
) -> None:
    """AgeLimit skips it and has it fail: a failure, not None."""

    @dramatiq.actor(broker=broker, store_results=True, max_age=1)
    def old() -> int:
        return 1

    message = old.send_with_options(delay=30)
    start_worker(broker)
    with pytest.raises(ResultFailure, match="SkipMessage"):
        message.get_result(backend=backend, block=True, timeout=20_000)
    assert len(notes()) == 2


def test_a_delivery_that_was_lost_before_it_began_stores_nothing_anywhere(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has it now stores its result; Dramatiq's own hook would store None for it."""
    from dramatiq.results.backends import StubBackend

    stub = StubBackend()
    skipped = Record()

    class Told(Middleware):
        def after_skip_message(self, broker: Any, message: Any) -> None:
            skipped()

    broker.add_middleware(Results(backend=stub))
    broker.add_middleware(Told())

    @dramatiq.actor(broker=broker, store_results=True)
    def answer() -> int:
        return 1

    record_start = broker._record_start

    def lost(delivery: Any) -> None:
        rows("UPDATE durable.message SET lease_token = gen_random_uuid()")
        record_start(delivery)

    monkeypatch.setattr(broker, "_record_start", lost)
    message = answer.send()
    rows("UPDATE durable.message SET reclaimed = true")
    start_worker(broker)
    skipped.wait(1)
    with pytest.raises(ResultMissing):
        message.get_result(backend=stub)


def test_what_a_hook_sends_after_the_end_is_not_lost(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    """Also where it is the very message that has ended."""
    ran = Record()

    class Again(Middleware):
        def after_nack(self, broker: Any, message: Any) -> None:
            if len(ran.values) < 2:
                broker.enqueue(message)

    broker.add_middleware(Again())

    @dramatiq.actor(broker=broker, max_retries=0)
    def fails() -> None:
        ran()
        raise KeyError("no")

    start_worker(broker)
    fails.send()
    ran.wait(2)
    broker.join("default", timeout=10_000)
    assert len(rows.dead_letters()) == 2


# --- what Dramatiq's users do with it -------------------------------------------------------------------------


def test_missing_timeout_failure(broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any) -> None:
    @dramatiq.actor(broker=broker, store_results=True, max_retries=0)
    def fails() -> None:
        raise ValueError("with a \0 and a \U0001f600")

    message = fails.send()
    with pytest.raises(ResultMissing):
        message.get_result(backend=backend)
    for timeout in (0, 1, 120):
        began = time.monotonic()
        with pytest.raises(ResultTimeout):
            message.get_result(backend=backend, block=True, timeout=timeout)
        assert timeout / 1000 <= time.monotonic() - began < 5
    start_worker(broker)
    with pytest.raises(ResultFailure) as info:
        message.get_result(backend=backend, block=True, timeout=20_000)
    assert info.value.orig_exc_type == "ValueError"
    assert info.value.orig_exc_msg == "with a \0 and a \U0001f600"
    with pytest.raises(ResultFailure, match="actor raised ValueError"):
        message.get_result(backend=backend)


def test_what_is_there_is_found_whatever_the_timeout(broker: durable.DurableBroker, backend: PostgresBackend) -> None:
    """Dramatiq looks at least once; the last of a group may have no time left."""

    @dramatiq.actor(broker=broker, store_results=True)
    def answer() -> None: ...

    message = answer.message()
    backend.store_result(message, 42, 60_000)
    for timeout in (0, 1, -5):
        assert message.get_result(backend=backend, block=True, timeout=timeout) == 42


def test_who_stores_what(make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows) -> None:
    """A message's option precedes the actor's, which precedes the middleware's."""
    broker = make_broker()
    backend = PostgresBackend(broker)
    broker.add_middleware(Results(backend=backend, store_results=True, result_ttl=50_000))

    @dramatiq.actor(broker=broker)
    def by_default() -> int:
        return 1

    @dramatiq.actor(broker=broker, store_results=False)
    def not_at_all() -> int:
        return 2

    @dramatiq.actor(broker=broker, result_ttl=200_000)
    def longer() -> int:
        return 3

    start_worker(broker)
    silent = [not_at_all.send(), by_default.send_with_options(store_results=False)]
    stored = [
        (by_default.send(), 1, 50),
        (not_at_all.send_with_options(store_results=True), 2, 50),
        (longer.send(), 3, 200),
        (longer.send_with_options(result_ttl=400_000.7), 3, 400),
    ]
    for message, value, seconds in stored:
        assert message.get_result(backend=backend, block=True, timeout=20_000) == value
        [(left,)] = rows(
            "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM durable.result WHERE key = %s",
            backend.build_message_key(message),
        )
        assert seconds - 20 < left < seconds + 1
    broker.join("default", timeout=10_000)
    for message in silent:
        with pytest.raises(ResultMissing):
            message.get_result(backend=backend)


def test_a_result_lives_as_long_as_it_should(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, rows: Rows
) -> None:
    @dramatiq.actor(broker=broker, store_results=True, result_ttl=300)
    def answer() -> int:
        return 1

    kept, gone = answer.message(), answer.message()
    backend.store_result(kept, 2, 60_000)
    backend.store_result(gone, 1, 1)
    backend.store_result(answer.message(), 1, -1)

    def missing() -> bool:
        try:
            gone.get_result(backend=backend)
        except ResultMissing:
            return True
        return False

    wait_until(missing)
    with pytest.raises(ResultTimeout):
        gone.get_result(backend=backend, block=True, timeout=50)
    assert kept.get_result(backend=backend) == 2
    # The worker that sweeps forgets what has expired, and nothing else.
    start_worker(broker)
    wait_until(lambda: broker.claimer is not None and broker.claimer.membership.token)
    assert broker.claimer is not None
    broker.claimer.membership._next_sweep = 0.0
    broker.claimer.membership._next_beat = 0.0
    broker.claimer.wake()
    wait_until(lambda: results(rows) == 1)
    assert kept.get_result(backend=backend) == 2


@pytest.mark.parametrize("order", ["before Retries", "after all"])
def test_both_orders_of_adding_it(
    make_broker: Callable[..., durable.DurableBroker],
    start_worker: Any,
    order: str,
    notes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = Record()
    if order == "after all":
        broker = make_broker()
        backend = PostgresBackend(broker)
        broker.add_middleware(Results(backend=backend))
    else:
        results_first = Results(backend=None)
        broker = make_broker(middleware=[results_first, *middleware()])
        backend = results_first.backend = PostgresBackend(broker)

    @dramatiq.actor(broker=broker, store_results=True, max_retries=1)
    def second_time() -> int:
        tries()
        if len(tries.values) == 1:
            raise KeyError("first")
        return 2

    @dramatiq.actor(broker=broker, store_results=True, throws=KeyError)
    def refuses() -> int:
        raise KeyError("refused")

    @dramatiq.actor(broker=broker, store_results=True)
    def add(a: int, b: int) -> int:
        return a + b

    start_worker(broker)
    assert second_time.send().get_result(backend=backend, block=True, timeout=20_000) == 2
    with pytest.raises(ResultFailure, match="refused"):
        refuses.send().get_result(backend=backend, block=True, timeout=20_000)
    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
    chain = pipeline([add.message(1, 2), add.message(10)], broker=broker).run()
    assert list(chain.get_results(block=True, timeout=20_000)) == [3, 13]
    assert chain.completed
    assert chain.completed_count == 2
    assert [what for what, _ in notes()] == ["end", "result"] * 4


def test_groups_and_pipelines(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dramatiq.actor(broker=broker, store_results=True)
    def double(n: int) -> int:
        return 2 * n

    monkeypatch.setattr(dramatiq.broker, "global_broker", broker)
    together = group(
        [double.message(1), pipeline([double.message(2), double.message()], broker=broker)], broker=broker
    ).run()
    nested = group([group([double.message(n) for n in range(20)], broker=broker)], broker=broker)
    nested.run()
    assert not together.completed
    start_worker(broker)
    assert list(together.get_results(block=True, timeout=20_000)) == [2, 8]
    assert list(nested.get_results(block=True, timeout=20_000)) == [[2 * n for n in range(20)]]
    assert together.completed
    together.wait(timeout=1000)


@pytest.mark.parametrize("encoder", ["json", "pickle"])
def test_values_arrive_as_they_were(broker: durable.DurableBroker, start_worker: Any, encoder: str) -> None:
    backend = PostgresBackend(broker, encoder=PickleEncoder() if encoder == "pickle" else None)
    broker.add_middleware(Results(backend=backend))
    values: list[Any] = [None, 0, False, "", "a\0b", "\ud800", -0.0, {"b": 1, "a": [1.5, None]}, "x" * 200_000]
    if encoder == "pickle":
        values += [{1, 2}, b"\0\xff", (1, 2)]

    @dramatiq.actor(broker=broker, store_results=True)
    def answer(n: int) -> Any:
        return values[n]

    start_worker(broker)
    messages = [answer.send(n) for n in range(len(values))]
    got = [m.get_result(backend=backend, block=True, timeout=20_000) for m in messages]
    assert got == values
    assert repr(got) == repr(values)


def test_what_cannot_be_carried_is_a_failure(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, rows: Rows
) -> None:
    """Whoever waits gets to know, and the message is done: to run it again would not help."""

    @dramatiq.actor(broker=broker, store_results=True)
    def unencodable() -> object:
        return object()

    @dramatiq.actor(broker=broker, store_results=True)
    def too_large() -> str:
        return "x" * MAX_PAYLOAD

    @dramatiq.actor(broker=broker, store_results=True, max_retries=0)
    def fails_at_length() -> None:
        raise ValueError("x" * MAX_PAYLOAD)

    start_worker(broker)
    for actor, kind in ((unencodable, "NotEncodable"), (too_large, "PayloadTooLarge"), (fails_at_length, "Payload")):
        with pytest.raises(ResultFailure, match=kind):
            actor.send().get_result(backend=backend, block=True, timeout=20_000)
    broker.join("default", timeout=10_000)


@pytest.mark.parametrize("prefixed", [False, True])
def test_keys_of_any_message(broker: durable.DurableBroker, start_worker: Any, prefixed: bool, rows: Rows) -> None:
    """Ids are the sender's own choice: what no key can hold disturbs nobody."""
    backend = PostgresBackend(broker, namespace="mine", use_namespace_prefix_keys=prefixed)
    broker.add_middleware(Results(backend=backend))

    @dramatiq.actor(broker=broker, store_results=True)
    def answer(n: int) -> int:
        return n

    start_worker(broker)
    odd = ["plain", "with \0 in it", "\U0001f600" * 900, "".join(chr(0x4E00 + n) for n in range(1200))]
    messages = [broker.enqueue(answer.message(n).copy(message_id=id)) for n, id in enumerate(odd)]
    waiting = [in_thread(lambda m=m: m.get_result(backend=backend, block=True, timeout=20_000)) for m in messages]  # type: ignore[misc]
    assert [join() for join in waiting] == [0, 1, 2, 3]
    keys = [key for (key,) in rows("SELECT key FROM durable.result")]
    assert ("mine:default:answer:plain" in keys) is prefixed


def test_two_namespaces_of_keys_do_not_meet(broker: durable.DurableBroker) -> None:
    @dramatiq.actor(broker=broker)
    def answer() -> None: ...

    message = answer.message()
    PostgresBackend(broker, namespace="a").store_result(message, 1, 60_000)
    with pytest.raises(ResultMissing):
        message.get_result(backend=PostgresBackend(broker, namespace="b"))
    assert message.get_result(backend=PostgresBackend(broker, namespace="a")) == 1


def test_activities_of_workflows_store_results_too(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, notes: Any, rows: Rows
) -> None:
    seen = Record()

    class Ids(Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if message.kind == "a":
                seen(message._message)

    broker.add_middleware(Ids())

    @durable.activity(broker=broker, store_results=True)
    def add(a: int, b: int) -> int:
        return a + b

    @durable.activity(broker=broker, store_results=True, max_retries=0)
    def fails() -> None:
        raise KeyError("no")

    @durable.workflow(broker=broker)
    async def flow() -> int:
        total = await add.execute(1, 2)
        try:
            await fails.execute()
        except durable.ActivityFailed:
            total += 10
        return total

    start_worker(broker)
    assert flow.start().result(timeout=20) == 13
    first, second = seen.wait(2)
    assert first.get_result(backend=backend) == 3
    with pytest.raises(ResultFailure):
        second.get_result(backend=backend)
    # One write each, with the end of the activity.
    noted = [tx for what, tx in notes() if what == "result"]
    assert len(noted) == 2
    assert set(noted) <= {tx for what, tx in notes() if what == "end"}


def test_tasks_of_workflows_store_no_results(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    broker = make_broker()
    broker.add_middleware(Results(backend=PostgresBackend(broker), store_results=True))

    @durable.workflow(broker=broker)
    async def flow() -> int:
        await durable.sleep(0.01)
        return 1

    start_worker(broker)
    assert flow.start().result(timeout=20) == 1
    rows.drained()
    assert results(rows) == 0


def test_workflow_code_is_refused(broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any) -> None:
    @dramatiq.actor(broker=broker, store_results=True)
    def answer() -> int:
        return 1

    message = answer.message()
    backend.store_result(message, 1, 60_000)

    @durable.workflow(broker=broker)
    async def flow() -> list[str]:
        refused = []
        for block in (False, True):
            try:
                message.get_result(backend=backend, block=block)
            except durable.ForbiddenInWorkflow as e:
                refused.append(str(e))
        return refused

    start_worker(broker)
    refused = flow.start().result(timeout=20)
    assert len(refused) == 2
    assert "execute(...)" in refused[0]
