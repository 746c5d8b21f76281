"""What an operation is: one item of a group commit, and the call that all items of its kind in a batch become."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

from ..arrays import Uuid, Uuids
from ..errors import LeaseLost

Rows = list[tuple[Any, ...]]


class Context:
    """What a batch's calls have in common: who sends, and as which worker."""

    def __init__(self, sender: bytes | None, next_batch: count[int]) -> None:
        #: None where the operations are part of a transaction whose outcome is found out otherwise.
        self.sender = None if sender is None else Uuid(sender)
        self.worker: Uuid | None = None
        self.last_batch = 0
        self._next_batch = next_batch

    def number(self) -> int:
        """A fresh batch number: what carries one is committed once, also when its answer is lost."""
        self.last_batch = next(self._next_batch)
        return self.last_batch

    def registered(self) -> Uuid:
        """The worker's token.  Raises LeaseLost when there is none (any more): its leases went with it."""
        if self.worker is None:
            raise LeaseLost("this process is not registered as a worker (any more): what it held was given back")
        return self.worker


@dataclass(slots=True, eq=False)
class Operation:
    """One item of a group commit.

    Attributes:
      answer: what came of it, once it is committed.
      error: why it failed, if it did.
      then: called with the operation, on the committing thread, once it is committed or has failed.
    """

    #: The procedure's name, its number of parameters, its place in a batch, and whether it carries a batch number.
    procedure: ClassVar[str]
    parameters: ClassVar[int]
    rank: ClassVar[int]
    numbered: ClassVar[bool] = False
    #: Whether it is done in the caller's own transaction where there is one (`using`).
    rides: ClassVar[bool] = False
    #: Whether its procedure takes one item a call.
    single: ClassVar[bool] = False

    answer: Any = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    then: Callable[[Any], None] | None = field(default=None, init=False)
    retried: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    #: How often it was tried in vain, and could be tried again: as a rule, somebody's lock was in its way.
    tries: int = field(default=0, init=False)
    gate: Any = field(default=None, init=False)
    #: Where it is counted what becomes of its message (see `metrics`).
    lane: Any = field(default=None, init=False)

    @classmethod
    def arguments(cls, items: Sequence[Any], context: Context) -> list[Any]:
        """The call's arguments for all these items."""
        raise NotImplementedError

    @classmethod
    def settle(cls, items: Sequence[Any], rows: Rows) -> None:
        """Give each item its answer, or its error."""
        raise NotImplementedError

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        """The batch is known to be committed, but its answer is lost.

        Returns:
          bool: whether that settles the items; if not, they are to be called again, which is safe and tells.
        """
        return False


@dataclass(slots=True, eq=False)
class SingleOperation(Operation):
    """What is one item a call, done for good where its batch was committed.  Answers what its procedure does."""

    numbered = single = True

    @classmethod
    def settle(cls, items: Sequence[Any], rows: Rows) -> None:
        items[0].answer = rows[0][0]

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        return True


@dataclass(slots=True, eq=False)
class LeaseOperation(Operation):
    """What a worker does with a delivery.  Answers whether the lease was the live one."""

    message_id: bytes
    lease: bytes

    @classmethod
    def arguments(cls, items: Sequence[Any], context: Context) -> list[Any]:
        return [context.registered(), Uuids([i.message_id for i in items]), Uuids([i.lease for i in items])]

    @classmethod
    def settle(cls, items: Sequence[Any], rows: Rows) -> None:
        for item in items:
            item.answer = True
        for position in rows[0][0]:
            items[position - 1].answer = False

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        for item in items:
            item.answer = True
        return True


def statement(namespace: str, operation: type[Operation]) -> bytes:
    """The text of an operation's call."""
    marks = ", ".join(["%s"] * operation.parameters)
    return f'SELECT * FROM "{namespace}".{operation.procedure}({marks})'.encode()


def to_json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, separators=(",", ":"))
