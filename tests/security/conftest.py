from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from dramatiq_durable.arrays import Texts
from tests.sql.api import Session
from tests.support import unique_name


class Scoped(Session):
    """A session of a login that has been granted only so much."""

    login: str
    url: str


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
def logins(database_url: str) -> Iterator[Callable[[], tuple[str, str]]]:
    """Makes login roles; answers name and URL.  They are dropped at the end."""
    made: list[sql.Identifier] = []

    def make() -> tuple[str, str]:
        name = unique_name("login")
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
def grant(db: Session, connect: Callable[..., Session], logins: Callable[[], tuple[str, str]]) -> Iterator[Grant]:
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
