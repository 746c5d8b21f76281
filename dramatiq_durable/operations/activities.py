"""What becomes of activities beside their ends: they begin, beat, wait for a token, and run out of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from ..errors import OutcomeUnknown, UnknownToken
from .base import Context, LeaseOperation, Operation, Rows, to_json


@dataclass(slots=True, eq=False)
class StartActivity(LeaseOperation):
    """The actor of an activity with limits is about to begin."""

    procedure = "start_activities"
    parameters = 3
    rank = 8

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class Beat(LeaseOperation):
    """An activity goes on.  Answers ok, cancelled or gone."""

    procedure = "beat_activities"
    parameters = 4
    rank = 8

    payload: bytes | None

    @classmethod
    def arguments(cls, items: Sequence[Beat], context: Context) -> list[Any]:
        return [*LeaseOperation.arguments(items, context), Blobs([i.payload for i in items])]

    @classmethod
    def settle(cls, items: Sequence[Beat], rows: Rows) -> None:
        for item, answer in zip(items, rows[0][0], strict=True):
            item.answer = answer

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class Defer(LeaseOperation):
    """A running activity will be ended by whoever has the token with this digest."""

    procedure = "defer_activity"
    parameters = 4
    rank = 8
    single = True

    token: bytes

    @classmethod
    def arguments(cls, items: Sequence[Defer], context: Context) -> list[Any]:
        (item,) = items
        return [context.registered(), Uuid(item.message_id), Uuid(item.lease), item.token]

    @classmethod
    def settle(cls, items: Sequence[Defer], rows: Rows) -> None:
        items[0].answer = rows[0][0]

    @classmethod
    def settle_committed(cls, items: Sequence[Any]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class Park(LeaseOperation):
    """An activity whose actor has returned waits for its token."""

    procedure = "park_activities"
    parameters = 3
    rank = 15


@dataclass(slots=True, eq=False)
class Expire(LeaseOperation):
    """The alarm of an activity went off: its limits are looked at."""

    procedure = "expire_activities"
    parameters = 3
    rank = 18


@dataclass(slots=True, eq=False)
class FinishActivity(Operation):
    """Whoever has its token ends an activity."""

    procedure = "finish_activities"
    parameters = 10
    rank = 19
    numbered = True

    run_id: bytes
    seq: int
    token: bytes
    type: str
    payload: bytes | None
    attributes: dict[str, Any] | None
    #: In how many milliseconds another attempt follows, unless it was cancelled; and what this one shows until then.
    delay: int | None = None
    failure: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[FinishActivity], context: Context) -> list[Any]:
        return [
            context.sender,
            context.number(),
            Uuids([i.run_id for i in items]),
            Ints([i.seq for i in items]),
            Blobs([i.token for i in items]),
            Texts([i.type for i in items]),
            Blobs([i.payload for i in items]),
            Texts([to_json(i.attributes) for i in items]),
            Longs([i.delay for i in items]),
            Texts([i.failure for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[FinishActivity], rows: Rows) -> None:
        for item, answer in zip(items, rows[0][0], strict=True):
            item.answer = answer
            item.error = unknown_token() if answer == "missing" else None

    @classmethod
    def settle_committed(cls, items: Sequence[FinishActivity]) -> bool:
        # Whether it was refused is lost with the answer: what was done is refused when it is repeated.
        for item in items:
            item.error = OutcomeUnknown(
                "the connection broke while the activity was ended: if the token is refused now, it was ended"
            )
        return True


def unknown_token() -> UnknownToken:
    return UnknownToken(
        "no activity waits for this token: it was used already, its activity has ended otherwise (out of time, "
        "cancelled, its run closed) or begun another attempt, or it is no token of complete_later()"
    )
