"""A transaction that the ack of an actor's message rides in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg

from .database import Connection
from .delivery import TASK_KINDS, Delivery, current_delivery
from .errors import DurableError
from .operations import Context, LeaseOperation, Operation, by_kind, statement

if TYPE_CHECKING:
    from .broker import DurableBroker


class transaction:  # noqa: N801 - used like a function
    """A transaction that commits together with the end of the actor: effect, result and ack, all or nothing.

    ``with transaction() as conn:`` gives a psycopg connection; an ``async def`` actor writes ``async with`` and gets an
    asynchronous one.  Leaving the block does not commit: that happens when the actor has returned and its hooks have
    run.  An exception that leaves the block, or the actor, rolls the effect back.  If the message's lease was given to
    another worker meanwhile, nothing is committed: an effect in this transaction happens exactly once.

    Raises:
      DurableError: outside a running actor.
      DatabaseUnavailable: the database cannot be reached.
    """

    def __init__(self) -> None:
        delivery = current_delivery.get()
        if delivery is None:
            raise DurableError("transaction() works only inside a running actor of a DurableBroker")
        if delivery.kind in TASK_KINDS:
            raise DurableError(
                "transaction() commits with the message of an activity, and one that runs inside the workflow task has "
                "none: run it without local=True, or durable.local()"
            )
        self._delivery: Delivery = delivery
        self._broker: DurableBroker = delivery.broker
        self._outermost = False

    def __enter__(self) -> Connection:
        open_one = self._delivery.transaction
        if open_one is None:
            self._outermost = True
            open_one = self._delivery.transaction = _Transaction(self._broker)
        elif not isinstance(open_one, _Transaction):
            raise DurableError("this actor's transaction was opened with `async with`")
        return open_one.conn

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None and self._outermost and self._delivery.transaction is not None:
            self._delivery.transaction.roll_back()
            self._delivery.transaction = None

    async def __aenter__(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        open_one = self._delivery.transaction
        if open_one is None:
            self._outermost = True
            open_one = _AsyncTransaction(self._broker)
            await open_one.begin()
            self._delivery.transaction = open_one
        elif not isinstance(open_one, _AsyncTransaction):
            raise DurableError("this actor's transaction was opened with `with`")
        return open_one.conn

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is not None and self._outermost and self._delivery.transaction is not None:
            open_one, self._delivery.transaction = self._delivery.transaction, None
            await open_one.end(commit=False)


def _calls(broker: DurableBroker, operations: Sequence[Operation]) -> list[tuple[Any, list[Any], bytes, list[Any]]]:
    """The calls that settle a message on its own connection; its lease tells whether they were committed."""
    context = Context(None, count(1))
    context.worker = broker.commit.context.worker
    return [
        (kind, items, statement(broker.namespace, kind), kind.arguments(items, context))
        for kind, items in by_kind(operations)
    ]


def _recorded(operations: Sequence[Operation]) -> bool:
    for operation in operations:
        if operation.error is not None:
            raise operation.error
    return all(o.answer is not False for o in operations if isinstance(o, LeaseOperation))


class _Transaction:
    """An open transaction on a pooled connection."""

    def __init__(self, broker: DurableBroker) -> None:
        self._broker = broker
        self._pooled: AbstractContextManager[Connection] = broker.database.connection()
        self.conn = self._pooled.__enter__()
        # psycopg's own block forbids commit() and rollback() in the actor's code.
        self._block = self.conn.transaction()
        self._block.__enter__()

    def commit(self, operations: Sequence[Operation]) -> bool:
        """Settle the message and commit; False, and rolled back, if its lease is gone."""
        try:
            for kind, items, text, arguments in _calls(self._broker, operations):
                rows = self.conn.execute(text, arguments, binary=True).fetchall()
                kind.settle(items, rows)
            recorded = _recorded(operations)
        except BaseException:
            self.roll_back()
            raise
        if not recorded:
            self.roll_back()
            return False
        try:
            self._block.__exit__(None, None, None)
        finally:
            self._pooled.__exit__(None, None, None)
        return True

    def roll_back(self) -> None:
        """Undo the effect, and return the connection; one in an unknown state is closed."""
        try:
            self._block.__exit__(psycopg.Rollback, psycopg.Rollback(), None)
        except Exception:
            self.conn.close()
        finally:
            self._pooled.__exit__(None, None, None)


class _AsyncTransaction:
    """An open transaction on a connection of the event loop that runs async actors."""

    conn: psycopg.AsyncConnection[tuple[Any, ...]]

    def __init__(self, broker: DurableBroker) -> None:
        self._broker = broker

    async def begin(self) -> None:
        self.conn = await psycopg.AsyncConnection.connect(self._broker.database.conninfo, autocommit=True)
        self._broker.database.configure(self.conn)
        self._block = self.conn.transaction()
        await self._block.__aenter__()

    async def end(self, *, commit: bool) -> None:
        try:
            if commit:
                await self._block.__aexit__(None, None, None)
        finally:
            await self.conn.close()

    def commit(self, operations: Sequence[Operation]) -> bool:
        return bool(_on_loop(self._commit(operations)))

    async def _commit(self, operations: Sequence[Operation]) -> bool:
        recorded = False
        try:
            for kind, items, text, arguments in _calls(self._broker, operations):
                cursor = await self.conn.execute(text, arguments, binary=True)
                kind.settle(items, await cursor.fetchall())
            recorded = _recorded(operations)
        finally:
            await self.end(commit=recorded)
        return recorded

    def roll_back(self) -> None:
        _on_loop(self.end(commit=False))


def _on_loop(coroutine: Any) -> Any:
    from dramatiq.asyncio import get_event_loop_thread

    loop = get_event_loop_thread()
    if loop is None:
        raise DurableError("the event loop of async actors has gone: add dramatiq's AsyncIO middleware")
    return loop.run_coroutine(coroutine)
