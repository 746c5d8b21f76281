"""What is counted in: plain numbers of this process, and the bounds of how many there are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any

from .catalogue import Metric

#: What stands for names that are not known here, and for all those that came when there were too many.
OTHER = "_OTHER"

#: The most values of a label, and the most combinations of a metric's labels, of a process.
MOST_NAMES = 200
MOST_SERIES = 1000

Labels = tuple[str, ...]


class Cell:
    """A histogram: how many values are in each bucket, and their sum.

    Attributes:
      also: is told every value, too, where OpenTelemetry wants to know.
    """

    __slots__ = ("also", "bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.also: Callable[[float], None] | None = None

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: list[float]) -> None:
        """The same for many, of which most are in one bucket; changes their order."""
        values.sort()
        at = 0
        while at < len(values):
            bucket = bisect_left(self.bounds, values[at])
            end = len(values) if bucket == len(self.bounds) else bisect_right(values, self.bounds[bucket], at)
            self.counts[bucket] += end - at
            at = end
        self.sum += sum(values)

    def tell(self, values: list[float]) -> None:
        """Tell them to whoever listens.  With no lock held."""
        if self.also is not None:
            for value in values:
                self.also(value)

    def merge(self, other: Cell) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


#: What was counted: of each metric, by its labels (the namespace first), a number or a cell.
Counted = dict[Metric, dict[Labels, Any]]


class Lane:
    """What became here of the messages of one kind and one actor, on one stream."""

    __slots__ = ("acked", "dead_lettered", "processing", "released", "retried", "stale", "took")

    def __init__(self, processing: Cell) -> None:
        self.acked = self.retried = self.released = self.dead_lettered = self.stale = 0
        self.processing = processing
        #: How long threads had them, in seconds: gathered, and put into their buckets by and by.
        self.took: deque[float] = deque()

    def digest(self) -> list[float]:
        values = [self.took.popleft() for _ in range(len(self.took))]
        self.processing.add_all(values)
        return values


class Course:
    """How the runs of one workflow go on here."""

    __slots__ = ("closed", "events", "recorded")

    def __init__(self) -> None:
        self.recorded = 0
        #: By the types of events, by the statuses of runs.
        self.events: dict[str, int] = {}
        self.closed: dict[str, int] = {}


class Names:
    """Bounds how many values each label has in this process: first come, first served."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] = {}

    def fold(self, label: str, name: str) -> str:
        known = self._known.setdefault(label, set())
        if name not in known:
            if len(known) >= MOST_NAMES:
                return OTHER
            known.add(name)
        return name
