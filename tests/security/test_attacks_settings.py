"""Whatever a scoped role sets, makes or names: no door opens, and what the server prints tells it nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Texts, Uuid, Uuids
from tests.sql.api import Session, derived, new_id

from .conftest import Limited, Scoped
from .scene import Scene, everything, refusal, set_up
from .test_attacks_named import doors


@pytest.fixture
def scene(db: Session, limited: Limited) -> Scene:
    def make(**grants: tuple[str, ...]) -> Scoped:
        return limited(grants["consume"], grants["produce"])

    return set_up(db, make)


#: What is set before a door is tried; a few hundred more follow from the server's own list.
SETTINGS = (
    ("search_path", "pg_temp, public"),
    ("search_path", "pg_temp, durable, pg_catalog"),
    ("standard_conforming_strings", "off"),
    ("transform_null_equals", "on"),
    ("array_nulls", "off"),
    ("backslash_quote", "on"),
    ("row_security", "off"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-15"),
    ("datestyle", "SQL, DMY"),
    ("intervalstyle", "sql_standard"),
    ("timezone", "Pacific/Kiritimati"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_deferrable", "on"),
    ("lock_timeout", "1ms"),
    ("lock_timeout", "1h"),
    ("enable_indexscan", "off"),
    ("enable_indexonlyscan", "off"),
    ("enable_tidscan", "off"),
    ("enable_nestloop", "off"),
    ("enable_sort", "off"),
    ("plan_cache_mode", "force_custom_plan"),
    ("plpgsql.extra_errors", "all"),
    ("plpgsql.check_asserts", "off"),
    ("plpgsql.variable_conflict", "use_variable"),
    ("plpgsql.print_strict_params", "on"),
    ("jit_above_cost", "0"),
    ("from_collapse_limit", "1"),
    ("geqo_threshold", "2"),
    ("work_mem", "64kB"),
    ("client_encoding", "LATIN1"),
    ("session_replication_role", "replica"),
    ("role", "postgres"),
    ("session_authorization", "postgres"),
    ("is_superuser", "on"),
    ("local_preload_libraries", "durable"),
)


def opened(scene: Scene, shut: list[Any]) -> list[Any]:
    """Which doors are told otherwise than with a refusal of the same kind, or with a plain failure."""
    return [(was, now) for was, now in zip(shut, doors(scene), strict=True) if now != was and now[0] == "answer"]  # type: ignore[index]


def test_no_setting_opens_a_door(scene: Scene) -> None:
    attacker = scene.attacker
    before, shut = everything(scene.db), doors(scene)
    more: list[tuple[str, str]] = []
    for name, kind, low, high, values in attacker.sql(
        "SELECT name, vartype, min_val, max_val, enumvals FROM pg_settings WHERE context = 'user' ORDER BY 1"
    ):
        if kind == "bool":
            more += [(name, "on"), (name, "off")]
        elif kind == "enum":
            more += [(name, value) for value in values]
        elif kind in ("integer", "real") and not name.endswith("timeout"):
            more += [(name, low), (name, high)]
    assert len(more) > 200
    for name, value in (*SETTINGS, *more):
        if (name, value) in (("client_min_messages", "debug5"),) or name.startswith(
            ("debug_print", "trace_", "exit_on_error")
        ):
            continue
        attacker.sql("RESET ALL")
        attacker.conn.execute("SET statement_timeout = '30s'")
        if refusal(lambda n=name, v=value: attacker.sql("SELECT set_config(%s, %s, false)", n, str(v)))[0] == "answer":  # type: ignore[misc]
            assert opened(scene, shut) == [], (name, value)
    attacker.sql("RESET ALL")
    assert doors(scene) == shut
    assert everything(scene.db) == before


def test_a_role_setting_of_its_own_opens_none(scene: Scene) -> None:
    attacker = scene.attacker
    before, shut = everything(scene.db), doors(scene)
    for name, value in SETTINGS[:20]:
        attacker.conn.execute(f"ALTER ROLE \"{attacker.login}\" SET {name} = '{value}'".encode())
        with psycopg.connect(attacker.url, autocommit=True) as conn:
            told = refusal(lambda c=conn: c.execute("SELECT * FROM durable.open_streams('{theirs}')").fetchall())  # type: ignore[misc]
            assert told[0] == "error"
        attacker.conn.execute(f'ALTER ROLE "{attacker.login}" RESET ALL'.encode())
    assert doors(scene) == shut
    assert everything(scene.db) == before


#: What hides a table, a type, a function or an operator from a procedure that does not say where it looks for it.
SHADOWS = (
    "CREATE TEMP TABLE login AS SELECT session_user AS login, 1 AS principal_id, NULL::timestamptz AS expires_at",
    "CREATE TEMP TABLE principal AS SELECT 1 AS principal_id, true AS is_admin, 'worker' AS kind, 1 AS max_live",
    "CREATE TEMP TABLE stream_grant AS SELECT 1 AS principal_id, g AS stream_id, true AS consume, true AS produce "
    "FROM generate_series(1, 9) g",
    "CREATE TEMP TABLE stream AS SELECT 3 AS stream_id, 'theirs' AS name, false AS paused",
    "CREATE TEMP TABLE pg_roles AS SELECT session_user AS rolname, 10::oid AS oid",
    "CREATE TEMP TABLE unnest AS SELECT 1",
    "CREATE FUNCTION pg_temp.caller(OUT principal_id int, OUT is_admin boolean, OUT kind text) LANGUAGE sql AS "
    "$$ SELECT 1, true, 'application' $$",
    "CREATE FUNCTION pg_temp.permitted(int, boolean, int[], text) RETURNS int[] LANGUAGE sql AS $$ SELECT $3 $$",
    "CREATE FUNCTION pg_temp.starts_with(text, text) RETURNS boolean LANGUAGE sql AS $$ SELECT false $$",
    "CREATE FUNCTION pg_temp.cardinality(anyarray) RETURNS int LANGUAGE sql AS $$ SELECT 9 $$",
    "CREATE FUNCTION pg_temp.session_user() RETURNS name LANGUAGE sql AS $$ SELECT 'postgres'::name $$",
    "CREATE FUNCTION pg_temp.always(int, int) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$",
    "CREATE OPERATOR pg_temp.= (LEFTARG = int, RIGHTARG = int, FUNCTION = pg_temp.always)",
    "CREATE FUNCTION pg_temp.overlap(int[], int[]) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$",
    "CREATE OPERATOR pg_temp.&& (LEFTARG = int[], RIGHTARG = int[], FUNCTION = pg_temp.overlap)",
    "CREATE TYPE pg_temp.record AS (principal_id int, is_admin boolean)",
    "CREATE TYPE pg_temp.run AS (run_id uuid)",
    "CREATE DOMAIN pg_temp.text AS pg_catalog.text",
    "CREATE DOMAIN pg_temp.int4 AS pg_catalog.int4 DEFAULT 1",
    'CREATE COLLATION pg_temp."C" FROM pg_catalog."POSIX"',
    "CREATE TYPE pg_temp.sly AS (a pg_catalog.int4)",
    "CREATE FUNCTION pg_temp.slyly(pg_temp.sly) RETURNS pg_catalog.int4 LANGUAGE sql AS $$ SELECT 3 $$",
    "CREATE CAST (pg_temp.sly AS pg_catalog.int4) WITH FUNCTION pg_temp.slyly(pg_temp.sly) AS IMPLICIT",
)


@pytest.mark.parametrize("path", ["pg_temp", "pg_temp, pg_catalog", "pg_temp, durable, pg_catalog, public"])
def test_nothing_of_its_own_is_taken_for_ours(scene: Scene, path: str) -> None:
    attacker = scene.attacker
    before, shut = everything(scene.db), doors(scene)
    made = 0
    for shadow in SHADOWS:
        told = refusal(lambda s=shadow: attacker.conn.execute(s.encode()))  # type: ignore[misc]
        assert told[:2] == ("error", "42501") or told[0] == "answer", shadow
        made += told[0] == "answer"
    assert made > 15
    attacker.conn.execute(f"SET search_path = {path}".encode())
    # On connections of its own, the procedures have not been compiled yet; here they have.
    assert doors(scene) == shut
    attacker.conn.execute(b"DISCARD PLANS")
    assert doors(scene) == shut
    assert everything(scene.db) == before


FORBIDDEN = (
    "CREATE SCHEMA mine",
    "CREATE TABLE durable.mine (a int)",
    "CREATE TABLE public.mine (a int)",
    "CREATE FUNCTION durable.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE c AS '$libdir/plpgsql', 'f'",
    "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE internal AS 'now'",
    "CREATE EXTENSION hstore",
    "CREATE EXTENSION dblink",
    "CREATE LANGUAGE mine HANDLER plpgsql_call_handler",
    "CREATE EVENT TRIGGER mine ON ddl_command_start EXECUTE FUNCTION pg_temp.f()",
    "CREATE PUBLICATION mine FOR ALL TABLES",
    "CREATE SUBSCRIPTION mine CONNECTION '' PUBLICATION mine",
    "CREATE SERVER mine FOREIGN DATA WRAPPER postgres_fdw",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "CREATE TRIGGER mine BEFORE INSERT ON durable.message FOR EACH ROW EXECUTE FUNCTION now()",
    "ALTER FUNCTION durable.caller() RESET ALL",
    "ALTER TABLE durable.message DISABLE TRIGGER ALL",
    "DROP SCHEMA durable CASCADE",
    "REASSIGN OWNED BY CURRENT_USER TO postgres",
    "LOCK TABLE durable.message IN ACCESS SHARE MODE",
    "LOCK TABLE durable.stream IN EXCLUSIVE MODE",
    "SELECT * FROM durable.message",
    "SELECT count(*) FROM durable.stream",
    "COPY durable.message TO STDOUT",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO '/tmp/mine'",
    "VACUUM durable.message",
    "ANALYZE durable.message",
    "REINDEX TABLE durable.message",
    "TRUNCATE durable.message",
    "SELECT nextval('durable.worker_worker_id_seq')",
    "SELECT setval('durable.stream_stream_id_seq', 1)",
    "SELECT last_value FROM durable.worker_worker_id_seq",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_ls_dir('.')",
    "SELECT pg_ls_waldir()",
    "SELECT pg_ls_logdir()",
    "SELECT pg_stat_reset()",
    "SELECT pg_switch_wal()",
    "SELECT pg_logical_emit_message(false, 'a', 'b') FROM pg_create_logical_replication_slot('mine', 'pgoutput')",
    "SELECT rolpassword FROM pg_authid",
    "SELECT * FROM pg_statistic LIMIT 1",
    "SELECT pg_reload_conf()",
    "LOAD 'auto_explain'",
    "CHECKPOINT",
    "ALTER SYSTEM SET work_mem = '1GB'",
    "ALTER DATABASE {database} SET search_path = pg_temp",
    "ALTER ROLE {self} VALID UNTIL 'infinity'",
    "ALTER ROLE {self} CONNECTION LIMIT -1",
    "ALTER ROLE {self} CREATEROLE",
    "COMMENT ON ROLE {self} IS 'another'",
    "ALTER ROLE {self} RENAME TO another",
    "GRANT {owner} TO {self}",
    "GRANT {admin} TO {self}",
    "REVOKE {self} FROM {owner}",
    "SELECT durable.caller()",
    "SELECT durable.require_admin()",
    "SELECT durable.take_back(1, 1)",
    "SELECT durable.end_sessions('host', 1, '{{}}')",
    "SELECT durable.grant_login(session_user::text, 'mine', true, '{{}}', '{{}}')",
    "SELECT durable.disable_worker('other')",
)


def test_what_the_server_forbids(scene: Scene) -> None:
    attacker, db = scene.attacker, scene.db
    before = everything(db)
    owner, admin = db.sql("SELECT owner::text, admin::text FROM durable.roles")[0]
    quoted = {
        "self": f'"{attacker.login}"',
        "owner": f'"{owner.strip(chr(34))}"',
        "admin": f'"{admin.strip(chr(34))}"',
        "database": f'"{db.value("SELECT current_database()::text")}"',
    }
    allowed = []
    for statement in FORBIDDEN:
        try:
            attacker.conn.execute(statement.format(**quoted).encode())
        except psycopg.Error:
            continue
        allowed.append(statement)
    # The server warns, and does nothing.
    harmless = {"VACUUM durable.message", "ANALYZE durable.message"}
    assert set(allowed) <= harmless
    # Nor is anybody else's session its to end.
    for pid in (
        db.pid,
        *[p for (p,) in db.sql("SELECT pid FROM pg_stat_activity WHERE backend_type <> 'client backend'")],
    ):
        for function in ("pg_terminate_backend", "pg_cancel_backend"):
            # What is no session is none of anybody's: a warning, and false.
            assert refusal(lambda f=function, p=pid: attacker.sql(f"SELECT {f}(%s)", p))[:2] in (  # type: ignore[misc]
                ("error", "42501"),
                ("answer", [(False,)]),
            )
    # Of others' sessions the server shows the name and nothing of what they do.
    shown = attacker.sql(
        "SELECT query, state, application_name, client_addr::text, wait_event, xact_start FROM pg_stat_activity "
        "WHERE usename <> session_user AND pid <> pg_backend_pid()"
    )
    assert shown
    assert {row[0] for row in shown} == {"<insufficient privilege>"}
    assert {column for row in shown for column in (row[1], *row[3:])} == {None}
    assert attacker.sql("SELECT * FROM pg_stats WHERE schemaname = 'durable'") == []
    assert attacker.sql("SELECT * FROM information_schema.columns WHERE table_schema = 'durable'") == []
    assert everything(db) == before


Look = Callable[[Session, bytes], Any]

#: What looks for something by an id, and must know nothing of what is foreign.
LOOKS: dict[str, Look] = {
    "get_run": lambda s, i: s.call("get_run", Uuid(i), None),
    "get_closing": lambda s, i: s.call("get_closing", Uuid(i)),
    "get_history": lambda s, i: s.call("get_history", Uuid(i), 0),
    "get_state": lambda s, i: s.call("get_state", Uuid(i)),
    "pending_of": lambda s, i: s.call("pending_of", Uuid(i)),
    "read_output": lambda s, i: s.call("read_output", Uuid(i), 0, 10, Uuid(new_id()), 1000),
    "list_children": lambda s, i: s.call("list_children", Uuid(i), None),
    "await_run": lambda s, i: s.call("await_run", Uuid(i), Uuid(new_id())),
    "post": lambda s, i: s.post(i),
    "terminate_run": lambda s, i: s.terminate(i),
    "request_updates": lambda s, i: s.update(i, "u"),
    "get_updates": lambda s, i: s.updates(i, "u", wait=1000),
    "ask_run": lambda s, i: s.ask(i),
    "reset_run": lambda s, i: s.call("reset_run", *s.batch(), Uuid(i), None, 1, Uuid(new_id()), Texts(["x"])),
    "get_escalation": lambda s, i: s.call("get_escalation", Uuid(i)),
    "resolve_escalation": lambda s, i: s.call("resolve_escalation", Uuid(i)),
    "change_escalation": lambda s, i: s.escalation("claim", i, by="me"),
    "abort_message": lambda s, i: s.call("abort_message", Uuids([i]), True),
    "take_answers": lambda s, i: s.call("take_answers", Uuids([i])),
}


def printed(session: Session, look: Callable[[], Any]) -> list[str]:
    """What the server prints while it looks: whoever sets debug_print_plan is shown each plan, and its values."""
    shown: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        shown.append(f"{diagnostic.message_primary} {diagnostic.message_detail}")

    session.conn.add_notice_handler(note)
    try:
        refusal(look)
    finally:
        session.conn.remove_notice_handler(note)
    # Costs follow from the tables' sizes, and constants from what was asked for.
    return [
        re.sub(r"(?m):(location|constvalue|\S*cost|plan_rows|stmt_\S+) .*$|^[ \d-]+\]?.*$|\n", "", text)
        for text in shown
    ]


@pytest.mark.parametrize("name", sorted(LOOKS))
def test_what_the_server_prints_does_not_tell_foreign_from_missing(scene: Scene, limited: Limited, name: str) -> None:
    foreign = (
        derived(scene.run, 9) if "escalation" in name else scene.message.message_id if "abort" in name else scene.run
    )
    if "escalation" in name:
        scene.db.sql(
            "INSERT INTO durable.escalation (escalation_id, run_id, seq, stream_id, role, priority, opened_at) "
            "VALUES (%s, %s, 9, %s, 'clerk', 0, now())",
            Uuid(foreign),
            Uuid(scene.run),
            scene.theirs,
        )
    told = []
    for id in (foreign, new_id()):
        fresh = Session(scene.attacker.url)
        fresh.sql("SET client_min_messages = log")
        fresh.sql("SET debug_print_plan = on")
        fresh.sql("SET plan_cache_mode = force_custom_plan")
        told.append(printed(fresh, lambda s=fresh, i=id: LOOKS[name](s, i)))  # type: ignore[misc]
        fresh.close()
    assert len(told[0]) > 1
    assert [(a, b) for a, b in zip(*told, strict=True) if a != b] == []


def fetched(session: Session, look: Callable[[], Any]) -> Any:
    """How many rows of each table a call has fetched, as the server tells everybody of himself."""
    query = (
        "SELECT relname::text, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_all_tables "
        "WHERE schemaname = 'durable' ORDER BY 1"
    )
    session.begin()
    try:
        before = session.sql(query)
        session.sql("SAVEPOINT looked")
        refusal(look)
        session.sql("ROLLBACK TO looked")
        after = session.sql(query)
    finally:
        session.rollback()
    had = {row[0]: row[1:] for row in before}
    return [(t, seq - had.get(t, (0, 0))[0], (idx or 0) - (had.get(t, (0, 0))[1] or 0)) for t, seq, idx in after]


def test_the_servers_statistics_do_not_tell_that_there_is_a_stream(scene: Scene) -> None:
    attacker = scene.attacker
    for call in (
        lambda name: attacker.call("open_streams", Texts([name])),
        lambda name: attacker.value("SELECT durable.enqueue(%s, 'a')", name),
        lambda name: attacker.value("SELECT durable.start_workflow(%s, 'a')", name),
    ):
        told = [fetched(attacker, lambda n=name, c=call: c(n)) for name in ("theirs", "nowhere", "theirs", "nowhere")]  # type: ignore[misc]
        assert told[0] == told[1] == told[2] == told[3]
        assert any(seq or idx for _, seq, idx in told[0]), "the statistics tell something"
