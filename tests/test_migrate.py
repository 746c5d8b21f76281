"""Migrations: repeatable, concurrent, killed half-way, beside foreign schemas, and with logins of all kinds."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterator

import dramatiq
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from dramatiq_durable import DurableBroker
from dramatiq_durable import migrate as migrations
from dramatiq_durable.database import Database
from dramatiq_durable.errors import DatabaseUnavailable, InvalidName, NotConfigured, NotPermitted, SchemaOutOfDate
from dramatiq_durable.migrate import Names, migrate, role_name
from dramatiq_durable.roles import grant_login, names_of
from tests.support import unique_name, wait_until
from tests.support.postgres import Cluster
from tests.support.processes import Processes
from tests.support.scratch import Scratch, scratch

MIGRATE = """
import sys
from dramatiq_durable.migrate import migrate
print("ready", flush=True)
print("done", migrate(*sys.argv[1:]), flush=True)
"""

LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('dramatiq_durable:durable', 0))"


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster) as made:
        yield made


@pytest.fixture
def migrated(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


def catalogue(conn: psycopg.Connection[tuple[object, ...]], namespace: str = "durable") -> list[tuple[object, ...]]:
    """Everything in a namespace that a migration makes: what it is, and how it is defined."""
    (owner,) = conn.execute(
        "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = %s", [namespace]
    ).fetchone() or ("",)
    rows = conn.execute(
        """
        SELECT 'column', c.relname::text, a.attnum::text,
               concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                         pg_get_expr(d.adbin, d.adrelid))
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = %(n)s::text::regnamespace AND a.attnum > 0
        UNION ALL
        SELECT 'relation', c.relname::text, c.relkind::text,
               concat_ws(' ', c.reloptions, c.relacl, pg_get_indexdef(i.indexrelid))
        FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid WHERE c.relnamespace = %(n)s::text::regnamespace
        UNION ALL
        SELECT 'constraint', x.conrelid::regclass::text, x.conname::text, pg_get_constraintdef(x.oid)
        FROM pg_constraint x WHERE x.connamespace = %(n)s::text::regnamespace
        UNION ALL
        SELECT 'function', p.oid::regprocedure::text, p.proacl::text, pg_get_functiondef(p.oid)
        FROM pg_proc p WHERE p.pronamespace = %(n)s::text::regnamespace
        UNION ALL
        SELECT 'default', d.defaclobjtype::text, '', d.defaclacl::text
        FROM pg_default_acl d JOIN pg_namespace n ON n.nspowner = d.defaclrole WHERE n.nspname = %(n)s::text
        UNION ALL
        SELECT 'schema', n.nspname::text, '', n.nspacl::text FROM pg_namespace n WHERE n.nspname = %(n)s::text
        ORDER BY 1, 2, 3, 4
        """,
        {"n": namespace},
    ).fetchall()
    stem = str(owner).strip('"').removesuffix("owner")
    return [tuple(str(value).replace(stem, "") for value in row) for row in rows]


def catalogue_of(url: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as conn:
        return catalogue(conn)


# --- once, twice, at once ---------------------------------------------------------------------------------


def test_a_second_migration_does_nothing(empty: Scratch) -> None:
    first = migrate(empty.url)
    assert first[0].startswith("created namespace durable")
    assert [line.split()[2] for line in first if line.startswith("applied")] == [
        f"{m.version:04}" for m in migrations.migrations()
    ]
    before = catalogue_of(empty.url)
    assert migrate(empty.url) == []
    assert catalogue_of(empty.url) == before


def test_one_migration_after_the_other_ends_where_the_template_is(
    empty: Scratch, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = migrations.migrations()
    # Procedures need the tables of all migrations; a release that has fewer of these has its own procedures.
    with monkeypatch.context() as earlier:
        earlier.setattr(migrations, "procedure_texts", lambda: ())
        for count in range(1, len(every) + 1):
            earlier.setattr(migrations, "migrations", lambda count=count: every[:count])
            applied = migrate(empty.url)
            assert [line for line in applied if line.startswith("applied")] == [
                f"applied migration {every[count - 1].version:04} {every[count - 1].name}"
            ]
    assert migrate(empty.url) == ["replaced the procedures"]
    made = catalogue_of(empty.url)
    assert len(made) > 100
    assert made == catalogue_of(database_url)


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_eight_processes_at_once_make_one_namespace(empty: Scratch, run_process: Processes, isolation: str) -> None:
    empty.execute(f"ALTER DATABASE {empty.name} SET default_transaction_isolation = '{isolation}'")
    with psycopg.connect(empty.url, autocommit=True) as gate:
        with gate.transaction():
            gate.execute(LOCK.encode())
            processes = [run_process.python(MIGRATE, empty.url) for _ in range(8)]
            wait_until(
                lambda: (
                    gate.execute(
                        "SELECT count(*) = 8 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
                        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                    ).fetchone()
                    == (True,)
                ),
                timeout=60,
                message="eight migrations that wait for their turn",
            )
        answers = []
        for process in processes:
            assert process.wait(timeout=60) == 0, process.output
            answers.append(process.wait_for("done"))
    assert answers.count("done []") == 7
    assert sum("created namespace durable" in answer for answer in answers) == 1
    assert empty.execute("SELECT count(*) FROM durable.roles") == [(1,)]


def waiting(watch: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether somebody else in this database waits for a lock."""
    row = watch.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchone()
    return row is not None and bool(row[0])


def test_a_migration_that_is_killed_while_it_creates_leaves_nothing(empty: Scratch, run_process: Processes) -> None:
    role = role_name(empty.name, "durable", "admin")
    with psycopg.connect(empty.url) as gate, psycopg.connect(empty.url, autocommit=True) as watch:
        gate.execute(f'CREATE ROLE "{role}"'.encode())  # not committed: whoever makes the same role waits
        process = run_process.python(MIGRATE, empty.url)
        wait_until(lambda: waiting(watch), timeout=60, message="the migration that waits for the role")
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        gate.rollback()
        wait_until(lambda: not waiting(watch), message="the end of the killed one's session")
    assert "done" not in process.output
    assert migrate(empty.url)[0].startswith("created namespace")
    assert migrate(empty.url) == []


def test_a_migration_that_is_killed_while_it_replaces_leaves_the_old_procedures(
    migrated: Scratch, run_process: Processes
) -> None:
    before = catalogue_of(migrated.url)
    migrated.execute("UPDATE durable.procedures SET checksum = 'old'")
    with psycopg.connect(migrated.url) as gate, psycopg.connect(migrated.url, autocommit=True) as watch:
        gate.execute("LOCK TABLE durable.procedures IN SHARE MODE")  # may be read: its row is replaced last
        process = run_process.python(MIGRATE, migrated.url)
        wait_until(lambda: waiting(watch), timeout=60, message="the migration that waits for the table")
        assert catalogue_of(migrated.url) == before
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        gate.rollback()
        wait_until(lambda: not waiting(watch), message="the end of the killed one's session")
    assert "done" not in process.output
    assert migrated.execute("SELECT checksum FROM durable.procedures") == [("old",)]
    assert migrate(migrated.url) == ["replaced the procedures"]
    assert catalogue_of(migrated.url) == before


def test_other_procedures_are_replaced_all_together(migrated: Scratch) -> None:
    before = catalogue_of(migrated.url)
    migrated.execute("UPDATE durable.procedures SET checksum = 'old'")
    (signature,) = migrated.execute("SELECT oid::regprocedure::text FROM pg_proc WHERE proname = 'claim'")[0]
    migrated.execute(f"DROP FUNCTION {signature}")
    migrated.execute("CREATE FUNCTION durable.of_an_older_version() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    migrated.execute("CREATE PROCEDURE durable.another() LANGUAGE sql AS 'SELECT 1'")
    assert migrate(migrated.url) == ["replaced the procedures"]
    assert catalogue_of(migrated.url) == before
    assert migrate(migrated.url) == []


def test_what_depends_on_a_procedure_is_named(migrated: Scratch) -> None:
    migrated.execute("CREATE VIEW public.mine AS SELECT * FROM durable.schema_version()")
    migrated.execute("UPDATE durable.procedures SET checksum = 'old'")
    with pytest.raises(NotConfigured, match=r"view public\.mine depends on"):
        migrate(migrated.url)


# --- versions -----------------------------------------------------------------------------------------


def test_a_database_without_the_namespace_says_so_on_use(empty: Scratch) -> None:
    with pytest.raises(SchemaOutOfDate, match=r"has no namespace 'durable'.*dramatiq-durable migrate"):
        Database(lambda: empty.url).connect()


def test_an_older_namespace_says_so_on_use(migrated: Scratch) -> None:
    older, newest = (m.version for m in migrations.migrations()[-2:])
    migrated.execute("DELETE FROM durable.migration WHERE version = %s", newest)
    broker = DurableBroker(migrated.url)
    with pytest.raises(SchemaOutOfDate, match=rf"at version {older}, this package needs {newest}.*migrate"):
        broker.stream_id("default")
    broker.close()


def test_an_upgrade_counts_the_attempts_of_poison_as_they_were(empty: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    known = migrations.migrations()
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "migrations", lambda: tuple(m for m in known if m.version < 6))
        # Today's procedures speak of tables that were not there then.
        patch.setattr(migrations, "_replace_procedures", lambda *_: None)
        patch.setattr(migrations, "_make_administrator", lambda *_: False)
        migrate(empty.url)
    for reason in ("poison", "rejected"):
        empty.execute(
            "INSERT INTO durable.dead_letter "
            "(message_id, stream_id, priority, enqueued_at, attempt, deaths, actor, reason, payload) "
            "VALUES (gen_random_uuid(), 1, 0, now(), 4, 3, 'a', %s, '')",
            reason,
        )
    assert "applied migration 0006 housekeeping" in migrate(empty.url)
    assert empty.execute("SELECT reason, attempt FROM durable.dead_letter ORDER BY 1") == [
        ("poison", 3),
        ("rejected", 4),
    ]


def test_a_newer_namespace_is_used_with_a_warning_and_never_migrated(
    migrated: Scratch, caplog: pytest.LogCaptureFixture
) -> None:
    migrated.execute("INSERT INTO durable.migration (version, name) VALUES (9999, 'later')")
    migrated.execute("UPDATE durable.procedures SET checksum = 'later'")
    with pytest.raises(SchemaOutOfDate, match=r"at version 9999, newer than this package's .*: upgrade"):
        migrate(migrated.url)
    assert migrated.execute("SELECT checksum FROM durable.procedures") == [("later",)]
    Database(lambda: migrated.url).connect().close()
    assert "newer than this package's" in caplog.text


def test_the_sql_is_understood_by_postgres_14() -> None:
    texts = [m.text for m in migrations.migrations()]
    texts += [*migrations.procedure_texts(), migrations.role_text()]
    later = (
        r"\bMERGE\b",  # 15
        r"NULLS\s+NOT\s+DISTINCT",  # 15
        r"security_invoker",  # 15
        r"WITH\s+(INHERIT|SET)\s",  # 16
        r"\bany_value\b|\buuidv7\b|JSON_TABLE|\bOLD\.\*|RETURNING\s+WITH",  # 16 to 18
    )
    for text in texts:
        code = re.sub(r"--.*|'[^']*'", "", text)
        for pattern in later:
            assert not re.search(pattern, code, re.IGNORECASE), pattern


# --- namespaces ---------------------------------------------------------------------------------------


def test_two_namespaces_of_one_database_do_not_see_each_other(empty: Scratch) -> None:
    for namespace in ("one", "two"):
        migrate(empty.url, namespace)
    assert len(empty.namespace_roles()) == 6
    done: list[tuple[str, str]] = []
    brokers, workers = {}, {}
    for namespace in ("one", "two"):
        broker = brokers[namespace] = DurableBroker(empty.url, namespace=namespace, middleware=[])
        dramatiq.actor(
            lambda text, namespace=namespace: done.append((namespace, text)), actor_name="note", broker=broker
        )
        workers[namespace] = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    brokers["one"].actors["note"].send("first")
    brokers["two"].actors["note"].send("second")
    try:
        workers["two"].start()
        brokers["two"].join("default", timeout=15_000)
        assert done == [("two", "second")]
        assert brokers["two"].procedures.schema == '"two"'
        assert empty.execute("SELECT count(*) FROM one.message") == [(1,)]
        assert empty.execute("SELECT count(*) FROM two.message") == [(0,)]
        assert empty.execute("SELECT count(*) FROM one.worker") == [(0,)]
        workers["one"].start()
        brokers["one"].join("default", timeout=15_000)
        assert done == [("two", "second"), ("one", "first")]
    finally:
        for namespace, worker in workers.items():
            worker.stop()
            brokers[namespace].close()


def test_a_login_of_one_namespace_has_no_way_into_the_other(empty: Scratch) -> None:
    for namespace in ("one", "two"):
        migrate(empty.url, namespace)
    login, url = empty.login()
    administrator = Database(lambda: empty.url, "one")
    grant_login(administrator, login, consume=["default"])
    administrator.close()
    Database(lambda: url, "one").connect().close()
    with pytest.raises(SchemaOutOfDate, match="no namespace 'two' that the login"):
        Database(lambda: url, "two").connect()


def test_names_of_roles_never_collide() -> None:
    assert role_name("a_b", "c", "owner") != role_name("a", "b_c", "owner")
    assert role_name("a.b", "c", "owner") != role_name("a", "b.c_owner", "")
    long = [role_name("d" * 60 + end, "n" * 40, kind) for end in "xy" for kind in ("owner", "worker", "admin")]
    assert len({name[:63] for name in long}) == 6
    for length in range(1, 64):
        names = [role_name("ü" * length, "durable", kind) for kind in ("owner", "worker", "admin")]
        assert max(len(name.encode()) for name in names) <= 63
        assert len({name.rpartition("_")[0] for name in names}) == 1


@pytest.mark.parametrize("name", ["we\"ird{owner} o'x {schema}.$$", "ü" * 30])
def test_a_database_may_have_any_name(cluster: Cluster, name: str) -> None:
    name = f"{name}{unique_name('')[:5]}"
    admin = make_conninfo(cluster.url, dbname="postgres")
    with psycopg.connect(admin, autocommit=True) as conn:
        conn.execute(psycopg.sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(psycopg.sql.Identifier(name)))
        made: list[str] = []
        try:
            url = make_conninfo(cluster.url, dbname=name)
            migrate(url)
            assert migrate(url) == []
            with psycopg.connect(url) as inside:
                found = names_of(inside, "durable")
                made = [found.owner, found.worker, found.admin]
                assert inside.execute("SELECT owner, worker, admin FROM durable.roles").fetchall() == [tuple(made)]
        finally:
            conn.execute(psycopg.sql.SQL("DROP DATABASE {} WITH (FORCE)").format(psycopg.sql.Identifier(name)))
            if made:
                roles = psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, made))
                conn.execute(psycopg.sql.SQL("DROP ROLE {}").format(roles))


@pytest.mark.parametrize("namespace", ["", "Upper", "1st", "pg_mine", "a" * 41, 'a"; DROP', "a-b", "ab\n"])
def test_what_cannot_be_a_namespace_is_refused(empty: Scratch, namespace: str) -> None:
    with pytest.raises(InvalidName, match="cannot be a namespace"):
        migrate(empty.url, namespace)


# --- logins ---------------------------------------------------------------------------------------------


def test_a_login_without_rights_is_named(empty: Scratch) -> None:
    login, url = empty.login()
    with pytest.raises(NotConfigured, match=rf"{login}.*permission denied for database"):
        migrate(url)
    assert empty.namespace_roles() == []


def test_a_login_that_is_a_stranger_to_the_namespace_is_named(migrated: Scratch) -> None:
    login, url = migrated.login("CREATEROLE")
    migrated.execute("UPDATE durable.procedures SET checksum = 'old'")
    with pytest.raises(NotConfigured, match=rf"{login}.*permission denied"):
        migrate(url)


@pytest.mark.parametrize("options", ["CREATEROLE", "CREATEROLE NOINHERIT"])
def test_a_login_that_may_create_roles_needs_no_superuser(empty: Scratch, options: str) -> None:
    login, url = empty.login(options)
    empty.execute(f"GRANT CREATE ON DATABASE {empty.name} TO {login}")
    migrate(url)
    assert migrate(url) == []
    assert len(empty.namespace_roles()) == 3
    assert empty.execute("SELECT name::text FROM durable.principal WHERE is_admin") == [(login,)]


def test_what_such_a_login_grants_is_enough_to_work(empty: Scratch) -> None:
    login, url = empty.login("CREATEROLE")
    empty.execute(f"GRANT CREATE ON DATABASE {empty.name} TO {login}")
    migrate(url)
    worker, worker_url = empty.login()
    administrator = Database(lambda: url)
    grant_login(administrator, worker, consume=["default"], produce=["default"])
    second, second_url = empty.login()
    grant_login(administrator, second, admin=True)
    administrator.close()
    send_and_run(worker_url)
    third, _ = empty.login()
    database = Database(lambda: second_url)
    refused = rf"{second!r} may not give out.*GRANT .* TO \"{third}\"; nothing was granted"
    with pytest.raises(NotPermitted, match=refused):
        grant_login(database, third, consume=["default"])
    database.close()
    assert empty.execute("SELECT count(*) FROM durable.login WHERE login = %s", third) == [(0,)]


def test_a_login_that_may_only_create_schemas_owns_everything(empty: Scratch, caplog: pytest.LogCaptureFixture) -> None:
    login, url = empty.login()
    empty.execute(f"GRANT CREATE ON DATABASE {empty.name} TO {login}")
    migrate(url)
    assert "scoped workers are not possible" in caplog.text
    assert migrate(url) == []
    assert empty.namespace_roles() == []
    # Its own functions are nobody's business but its own.
    assert empty.execute("SELECT count(*) FROM pg_default_acl") == [(0,)]
    send_and_run(url)
    other, _ = empty.login()
    database = Database(lambda: url)
    with pytest.raises(NotConfigured, match=f"belongs to the login '{login}' and has no roles of its own"):
        grant_login(database, other, consume=["default"])
    database.close()
    assert empty.execute("SELECT count(*) FROM durable.login") == [(1,)]


def test_the_statements_for_the_dba_are_what_it_takes(empty: Scratch, caplog: pytest.LogCaptureFixture) -> None:
    login, url = empty.login()
    empty.execute(f"GRANT CREATE ON DATABASE {empty.name} TO {login}")
    with caplog.at_level(logging.WARNING):
        migrate(url)
    (statements,) = re.findall(r"let a DBA run: (.*); and migrate again", caplog.text)
    empty.execute("DROP SCHEMA durable CASCADE")
    empty.execute(statements)
    migrate(url)
    assert migrate(url) == []
    assert Names("durable", *(role_name(empty.name, "durable", k) for k in ("owner", "worker", "admin"))) == Names(
        "durable", *(str(value) for value in empty.execute("SELECT owner, worker, admin FROM durable.roles")[0])
    )
    worker, worker_url = empty.login()
    administrator = Database(lambda: url)
    grant_login(administrator, worker, consume=["default"], produce=["default"])
    administrator.close()
    send_and_run(worker_url)


def test_a_role_that_can_log_in_is_not_taken_for_the_owner(empty: Scratch) -> None:
    role = role_name(empty.name, "durable", "owner")
    empty.execute(f'CREATE ROLE "{role}" LOGIN')
    with pytest.raises(NotConfigured, match=r"can log in or is a superuser.*ALTER ROLE .* NOLOGIN"):
        migrate(empty.url)
    empty.execute(f'ALTER ROLE "{role}" NOLOGIN')
    migrate(empty.url)


def send_and_run(url: str) -> None:
    """Send a message with a login, and have the same login's worker run it."""
    broker = DurableBroker(url, middleware=[])
    done: list[int] = []
    actor = dramatiq.actor(done.append, actor_name="note", broker=broker)
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    actor.send(1)
    worker.start()
    try:
        wait_until(lambda: done == [1], message="the message that was sent")
    finally:
        worker.stop()
        broker.close()


# --- what is in the way -----------------------------------------------------------------------------------


def test_a_foreign_schema_is_left_alone(empty: Scratch) -> None:
    empty.execute("CREATE SCHEMA durable CREATE TABLE roles (id int)")
    with pytest.raises(NotConfigured, match="a schema 'durable' that is none of ours: choose another namespace"):
        migrate(empty.url)
    assert empty.namespace_roles() == []
    migrate(empty.url, "durable_2")


def test_a_schema_that_somebody_prepared_for_a_superuser_runs_nothing(empty: Scratch) -> None:
    login, url = empty.login()
    empty.execute(f"GRANT CREATE ON DATABASE {empty.name} TO {login}")
    (superuser,) = empty.execute("SELECT current_user::text")[0]
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            f"""
            CREATE SCHEMA durable;
            CREATE TABLE durable.roles AS SELECT '{superuser}'::name AS owner, '{superuser}'::name AS worker,
                '{superuser}'::name AS admin;
            CREATE TABLE durable.procedures (checksum text);
            CREATE TABLE durable.migration (version int, name text);
            CREATE FUNCTION durable.trap() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN ALTER ROLE {login} SUPERUSER; RETURN new; END $$;
            CREATE TRIGGER trap BEFORE INSERT ON durable.migration FOR EACH ROW EXECUTE FUNCTION durable.trap();
            """.encode()
        )
    with pytest.raises(NotConfigured, match=f"belongs to the login '{login}'.*migrate as '{login}'"):
        migrate(empty.url)
    assert empty.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", login) == [(False,)]


def test_a_read_only_database_says_so(empty: Scratch) -> None:
    empty.execute(f"ALTER DATABASE {empty.name} SET default_transaction_read_only = on")
    with pytest.raises(NotConfigured, match="is read-only"):
        migrate(empty.url)


def test_an_unreachable_server_is_one_clear_error_without_the_password() -> None:
    with pytest.raises(DatabaseUnavailable, match=r"cannot connect to me@127\.0\.0\.1:1/x") as raised:
        migrate("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(raised.value)


def test_a_search_path_of_the_login_s_own_leads_nowhere(empty: Scratch) -> None:
    empty.execute(
        "CREATE FUNCTION public.hashtextextended(text, int) RETURNS bigint LANGUAGE sql AS 'SELECT 1/0::bigint'"
    )
    empty.execute("CREATE VIEW public.pg_roles AS SELECT 1/0 AS rolname")
    empty.execute(f"ALTER DATABASE {empty.name} SET search_path = public, pg_catalog")
    migrate(empty.url)
    assert migrate(empty.url) == []
