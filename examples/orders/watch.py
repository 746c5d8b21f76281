"""What the demo reads from the database, and from the file of calls, while the orders run."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from .display import Phases

PHASES = """
    WITH orders AS (SELECT run_id, workflow_id, status FROM durable.run WHERE name = 'order'),
    charged AS (SELECT DISTINCT order_id FROM shop.charge)
    SELECT (SELECT count(*) FROM orders),
           (SELECT count(*) FROM charged),
           (SELECT count(*) FROM orders o JOIN charged c ON o.workflow_id = 'order-' || c.order_id
            WHERE o.status = 'running' AND NOT EXISTS (
                SELECT 1 FROM durable.event e WHERE e.run_id = o.run_id AND e.type = 'SignalReceived')),
           (SELECT count(DISTINCT order_id) FROM shop.shipment),
           (SELECT count(*) FROM orders WHERE status <> 'running')
"""

LEASED = """
    SELECT w.pid, w.worker_id, count(m.message_id)
    FROM durable.worker w LEFT JOIN durable.message m ON m.worker_id = w.worker_id
    GROUP BY 1, 2 ORDER BY 3 DESC
"""


class Watch:
    """A look into the database that takes an outage for what it is here: a part of the show."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._conn: psycopg.Connection[tuple[Any, ...]] | None = None

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]] | None:
        """The rows of a query; None while the database is away."""
        try:
            if self._conn is None:
                self._conn = psycopg.connect(self._url, autocommit=True)
            return self._conn.execute(query.encode(), parameters).fetchall()
        except psycopg.OperationalError:
            self.close()
            return None

    def phases(self) -> Phases | None:
        found = self.rows(PHASES)
        return Phases(*found[0]) if found else None

    def waiting(self) -> int | None:
        """How many messages there are; None while the database is away."""
        found = self.rows("SELECT count(*) FROM durable.message")
        return found[0][0] if found else None

    def workers(self) -> list[tuple[int, int, int]]:
        """Each worker's pid, number, and how many messages it has leased; the busiest first."""
        return [(pid, worker, leased) for pid, worker, leased in self.rows(LEASED) or ()]

    def leased_by(self, worker: int) -> dict[Any, int] | None:
        """The messages that a worker has leased, and at which attempt."""
        found = self.rows("SELECT message_id, attempt FROM durable.message WHERE worker_id = %s", worker)
        return None if found is None else dict(found)

    def resting(self, messages: Mapping[Any, int], dead: int) -> set[Any]:
        """Which of these messages nobody has worked on again."""
        found = self.rows(
            "SELECT message_id, attempt FROM durable.message WHERE message_id = ANY (%s)"
            " AND (lease_token IS NULL OR worker_id = %s)",
            list(messages),
            dead,
        )
        # One at a later attempt was worked on, and failed; of what cannot be seen now nothing is known.
        return set(messages) if found is None else {key for key, attempt in found if attempt == messages[key]}

    def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(psycopg.Error):
                conn.close()


@dataclass(frozen=True, slots=True)
class Calls:
    """What the activities have asked of the outside world.

    Attributes:
      made(int): calls, each of them an execution of an activity.
      failed(int): of these, how many failed because a row says so, and were retried.
      repeated(int): executions whose outcome was lost with a worker or with Postgres: the activity ran again.
    """

    made: int
    failed: int
    repeated: int

    @classmethod
    def read(cls, path: Path) -> Calls:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        failed = sum(line["fails"] for line in lines)
        # An activity that did not fail has one execution that counts.
        went_through = Counter((line["activity"], line["order"]) for line in lines if not line["fails"])
        return cls(len(lines), failed, sum(went_through.values()) - len(went_through))
