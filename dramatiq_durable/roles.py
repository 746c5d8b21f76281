"""Who may use a namespace: an existing login of the database gets its grants here."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from psycopg import sql

from .arrays import Texts
from .database import Connection, Database, translate
from .errors import NotConfigured, NotPermitted
from .migrate import Names
from .workflow.options import check_name, check_queue_name


def grant_login(
    database: Database,
    login: str,
    *,
    admin: bool = False,
    consume: Sequence[str] = (),
    produce: Sequence[str] = (),
) -> list[str]:
    """Let an existing login use the namespace.  Only adds to what it may do already; idempotent; one transaction.

    Parameters:
      database(Database): the namespace, connected to as one of its administrators.
      login(str): an existing role that can log in.
      admin(bool): make it an administrator: it may use every stream, and call the operators' procedures.
      consume(Sequence): streams whose messages it may take; they come into being here.
      produce(Sequence): streams that it may send to, and whose workflows it may start.

    Returns:
      list[str]: what it was given, one line each.

    Raises:
      NotConfigured: there is no such login, or the namespace has no roles of its own.
      NotPermitted: the caller is no administrator, or may not give out the namespace's roles.
      InvalidName: a stream's name is malformed.
      SchemaOutOfDate, DatabaseUnavailable: as for every use of a namespace.
    """
    check_name(login, "a login")
    for name in (*consume, *produce):
        check_queue_name(name)
    with database.connection() as conn:
        try:
            with conn.transaction():
                return _grant(conn, database.namespace, login, admin, list(consume), list(produce))
        except psycopg.Error as e:
            raise explained(e, conn, database.namespace) from e


def _grant(
    conn: Connection, namespace: str, login: str, admin: bool, consume: list[str], produce: list[str]
) -> list[str]:
    row = conn.execute("SELECT rolcanlogin FROM pg_catalog.pg_roles WHERE rolname = %s", [login]).fetchone()
    if row is None or not row[0]:
        why = "cannot log in" if row is not None else "does not exist"
        verb = "ALTER" if row is not None else "CREATE"
        raise NotConfigured(
            f"the login {login!r} {why}: let a DBA run {verb} ROLE {quoted(conn, login)} LOGIN PASSWORD '...'"
        )
    conn.execute(
        sql.SQL("SELECT {}.grant_login(%s, %s, %s, %s, %s)").format(sql.Identifier(namespace)),
        [login, login, admin, Texts(consume), Texts(produce)],
    )
    names = names_of(conn, namespace)
    role = names.admin if admin else names.worker
    if login != names.owner:
        if not names.separate:
            raise NotConfigured(
                f"the namespace {namespace!r} belongs to the login {names.owner!r} and has no roles of its own, so no "
                "other login can be let in without becoming that one. Make a namespace with a login that may create "
                "roles (`dramatiq-durable migrate` prints how)"
            )
        _give(conn, names, role, login)
    given = [f"{login} is a member of {role}"]
    if admin:
        given.append(f"{login} administers the namespace {namespace}")
    given += [f"{login} may consume {name}" for name in dict.fromkeys(consume)]
    given += [f"{login} may produce to {name}" for name in dict.fromkeys(produce)]
    return given


def _give(conn: Connection, names: Names, role: str, login: str) -> None:
    grant = sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), sql.Identifier(login))
    try:
        with conn.transaction():
            # The owner may give its roles away; a login that may act as the owner can therefore do so as well.
            conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(names.owner)))
            conn.execute(grant)
    except psycopg.errors.InsufficientPrivilege as e:
        raise NotPermitted(
            f"the login {conn.info.user!r} may not give out the role {role!r}: use the login that migrated the "
            f"namespace, or let a DBA run {grant.as_string(conn)}; nothing was granted"
        ) from e


def explained(error: psycopg.Error, conn: Connection, namespace: str) -> Exception:
    """An error of the database as one of ours; what is not permitted, with what would permit it."""
    primary = error.diag.message_primary or ""
    denied = isinstance(error, psycopg.errors.InsufficientPrivilege)
    # None of these procedures is for anybody else.
    if error.sqlstate == "DD001" or (denied and primary.startswith("permission denied for function")):
        return NotPermitted(
            f"the login {conn.info.user!r} is no administrator of the namespace {namespace!r}: let one of them run "
            f"`dramatiq-durable --namespace {namespace} role grant {conn.info.user} --admin`"
        )
    if denied:
        return NotPermitted(f"the login {conn.info.user!r} lacks a privilege: {primary}. Nothing was changed")
    return translate(error)


def names_of(conn: Connection, namespace: str) -> Names:
    """The namespace and its roles, as the catalogue shows them to any login."""
    row = conn.execute(
        "SELECT pg_catalog.pg_get_userbyid(nspowner)::text FROM pg_catalog.pg_namespace WHERE nspname = %s", [namespace]
    ).fetchone()
    if row is None:
        raise NotConfigured(f"the database {conn.info.dbname!r} has no namespace {namespace!r}: migrate it")
    owner = str(row[0])
    stem = owner.removesuffix("owner")
    if not owner.startswith("dd_") or not owner.endswith("_owner"):
        return Names(namespace, owner, owner, owner)
    return Names(namespace, owner, f"{stem}worker", f"{stem}admin")


def quoted(conn: Connection, name: str) -> str:
    """A name as an SQL identifier."""
    return sql.Identifier(name).as_string(conn)
