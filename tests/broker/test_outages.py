"""Postgres goes away: nothing is lost, nothing is stored twice, and everything resumes by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.errors import DatabaseUnavailable, OutcomeUnknown
from dramatiq_durable.migrate import migrate
from tests.support import wait_until

from .conftest import Record, Rows


class Senders:
    """Threads that send numbers until they are stopped, and know which of them were acknowledged."""

    def __init__(self, actor: Any, *, threads: int = 3) -> None:
        self.acknowledged: list[str] = []
        self.sent: list[str] = []
        self.unavailable: list[Exception] = []
        self._stop = threading.Event()
        self._actor = actor
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        turn = 0
        while not self._stop.wait(0.002):
            turn += 1
            name = f"{number}-{turn}"
            self.sent.append(name)
            try:
                self._actor.send(name)
            except DatabaseUnavailable as e:
                self.unavailable.append(e)
            else:
                self.acknowledged.append(name)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_postgres_loses_nothing(
    own_server: Any, make_broker: Callable[..., durable.DurableBroker], start_worker: Any, mode: str
) -> None:
    migrate(own_server.url)
    got = Record()
    sender, receiver = make_broker(own_server.url), make_broker(own_server.url)
    for each in (sender, receiver):

        @dramatiq.actor(broker=each, max_retries=0)
        def take(name: str) -> None:
            time.sleep(0.001)
            got(name)

    start_worker(receiver)
    senders = Senders(sender.get_actor("take"))
    for _ in range(2):
        before = len(senders.acknowledged)
        wait_until(lambda b=before: len(senders.acknowledged) > b + 50)  # type: ignore[misc]
        own_server.restart(mode)
    before = len(senders.acknowledged)
    wait_until(lambda: len(senders.acknowledged) > before + 50)
    senders.stop()
    receiver.join("default", timeout=20_000)
    # No worker died, so nothing ran twice: outcomes that were lost with a connection were repeated under their leases.
    assert len(got.values) == len(set(got.values))
    assert set(senders.acknowledged) <= set(got.values) <= set(senders.sent)
    # What was not acknowledged may or may not be there only where the outcome could not be found out.
    unknown = [e for e in senders.unavailable if isinstance(e, OutcomeUnknown)]
    assert len(set(got.values) - set(senders.acknowledged)) <= len(unknown)
    with psycopg.connect(own_server.url) as conn:
        assert conn.execute("SELECT count(*) FROM durable.dead_letter").fetchall() == [(0,)]


def test_ended_connections_in_the_middle_lose_and_repeat_nothing(
    make_broker: Callable[..., durable.DurableBroker], start_worker: Any, rows: Rows
) -> None:
    got = Record()
    sender, receiver = make_broker(), make_broker()
    for each in (sender, receiver):

        @dramatiq.actor(broker=each, max_retries=0)
        def take(name: str) -> None:
            got(name)

    start_worker(receiver)
    senders = Senders(sender.get_actor("take"))
    for _ in range(25):
        before = len(senders.acknowledged)
        wait_until(lambda b=before: len(senders.acknowledged) > b + 10)  # type: ignore[misc]
        rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    senders.stop()
    rows.drained(timeout=30)
    wait_until(lambda: len(got.values) >= len(senders.acknowledged))
    assert sorted(got.values) == sorted(senders.acknowledged) == sorted(senders.sent)
    assert senders.unavailable == []


def test_a_worker_that_is_early_waits_for_its_database(
    own_server: Any,
    make_broker: Callable[..., durable.DurableBroker],
    start_worker: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import dramatiq.worker

    monkeypatch.setattr(dramatiq.worker, "CONSUMER_RESTART_DELAY_SECS", 0.1)
    migrate(own_server.url)
    got, broker = Record(), make_broker(own_server.url)

    @dramatiq.actor(broker=broker)
    def take(n: int) -> None:
        got(n)

    connect, away = broker.database.connect, threading.Event()
    away.set()

    def early() -> Any:
        if away.is_set():
            raise DatabaseUnavailable("the database is starting up")
        return connect()

    monkeypatch.setattr(broker.database, "connect", early)
    start_worker(broker)
    with pytest.raises(DatabaseUnavailable):
        take.send(1)
    away.clear()
    take.send(2)
    assert got.wait(1) == [2]


def test_an_actor_that_ends_during_the_outage_is_acked_after_it(
    own_server: Any, make_broker: Callable[..., durable.DurableBroker], start_worker: Any
) -> None:
    migrate(own_server.url)
    got, broker = Record(), make_broker(own_server.url)
    begun, go = threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker)
    def take() -> None:
        begun.set()
        go.wait(30)
        got()

    start_worker(broker)
    take.send()
    assert begun.wait(10)
    own_server.restart("immediate")
    go.set()
    broker.join("default", timeout=20_000)
    assert len(got.values) == 1


def test_a_server_that_takes_no_writes_for_a_while_is_waited_for(
    own_server: Any, make_broker: Callable[..., durable.DurableBroker], start_worker: Any
) -> None:
    migrate(own_server.url)
    got = Record()
    broker = make_broker(own_server.url)

    @dramatiq.actor(broker=broker, max_retries=0)
    def take(name: str) -> None:
        got(name)

    start_worker(broker)
    take.send("before")
    got.wait(1)
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        conn.execute("SELECT pg_reload_conf()")
        wait_until(lambda: conn.execute("SHOW default_transaction_read_only").fetchone() == ("on",))
        sender = threading.Thread(target=take.send, args=("during",))
        sender.start()
        time.sleep(1)
        assert sender.is_alive()
        conn.execute("SET default_transaction_read_only = off")
        conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
        conn.execute("SELECT pg_reload_conf()")
    sender.join(15)
    assert sorted(got.wait(2)) == ["before", "during"]


@pytest.mark.parametrize("call", ["report", "streams"])
def test_a_call_that_finds_the_connection_broken_goes_on_with_the_new_token(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """A new connection has a new token: with the old one the worker would seem to have been declared dead."""
    got, begun, go = Record(), threading.Event(), threading.Event()

    @dramatiq.actor(broker=broker)
    def take() -> None:
        begun.set()
        go.wait(30)
        got()

    start_worker(broker, threads=1)  # it has nothing to claim for while the actor runs
    take.send()
    assert begun.wait(10)
    claimer = broker.claimer
    assert claimer is not None
    # While the claimer's thread is held up, its connection ends, and the next call is this one.
    with broker.commit._driving:
        before = rows("SELECT token FROM durable.worker")
        rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        if call == "report":
            claimer.reports.told = True
        else:
            claimer._known_streams = []
        claimer.wake()
    wait_until(lambda: rows("SELECT token FROM durable.worker") != before)
    go.set()
    broker.join("default", timeout=10_000)
    assert got.values == [None]
    assert "declared dead" not in caplog.text
    assert "the claimer failed" not in caplog.text
