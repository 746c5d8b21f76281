"""Counting what Postgres did between two moments, from outside the measured database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg


@dataclass
class Counted:
    """What happened between two moments.

    Attributes:
      seconds(float): how long it was.
      commits(int): transactions that wrote.
      wal(int): bytes of WAL, all of them.
      images(int | None): those of full-page images among them; None: this server cannot tell.
    """

    seconds: float = 0.0
    commits: int = 0
    wal: int = 0
    images: int | None = None


class Counters:
    """A server's own counters.

    Parameters:
      admin(Connection): a superuser's connection to a database in which nothing is measured.
    """

    def __init__(self, admin: psycopg.Connection) -> None:
        self.admin = admin
        self.inspects = self._has("pg_walinspect")
        self.statements = self._has("pg_stat_statements")

    def _has(self, extension: str) -> bool:
        try:
            self.admin.execute(f"CREATE EXTENSION IF NOT EXISTS {extension}".encode())
            if extension == "pg_stat_statements":
                self.admin.execute("SELECT 1 FROM pg_stat_statements LIMIT 1")
        except psycopg.Error:
            return False
        return True

    def _now(self) -> tuple[int, str]:
        """(the next transaction, the end of the WAL): exact, where sessions report their statistics when they like."""
        row = self.admin.execute(
            "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_wal_insert_lsn()::text"
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Count what the block does.  It begins right after a checkpoint: each page that it touches is imaged once."""
        counted = Counted()
        self.admin.execute("CHECKPOINT")
        transaction, begin = self._now()
        began = time.perf_counter()
        yield counted
        counted.seconds = time.perf_counter() - began
        later, end = self._now()
        counted.commits = later - transaction
        row = self.admin.execute("SELECT %s::pg_lsn - %s::pg_lsn", (end, begin)).fetchone()
        assert row is not None
        counted.wal = int(row[0])
        if self.inspects:
            # Its commit writes out what was only inserted so far.
            self.admin.execute("SELECT pg_logical_emit_message(true, 'benchmark', '')")
            row = self.admin.execute(
                "SELECT sum(fpi_size) FROM pg_get_wal_stats(%s::pg_lsn, %s::pg_lsn)", (begin, end)
            ).fetchone()
            assert row is not None
            counted.images = int(row[0] or 0)

    def watch_statements(self, database: str) -> None:
        """Count the statements of a database from its next session on."""
        if self.statements:
            self.admin.execute(f"ALTER DATABASE \"{database}\" SET pg_stat_statements.track = 'top'".encode())
            self.admin.execute(f'ALTER DATABASE "{database}" SET compute_query_id = on'.encode())

    def effort(self, database: str, like: str) -> tuple[float, float]:
        """(pages looked at, milliseconds) of the watched statements of a database whose text is like this."""
        pages = self._sum("shared_blks_hit + s.shared_blks_read", database, like)
        return pages, self._sum("total_exec_time", database, like)

    def _sum(self, column: str, database: str, like: str = "%") -> float:
        query = (
            f"SELECT coalesce(sum(s.{column}), 0) FROM pg_stat_statements AS s "
            "JOIN pg_database AS d ON d.oid = s.dbid WHERE d.datname = %s AND s.query LIKE %s"
        )
        row = self.admin.execute(query.encode(), (database, like)).fetchone()
        assert row is not None
        return float(row[0])

    def done(self, database: str) -> tuple[int, int]:
        """(transactions, statements) of the sessions of a database that have ended."""
        row = self.admin.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s", (database,)
        ).fetchone()
        assert row is not None
        return int(row[0]), int(self._sum("calls", database)) if self.statements else 0

    def wait_until_left(self, database: str) -> None:
        """Wait until a database has no session left."""
        deadline = time.monotonic() + 30
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'"
        while time.monotonic() < deadline:
            row = self.admin.execute(query, (database,)).fetchone()
            if row is not None and not row[0]:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{database} still has sessions")
