from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from dramatiq_durable import provision_worker_role
from dramatiq_durable.arrays import Texts
from tests.sql.api import Session
from tests.support import unique_name


class Scoped(Session):
    """A session of a login that has been granted only so much."""

    login: str
    url: str
    principal: str


Grant = Callable[..., Scoped]


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[..., Session]]:
    """Opens sessions, as the administrator unless another URL is given; they are closed before the database goes."""
    sessions: list[Session] = []

    def open_session(url: str | None = None) -> Session:
        sessions.append(Session(url or database_url))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()


@pytest.fixture
def db(connect: Callable[..., Session]) -> Session:
    """One session of the administrator."""
    return connect()


@pytest.fixture
def logins(database_url: str) -> Iterator[Callable[..., tuple[str, str]]]:
    """Makes login roles; answers name and URL.  They are dropped at the end."""
    made: list[sql.Identifier] = []

    def make(prefix: str = "login") -> tuple[str, str]:
        name = unique_name(prefix)
        with psycopg.connect(database_url, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(sql.Identifier(name)))
        made.append(sql.Identifier(name))
        parts = urlsplit(database_url)
        address = parts.netloc.rpartition("@")[2]
        return name, urlunsplit(parts._replace(netloc=f"{name}:secret@{address}"))

    yield make
    with psycopg.connect(database_url, autocommit=True) as conn:
        for name in made:
            conn.execute(
                sql.SQL("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {}").format(
                    sql.Literal(name.as_string(conn).strip('"'))
                )
            )
            conn.execute(sql.SQL("DROP OWNED BY {}").format(name))
            conn.execute(sql.SQL("DROP ROLE {}").format(name))


@pytest.fixture
def grant(db: Session, connect: Callable[..., Session], logins: Callable[..., tuple[str, str]]) -> Iterator[Grant]:
    """Makes a login with grants: ``grant(consume=["a"], produce=["b"])``; answers a session of it."""
    sessions: list[Session] = []

    def make(
        consume: tuple[str, ...] = (),
        produce: tuple[str, ...] = (),
        *,
        principal: str | None = None,
        admin: bool = False,
        kind: str = "application",
    ) -> Scoped:
        name, url = logins()
        db.sql(
            "SELECT durable.grant_login(%s, %s, %s, %s, %s)",
            name,
            principal or name,
            admin,
            Texts(consume),
            Texts(produce),
        )
        role = (
            db.value("SELECT worker::text FROM durable.roles")
            if not admin
            else db.value("SELECT admin::text FROM durable.roles")
        )
        db.conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), sql.Identifier(name)))
        db.sql("UPDATE durable.principal SET kind = %s WHERE name = %s", kind, principal or name)
        session = Scoped(url)
        session.login, session.url = name, url
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


Limited = Callable[..., Scoped]


@pytest.fixture
def limited(db: Session, database_url: str) -> Iterator[Limited]:
    """Provisions a login with limits: ``limited(produce=("a",), max_live=10)``; answers a session of it."""
    sessions: list[Scoped] = []

    def make(consume: tuple[str, ...] = ("own",), produce: tuple[str, ...] = (), **limits: Any) -> Scoped:
        name = unique_name("worker")
        made = provision_worker_role(
            database_url,
            name=name,
            streams=consume,
            produce=produce,
            **{"max_statement": None, "max_transaction": None, **limits},
        )
        # Its settings bind it no longer than it likes.
        db.conn.execute(sql.SQL("ALTER ROLE {} RESET ALL").format(sql.Identifier(made.role)))
        session = Scoped(made.url)
        session.login, session.url, session.principal = made.role, made.url, name
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()
        role = sql.Identifier(session.login)
        db.sql("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = %s", session.login)
        db.conn.execute(sql.SQL("DROP OWNED BY {}").format(role))
        db.conn.execute(sql.SQL("DROP ROLE {}").format(role))
