"""Every example runs, as a reader of the README would run it."""

from __future__ import annotations

import re
import signal
import sys

import dramatiq
import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.migrate import migrate
from examples.orders import book
from examples.orders.proof import prove
from tests.support import ROOT, wait_until
from tests.support.processes import Process, Processes

DEMO = (sys.executable, "-m", "examples.orders.demo", "--shared", "--patience", "8s")


def blocks(page: str = "README.md") -> list[str]:
    """A page's blocks of Python, without the indentation of a list they may stand in."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^( *)```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_the_readme_shows_the_example_that_is_tested() -> None:
    assert blocks()[0] == (ROOT / "examples" / "hello.py").read_text()


def test_the_example_of_the_readme_runs(run_process: Processes, database_url: str) -> None:
    environment = {"DRAMATIQ_DURABLE_URL": database_url}
    run_process.dramatiq("examples.hello", "--processes", "1", "--threads", "2", env=environment)
    client = run_process(sys.executable, "-m", "examples.hello", env=environment)
    assert client.wait(timeout=60) == 0, client.output
    assert client.output == "receipt-o-1: 1 on the way, approved by Kim\n"


def test_what_the_readme_shows_of_dramatiq_runs(run_process: Processes, database_url: str) -> None:
    before = """
import os, dramatiq, dramatiq_durable as durable
from dramatiq.middleware import GroupCallbacks
from dramatiq.results import Results
from sqlalchemy import Column, MetaData, String, Table, create_engine, insert

broker = durable.DurableBroker()
dramatiq.set_broker(broker)
engine = create_engine(os.environ["ALCHEMY_URL"])
metadata = MetaData()
orders = Table("orders", metadata, Column("id", String))
metadata.create_all(engine)


@dramatiq.actor
def charge(order_id, cents): ...


@dramatiq.actor
def report(period): ...


message = report.send("first")
"""
    after = """
assert durable.schedules.describe("report").timezone == "Europe/Berlin"
broker.close()
"""
    environment = {
        "DRAMATIQ_DURABLE_URL": database_url,
        "ALCHEMY_URL": database_url.replace("postgresql://", "postgresql+psycopg://", 1),
    }
    process = run_process.python(before + blocks()[1] + after, env=environment)
    assert process.wait(timeout=60) == 0, process.output
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT id FROM orders").fetchall() == [("o-1",)]
        waiting = conn.execute("SELECT actor, unique_key, abort_at IS NULL FROM durable.message WHERE kind = 'm'")
        assert set(waiting.fetchall()) == {
            ("charge", None, True), ("report", "report-daily", True), ("report", None, False)
        }  # fmt: skip


def test_what_the_readme_shows_of_scoped_workers_runs(run_process: Processes, database_url: str) -> None:
    before = "import threading, dramatiq, dramatiq_durable as durable\n"
    mine = {"DRAMATIQ_DURABLE_URL": database_url}
    process = run_process.python(before + blocks()[2], env=mine)
    assert process.wait(timeout=60) == 0, process.output
    work = """
worker = dramatiq.Worker(broker, queues={"questions"}, worker_timeout=50, worker_threads=1)
worker.start()
threading.Event().wait()
"""
    run_process.python(before + blocks()[3] + work, env={"DRAMATIQ_DURABLE_URL": process.output.strip()})
    broker = durable.DurableBroker(database_url)
    broker.declare_queue("questions")
    broker.enqueue(dramatiq.Message("questions", "look_up", ("why",), {}, {}))
    with psycopg.connect(database_url, autocommit=True) as conn:
        query = b"SELECT actor, convert_from(payload, 'UTF8') FROM durable.message WHERE actor <> 'look_up'"
        wait_until(lambda: conn.execute(query).fetchall())
        ((actor, payload),) = conn.execute(query).fetchall()
    assert (actor, '"that is not for me to do"' in payload) == ("answer", True)
    broker.close()
    assert durable.revoke_worker_role("agent", url=database_url)


def test_what_the_page_on_queues_shows_runs(run_process: Processes, database_url: str) -> None:
    results, groups, unique = blocks("docs/queues.md")
    program = f"""
import dramatiq, dramatiq_durable as durable

broker = durable.DurableBroker()
dramatiq.set_broker(broker)


@dramatiq.actor
def report(period): ...


worker = dramatiq.Worker(broker, worker_timeout=50)
worker.start()
{results}
assert add.send(2, 3).get_result(block=True, timeout=20_000) == 5
{groups}
done = dramatiq.group([report.message("a"), report.message("b")])
done.add_completion_callback(report.message("c"))
done.run()
broker.join("default", timeout=20_000)
worker.stop()
{unique}
assert report.send_with_options(args=("again",), unique_key="report-daily").message_id == message.message_id
broker.close()
"""
    process = run_process.python(program, env={"DRAMATIQ_DURABLE_URL": database_url})
    assert process.wait(timeout=60) == 0, process.output


def test_what_the_page_on_messages_shows_runs(run_process: Processes, database_url: str) -> None:
    assert blocks("docs/messages.md") == [(ROOT / "examples" / "messages.py").read_text()]
    environment = {"DRAMATIQ_DURABLE_URL": database_url}
    run_process.dramatiq("examples.messages", "--processes", "1", "--threads", "4", env=environment)
    client = run_process.python(
        "import runpy; runpy.run_module('examples.messages', run_name='__main__')", env=environment
    )
    assert client.wait(timeout=90) == 0, client.output
    assert client.output.splitlines() == [
        "first: 500",
        "second: 750",
        "UpdateRejected ValueError: a price is not negative",
        "UpdateFailed LookupError: there is no unicorn",
        "total: 500",
        "ordered: {'tea': 500}",
        "total, later: 500",
    ]


def test_what_the_page_on_activities_shows_runs(run_process: Processes, database_url: str) -> None:
    assert blocks("docs/activities.md") == [(ROOT / "examples" / "activities.py").read_text()]
    environment = {"DRAMATIQ_DURABLE_URL": database_url}
    worker = run_process.dramatiq("examples.activities", "--processes", "1", "--threads", "2", env=environment)
    started = run_process.python(
        "from examples.activities import order; order.options(workflow_id='w').start('o-1')", env=environment
    )
    assert started.wait(timeout=60) == 0, started.output
    token = worker.wait_for("callback with").split()[-1]
    end = "from examples.activities import durable\n"
    end += f"durable.complete_activity({token!r}, 'yes'); print(durable.get_handle('w').result(timeout=60))"
    client = run_process.python(end, env=environment)
    assert client.wait(timeout=60) == 0, client.output
    assert client.output == "12 lines in the second attempt; Declined at attempt 1; the bank says yes\n"


def test_the_activity_of_the_readme_writes_its_row_once(run_process: Processes, database_url: str) -> None:
    book_activity = blocks()[4]
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("CREATE TABLE charge (order_id text, cents int)")
        program = (
            "import dramatiq, dramatiq_durable as durable\n"
            "broker = durable.DurableBroker()\n"
            "dramatiq.set_broker(broker)\n"
            f"{book_activity}\n"
            "worker = dramatiq.Worker(broker, worker_timeout=50)\n"
            "worker.start()\n"
            "book.send('o-1', 500)\n"
            "broker.join('payments', timeout=20_000)\n"
            "worker.stop()\n"
            "broker.close()\n"
        )
        process = run_process.python(program, env={"DRAMATIQ_DURABLE_URL": database_url})
        assert process.wait(timeout=60) == 0, process.output
        assert conn.execute("SELECT * FROM charge").fetchall() == [("o-1", 500)]


def test_the_orders_say_how_they_end() -> None:
    orders = book.read()
    assert len(orders) == 300
    assert len({order.order_id for order in orders}) == 300
    # The tests run the first 40: they have to have one of each kind.
    for some in (orders, orders[:40]):
        assert {order.ends for order in some} == {"shipped", "rejected", "expired", "declined"}
        assert {order.card for order in some} == {"valid", "busy", "declined"}
        assert {order.shelf for order in some} == {"tidy", "stuck"}
    for order in orders:
        answered = {"approve": "shipped", "reject": "rejected", "none": "expired"}[order.answer]
        assert order.ends == ("declined" if order.card == "declined" else answered)


# --- the demo ------------------------------------------------------------------------------------------------


def others(url: str) -> int:
    """How many sessions of workers and clients the server has."""
    with psycopg.connect(url) as conn:
        row = conn.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.timeout(240)
def test_the_demo_by_workers_with_a_scope(run_process: Processes, own_server: embedded.Server) -> None:
    demo = run_process(*DEMO, "--scoped", "--directory", str(own_server.directory), "--orders", "24")
    assert demo.wait(timeout=200) == 0, demo.output
    for line in (
        "may use the queues orders, shipping, payments, warehouse",
        "SIGKILL for worker process",
        "Postgres has recovered",
        "holds   every one of 24 orders ended as its row says",
        "holds   no charge was recorded twice",
    ):
        assert line in demo.output
    assert "BROKEN" not in demo.output
    with psycopg.connect(own_server.url) as conn:
        # The runs' tasks and activities were done by the scoped login; and it is gone.
        assert conn.execute("SELECT count(*) FROM shop.charge").fetchone() != (0,)
        assert (
            conn.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'dd!_%!_orders!_%' ESCAPE '!'").fetchall()
            == []
        )


@pytest.mark.timeout(240)
def test_the_demo_twice_and_its_proof(run_process: Processes, own_server: embedded.Server) -> None:
    for number in (20, 40):
        demo = run_process(*DEMO, "--directory", str(own_server.directory), "--orders", str(number))
        assert demo.wait(timeout=120) == 0, demo.output
        for line in (
            "SIGKILL for worker process",
            "in work again",
            "Postgres has recovered",
            f"holds   every one of {number} orders ended as its row says",
            "holds   no charge was recorded twice",
            "dramatiq-durable workflow list",
        ):
            assert line in demo.output
        assert "BROKEN" not in demo.output
        wait_until(lambda: others(own_server.url) == 0, message="nobody left on the server")

    # What would not be found if the proof looked at too little: each of these damages is.
    orders = book.read(40)
    shipped = next(order for order in orders if order.ends == "shipped")
    twice = "INSERT INTO shop.charge (order_id, cents) SELECT order_id, 0 FROM shop.charge WHERE order_id = %s"
    undone = "DELETE FROM shop.shipment WHERE order_id = %s"
    stopped = "UPDATE durable.run SET status = 'terminated' WHERE workflow_id = 'order-' || %s"
    recorded_twice = (
        "INSERT INTO durable.event SELECT run_id, 1000, type, at, seq, name, payload, attributes FROM durable.event"
        " WHERE type = 'ActivityCompleted' AND name = 'charge'"
        " AND run_id = (SELECT run_id FROM durable.run WHERE workflow_id = 'order-' || %s)"
    )
    dearer = "UPDATE shop.charge SET cents = cents + 1 WHERE order_id = %s"
    assert prove(own_server.url, orders)[1] == []
    for damage in (twice, undone, stopped, recorded_twice, dearer):
        with psycopg.connect(own_server.url, autocommit=True) as conn:
            conn.execute("CREATE SCHEMA kept")
            for table in ("shop.charge", "shop.shipment", "durable.run", "durable.event"):
                conn.execute(f"CREATE TABLE kept.{table.replace('.', '_')} AS TABLE {table}".encode())
            conn.execute(damage.encode(), [shipped.order_id])
            try:
                broken = prove(own_server.url, orders)[1]
                assert broken, damage
                assert any(shipped.order_id in line for line in broken) or damage == dearer
            finally:
                for table in ("shop.charge", "shop.shipment", "durable.run", "durable.event"):
                    identity = "OVERRIDING SYSTEM VALUE" if table.startswith("shop.") else ""
                    conn.execute(f"TRUNCATE {table}".encode())
                    conn.execute(f"INSERT INTO {table} {identity} TABLE kept.{table.replace('.', '_')}".encode())
                conn.execute("DROP SCHEMA kept CASCADE")
    assert prove(own_server.url, orders)[1] == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("Starting Postgres", signal.SIGINT),
        ("orders started", signal.SIGINT),
        ("SIGKILL for worker process", signal.SIGINT),
        ("is restarted", signal.SIGINT),
        ("in work again", signal.SIGTERM),
    ],
)
def test_an_interrupted_demo_leaves_nothing(
    run_process: Processes, own_server: embedded.Server, moment: str, number: signal.Signals
) -> None:
    demo = run_process(*DEMO, "--directory", str(own_server.directory), "--orders", "40")
    demo.wait_for(moment, timeout=60)
    demo.signal(number)
    assert demo.wait(timeout=60) == 130, demo.output
    assert "everything has been stopped" in demo.output
    own_server = embedded.acquire(own_server.directory)  # it may have been interrupted in the middle of the restart
    try:
        wait_until(lambda: others(own_server.url) == 0, message="nobody left on the server")
    finally:
        own_server.release()


def test_the_demo_leaves_other_peoples_data_alone(run_process: Processes, own_server: embedded.Server) -> None:
    migrate(own_server.url)
    broker = durable.DurableBroker(own_server.url)
    broker.declare_queue("precious")
    assert broker.stream_id("precious")
    broker.close()
    demo: Process = run_process(*DEMO, "--directory", str(own_server.directory))
    assert demo.wait(timeout=60) == 1
    assert "has data that is not the demo's" in demo.output
    with psycopg.connect(own_server.url) as conn:
        assert conn.execute("SELECT name FROM durable.stream").fetchall() == [("precious",)]


def test_the_interceptors_of_the_page_run(run_process: Processes, database_url: str) -> None:
    assert blocks("docs/interceptors.md")[0] == (ROOT / "examples" / "interceptors.py").read_text()
    environment = {"DRAMATIQ_DURABLE_URL": database_url, "PYTHONUNBUFFERED": "1"}
    worker = run_process.dramatiq("examples.interceptors", "--processes", "1", "--threads", "2", env=environment)
    client = run_process(sys.executable, "-m", "examples.interceptors", env=environment)
    assert client.wait(timeout=60) == 0, client.output
    receipt = "receipt of acme over 500"
    assert client.output.splitlines() == [receipt, "PermissionError: start order with options(headers={'tenant': ...})"]
    wait_until(lambda: f"[acme] charged: {receipt}" in worker.output)
    assert "[acme] to charge (500,)" in worker.output


def test_the_codecs_of_the_page_run(run_process: Processes, database_url: str) -> None:
    program = (
        f"secrets = {{'DURABLE_KEY_2026_01': '{'07' * 32}'}}\n"
        f"{blocks('docs/codecs.md')[0]}"
        "@durable.workflow\n"
        "async def order(card: str) -> str:\n"
        "    return card.upper()\n"
        "worker = dramatiq.Worker(broker, worker_timeout=50)\n"
        "worker.start()\n"
        "assert order.start('s3cret').result(timeout=20) == 'S3CRET'\n"
        "worker.stop()\n"
        "broker.close()\n"
    )
    process = run_process.python(program, env={"DRAMATIQ_DURABLE_URL": database_url})
    assert process.wait(timeout=60) == 0, process.output
    with psycopg.connect(database_url) as conn:
        stored = conn.execute("SELECT payload FROM durable.event WHERE payload IS NOT NULL").fetchall()
    assert len(stored) == 2
    assert all(payload.startswith(b"\0codec:zlib,aes-gcm\0") for (payload,) in stored)


def test_the_values_of_the_page_run(run_process: Processes, database_url: str) -> None:
    program = (
        "import dramatiq, dramatiq_durable as durable\n"
        "from dataclasses import dataclass\n"
        "from datetime import date\n"
        "from decimal import Decimal\n"
        "from uuid import UUID, uuid4\n"
        "broker = durable.DurableBroker()\n"
        "dramatiq.set_broker(broker)\n"
        f"{blocks('docs/values.md')[0]}"
        "worker = dramatiq.Worker(broker, worker_timeout=50)\n"
        "worker.start()\n"
        "id, lines = uuid4(), [Line('a', Decimal('1.10')), Line('b', Decimal('2.90'))]\n"
        "assert order.start(id, lines).result(timeout=20) == {id: Decimal('4.00')}\n"
        "worker.stop()\n"
        "broker.close()\n"
    )
    process = run_process.python(program, env={"DRAMATIQ_DURABLE_URL": database_url})
    assert process.wait(timeout=60) == 0, process.output
