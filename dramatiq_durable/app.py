"""The worker: ``dramatiq dramatiq_durable.app [your.modules ...]``.

Reads the settings from the environment (``DRAMATIQ_DURABLE_*``), makes the broker, sets it as Dramatiq's, and imports
what ``DRAMATIQ_DURABLE_IMPORT`` names.  Without a URL it starts the embedded Postgres.
"""

from __future__ import annotations

import importlib

import dramatiq
from dramatiq import Broker, Worker
from dramatiq.asyncio import EventLoopThread, set_event_loop_thread
from dramatiq.middleware import AsyncIO, CurrentMessage

from .broker import DurableBroker
from .settings import Settings


class DaemonAsyncIO(AsyncIO):
    """Dramatiq's own, with a thread that does not keep a process alive that was told twice to end."""

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        thread = EventLoopThread(self.logger)
        thread.daemon = True
        thread.start(timeout=10.0)
        set_event_loop_thread(thread)


settings = Settings.from_env()
broker = DurableBroker(settings=settings)
broker.add_middleware(DaemonAsyncIO())
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)

for _module in settings.import_:
    importlib.import_module(_module)
