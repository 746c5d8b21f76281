"""A batch of operations as the calls that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Operation
from .sending import Enqueue, EnqueueOne
from .settling import Ack, Claim, Leave, Together


def by_kind(batch: Sequence[Operation]) -> list[tuple[type[Operation], list[Operation]]]:
    """A batch's calls, in the order of their ranks; within a call, items keep their order."""
    groups: dict[type[Operation], list[Operation]] = {}
    for operation in batch:
        groups.setdefault(type(operation), []).append(operation)
    calls: list[tuple[type[Operation], list[Operation]]] = []
    for kind in sorted(groups, key=lambda k: k.rank):
        if kind.single:
            calls.extend((kind, [item]) for item in groups[kind])
        else:
            calls.append((kind, groups[kind]))
    return calls


def calls_of(batch: Sequence[Operation]) -> list[tuple[type[Operation], list[Operation]]]:
    """A batch's calls.  The two commonest batches are one call each that is made for them: a message that is alone, and
    a busy worker's acks with its claim."""
    if len(batch) == 1 and type(batch[0]) is Enqueue:
        return [(EnqueueOne, [batch[0]])]
    calls = by_kind(parts_of(batch))
    together = len(calls) == 2 and calls[0][0] is Ack
    for kind, items in calls:
        if kind is Claim:
            claim: Any = items[0]
            # Also when it is run again without them.
            claim.acks = calls[0][1] if together else ()
            return calls[1:] if together else calls
    return calls


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
