"""The watchdog: once a second the sessions of provisioned logins that are over their limits are ended.

What a login's own settings (``statement_timeout`` and such) say binds nobody: it can change them.  This process looks
at the server's own account of its sessions, as an administrator of the namespace, and ends what is over.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
from psycopg import sql

from .arrays import Texts
from .database import Connection, Database, translate
from .errors import DatabaseUnavailable, DurableError

logger = logging.getLogger(__name__)

#: Seconds between two looks.
INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A session that was ended, or (``unseen``) one that the namespace's owner may not look at.

    Attributes:
      session(str): names it among all that the server has had.
      pid(int): its process on the server.
      login(str): the role that logged in.
      principal(str): the name of whom the login belongs to.
      why(str): ``statement``, ``transaction``, ``expired``, ``revoked``; or ``unseen``.
      seconds(float): for how long it ran its statement, had its transaction, or was connected.
      allowed(float | None): how many seconds were allowed, where that was the reason.
      address(str): from where it was connected.
    """

    session: str
    pid: int
    login: str
    principal: str
    why: str
    seconds: float
    allowed: float | None
    address: str

    def __str__(self) -> str:
        who = f"{self.login} ({self.principal}), pid {self.pid}, from {self.address}"
        if self.why == "unseen":
            return (
                f"a session of {who} cannot be watched: the namespace's owner is no member of that login. "
                "`dramatiq-durable check` says what mends that"
            )
        what = {
            "statement": f"its statement ran for {self.seconds:.1f} s, {self.allowed} s are allowed",
            "transaction": f"its transaction was open for {self.seconds:.1f} s, {self.allowed} s are allowed",
            "expired": f"its login has expired; it was connected for {self.seconds:.1f} s",
            "revoked": f"its login was revoked; it was connected for {self.seconds:.1f} s",
        }[self.why]
        return f"ended a session of {who}: {what}"


class Watchdog:
    """Looks, and ends what is over.

    Parameters:
      database(Database): the namespace, connected to as one of its administrators.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._conn: Connection | None = None
        self._known: list[str] = []
        self._look = sql.SQL("SELECT * FROM {}.end_sessions(%s, %s, %s)").format(sql.Identifier(database.namespace))

    def look(self) -> list[Ended]:
        """Look once.

        Returns:
          list[Ended]: the sessions that this look has ended, each once.

        Raises:
          NotPermitted: the login is no administrator of the namespace.
          DatabaseUnavailable, NotConfigured, SchemaOutOfDate: as for every use of a namespace.
        """
        try:
            if self._conn is None:
                self._conn = self._database.connect()
            rows = self._conn.execute(self._look, [socket.gethostname(), os.getpid(), Texts(self._known)]).fetchall()
        except psycopg.Error as e:
            self.close()
            raise translate(e) from e
        ended = [Ended(*row) for row in rows]
        # One that takes its time to end is met again; a few hundred are more than end at once.
        self._known = [*self._known, *(e.session for e in ended)][-1000:]
        return ended

    def watch(self, sleep: Callable[[float], object] = time.sleep) -> Iterator[Ended]:
        """Look every second, for ever; a database that is away is waited for.

        Raises:
          DurableError: as `look`, but for a database that was there before.
        """
        away = seen = False
        while True:
            begun = time.monotonic()
            try:
                ended = self.look()
            except DurableError as e:
                if not seen or not isinstance(e, DatabaseUnavailable):
                    raise
                if not away:
                    logger.warning("the database is away, trying again: %s", e)
                away = True
                ended = []
            else:
                if away:
                    logger.warning("connected to the database again")
                away, seen = False, True
            yield from ended
            sleep(max(INTERVAL - (time.monotonic() - begun), 0.05))

    def close(self) -> None:
        """Close the connection."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()
