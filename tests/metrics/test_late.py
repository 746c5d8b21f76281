"""What the exporter's look says of what is late, has stopped or is about to end."""

from __future__ import annotations

import threading
from contextlib import suppress

import psycopg

import dramatiq_durable as durable
from dramatiq_durable import schedules
from dramatiq_durable.metrics.catalogue import GAUGES, PREFIX
from dramatiq_durable.metrics.gauges import bounded
from tests.support import wait_until

from .test_gauges import gauges

Conn = psycopg.Connection[tuple[object, ...]]

DUE = """
INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, kind, actor, payload)
VALUES (gen_random_uuid(), 1, %s, now() - %s * interval '1 minute', now(), %s, 'a', '')
"""


def test_how_late_the_oldest_of_each_kind_is(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{one,two}')")
        for priority, minutes, kind in ((0, 9, "m"), (0, 2, "w"), (-1, 5, "d"), (-1, 3, "e"), (-7, 4, "c")):
            conn.execute(DUE, [priority, minutes, kind])
        found = gauges(conn, 100)
        late = {key[2]: round(value / 60) for key, value in found.items() if key[:2] == ("overdue_seconds", "one")}
        assert late == {"timer": 2, "deadline": 5, "schedule": 4}
        assert {value for key, value in found.items() if key[:2] == ("overdue_seconds", "two")} == {0}
        # What is no message for anybody is not among those that are ready.
        assert found["stream_ready_messages", "one"] == 2
        # What somebody has in his hands is not late.
        conn.execute("UPDATE durable.message SET lease_token = gen_random_uuid(), worker_id = 1 WHERE kind = 'c'")
        assert gauges(conn, 100)["overdue_seconds", "one", "schedule"] == 0


def test_a_schedule_whose_worker_is_gone_is_late(database_url: str) -> None:
    broker = durable.DurableBroker(database_url, middleware=[])
    target = durable.activity_stub("nothing", queue_name="nights")
    for name in ("often", "never", "foreign"):
        schedules.create(name, cron="* * * * * *", target=target, broker=broker)
    schedules.pause("never", broker=broker)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("UPDATE durable.schedule SET paused = true, failure = 'no' WHERE name = 'foreign'")
        wait_until(lambda: gauges(conn, 100)["overdue_seconds", "nights", "schedule"] > 0.5)
        found = gauges(conn, 100)
        assert found["stream_ready_messages", "nights"] == 0
        states = {key[1]: value for key, value in found.items() if key[0] == "schedules"}
        assert states == {"active": 1, "paused": 1, "stopped": 1}
    broker.close()


def test_when_the_first_worker_has_no_login_any_more(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:

        def left() -> float | None:
            found = gauges(conn, 100).get(("login_expires_seconds",))
            return None if found is None else round(found / 3600)

        assert left() is None
        durable.provision_worker_role(database_url, name="for-ever", streams=["one"])
        assert left() is None
        durable.provision_worker_role(database_url, name="a-week", streams=["one"], expires="7 days")
        durable.provision_worker_role(database_url, name="two-days", streams=["one"], expires="2 days")
        assert left() == 48
        # The old login ends with the overlap; the new one goes on.
        durable.rotate_worker_role("two-days", url=database_url, overlap="1h")
        assert left() == 48
        conn.execute("UPDATE durable.login SET expires_at = now() - interval '3 hours' WHERE login LIKE '%two%days%'")
        assert left() == -3
        conn.execute("UPDATE durable.login SET expires_at = now() - interval '30 hours' WHERE login LIKE '%two%days%'")
        assert left() == 168


def test_a_vacuum_holds_nothing_up(database_url: str) -> None:
    slow = psycopg.connect(database_url, autocommit=True)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("CREATE TABLE large AS SELECT repeat('x', 1000) FROM generate_series(1, 8000)")
        owner = conn.execute("SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'durable'").fetchall()
        conn.execute(f"GRANT pg_read_all_stats TO {owner[0][0]}".encode())
        slow.execute("SET vacuum_cost_delay = 100; SET vacuum_cost_limit = 1")

        def vacuum() -> None:
            with suppress(psycopg.errors.QueryCanceled):
                slow.execute("VACUUM large")

        thread = threading.Thread(target=vacuum)
        thread.start()
        running = "SELECT now() - xact_start > interval '2s' FROM pg_stat_activity WHERE query = 'VACUUM large'"
        try:
            wait_until(lambda: conn.execute(running).fetchone() == (True,))
            assert gauges(conn, 100)["oldest_transaction_seconds",] < 2
            with psycopg.connect(database_url) as held:
                held.execute("SELECT 1")
                wait_until(lambda: gauges(conn, 100)["oldest_transaction_seconds",] > 2)
            assert conn.execute(running).fetchone() == (True,)
        finally:
            slow.cancel_safe()
            thread.join()
            slow.close()


def test_a_newer_namespace_says_more_than_is_understood() -> None:
    found = bounded([("stream_ready_messages", "one", None, 3.0), ("of tomorrow", "one", "x", 1.0)])
    ready = next(metric for metric in GAUGES if metric.name == PREFIX + "stream_ready_messages")
    assert found[ready] == {("one",): 3.0}
    assert not any(series for metric, series in found.items() if metric != ready)
