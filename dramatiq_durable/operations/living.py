"""The life of runs: their time limits, and their being taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays import Texts, Uuid
from ..errors import WorkflowNotFound
from ..workflow.events import RESETTABLE_TYPES
from .base import Context, LeaseOperation, Operation, Rows


@dataclass(slots=True, eq=False)
class ExpireRun(LeaseOperation):
    """The time of a run is over whose deadline is leased: end it, if it still lives."""

    procedure = "expire_runs"
    parameters = 3
    rank = 19


@dataclass(slots=True, eq=False)
class LookAtEnd(Operation):
    """How the database has ended a run.  Answers its row, or None if it has not."""

    procedure = "get_closing"
    parameters = 1
    rank = 20
    single = True

    run_id: bytes

    @classmethod
    def arguments(cls, items: Sequence[LookAtEnd], context: Context) -> list[Any]:
        (item,) = items
        return [Uuid(item.run_id)]

    @classmethod
    def settle(cls, items: Sequence[LookAtEnd], rows: Rows) -> None:
        items[0].answer = rows[0] if rows else None


@dataclass(slots=True, eq=False)
class ResetRun(Operation):
    """Take a run up again at an event, as a new run.  Answers its run id."""

    procedure = "reset_run"
    parameters = 7
    rank = 24
    numbered = single = True

    run_id: bytes | None
    workflow_id: str | None
    to_event: int
    new_run_id: bytes

    @classmethod
    def arguments(cls, items: Sequence[ResetRun], context: Context) -> list[Any]:
        (item,) = items
        return [
            context.sender,
            context.number(),
            None if item.run_id is None else Uuid(item.run_id),
            item.workflow_id,
            item.to_event,
            Uuid(item.new_run_id),
            Texts(sorted(RESETTABLE_TYPES)),
        ]

    @classmethod
    def settle(cls, items: Sequence[ResetRun], rows: Rows) -> None:
        (item,) = items
        status, last = rows[0]
        item.answer = item.new_run_id
        if status == "missing":
            item.error = WorkflowNotFound(
                f"there is no workflow {item.workflow_id or 'with this run id'!r} in this namespace, or this login may "
                "not see it"
            )
        elif status == "invalid":
            item.error = ValueError(f"the run has no event {item.to_event} to be reset to: history() has 1 to {last}")

    @classmethod
    def settle_committed(cls, items: Sequence[ResetRun]) -> bool:
        # Whether the event was there is not known; asking again is safe, and tells.
        return False
