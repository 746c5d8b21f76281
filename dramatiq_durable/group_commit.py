"""Many callers, one transaction.

Whatever waits when the connection is free becomes one batch: one pipelined round trip, one commit.  Whoever arrives
meanwhile is in the next batch, so that the batches grow with the load.

In a client process the first caller leads: it runs the batches on its own thread, without a hop, until its own
operation is done, and then hands the lead to somebody who waits.  In a worker process the claimer's thread leads for
everybody, because a worker thread can be interrupted at any moment (TimeLimit raises exceptions into it), and must not
be while it drives the connection.

One bad item fails alone: procedures answer item by item, and after an error that they did not foresee the transaction
is rolled back and the items are run one by one.

Inside a `using` block what is sent is not committed here: the block does it, in the caller's own transaction.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol

import psycopg

from .database import Connection, Database, is_connection_lost, translate
from .doubt import Doubt, outcome_unknown
from .errors import DatabaseUnavailable, DurableError, OutcomeUnknown
from .metrics import shown
from .metrics.recorder import Recorder, retire
from .operations import (
    Claim,
    Context,
    LeaseOperation,
    Operation,
    Together,
    calls_of,
    parts_of,
    size_of,
    statement,
)
from .procedures import Procedures

logger = logging.getLogger(__name__)

#: The most operations of a batch: bounds the memory of both sides and the time the transaction is open.
MAX_BATCH = 1000

#: The most bytes of payloads of a batch, but for its last item: an array in Postgres ends at a gigabyte.
MAX_BATCH_BYTES = 64 * 1024 * 1024

#: How long a caller waits for a database that went away, in seconds, before it gets an error.
PATIENCE = 15.0

#: Errors that come from meeting somebody else's lock: the item itself is fine and is tried again.
_BUSY = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
_BUSY_TRIES = 5


class Ride(Protocol):
    """The transaction of a caller's own that a `using` block sends in."""

    def take(self, commit: GroupCommit, operations: Sequence[Operation]) -> None:
        """Do operations in that transaction: each has its answer or error then, or later neither (None)."""


#: The innermost `using` block around what this thread, or this task, does.
riding: ContextVar[Ride | None] = ContextVar("riding", default=None)


class GroupCommit:
    """The one way in which this process writes to a namespace.

    Parameters:
      database(Database): where to.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        #: What it has counted; of what goes through it, and of what its broker does.
        self.metrics = Recorder(database.namespace)
        weakref.finalize(self, retire, self.metrics).atexit = False
        self.procedures = Procedures(database.namespace, metrics=self.metrics)
        #: Called on the leading thread after a connection was lost and made again, before anything else is run.
        self.on_reconnect: Callable[[Connection], None] | None = None
        #: What the leading thread does while the database is at work, or away.
        self.meanwhile: Callable[[], None] | None = None
        self._statements: dict[type[Operation], bytes] = {}
        self._forget()

    def after_fork(self) -> None:
        """Start anew in a child process: the connection and the waiting callers are the parent's."""
        if self._pid != os.getpid():
            self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        #: Where a thread of the worker leads for everybody, this wakes it.
        self._wake_leader: Callable[[], None] | None = None
        #: Held by whoever drives the connection.
        self._driving = threading.RLock()
        self._waiting: deque[Operation] = deque()
        self._lock = threading.Lock()
        self._leading = False
        self._conn: Connection | None = None
        self._cursor: Any = None
        self._lost = False
        #: Whether somebody waits for the next batch.
        self.urgent = False
        #: How many batches were sent: each is one round trip and one commit.
        self.batches = 0
        self._batch: list[Operation] = []
        #: What met a lock, and when it is tried again.
        self._later: list[tuple[float, Operation]] = []
        self._doubt = Doubt(self)
        self._unreplicated: str | None = None
        self.sender = os.urandom(16)
        self.context = Context(self.sender, count(1))

    # --- callers ----------------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> Any:
        """Commit one operation.

        Returns:
          The operation's answer; None where a block of an asynchronous `using` does it later.

        Raises:
          DatabaseUnavailable: the database could not be reached for `PATIENCE` seconds; nothing was done.
          OutcomeUnknown: the connection broke around the commit and the outcome could not be looked up.
          DurableError: what the operation itself raises.
        """
        self.submit_many([operation])
        if operation.error is not None:
            raise operation.error
        return operation.answer

    def submit_many(self, operations: Sequence[Operation]) -> None:
        """Commit operations, in as few transactions as their number allows; each has its own answer or error."""
        self.after_fork()
        ride = riding.get()
        if ride is not None and operations[0].rides:
            ride.take(self, operations)
            return
        last = operations[-1]
        last.gate = gate = threading.Lock()
        gate.acquire()
        with self._lock:
            self._waiting.extend(operations)
            self.urgent = True
            wake = self._wake_leader
            lead = wake is None and not self._leading
            if lead:
                self._leading = True
        if not lead:
            if wake is not None:
                wake()
            gate.acquire()
            # Woken either because it is done, or because the lead was handed over.
            if last.gate is None:
                return
        self._lead(last)

    def lead_with(self, wake: Callable[[], None] | None) -> None:
        """From now on a thread of its own leads (and is woken with this), or, with None, no longer does.

        Whoever gives the lead up runs one more batch: nobody that trusted in it is left waiting.
        """
        with self._lock:
            self._wake_leader = wake

    def post(self, operation: Operation) -> None:
        """Leave an operation to the next batch, without waiting for it.  Needs a leading thread.

        One that has met a lock is tried again later and by itself: nobody else waits for that lock.
        """
        if operation.tries:
            # However many there are of these, most of the time is for the others.
            delay = min(0.1 * 2**operation.tries, 5.0) + 2.0 * len(self._later)
            self._later.append((time.monotonic() + delay, operation))
        else:
            self._waiting.append(operation)

    def leased_messages(self) -> list[bytes]:
        """The messages of deliveries that are answered for here and not committed yet."""
        known = parts_of((*self._batch, *self._doubt.batch, *list(self._waiting), *(o for _, o in list(self._later))))
        return [o.message_id for o in known if isinstance(o, LeaseOperation)]

    @property
    def pending(self) -> int:
        """How many operations wait to be committed."""
        return len(self._waiting) + len(self._later) + bool(self._doubt.batch)

    def due_in(self) -> float:
        """In how many seconds there is something to commit: 0 now, infinity when nothing waits."""
        if self._waiting or self._doubt.batch:
            return 0.0
        return max(min((when for when, _ in self._later), default=float("inf")) - time.monotonic(), 0.0)

    def _lead(self, mine: Operation) -> None:
        try:
            while mine.gate is not None:
                self.run_batch(give_up=_after(PATIENCE))
        finally:
            with self._lock:
                self._leading = False
                heir = next(
                    (o for o in (*self._doubt.batch, *self._waiting) if o.gate is not None and o is not mine), None
                )
                if heir is not None and self._wake_leader is None:
                    self._leading = True
                    heir.gate.release()

    # --- the leader -------------------------------------------------------------------------------------

    def run_batch(self, *also: Operation, give_up: Callable[[], bool]) -> None:
        """Run what waits, and the leader's own operations behind it, as one transaction.

        Every operation taken has its answer or its error afterwards.  While the database is away it is tried again
        until ``give_up()`` says so.
        """
        shown.look()
        with self._driving:
            self.urgent = False
            due = next((item for item in self._later if item[0] <= time.monotonic()), None)
            # One batch can be in doubt, no more: as long as one is, nothing else is begun.
            if due is not None and not self._doubt.batch:
                self._later.remove(due)
                self._settle([due[1]], give_up)
            batch = self._doubt.resolve(give_up)
            room = MAX_BATCH_BYTES
            while self._waiting and len(batch) < MAX_BATCH and room > 0:
                batch.append(operation := self._waiting.popleft())
                room -= size_of(operation)
            batch.extend(also)
            self._settle(batch, give_up)

    def _settle(self, batch: list[Operation], give_up: Callable[[], bool]) -> None:
        self._batch = batch
        self.context.last_batch = 0
        try:
            self._run_until_settled(batch, give_up)
        except BaseException:
            # The leader was interrupted: whoever leads next goes on with what has no answer yet.
            rest = [operation for operation in batch if not (operation.finished or operation in self._doubt.batch)]
            if self._doubt.batch:
                # These were to be run one by one, and had not begun.
                self._waiting.extendleft(reversed(rest))
            else:
                self._doubt.leave(rest, self.context.last_batch)
            raise
        finally:
            self._batch = []

    def _run_until_settled(self, batch: list[Operation], give_up: Callable[[], bool]) -> None:
        delay = 0.05
        while batch:
            try:
                conn = self.connection()
                batch = self._run(conn, batch, give_up)
            except (DurableError, psycopg.Error) as e:
                error = translate(e) if isinstance(e, psycopg.Error) else e
                transient = isinstance(error, DatabaseUnavailable)
                self.drop_connection()
                self._meanwhile()
                # Some may have had their turn, one by one, before the connection broke: they are not run again.
                batch = [operation for operation in batch if not operation.finished]
                if not transient or give_up():
                    for operation in batch:
                        unknown = operation.retried and operation.numbered and transient
                        operation.error = outcome_unknown(error) if unknown else error
                    self.finish(batch)
                    return
                if delay == 0.05:
                    logger.warning("the database is away, trying again: %s", error)
                time.sleep(delay)
                delay = min(delay * 1.7, 1.0)

    def call(self, function: Callable[[Connection], Any]) -> Any:
        """Run something on the leader's connection, on the leader's thread.

        Raises:
          DatabaseUnavailable: the connection was lost.
        """
        with self._driving:
            conn = self.connection()
            try:
                return function(conn)
            except psycopg.Error as e:
                if is_connection_lost(e, conn):
                    self.drop_connection()
                    raise DatabaseUnavailable(str(e).strip()) from e
                if isinstance(e, psycopg.errors.ReadOnlySqlTransaction):
                    self.drop_connection()
                raise translate(e) from e

    def connection(self) -> Connection:
        """The leader's connection, made anew where it was lost.

        Raises:
          DurableError: it cannot be made.
        """
        if self._conn is None:
            try:
                conn = self.database.connect()
            except DurableError as e:
                self.metrics.failed(e.__cause__)
                raise
            conn.meanwhile = self._meanwhile
            conn.add_notice_handler(self._notice)
            if self._lost:
                logger.info("connected to the database again")
            if self.on_reconnect is not None and self._lost:
                try:
                    self.on_reconnect(conn)
                except BaseException as e:
                    conn.close()
                    if isinstance(e, psycopg.Error):
                        raise translate(e) from e
                    raise
            self._conn, self._lost = conn, False
            self._cursor = conn.cursor(binary=True)
        return self._conn

    def _meanwhile(self) -> None:
        if self.meanwhile is not None:
            try:
                self.meanwhile()
            except Exception:
                # It is no part of what is being asked of the database.
                logger.exception("what is done while the database works has failed")

    def _run(self, conn: Connection, batch: list[Operation], give_up: Callable[[], bool]) -> list[Operation]:
        """Run a batch; answers what has to be run again.  Raises what makes the connection unusable."""
        self.context.last_batch = 0
        try:
            self._execute(conn, batch)
        except Exception as e:
            if isinstance(e, psycopg.Error):
                self.metrics.failed(e)
            if isinstance(e, psycopg.Error) and is_connection_lost(e, conn):
                return self._doubt.look_up(batch, self.context.last_batch, give_up)
            if isinstance(e, psycopg.errors.ReadOnlySqlTransaction):
                # A failover leaves this connection on what is now a standby: nothing was done, a new one may do better.
                raise
            if len(batch) == 1:
                return self._refuse(batch[0], e)
            # One of them is the cause; nothing was committed: each gets a transaction of its own.
            logger.debug("a batch of %d failed, running its items one by one: %s", len(batch), e)
            self._one_by_one(batch, give_up)
            return []
        except BaseException:
            # The thread was interrupted in the middle of the protocol: whoever leads next finds out what became of it.
            self._doubt.leave(batch, self.context.last_batch)
            self.drop_connection()
            raise
        self.finish(batch)
        self.context.last_batch = 0
        return []

    def _one_by_one(self, batch: Sequence[Operation], give_up: Callable[[], bool]) -> None:
        for operation in batch:
            again: list[Operation] = [operation]
            while again:
                again = self._run(self.connection(), again, give_up)

    def _refuse(self, operation: Operation, error: Exception) -> list[Operation]:
        """What an operation's own failure means: try again where somebody was in its way, else it has its error."""
        if isinstance(error, _BUSY):
            # The end of a message is recorded later (see `post`), a claim is made anew: nobody need wait for them.
            later = isinstance(operation, (Together, Claim)) or (
                isinstance(operation, LeaseOperation)
                and operation.gate is None
                and isinstance(error, psycopg.errors.LockNotAvailable)
            )
            if operation.tries < _BUSY_TRIES and not later:
                time.sleep(0.01 * 2**operation.tries)
                operation.tries += 1
                return [operation]
            error = DatabaseUnavailable(f"something in the database stayed locked: {error.diag.message_primary}")
        operation.error = translate(error) if isinstance(error, psycopg.Error) else error
        self.finish([operation])
        return []

    def _execute(self, conn: Connection, batch: list[Operation]) -> None:
        calls: list[tuple[type[Operation], list[Operation], psycopg.Cursor[Any]]] = []
        groups = [(kind, items, kind.arguments(items, self.context)) for kind, items in calls_of(batch)]
        self.batches += 1
        begun = time.perf_counter()
        if len(groups) == 1:
            kind, items, arguments = groups[0]
            # Making a cursor takes as long as using it: this one is made once a connection.
            cursor = self._cursor
            cursor.execute(self._statement(kind), arguments)
            calls.append((kind, items, cursor))
        else:
            # Without a BEGIN, all up to the pipeline's sync is one transaction: one round trip, one commit.
            with conn.pipeline():
                try:
                    for kind, items, arguments in groups:
                        cursor = conn.cursor(binary=True)
                        cursor.execute(self._statement(kind), arguments)
                        calls.append((kind, items, cursor))
                except BaseException:
                    # An argument that cannot be sent: the sync at the pipeline's end would commit what went before it.
                    conn.execute("SELECT 1/0")
                    raise
        self.metrics.committed(time.perf_counter() - begun, len(batch))
        for kind, items, cursor in calls:
            kind.settle(items, cursor.fetchall())
        for operation in batch:
            if isinstance(operation, Together):
                operation.settle_parts()
        self._refuse_unreplicated(batch)

    def _refuse_unreplicated(self, batch: Sequence[Operation]) -> None:
        if self._unreplicated is not None:
            # Committed here, and maybe nowhere else: never acknowledged.
            text, self._unreplicated = self._unreplicated, None
            for operation in batch:
                operation.error = OutcomeUnknown(f"{text}. It is safe to repeat the call with the same id")
            # What was handed out with it is in nobody's hand: the next connection begins with a resync.
            self.drop_connection()

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        # The text is in the server's language.
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self._unreplicated = diagnostic.message_primary

    def _statement(self, kind: type[Operation]) -> bytes:
        text = self._statements.get(kind)
        if text is None:
            text = self._statements[kind] = statement(self.database.namespace, kind)
        return text

    def finish(self, batch: Sequence[Any]) -> None:
        """Tell those who wait for these operations that they have their answers or errors."""
        self.metrics.settled(batch)
        for operation in batch:
            operation.finished = True
            if operation.then is not None:
                try:
                    operation.then(operation)
                except Exception:
                    logger.exception("what follows %s failed", type(operation).__name__)
            gate, operation.gate = operation.gate, None
            if gate is not None:
                gate.release()

    def drop_connection(self) -> None:
        """Close the leader's connection: it is not to be trusted any more."""
        conn, self._conn, self._lost = self._conn, None, True
        if conn is not None:
            conn.close()

    def close(self) -> None:
        """Run what waits, and close the connection."""
        if self._pid != os.getpid():
            return
        if self._waiting:
            self.run_batch(give_up=_after(PATIENCE))
        if self._conn is not None:
            self._conn.close()
            self._conn = None
        shown.flush()


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() > until
