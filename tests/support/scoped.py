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

import dramatiq_durable as durable
from dramatiq_durable.broker import DurableBroker
from tests.support.processes import SCOPED


def chosen() -> bool:
    return os.environ.get(SCOPED) == "on"


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
                    "SELECT to_regclass(quote_ident(%s) || '.role_event') IS NOT NULL,"
                    " (SELECT rolsuper FROM pg_roles WHERE rolname = session_user)",
                    [self.namespace],
                ).fetchone()
                if row != (True, True):
                    return self.url
                with conn.transaction():
                    # One login for all processes of a test: several may come at once.
                    conn.execute("SELECT pg_advisory_xact_lock(5)")
                    return self._login(conn)
        except psycopg.OperationalError:
            return self.url

    def _login(self, conn: psycopg.Connection[Any]) -> str:
        conn.execute("CREATE TABLE IF NOT EXISTS public.scoped (namespace text PRIMARY KEY, role text, password text)")
        row = conn.execute("SELECT role, password FROM public.scoped WHERE namespace = %s", [self.namespace]).fetchone()
        if row is None:
            made = durable.provision_worker_role(self.url, name="tests", streams=["scoped"], namespace=self.namespace)
            row = made.role, made.password
            # It has to be granted something; of what the test has not declared it has nothing.
            for statement in (
                "DELETE FROM {}.stream_grant g USING {}.stream s WHERE s.stream_id = g.stream_id AND s.name = 'scoped'",
                "DELETE FROM {}.stream WHERE name = 'scoped'",
            ):
                space = sql.Identifier(self.namespace)
                conn.execute(sql.SQL(statement).format(*[space] * statement.count("{}")))
            # What a test keeps for itself is granted by its owner, as an application's tables are.
            for statement in (
                "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {}",
                "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {}",
            ):
                conn.execute(sql.SQL(statement).format(sql.Identifier(made.role)))
            conn.execute("INSERT INTO public.scoped VALUES (%s, %s, %s)", [self.namespace, *row])
        self.login = str(row[0])
        # The test's own address: it may go through something.
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=f"{row[0]}:{row[1]}@{parts.netloc.rpartition('@')[2]}"))

    def allow(self, consume: list[str], produce: list[str]) -> None:
        """What a test declares is granted."""
        wanted = {(name, True) for name in consume} | {(name, False) for name in produce if name not in consume}
        if not self.login or wanted <= self._granted:
            return
        stream, stream_grant, principal = (
            sql.Identifier(self.namespace, name) for name in ("stream", "stream_grant", "principal")
        )
        with psycopg.connect(self.url, autocommit=True) as conn:
            for name, consumes in sorted(wanted - self._granted):
                conn.execute(sql.SQL("INSERT INTO {} (name) VALUES (%s) ON CONFLICT DO NOTHING").format(stream), [name])
                conn.execute(
                    sql.SQL(
                        "INSERT INTO {} AS g (principal_id, stream_id, consume, produce)"
                        " SELECT p.principal_id, s.stream_id, %s, true FROM {} p, {} s"
                        " WHERE p.name = 'tests' AND s.name = %s ON CONFLICT (principal_id, stream_id)"
                        " DO UPDATE SET consume = g.consume OR excluded.consume"
                    ).format(stream_grant, principal, stream),
                    [consumes, name],
                )
        self._granted |= wanted


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


def looking(broker: DurableBroker) -> psycopg.Connection[Any]:
    """The administrator's connection to where a broker is, for what a test looks at itself."""
    _ = broker.database.conninfo
    scope = broker.__dict__.get("_scope")
    return psycopg.connect(broker.database.conninfo if scope is None else scope.url, autocommit=True)
