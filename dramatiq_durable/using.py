"""Sending in the caller's own transaction: what is sent inside of a `using` block commits with it, or vanishes with it.

Nothing is committed here, and the caller's transaction is not harmed by what can be known beforehand: whether the
connection is to the broker's database, and its login has grants there, is read from the catalogue first.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import Token
from itertools import count
from types import TracebackType
from typing import Any, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

from .arrays import literal
from .carriers import AsyncCarrier, Call, Carrier, Place, async_carrier_of, carrier_of, clear_errors
from .errors import DurableError, NotConfigured, NotPermitted
from .group_commit import MAX_BATCH, MAX_BATCH_BYTES, GroupCommit, Ride, riding
from .operations import Context, Operation

R = TypeVar("R")

#: What is to be asked on a connection, one after the other; each answer is sent in.
Questions = Generator[Call, str, None]


class using:  # noqa: N801 - used like a function
    """Send in a transaction of your own: ``with using(connection):``, or ``async with`` where it is awaited.

    Inside of the block ``send``, ``send_with_options``, ``broker.enqueue``, ``broker.enqueue_many``, the ``run`` of
    groups and pipelines, the start of workflows, and their handles' ``signal``, ``cancel`` and ``terminate`` are part
    of the connection's transaction: they commit with it, or vanish with it (or with the savepoint they were done in).
    The block itself neither begins nor ends a transaction.  Blocks may be nested: the innermost counts.  It holds for
    the thread, or the task, that is in the block, and for the tasks that were begun there.

    On a connection that blocks, each is done at once.  On one that is awaited, a plain ``send`` cannot be: it is done
    when the block ends, in order, and so the transaction must not end before; what has an awaited twin (``await
    actor.asend()``) is done at once, after what was sent before it.

    Parameters:
      connection: a psycopg 3 Connection or AsyncConnection; a SQLAlchemy 2 Connection, Session, AsyncConnection or
        AsyncSession, with any driver; Django's connection (``django.db.connection``, ``connections["..."]``).

    Raises:
      TypeError: it is none of these, or ``with`` is used where ``async with`` is needed, or the other way round.
      NotConfigured: (when something is sent) it is connected to another database than the broker.
      NotPermitted: (when something is sent) its login may not use the namespace, or the stream.
      DurableError: (when something is sent) no transaction is open, or it has failed, or the block has ended.
    """

    def __init__(self, connection: Any) -> None:
        self._ride: _Ride | _AsyncRide
        if (carrier := carrier_of(connection)) is not None:
            self._ride = _Ride(carrier)
        elif (async_carrier := async_carrier_of(connection)) is not None:
            self._ride = _AsyncRide(async_carrier)
        else:
            kind = type(connection)
            raise TypeError(
                "using() takes a psycopg 3 Connection or AsyncConnection, a SQLAlchemy 2 Connection, Session, "
                "AsyncConnection or AsyncSession, or Django's connection (django.db.connection), not a "
                f"{kind.__module__}.{kind.__qualname__}"
            )
        self._token: Token[Ride | None] | None = None

    def __enter__(self) -> None:
        if isinstance(self._ride, _AsyncRide):
            raise TypeError("this connection is awaited: write `async with using(...):`")
        self._token = riding.set(self._ride)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._ride.ended = True
        self._leave()

    async def __aenter__(self) -> None:
        if not isinstance(self._ride, _AsyncRide):
            raise TypeError("this connection blocks, and is not awaited: write `with using(...):`")
        outer = riding.get()
        if isinstance(outer, _AsyncRide):
            # On the same connection, what was sent in the block around comes before what is sent in this one.
            await outer.flush()
        self._ride.began = self._ride.carrier.place()
        self._token = riding.set(self._ride)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert isinstance(self._ride, _AsyncRide)
        try:
            self._leave()
            # Also after an exception: whoever catches it, and commits, has sent what he sent.
            if exc is None or isinstance(exc, Exception):
                await self._ride.flush()
        except Exception as e:
            if exc is None:
                raise
            exc.add_note(f"What was sent in the using() block was not stored: {e}")
        finally:
            self._ride.ended = True

    def _leave(self) -> None:
        assert self._token is not None
        try:
            riding.reset(self._token)
        except ValueError:
            raise DurableError(
                "this using() block is left in another context than it was entered in, as it happens to a generator "
                "that a framework runs on threads: open the block in the function that sends"
            ) from None


async def sending(call: Callable[[], R]) -> R:
    """The awaited twin of something that sends: on a thread; inside of ``async with using(...)`` on its connection."""
    ride = riding.get()
    if isinstance(ride, _AsyncRide):
        return await ride.at_once(call)
    return await asyncio.to_thread(call)


def is_awaited() -> bool:
    """Whether what is sent here is stored on a connection that is awaited, and so maybe later."""
    return isinstance(riding.get(), _AsyncRide)


class _Ride:
    """A block around a connection that blocks: everything is done at once."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.ended = False

    def take(self, commit: GroupCommit, operations: Sequence[Operation]) -> None:
        if self.ended:
            raise DurableError(_ENDED)
        with clear_errors():
            driver = self._carrier.open()
            questions = _questions(commit, operations, driver)
            try:
                call = next(questions)
                while True:
                    call = questions.send(self._carrier.ask(call))
            except StopIteration:
                pass


class _AsyncRide:
    """A block around a connection that is awaited: what cannot wait for it is done at the block's end."""

    def __init__(self, carrier: AsyncCarrier) -> None:
        self.carrier = carrier
        self.ended = False
        self.began = Place(None, None)
        self._sent: list[tuple[GroupCommit, Operation, Place]] = []
        self._plain = True
        self._lock = asyncio.Lock()

    def take(self, commit: GroupCommit, operations: Sequence[Operation]) -> None:
        if self.ended:
            raise DurableError(_ENDED)
        place = self.carrier.place()
        if self._plain and place.savepoint != self.began.savepoint:
            raise DurableError(
                "this is sent inside of a transaction or a savepoint that will be over when its `async with "
                "using(...)` block ends, and only then can it be stored: write `await actor.asend(...)`, or open the "
                "block inside"
            )
        # Before the transaction is touched, and while it may block as the look-up of a stream does.
        commit.database.identity()
        self._sent += [(commit, operation, place) for operation in operations]

    async def at_once(self, call: Callable[[], R]) -> R:
        """Call something that sends, and store what it has sent."""
        self._plain = False
        try:
            answer = call()
        finally:
            self._plain = True
        await self.flush()
        return answer

    async def flush(self) -> None:
        """Store what was sent so far; raises the first error."""
        async with self._lock:
            sent, self._sent = self._sent, []
            if not sent:
                return
            place = self.carrier.place()
            for _, _, then in sent:
                if then.savepoint != place.savepoint or then.transaction not in (None, place.transaction):
                    raise DurableError(
                        "the transaction (or the savepoint) in which something was sent has ended, or another has "
                        "begun, before it was stored: end the `async with using(...)` block before the transaction, "
                        "or write `await actor.asend(...)`"
                    )
            with clear_errors():
                driver = await self.carrier.open()
                for commit in dict.fromkeys(commit for commit, _, _ in sent):
                    questions = _questions(commit, [operation for c, operation, _ in sent if c is commit], driver)
                    try:
                        call = next(questions)
                        while True:
                            call = questions.send(await self.carrier.ask(call))
                    except StopIteration:
                        pass
            for _, operation, _ in sent:
                if operation.error is not None:
                    raise operation.error


_ENDED = (
    "the using() block in which this was begun has ended: a task or a thread that goes on longer is to be started "
    "outside of it"
)

# --- what is asked on the connection --------------------------------------------------------------------------

#: The namespaces that connections were found to belong to; by the driver's own connection, which pools keep.
_known: WeakKeyDictionary[Any, set[bytes]] = WeakKeyDictionary()

#: Reads nothing but the catalogue, and fails for nobody: database, login, and whether he may use the schema (NULL:
#: there is none) and its function (NULL: there is none).
_CATALOGUE = """
    SELECT CAST(pg_catalog.json_build_array(
        pg_catalog.current_database(), session_user,
        (SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') FROM pg_catalog.pg_namespace n
         WHERE n.nspname = CAST({} AS text)),
        (SELECT pg_catalog.bool_or(pg_catalog.has_function_privilege(p.oid, 'EXECUTE')) FROM pg_catalog.pg_proc p
         JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
         WHERE n.nspname = CAST({} AS text) AND p.proname = 'namespace_identity')) AS text)
"""


def _questions(commit: GroupCommit, operations: Sequence[Operation], driver: Any) -> Questions:
    """Everything that is to be asked so that the operations are done; they have their answers or errors then."""
    if commit.database.identity() not in _known.get(driver, ()):
        yield from _belongs(commit)
        _known.setdefault(driver, set()).add(commit.database.identity())
    for items in _calls(operations):
        kind = type(items[0])
        # The outcome of a caller's own transaction he finds out by himself: no sender.
        rows = json.loads((yield _call(commit.database.namespace, kind, items)))
        kind.settle(items, [_row(row) for row in rows])
        # Whether the caller commits it, nobody here finds out.
        commit.metrics.settled(items)
        for item in items:
            if item.then is not None:
                item.then(item)


def _belongs(commit: GroupCommit) -> Questions:
    """Whether the connection is to the broker's namespace, and may be used there.

    Raises:
      NotConfigured: it is to another one.
      NotPermitted: its login has no grants.
    """
    namespace = commit.database.namespace
    answer = yield Call(_CATALOGUE, [namespace, namespace])
    database, login, may_use, may_call = json.loads(answer)
    elsewhere = NotConfigured(
        f"the connection given to using() is to the database {database!r}, whose namespace {namespace!r} "
        f"{'does not exist' if may_use is None else 'is another one'}, and not to the broker's: give both the same "
        "database, so that they can share a transaction"
    )
    if may_use is None or (may_use and may_call is None):
        raise elsewhere
    if may_use and may_call:
        answer = yield Call(
            "SELECT CAST(pg_catalog.json_build_array(i.id, i.granted) AS text) "
            f'FROM "{namespace}".namespace_identity() i',
            [],
        )
        found, granted = json.loads(answer)
        if UUID(found).bytes not in (commit.database.identity(), commit.database.identity(again=True)):
            raise elsewhere
        if granted:
            return
    raise NotPermitted(
        f"the login {login!r} of the connection given to using() may not send to the namespace {namespace!r}: run "
        f"`dramatiq-durable role grant {login} --produce STREAM`"
    )


def _calls(operations: Iterable[Operation]) -> list[list[Operation]]:
    """What goes into one call each: neighbours of one kind, as many as a batch may have."""
    calls: list[list[Operation]] = []
    room = 0
    for operation in operations:
        kind = type(operation)
        if not calls or kind is not type(calls[-1][0]) or kind.single or len(calls[-1]) == MAX_BATCH or room <= 0:
            calls.append([])
            room = MAX_BATCH_BYTES
        calls[-1].append(operation)
        room -= len(getattr(operation, "payload", None) or b"")
    return calls


def _call(namespace: str, kind: type[Operation], items: Sequence[Operation]) -> Call:
    marks: list[str] = []
    parameters: list[str] = []
    for argument in kind.arguments(items, Context(None, count(1))):
        if argument is None:
            marks.append("NULL")
            continue
        text, type_ = literal(argument)
        # A parameter is a text; a driver that asks the server what it is (as asyncpg does) must hear that.
        marks.append(f"CAST(CAST({{}} AS text) AS {type_})")
        parameters.append(text)
    call = f'"{namespace}".{kind.procedure}({", ".join(marks)})'
    return Call(f"SELECT CAST(pg_catalog.json_agg(r) AS text) FROM {call} r", parameters)


def _row(row: Any) -> tuple[Any, ...]:
    """A row of a procedure, as our own connections read it."""
    if not isinstance(row, dict):
        return (row,)
    ids = ("run_id", "message_id")
    return tuple(UUID(v).bytes if name in ids and v is not None else v for name, v in row.items())
