"""A step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..arrays import Array, Blobs, Bools, Ints, Longs, Texts
from ..workflow.events import Event
from .base import Context, LeaseOperation, Rows, to_json

if TYPE_CHECKING:
    from ..telemetry.runs import RunTrace


@dataclass(slots=True, eq=False)
class Send:
    """An activity (a; with limits l) or a timer (w) that a step hands out."""

    kind: Literal["a", "l", "w"]
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
    #: How many of the news that it was made of were given to the code, and which of them (from 1) were not after all.
    given: int = 0
    left: set[int] = field(default_factory=set)
    #: When timers are due that were running before a reset, by their numbers: milliseconds since the epoch.
    due: dict[int, int] = field(default_factory=dict)
    #: The step of the same execution that this one builds upon, until this one is settled.
    before: Advance | None = None
    #: What it is in its run's trace: see `telemetry`.
    trace: RunTrace | None = None
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
