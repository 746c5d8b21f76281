"""The logins of scoped workers, as roles of the server: made, changed and dropped by whoever may create roles.

A role that was made elsewhere is not touched, whatever it is called: its comment tells.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from .arrays import Texts
from .database import CONNECT_TIMEOUT, Connection, Database
from .errors import DatabaseUnavailable, NotConfigured, NotPermitted, SchemaOutOfDate
from .migrate import Names
from .roles import explained, names_of, quoted

#: How long revoking goes on ending sessions, in seconds; a session ends within milliseconds.
END_WITHIN = 10.0

#: What a worker's URL does not take over from that of whoever provisions it: how that one proves who it is.
_OWN = {"user", "password", "passfile", "sslcert", "sslkey", "sslpassword", "application_name", "service", "dbname"}


@dataclass(frozen=True, slots=True)
class Credential:
    """What a scoped worker's process is given, and nobody else: it is shown once, and kept nowhere.

    Attributes:
      role(str): the login.
      password(str): its password; it is not part of the credential's repr.
      url(str): the database's URL with both, as DRAMATIQ_DURABLE_URL takes it; not part of the repr either.
    """

    role: str
    password: str = field(repr=False)
    url: str = field(repr=False)


def stem_of(database: str, namespace: str, name: str) -> str:
    """What the names of a worker's logins begin with: never the same for two workers, wherever on the server they are,
    and whatever is cut off or replaced of what follows."""
    digest = hashlib.sha256("\0".join((database, namespace, name)).encode()).hexdigest()[:12]
    readable = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")
    return f"dd_{digest}_{readable}" if readable else f"dd_{digest}"


@contextmanager
def session(database: Database) -> Iterator[tuple[Connection, Names]]:
    """A connection whose login may do all that this needs, as far as the catalogue can tell."""
    try:
        conn = database.connect()
    except SchemaOutOfDate:
        # Perhaps because the login may not even use the schema: that is better said together with what else is missing.
        with psycopg.connect(database.conninfo, autocommit=True) as other:
            _check_privileges(other, database.namespace)
        raise
    try:
        names = _check_privileges(conn, database.namespace)
        yield conn, names
    except psycopg.Error as e:
        raise explained(e, conn, database.namespace) from e
    finally:
        conn.close()


def _check_privileges(conn: Connection, namespace: str) -> Names:
    """Raises NotConfigured where there are no roles to give, NotPermitted with all that the login lacks."""
    names = names_of(conn, namespace)
    login = quoted(conn, conn.info.user)
    if not names.separate:
        raise NotConfigured(
            f"the namespace {namespace!r} belongs to the login {names.owner!r} and has no roles of its own, so there "
            "can be no scoped workers. Make a namespace with a login that may create roles (`dramatiq-durable migrate` "
            "prints how)"
        )
    how = "SET" if conn.info.server_version >= 160000 else "MEMBER"
    row = conn.execute(
        "SELECT r.rolsuper OR r.rolcreaterole, pg_has_role(session_user, %s, %s), "
        "       has_schema_privilege(session_user, %s, 'USAGE') FROM pg_roles r WHERE r.rolname = session_user",
        [names.owner, how, namespace],
    ).fetchone()
    creates, owns, uses = row or (False, False, False)
    missing = []
    if not creates:
        missing.append(f"it may not create roles: ALTER ROLE {login} CREATEROLE")
    if not owns:
        missing.append(f"it may not act as the namespace's owner: GRANT {quoted(conn, names.owner)} TO {login}")
    if not uses:
        missing.append(
            f"it is no administrator: `dramatiq-durable --namespace {namespace} role grant {conn.info.user} --admin`"
        )
    if missing:
        raise NotPermitted(
            f"the login {conn.info.user!r} may not change workers' roles: {'; '.join(missing)}. Or use the login that "
            "migrated the namespace. Nothing was changed"
        )
    return names


def call(conn: Connection, names: Names, procedure: str, *arguments: Any) -> list[tuple[Any, ...]]:
    marks = sql.SQL(", ").join([sql.Placeholder()] * len(arguments))
    call = sql.SQL("SELECT * FROM {}.{}({})").format(sql.Identifier(names.namespace), sql.Identifier(procedure), marks)
    return conn.execute(call, arguments).fetchall()


def _as_owner(conn: Connection, names: Names, statements: Sequence[sql.Composed]) -> None:
    """Run statements with the rights of the namespace's owner, in the transaction that is open."""
    conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(names.owner)))
    for statement in statements:
        conn.execute(statement)
    conn.execute("SET LOCAL ROLE NONE")


def bar(conn: Connection, names: Names, logins: Sequence[str]) -> None:
    """These roles may neither log in nor call anything any more."""
    for login in logins:
        conn.execute(sql.SQL("ALTER ROLE {} NOLOGIN PASSWORD NULL").format(sql.Identifier(login)))
    revoke = sql.SQL("REVOKE {} FROM {}")
    _as_owner(conn, names, [revoke.format(sql.Identifier(names.worker), sql.Identifier(login)) for login in logins])


def make_login(
    conn: Connection,
    names: Names,
    name: str,
    conninfo: str,
    connection_limit: int | None,
    end: tuple[datetime | None, int | None, int | None],
    statement: int | None,
    transaction: int | None,
) -> Credential:
    """Make a role, and a worker's login of it, in the transaction that is open.

    Parameters:
      end(tuple): until when it is, or for how many milliseconds; and for how many those are that there were.
      statement, transaction(int | None): what these may take, in milliseconds.
    """
    password = secrets.token_urlsafe(32)
    (mark,) = call(conn, names, "worker_mark", name)[0]
    serial = int(call(conn, names, "worker_logins", name)[0][6])
    stem = stem_of(conn.info.dbname, names.namespace, name)
    while True:
        login = f"{stem[: 62 - len(str(serial))]}_{serial}"
        if conn.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [login]).fetchone() is None:
            break
        serial += 1
    role = sql.Identifier(login)
    # Made here: neither the server nor its log ever sees the password.
    verifier = conn.pgconn.encrypt_password(password.encode(), login.encode(), b"scram-sha-256").decode()
    # The procedure knows the time; the role has to have been made before it is granted anything.
    until = {row[0]: row[1] for row in call(conn, names, "add_worker_login", name, login, *end)}
    conn.execute(
        sql.SQL(
            "CREATE ROLE {} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS "
            "CONNECTION LIMIT {} PASSWORD {} VALID UNTIL {}"
        ).format(role, sql.Literal(connection_limit or -1), sql.Literal(verifier), sql.Literal(_valid(until[login])))
    )
    conn.execute(sql.SQL("COMMENT ON ROLE {} IS {}").format(role, sql.Literal(mark)))
    # A courtesy to honest workers, who get an error instead of the watchdog; whoever likes takes them back.
    for setting, value in (("statement_timeout", statement), ("idle_in_transaction_session_timeout", transaction)):
        if value is not None:
            conn.execute(
                sql.SQL("ALTER ROLE {} SET {} = {}").format(role, sql.Identifier(setting), sql.Literal(f"{value}ms"))
            )
    inherit = sql.SQL(" WITH INHERIT TRUE, SET FALSE" if conn.info.server_version >= 160000 else "")
    # So that the owner's procedures may see its sessions and end them.
    conn.execute(sql.SQL("GRANT {} TO {}").format(role, sql.Identifier(names.owner)) + inherit)
    _as_owner(conn, names, [sql.SQL("GRANT {} TO {}").format(sql.Identifier(names.worker), role) + inherit])
    for other, over in until.items():
        if other != login and conn.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [other]).fetchone():
            valid = sql.Literal(_valid(over))
            conn.execute(sql.SQL("ALTER ROLE {} VALID UNTIL {}").format(sql.Identifier(other), valid))
    connects = conn.execute("SELECT has_database_privilege(%s, current_database(), 'CONNECT')", [login]).fetchone()
    if connects != (True,):
        raise NotConfigured(
            f"the database {conn.info.dbname!r} lets no new login connect: let its owner run GRANT CONNECT ON DATABASE "
            f"{quoted(conn, conn.info.dbname)} TO {quoted(conn, names.worker)}. Nothing was changed"
        )
    return Credential(login, password, credential_url(conninfo, conn.info.dbname, login, password))


def _valid(until: datetime | None) -> str:
    return "infinity" if until is None else until.astimezone(UTC).isoformat()


def own_logins(conn: Connection, names: Names, name: str) -> list[dict[str, Any]]:
    """A worker's logins; raises NotPermitted where one that is there is not ours, or not this login's to change."""
    columns = ("login", "over", "ours", "there", "connection_limit", "lifetime", "serial")
    rows = [dict(zip(columns, row, strict=True)) for row in call(conn, names, "worker_logins", name)]
    rows = [row for row in rows if row["login"] is not None]
    for row in rows:
        login = row["login"]
        if row["there"] and not row["ours"]:
            (mark,) = call(conn, names, "worker_mark", name)[0]
            raise NotPermitted(
                f"the role {login!r} is none that was provisioned here: its comment is not {mark!r}. Somebody has "
                "made it anew, or this database is a copy, or has another name now. Nothing was changed"
            )
        if row["there"] and conn.info.server_version >= 160000:
            admin = conn.execute("SELECT pg_has_role(session_user, %s, 'MEMBER WITH ADMIN OPTION')", [login]).fetchone()
            if admin != (True,):
                raise NotPermitted(
                    f"the login {conn.info.user!r} did not make the role {login!r}, and may not change it: use the "
                    f"login that provisioned it, or let a DBA run GRANT {quoted(conn, login)} TO "
                    f"{quoted(conn, conn.info.user)} WITH ADMIN OPTION. Nothing was changed"
                )
    return rows


def end_what_is_over(conn: Connection, names: Names, name: str) -> tuple[int, int]:
    """End the sessions of logins whose time is over, until none is left; then give back what they held."""
    ended, deadline = 0, time.monotonic() + END_WITHIN
    while (left := int(call(conn, names, "end_worker_sessions", name)[0][0])) > 0:
        ended = max(ended, left)
        if time.monotonic() > deadline:
            raise DatabaseUnavailable(
                f"{left} sessions of {name!r} do not end: the server is not well. It has lost its rights already; call "
                "this again"
            )
        time.sleep(0.02)
    return ended, int(call(conn, names, "give_back_of_worker", name)[0][0])


def drop(conn: Connection, names: Names, name: str, logins: Sequence[str]) -> dict[str, str]:
    """Drop roles, in the transaction that is open; answers those that could not be, and what depends on them."""
    left: dict[str, str] = {}
    for login in logins:
        try:
            with conn.transaction():
                conn.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(login)))
        except psycopg.errors.DependentObjectsStillExist as e:
            left[login] = (e.diag.message_detail or e.diag.message_primary or "").replace("\n", ", ")
    if logins:
        call(conn, names, "forget_worker_logins", name, Texts(list(logins)))
    return left


def credential_url(conninfo: str, database: str, role: str, password: str) -> str:
    """The URL of a database as another login, with nothing in it by which the first one proved who it is."""
    facts = {key: str(value) for key, value in conninfo_to_dict(conninfo).items() if key not in _OWN}
    if facts.get("connect_timeout") == str(CONNECT_TIMEOUT):
        del facts["connect_timeout"]
    host, port = facts.get("host", ""), facts.get("port", "")
    address = ""
    # Sockets and several hosts are options.
    if host and not set(host) & set("/,@"):
        del facts["host"]
        facts.pop("port", None)
        address = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    options = urlencode(sorted(facts.items()), quote_via=quote)
    url = f"postgresql://{quote(role, safe='')}:{quote(password, safe='')}@{address}/{quote(database, safe='')}"
    return f"{url}?{options}" if options else url
