"""The operations of escalations: what those outside do with them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from ..arrays import Uuid
from ..errors import EscalationConflict, EscalationNotFound
from .base import Context, Operation, Rows, SingleOperation


@dataclass(slots=True, eq=False)
class ChangeEscalation(SingleOperation):
    """Claim, release, resolve, cancel or reassign an escalation.  Answers it as it stands then, as JSON."""

    procedure = "change_escalation"
    parameters = 10
    rank = 27
    rides = True

    verb: str
    escalation: bytes
    by: str | None = None
    ms: int | None = None
    role: str | None = None
    payload: bytes | None = None
    #: The span that it comes from, as W3C's traceparent.
    trace: str | None = None
    #: The same call again is answered as before.
    call: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def arguments(cls, items: Sequence[ChangeEscalation], context: Context) -> list[Any]:
        (i,) = items
        return [
            *(context.sender, context.number(), i.verb, Uuid(i.escalation), Uuid(i.call)),
            *(i.by, i.ms, i.role, i.payload, i.trace),
        ]

    @classmethod
    def settle(cls, items: Sequence[ChangeEscalation], rows: Rows) -> None:
        (item,) = items
        answer, item.answer = rows[0]
        if answer == "missing":
            item.error = EscalationNotFound(
                f"there is no escalation {UUID(bytes=item.escalation)}, or this login may not see it"
            )
        elif answer == "conflict":
            item.error = _conflict(item, json.loads(item.answer))

    @classmethod
    def settle_committed(cls, items: Sequence[Operation]) -> bool:
        return False


@dataclass(slots=True, eq=False)
class ClaimEscalation(SingleOperation):
    """Claim the escalation of a role that comes first.  Answers it as JSON, or None where there is none."""

    procedure = "claim_escalation"
    parameters = 8
    rank = 28
    rides = True

    role: str
    metadata: str | None
    by: str
    ms: int | None
    call: bytes = field(default_factory=lambda: os.urandom(16))

    @classmethod
    def arguments(cls, items: Sequence[ClaimEscalation], context: Context) -> list[Any]:
        (i,) = items
        return [
            *(context.sender, context.number(), Uuid(i.call), int(i.retried)),
            *(i.role, i.metadata, i.by, i.ms),
        ]

    @classmethod
    def settle(cls, items: Sequence[ClaimEscalation], rows: Rows) -> None:
        items[0].answer = rows[0][0] if rows else None

    @classmethod
    def settle_committed(cls, items: Sequence[Operation]) -> bool:
        return False


def _conflict(item: ChangeEscalation, found: dict[str, Any]) -> EscalationConflict:
    status, holder = found["status"], found["claimed_by"]
    what = f"the escalation {found['id']}"
    if status == "claimed":
        text = (
            f"{what} is claimed by {holder!r}: only that one may {item.verb} it, until it is released or its claim ends"
        )
    elif status == "waiting":
        text = f"{what} is claimed by nobody (any more): there is nothing to release"
    else:
        text = f"{what} is {status.replace('_', ' ')} already"
    return EscalationConflict(text, status, holder)
