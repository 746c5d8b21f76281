"""What the exporter's one call reads: exact where there is little, estimated and bounded where there is much."""

from __future__ import annotations

import re

import psycopg

FILL = """
INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)
SELECT gen_random_uuid(), CASE WHEN n % 4 = 0 THEN 2 ELSE 1 END, n % 3,
       now() + CASE WHEN n % 5 = 0 THEN interval '1 hour' ELSE interval '-1 hour' END, now(), 'a',
       convert_to(repeat('x', 200), 'UTF8')
FROM generate_series(1, %s) n;
INSERT INTO durable.run (run_id, workflow_id, stream_id, name, status, started_at, last_event)
SELECT gen_random_uuid(), 'w' || n, 1, 'x', CASE WHEN n % 4 = 0 THEN 'running' ELSE 'completed' END, now(), 1
FROM generate_series(1, %s) n;
INSERT INTO durable.dead_letter (message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, payload)
SELECT gen_random_uuid(), 1, 0, now(), 1, 0, 'a', CASE WHEN n % 4 = 0 THEN 'poison' ELSE 'rejected' END, ''
FROM generate_series(1, %s) n;
"""


ALARMS = """
INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, kind, actor, payload)
SELECT gen_random_uuid(), 1, -1, now() + CASE WHEN n % 2 = 0 THEN interval '1 hour' ELSE interval '-1 hour' END, now(),
       'e', 'a', ''
FROM generate_series(1, %s) n;
"""


def gauges(conn: psycopg.Connection[tuple[object, ...]], most: int) -> dict[tuple[object, ...], float]:
    rows = conn.execute("SELECT * FROM durable.read_gauges(%s)", [most]).fetchall()
    return {tuple(v for v in row[:3] if v is not None): float(str(row[3])) for row in rows}


def pages_read(conn: psycopg.Connection[tuple[object, ...]]) -> int:
    conn.execute("SELECT * FROM durable.read_gauges(100)").fetchall()
    plan = conn.execute("EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM durable.read_gauges(100)").fetchall()
    numbers = re.findall(r"(?:hit|read)=(\d+)", next(str(row[0]) for row in plan if "Buffers" in str(row[0])))
    return sum(map(int, numbers))


def test_counts_and_estimates(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{one,two}')")
        conn.execute(FILL.replace("%s", "8000").encode())
        exact = {
            ("stream_ready_messages", "one"): 4800,
            ("stream_ready_messages", "two"): 1600,
            ("stream_delayed_messages", "one"): 1200,
            ("stream_delayed_messages", "two"): 400,
            ("stream_dead_letters", "one", "poison"): 2000,
            ("stream_dead_letters", "one", "rejected"): 6000,
            ("workflow_runs", "running"): 2000,
            ("workflow_runs", "completed"): 6000,
            ("workflow_runs", "failed"): 0,
        }
        counted = gauges(conn, 10_000)
        assert {key: counted[key] for key in exact} == exact
        # All of these tables are smaller than a sample: the estimates are right as well.
        estimated = gauges(conn, 100)
        for key, value in exact.items():
            assert abs(estimated[key] - value) <= 0.1 * value, key
        for found in (counted, estimated):
            assert 3600 <= found["stream_oldest_ready_seconds", "two"] < 3700

        # With five times as much, it does not read more.
        conn.execute(FILL.replace("%s", "8000").replace("'w'", "'v'").encode())
        before = pages_read(conn)
        conn.execute(FILL.replace("%s", "64000").replace("'w'", "'u'").encode())
        assert pages_read(conn) < 1.5 * before + 500
        estimated = gauges(conn, 100)
        assert abs(estimated["stream_ready_messages", "one"] - 48_000) < 9_600
        assert abs(estimated["workflow_runs", "running"] - 20_000) < 4_000


def test_what_is_not_shown_is_not_read_either(database_url: str) -> None:
    """Every run with a timeout has an alarm, and many messages may be leased: in the index they stand before others."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("SELECT durable.open_streams('{one}')")
        conn.execute(
            "INSERT INTO durable.message (message_id, stream_id, priority, due_at, enqueued_at, actor, payload)"
            " SELECT gen_random_uuid(), 1, 0, now() + n * interval '1 minute', now(), 'a', ''"
            " FROM generate_series(-3, 4) n"
        )
        conn.execute(ALARMS.replace("%s", "4000").encode())
        before = pages_read(conn)
        conn.execute(ALARMS.replace("%s", "40000").encode())
        assert pages_read(conn) < 1.5 * before + 500
        for most in (100, 10_000):
            found = gauges(conn, most)
            assert (found["stream_ready_messages", "one"], found["stream_delayed_messages", "one"]) == (4, 4)
            assert 180 <= found["stream_oldest_ready_seconds", "one"] < 240

        # What is leased is passed over, as far as workers say that they hold it.
        conn.execute("DELETE FROM durable.message WHERE kind = 'e'")
        conn.execute(
            "INSERT INTO durable.message"
            " (message_id, stream_id, priority, due_at, enqueued_at, actor, payload, lease_token, worker_id)"
            " SELECT gen_random_uuid(), 1, 0, now() - interval '1 hour', now(), 'a', '', gen_random_uuid(), 1"
            " FROM generate_series(1, 500)"
        )
        conn.execute(
            "INSERT INTO durable.worker (worker_id, login, principal_id, host, pid, threads, stream_ids, reclaim_delay,"
            " reclaim_count, held) OVERRIDING SYSTEM VALUE"
            " SELECT 1, session_user, 0, 'h', 1, 8, '{1}', interval '1 hour', 3, array_agg(m.message_id)"
            " FROM durable.message m WHERE m.lease_token IS NOT NULL"
        )
        found = gauges(conn, 100)
        assert found["stream_leased_messages", "one"] == 500
        assert (found["stream_ready_messages", "one"], found["stream_delayed_messages", "one"]) == (4, 4)
        assert 180 <= found["stream_oldest_ready_seconds", "one"] < 240
