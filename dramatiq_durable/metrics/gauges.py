"""What the database says of a namespace: read in one call, bounded, and kept for a while."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import psycopg

from ..database import Connection, Database, is_connection_lost, translate
from ..errors import DurableError
from .catalogue import GAUGES, PREFIX, Metric
from .cells import MOST_NAMES, OTHER, Labels

logger = logging.getLogger(__name__)

#: How long one look may take, in seconds; and how long whoever asks waits for it, before he is told what is known.
TIMEOUT = 15.0
PATIENCE = 5.0

#: The rows of a kind that are counted, before they are estimated.
MOST_COUNTED = 2_000

Rows = list[tuple[str, str | None, str | None, float]]

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


class _Reading(threading.Thread):
    """One look, on a thread of its own: whoever asks need not wait for a database that does not answer."""

    def __init__(self, gauges: Gauges) -> None:
        super().__init__(name="dramatiq-durable-gauges", daemon=True)
        self.begun = time.monotonic()
        self.done = threading.Event()
        self._gauges = gauges

    def run(self) -> None:
        try:
            self._gauges._read(self)
        finally:
            self.done.set()


class Gauges:
    """Looks into a namespace when it is asked, at most once an interval, and never twice at a time.

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
        self._reading: _Reading | None = None
        self._next = 0.0
        self._trouble: str | None = None
        self._told = False

    def look(self) -> Look:
        """What is there now, or was found less than an interval ago.

        Never raises, and answers within `PATIENCE`: as long as the database is slow, with what was found before; of one
        that does not answer nothing is known.
        """
        with self._lock:
            if self._reading is None and time.monotonic() >= self._next:
                self._reading = _Reading(self)
                self._reading.start()
            reading = self._reading
        if reading is None:
            return self._look
        if not reading.done.wait(PATIENCE) and time.monotonic() > reading.begun + TIMEOUT + PATIENCE:
            # Neither the server's own timeout has ended it: there is nobody at the other end.
            self._hang_up()
            return Look(at=self._look.at, took=time.monotonic() - reading.begun)
        return self._look

    def check(self) -> None:
        """Look, and say what is wrong.

        Raises:
          NotPermitted: the login is no monitor's.
          DatabaseUnavailable, NotConfigured, SchemaOutOfDate: as `Database.connect`.
        """
        try:
            self._ask()
        except BaseException:
            self.close()
            raise

    def _read(self, reading: _Reading) -> None:
        trouble = None
        look = Look(at=self._look.at)
        try:
            rows = self._ask()
        except Exception as e:
            # Whatever it is: the next look tries again.
            trouble = str(e) if isinstance(e, DurableError) else repr(e)
        else:
            look = Look(True, time.time(), gauges=bounded(rows))
            self._tell_of_unseen(rows)
        look.took = time.monotonic() - reading.begun
        if trouble != self._trouble:
            # Once: it may last for a night.
            if trouble is None:
                logger.warning("the gauges can be read again")
            else:
                logger.warning("the gauges cannot be read: %s", trouble)
            self._trouble = trouble
        with self._lock:
            self._look, self._next, self._reading = look, time.monotonic() + self.interval, None

    def _ask(self) -> Rows:
        if self._conn is None:
            conn = self.database.connect()
            conn.execute(f"SET statement_timeout = '{TIMEOUT}s'".encode())
            self._conn = conn
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

    def _tell_of_unseen(self, rows: Rows) -> None:
        unseen = next((value for what, _, _, value in rows if what == "unseen_sessions"), 0)
        if unseen and not self._told:
            self._told = True
            logger.warning(
                "the namespace's owner may not see the transactions of %d sessions: the oldest xmin and the oldest "
                "transaction are those that it may see, until an administrator of the server runs "
                "GRANT pg_read_all_stats TO that owner (\\dn+ in psql names it)",
                unseen,
            )

    def _hang_up(self) -> None:
        """Have the thread that waits for the database's answer find its connection broken."""
        with self._lock:
            conn = self._conn
            if conn is None or conn.closed:
                return
            with socket.socket(fileno=os.dup(conn.fileno())) as wire, suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()


def bounded(rows: Iterable[tuple[str, str | None, str | None, float]]) -> dict[Metric, dict[Labels, float]]:
    """Rows of the procedure as gauges.

    Of roles, tables and so on, the 200 with the greatest values keep their names, and of streams first those that
    somebody consumes: the others are added up (of ages the greatest is taken).
    """
    # A namespace may be newer than this package.
    rows = [row for row in rows if row[0] in _BY_NAME]
    loads: dict[str, dict[str, tuple[bool, float]]] = {}
    for what, name, _, value in rows:
        if name is not None:
            load = loads.setdefault(_BY_NAME[what].labels[0], {})
            consumed, sum = load.get(name, (False, 0.0))
            load[name] = (consumed or (what == "stream_workers" and value > 0), sum + value)
    kept = {
        label: set(sorted(names, key=lambda n: (not names[n][0], -names[n][1], n))[:MOST_NAMES])
        for label, names in loads.items()
    }
    found: dict[Metric, dict[Labels, float]] = {metric: {} for metric in GAUGES}
    for what, name, kind, value in rows:
        metric = _BY_NAME[what]
        folded = name if name is None or name in kept[metric.labels[0]] else OTHER
        labels = tuple(label for label in (folded, kind) if label is not None)
        series = found[metric]
        known = series.get(labels, 0.0)
        series[labels] = max(known, value) if metric.unit == "s" else known + value
    return found
