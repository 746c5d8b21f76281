"""After a lost answer: was the batch committed?  That is looked up, never assumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg

from .errors import DatabaseUnavailable, DurableError, OutcomeUnknown
from .operations import EnqueueKeyed, Operation

if TYPE_CHECKING:
    from .group_commit import GroupCommit

logger = logging.getLogger(__name__)


class Doubt:
    """What may have been committed, and what became of it.

    A batch that carries a number is committed once: the database knows the number, or takes it no more once it was
    asked.  Any other is safe to repeat, under its leases and fences: what was done already is refused.

    Attributes:
      batch(list): the batch whose leader was interrupted in the middle of it: whoever leads next resolves it.
    """

    def __init__(self, commit: GroupCommit) -> None:
        self.batch: list[Operation] = []
        self._commit = commit
        self._number = 0

    def leave(self, batch: list[Operation], number: int) -> None:
        """The leader is interrupted in the middle of a batch of this number (0: it has none)."""
        self.batch, self._number = batch, number

    def resolve(self, give_up: Callable[[], bool]) -> list[Operation]:
        """What became of the batch whose leader was interrupted, if there is one; answers what has to be run again."""
        # Interrupted once more, it stays: only what was finished by then is not finished again.
        batch = [operation for operation in self.batch if not operation.finished]
        if batch:
            try:
                batch = self.look_up(batch, self._number, give_up)
            except DurableError as e:
                # Its callers wait for an answer, also when there is none.
                for operation in batch:
                    operation.error = outcome_unknown(e) if self._number and operation.numbered else e
                self._commit.finish(batch)
                batch = []
        self.batch = []
        return batch

    def look_up(self, batch: list[Operation], number: int, give_up: Callable[[], bool]) -> list[Operation]:
        """The connection broke around a batch: find out what became of it; answers what has to be run again.

        Raises:
          DatabaseUnavailable: the database was away until ``give_up()``.
        """
        self._commit.drop_connection()
        for operation in batch:
            operation.retried = True
        if not number:
            return batch
        refused = self._refused(number, give_up)
        if refused is None:
            return batch
        again: list[Operation] = []
        settled: list[Operation] = []
        for operation in batch:
            # Whatever was in the way of these then, now they may be stored.
            refusal = isinstance(operation, EnqueueKeyed) and operation.message_id in refused
            (settled if not refusal and operation.settle_committed([operation]) else again).append(operation)
        self._commit.finish(settled)
        return again

    def _refused(self, number: int, give_up: Callable[[], bool]) -> set[bytes] | None:
        """What `Procedures.batch_outcome` answers, once the database is there."""
        commit, told = self._commit, False
        while True:
            try:
                return commit.procedures.batch_outcome(commit.connection(), commit.sender, number)
            except (DurableError, psycopg.Error) as e:
                commit.drop_connection()
                if give_up():
                    raise DatabaseUnavailable(str(e)) from e
                if not told:
                    logger.warning("the database is away, waiting for it to learn what became of a commit: %s", e)
                    told = True
                time.sleep(0.2)


def outcome_unknown(error: Exception) -> OutcomeUnknown:
    """The error of a caller whose operation may have been committed."""
    return OutcomeUnknown(
        "the connection broke around the commit, and the database did not come back. It is safe to repeat the call "
        f"with the same id. {error}"
    )
