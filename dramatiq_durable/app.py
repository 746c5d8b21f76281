"""The worker: ``dramatiq dramatiq_durable.app [your.modules ...]``.

Reads the settings from the environment (``DRAMATIQ_DURABLE_*``), makes the broker, sets it as Dramatiq's, and imports
what ``DRAMATIQ_DURABLE_IMPORT`` names.  Without a URL it starts the embedded Postgres.
"""

from __future__ import annotations

import importlib

import dramatiq
from dramatiq.middleware import CurrentMessage

from .broker import DurableBroker
from .errors import NotConfigured
from .event_loop import DaemonAsyncIO
from .settings import Settings
from .workflow import guard

# Before the modules that declare workflows, and may keep a clock or uuid4 somewhere for later.
guard.install()

settings = Settings.from_env()
broker = DurableBroker(settings=settings)
broker.add_middleware(DaemonAsyncIO())
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)

for _module in settings.import_:
    try:
        importlib.import_module(_module)
    except ModuleNotFoundError as error:
        # Only where it is the named module, or a package around it, that is missing: not what it imports itself.
        if error.name is None or not f"{_module}.".startswith(f"{error.name}."):
            raise
        raise NotConfigured(
            f"DRAMATIQ_DURABLE_IMPORT names {_module}, and there is no module {error.name}: correct the name, "
            "start the worker in the directory that has it, or name that directory "
            "(dramatiq dramatiq_durable.app --path DIRECTORY)."
        ) from None
