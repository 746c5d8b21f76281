"""What a broker of a scoped worker logs in with, and that it holds nothing else; and a broker that only reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.settings import Settings
from tests.support import wait_until

URL = "postgresql://dd_1_w_1:s%40crt@localhost/shop"


@pytest.mark.parametrize(
    "credentials",
    [
        URL,
        f" {URL}\n",
        durable.Credential("dd_1_w_1", "s@crt", URL),
        {"url": URL},
        {"role": "dd_1_w_1", "password": "s@crt", "url": URL},
        {"role": "dd_1_w_1", "password": "s@crt", "url": "postgresql://localhost/shop"},
    ],
)
def test_credentials_are_what_provisioning_returns(credentials: Any) -> None:
    broker = durable.DurableBroker(worker_credentials=credentials, middleware=[], settings=Settings())
    parts = psycopg.conninfo.conninfo_to_dict(broker.database.conninfo)
    assert (parts["user"], parts["password"], parts["dbname"]) == ("dd_1_w_1", "s@crt", "shop")


@pytest.mark.parametrize(
    ("credentials", "why"),
    [
        ("", "it is empty"),
        ("host=x", "does not start with postgresql"),
        ({}, "have no url"),
        ({"role": "a", "password": "b"}, "have no url"),
        (17, "have no url"),
        (b"postgresql://a@b/c", "have no url"),
        ("postgresql://localhost/shop", "do not say who logs in"),
        ({"url": "postgresql://localhost/shop"}, "do not say who logs in"),
        ({"url": URL, "role": "other"}, "two roles"),
    ],
)
def test_other_credentials_are_refused(credentials: Any, why: str) -> None:
    with pytest.raises(durable.NotConfigured, match=why):
        durable.DurableBroker(worker_credentials=credentials, settings=Settings())


def test_a_url_beside_credentials_is_refused() -> None:
    with pytest.raises(durable.NotConfigured, match="url and worker_credentials: give one of them"):
        durable.DurableBroker("postgresql://admin@localhost/shop", worker_credentials=URL, settings=Settings())


@pytest.mark.parametrize("variable", ["URL", "LISTEN_URL"])
def test_another_login_in_the_environment_is_refused(clean_environment: Any, variable: str) -> None:
    clean_environment(**{variable: "postgresql://admin:hunter2@localhost/shop"})
    with pytest.raises(durable.NotConfigured) as caught:
        durable.DurableBroker(worker_credentials=URL)
    text = str(caught.value)
    assert f"DRAMATIQ_DURABLE_{variable} logs in as 'admin' beside the worker's credentials of 'dd_1_w_1'" in text
    assert "take it out of the environment" in text
    assert "hunter2" not in text
    assert "crt" not in text


def test_the_same_login_elsewhere_is_fine(clean_environment: Any) -> None:
    clean_environment(URL=URL, LISTEN_URL="postgresql://dd_1_w_1:s%40crt@direct:5432/shop")
    durable.DurableBroker(worker_credentials=URL)


def test_a_provisioned_url_beside_another_login_to_listen_is_refused(database_url: str, clean_environment: Any) -> None:
    made = durable.provision_worker_role(database_url, name="w", streams=["default"])
    try:
        clean_environment(URL=made.url, LISTEN_URL=database_url)
        with pytest.raises(durable.NotConfigured, match="DRAMATIQ_DURABLE_LISTEN_URL logs in as"):
            durable.DurableBroker()
    finally:
        durable.revoke_worker_role("w", url=database_url)


# --- readonly ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def readonly(database_url: str) -> Iterator[durable.DurableBroker]:
    with closing(durable.DurableBroker(database_url, readonly=True)) as broker:
        yield broker


def test_a_readonly_broker_takes_nothing(
    readonly: durable.DurableBroker, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It sends, starts, signals, queries and reads; a worker on it is given nothing and says so once."""
    ran: list[Any] = []

    @dramatiq.actor(broker=readonly)
    def note(n: int) -> None:
        ran.append(n)

    @durable.workflow(broker=readonly, queue_name="runs")
    async def waits() -> Any:
        durable.on_query("where")(lambda: "here")
        return await durable.wait_for_signal("go")

    durable.subscribe("topic")(note)
    with psycopg.connect(database_url, autocommit=True) as look, caplog.at_level(logging.WARNING):

        def one(query: str) -> Any:
            return look.execute(query.encode()).fetchall()

        worker = dramatiq.Worker(readonly, worker_timeout=20, worker_threads=2)
        worker.start()
        try:
            note.send(1)
            handle = waits.options(workflow_id="w").start()
            handle.signal("go", 7)
            assert handle.status() == "running"
            assert durable.count_workflows(broker=readonly) == 1
            assert readonly.claimer is None
            consumer = readonly.consume("default", timeout=50)
            assert next(consumer) is None
            consumer.close()
            assert one("SELECT count(*) FROM durable.worker") == [(0,)]
            assert one("SELECT count(*) FROM durable.message WHERE lease_token IS NOT NULL OR attempt > 1") == [(0,)]
            assert one("SELECT count(*) FROM durable.subscription") == [(0,)]
        finally:
            worker.stop()
        assert ran == []
        assert [r.message for r in caplog.records if "readonly" in r.message] == [
            "the broker is readonly: this worker is given nothing; make its broker without readonly=True"
        ]

        # Another broker's worker does it all, and the readonly one looks on.
        with closing(durable.DurableBroker(database_url)) as other:
            dramatiq.actor(lambda n: ran.append(n), actor_name="note", broker=other)
            durable.workflow(broker=other, queue_name="runs", name="waits")(waits.fn)
            worker = dramatiq.Worker(other, worker_timeout=20, worker_threads=2)
            worker.start()
            try:
                assert handle.result(timeout=20) == 7
                assert handle.query("where") == "here"
                wait_until(lambda: ran == [1])
            finally:
                worker.stop()


def test_readonly_is_of_the_url_that_was_given(database_url: str) -> None:
    made = durable.provision_worker_role(database_url, name="w", streams=["default"], produce=["default"])
    try:
        with closing(durable.DurableBroker(worker_credentials=made, readonly=True)) as broker:
            dramatiq.actor(lambda: None, actor_name="act", broker=broker).send()
            assert urlsplit(made.url).username == made.role
            assert broker.get_queue_message_counts("default") == (1, 0, 0)
    finally:
        durable.revoke_worker_role("w", url=database_url)


def test_a_worker_that_may_take_nothing_says_so(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says what to do, without a traceback, and stops when it is asked to."""
    made = durable.provision_worker_role(database_url, name="w", kind="producer", produce=["default"])
    try:
        with closing(durable.DurableBroker(worker_credentials=made)) as broker:
            dramatiq.actor(lambda: None, actor_name="act", broker=broker)
            worker = dramatiq.Worker(broker, worker_timeout=20, worker_threads=1)
            worker.start()
            try:
                wait_until(lambda: [r for r in caplog.records if "this worker is given nothing" in r.message])
            finally:
                worker.stop()
        (record, *_) = [r for r in caplog.records if "this worker is given nothing" in r.message]
        assert "dramatiq-durable role grant" in record.message
        assert record.exc_info is None
    finally:
        durable.revoke_worker_role("w", url=database_url)
