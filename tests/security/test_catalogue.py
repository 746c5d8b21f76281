"""Rules that every function and every table of a namespace keeps, read from the catalogue: one that differs fails."""

from __future__ import annotations

import re

import pytest

from dramatiq_durable.migrate import migrate, procedure_texts
from tests.sql.api import Session

#: What a scoped worker may call.  A procedure that is added here has to be attacked in this directory.
# fmt: off
WORKER = {
    "schema_version", "namespace_identity", "open_streams", "enqueue_messages", "enqueue_message",
    "batch_outcome", "claim", "ack",
    "reschedule", "release", "bury",
    "mark_started", "register_worker", "consume_streams", "unregister_worker", "heartbeat", "resync", "reclaim",
    "enqueue", "start_workflow",
    "start_runs", "post", "terminate_run", "get_run", "get_closing",
    "get_history", "await_run", "run_of_lease", "history_of_lease",
    "complete_activities", "fail_task", "advance", "enqueue_keyed", "leave", "store_result", "get_results", "sweep",
    "fail_settling", "limiter_add", "limiter_change", "limiter_change_sum",
    "save_schedule", "control_schedule", "fire_by_hand", "list_schedules", "schedules_of_leases", "fire_schedules",
    "change_escalation", "claim_escalation", "get_escalation", "list_escalations", "count_escalations",
    "resolve_escalation",
    "abort_message", "report_running",
    "start_runs_with", "request_updates", "get_updates",
    "ask_run", "take_answers", "withdraw_query", "query_of_lease", "answer_queries",
    "start_activities", "beat_activities", "doomed_activities", "activity_of_lease", "expire_activities",
    "defer_activity", "park_activities", "finish_activities", "attempt_of_token", "beat_by_token", "pending_of",
    "get_state", "read_output", "list_workflows", "count_workflows",
    "subscribe", "unsubscribe", "list_subscriptions", "finish_events", "look_again",
    "expire_runs", "reset_run", "list_children",
}
# fmt: on

#: What a monitor may call; any worker may as well, and is refused inside.
MONITOR = {"stream_counts", "stream_is_empty", "list_workers", "queue_counts", "read_gauges", "stream_rates"}
WORKER |= MONITOR

FUNCTIONS = """
    SELECT p.proname::text, p.prosecdef, p.proconfig, l.lanname::text, o.rolname::text, o.rolcanlogin, o.rolsuper,
           pg_get_function_identity_arguments(p.oid), p.prosrc, p.prokind::text,
           (SELECT array_agg(t.typname::text || ':' || t.typtype::text)
            FROM unnest(p.proargtypes::oid[] || p.prorettype) a JOIN pg_type t ON t.oid = a),
           (SELECT array_agg(CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END)
            FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a),
           o.rolcreaterole OR o.rolcreatedb OR o.rolreplication OR o.rolbypassrls, p.provolatile::text
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang JOIN pg_roles o ON o.oid = p.proowner
    WHERE p.pronamespace = 'durable'::regnamespace ORDER BY 1
"""


@pytest.fixture
def names(db: Session) -> tuple[str, str, str]:
    owner, worker, admin = db.sql("SELECT owner::text, worker::text, admin::text FROM durable.roles")[0]
    return str(owner), str(worker), str(admin)


def test_every_function(db: Session, names: tuple[str, str, str]) -> None:
    owner, worker, admin = names
    rows = db.sql(FUNCTIONS)
    assert {row[0] for row in rows} >= WORKER
    wrong: list[str] = []
    for (
        name,
        definer,
        config,
        language,
        role,
        can_login,
        is_super,
        _,
        body,
        kind,
        types,
        grantees,
        powers,
        volatile,
    ) in rows:
        rules = {
            "is a function": kind == "f",
            "is SECURITY DEFINER": definer,
            "has our search_path": "search_path=pg_catalog, pg_temp" in config,
            "sets search_path once": sum(c.startswith("search_path=") for c in config) == 1,
            "is PL/pgSQL": language == "plpgsql",
            "belongs to the owner": role == owner,
            "has an owner that cannot log in": not can_login,
            "has an owner without powers": not is_super and not powers,
            "is not for PUBLIC": "PUBLIC" not in grantees,
            "waits for no lock for ever": volatile != "v"
            or {g.strip('"') for g in grantees} == {owner}
            or any(c.startswith("lock_timeout=") for c in config),
            "is for those that are named": {g.strip('"') for g in grantees} <= {owner, worker, admin},
            "is for workers if and only if it is in the list": (f'"{worker}"' in grantees or worker in grantees)
            == (name in WORKER),
            "has no dynamic SQL": not re.search(
                r"\bEXECUTE\b|\bASSERT\b|dblink|\brefcursor\b|\bset_config\b", body, re.I
            ),
            "knows the caller by session_user": "current_user" not in body and "current_setting" not in body,
            "has no argument of a type that is chosen at the call": not any(
                re.match(r"any|reg|refcursor|cstring|internal", t)
                or (t.endswith(":p") and not t.startswith(("void", "record")))
                for t in types
            ),
        }
        wrong += [f"{name} {rule}" for rule, kept in rules.items() if not kept]
    assert wrong == []


def test_every_table_in_a_function_is_qualified(db: Session) -> None:
    """A name without its schema is looked up in pg_catalog and then in the caller's own temporary schema."""
    tables = [
        row[0] for row in db.sql("SELECT relname::text FROM pg_class WHERE relnamespace = 'durable'::regnamespace")
    ]
    functions = [
        row[0] for row in db.sql("SELECT proname::text FROM pg_proc WHERE pronamespace = 'durable'::regnamespace")
    ]
    assert len(tables) > 10
    for text in procedure_texts():
        code = re.sub(r"--[^\n]*|'(?:[^']|'')*'", "", text)
        for table in tables:
            found = re.search(
                rf"\b(?:FROM|JOIN|INTO|UPDATE|USING|TABLE|ROWTYPE)\s+(?:ONLY\s+)?{table}\b(?!\s*\()", code
            )
            assert found is None, found
        for function in functions:
            found = re.search(rf"(?<![.\w]){function}\s*\(", re.sub(r"CREATE FUNCTION \S+", "", code))
            # What reads like a call may be a table's alias with its columns.
            assert found is None or re.search(rf"\)\s*{function}\s*\(|ORDINALITY\s+{function}\s*\(", code), found


def test_nobody_but_the_owner_has_any_right_on_a_table(db: Session, names: tuple[str, str, str]) -> None:
    owner = names[0]
    grants = db.sql(
        "SELECT c.relname::text, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, "
        "a.privilege_type FROM pg_class c, aclexplode(coalesce(c.relacl, "
        "acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::\"char\", c.relowner))) a "
        "WHERE c.relnamespace = 'durable'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')"
    )
    assert [g for g in grants if g[1].strip('"') != owner] == []
    columns = db.sql(
        "SELECT attrelid::regclass::text, attname::text FROM pg_attribute JOIN pg_class c ON c.oid = attrelid "
        "WHERE c.relnamespace = 'durable'::regnamespace AND attacl IS NOT NULL"
    )
    assert columns == []
    owners = db.sql(
        "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'durable'::regnamespace"
    )
    assert [o[0].strip('"') for o in owners] == [owner]


def test_the_schema_is_for_use_only(db: Session, names: tuple[str, str, str]) -> None:
    owner, worker, admin = names
    grants = db.sql(
        "SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type "
        "FROM pg_namespace n, aclexplode(n.nspacl) a WHERE n.nspname = 'durable'"
    )
    others = {(g.strip('"'), p) for g, p in grants if g.strip('"') != owner}
    assert others == {(worker, "USAGE"), (admin, "USAGE")}


def test_the_roles_have_no_powers_and_cannot_log_in(db: Session, names: tuple[str, str, str]) -> None:
    for role in names:
        row = db.sql(
            "SELECT rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles "
            "WHERE rolname = %s",
            role,
        )[0]
        assert row == (False,) * 6, role
    owner, worker, admin = names
    memberships = {
        (m.strip('"'), r.strip('"'))
        for m, r in db.sql(
            "SELECT member::regrole::text, roleid::regrole::text FROM pg_auth_members WHERE roleid = ANY ("
            "SELECT oid FROM pg_roles WHERE rolname IN (%s, %s, %s)) "
            "OR member IN (SELECT oid FROM pg_roles WHERE rolname IN (%s, %s))",
            *names, worker, admin,
        )
    }  # fmt: skip
    assert (worker, owner) not in memberships
    assert (admin, owner) not in memberships
    assert (worker, admin) not in memberships
    assert {r for m, r in memberships if m == worker} == set(), "a worker's role is a member of nothing"


def test_a_function_that_is_added_later_is_not_for_public(db: Session, names: tuple[str, str, str]) -> None:
    db.sql(f'SET ROLE "{names[0]}"')
    db.sql("CREATE FUNCTION durable.later() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    grantees = db.sql(
        "SELECT a.grantee FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a "
        "WHERE p.proname = 'later'"
    )
    assert (0,) not in grantees


def test_no_views_triggers_or_operators_hide_in_the_schema(db: Session) -> None:
    for hidden in (
        "SELECT relname::text FROM pg_class WHERE relkind NOT IN ('r', 'i', 'S') AND relnamespace = {}",
        "SELECT tgname::text FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid WHERE relnamespace = {}",
        "SELECT oprname::text FROM pg_operator WHERE oprnamespace = {}",
    ):
        assert db.sql(hidden.format("'durable'::regnamespace")) == []


def test_migrating_again_changes_no_right(db: Session, database_url: str) -> None:
    before = db.sql(FUNCTIONS)
    db.sql("DELETE FROM durable.procedures")
    assert migrate(database_url) == ["replaced the procedures"]
    assert db.sql(FUNCTIONS) == before


def test_plans_that_are_held_to_indexes_are_not_compiled(db: Session) -> None:
    """What a plan may not do makes it look dear; a server with JIT would take a tenth of a second to compile it."""
    functions = db.sql(
        "SELECT p.proname::text, p.proconfig FROM pg_proc p "
        "WHERE p.pronamespace = 'durable'::regnamespace AND 'enable_seqscan=off' = ANY (p.proconfig)"
    )
    assert len(functions) > 50
    assert [name for name, settings in functions if "jit=off" not in settings] == []
