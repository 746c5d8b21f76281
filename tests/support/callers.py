"""Connections as an application has them, each with its own way to begin and end a transaction."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg
import psycopg2
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

BLOCKING = (
    "psycopg",
    "psycopg autocommit",
    "sqlalchemy connection psycopg",
    "sqlalchemy connection psycopg2",
    "sqlalchemy session psycopg",
    "sqlalchemy session psycopg2",
    "django",
)
AWAITED = (
    "psycopg",
    "psycopg autocommit",
    "sqlalchemy connection psycopg",
    "sqlalchemy connection asyncpg",
    "sqlalchemy session psycopg",
    "sqlalchemy session asyncpg",
)


class Caller:
    """A connection that blocks.

    Attributes:
      connection: what ``using`` is given.
    """

    def __init__(self, kind: str, url: str) -> None:
        library, _, rest = kind.partition(" ")
        self.engine: Any = None
        self.connection: Any
        if library == "psycopg":
            self.connection = psycopg.connect(url, autocommit=rest == "autocommit")
        elif library == "django":
            self.connection = django_connection(url)
        else:
            form, driver = rest.split()
            connect = {"psycopg": psycopg.connect, "psycopg2": psycopg2.connect}[driver]
            self.engine = sqlalchemy.create_engine(f"postgresql+{driver}://", creator=lambda: connect(url))
            self.connection = self.engine.connect() if form == "connection" else Session(self.engine)
        self.library = library

    def execute(self, statement: str) -> None:
        if self.library == "psycopg":
            self.connection.execute(statement.encode())
        elif self.library == "django":
            with self.connection.cursor() as cursor:
                cursor.execute(statement)
        else:
            self.connection.execute(sqlalchemy.text(statement))

    def transaction(self) -> AbstractContextManager[Any]:
        if self.library == "psycopg":
            return self.connection.transaction()  # type: ignore[no-any-return]
        if self.library == "django":
            from django.db import transaction

            return transaction.atomic(using=self.connection.alias)
        return self.connection.begin()  # type: ignore[no-any-return]

    def savepoint(self) -> AbstractContextManager[Any]:
        return self.connection.begin_nested() if self.engine is not None else self.transaction()

    def close(self) -> None:
        self.connection.close()
        if self.engine is not None:
            self.engine.dispose()


class AsyncCaller:
    """A connection that is awaited.

    Attributes:
      connection: what ``using`` is given.
    """

    connection: Any
    engine: Any

    @classmethod
    async def open(cls, kind: str, url: str) -> AsyncCaller:
        self = cls()
        library, _, rest = kind.partition(" ")
        self.engine = None
        if library == "psycopg":
            self.connection = await psycopg.AsyncConnection.connect(url, autocommit=rest == "autocommit")
        else:
            form, driver = rest.split()

            async def connect() -> Any:
                if driver == "psycopg":
                    return await psycopg.AsyncConnection.connect(url)
                import asyncpg

                return await asyncpg.connect(url)

            self.engine = create_async_engine(f"postgresql+{driver}://", async_creator=connect)
            self.connection = AsyncSession(self.engine) if form == "session" else await self.engine.connect()
        return self

    async def execute(self, statement: str) -> None:
        if self.engine is None:
            await self.connection.execute(statement.encode())
        else:
            await self.connection.execute(sqlalchemy.text(statement))

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        return self.connection.transaction() if self.engine is None else self.connection.begin()

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        return self.connection.transaction() if self.engine is None else self.connection.begin_nested()

    async def close(self) -> None:
        await self.connection.close()
        if self.engine is not None:
            await self.engine.dispose()


def django_connection(url: str) -> Any:
    """Django's own default connection, now to this database."""
    import django
    from django.conf import settings
    from django.db import connection, connections

    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    default = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.lstrip("/"),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or query.get("host", ""),
        "PORT": str(parts.port or query.get("port", "")),
    }
    if not settings.configured:
        settings.configure(DATABASES={"default": default}, USE_TZ=True)
        django.setup()
    connections.settings["default"].update(default)
    if hasattr(connections._connections, "default"):
        connections["default"].close()
        del connections["default"]
    return connection
