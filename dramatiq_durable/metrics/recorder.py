"""What this process has counted, in its own memory: plain numbers that cost a fraction of a microsecond each.

A `Recorder` belongs to a group commit, and so to a namespace.  What every message counts is kept in lanes, under one
lock for a whole batch; how long messages waited only the thread writes that claims them.  A forked child begins at
nothing: what its parent has counted, its parent shows.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, deque
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
    FireByHand,
    FireSchedule,
    Leave,
    Operation,
    Park,
    Release,
    Reschedule,
    Together,
)
from . import catalogue
from .catalogue import Metric
from .cells import MOST_SERIES, OTHER, Cell, Counted, Course, Labels, Lane, Names

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
#: A run's first task.
FIRST = "s"
#: Of which kinds it is told, besides, how late they were.
_LATENESS = {"w": catalogue.TIMERS, "c": catalogue.SCHEDULES}

#: Those that are alive, what those counted that are not, and what OpenTelemetry is told of every histogram.
_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()
_past: Counted = {}
#: Those whose group commit is gone, until what they have counted is in `_past`.
_gone: deque[Recorder] = deque()
_names = Names()
_lock = threading.RLock()
_listen: Callable[[Metric, Labels], Callable[[float], None]] | None = None


class Recorder:
    """Counts for one group commit.

    Parameters:
      namespace(str): the label that all metrics have.

    Attributes:
      stream_names: the streams' names, by their ids; the others are called `_OTHER`.
      lanes: those that are there (see `lane`).
      instrumented(bool): whether OpenTelemetry is to have them.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.stream_names: Mapping[int, str] = {}
        self.instrumented = False
        #: How an operation that is over is counted, by its class.
        self._counts: dict[type[Operation], Callable[[Any], None]] = {
            EnqueueKeyed: self._enqueued,
            FireSchedule: self._fired,
            FireByHand: self._fired_by_hand,
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
        self.lanes: dict[tuple[int, str, str], Lane] = {}
        #: By the streams and the kinds of messages: how long they waited that were handed out, how many were stored.
        self._waits: dict[tuple[int, str], Cell] = {}
        self._sent: dict[tuple[int, str], int] = {}
        self._courses: dict[str, Course] = {}
        self._commit, self._batch = Cell(catalogue.COMMIT.bounds), Cell(catalogue.BATCH.bounds)
        self._commit.also, self._batch.also = self._also(catalogue.COMMIT, ()), self._also(catalogue.BATCH, ())
        #: What was counted on whatever thread, without a lock that the others would wait for: see `digest`.
        self._gathered: deque[tuple[Metric, Labels, float]] = deque()
        self._numbers: dict[tuple[Metric, Labels], float] = {}
        self._cells: dict[tuple[Metric, Labels], Cell] = {}
        self._series: dict[Metric, set[Labels]] = {}
        self._lock = threading.Lock()

    # --- for whoever counts -----------------------------------------------------------------------------

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        self._gathered.append((metric, labels, by))

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        self._gathered.append((metric, labels, value))

    def committed(self, seconds: float, size: int) -> None:
        """A transaction of a group commit was committed."""
        # Only whoever leads comes here.
        for cell, value in ((self._commit, seconds), (self._batch, size)):
            cell.add(value)
            if cell.also is not None:
                cell.also(value)

    def course(self, workflow: str) -> Course:
        """Where to count how a workflow's runs go on.  Only for whoever leads."""
        course = self._courses.get(workflow)
        if course is None:
            with self._lock:
                course = self._courses[workflow] = Course()
        return course

    def failed(self, error: BaseException | None) -> None:
        """The database, or the way to it, gave an error."""
        state = getattr(error, "sqlstate", None)
        self.count(catalogue.ERRORS, state[:2] if state else "none")

    def lane(self, delivery: Any) -> Lane:
        """Where to count what becomes of a delivery."""
        key = (delivery.stream_id, delivery.kind, delivery.actor_name)
        return self.lanes.get(key) or self._lane(key, delivery.actor_name in delivery.broker.actors)

    def undelivered(self, stream_id: int, kind: str) -> Lane:
        """The same for what could not be delivered."""
        return self._lane((stream_id, kind, OTHER), True)

    def claimed(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Messages were handed out: rows of the claim."""
        while rows:
            # As a rule, all of them are of one kind, on one stream.
            stream, kind = rows[0][2], rows[0][3]
            waits = [row[10] for row in rows if row[2] == stream and row[3] == kind]
            cell = self._waits_of((stream, kind))
            cell.add_all(waits)
            cell.tell(waits)
            if len(waits) == len(rows):
                return
            rows = [row for row in rows if row[2] != stream or row[3] != kind]

    def handed(self, stream_id: int) -> None:
        """An activity was handed out in the moment in which it was stored."""
        cell = self._waits.get((stream_id, "a")) or self._waits_of((stream_id, "a"))
        # It did not wait.
        cell.counts[0] += 1
        if cell.also is not None:
            cell.also(0.0)

    def ended(self) -> dict[int, int]:
        """How many messages have ended here, by the ids of their streams: acked, or among the dead letters."""
        ended: dict[int, int] = {}
        with self._lock:
            for (stream_id, _, _), lane in self.lanes.items():
                ended[stream_id] = ended.get(stream_id, 0) + lane.acked + lane.dead_lettered
        return ended

    def digest(self) -> None:
        """Put what was gathered into its buckets: it must not grow."""
        with self._lock:
            digested = [(lane.processing, lane.digest()) for lane in self.lanes.values() if lane.took]
            gathered = Counter(self._gathered.popleft() for _ in range(len(self._gathered)))
            for (metric, labels, value), times in gathered.items():
                if not metric.bounds:
                    self._add(metric, labels, value * times)
                    continue
                cell = self._cells.get((metric, labels)) or self._cell(metric, labels)
                cell.add_all(values := [value] * times)
                digested.append((cell, values))
        # Whoever is told has locks of his own.
        for cell, values in digested:
            cell.tell(values)

    def _add(self, metric: Metric, labels: Labels, value: float) -> None:
        key = (metric, labels)
        if key not in self._numbers:
            key = (metric, self._fold(metric, labels))
        self._numbers[key] = self._numbers.get(key, 0) + value

    def _cell(self, metric: Metric, labels: Labels) -> Cell:
        labels = self._fold(metric, labels)
        cell = self._cells.get((metric, labels))
        if cell is None:
            cell = self._cells[metric, labels] = Cell(metric.bounds)
            cell.also = self._also(metric, labels)
        return cell

    # --- operations that are over -----------------------------------------------------------------------

    def _lane(self, key: tuple[int, str, str], known: bool) -> Lane:
        with self._lock:
            # Whoever sends to a stream may name any actor.
            if not known or (key not in self.lanes and len(self.lanes) >= MOST_SERIES):
                key = (*key[:2], OTHER)
            if key not in self.lanes:
                lane = self.lanes[key] = Lane(Cell(catalogue.PROCESSING.bounds))
                lane.processing.also = self._also(*self._processing(key))
            return self.lanes[key]

    def _processing(self, key: tuple[int, str, str]) -> tuple[Metric, Labels]:
        stream_id, kind, actor = key
        actor = _names.fold("actor", actor)
        if KINDS[kind] in ("task", "query"):
            return catalogue.TASK, (actor,)
        return catalogue.PROCESSING, (self._stream(stream_id), actor)

    def _waits_of(self, key: tuple[int, str]) -> Cell:
        cell = self._waits.get(key)
        if cell is None:
            with self._lock:
                self._stream(key[0])
                cell = self._waits[key] = Cell(catalogue.WAIT.bounds)
                cell.also = self._waits_also(key)
        return cell

    def settled(self, operations: Sequence[Operation]) -> None:
        """Operations are committed, or have failed; on whatever thread, in whatever transaction."""
        counts = self._counts
        stored: list[int] = []
        with self._lock:
            for operation in operations:
                kind = type(operation)
                if kind is Ack and operation.answer is True and operation.lane is not None:
                    # The commonest by far.
                    operation.lane.acked += 1
                elif kind is Enqueue and operation.answer == 1:
                    stored.append(operation.stream_id)  # type: ignore[attr-defined]
                elif kind in counts:
                    counts[kind](operation)
            # A Counter takes its time to make.
            for stream_id, number in Counter(stored).items() if len(stored) > 1 else [(s, 1) for s in stored]:
                self._sends(stream_id, "m", number)

    def _sends(self, stream_id: int, kind: str, number: int = 1) -> None:
        key = (stream_id, kind)
        if key not in self._sent:
            # Its name has its place from now on.
            self._stream(stream_id)
        self._sent[key] = self._sent.get(key, 0) + number

    def _enqueued(self, operation: EnqueueKeyed) -> None:
        # Without an answer it is done later, in a transaction of the caller's.
        if operation.error is None and operation.answer is not None and operation.answer[0] == 1:
            self._sends(operation.stream_id, "m")

    def _fired(self, operation: FireSchedule) -> None:
        if operation.fired:
            self._sends(operation.stream_id, "m", operation.fired)

    def _fired_by_hand(self, operation: FireByHand) -> None:
        for due, fired in zip(operation.due, operation.answer or (), strict=False):
            # Without a payload, it is a run.
            if fired and due.payload is not None:
                self._sends(operation.stream_id, "m")

    def _ended(self, operation: Operation) -> Lane | None:
        """Where to count what became of a delivery; None where nothing did."""
        lane: Lane | None = operation.lane
        if lane is None:
            return None
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
                self._sends(send.stream_id, "m")

    def _together(self, operation: Together) -> None:
        for part in operation.parts:
            if part.error is None:
                # Both are committed, or neither is.
                part.error = operation.error
            self._counts[type(part)](part)

    def _advance(self, operation: Advance) -> None:
        if operation.error is not None:
            self._ended(operation)
        elif operation.answer == "stale" and not operation.retried and operation.lane is not None:
            operation.lane.stale += 1
        elif operation.answer == "ok":
            if operation.lane is not None:
                operation.lane.acked += 1
            for send in operation.sends:
                if send.kind != "w":
                    self._sends(send.stream_id, "a")

    # --- for whoever shows it ---------------------------------------------------------------------------

    def counted(self) -> Counted:
        """Everything so far."""
        found: Counted = {}

        def add(metric: Metric, labels: Labels, value: Any) -> None:
            _merge(found, metric, (self.namespace, *labels), value)

        self.digest()
        with self._lock:
            for (metric, labels), number in self._numbers.items():
                add(metric, labels, number)
            for (metric, labels), cell in self._cells.items():
                add(metric, labels, cell)
                if metric is catalogue.CALL:
                    add(catalogue.TRIPS, ("call",), sum(cell.counts))
            if commits := sum(self._batch.counts):
                add(catalogue.COMMIT, (), self._commit)
                add(catalogue.BATCH, (), self._batch)
                add(catalogue.TRIPS, ("group_commit",), commits)
            lanes, waits, sends = list(self.lanes.items()), list(self._waits.items()), list(self._sent.items())
            courses = list(self._courses.items())
        for (stream_id, kind), sent in sends:
            add(catalogue.ENQUEUED, (self._stream(stream_id), KINDS[kind]), sent)
        for (stream_id, kind), cell in waits:
            if kind in _LATENESS:
                add(_LATENESS[kind], (self._stream(stream_id),), cell)
            if kind in KINDS:
                add(catalogue.WAIT, (self._stream(stream_id), KINDS[kind]), cell)
                add(catalogue.CLAIMED, (self._stream(stream_id), KINDS[kind]), sum(cell.counts))
        for workflow, course in courses:
            for metric, label, number in (
                (catalogue.STEPS, "recorded", course.recorded),
                *((catalogue.EVENTS, type, number) for type, number in list(course.events.items())),
                *((catalogue.CLOSED, status, number) for status, number in list(course.closed.items())),
            ):
                if number:
                    add(metric, (_names.fold("workflow", workflow), label), number)
        for key, lane in lanes:
            if key[1] == FIRST and lane.acked:
                # Each run has one of these, and it is done once, whatever comes before it or after.
                add(catalogue.STARTED, (_names.fold("workflow", key[2]),), lane.acked)
            if any(lane.processing.counts):
                add(*self._processing(key), lane.processing)
            for metric, number in (
                (catalogue.ACKED, lane.acked),
                (catalogue.RETRIED, lane.retried),
                (catalogue.RELEASED, lane.released),
                (catalogue.DEAD_LETTERED, lane.dead_lettered),
                (catalogue.STALE, lane.stale),
            ):
                if number:
                    add(metric, (self._stream(key[0]), KINDS[key[1]]), number)
        return found

    def listened(self) -> None:
        """Have what listens to histograms told of those that are there already."""
        with self._lock:
            self._commit.also, self._batch.also = self._also(catalogue.COMMIT, ()), self._also(catalogue.BATCH, ())
            for (metric, labels), cell in self._cells.items():
                cell.also = self._also(metric, labels)
            for key, lane in self.lanes.items():
                lane.processing.also = self._also(*self._processing(key))
            for pair, cell in self._waits.items():
                cell.also = self._waits_also(pair)

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
        _take_over()
        recorders = list(_recorders)
        for one in (_past, *(recorder.counted() for recorder in recorders)):
            for metric, series in one.items():
                for labels, value in series.items():
                    _merge(found, metric, labels, value)
    return found


def retire(recorder: Recorder) -> None:
    """Its group commit is gone: what it has counted stays.

    It takes no lock: the garbage collector comes here, on a thread that may hold any of ours.
    """
    _gone.append(recorder)


def _take_over() -> None:
    """Keep what those have counted that are gone.  The lock is held."""
    while _gone:
        gone = _gone.popleft()
        _recorders.discard(gone)
        for metric, series in gone.counted().items():
            for labels, value in series.items():
                _merge(_past, metric, labels, value)


def digest() -> None:
    """Called once in a while: see `Recorder.digest`."""
    with _lock:
        _take_over()
    for recorder in list(_recorders):
        recorder.digest()


def is_wanted() -> bool:
    """Whether OpenTelemetry is to have what is counted here."""
    return any(recorder.instrumented for recorder in list(_recorders))


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
