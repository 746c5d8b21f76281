"""What is sent from outside of any delivery: messages, starts of runs, signals, cancels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.types.numeric import Int4, Int8

from ..arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from ..errors import (
    FOREIGN,
    DatabaseUnavailable,
    MessageExists,
    NotPermitted,
    WorkflowAlreadyStarted,
    WorkflowClosed,
    WorkflowNotFound,
)
from .base import Context, Operation, Rows, SingleOperation


@dataclass(slots=True, eq=False)
class Enqueue(Operation):
    """Store a message.  Answers 1: stored; 0: it was there already."""

    procedure = "enqueue_messages"
    parameters = 8
    rank = 20
    numbered = rides = True

    stream_id: int
    message_id: bytes
    actor: str
    priority: int
    delay: int
    payload: bytes
    #: The group whose completion it counts for.
    group: bytes | None = None
    #: At most one live message of its stream has this key; what becomes of a second: skip, fail or replace.
    unique_key: str | None = None
    conflict: str = "skip"

    @classmethod
    def arguments(cls, items: Sequence[Enqueue], context: Context) -> list[Any]:
        return [
            context.sender,
            context.number(),
            Ints([i.stream_id for i in items]),
            Uuids([i.message_id for i in items]),
            Texts([i.actor for i in items]),
            Ints([i.priority for i in items]),
            Longs([i.delay for i in items]),
            Blobs([i.payload for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[Enqueue], rows: Rows) -> None:
        for item, answer in zip(items, rows[0][0], strict=True):
            item.answer = answer
            if answer < 0:
                item.error = NotPermitted(FOREIGN)

    @classmethod
    def settle_committed(cls, items: Sequence[Enqueue]) -> bool:
        for item in items:
            item.answer = 1
        return True


@dataclass(slots=True, eq=False)
class EnqueueOne(Enqueue):
    """How an `Enqueue` that is alone in its batch is called: with plain values, which is faster on both sides."""

    procedure = "enqueue_message"

    @classmethod
    def arguments(cls, items: Sequence[Enqueue], context: Context) -> list[Any]:
        (item,) = items
        return [
            context.sender,
            Int8(context.number()),
            Int4(item.stream_id),
            Uuid(item.message_id),
            item.actor,
            Int4(item.priority),
            Int8(item.delay),
            item.payload,
        ]

    @classmethod
    def settle(cls, items: Sequence[Enqueue], rows: Rows) -> None:
        Enqueue.settle(items, [([rows[0][0]],)])


@dataclass(slots=True, eq=False)
class EnqueueKeyed(Enqueue):
    """Store a message with a unique key, or of a group.  Answers (1: stored or 0: not, the id that is there)."""

    procedure = "enqueue_keyed"
    parameters = 11

    @classmethod
    def arguments(cls, items: Sequence[Enqueue], context: Context) -> list[Any]:
        return [
            *Enqueue.arguments(items, context),
            Uuids([i.group for i in items]),
            Texts([i.unique_key for i in items]),
            Texts([i.conflict for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[Enqueue], rows: Rows) -> None:
        for item, (status, message_id) in zip(items, rows, strict=True):
            item.answer = (status, message_id)
            item.error = None
            if status < 0:
                item.error = NotPermitted(FOREIGN)
            elif not status and message_id != item.message_id and item.conflict == "fail":
                live = str(UUID(bytes=message_id))
                item.error = MessageExists(
                    f"the stream has a live message with the unique key {item.unique_key!r}: {live}. Send again once "
                    "it is done, or say what is to become of the second: unique_conflict='skip' or 'replace'",
                    live,
                )

    @classmethod
    def settle_committed(cls, items: Sequence[Enqueue]) -> bool:
        # Those that were not stored are called again (see `GroupCommit`).
        for item in items:
            item.answer = (1, item.message_id)
        return True


@dataclass(slots=True, eq=False)
class StartRun(Operation):
    """Start a run.  Answers (status, run id): started, or exists where the caller takes that.  The same run id again is
    the same run."""

    procedure = "start_runs"
    parameters = 11
    rank = 21
    numbered = rides = True

    run_id: bytes
    workflow_id: str
    stream_id: int
    name: str
    input: bytes
    conflict: str = "fail"
    reuse: str = "allow"
    delay: int = 0
    #: What it is started with beside its input, as JSON: the first event's attributes.
    facts: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[StartRun], context: Context) -> list[Any]:
        return [
            context.sender,
            context.number(),
            Uuids([i.run_id for i in items]),
            Texts([i.workflow_id for i in items]),
            Ints([i.stream_id for i in items]),
            Texts([i.name for i in items]),
            Blobs([i.input for i in items]),
            Texts([i.conflict for i in items]),
            Texts([i.reuse for i in items]),
            Longs([i.delay for i in items]),
            Texts([i.facts for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[StartRun], rows: Rows) -> None:
        for item, (status, run_id) in zip(items, rows, strict=True):
            item.answer = (status, run_id)
            if status == "denied":
                item.error = NotPermitted(FOREIGN)
            elif status == "busy":
                item.error = DatabaseUnavailable(
                    f"the workflow id {item.workflow_id!r} is being fought over, try again"
                )
            elif status == "used":
                item.error = WorkflowAlreadyStarted(
                    f"a run that has ended has the workflow id {item.workflow_id!r}, and id_reuse is {item.reuse!r}: "
                    "choose another id, or id_reuse='allow'"
                )
            elif status == "exists" and item.conflict != "use_existing":
                item.error = WorkflowAlreadyStarted(
                    f"a run has the workflow id {item.workflow_id!r} already; choose another id, or another "
                    "id_conflict or id_reuse"
                )


@dataclass(slots=True, eq=False)
class Post(Operation):
    """Put a signal or a cancel into a run's inbox, once for each key.  Answers ok or duplicate."""

    procedure = "post"
    parameters = 9
    rank = 22
    numbered = rides = True

    run_id: bytes | None
    workflow_id: str | None
    type: str
    name: str | None
    payload: bytes | None
    key: str
    #: The span that it comes from, as W3C's traceparent.
    trace: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[Post], context: Context) -> list[Any]:
        return [
            context.sender,
            context.number(),
            Uuids([i.run_id for i in items]),
            Texts([i.workflow_id for i in items]),
            Texts([i.type for i in items]),
            Texts([i.name for i in items]),
            Blobs([i.payload for i in items]),
            Texts([i.key for i in items]),
            Texts([i.trace for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[Post], rows: Rows) -> None:
        for item, answer in zip(items, rows[0][0], strict=True):
            item.answer = answer
            item.error = unreachable(answer, item)


@dataclass(slots=True, eq=False)
class Terminate(SingleOperation):
    """End a run from outside.  Answers ok."""

    procedure = "terminate_run"
    parameters = 5
    rank = 23
    rides = True

    run_id: bytes | None
    workflow_id: str | None
    reason: str | None

    @classmethod
    def arguments(cls, items: Sequence[Terminate], context: Context) -> list[Any]:
        (item,) = items
        run_id = None if item.run_id is None else Uuid(item.run_id)
        return [context.sender, context.number(), run_id, item.workflow_id, item.reason]

    @classmethod
    def settle(cls, items: Sequence[Terminate], rows: Rows) -> None:
        SingleOperation.settle(items, rows)
        items[0].error = unreachable(items[0].answer, items[0])


def unreachable(answer: str, item: Any) -> Exception | None:
    """Why a run could not be told something, if it could not."""
    name = repr(item.workflow_id if item.workflow_id is not None else str(UUID(bytes=item.run_id)))
    if answer == "closed":
        return WorkflowClosed(
            f"the workflow {name} has ended: it takes no more signals and updates. Its outcome is in result()"
        )
    if answer == "missing":
        return WorkflowNotFound(f"there is no workflow {name} in this namespace, or this login may not see it")
    return None
