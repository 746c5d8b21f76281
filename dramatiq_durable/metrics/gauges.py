"""What the database says of a namespace: read in one call, bounded, and kept for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import psycopg

from ..database import Connection, Database, is_connection_lost, translate
from ..errors import DurableError
from .catalogue import GAUGES, PREFIX, Metric
from .recorder import MOST_NAMES, OTHER, Labels

logger = logging.getLogger(__name__)

#: How long one look may take, in seconds.
TIMEOUT = 15

#: The rows of a kind that are counted, before they are estimated.
MOST_COUNTED = 2_000

_BY_NAME = {metric.name.removeprefix(PREFIX): metric for metric in GAUGES}


@dataclass(slots=True)
class Look:
    """What was found.

    Attributes:
      up(bool): whether the database answered.
      at(float): when, in Unix time; 0: never.
      took(float): seconds.
      gauges(dict): each gauge's values by its labels, without the namespace; empty while the database is away.
    """

    up: bool = False
    at: float = 0.0
    took: float = 0.0
    gauges: dict[Metric, dict[Labels, float]] = field(default_factory=dict)


class Gauges:
    """Looks into a namespace when it is asked, at most once an interval.

    Parameters:
      database(Database): the namespace, seen by a login that is a monitor's or an administrator's.
      interval(float): for how many seconds what was found is kept.
    """

    def __init__(self, database: Database, interval: float) -> None:
        self.database = database
        self.interval = interval
        self._lock = threading.Lock()
        self._conn: Connection | None = None
        self._look = Look()
        self._next = 0.0

    def look(self) -> Look:
        """What was found last.  Never raises: of a database that does not answer nothing is known."""
        with self._lock:
            if time.monotonic() >= self._next:
                self._look = self._read()
                self._next = time.monotonic() + self.interval
            return self._look

    def check(self) -> None:
        """Look, and say what is wrong.

        Raises:
          NotPermitted: the login is no monitor's.
          DatabaseUnavailable, NotConfigured, SchemaOutOfDate: as `Database.connect`.
        """
        self._ask()

    def _read(self) -> Look:
        begun = time.monotonic()
        try:
            gauges = bounded(self._ask())
        except DurableError as e:
            logger.warning("the gauges cannot be read: %s", e)
            return Look(took=time.monotonic() - begun, at=self._look.at)
        return Look(True, time.time(), time.monotonic() - begun, gauges)

    def _ask(self) -> list[tuple[str, str | None, str | None, float]]:
        if self._conn is None:
            self._conn = self.database.connect()
            self._conn.execute(f"SET statement_timeout = '{TIMEOUT}s'".encode())
        call = f'SELECT * FROM "{self.database.namespace}".read_gauges(%s)'.encode()
        try:
            return self._conn.execute(call, [MOST_COUNTED]).fetchall()
        except psycopg.Error as e:
            if is_connection_lost(e, self._conn):
                self.close()
            error = translate(e)
            if isinstance(error, DurableError):
                raise error from e
            raise DurableError(str(e).strip()) from e

    def close(self) -> None:
        """Close the connection."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()


def bounded(rows: Iterable[tuple[str, str | None, str | None, float]]) -> dict[Metric, dict[Labels, float]]:
    """Rows of the procedure as gauges.

    Of streams, roles and so on, the 200 with the greatest values keep their names: the others are added up (of ages the
    greatest is taken).
    """
    # A namespace may be newer than this package.
    rows = [row for row in rows if row[0] in _BY_NAME]
    loads: dict[str, dict[str, float]] = {}
    for what, name, _, value in rows:
        if name is not None:
            load = loads.setdefault(_BY_NAME[what].labels[0], {})
            load[name] = load.get(name, 0.0) + value
    kept = {label: set(sorted(names, key=lambda n: (-names[n], n))[:MOST_NAMES]) for label, names in loads.items()}
    found: dict[Metric, dict[Labels, float]] = {metric: {} for metric in GAUGES}
    for what, name, kind, value in rows:
        metric = _BY_NAME[what]
        folded = name if name is None or name in kept[metric.labels[0]] else OTHER
        labels = tuple(label for label in (folded, kind) if label is not None)
        series = found[metric]
        known = series.get(labels, 0.0)
        series[labels] = max(known, value) if metric.unit == "s" else known + value
    return found
