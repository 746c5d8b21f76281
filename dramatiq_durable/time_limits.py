"""Dramatiq's time limits, without a lock that all of a worker's threads take twice for each message."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from dramatiq import Middleware
from dramatiq.middleware import TimeLimit


class _Deadlines(dict[int, Any]):
    """Deadlines by thread, which can be looked through while a thread adds its first."""

    def items(self) -> Any:
        return list(super().items())


def unlock(middleware: Iterable[Middleware]) -> None:
    """Have time limits keep their deadlines without a lock.

    A thread that loses the interpreter while it holds the lock leaves the others in a queue in front of it, and as long
    as there is work that queue never ends: from then on each message costs two changes of threads, a third of all that
    a worker can do.  What the lock keeps apart are single reads and writes of a dict, which are atomic, and a loop.
    """
    for each in middleware:
        manager: Any = each.manager if isinstance(each, TimeLimit) else None
        if isinstance(getattr(manager, "mu", None), type(threading.RLock())) and type(manager.deadlines) is dict:
            manager.deadlines = _Deadlines(manager.deadlines)
            manager.mu = nullcontext()
