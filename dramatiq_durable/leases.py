"""This process as a worker: its registration, its heartbeat, and its watch over its peers.

A worker is dead when its heartbeat stood still for its whole ``reclaim_delay``, as seen by somebody who was connected
all the time: a peer that was itself cut off starts its observation anew, so that an outage of Postgres ages no lease.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .database import Connection
from .procedures import Procedures

logger = logging.getLogger(__name__)

#: How often a worker forgets what has expired in the namespace, in seconds.
SWEEP = 60.0

#: A sweep that has forgotten so many has left some; how long a heartbeat goes on with it, in seconds.
MANY_SWEPT = 5000
SWEEPING = 0.2


@dataclass(slots=True)
class _Sight:
    """When a peer's heartbeat was first seen at its present count."""

    beat: int
    since: float


class Membership:
    """The registration of this process as a worker, and what it knows of its peers.

    Parameters:
      procedures(Procedures): the namespace's.
      reclaim_delay(float): seconds of silence after which this worker is to be taken for dead.
      reclaim_count(int): after so many deaths under its leases a message is poison.
    """

    def __init__(self, procedures: Procedures, reclaim_delay: float, reclaim_count: int) -> None:
        self.procedures = procedures
        self.reclaim_delay = reclaim_delay
        self.reclaim_count = reclaim_count
        #: Seconds between two heartbeats: several may be lost before the worker counts as dead.
        self.interval = max(0.25, min(reclaim_delay / 4, 5.0))
        self.token: bytes | None = None
        self.worker_id = 0
        self._peers: dict[int, _Sight] = {}
        self._next_beat = 0.0
        #: What had ended here at the last heartbeat, and when that was.
        self._ended: tuple[dict[int, int], float] = {}, 0.0
        # Many workers that start together do not sweep together.
        self._next_sweep = time.monotonic() + random.uniform(0.1, 1) * SWEEP

    def register(self, conn: Connection, streams: list[int], threads: int) -> bytes:
        """Register (again); answers the token that later calls have to show."""
        self.token, self.worker_id = self.procedures.register_worker(
            conn,
            socket.gethostname(),
            os.getpid(),
            threads,
            streams,
            int(self.reclaim_delay * 1000),
            self.reclaim_count,
        )
        logger.info("registered as worker %d", self.worker_id)
        self._peers.clear()
        self._ended = self.procedures.metrics.ended(), time.monotonic()
        self._next_beat = time.monotonic() + self.interval
        return self.token

    def forget_peers(self) -> None:
        """The connection was lost: what was seen before does not count."""
        self._peers.clear()

    def due_in(self) -> float:
        """Seconds until the next heartbeat."""
        return self._next_beat - time.monotonic()

    def beat(self, conn: Connection, holding: Sequence[bytes]) -> None:
        """Send a heartbeat that names what is held here, look at the peers, and take back what dead ones held."""
        assert self.token is not None
        now = time.monotonic()
        self._next_beat = now + self.interval
        seen: dict[int, _Sight] = {}
        ended = self.procedures.metrics.ended()
        before, at = self._ended
        lately = {s: (n - before.get(s, 0)) / max(now - at, 0.001) for s, n in ended.items() if n > before.get(s, 0)}
        peers = self.procedures.heartbeat(conn, self.token, holding, lately)
        self._ended = ended, now
        for peer, beat, delay in peers:
            sight = self._peers.get(peer)
            if sight is None or sight.beat != beat:
                sight = _Sight(beat, now)
            elif now - sight.since > delay / 1000:
                reclaimed, dead = self.procedures.reclaim(conn, self.token, peer, beat)
                if reclaimed or dead:
                    logger.warning(
                        "worker %d is dead: handed %d of its messages back, dead-lettered %d as poison%s",
                        peer,
                        reclaimed,
                        dead,
                        " (dramatiq-durable dead-letter list --reason poison)" if dead else "",
                    )
            seen[peer] = sight
        self._peers = seen
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP
            # A worker stores thousands of results a second, and as many expire: what is left is for the next heartbeat.
            while self.procedures.sweep(conn, self.token) >= MANY_SWEPT:
                if time.monotonic() > now + SWEEPING:
                    self._next_sweep = now
                    break
