"""What the suite's modules import from beside them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import dramatiq
import pika
import pytest
from dramatiq.threading import is_gevent_active

RABBITMQ_USERNAME = RABBITMQ_PASSWORD = "guest"
RABBITMQ_CREDENTIALS = pika.PlainCredentials(RABBITMQ_USERNAME, RABBITMQ_PASSWORD)


def skip_if(condition: bool, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(condition, reason=reason)


skip_in_ci = skip_if(False, "")
skip_on_windows = skip_if(os.name == "nt", "not for Windows")
skip_on_pypy = skip_if(sys.implementation.name == "pypy", "PyPy cannot interrupt threads")
skip_with_gevent = skip_if(is_gevent_active(), "not for gevent")
skip_without_gevent = skip_if(not is_gevent_active(), "for gevent")
skip_unless_rabbit_mq = skip_if(True, "makes a connection to RabbitMQ")


@contextlib.contextmanager
def worker(*arguments: Any, **options: Any) -> Iterator[dramatiq.Worker]:
    """A worker that runs as long as the block does."""
    running = dramatiq.Worker(*arguments, **options)
    running.start()
    try:
        yield running
    finally:
        running.stop()
