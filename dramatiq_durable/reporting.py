"""What a worker process says of what runs in it for longer than a moment, and what it is told of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .attempt import send_heartbeat
from .database import Connection
from .delivery import Delivery
from .errors import Abort, DatabaseUnavailable
from .leases import Membership


class Reports:
    """Reports what runs here, and interrupts what is to be aborted.

    Parameters:
      membership(Membership): this process as a worker.
      as_worker(Callable): makes a call with its token.
      period(float): seconds between two reports, and for how long something runs before it is reported.

    Attributes:
      told(bool): something that runs here may have been aborted.
    """

    def __init__(
        self, membership: Membership, as_worker: Callable[[Callable[[Connection, bytes], Any]], Any], period: float
    ) -> None:
        self.membership = membership
        self.period = period
        self.told = False
        self._as_worker = as_worker
        self._next_report = 0.0

    def due(self) -> bool:
        return self.told or time.monotonic() >= self._next_report

    def report(self, everything: dict[bytes, Delivery]) -> None:
        """Say what runs for longer than a moment, and interrupt what is to be aborted.

        While only short messages run nothing is said, unless somebody asks.

        Raises:
          LeaseLost: this worker was declared dead.
          DatabaseUnavailable: the database cannot be reached.
        """
        now = time.monotonic()
        told, self.told = self.told, False
        self._next_report = now + self.period
        held = list(everything.values())
        running = [(d, now - d.begun) for d in held if d.begun is not None]
        long_ones = [(d.key, int(age * 1000)) for d, age in running if age >= self.period]
        if self.membership.token is None or not everything or not (told or long_ones):
            return
        # What has not begun may be cancelled, too: then it does not begin.
        looked_at = held if told else [d for d, age in running if age >= self.period]
        activities = [d for d in looked_at if d.kind == "a"]
        for activity in activities:
            if activity.unsaid and not activity.settled:
                send_heartbeat(activity)
        keys, ages = [key for key, _ in long_ones], [age for _, age in long_ones]
        procedures = self.membership.procedures
        try:
            leases = self._as_worker(lambda conn, token: procedures.report_running(conn, token, keys, ages))
            if activities:
                named = [d.key for d in activities], [d.lease for d in activities]
                doomed = self._as_worker(lambda conn, token: procedures.doomed_activities(conn, token, *named))
                for n, reason in doomed:
                    activities[n - 1].doom(reason)
        except DatabaseUnavailable:
            self.told = True
            raise
        for lease in leases:
            delivery = everything.get(lease)
            if delivery is not None:
                delivery.interrupt(Abort)
