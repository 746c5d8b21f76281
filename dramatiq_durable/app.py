"""The worker: ``dramatiq dramatiq_durable.app [your.modules ...]``.

Reads the settings from the environment (``DRAMATIQ_DURABLE_*``), makes the broker, sets it as Dramatiq's, and imports
what ``DRAMATIQ_DURABLE_IMPORT`` names.  Without a URL it starts the embedded Postgres.
"""

from __future__ import annotations

import importlib

import dramatiq
from dramatiq.middleware import AsyncIO, CurrentMessage

from .broker import DurableBroker
from .settings import Settings

settings = Settings.from_env()
broker = DurableBroker(settings=settings)
broker.add_middleware(AsyncIO())
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)

for _module in settings.import_:
    importlib.import_module(_module)
