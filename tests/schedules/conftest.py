from __future__ import annotations

from tests.broker.conftest import broker, make_broker, rows, start_worker

__all__ = ["broker", "make_broker", "rows", "start_worker"]
