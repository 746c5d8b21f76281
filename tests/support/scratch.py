"""A database and logins of a test's own, where the roles that come into being are dropped at the end too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from . import unique_name
from .postgres import Cluster

PASSWORD = "a%b:c"


class Scratch:
    """A fresh database.

    Attributes:
      url(str): of a superuser.
      name(str): of the database.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = urlsplit(url).path.lstrip("/")
        self.logins: list[str] = []

    def execute(self, statement: str, *arguments: object, url: str | None = None) -> list[tuple[object, ...]]:
        """Run a statement on a connection of its own, by default as the superuser; return its rows, if it has any."""
        with psycopg.connect(url or self.url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), arguments or None)
            return cursor.fetchall() if cursor.description else []

    def login(self, options: str = "") -> tuple[str, str]:
        """Make a login; return its name and its URL."""
        name = unique_name("login")
        self.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}' {options}")
        self.logins.append(name)
        return name, self.url_of(name)

    def url_of(self, login: str) -> str:
        """The database's URL with another login."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{login}:{quote(PASSWORD, safe='')}@{host}"))

    def namespace_roles(self) -> list[str]:
        """The roles of the database's namespaces, by the beginning of their names."""
        rows = self.execute(
            "SELECT rolname::text FROM pg_catalog.pg_roles WHERE starts_with(rolname, %s)", f"dd_{self.name}."
        )
        return sorted(str(row[0]) for row in rows)

    def worker_roles(self) -> list[str]:
        """The logins that were provisioned in this database, and are there still."""
        rows = self.execute(
            "SELECT rolname::text FROM pg_catalog.pg_roles r "
            "WHERE pg_catalog.shobj_description(r.oid, 'pg_authid') LIKE %s ORDER BY rolname",
            f"dramatiq_durable: worker %of the database {self.name}",
        )
        return [str(row[0]) for row in rows]


@contextlib.contextmanager
def scratch(cluster: Cluster, template: str = "template0") -> Iterator[Scratch]:
    """Make a database, a clone of ``template``, and drop it at the end, with the roles that were made for it."""
    with cluster.database(template) as url:
        made = Scratch(url)
        try:
            yield made
        finally:
            roles = [*made.worker_roles(), *made.logins, *made.namespace_roles()]
    if roles:
        # In one statement: each may be the grantor of another's membership.
        cluster.execute(sql.SQL("DROP ROLE {}").format(sql.SQL(", ").join(map(sql.Identifier, roles))))
