"""The least that a Python program does to store a message in Postgres: one prepared INSERT of one row, committed."""

from __future__ import annotations

import psycopg

from benchmarks.systems.base import PAYLOAD, System

#: The least that a queue's table has: an order, a stream, a time, and the message.
TABLE = """
CREATE TABLE queue (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream int NOT NULL,
    due timestamptz NOT NULL DEFAULT now(),
    payload bytea NOT NULL
)
"""


class Contender(System):
    def __init__(self, url: str, streams: int) -> None:
        super().__init__(url, streams)
        self.conn = psycopg.connect(url, autocommit=True)

    def prepare(self) -> None:
        self.conn.execute(TABLE)

    def send(self, text: str) -> None:
        payload = text.encode().ljust(PAYLOAD)  # what Dramatiq puts around the text
        self.conn.execute("INSERT INTO queue (stream, payload) VALUES (1, %b)", (payload,), prepare=True)
