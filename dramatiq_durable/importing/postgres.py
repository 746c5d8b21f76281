"""The PostgresBrokers of dramatiq-pg and dramatiq-postgres, as sources.

Both keep all messages in one table: queued (the delayed ones under the queue's name with ``.DQ``), consumed (which a
worker has), and rejected.  A batch is locked until it is stored here, and deleted in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import NAMESPACE_OID, UUID, uuid5

import psycopg
from psycopg import sql

from ..errors import ImportFailed, NotConfigured
from .source import MAX_BYTES, Counts, Found, Place, check_scheme


class PostgresSource:
    """The queues of a PostgresBroker.

    Parameters:
      url(str): of the database that has them.
      schema(str), prefix(str): as the PostgresBroker has them.

    Raises:
      NotConfigured: the URL is wrong, or the database has no such table.
      ImportFailed: the server cannot be reached.
    """

    title = "Postgres"
    lists = True

    def __init__(self, url: str, schema: str = "dramatiq", prefix: str = "") -> None:
        check_scheme(url, self.title, ("postgresql", "postgres"), "postgresql://user:password@localhost:5432/database")
        self.table = sql.Identifier(schema, f"{prefix}queue")
        try:
            with self.errors():
                self.conn = psycopg.connect(url, connect_timeout=10)
        except psycopg.ProgrammingError as e:
            raise NotConfigured(f"the URL of Postgres cannot be read: {e}") from e
        try:
            with self.errors():
                self._identity = self._identify(schema, f"{prefix}queue")
        except BaseException:
            self.close()
            raise

    def _identify(self, schema: str, table: str) -> UUID:
        row = self.conn.execute(
            "SELECT d.oid::text, d.datname::text, c.oid::text FROM pg_database d, pg_class c"
            " JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE d.datname = current_database() AND n.nspname = %s AND c.relname = %s",
            [schema, table],
        ).fetchone()
        self.conn.rollback()
        if row is None:
            raise NotConfigured(
                f"the database has no table {schema}.{table}: say with --schema and --prefix what its broker has"
            )
        return uuid5(NAMESPACE_OID, f"postgres {' '.join(row)}")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What that database refuses, told apart from our own."""
        try:
            yield
        except psycopg.ProgrammingError as e:
            if e.sqlstate is None:
                raise
            raise ImportFailed(f"the other database refused: {e.diag.message_primary}") from e
        except psycopg.Error as e:
            text = " ".join((e.diag.message_primary or str(e)).split())
            raise ImportFailed(f"the other database failed: {text}. It is safe to import again") from e

    def identity(self) -> UUID:
        return self._identity

    def queues(self, candidates: Sequence[str]) -> list[str]:
        query = sql.SQL("SELECT DISTINCT regexp_replace(queue_name, '\\.DQ$', '') FROM {} WHERE state::text <> 'done'")
        with self.errors(), self.conn.transaction():
            return sorted(row[0] for row in self.conn.execute(query.format(self.table)))

    def count(self, queue: str) -> Counts:
        query = sql.SQL(
            "SELECT count(*) FILTER (WHERE state = 'queued' AND queue_name = %(ready)s),"
            " count(*) FILTER (WHERE state = 'queued' AND queue_name <> %(ready)s),"
            " count(*) FILTER (WHERE state = 'rejected'), count(*) FILTER (WHERE state = 'consumed')"
            " FROM {} WHERE queue_name IN (%(ready)s, %(delayed)s)"
        )
        with self.errors(), self.conn.transaction():
            names = {"ready": queue, "delayed": f"{queue}.DQ"}
            return Counts(*(self.conn.execute(query.format(self.table), names).fetchone() or ()))

    def open(self, queue: str, place: Place) -> _Rows:
        names = {"ready": [queue], "delayed": [f"{queue}.DQ"], "dead": [queue, f"{queue}.DQ"]}[place]
        return _Rows(self, names, "rejected" if place == "dead" else "queued")

    def close(self) -> None:
        self.conn.close()


class _Rows:
    """The rows of one place; each `take` opens a transaction, and the `settle` that follows ends it."""

    def __init__(self, source: PostgresSource, names: list[str], state: str) -> None:
        self._source = source
        self._names = names
        self._state = state
        self._left: list[UUID] = []

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._source.conn.closed:
            self._source.conn.rollback()

    def take(self, limit: int) -> list[Found]:
        query = sql.SQL(
            "SELECT message_id, message::text, (extract(epoch FROM mtime) * 1000)::bigint FROM {}"
            " WHERE queue_name = ANY (%s) AND state::text = %s AND NOT message_id = ANY (%s)"
            " ORDER BY mtime, message_id LIMIT %s FOR UPDATE SKIP LOCKED"
        ).format(self._source.table)
        found: list[Found] = []
        size = 0
        with self._source.errors():
            for message_id, text, time in self._source.conn.execute(
                query, [self._names, self._state, self._left, limit]
            ):
                payload = None if text is None else text.encode()
                size += len(payload or b"")
                # All that is taken has to fit into one transaction here: only then it is one there.
                if found and size > MAX_BYTES:
                    break
                found.append(Found(message_id, payload, time if self._state == "rejected" else None))
        return found

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        self._left.extend(found.handle for found in left)
        if moved:
            query = sql.SQL("DELETE FROM {} WHERE message_id = ANY (%s)").format(self._source.table)
            with self._source.errors():
                self._source.conn.execute(query, [[found.handle for found in moved]])
                self._source.conn.commit()
