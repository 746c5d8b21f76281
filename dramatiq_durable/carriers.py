"""Connections that are not ours, with the caller's transaction on them: how a call of ours is made there.

The same text goes to every driver: its parameters are texts that the statement casts, and its answer is one text.
None of the libraries is imported here: whoever has such a connection has imported its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from .errors import DatabaseUnavailable, DurableError, LimitReached, NotConfigured, NotPermitted, SchemaOutOfDate


class Call(NamedTuple):
    """A statement with one text for an answer; ``{}`` stands for each parameter."""

    text: str
    parameters: list[str]

    def marked(self) -> bytes:
        """The statement with the parameters' marks of psycopg (and Django)."""
        return self.text.format(*["%s"] * len(self.parameters)).encode()


class Place(NamedTuple):
    """Where in a transaction something was sent: which one it is, if one has begun, and its innermost savepoint."""

    transaction: Any
    savepoint: Any


class Carrier(Protocol):
    """A connection that blocks."""

    def open(self) -> Any:
        """The driver's own connection.

        Raises:
          DurableError: there is no transaction that could be sent in; nothing was done to the one there is.
        """
        ...

    def ask(self, call: Call) -> str: ...


class AsyncCarrier(Protocol):
    """A connection that is awaited."""

    async def open(self) -> Any: ...

    async def ask(self, call: Call) -> str: ...

    def place(self) -> Place: ...


# --- psycopg -------------------------------------------------------------------------------------------------


def _check_psycopg(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    if conn.closed:
        raise DurableError("the connection given to using() is closed")
    status = conn.info.transaction_status
    if status == TransactionStatus.INERROR:
        raise DurableError(_FAILED)
    if conn.autocommit and status == TransactionStatus.IDLE:
        raise DurableError(
            "the connection given to using() is in autocommit mode and has no transaction open: send inside of "
            "`with conn.transaction():`"
        )


class PsycopgCarrier:
    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn

    def open(self) -> Any:
        _check_psycopg(self._conn)
        return self._conn

    def ask(self, call: Call) -> str:
        # Not the connection's own kind of cursor: its rows and its marks may be of any kind.
        with psycopg.Cursor(self._conn, row_factory=tuple_row) as cursor:
            row = cursor.execute(call.marked(), call.parameters).fetchone()
        assert row is not None
        return str(row[0])


class AsyncPsycopgCarrier:
    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._conn = conn

    async def open(self) -> Any:
        _check_psycopg(self._conn)
        return self._conn

    async def ask(self, call: Call) -> str:
        async with psycopg.AsyncCursor(self._conn, row_factory=tuple_row) as cursor:
            await cursor.execute(call.marked(), call.parameters)
            row = await cursor.fetchone()
        assert row is not None
        return str(row[0])

    def place(self) -> Place:
        begun = self._conn.info.transaction_status != TransactionStatus.IDLE
        # How deep conn.transaction() blocks are nested, which psycopg tells in no other way.
        return Place(begun or None, getattr(self._conn, "_num_transactions", 0))


# --- Django ---------------------------------------------------------------------------------------------------


class DjangoCarrier:
    """``django.db.connection``, or one of ``connections``, with whichever driver it has."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def open(self) -> Any:
        if self._connection.vendor != "postgresql":
            raise NotConfigured(
                f"the connection given to using() is to {self._connection.display_name}, and messages are kept in "
                "PostgreSQL: give it the connection of the database that DRAMATIQ_DURABLE_URL names"
            )
        if self._connection.needs_rollback:
            raise DurableError(_FAILED)
        if not self._connection.in_atomic_block and self._connection.get_autocommit():
            raise DurableError(
                "the connection given to using() has no transaction open: send inside of "
                "`with django.db.transaction.atomic():`"
            )
        return self._connection.connection

    def ask(self, call: Call) -> str:
        with self._connection.cursor() as cursor:
            cursor.execute(call.marked().decode(), call.parameters)
            return str(cursor.fetchone()[0])


# --- SQLAlchemy -----------------------------------------------------------------------------------------------


class SQLAlchemyCarrier:
    """A Connection or a Session."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def _connection(self) -> Any:
        return self._target.connection() if hasattr(self._target, "get_bind") else self._target

    def open(self) -> Any:
        connection = self._connection()
        if connection.dialect.name != "postgresql":
            raise NotConfigured(
                f"the connection given to using() is to {connection.dialect.name}, and messages are kept in "
                "PostgreSQL: give it one to the database that DRAMATIQ_DURABLE_URL names"
            )
        pooled = connection.connection
        if getattr(pooled.dbapi_connection, "autocommit", False):
            raise DurableError(
                "the connection given to using() is in autocommit mode and has no transaction: use one without "
                'isolation_level="AUTOCOMMIT"'
            )
        return pooled.driver_connection

    def ask(self, call: Call) -> str:
        from sqlalchemy import text

        names = [f"p{n}" for n in range(len(call.parameters))]
        statement = text(call.text.format(*(f":{name}" for name in names)))
        return str(self._connection().execute(statement, dict(zip(names, call.parameters, strict=True))).scalar_one())


class AsyncSQLAlchemyCarrier:
    """An AsyncConnection or an AsyncSession: SQLAlchemy's own bridge runs what the blocking one does."""

    def __init__(self, target: Any) -> None:
        self._target = target

    async def open(self) -> Any:
        return await self._target.run_sync(lambda sync: SQLAlchemyCarrier(sync).open())

    async def ask(self, call: Call) -> str:
        return str(await self._target.run_sync(lambda sync: SQLAlchemyCarrier(sync).ask(call)))

    def place(self) -> Place:
        sync = self._target.sync_session if hasattr(self._target, "sync_session") else self._target.sync_connection
        if sync is None:
            return Place(None, None)
        return Place(sync.get_transaction(), sync.get_nested_transaction())


# --- which is which -------------------------------------------------------------------------------------------


def _is(connection: Any, module: str, *names: str) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(connection, tuple(getattr(loaded, name) for name in names))


def carrier_of(connection: Any) -> Carrier | None:
    """The carrier of a connection that blocks, if it is one."""
    if isinstance(connection, psycopg.Connection):
        return PsycopgCarrier(connection)
    if _is(connection, "sqlalchemy.orm", "scoped_session"):
        return SQLAlchemyCarrier(connection())
    if _is(connection, "sqlalchemy.engine", "Connection") or _is(connection, "sqlalchemy.orm", "Session"):
        return SQLAlchemyCarrier(connection)
    if _is(connection, "django.db.backends.base.base", "BaseDatabaseWrapper"):
        return DjangoCarrier(connection)
    # What stands for the connection of each thread; Django's caches have such a thing too.
    if _is(connection, "django.utils.connection", "ConnectionProxy") and hasattr(connection, "in_atomic_block"):
        return DjangoCarrier(connection)
    return None


def async_carrier_of(connection: Any) -> AsyncCarrier | None:
    """The carrier of a connection that is awaited, if it is one."""
    if isinstance(connection, psycopg.AsyncConnection):
        return AsyncPsycopgCarrier(connection)
    if _is(connection, "sqlalchemy.ext.asyncio", "async_scoped_session"):
        return AsyncSQLAlchemyCarrier(connection())
    if _is(connection, "sqlalchemy.ext.asyncio", "AsyncConnection", "AsyncSession"):
        return AsyncSQLAlchemyCarrier(connection)
    return None


# --- errors ---------------------------------------------------------------------------------------------------

_FAILED = (
    "the transaction of the connection given to using() has failed already: roll it back (or back to a savepoint) "
    "before anything is sent in it"
)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Says what went wrong in our own words where there are any; the driver's other errors go through as they are."""
    try:
        yield
    except DurableError:
        raise
    except Exception as e:
        explained = _explained(e)
        if explained is None:
            raise
        raise explained from e


def _explained(error: Exception) -> DurableError | None:
    state = _sqlstate(error)
    if state == "DD001":
        return NotPermitted("no such stream or workflow, or the login of this connection may not use it")
    if state == "DD007":
        return LimitReached("max_live: the login of this connection has as much under way as it may")
    if state == "25P02":
        return DurableError(_FAILED)
    if state == "55P03":
        return DatabaseUnavailable(
            "something in the database stayed locked, and the transaction has failed: roll it back and try again"
        )
    if state == "42883":
        return SchemaOutOfDate(
            "the namespace misses a procedure of this package's: `dramatiq-durable check` says what mends that"
        )
    if state is None and _is(error, "sqlalchemy.exc", "SQLAlchemyError"):
        return DurableError(f"nothing can be sent in this transaction: {error}")
    return None


def _sqlstate(error: BaseException | None) -> str | None:
    """The SQLSTATE of a driver's error, also where SQLAlchemy or Django has wrapped it."""
    seen = 0
    while error is not None and seen < 5:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if state is not None:
            return str(state)
        error, seen = getattr(error, "orig", None) or error.__cause__, seen + 1
    return None
