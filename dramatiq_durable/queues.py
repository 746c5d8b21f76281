"""Queues as a whole: counted, flushed, waited for.  What Dramatiq's tests, and its users' tests, do with a broker."""

from __future__ import annotations

from time import monotonic, sleep
from typing import TYPE_CHECKING

from dramatiq import Broker
from dramatiq.errors import QueueJoinTimeout, QueueNotFound

if TYPE_CHECKING:
    from .database import Database
    from .delivery import Delivery
    from .procedures import Procedures


class Queues(Broker):
    """A broker's doings with whole queues; to drop messages takes a login that administers the namespace.

    Attributes:
      fail_fast_default(bool): whether `join` raises what a message failed with, where the call does not say.
    """

    queues: dict[str, str]
    database: Database
    procedures: Procedures
    fail_fast_default: bool
    #: What messages failed with for good in this process, the first of each queue, for a `join` to raise.
    failures: dict[str, BaseException]
    #: The queues of the joins that want to know.
    watched: list[str]

    def stream_id(self, queue_name: str) -> int:
        raise NotImplementedError

    def get_queue_message_counts(self, queue_name: str) -> tuple[int, int, int]:
        """How many messages a queue has, as Dramatiq's broker for RabbitMQ tells it.

        Returns:
          (ready, delayed, dead): those that wait for a worker, those that are not due yet, the dead letters.  What
          is with a worker is in none of them.

        Raises:
          QueueNotFound: the queue was never declared.
          NotPermitted: the login neither consumes the queue, nor is a monitor or an administrator.
        """
        stream_id = self._known(queue_name)
        with self.database.calling() as conn:
            return self.procedures.queue_counts(conn, stream_id)

    def flush(self, queue_name: str) -> None:
        """Drop the messages that wait on a queue, and its dead letters; what is being processed, and what belongs to
        a run, stays.

        Raises:
          QueueNotFound: the queue was never declared.
          NotPermitted: the login is no administrator.
        """
        self._flush([queue_name])

    def flush_all(self) -> None:
        """Drop the messages that wait on any declared queue, and its dead letters."""
        self._flush(list(self.queues))

    def _flush(self, names: list[str]) -> None:
        ids = [self._known(name) for name in names]
        if ids:
            with self.database.calling() as conn:
                self.procedures.flush_streams(conn, ids)
        for name in names:
            self.failures.pop(name, None)

    def join(
        self,
        queue_name: str,
        min_successes: int = 1,
        idle_time: int = 20,
        *,
        interval: int | None = None,
        timeout: int | None = None,
        fail_fast: bool | None = None,
    ) -> None:
        """Wait until a queue has no message left, delayed ones included.

        It takes the arguments of Dramatiq's brokers for RabbitMQ, Redis and tests.

        Parameters:
          queue_name(str): the queue.
          min_successes(int): how often in a row the queue has to be found empty.  Once is enough: what is being
            processed is counted, and what it sends is stored before it is gone.
          idle_time(int), interval(int | None): milliseconds between two looks; two names of one thing.
          timeout(int | None): milliseconds to wait at the most.
          fail_fast(bool | None): raise what a message of this queue failed with for good in this process, since the
            last join or flush; for tests, where worker and test are one process.  None stands for the broker's
            `fail_fast_default`; unless that is True, what failed before the call is not known any more.

        Raises:
          QueueNotFound: the queue was never declared.
          QueueJoinTimeout: the timeout ran out.
          NotPermitted: as `get_queue_message_counts`.
        """
        if fail_fast is None:
            fail_fast = self.fail_fast_default
        if fail_fast:
            self.watched.append(queue_name)
        try:
            self._join(queue_name, min_successes, idle_time if interval is None else interval, timeout)
        finally:
            if fail_fast:
                self.watched.remove(queue_name)
            failure = self.failures.pop(queue_name, None)
        if fail_fast and failure is not None:
            raise failure from None

    def _join(self, queue_name: str, min_successes: int, interval: int, timeout: int | None) -> None:
        deadline = None if timeout is None else monotonic() + timeout / 1000
        stream_id = self._known(queue_name)
        successes = 0
        while True:
            with self.database.calling() as conn:
                successes = successes + 1 if self.procedures.stream_is_empty(conn, stream_id) else 0
            if successes >= min_successes:
                return
            if deadline is not None and monotonic() >= deadline:
                raise QueueJoinTimeout(f"timed out after {timeout} milliseconds")
            sleep(interval / 1000)

    def note_failure(self, delivery: Delivery) -> None:
        """A message failed for good in this process."""
        if self.fail_fast_default or delivery.queue_name in self.watched:
            error = delivery._exception or Exception(f"{delivery} failed, and nobody said why")
            self.failures.setdefault(delivery.queue_name, error)

    def _known(self, queue_name: str) -> int:
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        return self.stream_id(queue_name)
