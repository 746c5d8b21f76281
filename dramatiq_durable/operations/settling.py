"""What a worker does with its deliveries: it claims them, says what became of them, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arrays import Blobs, Bools, Ints, Longs, Texts, Uuid, Uuids
from ..errors import NotPermitted
from .base import Context, LeaseOperation, Operation, Rows, to_json
from .sending import Enqueue


@dataclass(slots=True, eq=False)
class MarkStarted(LeaseOperation):
    """The actor of a reclaimed delivery is about to begin.  Also tells whether it is to be ``aborted`` instead, and
    whether it counts its retries ``anew``."""

    procedure = "mark_started"
    parameters = 3
    rank = 10

    aborted: bool = field(default=False, init=False)
    anew: bool = field(default=False, init=False)

    @classmethod
    def settle(cls, items: Sequence[Any], rows: Rows) -> None:
        LeaseOperation.settle(items, rows)
        for position, item in enumerate(items, 1):
            item.aborted = position in rows[0][1]
            item.anew = position in rows[0][2]

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class Ack(LeaseOperation):
    """The message is done."""

    procedure = "ack"
    parameters = 3
    rank = 11


@dataclass(slots=True, eq=False)
class Release(LeaseOperation):
    """The message goes back unprocessed."""

    procedure = "release"
    parameters = 3
    rank = 12


@dataclass(slots=True, eq=False)
class Reschedule(LeaseOperation):
    """The message is to be tried again after ``delay`` milliseconds, with a new payload if there is one."""

    procedure = "reschedule"
    parameters = 7
    rank = 13

    delay: int
    payload: bytes | None = None
    failure: str | None = None
    #: Whether it was an attempt.
    counted: bool = True

    @classmethod
    def arguments(cls, items: Sequence[Reschedule], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Longs([i.delay for i in items]),
            Blobs([i.payload for i in items]),
            Texts([i.failure for i in items]),
            Bools([i.counted for i in items]),
        ]


@dataclass(slots=True, eq=False)
class Bury(LeaseOperation):
    """The message goes to the dead letters."""

    procedure = "bury"
    parameters = 5
    rank = 14

    payload: bytes | None = None
    failure: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[Bury], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Blobs([i.payload for i in items]),
            Texts([i.failure for i in items]),
        ]


@dataclass(slots=True, eq=False)
class FinishEvent(LeaseOperation):
    """A topic's event is dealt with, or (``failed``) goes to the dead letters; the run's next one is sent."""

    procedure = "finish_events"
    parameters = 6
    rank = 19

    failed: bool = False
    payload: bytes | None = None
    failure: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[FinishEvent], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Bools([i.failed for i in items]),
            Blobs([i.payload for i in items]),
            Texts([i.failure for i in items]),
        ]


@dataclass(slots=True, eq=False)
class LookAgain(LeaseOperation):
    """A note said to look whether a run's next event can be sent."""

    procedure = "look_again"
    parameters = 3
    rank = 19


@dataclass(slots=True, eq=False)
class FailSettling(LeaseOperation):
    """Its end cannot be stored: the message is tried again later, and after a few times in a row a dead letter."""

    procedure = "fail_settling"
    parameters = 4
    rank = 17

    failure: str

    @classmethod
    def arguments(cls, items: Sequence[FailSettling], context: Context) -> list[Any]:
        return [*LeaseOperation.arguments(items, context), Texts([i.failure for i in items])]


@dataclass(slots=True, eq=False)
class CompleteActivity(LeaseOperation):
    """An activity's outcome goes into its run's inbox."""

    procedure = "complete_activities"
    parameters = 6
    rank = 15

    type: str
    payload: bytes | None
    attributes: dict[str, Any] | None

    @classmethod
    def arguments(cls, items: Sequence[CompleteActivity], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Texts([i.type for i in items]),
            Blobs([i.payload for i in items]),
            Texts([to_json(i.attributes) for i in items]),
        ]


@dataclass(slots=True, eq=False)
class FailTask(LeaseOperation):
    """A workflow task could not be done; it comes again after ``delay`` milliseconds."""

    procedure = "fail_task"
    parameters = 5
    rank = 16
    single = True

    failure: str
    delay: int

    @classmethod
    def arguments(cls, items: Sequence[FailTask], context: Context) -> list[Any]:
        (item,) = items
        return [context.registered(), Uuid(item.message_id), Uuid(item.lease), item.failure, item.delay]

    @classmethod
    def settle(cls, items: Sequence[Any], rows: Rows) -> None:
        items[0].answer = rows[0][0]


@dataclass(slots=True, eq=False)
class Result:
    """A result to keep for ``ttl`` milliseconds."""

    key: str
    value: bytes
    ttl: int


@dataclass(slots=True, eq=False)
class Leave(LeaseOperation):
    """What a message leaves behind; committed with what ends it, before it, under the same lease."""

    procedure = "leave"
    parameters = 19
    rank = 9

    results: list[Result] = field(default_factory=list)
    sends: list[Enqueue] = field(default_factory=list)
    #: It has succeeded as a member of its group; the last one's callbacks are sent.
    member: bool = False
    callbacks: list[Enqueue] = field(default_factory=list)

    @classmethod
    def arguments(cls, items: Sequence[Leave], context: Context) -> list[Any]:
        results = [(n, r) for n, item in enumerate(items, 1) for r in item.results]
        sends = [(n, False, s) for n, item in enumerate(items, 1) for s in item.sends]
        sends += [(n, True, s) for n, item in enumerate(items, 1) for s in item.callbacks]
        return [
            *LeaseOperation.arguments(items, context),
            Bools([i.member for i in items]),
            Ints([n for n, _ in results]),
            Texts([r.key for _, r in results]),
            Blobs([r.value for _, r in results]),
            Longs([r.ttl for _, r in results]),
            Ints([n for n, _, _ in sends]),
            Bools([last for _, last, _ in sends]),
            Ints([s.stream_id for _, _, s in sends]),
            Uuids([s.message_id for _, _, s in sends]),
            Texts([s.actor for _, _, s in sends]),
            Ints([s.priority for _, _, s in sends]),
            Longs([s.delay for _, _, s in sends]),
            Blobs([s.payload for _, _, s in sends]),
            Uuids([s.group for _, _, s in sends]),
            Texts([s.unique_key for _, _, s in sends]),
            Texts([s.conflict for _, _, s in sends]),
        ]

    @classmethod
    def settle(cls, items: Sequence[Leave], rows: Rows) -> None:
        for item, status in zip(items, rows[0][0], strict=True):
            item.answer = status == 1
            item.error = None
            if status == -2:
                item.error = NotPermitted(
                    "max_live: this login has as much under way as it may. It is tried again; let an administrator "
                    "raise max_live where this lasts"
                )
            elif status < 0:
                item.error = NotPermitted(
                    "a hook sends to a stream that does not exist, or that this login may not use"
                )


@dataclass(slots=True, eq=False)
class Together(Operation):
    """The end of a message and what it leaves behind: committed together or not at all, because the second finds the
    lease gone where the first was refused.  Answers whether the lease was the live one."""

    procedure = ""
    parameters = 0
    rank = 50

    parts: list[Operation]

    def settle_parts(self) -> None:
        """Take the answers of the parts: the first error is the error of all."""
        self.error = next((part.error for part in self.parts if part.error is not None), None)
        self.answer = all(part.answer is not False for part in self.parts)

    @classmethod
    def settle_committed(cls, items: Sequence[Together]) -> bool:
        for item in items:
            item.answer = True
        return True


@dataclass(slots=True, eq=False)
class Claim(Operation):
    """Hand out messages.  Answers (deliveries' rows, milliseconds until the next one is due or None).

    It can carry acks, so that a busy worker's turn is one statement.
    """

    procedure = "claim"
    parameters = 8
    rank = 40
    single = True

    streams: list[int]
    limits: list[int]
    total: int
    done: list[bytes]
    wait: int
    #: For whoever claims: whether these are streams of runs.
    of_runs: bool = False
    acks: Sequence[Ack] = field(default=(), init=False)

    @classmethod
    def arguments(cls, items: Sequence[Claim], context: Context) -> list[Any]:
        (item,) = items
        return [
            *LeaseOperation.arguments(item.acks, context),
            Ints(item.streams),
            Ints(item.limits),
            item.total,
            Uuids(item.done),
            item.wait,
        ]

    @classmethod
    def settle(cls, items: Sequence[Claim], rows: Rows) -> None:
        (item,) = items
        *found, (*_, next_due, refused) = rows
        item.answer = (found, next_due)
        if item.acks:
            Ack.settle(item.acks, [(refused,)])

    @classmethod
    def settle_committed(cls, items: Sequence[Claim]) -> bool:
        items[0].answer = ([], None)
        return True
