"""Dramatiq's StubBroker: queues in the memory of one process, the cost of Dramatiq alone."""

from __future__ import annotations

from dramatiq.brokers.stub import StubBroker

from benchmarks.systems.dramatiq_based import DramatiqSystem


class Contender(DramatiqSystem):
    def connect(self, url: str) -> StubBroker:
        return StubBroker()
