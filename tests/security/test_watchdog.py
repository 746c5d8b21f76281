"""The watchdog ends what is over its limits, whatever a session does to hide it, and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Texts
from dramatiq_durable.database import Database
from dramatiq_durable.embedded import Server
from dramatiq_durable.errors import NotPermitted
from dramatiq_durable.migrate import migrate
from dramatiq_durable.watchdog import Ended, Watchdog
from tests.sql.api import Session
from tests.support import wait_until
from tests.support.processes import Processes

from .conftest import Grant, Limited


@pytest.fixture
def watchdog(database_url: str) -> Iterator[Watchdog]:
    database = Database(lambda: database_url, "durable")
    watchdog = Watchdog(database)
    yield watchdog
    watchdog.close()
    database.close()


@pytest.fixture
def background() -> Iterator[Callable[..., Any]]:
    """Runs statements of a session in a thread; the future has what became of them."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda session, *statements: pool.submit(lambda: [session.conn.execute(s.encode()) for s in statements])


def ended(watchdog: Watchdog, why: str, login: str) -> Ended:
    """The session that is ended, within a few looks."""
    return wait_until(lambda: next((e for e in watchdog.look() if (e.why, e.login) == (why, login)), None))


def is_gone(db: Session, pid: int) -> bool:
    return not db.sql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid)


STATEMENTS = {
    "sleep": "SELECT pg_sleep(60)",
    "burning": "SELECT count(*) FROM generate_series(1, 1000000000000)",
    "a loop": "DO $$ BEGIN LOOP PERFORM pg_sleep(0.01); END LOOP; END $$",
    "a loop that commits": "DO $$ BEGIN LOOP PERFORM pg_sleep(0.01); COMMIT; END LOOP; END $$",
    "a loop that catches": "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(1); "
    "EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$",
    "statements in one message": "; ".join(["SELECT pg_sleep(0.2)"] * 300),
    "data from the client": "COPY t FROM STDIN",
}


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_long_statement(
    db: Session, limited: Limited, watchdog: Watchdog, background: Callable[..., Any], what: str
) -> None:
    session = limited(max_statement="500ms", max_transaction="1h")
    session.sql("CREATE TEMP TABLE t (x int)")
    session.sql("SET application_name = 'dramatiq-durable watchdog'")
    session.sql("SET statement_timeout = 0")
    session.sql("SET idle_in_transaction_session_timeout = 0")
    pid = session.pid
    if what == "data from the client":
        session.conn.pgconn.exec_(STATEMENTS[what].encode())
        wait_until(lambda: ended(watchdog, "statement", session.login))
    else:
        future = background(session, STATEMENTS[what])
        found = ended(watchdog, "statement", session.login)
        assert found.seconds >= 0.5
        assert found.allowed == 0.5
        with pytest.raises(psycopg.OperationalError):
            future.result(timeout=20)
    wait_until(lambda: is_gone(db, pid))
    rows = db.sql("SELECT principal, login::text, details ->> 'why' FROM durable.role_event WHERE action = 'ended'")
    assert rows == [(session.principal, session.login, "statement")]


TRANSACTIONS: dict[str, tuple[str, ...]] = {
    "idle": ("BEGIN", "SELECT 1"),
    "idle and failed": ("BEGIN", "SELECT 1"),
    "failed in a savepoint": ("BEGIN", "SELECT 1", "SAVEPOINT s"),
    "a held row": ("BEGIN", "SELECT 1"),
    "many short statements": ("BEGIN", *["SELECT pg_sleep(0.01)"] * 3000),
    "another role": ("SET ROLE pg_read_all_data", "BEGIN", "SELECT 1"),
    "another session authorization": ("SET SESSION AUTHORIZATION {login}", "BEGIN", "SELECT 1"),
    "read only": ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "SELECT 1"),
    "a cursor": ("BEGIN", "DECLARE c CURSOR FOR SELECT generate_series(1, 1000000)", "FETCH 1 FROM c"),
    "savepoints": ("BEGIN", *["SAVEPOINT s", "SELECT pg_sleep(0.01)", "RELEASE s"] * 1000),
}


@pytest.mark.parametrize("what", TRANSACTIONS)
def test_a_long_transaction(
    db: Session, limited: Limited, watchdog: Watchdog, background: Callable[..., Any], what: str
) -> None:
    session = limited(produce=("s",), max_statement="1h", max_transaction="1500ms")
    db.sql(f'GRANT pg_read_all_data TO "{session.login}"')
    pid = session.pid
    statements = [s.format(login=f'"{session.login}"') for s in TRANSACTIONS[what]]
    future = background(session, *statements)
    if what == "a held row":
        future.result()
        assert session.enqueue(db.stream("s"), b"x") == [1]
    elif "failed" in what:
        future.result()
        with pytest.raises(psycopg.errors.DivisionByZero):
            session.sql("SELECT 1 / 0")
    found = ended(watchdog, "transaction", session.login)
    assert found.seconds >= 1.5
    wait_until(lambda: is_gone(db, pid))
    assert db.value("SELECT count(*) FROM durable.message") == 0, "what it had not committed is gone"


def test_one_statement_may_take_as_long_as_a_statement_may(
    limited: Limited, watchdog: Watchdog, background: Callable[..., Any]
) -> None:
    """Parse, Bind and Execute have times of their own: a statement of its own is no transaction."""
    session = limited(max_statement="1h", max_transaction="200ms")
    future = background(session, "SELECT pg_sleep(1.5)")
    prepared = limited(max_statement="1h", max_transaction="200ms")
    prepared.conn.prepare_threshold = 0
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(prepared.sql, "SELECT pg_sleep(%s)", 1.5)
        while not (future.done() and other.done()):
            assert watchdog.look() == []
        future.result()
        other.result()


def test_limits_are_each_principals_own(limited: Limited, watchdog: Watchdog, background: Callable[..., Any]) -> None:
    narrow = limited(max_statement="300ms")
    wide = limited(max_statement="1h", max_transaction="1h")
    none = limited()
    wide.begin()
    none.begin()
    futures = [background(s, "SELECT pg_sleep(2)") for s in (narrow, wide, none)]
    ended(watchdog, "statement", narrow.login)
    with pytest.raises(psycopg.OperationalError):
        futures[0].result()
    for future in futures[1:]:
        while not future.done():
            assert watchdog.look() == []
        future.result()


def test_an_expired_login(db: Session, limited: Limited, watchdog: Watchdog) -> None:
    session, other = limited(), limited()
    pids = session.pid, other.pid
    assert watchdog.look() == []
    db.sql("UPDATE durable.login SET expires_at = now() - interval '1 second' WHERE login = %s", session.login)
    db.conn.execute(f"ALTER ROLE \"{other.login}\" VALID UNTIL '2020-01-01'".encode())
    assert {e.login for e in watchdog.look() if e.why == "expired"} == {session.login, other.login}
    wait_until(lambda: all(is_gone(db, pid) for pid in pids))
    # It comes again, and is ended again; each is a session of its own.
    again = Session(session.url)
    assert [e.login for e in watchdog.look()] == [session.login]
    again.close()


def test_a_revoked_login(db: Session, limited: Limited, watchdog: Watchdog) -> None:
    session = limited()
    pid = session.pid
    db.conn.execute(f'ALTER ROLE "{session.login}" NOLOGIN'.encode())
    assert [(e.login, e.why) for e in watchdog.look()] == [(session.login, "revoked")]
    wait_until(lambda: is_gone(db, pid))


def test_a_session_that_comes_back(db: Session, limited: Limited, watchdog: Watchdog) -> None:
    first = limited(max_transaction="100ms")
    for n in range(1, 4):
        session = Session(first.url)
        pid = session.pid
        session.begin()
        session.sql("SELECT 1")
        ended(watchdog, "transaction", first.login)
        wait_until(lambda pid=pid: is_gone(db, pid))
        session.close()
        assert db.value("SELECT count(*) FROM durable.role_event WHERE action = 'ended'") == n


def test_whoever_does_not_read_notifications(db: Session, limited: Limited, watchdog: Watchdog) -> None:
    """It would keep the whole server's queue from being emptied: it is idle, and has a transaction all the same."""
    session = limited(max_transaction="300ms")
    pid = session.pid
    session.sql("LISTEN c")
    payload = "x" * 7900
    # More than the sockets hold.
    for _ in range(20):
        db.sql("SELECT pg_notify('c', %s || n) FROM generate_series(1, 100) n", payload)
    for _ in range(20):
        db.sql("SELECT pg_notify('c', %s || n) FROM generate_series(1, 100) n", payload)
    assert ended(watchdog, "transaction", session.login).seconds >= 0.3
    wait_until(lambda: is_gone(db, pid))
    wait_until(lambda: not db.sql("NOTIFY other") and db.value("SELECT pg_notification_queue_usage()") < 0.01)


def test_parallel_workers_end_with_their_leader(
    db: Session, limited: Limited, watchdog: Watchdog, background: Callable[..., Any]
) -> None:
    db.sql("CREATE TABLE public.big AS SELECT n FROM generate_series(1, 200000) n")
    db.sql("GRANT SELECT ON public.big TO PUBLIC")
    session = limited(max_statement="800ms")
    pid = session.pid
    for setting in ("parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0"):
        session.sql(f"SET {setting}")
    background(session, "SELECT count(*) FROM public.big a, public.big b WHERE a.n % 3 = b.n % 7")
    query = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
    assert ended(watchdog, "statement", session.login).pid == pid
    wait_until(lambda: db.value(query, session.login) == 0)
    assert db.value("SELECT count(*) FROM durable.role_event WHERE action = 'ended'") == 1


def test_it_touches_nobody_else(
    db: Session, grant: Grant, limited: Limited, watchdog: Watchdog, background: Callable[..., Any],
    connect: Callable[..., Session],
) -> None:  # fmt: skip
    """Applications and administrators have no limits, also where their principal's row says so."""
    application, admin = grant(consume=("s",)), grant(admin=True)
    provisioned_admin = limited(max_statement="1ms", max_transaction="1ms")
    db.sql("UPDATE durable.principal SET is_admin = true WHERE name = %s", provisioned_admin.principal)
    db.sql("UPDATE durable.principal SET max_statement = '1ms', max_transaction = '1ms' WHERE name <> 'x'")
    db.sql(
        "UPDATE durable.login SET expires_at = now() - interval '1 day' WHERE NOT provisioned AND login <> session_user"
    )
    other = connect()
    for session in (application, admin, provisioned_admin, other):
        session.begin()
        session.sql("SELECT 1")
    future = background(connect(), "SELECT pg_sleep(0.3)")
    while not future.done():
        assert watchdog.look() == []
    for session in (application, admin, provisioned_admin, other):
        assert session.sql("SELECT 1") == [(1,)]


def test_a_login_that_the_owner_may_not_see_is_named(db: Session, limited: Limited, watchdog: Watchdog) -> None:
    session = limited(max_transaction="1ms")
    owner = db.value("SELECT owner::text FROM durable.roles")
    db.conn.execute(f'REVOKE "{session.login}" FROM "{owner}"'.encode())
    (found,) = watchdog.look()
    assert (found.why, found.login) == ("unseen", session.login)
    assert "check" in str(found)
    assert watchdog.look() == [], "once"
    assert db.value("SELECT count(*) FROM durable.role_event WHERE action = 'ended'") == 0


def test_a_login_of_the_same_name_that_somebody_else_made(db: Session, limited: Limited, watchdog: Watchdog) -> None:
    session = limited(max_transaction="1ms")
    db.sql(f"COMMENT ON ROLE \"{session.login}\" IS 'my own'")
    session.begin()
    session.sql("SELECT 1")
    for _ in range(20):
        assert watchdog.look() == []
    assert session.sql("SELECT 1") == [(1,)]


def test_only_an_administrator_may_look(db: Session, grant: Grant, limited: Limited) -> None:
    for session in (grant(consume=("s",)), limited()):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.call("end_sessions", "h", 1, Texts([]))
    database = Database(lambda: grant(admin=True).url, "durable")
    watchdog = Watchdog(database)
    assert watchdog.look() == []
    watchdog.close()
    database.close()
    assert issubclass(NotPermitted, Exception)


def test_it_is_known_who_looked_and_when(db: Session, watchdog: Watchdog) -> None:
    for _ in range(2):
        watchdog.look()
        rows = db.sql("SELECT login::text = session_user, pid > 0, now() - looked_at < '10 s' FROM durable.watchdog")
        assert rows == [(True, True, True)]


# --- the process ------------------------------------------------------------------------------------------------------


def start(run_process: Processes, url: str, *arguments: str) -> Any:
    return run_process(
        sys.executable, "-m", "dramatiq_durable.cli", "watchdog", *arguments, env={"DRAMATIQ_DURABLE_URL": url}
    )


def test_once(db: Session, limited: Limited, run_process: Processes, database_url: str) -> None:
    session = limited(max_transaction="1ms")
    session.begin()
    session.sql("SELECT 1")
    process = start(run_process, database_url, "--once", "--json")
    assert process.wait() == 0
    (line,) = process.output.strip().splitlines()
    assert {k: json.loads(line)[k] for k in ("login", "why", "allowed")} == {
        "login": session.login,
        "why": "transaction",
        "allowed": 0.001,
    }


def test_the_process_ends_sessions_until_it_is_told_to_stop(
    db: Session, limited: Limited, run_process: Processes, database_url: str
) -> None:
    session = limited(max_transaction="200ms")
    process = start(run_process, database_url)
    wait_until(lambda: db.sql("SELECT 1 FROM durable.watchdog"))
    for _ in range(2):
        holding = Session(session.url)
        pid = holding.pid
        holding.begin()
        holding.sql("SELECT 1")
        wait_until(lambda pid=pid: is_gone(db, pid), timeout=5)
        holding.close()
    assert process.stop() == 0
    lines = process.output.strip().splitlines()
    assert len(lines) == 2
    assert all(f"ended a session of {session.login}" in line and "0.2 s are allowed" in line for line in lines)


def test_it_survives_the_databases_restart(own_server: Server, run_process: Processes) -> None:
    migrate(own_server.url)
    process = start(run_process, own_server.url)

    wait_until(lambda: psycopg_value(own_server.url, "SELECT count(*) FROM durable.watchdog"))
    own_server.restart("immediate")
    process.wait_for("connected to the database again")
    query = "SELECT count(*) FROM durable.watchdog WHERE looked_at > pg_postmaster_start_time()"
    assert psycopg_value(own_server.url, query) == 1
    assert process.stop() == 0


def psycopg_value(url: str, query: str) -> Any:
    with psycopg.connect(url, autocommit=True) as conn:
        return (conn.execute(query.encode()).fetchone() or (None,))[0]
