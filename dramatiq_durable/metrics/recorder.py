"""What this process has counted, in its own memory: plain numbers that cost a fraction of a microsecond each.

A `Recorder` belongs to a group commit, and so to a namespace.  What every message counts is kept in lanes, one for each
stream and kind of message, which only the thread that commits writes; the rest is counted under a lock.  A forked child
begins at nothing: what its parent has counted, its parent shows.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import LeaseLost
from ..operations import (
    Ack,
    Advance,
    AnswerQuery,
    Bury,
    CompleteActivity,
    Enqueue,
    EnqueueKeyed,
    FailSettling,
    FailTask,
    FinishEvent,
    Leave,
    Operation,
    Park,
    Release,
    Reschedule,
    Together,
)
from . import catalogue
from .catalogue import Metric

#: What stands for names that are not known here, and for all those that came when there were too many.
OTHER = "_OTHER"

#: The most values of a label, and the most combinations of a metric's labels, of a process.
MOST_NAMES = 200
MOST_SERIES = 1000

#: How the kinds of messages are called.
KINDS = {
    "m": "message",
    "j": "message",
    "a": "activity",
    "p": "event",
    "s": "task",
    "t": "task",
    "w": "task",
    "q": "query",
}
#: Of which kinds it is told, besides, how late they were.
_LATENESS = {"w": catalogue.TIMERS, "c": catalogue.SCHEDULES}

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

    def merge(self, other: Cell) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


#: What was counted: of each metric, by its labels (the namespace first), a number or a cell.
Counted = dict[Metric, dict[Labels, Any]]


class Lane:
    """What messages of one kind on one stream have met here."""

    __slots__ = ("acked", "dead_lettered", "enqueued", "released", "retried", "stale", "waits")

    def __init__(self, waits: Cell) -> None:
        self.enqueued = self.acked = self.retried = self.released = self.dead_lettered = self.stale = 0
        #: How long those waited that were handed out here.
        self.waits = waits


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


#: Those that are alive, what those counted that are not, and what OpenTelemetry is told of every histogram.
_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()
_past: Counted = {}
_names = Names()
_lock = threading.RLock()
_listen: Callable[[Metric, Labels], Callable[[float], None]] | None = None


class Recorder:
    """Counts for one group commit.

    Parameters:
      namespace(str): the label that all metrics have.

    Attributes:
      stream_names: the streams' names, by their ids; the others are called `_OTHER`.
      counts: how an operation that is over is counted, by its class.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.stream_names: Mapping[int, str] = {}
        self.counts: dict[type[Operation], Callable[[Any], None]] = {
            Enqueue: self._enqueued,
            EnqueueKeyed: self._enqueued,
            Leave: self._left,
            Together: self._together,
            Advance: self._advance,
            FinishEvent: self._finish_event,
            **dict.fromkeys((Ack, CompleteActivity, Park, AnswerQuery), self._acked),
            **dict.fromkeys((Reschedule, FailSettling, FailTask), self._retried),
            Release: self._released,
            Bury: self._buried,
        }
        self._clear()
        with _lock:
            _recorders.add(self)

    def _clear(self) -> None:
        self._lanes: dict[tuple[int, str], Lane] = {}
        self._numbers: dict[tuple[Metric, Labels], float] = {}
        self._cells: dict[tuple[Metric, Labels], Cell] = {}
        self._series: dict[Metric, set[Labels]] = {}
        self._lock = threading.Lock()

    # --- for whoever counts -----------------------------------------------------------------------------

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        with self._lock:
            key = (metric, labels)
            if key not in self._numbers:
                key = (metric, self._fold(metric, labels))
            self._numbers[key] = self._numbers.get(key, 0) + by

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        with self._lock:
            cell = self._cells.get((metric, labels))
            if cell is None:
                labels = self._fold(metric, labels)
                cell = self._cells.get((metric, labels))
                if cell is None:
                    cell = self._cells[metric, labels] = Cell(metric.bounds)
                    cell.also = self._also(metric, labels)
            cell.add(value)
        # Whoever is told has locks of his own.
        if cell.also is not None:
            cell.also(value)

    def failed(self, error: BaseException | None) -> None:
        """The database, or the way to it, gave an error."""
        state = getattr(error, "sqlstate", None)
        self.count(catalogue.ERRORS, state[:2] if state else "none")

    def processed(self, delivery: Any, seconds: float) -> None:
        """A thread is done with a delivery, but for its commit."""
        # Whoever sends to a stream may name any actor.
        actor = delivery.actor_name if delivery.actor_name in delivery.broker.actors else OTHER
        if KINDS[delivery.kind] in ("task", "query"):
            self.observe(catalogue.TASK, seconds, actor)
        else:
            self.observe(catalogue.PROCESSING, seconds, delivery.queue_name, actor)

    def claimed(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Messages were handed out."""
        lanes = self._lanes
        for row in rows:
            key = (row[2], row[3])
            lane = lanes.get(key)
            if lane is None:
                lane = self._lane(key)
            cell, waited = lane.waits, row[10] or 0.0
            cell.counts[bisect_left(cell.bounds, waited)] += 1
            cell.sum += waited
            if cell.also is not None:
                cell.also(waited)

    def handed(self, stream_id: int) -> None:
        """An activity was handed out in the moment in which it was stored."""
        self.claimed([(None, None, stream_id, "a", *[None] * 7)])

    # --- operations that are over -----------------------------------------------------------------------

    def _lane(self, key: tuple[int, str]) -> Lane:
        with self._lock:
            if key not in self._lanes:
                lane = Lane(Cell(catalogue.WAIT.bounds))
                lane.waits.also = self._waits_also(key)
                self._lanes[key] = lane
            return self._lanes[key]

    def _enqueued(self, operation: Enqueue) -> None:
        answer = operation.answer
        if operation.error is None and (answer == 1 or (isinstance(answer, tuple) and answer[0] == 1)):
            key = (operation.stream_id, "m")
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lane(key)
            lane.enqueued += 1

    def _ended(self, operation: Operation) -> Lane | None:
        """Where to count what became of a delivery; None where nothing did."""
        key = operation.lane
        if key is None:
            return None
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lane(key)
        if operation.error is not None and not isinstance(operation.error, LeaseLost):
            return None
        if operation.error is not None or (operation.answer is False and not operation.retried):
            lane.stale += 1
            return None
        return lane

    def _acked(self, operation: Operation) -> None:
        lane = self._ended(operation)
        if lane is not None:
            lane.acked += 1

    def _retried(self, operation: Operation) -> None:
        lane = self._ended(operation)
        if lane is not None:
            lane.retried += 1

    def _released(self, operation: Operation) -> None:
        lane = self._ended(operation)
        if lane is not None:
            lane.released += 1

    def _buried(self, operation: Operation) -> None:
        lane = self._ended(operation)
        if lane is not None:
            lane.dead_lettered += 1

    def _finish_event(self, operation: FinishEvent) -> None:
        (self._buried if operation.failed else self._acked)(operation)

    def _left(self, operation: Leave) -> None:
        if operation.error is None and operation.answer:
            for send in operation.sends:
                self._lane((send.stream_id, "m")).enqueued += 1

    def _together(self, operation: Together) -> None:
        for part in operation.parts:
            if part.error is None:
                # Both are committed, or neither is.
                part.error = operation.error
            self.counts[type(part)](part)

    def _advance(self, operation: Advance) -> None:
        if operation.answer == "stale" and not operation.retried and operation.lane is not None:
            self._lane(operation.lane).stale += 1
        elif operation.answer == "ok" or operation.error is not None:
            self._acked(operation)
        if operation.answer == "ok" and operation.error is None:
            for send in operation.sends:
                if send.kind != "w":
                    self._lane((send.stream_id, "a")).enqueued += 1

    # --- for whoever shows it ---------------------------------------------------------------------------

    def counted(self) -> Counted:
        """Everything so far."""
        found: Counted = {}

        def add(metric: Metric, labels: Labels, value: Any) -> None:
            _merge(found, metric, (self.namespace, *labels), value)

        with self._lock:
            for (metric, labels), number in self._numbers.items():
                add(metric, labels, number)
            for (metric, labels), cell in self._cells.items():
                add(metric, labels, cell)
            lanes = list(self._lanes.items())
        for (stream_id, code), lane in lanes:
            stream, kind = self._stream(stream_id), KINDS.get(code)
            waited = any(lane.waits.counts)
            if waited and code in _LATENESS:
                add(_LATENESS[code], (stream,), lane.waits)
            if kind is None:
                continue
            for metric, number in (
                (catalogue.ENQUEUED, lane.enqueued),
                (catalogue.CLAIMED, sum(lane.waits.counts)),
                (catalogue.ACKED, lane.acked),
                (catalogue.RETRIED, lane.retried),
                (catalogue.RELEASED, lane.released),
                (catalogue.DEAD_LETTERED, lane.dead_lettered),
                (catalogue.STALE, lane.stale),
            ):
                if number:
                    add(metric, (stream, kind), number)
            if waited:
                add(catalogue.WAIT, (stream, kind), lane.waits)
        return found

    def listened(self) -> None:
        """Have what listens to histograms told of those that are there already."""
        with self._lock:
            for (metric, labels), cell in self._cells.items():
                cell.also = self._also(metric, labels)
            for key, lane in self._lanes.items():
                lane.waits.also = self._waits_also(key)

    def _also(self, metric: Metric, labels: Labels) -> Callable[[float], None] | None:
        return None if _listen is None else _listen(metric, (self.namespace, *labels))

    def _waits_also(self, key: tuple[int, str]) -> Callable[[float], None] | None:
        """Who is told how long messages of a lane waited; what nobody sees (alarms, notes) is told nobody."""
        if _listen is None:
            return None
        stream, kind = self._stream(key[0]), KINDS.get(key[1])
        told = [] if kind is None else [_listen(catalogue.WAIT, (self.namespace, stream, kind))]
        if key[1] in _LATENESS:
            told.append(_listen(_LATENESS[key[1]], (self.namespace, stream)))

        def tell(value: float) -> None:
            for each in told:
                each(value)

        return tell

    def _stream(self, stream_id: int) -> str:
        name = self.stream_names.get(stream_id)
        return OTHER if name is None else _names.fold("stream", name)

    def _fold(self, metric: Metric, labels: Labels) -> Labels:
        labels = tuple(_names.fold(label, name) for label, name in zip(metric.labels, labels, strict=True))
        series = self._series.setdefault(metric, set())
        if labels not in series:
            if len(series) >= MOST_SERIES:
                return (OTHER,) * len(labels)
            series.add(labels)
        return labels


def _merge(into: Counted, metric: Metric, labels: Labels, value: Any) -> None:
    series = into.setdefault(metric, {})
    if isinstance(value, Cell):
        cell = series.get(labels)
        if cell is None:
            cell = series[labels] = Cell(metric.bounds)
        cell.merge(value)
    else:
        series[labels] = series.get(labels, 0) + value


def counted() -> Counted:
    """Everything that this process has counted so far, of all namespaces."""
    found: Counted = {}
    with _lock:
        recorders = list(_recorders)
        for one in (_past, *(recorder.counted() for recorder in recorders)):
            for metric, series in one.items():
                for labels, value in series.items():
                    _merge(found, metric, labels, value)
    return found


def retire(recorder: Recorder) -> None:
    """Its group commit is gone: what it has counted stays."""
    with _lock:
        _recorders.discard(recorder)
        for metric, series in recorder.counted().items():
            for labels, value in series.items():
                _merge(_past, metric, labels, value)


def listen(told: Callable[[Metric, Labels], Callable[[float], None]]) -> None:
    """From now on every value of every histogram is told to ``told(metric, labels)``."""
    global _listen
    with _lock:
        _listen = told
        recorders = list(_recorders)
    for recorder in recorders:
        recorder.listened()


def _after_fork() -> None:
    """The child counts from nothing, and no thread of the parent's will release a lock here."""
    global _lock
    _lock = threading.RLock()
    _past.clear()
    for recorder in list(_recorders):
        recorder._clear()


os.register_at_fork(after_in_child=_after_fork)
