"""What is asked of runs and answered by their code: updates, queries; and starts that bring a message with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arrays import Blobs, Texts, Uuids
from ..errors import WorkflowClosed
from .base import Context, LeaseOperation, Operation, Rows, to_json
from .sending import StartRun, unreachable


@dataclass(slots=True, eq=False)
class RequestUpdate(Operation):
    """Ask a run for an update, once for each id.  Answers (ok or duplicate, the run that has it)."""

    procedure = "request_updates"
    parameters = 8
    rank = 24
    numbered = True

    run_id: bytes | None
    workflow_id: str | None
    update_id: str
    name: str
    payload: bytes
    #: The span that it comes from, as W3C's traceparent.
    trace: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[RequestUpdate], context: Context) -> list[Any]:
        return [
            context.sender,
            context.number(),
            Uuids([i.run_id for i in items]),
            Texts([i.workflow_id for i in items]),
            Texts([i.update_id for i in items]),
            Texts([i.name for i in items]),
            Blobs([i.payload for i in items]),
            Texts([i.trace for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[RequestUpdate], rows: Rows) -> None:
        for item, (status, run_id) in zip(items, rows, strict=True):
            item.answer = (status, run_id)
            item.error = unreachable(status, item)


@dataclass(slots=True, eq=False)
class StartRunWith(StartRun):
    """Start a run, or find the one that has the id, and give it a signal or an update in the same transaction."""

    procedure = "start_runs_with"
    parameters = 16

    with_type: str = field(kw_only=True)
    with_name: str = field(kw_only=True)
    with_payload: bytes | None = field(kw_only=True)
    #: Under which it is taken once: an update's id, a signal's.
    with_key: str = field(kw_only=True)
    #: The span that it comes from, as W3C's traceparent.
    with_trace: str | None = field(default=None, kw_only=True)

    @classmethod
    def arguments(cls, items: Sequence[Any], context: Context) -> list[Any]:
        return [
            *StartRun.arguments(items, context),
            Texts([i.with_type for i in items]),
            Texts([i.with_name for i in items]),
            Blobs([i.with_payload for i in items]),
            Texts([i.with_key for i in items]),
            Texts([i.with_trace for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[StartRun], rows: Rows) -> None:
        StartRun.settle(items, rows)
        for item in items:
            if item.answer[0] == "closed":
                item.error = WorkflowClosed(
                    f"the workflow {item.workflow_id!r} ended before it could be told anything: start it again"
                )


@dataclass(slots=True, eq=False)
class AnswerQuery(LeaseOperation):
    """Answer a query, and be done with its message."""

    procedure = "answer_queries"
    parameters = 5
    rank = 12

    payload: bytes | None
    failure: dict[str, Any] | None

    @classmethod
    def arguments(cls, items: Sequence[Any], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Blobs([i.payload for i in items]),
            Texts([to_json(i.failure) for i in items]),
        ]
