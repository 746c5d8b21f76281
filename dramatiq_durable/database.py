"""Connections to one namespace of one database: how they are opened, pooled, checked, and how their errors read."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Wait

from . import arrays
from .errors import (
    FOREIGN,
    DatabaseUnavailable,
    DurableError,
    InvalidName,
    LeaseLost,
    LimitReached,
    NotConfigured,
    NotPermitted,
    PayloadTooLarge,
    RoleExists,
    RoleNotFound,
    ScheduleExists,
    ScheduleNotFound,
    SchemaOutOfDate,
)
from .migrate import check_namespace, expected_version

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[tuple[Any, ...]]

RV = TypeVar("RV")


class LeadersConnection(psycopg.Connection[tuple[Any, ...]]):
    """One whose thread can do something else while the server works."""

    meanwhile: Callable[[], None] | None = None

    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        if self.meanwhile is not None:
            gen = _and_meanwhile(gen, self.meanwhile)
        return super().wait(gen, *args, **kwargs)


def _and_meanwhile(gen: PQGen[RV], meanwhile: Callable[[], None]) -> PQGen[RV]:
    """What is sent and received, with something else in between: where all was sent, and an answer is waited for."""
    try:
        wants = next(gen)
        while wants != Wait.R:
            wants = gen.send((yield wants))
        meanwhile()
        while True:
            wants = gen.send((yield wants))
    except StopIteration as e:
        return cast(RV, e.value)


_databases: weakref.WeakSet[Database] = weakref.WeakSet()

#: How long one attempt to connect may take, in seconds.
CONNECT_TIMEOUT = 10


class Database:
    """A namespace in a database.  Opening it does no I/O; connections are made when they are needed.

    Parameters:
      url(Callable): answers the connection string; called at the first connection, and again after a fork.
      namespace(str): the schema's name.
      prepared(bool): use server-side prepared statements; off for PgBouncer in transaction mode.
    """

    def __init__(self, url: Callable[[], str], namespace: str = "durable", *, prepared: bool = True) -> None:
        self.namespace = check_namespace(namespace)
        self._url = url
        self._prepared = prepared
        self._conninfo: str | None = None
        self._pool: Any = None
        self._pool_pid = 0
        self._lock = threading.Lock()
        self._checked = False
        #: The longest that a statement on a pooled connection may take, in milliseconds; None: what the server says.
        self.longest: int | None = None
        self._identity: bytes | None = None
        _databases.add(self)

    @property
    def conninfo(self) -> str:
        if self._conninfo is None:
            url = self._url()
            try:
                defaults: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT, "application_name": "dramatiq_durable"}
                self._conninfo = make_conninfo("", **{**defaults, **conninfo_to_dict(url)})
            except psycopg.ProgrammingError as e:
                raise translate_connect_error(e, url) from e
        return self._conninfo

    def connect(self) -> LeadersConnection:
        """A new connection in autocommit mode.

        Raises:
          DatabaseUnavailable: the server cannot be reached, or is starting up.
          NotConfigured: the password, the user or the database is wrong.
          SchemaOutOfDate: the namespace was not migrated to this package's version.
        """
        try:
            conn = LeadersConnection.connect(self.conninfo, autocommit=True)
        except psycopg.Error as e:
            raise translate_connect_error(e, self.conninfo) from e
        try:
            self.configure(conn)
            self._check_schema(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def configure(self, conn: Connection | psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
        """Teach a new connection our types and settings."""
        conn.prepare_threshold = 0 if self._prepared else None
        arrays.register(conn)

    def _check_schema(self, conn: Connection) -> None:
        if self._checked:
            return
        try:
            row = conn.execute(f'SELECT version FROM "{self.namespace}".schema_version()'.encode()).fetchone()
        except (
            psycopg.errors.InvalidSchemaName,
            psycopg.errors.UndefinedFunction,
            psycopg.errors.InsufficientPrivilege,
        ):
            raise SchemaOutOfDate(
                f"the database {conn.info.dbname!r} has no namespace {self.namespace!r} that the login "
                f"{conn.info.user!r} may use. Run `dramatiq-durable migrate` with the database's owner; a login of a "
                "worker also needs `dramatiq-durable role grant`"
            ) from None
        except psycopg.Error as e:
            raise translate(e) from e
        version = row[0] if row else None
        if version is None or version < expected_version():
            raise SchemaOutOfDate(
                f"the namespace {self.namespace!r} is at version {version}, this package needs {expected_version()}. "
                "Run `dramatiq-durable migrate`"
            )
        if version > expected_version():
            logger.warning(
                "the namespace %r is at version %s, newer than this package's %s: upgrade dramatiq-durable",
                self.namespace,
                version,
                expected_version(),
            )
        (fsync,) = conn.execute("SELECT current_setting('fsync')").fetchone() or ("on",)
        if fsync != "on":
            logger.critical(
                "the server runs with fsync=off: whatever it acknowledges is lost when the machine fails. "
                "Set fsync=on and restart it"
            )
        self._checked = True

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A pooled connection in autocommit mode, for short reads and for transactions of activities."""
        import psycopg_pool

        try:
            pool = self._get_pool()
            conn = self._take(pool)
            try:
                with conn:
                    if self.longest is None:
                        yield conn
                    else:
                        # For one transaction: behind a pooler, others have the connection next.
                        with conn.transaction():
                            conn.execute(f"SET LOCAL statement_timeout = {self.longest}".encode())
                            yield conn
            finally:
                pool.putconn(conn)
        except psycopg_pool.PoolTimeout as e:
            raise DatabaseUnavailable(
                f"no connection to the database within {CONNECT_TIMEOUT} s: {_address(self.conninfo)}"
            ) from e

    @contextmanager
    def calling(self) -> Iterator[Connection]:
        """As `connection`, for calls of procedures: the database's errors are raised as ours."""
        try:
            with self.connection() as conn:
                yield conn
        except psycopg.Error as e:
            raise translate(e) from e

    def _get_pool(self) -> Any:
        import psycopg_pool

        with self._lock:
            # A pool's threads and sockets belong to the process that made them.
            if self._pool is None or self._pool_pid != os.getpid():
                # The first connection is made by hand: its errors are clear, the pool's are a timeout.
                self.connect().close()
                self._pool = psycopg_pool.ConnectionPool(
                    self.conninfo,
                    min_size=0,
                    max_size=64,
                    timeout=CONNECT_TIMEOUT,
                    # It tries less and less often.  Whoever asks after that time has it begin anew: a server that was
                    # away for long is not waited for longer than it is away.
                    reconnect_timeout=CONNECT_TIMEOUT,
                    max_idle=60,
                    kwargs={"autocommit": True},
                    configure=self.configure,
                    open=True,
                )
                self._pool_pid = os.getpid()
            return self._pool

    def _take(self, pool: Any) -> Connection:
        """A connection that lives.  The pool's own check waits longer after each dead one, and a restart of the server
        leaves as many as it had: whoever asks next would wait until the timeout."""
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while True:
            conn: Connection = pool.getconn(timeout=max(deadline - time.monotonic(), 0.1))
            try:
                pool.check_connection(conn)
            except BaseException as e:
                pool.putconn(conn)
                if not isinstance(e, psycopg.Error) or time.monotonic() > deadline:
                    raise
            else:
                return conn

    def identity(self, *, again: bool = False) -> bytes:
        """What tells the namespace from any other, also of the same name in another database.

        Parameters:
          again(bool): ask the database also where the answer is known: the namespace may have been made anew.

        Raises:
          DatabaseUnavailable, NotConfigured, SchemaOutOfDate: as `connect`.
        """
        if self._identity is None or again:
            with self.connection() as conn:
                row = conn.execute(
                    f'SELECT id FROM "{self.namespace}".namespace_identity()'.encode(), binary=True
                ).fetchone()
            self._identity = bytes(row[0]) if row else b""
        return self._identity

    def close(self) -> None:
        """Close the pool; connections that were made with `connect` belong to their makers."""
        with self._lock:
            if self._pool is not None and self._pool_pid == os.getpid():
                self._pool.close()
            self._pool = None


def _after_fork() -> None:
    """A thread of the parent may have held a lock, and will never release it here."""
    for database in _databases:
        database._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def is_connection_lost(error: BaseException, conn: Connection) -> bool:
    """Whether an error means that the connection, and with it the transaction's outcome, was lost."""
    return conn.closed or isinstance(error, (psycopg.errors.AdminShutdown, psycopg.errors.CrashShutdown))


def translate(error: psycopg.Error) -> Exception:
    """An error of the database as one of ours, where there is one that says more."""
    if error.sqlstate == "DD001":
        text = error.diag.message_primary or "not permitted"
        return NotPermitted(FOREIGN if FOREIGN.startswith(text) else text)
    if error.sqlstate == "DD002":
        return LeaseLost("this worker was silent for longer than its reclaim_delay and was declared dead")
    if error.sqlstate == "DD004":
        return ScheduleNotFound(f"{error.diag.message_primary}: schedules.list() has the names")
    if error.sqlstate == "DD005":
        return ScheduleExists(
            f"{error.diag.message_primary}: choose another name, or say if_exists='update' to change it, "
            "'keep' to leave it"
        )
    if error.sqlstate == "DD006":
        return DurableError(f"{error.diag.message_primary}: nothing was fired, call again")
    if error.sqlstate == "DD007":
        return LimitReached(f"{error.diag.message_primary}. {error.diag.message_hint}")
    if error.sqlstate == "DD008":
        return RoleExists(f"{error.diag.message_primary}: choose another name; rotate it for another password")
    if error.sqlstate == "DD009":
        return RoleNotFound(f"{error.diag.message_primary}: `dramatiq-durable role list` has the names")
    if error.sqlstate == "DD010":
        return NotPermitted(f"{error.diag.message_primary}; nothing was changed")
    if isinstance(error, psycopg.errors.CheckViolation):
        if "payload" in (error.diag.constraint_name or ""):
            return PayloadTooLarge("the payload is over 16 MiB: keep the data elsewhere and send a reference to it")
        return InvalidName("names of streams, actors and workflows, and ids, have 1 to 200 characters")
    if isinstance(error, psycopg.errors.UndefinedFunction):
        return SchemaOutOfDate(f"{error.diag.message_primary}. `dramatiq-durable check` says what mends that")
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return NotPermitted(
            f"{error.diag.message_primary}: that takes an administrator of the namespace, and this login has only "
            "what it was granted"
        )
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return DatabaseUnavailable(
            "the server takes no writes: it is a standby, or default_transaction_read_only is on. "
            "If this lasts, does DRAMATIQ_DURABLE_URL point to the primary?"
        )
    if isinstance(error, psycopg.OperationalError):
        # Without the context: it is many lines, and the same ones again and again.
        return DatabaseUnavailable(error.diag.message_primary or str(error).strip())
    return error


IS_IT_RUNNING = "Is the server running, and does DRAMATIQ_DURABLE_URL point to it?"


def translate_connect_error(error: psycopg.Error, conninfo: str) -> DurableError:
    """What to do about a connection that could not be made; never shows a password."""
    where = _address(conninfo)
    text = str(error).strip()
    if isinstance(error, psycopg.ProgrammingError):
        return NotConfigured(
            f"the database URL cannot be read ({text}): write it like postgresql://user:password@host:5432/database"
        )
    # A failed log-in has no SQLSTATE on the client's side: only its text tells.
    if "authentication failed" in text or "no password supplied" in text:
        return NotConfigured(f"{where} refused the login: check user and password in DRAMATIQ_DURABLE_URL")
    if 'database "' in text and "does not exist" in text:
        return NotConfigured(f"{where} does not have this database: create it with `createdb`, or correct the URL")
    if 'role "' in text and "does not exist" in text:
        return NotConfigured(f"{where} does not have this role: create it, or correct the user in the URL")
    if "could not translate host name" in text or "failed to resolve host" in text:
        return NotConfigured(f"the host of {where} is unknown: correct DRAMATIQ_DURABLE_URL")
    # libpq asks much the same, on a line of its own.
    text = re.sub(r"\s*Is the server running .*\?", "", text)
    return DatabaseUnavailable(f"cannot connect to {where}: {text}. {IS_IT_RUNNING}")


def _address(conninfo: str) -> str:
    try:
        parts = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        return "the database"
    host, port = parts.get("host", "localhost"), parts.get("port", 5432)
    return f"{parts.get('user', '')}@{host}:{port}/{parts.get('dbname', '')}"
