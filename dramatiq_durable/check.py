"""What is wrong with a database: findings, each with the statement or command that mends it.

Nothing is changed, and nothing in the namespace is executed before the catalogue has said whose it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import psycopg
from psycopg import sql

from .database import IS_IT_RUNNING, Connection, translate, translate_connect_error
from .errors import DatabaseUnavailable, DurableError
from .migrate import MINIMUM_SERVER, Names, check_namespace, expected_version, procedure_texts
from .roles import names_of, quoted

#: Fewer connections than this are soon used up: a worker process takes several, an activity's transaction one more.
FEW_CONNECTIONS = 50

#: Seconds without a look after which a watchdog is gone; it looks every second.
WATCHDOG_SILENT = 10

#: What mends a namespace that a newer version of this package has migrated.
UPGRADE = "upgrade dramatiq-durable"

_SETTINGS = (
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "autovacuum",
    "track_counts",
    "max_connections",
    "max_prepared_transactions",
    "temp_file_limit",
    "default_transaction_isolation",
    "transaction_read_only",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
      level(str): ``error``: things fail or get lost; ``warning``: they may, under conditions that the text names.
      name(str): what it is about, for programs.
      text(str): what is wrong.
      fix(str): what to do about it.
    """

    level: Literal["error", "warning"]
    name: str
    text: str
    fix: str


def check(url: str, namespace: str = "durable") -> list[Finding]:
    """Look for everything that may be wrong with a namespace and its server, as the URL's login sees it.

    Returns:
      list[Finding]: errors first; empty when all is well.  A database that cannot be reached is a finding too.

    Raises:
      InvalidName: no namespace can have this name.
    """
    check_namespace(namespace)
    try:
        conn = psycopg.connect(url, autocommit=True, prepare_threshold=None, connect_timeout=10)
    except psycopg.Error as e:
        return [_connect_finding(translate_connect_error(e, url))]
    try:
        with conn, conn.transaction():
            conn.execute("SET LOCAL search_path = pg_catalog, pg_temp")
            found = [*server_findings(conn.info.server_version, _settings(conn))]
            if conn.info.server_version >= MINIMUM_SERVER:
                found.extend(_namespace_findings(conn, namespace))
    except psycopg.OperationalError as e:
        return [_connect_finding(translate(e))]
    return sorted(found, key=lambda finding: finding.level)


def _connect_finding(error: Exception) -> Finding:
    if isinstance(error, DatabaseUnavailable):
        text = str(error).removesuffix(f". {IS_IT_RUNNING}")
        return Finding("error", "connection", text, "start the server, or correct DRAMATIQ_DURABLE_URL")
    # The message of such an error ends with what to do about it.
    what, _, fix = str(error).partition(": ") if isinstance(error, DurableError) else (str(error), "", "")
    return Finding("error", "connection", what, fix or "look into the server's log")


def _settings(conn: Connection) -> dict[str, str]:
    rows = conn.execute("SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", [list(_SETTINGS)]).fetchall()
    return {str(name): str(value) for name, value in rows}


def server_findings(version: int, settings: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with a server of this version (as Postgres numbers it) with these settings."""
    if version < MINIMUM_SERVER:
        yield Finding("error", "version", f"the server is PostgreSQL {version // 10000}", "use PostgreSQL 14 or newer")

    def bad(name: str, value: str, why: str, *, level: Literal["error", "warning"] = "error", fix: str = "") -> Finding:
        default = f"ALTER SYSTEM SET {name} = {value}; SELECT pg_reload_conf()"
        return Finding(level, name, f"{name} is {settings.get(name)}: {why}", fix or default)

    if settings.get("fsync") == "off":
        yield bad("fsync", "on", "whatever was acknowledged is lost, and the database broken, when the machine fails")
    if settings.get("full_page_writes") == "off":
        yield bad("full_page_writes", "on", "a page that was half written when the machine failed cannot be repaired")
    if settings.get("synchronous_commit") == "off":
        yield bad(
            "synchronous_commit",
            "on",
            "what was acknowledged in the last moments before a crash is lost",
            fix="take it back where it was set (ALTER SYSTEM, DATABASE or ROLE ... RESET it)",
        )
    if settings.get("autovacuum") == "off":
        yield bad("autovacuum", "on", "the tables of queues grow without end, and everything gets slower")
    if settings.get("track_counts") == "off":
        yield bad("track_counts", "on", "autovacuum does not see what it has to clean up")
    if settings.get("default_transaction_isolation", "read committed") != "read committed":
        yield bad(
            "default_transaction_isolation",
            "",
            "what is taken side by side fails with serialization errors",
            fix="take it back where it was set (ALTER SYSTEM, DATABASE or ROLE ... RESET it)",
        )
    if settings.get("transaction_read_only") == "on":
        yield Finding(
            "error",
            "read_only",
            "the database takes no writes: it is a standby, or default_transaction_read_only is on",
            "connect to the primary, or take the setting back",
        )
    if int(settings.get("max_connections", FEW_CONNECTIONS)) < FEW_CONNECTIONS:
        yield bad(
            "max_connections",
            "100",
            "each worker process takes several connections",
            level="warning",
            fix="ALTER SYSTEM SET max_connections = 100, and restart the server",
        )


def _namespace_findings(conn: Connection, namespace: str) -> Iterator[Finding]:
    migrate = f"dramatiq-durable --namespace {namespace} migrate"
    row = conn.execute(
        "SELECT pg_get_userbyid(n.nspowner)::text, has_schema_privilege(n.oid, 'USAGE'),"
        "  (SELECT count(*) FROM pg_class c WHERE c.relnamespace = n.oid AND c.relowner = n.nspowner"
        "   AND c.relkind = 'r' AND c.relname IN ('roles', 'procedures', 'migration')) = 3,"
        "  o.rolname = session_user OR NOT (o.rolcanlogin OR o.rolsuper)"
        "FROM pg_namespace n JOIN pg_roles o ON o.oid = n.nspowner WHERE n.nspname = %s",
        [namespace],
    ).fetchone()
    if row is None:
        yield Finding("error", "schema", f"the database has no namespace {namespace!r}", migrate)
        return
    owner, usable, ours, trusted = row
    if not ours:
        yield Finding(
            "error",
            "schema",
            f"the schema {namespace!r} is none of ours",
            "choose another namespace (DRAMATIQ_DURABLE_NAMESPACE), or rename that schema",
        )
        return
    names = names_of(conn, namespace)
    if not usable:
        yield _no_grants(conn, namespace, owner)
    yield from _role_findings(conn, names)
    contents = [*_content_findings(conn, names, migrate)] if usable and trusted else []
    yield from contents
    if all(finding.fix != UPGRADE for finding in contents):
        # The procedures of a newer version are others than this package's, which must not replace them.
        yield from _function_findings(conn, names, migrate)
    if not trusted:
        yield Finding(
            "warning",
            "owner",
            f"the namespace belongs to the login {owner!r}: there can be no scoped workers, and that login could have "
            f"prepared anything in it for {conn.info.user!r}",
            f"check it as {owner!r}; for scoped workers, migrate with a login that may create roles",
        )


def _no_grants(conn: Connection, namespace: str, owner: str) -> Finding:
    login = conn.info.user
    return Finding(
        "error",
        "grants",
        f"the login {login!r} has no grants in the namespace {namespace!r}",
        f"dramatiq-durable --namespace {namespace} role grant {login} --consume STREAM --produce STREAM, "
        f"as an administrator of the namespace (the login that migrated it, or a member of {owner})",
    )


def _role_findings(conn: Connection, names: Names) -> Iterator[Finding]:
    if not names.separate:
        return
    found: dict[str, bool] = dict(
        conn.execute(
            "SELECT rolname::text, rolcanlogin OR rolsuper FROM pg_roles WHERE rolname = ANY (%s)",
            [[names.owner, names.worker, names.admin]],
        ).fetchall()
    )
    for role in (names.worker, names.admin):
        if role not in found:
            name, owner = quoted(conn, role), quoted(conn, names.owner)
            yield Finding(
                "error",
                "roles",
                f"the namespace's role {role!r} is missing: nobody can be granted anything",
                f"CREATE ROLE {name} NOLOGIN; GRANT {name} TO {owner} WITH ADMIN OPTION; "
                f"DELETE FROM {quoted(conn, names.namespace)}.procedures; and migrate",
            )
    for role in (role for role, powerful in found.items() if powerful):
        yield Finding(
            "error",
            "roles",
            f"the namespace's role {role!r} can log in or is a superuser",
            f"ALTER ROLE {quoted(conn, role)} NOLOGIN NOSUPERUSER",
        )


def _function_findings(conn: Connection, names: Names, migrate: str) -> Iterator[Finding]:
    rows = conn.execute(
        "SELECT p.proname::text, p.oid::regprocedure::text, EXISTS ("
        "  SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0)"
        "FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = %s ORDER BY 2",
        [names.namespace],
    ).fetchall()
    open_to_all = [signature for _, signature, public in rows if public]
    if open_to_all:
        yield Finding(
            "error",
            "public",
            f"PUBLIC may execute {', '.join(open_to_all)}",
            f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {quoted(conn, names.namespace)} FROM PUBLIC",
        )
    expected = {
        name for text in procedure_texts() for name in re.findall(r"^CREATE FUNCTION \{schema\}\.(\w+)", text, re.M)
    }
    if missing := sorted(expected - {name for name, _, _ in rows}):
        # Whoever has another version's procedures is told so by their checksum.
        yield Finding(
            "error",
            "functions",
            f"the namespace lacks {', '.join(missing)}",
            f"DELETE FROM {quoted(conn, names.namespace)}.procedures; and {migrate}",
        )


def _content_findings(conn: Connection, names: Names, migrate: str) -> Iterator[Finding]:
    schema = sql.Identifier(names.namespace)
    try:
        with conn.transaction():
            row = conn.execute(sql.SQL("SELECT version, checksum FROM {}.schema_version()").format(schema)).fetchone()
    except psycopg.errors.UndefinedFunction:
        return  # one of the functions that are missing, as has been said
    except psycopg.errors.InsufficientPrivilege:
        yield _no_grants(conn, names.namespace, names.owner)
        return
    version, checksum = row or (None, None)
    if version is None or version < expected_version():
        yield Finding(
            "error",
            "migrations",
            f"the namespace is at version {version or 0}, this package needs {expected_version()}",
            migrate,
        )
    elif version > expected_version():
        yield Finding(
            "error",
            "migrations",
            f"the namespace is at version {version}, newer than this package's {expected_version()}",
            UPGRADE,
        )
    elif checksum != names.checksum():
        yield Finding("error", "procedures", "the procedures are those of another version of this package", migrate)
    try:
        with conn.transaction():
            conn.execute(sql.SQL("SELECT FROM {}.open_streams('{{}}')").format(schema))
    except (psycopg.errors.UndefinedFunction, psycopg.errors.ReadOnlySqlTransaction):
        pass  # found above; and who gets as far as a write has grants
    except psycopg.Error as e:
        if e.sqlstate != "DD001" and not isinstance(e, psycopg.errors.InsufficientPrivilege):
            raise
        yield _no_grants(conn, names.namespace, names.owner)
    yield from _login_findings(conn, names)


def _login_findings(conn: Connection, names: Names) -> Iterator[Finding]:
    """What the table of logins and the roles of the server say about each other; for whoever may read both."""
    tables = [f"{quoted(conn, names.namespace)}.{table}" for table in ("login", "principal")]
    readable = conn.execute("SELECT bool_and(has_table_privilege(t, 'SELECT')) FROM unnest(%s::text[]) t", [tables])
    if not (readable.fetchone() or (False,))[0]:
        return
    rows = conn.execute(
        sql.SQL(
            "SELECT l.login::text, p.is_admin, r.oid IS NOT NULL, coalesce(r.rolsuper, false),"
            "  pg_has_role(r.oid, owner.oid, 'MEMBER'), pg_has_role(r.oid, role.oid, 'USAGE')"
            "FROM {0}.login l JOIN {0}.principal p ON p.principal_id = l.principal_id"
            "  LEFT JOIN pg_roles r ON r.rolname = l.login"
            "  LEFT JOIN pg_roles owner ON owner.rolname = %s"
            "  LEFT JOIN pg_roles role ON role.rolname = CASE WHEN p.is_admin THEN %s ELSE %s END "
            "ORDER BY 1"
        ).format(sql.Identifier(names.namespace)),
        [names.owner, names.admin, names.worker],
    ).fetchall()
    scoped = []
    for login, is_admin, exists, superuser, owns, member in rows:
        name = quoted(conn, login)
        if not exists:
            yield Finding(
                "warning",
                "login",
                f"{login!r} has grants, and there is no such login: whoever makes one inherits them",
                f"DELETE FROM {tables[0]} WHERE login = {sql.Literal(login).as_string(conn)}",
            )
            continue
        if not is_admin:
            scoped.append(login)
            if superuser or owns:
                yield Finding(
                    "warning",
                    "login",
                    f"the scoped login {login!r} is a superuser or a member of {names.owner!r}: its grants bind nobody",
                    f"give the worker a login of its own, or REVOKE {quoted(conn, names.owner)} FROM {name}",
                )
        if member is False and not owns:
            role = names.admin if is_admin else names.worker
            yield Finding(
                "error",
                "login",
                f"{login!r} has grants, and is no member of {role!r}: it may call nothing",
                f"GRANT {quoted(conn, role)} TO {name}",
            )
    if scoped:
        yield from _lock_findings(conn, names)
        yield from _storage_findings(conn)
        yield from _watch_findings(conn, names)


def _lock_findings(conn: Connection, names: Names) -> Iterator[Finding]:
    rows = conn.execute(
        r"SELECT format('pg_catalog.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) FROM pg_proc p "
        "WHERE p.pronamespace = 'pg_catalog'::regnamespace "
        r"AND p.proname ~ '^(pg_advisory|pg_try_advisory|lo_)' AND EXISTS ("
        "  SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0) ORDER BY 1"
    ).fetchall()
    if not rows:
        return
    yield Finding(
        "warning",
        "shared_locks",
        f"PUBLIC may execute {len(rows)} functions that take advisory locks or make large objects, and the namespace "
        "has scoped workers: one session of theirs can fill the server's lock table, and then nobody can do anything",
        f"REVOKE EXECUTE ON FUNCTION {', '.join(str(row[0]) for row in rows)} FROM PUBLIC; "
        f"GRANT EXECUTE ON FUNCTION pg_catalog.pg_advisory_xact_lock(bigint) TO {quoted(conn, names.owner)}",
    )


def _storage_findings(conn: Connection) -> Iterator[Finding]:
    """What any login may fill the disk with, beside what our procedures store and count."""
    row = conn.execute(
        "SELECT d.datname::text, EXISTS ("
        "  SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a"
        "  WHERE a.grantee = 0 AND a.privilege_type = 'TEMPORARY') "
        "FROM pg_database d WHERE d.datname = current_database()"
    ).fetchone()
    if row is not None and row[1]:
        yield Finding(
            "warning",
            "temporary",
            "PUBLIC may make temporary tables in the database, and the namespace has scoped workers: nothing limits "
            "what they put there",
            f"REVOKE TEMPORARY ON DATABASE {quoted(conn, str(row[0]))} FROM PUBLIC",
        )
    if row is not None and _settings(conn).get("temp_file_limit") == "-1":
        yield Finding(
            "warning",
            "temp_file_limit",
            "temp_file_limit is -1, and the namespace has scoped workers: nothing limits the files that a statement of "
            "theirs sorts and hashes in",
            f"ALTER DATABASE {quoted(conn, str(row[0]))} SET temp_file_limit = '10GB', as a superuser",
        )
    functions = conn.execute(
        "SELECT format('pg_catalog.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) FROM pg_proc p "
        "WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = 'pg_logical_emit_message' AND EXISTS ("
        "  SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0) ORDER BY 1"
    ).fetchall()
    if functions:
        yield Finding(
            "warning",
            "wal",
            "PUBLIC may execute pg_logical_emit_message, and the namespace has scoped workers: each call writes "
            "as much as a gigabyte of WAL, which goes to every standby and archive",
            f"REVOKE EXECUTE ON FUNCTION {', '.join(str(row[0]) for row in functions)} FROM PUBLIC",
        )
    schemas = conn.execute(
        "SELECT n.nspname::text FROM pg_namespace n WHERE EXISTS ("
        "  SELECT FROM aclexplode(n.nspacl) a WHERE a.grantee = 0 AND a.privilege_type = 'CREATE') ORDER BY 1"
    ).fetchall()
    if schemas:
        named = ", ".join(quoted(conn, str(name)) for (name,) in schemas)
        yield Finding(
            "warning",
            "create",
            f"PUBLIC may make tables and functions in {named}, and the namespace has scoped workers: nothing limits "
            "what they put there, and others may find it by its name",
            f"REVOKE CREATE ON SCHEMA {named} FROM PUBLIC",
        )


def _watch_findings(conn: Connection, names: Names) -> Iterator[Finding]:
    """Whether anybody sees to it that provisioned logins keep to their limits."""
    rows = conn.execute(
        sql.SQL(
            "SELECT l.login::text, l.provisioned, r.rolcanlogin AND NOT pg_has_role(%s, r.oid, 'USAGE'),"
            "  num_nonnulls(p.max_live, p.max_statement, p.max_transaction) > 0 "
            "FROM {0}.login l JOIN {0}.principal p ON p.principal_id = l.principal_id "
            "  JOIN pg_roles r ON r.rolname = l.login WHERE NOT p.is_admin ORDER BY 1"
        ).format(sql.Identifier(names.namespace)),
        [names.owner],
    ).fetchall()
    for login, provisioned, unseen, has_limits in rows:
        if provisioned and unseen:
            yield Finding(
                "warning",
                "watchdog",
                f"{names.owner!r} is no member of the provisioned login {login!r}: its sessions can be neither watched "
                "nor ended",
                f"GRANT {quoted(conn, login)} TO {quoted(conn, names.owner)}",
            )
        if has_limits and not (provisioned and login.startswith("dd_")):
            yield Finding(
                "warning",
                "limits",
                f"the login {login!r} was not made by `role provision`, and the limits of its principal do not bind it",
                "dramatiq-durable role provision makes one that is bound",
            )
    if not any(provisioned for _, provisioned, _, _ in rows):
        return
    prepared = _settings(conn).get("max_prepared_transactions", "0")
    if prepared != "0":
        yield Finding(
            "warning",
            "prepared_transactions",
            f"max_prepared_transactions is {prepared}, and the namespace has provisioned logins: what one of them has "
            "prepared keeps its locks, and belongs to no session that could be ended",
            "ALTER SYSTEM SET max_prepared_transactions = 0, and restart the server",
        )
    row = conn.execute(
        sql.SQL("SELECT extract(epoch FROM clock_timestamp() - looked_at)::float8, host FROM {}.watchdog").format(
            sql.Identifier(names.namespace)
        )
    ).fetchone()
    if row is None or row[0] > WATCHDOG_SILENT:
        when = "has ever looked" if row is None else f"has looked for {row[0]:.0f} s (the last ran on {row[1]})"
        yield Finding(
            "warning",
            "watchdog",
            f"no watchdog {when}, and the namespace has provisioned logins: nobody ends what is over its limits",
            f"keep `dramatiq-durable --namespace {names.namespace} watchdog` running on a host of your own, as an "
            "administrator of the namespace",
        )
