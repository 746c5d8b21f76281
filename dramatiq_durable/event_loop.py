"""The event loop of ``async def`` actors, where no AsyncIO middleware has set one up."""

from __future__ import annotations

import logging
import threading

from dramatiq import Broker
from dramatiq.asyncio import EventLoopThread, get_event_loop_thread, set_event_loop_thread

logger = logging.getLogger(__name__)

_lock = threading.Lock()
#: The one that was started here, and the brokers whose actors use it.
_own: EventLoopThread | None = None
_users: set[Broker] = set()


def event_loop_for(broker: Broker) -> EventLoopThread:
    """Dramatiq's event loop for async actors; it is started where there is none, and stopped with the last worker."""
    global _own
    with _lock:
        thread = get_event_loop_thread()
        # In a process that was forked, the parent's is no thread.
        if thread is None or not thread.is_alive():
            thread = EventLoopThread(logger)
            thread.daemon = True
            thread.start(timeout=10.0)
            set_event_loop_thread(thread)
            _own = thread
            _users.clear()
        if thread is _own:
            _users.add(broker)
        return thread


def release_event_loop(broker: Broker) -> None:
    """A broker's worker has stopped."""
    global _own
    with _lock:
        if broker not in _users:
            return
        _users.discard(broker)
        if _users or _own is None:
            return
        thread, _own = _own, None
        if get_event_loop_thread() is thread:
            set_event_loop_thread(None)
    thread.stop()
