"""The operations of schedules: what their owners and their ticks' workers commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..arrays import Blobs, Ints, Longs, Uuids
from .base import Context, LeaseOperation, Rows, SingleOperation


@dataclass(slots=True, eq=False)
class SaveSchedule(SingleOperation):
    """Make or change a schedule."""

    procedure = "save_schedule"
    parameters = 15
    rank = 24

    name: str
    if_exists: str
    paused: bool
    stream_id: int
    kind: str
    actor: str
    priority: int
    template: bytes
    facts: str | None
    cron: str
    timezone: str
    catch_up: int
    overlap: str

    @classmethod
    def arguments(cls, items: Sequence[SaveSchedule], context: Context) -> list[Any]:
        (i,) = items
        return [
            *(context.sender, context.number(), i.name, i.if_exists, i.paused),
            *(i.stream_id, i.kind, i.actor, i.priority),
            *(i.template, i.facts, i.cron, i.timezone, i.catch_up, i.overlap),
        ]


@dataclass(slots=True, eq=False)
class ControlSchedule(SingleOperation):
    """Pause, resume or delete a schedule."""

    procedure = "control_schedule"
    parameters = 4
    rank = 25

    name: str
    verb: str

    @classmethod
    def arguments(cls, items: Sequence[ControlSchedule], context: Context) -> list[Any]:
        (item,) = items
        return [context.sender, context.number(), item.name, item.verb]


class Due(NamedTuple):
    """A due time, in milliseconds since the epoch (None: now), the id of what it fires, and a message's payload."""

    at: int | None
    id: bytes
    payload: bytes | None


@dataclass(slots=True, eq=False)
class FireByHand(SingleOperation):
    """Fire a schedule now or for due times of the past.  Answers for each whether it was fired."""

    procedure = "fire_by_hand"
    parameters = 7
    rank = 26

    name: str
    revision: int
    due: list[Due]
    stream_id: int

    @classmethod
    def arguments(cls, items: Sequence[FireByHand], context: Context) -> list[Any]:
        (item,) = items
        return [context.sender, context.number(), item.name, item.revision, *_columns(item.due)]

    @classmethod
    def settle_committed(cls, items: Sequence[FireByHand]) -> bool:
        # Which of them were live already is not known; now all of them have been fired.
        items[0].answer = [True] * len(items[0].due)
        return True


@dataclass(slots=True, eq=False)
class LookUpSchedule(LeaseOperation):
    """What a schedule is whose tick is leased.  Answers its facts, or None when the lease is gone."""

    procedure = "schedules_of_leases"
    parameters = 3
    rank = 17

    @classmethod
    def settle(cls, items: Sequence[LookUpSchedule], rows: Rows) -> None:
        for item in items:
            item.answer = None
        for n, *facts in rows:
            items[n - 1].answer = facts

    @classmethod
    def settle_committed(cls, items: Sequence[LookUpSchedule]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class FireSchedule(LeaseOperation):
    """Fire what is due, and put the tick back.  Times are milliseconds since the epoch."""

    procedure = "fire_schedules"
    parameters = 10
    rank = 18

    seen: int
    missed: int
    next: int
    stream_id: int
    due: list[Due] = field(default_factory=list)
    #: How many messages were fired.
    fired: int = field(default=0, init=False)

    @classmethod
    def arguments(cls, items: Sequence[FireSchedule], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Longs([i.seen for i in items]),
            Longs([i.missed for i in items]),
            Longs([i.next for i in items]),
            Ints([len(i.due) for i in items]),
            *_columns([due for i in items for due in i.due]),
        ]

    @classmethod
    def settle(cls, items: Sequence[FireSchedule], rows: Rows) -> None:
        LeaseOperation.settle(items, rows)
        for item, fired in zip(items, rows[0][1], strict=True):
            item.fired = fired


def _columns(due: Sequence[Due]) -> list[Any]:
    return [Longs([d.at for d in due]), Uuids([d.id for d in due]), Blobs([d.payload for d in due])]
