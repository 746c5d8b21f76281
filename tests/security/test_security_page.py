"""What SECURITY.md says of what a provisioned login can see and cannot, tried row by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

import dramatiq_durable as durable
from dramatiq_durable.check import check
from dramatiq_durable.embedded import Server
from dramatiq_durable.migrate import migrate
from tests.sql.api import Session
from tests.support import ROOT, unique_name
from tests.support.postgres import Cluster
from tests.support.scratch import scratch

PAGE = (ROOT / "SECURITY.md").read_text()
SECRET = "a-secret-of-somebody-else"


def table(head: str) -> list[str]:
    """The first cells of the table that begins so."""
    body = PAGE.split(f"\n| {head} |", 1)[1].split("\n\n", 1)[0]
    return [line.split("|")[1].strip() for line in body.splitlines()[2:]]


class Site(NamedTuple):
    """A database: its administrator, somebody else's worker at work, and the login that looks around."""

    db: Session
    other: Session
    login: Session
    role: str
    url: str

    def refuses(self, query: str) -> bool:
        """Whether the login has no privilege for it."""
        try:
            self.login.sql(query)
        except psycopg.errors.InsufficientPrivilege:
            return True
        return False

    def sees(self, query: str, *arguments: Any) -> bool:
        return bool(self.login.value(query, *arguments))


@pytest.fixture(scope="module")
def site(cluster: Cluster) -> Iterator[Site]:
    with scratch(cluster, cluster.template()) as made:
        db = Session(made.url)
        theirs = db.stream(SECRET)
        db.enqueue(theirs, SECRET.encode(), actor=SECRET)
        db.start(theirs, SECRET, name=SECRET)
        name = unique_name("other")
        them = durable.provision_worker_role(made.url, name=name, streams=[SECRET], expires="30 days")
        other = Session(them.url + ("&" if "?" in them.url else "?") + "application_name=theirs")
        worker = other.register(theirs)
        worker.mark_started(*worker.claim())
        other.begin()
        other.sql(f"SELECT '{SECRET}'")
        db.sql("ANALYZE")
        mine = durable.provision_worker_role(made.url, name=unique_name("agent"), streams=["mine"])
        login = Session(mine.url)
        yield Site(db, other, login, mine.role, mine.url)
        for session in (login, other, db):
            session.close()


def notified(site: Site) -> bool:
    """Another's stream, found by counting; who was woken for what is not said."""
    stream = site.db.stream(SECRET)
    watching = Session(site.url)
    for number in range(1, 100):
        watching.sql(f'LISTEN "durable:s{number}"')
    waiting = site.db.register(stream)
    waiting.claim(wait=60_000)
    waiting.claim(wait=60_000)
    site.db.enqueue(stream, SECRET.encode())
    (found,) = watching.conn.notifies(timeout=10, stop_after=1)
    watching.close()
    return (found.channel, found.payload, found.pid) == (f"durable:s{stream}", "", site.db.pid)


#: Other tests have logins of the same kind in other databases of the server.
OTHERS = (
    "FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid "
    "WHERE r.rolname LIKE '%%\\_other%%' AND a.datname = current_database()"
)
MESSAGE = "SELECT oid FROM pg_class WHERE relname = 'message'"

VISIBLE: dict[str, Callable[[Site], bool]] = {
    "names of roles": lambda s: s.sees(
        "SELECT rolvaliduntil > now() FROM pg_roles WHERE rolname LIKE '%%\\_other%%' AND starts_with(rolname, 'dd_')"
    ),
    "what is said of roles": lambda s: (
        s.sees("SELECT bool_or(shobj_description(oid, 'pg_authid') LIKE '%%other%%') FROM pg_roles")
        and s.sees("SELECT count(*) FROM pg_db_role_setting WHERE setrole <> session_user::regrole")
    ),
    "names of databases": lambda s: (
        s.sees("SELECT count(*) > 1 FROM pg_database") and s.sees("SELECT pg_database_size(current_database())")
    ),
    "the namespace's tables": lambda s: s.sees(
        "SELECT count(*) > 5 FROM pg_attribute WHERE attrelid = 'durable.message'::regclass"
    ),
    "the namespace's functions": lambda s: s.sees(
        "SELECT length(pg_get_functiondef(oid)) > 100 FROM pg_proc WHERE proname = 'claim'"
    ),
    "sizes and counters of tables": lambda s: (
        s.sees("SELECT pg_relation_size('durable.message')")
        and s.sees("SELECT reltuples > 0 FROM pg_class WHERE oid = 'durable.message'::regclass")
        and s.sees("SELECT count(n_tup_ins) FROM pg_stat_all_tables WHERE relid = 'durable.message'::regclass")
    ),
    "sessions of others": lambda s: (
        s.login.sql(
            "SELECT a.application_name, a.datname = current_database(), a.query, "
            f"num_nonnulls(a.state, a.client_addr, a.query_start, a.xact_start, a.backend_start, a.wait_event) {OTHERS}"
        )
        == [("theirs", True, "<insufficient privilege>", 0)]
    ),
    "locks of others": lambda s: held_lock_is_seen(s),
    "its own sessions": lambda s: own_query_is_seen(s),
    "notifications": notified,
    "numbers that count up": lambda s: (
        s.sees("SELECT pg_current_snapshot()::text <> ''") and s.sees("SELECT pg_current_wal_lsn()::text <> ''")
    ),
    "settings of the server": lambda s: s.sees("SELECT count(*) > 200 FROM pg_settings"),
}


def held_lock_is_seen(site: Site) -> bool:
    site.db.begin()
    site.db.sql("LOCK TABLE durable.message IN ACCESS SHARE MODE")
    query = "SELECT count(*) FROM pg_locks WHERE pid = %s AND relation = 'durable.message'::regclass"
    seen = site.sees(query, site.db.pid)
    site.db.rollback()
    return seen


def own_query_is_seen(site: Site) -> bool:
    twin = Session(site.url)
    twin.sql("SELECT 'something of its own'")
    seen = site.sees("SELECT query LIKE '%%something of its own%%' FROM pg_stat_activity WHERE pid = %s", twin.pid)
    twin.close()
    return seen


def tables_say_nothing(site: Site) -> bool:
    names = [row[0] for row in site.db.sql("SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind IN ('r', 'S') "
                                           "AND c.relnamespace = 'durable'::regnamespace")]  # fmt: skip
    assert len(names) > 30
    return all(site.refuses(f"SELECT * FROM {name}") for name in names)


def names_are_nowhere(site: Site) -> bool:
    """In no view or table of the catalogue that it may read."""
    readable = site.login.sql(
        "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relnamespace IN ('pg_catalog'::regnamespace, "
        "'information_schema'::regnamespace) AND c.relkind IN ('r', 'v') AND has_table_privilege(c.oid, 'SELECT')"
    )
    for (name,) in readable:
        try:
            # What it says itself is in the list of its sessions.
            query = f"SELECT count(*) FROM {name} t WHERE t::text LIKE '%%' || reverse('{SECRET[::-1]}') || '%%'"
            assert site.login.value(query) == 0, name
        except psycopg.errors.InsufficientPrivilege:
            continue
    return len(readable) > 100


HIDDEN: dict[str, Callable[[Site], bool]] = {
    "payloads, arguments, results, histories, failures": tables_say_nothing,
    "names of streams, actors and workflows": names_are_nowhere,
    "queries of others": lambda s: s.login.sql(f"SELECT DISTINCT a.query {OTHERS}") == [("<insufficient privilege>",)],
    "verifiers of passwords": lambda s: (
        s.refuses("SELECT rolpassword FROM pg_authid")
        and s.login.sql("SELECT DISTINCT rolpassword FROM pg_roles") == [("********",)]
    ),
    "contents of statistics": lambda s: (
        s.refuses("SELECT * FROM pg_statistic")
        and s.login.sql("SELECT * FROM pg_stats WHERE schemaname = 'durable'") == []
    ),
    "files of the server": lambda s: (
        all(
            s.refuses(f"SELECT * FROM {source}")
            for source in ("pg_read_file('PG_VERSION')", "pg_ls_dir('.')", "pg_ls_logdir()", "pg_hba_file_rules")
        )
        and s.refuses("COPY (SELECT 1) TO '/tmp/x'")
    ),
}


@pytest.mark.parametrize("row", table("it can see"))
def test_what_it_can_see(site: Site, row: str) -> None:
    assert VISIBLE[row](site)


@pytest.mark.parametrize("row", table("it cannot see"))
def test_what_it_cannot_see(site: Site, row: str) -> None:
    assert HIDDEN[row](site)


def test_the_tables_have_all_that_is_tried() -> None:
    assert set(table("it can see")) == set(VISIBLE)
    assert set(table("it cannot see")) == set(HIDDEN)


@pytest.fixture
def shop(own_server: Server) -> str:
    """A database of the page's name."""
    with psycopg.connect(own_server.url, autocommit=True) as conn:
        for name in ("shop", "other"):
            conn.execute(f"CREATE DATABASE {name}".encode())
        conn.execute(b"CREATE ROLE its_application LOGIN")
    url = urlunsplit(urlsplit(own_server.url)._replace(path="/shop"))
    migrate(url)
    return url


def test_its_statements_do_what_they_are_for(shop: str) -> None:
    made = durable.provision_worker_role(shop, name="agent", streams=["mine"])
    elsewhere = urlunsplit(urlsplit(made.url)._replace(path="/other"))
    psycopg.connect(elsewhere).close()
    with psycopg.connect(shop, autocommit=True) as conn:
        for block in re.findall(r"^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
            conn.execute(block.encode())
        for finding in check(shop):
            for statement in finding.fix.split("; ") if finding.name in ("shared_locks", "wal") else ():
                conn.execute(statement.encode())
        found = conn.execute(b"SELECT passwd FROM pgbouncer.find(%s)", [made.role]).fetchall()
        assert [row[0].split("$")[0] for row in found] == ["SCRAM-SHA-256"]
        assert conn.execute(b"SELECT * FROM pgbouncer.find(session_user)").fetchall() == []
    assert {finding.name for finding in check(shop)}.isdisjoint(
        {"shared_locks", "temporary", "temp_file_limit", "wal", "create"}
    )
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(elsewhere)
    with psycopg.connect(made.url, autocommit=True) as conn:
        for statement in (
            "CREATE TEMP TABLE t (n int)",
            "SET temp_file_limit = -1",
            "ALTER DATABASE shop RESET temp_file_limit",
            "SELECT pg_advisory_lock(1)",
            "SELECT lo_create(0)",
            "SELECT pg_logical_emit_message(true, '', '')",
            "SELECT * FROM pgbouncer.find(session_user)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())
        assert conn.execute(b"SHOW temp_file_limit").fetchone() == ("10GB",)
    migrate(shop)


def test_its_log_can_be_kept_from_being_filled(shop: str) -> None:
    """What a superuser has set for a role the role cannot undo."""
    made = durable.provision_worker_role(shop, name="agent", streams=["mine"])
    with psycopg.connect(shop, autocommit=True) as conn:
        for setting in ("log_min_messages = fatal", "log_min_error_statement = panic"):
            conn.execute(f'ALTER ROLE "{made.role}" SET {setting}'.encode())
    with psycopg.connect(made.url, autocommit=True) as conn:
        conn.execute(b"ALTER ROLE current_user RESET ALL")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute(b"SET log_min_messages = debug1")
    with psycopg.connect(made.url) as conn:
        assert conn.execute(b"SHOW log_min_messages").fetchone() == ("fatal",)
        assert conn.execute(b"SHOW log_min_error_statement").fetchone() == ("panic",)


def test_a_password_that_it_changes_keeps_nobody_from_ending_it(shop: str) -> None:
    made = durable.provision_worker_role(shop, name="agent", streams=["mine"])
    with psycopg.connect(made.url, autocommit=True) as conn:
        conn.execute(b"ALTER ROLE current_user PASSWORD 'known'")
        for change in ("VALID UNTIL 'infinity'", "CONNECTION LIMIT 100", "CREATEROLE", "BYPASSRLS"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(f"ALTER ROLE current_user {change}".encode())
        durable.revoke_worker_role("agent", url=shop)
        with pytest.raises(psycopg.OperationalError):
            conn.execute(b"SELECT 1")
