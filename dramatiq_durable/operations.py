"""Operations: what the group commit commits.

An operation is one item; all items of one kind in a batch become one call of a SQL procedure, with parallel arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, Literal
from uuid import UUID

from .arrays import Array, Blobs, Bools, Ints, Longs, Texts, Uuid, Uuids
from .errors import (
    DatabaseUnavailable,
    LeaseLost,
    MessageExists,
    NotPermitted,
    WorkflowAlreadyStarted,
    WorkflowClosed,
    WorkflowNotFound,
)
from .workflow.events import Event

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
    #: How often somebody's lock was in its way.
    tries: int = field(default=0, init=False)
    gate: Any = field(default=None, init=False)

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
                item.error = NotPermitted("no such stream or workflow, or this login may not use it")

    @classmethod
    def settle_committed(cls, items: Sequence[Enqueue]) -> bool:
        for item in items:
            item.answer = 1
        return True


@dataclass(slots=True, eq=False)
class EnqueueKeyed(Enqueue):
    """Store a message with a unique key, or of a group.  Answers (1: stored or 0: not, the id that is there)."""

    procedure = "enqueue_keyed"
    parameters = 11

    #: It was committed, and its answer lost.  Storing it again would repeat it, if it is done by now: it is only looked
    #: for, by itself or by its key.
    committed: bool = field(default=False, init=False)

    @classmethod
    def arguments(cls, items: Sequence[Enqueue], context: Context) -> list[Any]:
        return [
            *Enqueue.arguments(items, context),
            Uuids([i.group for i in items]),
            Texts([i.unique_key for i in items]),
            Texts(["look" if isinstance(i, EnqueueKeyed) and i.committed else i.conflict for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[Enqueue], rows: Rows) -> None:
        for item, (status, message_id) in zip(items, rows, strict=True):
            item.answer = (status, message_id)
            item.error = None
            if status < 0:
                item.error = NotPermitted("no such stream or workflow, or this login may not use it")
            elif not status and message_id != item.message_id and item.conflict == "fail":
                live = str(UUID(bytes=message_id))
                item.error = MessageExists(
                    f"the stream has a live message with the unique key {item.unique_key!r}: {live}. Send again once "
                    "it is done, or say what is to become of the second: unique_conflict='skip' or 'replace'",
                    live,
                )

    @classmethod
    def settle_committed(cls, items: Sequence[Enqueue]) -> bool:
        # Which id is there is not known: called again, it tells.
        for item in items:
            assert isinstance(item, EnqueueKeyed)
            item.committed = True
        return False


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
    memo: str | None = None

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
            Texts([i.memo for i in items]),
        ]

    @classmethod
    def settle(cls, items: Sequence[StartRun], rows: Rows) -> None:
        for item, (status, run_id) in zip(items, rows, strict=True):
            item.answer = (status, run_id)
            if status == "denied":
                item.error = NotPermitted("no such stream or workflow, or this login may not use it")
            elif status == "busy":
                item.error = DatabaseUnavailable(
                    f"the workflow id {item.workflow_id!r} is being fought over, try again"
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
    parameters = 8
    rank = 22
    numbered = rides = True

    run_id: bytes | None
    workflow_id: str | None
    type: str
    name: str | None
    payload: bytes | None
    key: str

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
        ]

    @classmethod
    def settle(cls, items: Sequence[Post], rows: Rows) -> None:
        for item, answer in zip(items, rows[0][0], strict=True):
            item.answer = answer
            item.error = _unreachable(answer, item)


@dataclass(slots=True, eq=False)
class Terminate(Operation):
    """End a run from outside.  Answers ok."""

    procedure = "terminate_run"
    parameters = 5
    rank = 23
    numbered = rides = single = True

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
        items[0].answer = rows[0][0]
        items[0].error = _unreachable(rows[0][0], items[0])

    @classmethod
    def settle_committed(cls, items: Sequence[Terminate]) -> bool:
        items[0].answer = "ok"
        return True


def _unreachable(answer: str, item: Post | Terminate) -> Exception | None:
    """Why a run could not be told something, if it could not."""
    name = repr(item.workflow_id if item.workflow_id is not None else str(UUID(bytes=item.run_id)))
    if answer == "closed":
        return WorkflowClosed(f"the workflow {name} has ended")
    if answer == "missing":
        return WorkflowNotFound(f"there is no workflow {name} in this namespace, or this login may not see it")
    return None


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
    parameters = 6
    rank = 13

    delay: int
    payload: bytes | None = None
    failure: str | None = None

    @classmethod
    def arguments(cls, items: Sequence[Reschedule], context: Context) -> list[Any]:
        return [
            *LeaseOperation.arguments(items, context),
            Longs([i.delay for i in items]),
            Blobs([i.payload for i in items]),
            Texts([i.failure for i in items]),
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
class Send:
    """An activity or a timer that a step hands out."""

    kind: Literal["a", "w"]
    stream_id: int
    seq: int
    actor: str
    priority: int
    delay: int
    payload: bytes
    eager: bool = False


@dataclass(slots=True, eq=False)
class Child:
    """A child workflow that a step starts."""

    seq: int
    stream_id: int
    name: str
    workflow_id: str
    input: bytes
    options: dict[str, Any]


@dataclass(slots=True, eq=False)
class Advance(LeaseOperation):
    """One step of a run.  Answers ok, stale or refused; ``eager`` has the leases of what was handed out, by number."""

    procedure = "advance"
    parameters = 37
    rank = 30

    run_id: bytes
    expected: int
    last: int = 0
    close: str | None = None
    events: list[Event] = field(default_factory=list)
    inbox: list[int] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    children: list[Child] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    #: The step of the same execution that this one builds upon, until this one is settled.
    before: Advance | None = None
    eager: dict[int, bytes] = field(default_factory=dict, init=False)

    def baseless(self) -> bool:
        """Whether it builds upon a step that was not recorded.

        The number of the last event does not tell: another worker may have recorded as many.
        """
        return self.before is not None and self.before.finished and self.before.answer != "ok"

    @classmethod
    def arguments(cls, items: Sequence[Advance], context: Context) -> list[Any]:
        after: list[int] = []
        latest: dict[bytes, int] = {}
        for n, item in enumerate(items, 1):
            after.append(latest.get(item.run_id, 0))
            latest[item.run_id] = n
        events = [(n, e) for n, item in enumerate(items, 1) for e in item.events]
        sends = [(n, s) for n, item in enumerate(items, 1) for s in item.sends]
        children = [(n, c) for n, item in enumerate(items, 1) for c in item.children]
        return [
            *LeaseOperation.arguments(items, context),
            Ints([-1 if i.baseless() else i.expected for i in items]),
            Ints(after),
            Ints([i.last for i in items]),
            Texts([i.close for i in items]),
            Ints([n for n, _ in events]),
            Ints([e.event_id for _, e in events]),
            Texts([e.type for _, e in events]),
            Longs([e.at for _, e in events]),
            Ints([e.seq for _, e in events]),
            Texts([e.name for _, e in events]),
            Blobs([e.payload for _, e in events]),
            Texts([to_json(e.attributes) for _, e in events]),
            *_flat(items, "inbox", Longs),
            Ints([n for n, _ in sends]),
            Texts([s.kind for _, s in sends]),
            Ints([s.stream_id for _, s in sends]),
            Ints([s.seq for _, s in sends]),
            Texts([s.actor for _, s in sends]),
            Ints([s.priority for _, s in sends]),
            Longs([s.delay for _, s in sends]),
            Blobs([s.payload for _, s in sends]),
            Bools([s.eager for _, s in sends]),
            *_flat(items, "drops", Ints),
            Ints([n for n, _ in children]),
            Ints([c.seq for _, c in children]),
            Ints([c.stream_id for _, c in children]),
            Texts([c.name for _, c in children]),
            Texts([c.workflow_id for _, c in children]),
            Blobs([c.input for _, c in children]),
            Texts([to_json(c.options) for _, c in children]),
            *_flat(items, "cancels", Ints),
        ]

    @classmethod
    def settle(cls, items: Sequence[Advance], rows: Rows) -> None:
        by_run: dict[bytes, list[Advance]] = {}
        for item in items:
            by_run.setdefault(item.run_id, []).append(item)
            item.answer = "refused"
        for step, status, seq, lease in rows:
            item = items[step - 1]
            if status != "eager":
                item.answer = status
                continue
            # The answer names the run's first step of the batch; the command's number is unique in the run.
            for candidate in by_run[item.run_id]:
                if any(s.seq == seq for s in candidate.sends):
                    candidate.eager[seq] = lease

    @classmethod
    def settle_committed(cls, items: Sequence[Advance]) -> bool:
        # What was handed out eagerly is unknown: the run is loaded again, its activities are claimed.
        for item in items:
            item.answer = "stale"
        return True


def _flat(items: Sequence[Any], name: str, kind: type[Array]) -> list[Array]:
    pairs = [(n, value) for n, item in enumerate(items, 1) for value in getattr(item, name)]
    return [Ints([n for n, _ in pairs]), kind([value for _, value in pairs])]


def to_json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, separators=(",", ":"))


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
            if status < 0:
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


def size_of(operation: Operation) -> int:
    """The bytes of an operation's payloads."""
    if isinstance(operation, Together):
        return sum(map(size_of, operation.parts))
    if isinstance(operation, Leave):
        return sum(len(r.value) for r in operation.results) + sum(map(size_of, operation.sends + operation.callbacks))
    return len(getattr(operation, "payload", None) or b"")


def parts_of(operations: Sequence[Operation]) -> list[Operation]:
    """Operations, with those that go together one by one."""
    found: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Together):
            found.extend(operation.parts)
        else:
            found.append(operation)
    return found


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


def statement(namespace: str, operation: type[Operation]) -> bytes:
    """The text of an operation's call."""
    marks = ", ".join(["%s"] * operation.parameters)
    return f'SELECT * FROM "{namespace}".{operation.procedure}({marks})'.encode()
