"""dramatiq-pg, at its defaults.  It needs Dramatiq 1."""

from __future__ import annotations

import psycopg2
from dramatiq_pg import PostgresBroker, generate_init_sql

from benchmarks.systems.dramatiq_based import DramatiqSystem


class Contender(DramatiqSystem):
    def connect(self, url: str) -> PostgresBroker:
        return PostgresBroker(url=url, schema="dramatiq", prefix="")

    def prepare(self) -> None:
        conn = psycopg2.connect(self.url)
        with conn, conn.cursor() as cursor:
            cursor.execute(generate_init_sql())
        conn.close()
