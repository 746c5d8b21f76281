"""The event loop of async actors, for applications that have not added Dramatiq's AsyncIO."""

from __future__ import annotations

import threading
from typing import ClassVar

from dramatiq import Broker, Worker
from dramatiq.asyncio import EventLoopThread, get_event_loop_thread, set_event_loop_thread
from dramatiq.middleware import AsyncIO


class DaemonAsyncIO(AsyncIO):
    """Dramatiq's own, with a thread that does not keep a process alive that was told twice to end.

    It leaves the loop to Dramatiq's where the broker has that too.  The workers of a process share one loop: Dramatiq
    knows no more than one.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _thread: ClassVar[EventLoopThread | None] = None
    _workers: ClassVar[set[int]] = set()

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        shared = DaemonAsyncIO
        if any(isinstance(each, AsyncIO) and not isinstance(each, shared) for each in broker.middleware):
            return
        with shared._lock:
            if get_event_loop_thread() is None:
                thread = EventLoopThread(self.logger)
                thread.daemon = True
                thread.start(timeout=10.0)
                set_event_loop_thread(thread)
                shared._thread, shared._workers = thread, set()
            if get_event_loop_thread() is shared._thread:
                shared._workers.add(id(worker))

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        shared = DaemonAsyncIO
        with shared._lock:
            if id(worker) not in shared._workers:
                return
            shared._workers.discard(id(worker))
            thread = shared._thread
            if shared._workers or thread is None:
                return
            if get_event_loop_thread() is thread:
                set_event_loop_thread(None)
            shared._thread = None
            thread.stop()
            thread.join()


def provide(broker: Broker) -> None:
    """See to it that the workers of a broker run async actors."""
    if not any(isinstance(each, AsyncIO) for each in broker.middleware):
        broker.add_middleware(DaemonAsyncIO())
