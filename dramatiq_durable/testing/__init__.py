"""Testing workflows: an environment in memory, on a clock that skips time, and a replayer of recorded histories.

The pytest plugin's fixtures (``durable_environment``, ``durable_broker``, ``durable_worker``) are in
``pytest_dramatiq_durable``; pytest finds them by itself.
"""

from .environment import Environment
from .replayer import Replayer

__all__ = ["Environment", "Replayer"]
