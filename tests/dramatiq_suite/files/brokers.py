"""Our broker under the names, and with the parameters, of Dramatiq's own ones.

This is the suite's ``tests/__init__.py``: pytest, and the workers that the suite starts, import it before any test, so
that modules which make a broker of Dramatiq's make one of ours.
"""

from __future__ import annotations

import os
from typing import Any

import dramatiq.brokers.redis
import dramatiq.brokers.stub

import dramatiq_durable as durable

URL = os.environ["SUITE_DATABASE_URL"]


class RedisBroker(durable.DurableBroker):
    def __init__(self, *, middleware: list[Any] | None = None) -> None:
        super().__init__(URL, middleware=middleware)


class StubBroker(durable.DurableBroker):
    def __init__(self, middleware: list[Any] | None = None, *, fail_fast_default: bool = True) -> None:
        super().__init__(URL, middleware=middleware, fail_fast_default=fail_fast_default)


dramatiq.brokers.redis.RedisBroker = RedisBroker  # type: ignore[misc, assignment]
dramatiq.brokers.stub.StubBroker = StubBroker  # type: ignore[misc, assignment]
