"""Waiting for results: one connection and a few looks for all threads, through outages, forks and interrupts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq.results import ResultMissing, Results, ResultTimeout

import dramatiq_durable as durable
from dramatiq_durable import watch
from dramatiq_durable.migrate import migrate
from dramatiq_durable.results import PostgresBackend
from tests.support import wait_until

from .conftest import Record, Rows, in_thread


@pytest.fixture
def backend(broker: durable.DurableBroker) -> PostgresBackend:
    backend = PostgresBackend(broker)
    broker.add_middleware(Results(backend=backend))
    return backend


@pytest.fixture
def looks(broker: durable.DurableBroker, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Every look into the database: how many results were asked for."""
    seen = Record()
    get_results = broker.procedures.get_results

    def counted(conn: Any, keys: Any, *more: Any) -> Any:
        seen(len(keys))
        return get_results(conn, keys, *more)

    monkeypatch.setattr(broker.procedures, "get_results", counted)
    return seen


def waiters(rows: Rows) -> int:
    return int(rows("SELECT count(*) FROM durable.result_waiter")[0][0])


def test_many_threads_wait_on_one_connection(
    broker: durable.DurableBroker, backend: PostgresBackend, rows: Rows, looks: Record
) -> None:
    @dramatiq.actor(broker=broker)
    def answer() -> None: ...

    messages = [answer.message() for _ in range(50)]
    waiting = []
    for n, message in enumerate(messages):
        waiting.append(
            in_thread(lambda m=message: m.get_result(backend=backend, block=True, timeout=60_000))  # type: ignore[misc]
        )
        # They do not come all in one moment.
        wait_until(lambda n=n: waiters(rows) > n)  # type: ignore[misc]
    wait_until(lambda: len(looks.values) and max(looks.values) == 50, message="all are looked for together")
    before, began = len(looks.values), time.monotonic()
    wait_until(lambda: time.monotonic() - began > 2)
    assert len(looks.values) - before <= 8, "a few looks a second for all of them"
    listening = rows(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
    )
    assert listening[0][0] <= 1
    everything = rows(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert everything[0][0] <= 4
    for n, message in enumerate(messages):
        backend.store_result(message, n, 60_000)
    assert [join() for join in waiting] == list(range(50))


def test_a_result_wakes_its_waiter_at_once(
    broker: durable.DurableBroker, backend: PostgresBackend, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOKS", (0.0, 30.0))

    @dramatiq.actor(broker=broker)
    def answer() -> None: ...

    backend.store_result(answer.message(), 0, 1)
    for n in range(5):
        message = answer.message()
        join = in_thread(lambda m=message: m.get_result(backend=backend, block=True, timeout=20_000))  # type: ignore[misc]
        wait_until(lambda n=n: waiters(rows) > n)  # type: ignore[misc]
        began = time.monotonic()
        backend.store_result(message, n, 60_000)
        assert join() == n
        assert time.monotonic() - began < 5


def test_without_notifications_everything_arrives(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any, rows: Rows
) -> None:
    rows.conn.execute(
        b"CREATE FUNCTION deaf() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
        b"CREATE TRIGGER deaf BEFORE INSERT ON durable.result_waiter FOR EACH ROW EXECUTE FUNCTION deaf()"
    )
    go = threading.Event()

    @dramatiq.actor(broker=broker, store_results=True)
    def answer(n: int) -> int:
        go.wait(20)
        return n

    start_worker(broker)
    messages = [answer.send(n) for n in range(4)]
    waiting = [in_thread(lambda m=m: m.get_result(backend=backend, block=True, timeout=20_000)) for m in messages]  # type: ignore[misc]
    wait_until(lambda: len(watch.Watch.of(broker)._wishes) == 4)
    go.set()
    assert [join() for join in waiting] == [0, 1, 2, 3]
    assert waiters(rows) == 0


def test_postgres_restarts_while_somebody_waits(
    own_server: Any, make_broker: Callable[..., durable.DurableBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(own_server.url)
    broker = make_broker(own_server.url)
    backend = PostgresBackend(broker)

    @dramatiq.actor(broker=broker)
    def answer() -> None: ...

    message = answer.message()
    backend.store_result(answer.message(), 0, 1000)
    join = in_thread(lambda: message.get_result(backend=backend, block=True, timeout=60_000))
    rows = Rows(own_server.url)
    wait_until(lambda: waiters(rows) == 1)
    own_server.restart("immediate")
    backend.store_result(message, 5, 60_000)
    assert join() == 5
    rows.conn.close()


def test_a_fork_while_somebody_waits(
    broker: durable.DurableBroker, backend: PostgresBackend, rows: Rows, run_process: Any, database_url: str
) -> None:
    child = run_process.python(FORKS, env={"TEST_URL": database_url})
    child.wait_for("both wait")
    wait_until(lambda: waiters(rows) >= 2)

    for n, id in enumerate(("of-the-parent", "of-the-child")):
        message = dramatiq.Message("default", "answer", (), {}, {}, id)
        backend.store_result(message, n, 60_000)
    child.wait_for("child has 1")
    child.wait_for("parent has 0")
    assert child.wait() == 0, child.output


FORKS = """
import os, threading, time
import dramatiq, dramatiq_durable as durable
from dramatiq_durable.results import PostgresBackend

broker = durable.DurableBroker(os.environ["TEST_URL"])
backend = PostgresBackend(broker)
message = lambda id: dramatiq.Message("default", "answer", (), {}, {}, id)
begun = threading.Event()
get_results = broker.procedures.get_results
def noted(*arguments):
    found = get_results(*arguments)
    begun.set()
    return found
broker.procedures.get_results = noted
say = lambda text: os.write(1, (text + chr(10)).encode())

def wait(who):
    say(f"{who} has {message('of-the-' + who).get_result(backend=backend, block=True, timeout=30_000)}")

thread = threading.Thread(target=wait, args=("parent",))
thread.start()
begun.wait(20)
# The lock of the pool may be held by the watching thread in the moment of the fork.
broker.database._lock.acquire()
child = os.fork()
if not child:
    begun.clear()
    threading.Thread(target=lambda: begun.wait(20) and say("both wait")).start()
    wait("child")
    os._exit(0)
broker.database._lock.release()
thread.join()
os.waitpid(child, 0)
broker.close()
"""


def test_a_waiting_actor_obeys_its_time_limit(
    broker: durable.DurableBroker, backend: PostgresBackend, start_worker: Any
) -> None:
    """A wait of an hour must not keep the interrupt of a time limit or a shutdown for an hour."""
    got = Record()

    @dramatiq.actor(broker=broker, time_limit=200, max_retries=0)
    def waits() -> None:
        try:
            waits.message().get_result(backend=backend, block=True, timeout=3_600_000)
        except BaseException as e:
            got(type(e).__name__)
            raise

    start_worker(broker)
    waits.send()
    assert got.wait(1) == ["TimeLimitExceeded"]
    broker.join("default", timeout=10_000)


def test_one_who_may_not_look_gets_to_know(broker: durable.DurableBroker, backend: PostgresBackend, rows: Rows) -> None:
    """Rather than to wait for what it will never see."""
    message = dramatiq.Message("default", "answer", (), {}, {})
    with pytest.raises(ResultMissing):
        message.get_result(backend=backend)
    rows("DELETE FROM durable.login")
    with pytest.raises(durable.NotPermitted):
        message.get_result(backend=backend, block=True, timeout=20_000)


def test_who_waits_leaves_nothing_behind(
    broker: durable.DurableBroker, backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watching thread ends when nobody waits, and comes back for the next who does."""
    monkeypatch.setattr(watch, "IDLE", 0.05)

    for _ in range(3):
        with pytest.raises(ResultTimeout):
            dramatiq.Message("q", "a", (), {}, {}).get_result(backend=backend, block=True, timeout=10)
        wait_until(lambda: watch.Watch.of(broker)._thread is None)


def test_a_longest_namespace_can_be_waited_in(
    make_broker: Callable[..., durable.DurableBroker], database_url: str, start_worker: Any
) -> None:
    """Names of channels have 63 characters at the most, a namespace has up to 40."""
    namespace = "n" * 40
    migrate(database_url, namespace)
    broker = make_broker(namespace=namespace)
    backend = PostgresBackend(broker)
    broker.add_middleware(Results(backend=backend, store_results=True))
    go = threading.Event()

    @dramatiq.actor(broker=broker)
    def answer() -> int:
        go.wait(20)
        return 1

    @durable.workflow(broker=broker, queue_name="flows")
    async def flow() -> int:
        return int(await durable.wait_for_signal("go"))

    start_worker(broker)
    message, handle = answer.send(), flow.start()
    join = in_thread(lambda: message.get_result(backend=backend, block=True, timeout=20_000))
    run = in_thread(lambda: handle.result(timeout=20))
    with psycopg.connect(database_url, autocommit=True) as conn:
        waits = f'SELECT count(*) FROM "{namespace}".result_waiter'.encode()
        wait_until(lambda: (conn.execute(waits).fetchone() or (0,))[0])
    go.set()
    assert join() == 1
    handle.signal("go", 2)
    assert run() == 2
