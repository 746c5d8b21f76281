"""dramatiq-postgres, at its defaults."""

from __future__ import annotations

import psycopg
from dramatiq_postgres import PostgresBroker, init

from benchmarks.systems.dramatiq_based import DramatiqSystem


class Contender(DramatiqSystem):
    def connect(self, url: str) -> PostgresBroker:
        return PostgresBroker(url=url, schema="dramatiq", prefix="")

    def prepare(self) -> None:
        with psycopg.connect(self.url) as conn:
            init(conn.cursor())
