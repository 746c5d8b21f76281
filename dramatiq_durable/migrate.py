"""Bring a database's namespace up to this package's schema.

Tables come from numbered migrations that are applied once, in order, and never edited after a release.  Procedures are
code: whenever their text differs from what the namespace has, all of them are dropped and made again, in the same
transaction, so that a namespace always has one consistent set.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psycopg
from psycopg import sql

from .errors import InvalidName, NotConfigured, SchemaOutOfDate

logger = logging.getLogger(__name__)

#: The oldest server that is supported, as Postgres numbers its versions.
MINIMUM_SERVER = 140000


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    text: str


def sql_directory() -> Path:
    """Where the SQL lies: inside the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "sql"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "sql"


@cache
def migrations() -> tuple[Migration, ...]:
    """Every migration of this package, in order."""
    found = []
    for path in sorted((sql_directory() / "migrations").glob("*.sql")):
        number, _, name = path.stem.partition("_")
        found.append(Migration(int(number), name, path.read_text("utf-8")))
    return tuple(found)


@cache
def procedure_texts() -> tuple[str, ...]:
    """The procedures and, last, the grants, before rendering."""
    directory = sql_directory()
    paths = [*sorted((directory / "procedures").glob("*.sql")), directory / "grants.sql"]
    return tuple(path.read_text("utf-8") for path in paths)


@cache
def role_text() -> str:
    """What is said about the namespace's roles where it has some of its own, before rendering."""
    return (sql_directory() / "roles.sql").read_text("utf-8")


def expected_version() -> int:
    """The version of the newest migration that this package knows."""
    return migrations()[-1].version


@dataclass(frozen=True, slots=True)
class Names:
    """What the placeholders in the SQL stand for."""

    namespace: str
    owner: str
    worker: str
    admin: str

    @property
    def separate(self) -> bool:
        """Whether the namespace has roles of its own, so that scoped workers are possible."""
        return self.worker != self.owner

    def render(self, text: str) -> str:
        values = {
            "schema": _quote(self.namespace),
            "owner": _quote(self.owner),
            "worker": _quote(self.worker),
            "admin": _quote(self.admin),
            "namespace": self.namespace,
        }
        # In one pass: a database's name, and so a role's, may itself look like a placeholder.
        return re.sub(r"\{(schema|owner|worker|admin|namespace)\}", lambda m: values[m[1]], text)

    def procedures(self) -> list[str]:
        """All that is re-applied when it differs: the procedures and the grants, rendered."""
        texts = [*procedure_texts(), role_text()] if self.separate else procedure_texts()
        return [self.render(text) for text in texts]

    def checksum(self) -> str:
        digest = hashlib.sha256()
        for text in self.procedures():
            digest.update(text.encode())
        return digest.hexdigest()[:16]


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def check_namespace(namespace: str) -> str:
    """The namespace, if it can be one.

    Raises:
      InvalidName: it is not 1 to 40 lower-case letters, digits and underscores, beginning with a letter.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", namespace) or namespace.startswith("pg_"):
        raise InvalidName(
            f"{namespace!r} cannot be a namespace: use 1 to 40 lower-case letters, digits and underscores, "
            "beginning with a letter and not with pg_ (for example 'durable')"
        )
    return namespace


def role_name(database: str, namespace: str, kind: str) -> str:
    """A role's name: roles belong to the whole cluster, so it has database and namespace in it and never collides,
    neither by truncation at Postgres's 63 bytes nor by where the one name ends and the other begins."""
    # A namespace has no dot in it: the last one of the name is this one.
    stem = f"dd_{database}.{namespace}"
    if len(stem.encode()) > 63 - len("_worker"):
        stem = f"dd_{hashlib.sha256(stem.encode()).hexdigest()[:24]}"
    return f"{stem}_{kind}"


def migrate(url: str, namespace: str = "durable") -> list[str]:
    """Create or upgrade a namespace.  Safe to run from any number of processes at once; idempotent.

    Parameters:
      url(str): a login that may create schemas in the database.  With CREATEROLE (or as a superuser) it also makes the
        roles that own the namespace and that scoped workers belong to; without, the login itself owns everything and
        there can be no scoped workers.
      namespace(str): the schema's name.

    Returns:
      list[str]: what was done, one line each; empty when everything was up to date.

    Raises:
      NotConfigured: the URL or the server cannot be used, the schema is not ours, or the login lacks a privilege (which
        one is said).
      SchemaOutOfDate: the namespace was made by a newer version of this package.
      DatabaseUnavailable: the server cannot be reached, or went away; nothing was done.
    """
    from .database import translate, translate_connect_error

    check_namespace(namespace)
    try:
        # No prepared statements: they would stay behind in a pooler's session.
        conn = psycopg.connect(url, autocommit=True, prepare_threshold=None)
    except psycopg.Error as e:
        raise translate_connect_error(e, url) from e
    # Whoever waited for another migration has to see what that one did, whatever the database's default is.
    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    with conn:
        if conn.info.server_version < MINIMUM_SERVER:
            raise NotConfigured(f"the server is PostgreSQL {conn.info.server_version // 10000}; 14 or newer is needed")
        try:
            with conn.transaction():
                conn.execute("SET LOCAL search_path = pg_catalog, pg_temp")
                # The one advisory lock of the project: migrations of a namespace queue up behind each other.
                conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"dramatiq_durable:{namespace}"])
                return _migrate(conn, namespace)
        except psycopg.errors.InsufficientPrivilege as e:
            raise NotConfigured(
                f"the login {conn.info.user!r} may not migrate the database {conn.info.dbname!r}: "
                f"{e.diag.message_primary}. Use the database's owner or a superuser"
            ) from e
        except psycopg.errors.ReadOnlySqlTransaction as e:
            raise NotConfigured(
                f"the database {conn.info.dbname!r} is read-only ({e.diag.message_primary}): connect to the primary, "
                "or turn default_transaction_read_only off"
            ) from e
        except psycopg.errors.DependentObjectsStillExist as e:
            raise NotConfigured(
                f"something else in the database depends on a function of the namespace {namespace!r}: "
                f"{e.diag.message_detail or e.diag.message_primary}. Drop it, and make it again after `migrate`"
            ) from e
        except psycopg.Error as e:
            raise translate(e) from e


def _migrate(conn: psycopg.Connection[tuple[object, ...]], namespace: str) -> list[str]:
    done: list[str] = []
    schema = sql.Identifier(namespace)
    names = _find_namespace(conn, namespace)
    if names is None:
        names = _create_namespace(conn, namespace)
        done.append(f"created namespace {namespace}, owned by {names.owner}")
    version_row = conn.execute(sql.SQL("SELECT coalesce(max(version), 0) FROM {}.migration").format(schema)).fetchone()
    version = int(str(version_row[0])) if version_row else 0
    if version > expected_version():
        raise SchemaOutOfDate(
            f"the namespace {namespace!r} is at version {version}, newer than this package's {expected_version()}: "
            "upgrade dramatiq-durable"
        )
    for migration in migrations():
        if migration.version > version:
            conn.execute(names.render(migration.text).encode())
            conn.execute(
                sql.SQL("INSERT INTO {}.migration (version, name) VALUES (%s, %s)").format(schema),
                [migration.version, migration.name],
            )
            done.append(f"applied migration {migration.version:04} {migration.name}")
    checksum_row = conn.execute(sql.SQL("SELECT checksum FROM {}.procedures").format(schema)).fetchone()
    if checksum_row is None or checksum_row[0] != names.checksum():
        _replace_procedures(conn, names)
        done.append("replaced the procedures")
    # Still as the owner: a login that does not inherit its roles' rights can migrate too.
    if _make_administrator(conn, schema):
        done.append("made this login an administrator of the namespace")
    for line in done:
        logger.info("%s", line)
    return done


def _find_namespace(conn: psycopg.Connection[tuple[object, ...]], namespace: str) -> Names | None:
    """The namespace's names, if it exists; the transaction then goes on as its owner.

    The login may be a superuser, so nothing of a schema that somebody else may have prepared is touched (a table of
    theirs can have a trigger): the catalogue says first whose it is.
    """
    row = conn.execute(
        "SELECT o.rolname::text, o.rolname IN (session_user, current_user), o.rolcanlogin OR o.rolsuper,"
        "  (SELECT count(*) FROM pg_class c WHERE c.relnamespace = n.oid AND c.relowner = n.nspowner"
        "   AND c.relkind = 'r' AND c.relname IN ('roles', 'procedures', 'migration'))"
        "FROM pg_namespace n JOIN pg_roles o ON o.oid = n.nspowner WHERE n.nspname = %s",
        [namespace],
    ).fetchone()
    if row is None:
        return None
    owner, own, powerful, tables = str(row[0]), bool(row[1]), bool(row[2]), row[3]
    if tables != 3:
        raise NotConfigured(
            f"the database {conn.info.dbname!r} has a schema {namespace!r} that is none of ours: choose another "
            "namespace (DRAMATIQ_DURABLE_NAMESPACE), or rename that schema"
        )
    if not own and (powerful or not re.fullmatch(r"dd_.+_owner", owner)):
        raise NotConfigured(
            f"the namespace {namespace!r} belongs to the login {owner!r}, which could have prepared anything in it for "
            f"{conn.info.user!r}: migrate as {owner!r}"
        )
    conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(owner)))
    names = conn.execute(
        sql.SQL("SELECT owner, worker, admin FROM {}.roles").format(sql.Identifier(namespace))
    ).fetchone()
    if names is None or names[0] != owner:
        raise NotConfigured(
            f"the namespace {namespace!r} belongs to {owner!r}, and its table of roles says {names and names[0]!r}: "
            "after a change of owner or name of a role, correct that table"
        )
    return Names(namespace, *map(str, names))


def _create_namespace(conn: psycopg.Connection[tuple[object, ...]], namespace: str) -> Names:
    """The schema, its roles where the login may make them, and the bookkeeping tables."""
    row = conn.execute(
        "SELECT current_user::text, rolsuper OR rolcreaterole, rolsuper FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    assert row is not None
    login, may_create_roles, superuser = str(row[0]), bool(row[1]), bool(row[2])
    names = Names(namespace, *(role_name(conn.info.dbname, namespace, k) for k in ("owner", "worker", "admin")))
    roles = [names.owner, names.worker, names.admin]
    found = {
        str(name): bool(powerful)
        for name, powerful in conn.execute(
            "SELECT rolname::text, rolcanlogin OR rolsuper FROM pg_roles WHERE rolname = ANY (%s)", [roles]
        )
    }
    if powerful_roles := [role for role, powerful in found.items() if powerful]:
        raise NotConfigured(
            f"the role {powerful_roles[0]!r} exists and can log in or is a superuser; the namespace's roles must be "
            f"neither: ALTER ROLE {_quote(powerful_roles[0])} NOLOGIN NOSUPERUSER"
        )
    statements = [
        *(f"CREATE ROLE {_quote(role)} NOLOGIN" for role in roles if role not in found),
        *(f"GRANT {_quote(role)} TO {_quote(login)}" for role in roles if not superuser),
        # Who owns the namespace gives the other two to those who are granted something in it.
        *(f"GRANT {_quote(role)} TO {_quote(names.owner)} WITH ADMIN OPTION" for role in roles[1:]),
    ]
    if may_create_roles:
        for statement in statements:
            conn.execute(statement.encode())
    elif len(found) < len(roles):
        names = Names(namespace, login, login, login)
        logger.warning(
            "the login %r may not create roles: it owns the namespace itself and scoped workers are not possible. "
            "To have them, drop the namespace, let a DBA run: %s; and migrate again",
            login,
            "; ".join(statements),
        )
    schema, owner = sql.Identifier(namespace), sql.Identifier(names.owner)
    conn.execute(sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(schema, owner))
    conn.execute(sql.SQL("SET LOCAL ROLE {}").format(owner))
    conn.execute(
        sql.SQL(
            "CREATE TABLE {0}.roles (owner name NOT NULL, worker name NOT NULL, admin name NOT NULL);"
            "CREATE TABLE {0}.procedures (checksum text NOT NULL);"
            "CREATE TABLE {0}.migration (version int PRIMARY KEY, name text NOT NULL, "
            "applied_at timestamptz NOT NULL DEFAULT now())"
        ).format(schema)
    )
    conn.execute(
        sql.SQL("INSERT INTO {}.roles VALUES (%s, %s, %s)").format(schema), [names.owner, names.worker, names.admin]
    )
    return names


def _replace_procedures(conn: psycopg.Connection[tuple[object, ...]], names: Names) -> None:
    schema = sql.Identifier(names.namespace)
    for (signature,) in conn.execute(
        "SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = %s::regnamespace",
        [_quote(names.namespace)],
    ).fetchall():
        conn.execute(f"DROP ROUTINE {signature}".encode())
    for text in names.procedures():
        conn.execute(text.encode())
    conn.execute(sql.SQL("DELETE FROM {}.procedures").format(schema))
    conn.execute(sql.SQL("INSERT INTO {}.procedures VALUES (%s)").format(schema), [names.checksum()])


def _make_administrator(conn: psycopg.Connection[tuple[object, ...]], schema: sql.Identifier) -> bool:
    """The login that migrates administers; others get their grants from it."""
    known = conn.execute(sql.SQL("SELECT 1 FROM {}.login WHERE login = session_user").format(schema)).fetchone()
    if known is not None:
        return False
    conn.execute(
        sql.SQL(
            "WITH p AS (INSERT INTO {0}.principal (name, is_admin) VALUES (session_user, true) "
            "ON CONFLICT (name) DO UPDATE SET is_admin = true RETURNING principal_id) "
            "INSERT INTO {0}.login (login, principal_id) SELECT session_user, principal_id FROM p"
        ).format(schema)
    )
    return True
