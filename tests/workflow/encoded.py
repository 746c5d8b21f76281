"""What tests of codecs share: a codec, workers, and everything that the database has of it all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dramatiq
import psycopg
from psycopg import sql

import dramatiq_durable as durable
from examples.codecs import Encrypt

KEY = os.urandom(32)
SECRET = "s3cret"

MakeBroker = Callable[..., durable.DurableBroker]


def encrypt() -> Encrypt:
    return Encrypt({"k1": KEY}, "k1")


@contextmanager
def working(broker: durable.DurableBroker, *queues: str) -> Iterator[None]:
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4, queues=set(queues) or None)
    worker.start()
    try:
        yield
    finally:
        worker.stop(timeout=5000)


def readable(url: str) -> str:
    """All that the database has, as somebody reads it who has nothing but the database."""
    parts = []
    with psycopg.connect(url, autocommit=True) as conn:
        tables = conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'durable'").fetchall()
        for (table,) in tables:
            for (row,) in conn.execute(
                sql.SQL("SELECT to_json(t)::text FROM durable.{} t").format(sql.Identifier(table))
            ):
                parts.append(row)
            columns = conn.execute(
                "SELECT column_name FROM information_schema.columns "
                "WHERE table_schema = 'durable' AND table_name = %s AND data_type = 'bytea'",
                (table,),
            ).fetchall()
            for (column,) in columns:
                query = sql.SQL("SELECT encode({}, 'escape') FROM durable.{} WHERE {} IS NOT NULL").format(
                    sql.Identifier(column), sql.Identifier(table), sql.Identifier(column)
                )
                parts += [row[0] for row in conn.execute(query)]
    return "\n".join(parts)
