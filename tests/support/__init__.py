"""What tests share: names, waiting for conditions, real processes, databases."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parent.parent.parent


def unique_name(prefix: str = "t") -> str:
    """Return a name that nothing in the cluster has: roles and databases are shared by all tests."""
    return f"{prefix}_{uuid.uuid4().hex[:16]}"


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], T], *, timeout: float = 15, message: str = "") -> T:
    """Call ``condition`` until it returns something true, and return that.

    Parameters:
      condition: is called every few milliseconds, so it should be cheap; what it raises is let through.
      timeout: seconds after which the test fails.
      message: what was waited for, for the failure.

    Raises:
      AssertionError: the time is over.
    """
    deadline = time.monotonic() + timeout
    pause = 0.002
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s: {message or condition} is still {value!r}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
