"""Every broker of a test on a login that may do only what the test declares.

``DRAMATIQ_DURABLE_TEST_SCOPED=on`` (`make test-scoped`) has all tests, and the processes they start, made so.  A broker
that is given the administrator's URL connects as a login of its own, which may consume and produce to exactly the
queues that were declared on it; as an administrator would, a hook grants each of them as it is declared.  What the test
itself looks at, with connections of its own, stays the administrator's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from dramatiq_durable.arrays import Texts
from dramatiq_durable.broker import DurableBroker
from tests.support.postgres import scoped_login
from tests.support.processes import SCOPED

PASSWORD = "secret"


def chosen() -> bool:
    return os.environ.get(SCOPED) == "on"


def as_login(url: str, login: str) -> str:
    """The same place, for another login."""
    parts = urlsplit(url)
    address = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{login}:{PASSWORD}@{address}"))


class Scope:
    """A broker's login, and the administrator who grants it what the broker declares."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url
        self.namespace = namespace
        self.login = ""
        self._granted: set[tuple[str, bool]] = set()

    def open(self) -> str:
        """Make the login, and answer its URL; where the URL given is of no administrator, it stays."""
        try:
            with psycopg.connect(self.url, autocommit=True, connect_timeout=10) as conn:
                row = conn.execute(
                    "SELECT current_database(), to_regclass(quote_ident(%s) || '.login') IS NOT NULL,"
                    " (SELECT rolsuper FROM pg_roles WHERE rolname = session_user)",
                    [self.namespace],
                ).fetchone()
                assert row is not None
                if not row[1] or not row[2]:
                    return self.url
                self.login = scoped_login(row[0], self.namespace)
                self._make(conn)
        except psycopg.OperationalError:
            return self.url
        return as_login(self.url, self.login)

    def _make(self, conn: psycopg.Connection[Any]) -> None:
        name, space = sql.Identifier(self.login), sql.Identifier(self.namespace)
        with conn.transaction():
            # Several processes may come at once.
            conn.execute("SELECT pg_advisory_xact_lock(5)")
            if not conn.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [self.login]).fetchone():
                conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(PASSWORD)))
            row = conn.execute(sql.SQL("SELECT worker::text FROM {}.roles").format(space)).fetchone()
            assert row is not None
            conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(row[0]), name))
            self._grant(conn, [], [])
            conn.execute(sql.SQL("UPDATE {}.principal SET kind = 'worker' WHERE name = %s").format(space), [self.login])

    def allow(self, consume: list[str], produce: list[str]) -> None:
        """What a test declares is granted."""
        wanted = {(name, True) for name in consume} | {(name, False) for name in produce}
        if not self.login or wanted <= self._granted:
            return
        with psycopg.connect(self.url, autocommit=True) as conn:
            self._grant(conn, consume, [*consume, *produce])
        self._granted |= wanted

    def _grant(self, conn: psycopg.Connection[Any], consume: list[str], produce: list[str]) -> None:
        conn.execute(
            sql.SQL("SELECT {}.grant_login(%s, %s, false, %s, %s)").format(sql.Identifier(self.namespace)),
            [self.login, self.login, Texts(consume), Texts(produce)],
        )


def install(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have every broker made so from now on.  ``replace`` is setattr, or monkeypatch's."""
    conninfo, stream_id = DurableBroker._conninfo, DurableBroker.stream_id

    def scoped_conninfo(self: DurableBroker) -> str:
        scope = Scope(conninfo(self), self.namespace)
        url = scope.open()
        self.__dict__["_scope"] = scope
        return url

    def scoped_stream_id(self: DurableBroker, queue_name: str) -> int:
        if queue_name not in self._streams:
            _ = self.database.conninfo
            self.__dict__["_scope"].allow(list(self.queues), [queue_name])
        return stream_id(self, queue_name)

    replace(DurableBroker, "_conninfo", scoped_conninfo)
    replace(DurableBroker, "stream_id", scoped_stream_id)
