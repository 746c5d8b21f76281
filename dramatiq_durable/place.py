"""Where a back end keeps its rows: the namespace of a broker, of a URL, or of Dramatiq's global broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import dramatiq

from .database import Connection
from .errors import DurableError, NotConfigured
from .procedures import Procedures

if TYPE_CHECKING:
    from .broker import DurableBroker

T = TypeVar("T")

#: The longest time to live, in milliseconds: ten years.
LONGEST = 315_360_000_000


def time_to_live(ttl: float) -> int:
    """A time to live as it is stored: whole milliseconds."""
    return int(max(0, min(ttl, LONGEST)))


class Place:
    """A namespace, as a back end was given it.  Does no I/O before the first call.

    Parameters:
      broker(DurableBroker | str | None): a broker, a database's URL, or None for Dramatiq's global broker when it is
        used.
      url(str | None): a database's URL.

    Raises:
      ValueError: both are given.
    """

    def __init__(self, broker: DurableBroker | str | None, url: str | None = None) -> None:
        if url is not None:
            if broker is not None:
                raise ValueError("the back end takes a broker or a URL, not both")
            broker = url
        if isinstance(broker, str):
            from .broker import DurableBroker

            broker = DurableBroker(broker, middleware=[])
        self._broker = broker

    @property
    def broker(self) -> DurableBroker:
        """Raises NotConfigured when there is none, or it is none of ours."""
        from .broker import DurableBroker

        broker: Any = self._broker if self._broker is not None else dramatiq.get_broker()
        if not isinstance(broker, DurableBroker):
            raise NotConfigured(
                f"the back end needs a DurableBroker or a database's URL, and has a {type(broker).__name__}: "
                "PostgresBackend(broker), or PostgresBackend('postgresql://user:password@host/database')"
            )
        return broker

    def shared_with(self, other: Any) -> bool:
        """Whether a delivery's broker keeps its messages in the same place."""
        broker = self.broker
        if other is broker or other.place == broker.place:
            return True
        if other.namespace != broker.namespace:
            return False
        try:
            # One database has many addresses.
            return bool(broker.database.identity() == other.database.identity())
        except DurableError:
            return False

    def call(self, function: Callable[[Procedures, Connection], T]) -> T:
        """Call procedures on a connection of one's own, each in a transaction of its own.

        Raises:
          DatabaseUnavailable, NotPermitted, SchemaOutOfDate: as for every use of a namespace.
        """
        broker = self.broker
        with broker.database.calling() as conn:
            return function(broker.procedures, conn)
