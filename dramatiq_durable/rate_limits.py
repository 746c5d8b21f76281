"""Limiters and barriers that count in Postgres: the back end of `dramatiq.rate_limits` and of ``GroupCallbacks``.

backend = durable.rate_limits.PostgresBackend(broker)
DISTRIBUTED_MUTEX = ConcurrentRateLimiter(backend, "distributed-mutex", limit=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dramatiq.rate_limits import RateLimiterBackend

from .delivery import current_delivery
from .errors import ForbiddenInWorkflow
from .place import Place, time_to_live
from .watch import Watch
from .workflow.replay import current

if TYPE_CHECKING:
    from .broker import DurableBroker

#: The most bytes of a key.
MAX_KEY = 900


class PostgresBackend(RateLimiterBackend):
    """Counts in the namespace of a broker; correct for any number of processes and threads at once.

    Given to Dramatiq's ``GroupCallbacks`` under a `DurableBroker` on the same namespace, the members of a group are
    counted by their acks: each once, and the callbacks are sent in the commit of the last one.

    Every call is a transaction of its own.  Times to live are in milliseconds.

    Parameters:
      broker(DurableBroker | str | None): whose namespace: a broker, or a database's URL; by default Dramatiq's global
        broker.  Does no I/O before the first use.
      url(str | None): the database's URL by its name, as Dramatiq's own back ends have it.
    """

    def __init__(self, broker: DurableBroker | str | None = None, *, url: str | None = None) -> None:
        self.place = Place(broker, url)

    def add(self, key: str, value: int, ttl: int) -> bool:
        """Set a key that is not there; answers whether it did."""
        _check(key)
        return self.place.call(lambda procedures, conn: procedures.limiter_add(conn, key, value, time_to_live(ttl)))

    def incr(self, key: str, amount: int, maximum: int, ttl: int) -> bool:
        """Add to a key unless that would exceed the maximum; answers whether it did."""
        return self._change(key, amount, None, maximum, ttl)

    def decr(self, key: str, amount: int, minimum: int, ttl: int) -> bool:
        """Take from a key unless that would go below the minimum; answers whether it did."""
        delivery = current_delivery.get()
        if (
            delivery is not None
            and delivery.hooks
            and key == delivery.options.get("group_completion_uuid")
            and self.place.shared_with(delivery.broker)
        ):
            # GroupCallbacks asks whether its message was the last of the group.  Only the ack can tell: it counts the
            # member, and sends the callbacks.
            delivery.broker.count_member(delivery)
            return True
        return self._change(key, -amount, minimum, None, ttl)

    def incr_and_sum(self, key: str, keys: Callable[[], Sequence[str]], amount: int, maximum: int, ttl: int) -> bool:
        """Add to a key unless it, or the sum of other keys, would exceed the maximum; answers whether it did."""
        _check(key)
        # The keys of one limiter's windows have its name before the last "@".
        anchor = key.rpartition("@")[0] + "@"
        return self.place.call(
            lambda procedures, conn: procedures.limiter_change_sum(
                conn, anchor, key, list(keys()), amount, maximum, time_to_live(ttl)
            )
        )

    def wait(self, key: str, timeout: int | None) -> bool:
        """Wait until a key is notified, for so many milliseconds (None: for ever); answers whether it was."""
        event = _event(key)
        watch = Watch.of(self.place.broker)
        return watch.wait((event, None), None if timeout is None else timeout / 1000) is not None

    def wait_notify(self, key: str, ttl: int) -> None:
        """Wake all who wait on a key, and those who come to wait on it while it lives."""
        event = _event(key)
        self.place.call(lambda procedures, conn: procedures.store_result(conn, event, b"1", time_to_live(ttl)))

    def _change(self, key: str, amount: int, minimum: int | None, maximum: int | None, ttl: int) -> bool:
        _check(key)
        return self.place.call(
            lambda procedures, conn: procedures.limiter_change(conn, key, amount, minimum, maximum, time_to_live(ttl))
        )


def _event(key: str) -> str:
    # A barrier's event has the barrier's key before its suffix: what could be created can be waited for.
    _check(key.removesuffix("@events") if isinstance(key, str) else key)
    return f"event:{key}"


def _check(key: str) -> None:
    if not isinstance(key, str) or not 1 <= len(key.encode()) <= MAX_KEY or "\0" in key:
        raise ValueError(f"a limiter's key is a text of 1 to {MAX_KEY} bytes without NUL, not {key!r:.60}")
    if current() is not None:
        raise ForbiddenInWorkflow(
            "inside a workflow you cannot use limiters and barriers: it could not be replayed. Use them in an activity"
        )
