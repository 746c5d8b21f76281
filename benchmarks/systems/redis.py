"""Dramatiq on Redis, at its defaults; ``dramatiq_queue_prefetch`` in the environment tunes it."""

from __future__ import annotations

from dramatiq.brokers.redis import RedisBroker

from benchmarks.systems.dramatiq_based import DramatiqSystem


class Contender(DramatiqSystem):
    def connect(self, url: str) -> RedisBroker:
        return RedisBroker(url=url)
