"""Moves the messages of another broker into our streams: none is lost and none is doubled, whenever it is killed.

A batch is taken at the source, stored here, and removed there; then the next one is taken.  Whoever dies in between
leaves it to the next import, which is given the batch again, and finds in the journal whether it was stored (see
``sql/procedures/import.sql``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from uuid import UUID

from dramatiq import Actor, Message

from ..arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from ..broker import DurableBroker
from ..delivery import MAX_PAYLOAD, key_of
from ..operations import Operation, Rows
from ..outgoing import MAX_DELAY
from ..workflow.options import check_name
from .source import MAX_BYTES, Box, Found, Place, Source

_MARK = 16


@dataclass(slots=True)
class Entry:
    """A message that can be stored, and all that is stored of it."""

    found: Found
    mark: bytes
    message_id: bytes
    actor: str
    priority: int
    due: int | None
    sent: int
    attempt: int
    died: int | None
    failure: str | None
    payload: bytes


@dataclass(slots=True, eq=False)
class Import(Operation):
    """Store a batch, and note it in the journal.  Answers 1 (stored) or 0 (it was there already) for each message."""

    procedure = "import_messages"
    parameters = 15
    rank = 27
    numbered = single = True

    source: UUID
    stream_id: int
    removed: bytes
    entries: Sequence[Entry]

    @classmethod
    def arguments(cls, items: Sequence[Import], context: Any) -> list[Any]:
        (item,) = items
        entries = item.entries
        return [
            context.sender,
            context.number(),
            Uuid(item.source.bytes),
            item.stream_id,
            item.removed,
            b"".join(e.mark for e in entries),
            Uuids([e.message_id for e in entries]),
            Texts([e.actor for e in entries]),
            Ints([e.priority for e in entries]),
            Longs([e.due for e in entries]),
            Longs([e.sent for e in entries]),
            Ints([e.attempt for e in entries]),
            Longs([e.died for e in entries]),
            Texts([e.failure for e in entries]),
            Blobs([e.payload for e in entries]),
        ]

    @classmethod
    def settle(cls, items: Sequence[Import], rows: Rows) -> None:
        items[0].answer = rows[0][0]

    @classmethod
    def settle_committed(cls, items: Sequence[Import]) -> bool:
        items[0].answer = [1] * len(items[0].entries)
        return True


@dataclass(slots=True)
class Report:
    """What came of one queue.

    Attributes:
      queue(str): its name, which is the stream's.
      found, delayed, dead(int): how many its source had: all that waited, the delayed ones of these, and dead letters.
      in_flight(int | None): how many were in the hands of the source's workers; None where the source cannot tell.
      readers(int): how many workers were reading it.
      moved, already_there(int): messages that are here now: stored by this import, or before.
      dead_moved(int): dead letters that are here now.
      undecodable(int): messages and dead letters that stay where they are.
      members(int): how many of the messages belong to groups whose callbacks count on the old limiter back end.
      problems(list): why, for some of these.
    """

    queue: str
    found: int = 0
    delayed: int = 0
    dead: int = 0
    in_flight: int | None = 0
    readers: int = 0
    moved: int = 0
    already_there: int = 0
    dead_moved: int = 0
    undecodable: int = 0
    members: int = 0
    problems: list[str] = field(default_factory=list)


#: How many problems of a queue are told.
MAX_PROBLEMS = 5


class Importer:
    """Moves queues from a source into the streams of a broker.

    Parameters:
      broker(DurableBroker): whose streams.
      source(Source): from where.
      batch(int): how many messages are taken at once.
      dead_letters(bool): move these too.
      actors(Mapping): actors by their names, as far as they are known: their priorities are those of their messages.
    """

    def __init__(
        self,
        broker: DurableBroker,
        source: Source,
        *,
        batch: int,
        dead_letters: bool,
        actors: Mapping[str, Actor[Any, Any]],
    ) -> None:
        self.broker = broker
        self.source = source
        self.batch = batch
        self.dead_letters = dead_letters
        self.actors = actors

    def count(self, queue: str) -> Report:
        """What there is to move; changes nothing."""
        counts = self.source.count(queue)
        waiting = counts.ready + counts.delayed
        return Report(queue, waiting, counts.delayed, counts.dead, counts.in_flight, counts.readers)

    def move(self, report: Report, progress: Callable[[Report], None] = lambda report: None) -> None:
        """Move what a queue has, and note in its report what came of it.

        Parameters:
          report(Report): what `count` answered.
          progress: called after each batch.

        Raises:
          psycopg.errors.InsufficientPrivilege: the login is no administrator.
          ImportFailed: the source went away.  What was moved is moved; run it again for the rest.
        """
        stream_id = self.broker.stream_id(check_name(report.queue, "a queue's name"))
        journal = _Journal(self.broker, self.source.identity(), stream_id)
        groups: list[tuple[Place, ...]] = (
            [("ready", "delayed"), ("dead",)] if self.dead_letters else [("ready", "delayed")]
        )
        for places in groups:
            for place in places:
                with self.source.open(report.queue, place) as box:
                    while found := box.take(self.batch):
                        self._move(report, place, box, found, journal)
                        progress(report)
            journal.complete(dead="dead" in places)

    def _move(self, report: Report, place: Place, box: Box, found: list[Found], journal: _Journal) -> None:
        entries: list[Entry] = []
        left: list[Found] = []
        for one in found:
            try:
                entry, member = self._entry(one, place)
            except Exception as e:
                # Whatever an encoder raises, or a message of another format: its neighbours are moved.
                left.append(one)
                if len(report.problems) < MAX_PROBLEMS:
                    report.problems.append(_why(e))
            else:
                entries.append(entry)
                report.members += member and place != "dead"
        report.undecodable += len(left)
        if left:
            box.settle([], left)
        for part in _parts(entries):
            stored = journal.store(part)
            box.settle([entry.found for entry in part], [])
            journal.remove(part)
            if place == "dead":
                report.dead_moved += len(part)
            else:
                report.moved += stored
                report.already_there += len(part) - stored

    def _entry(self, found: Found, place: Place) -> tuple[Entry, bool]:
        """All that is stored of a message, and whether it is of a group.  Raises for what is none, in whatever way."""
        if found.payload is None:
            raise LookupError("the source has its id, and has lost its data")
        if len(found.payload) > MAX_PAYLOAD:
            raise ValueError(f"it has {len(found.payload)} bytes, more than {MAX_PAYLOAD}")
        message: Message[Any] = Message.decode(found.payload)
        options = dict(message.options)
        dead = place == "dead"
        now = int(time.time() * 1000)
        eta, retries = options.get("eta"), options.get("retries")
        trace = options.get("traceback")
        entry = Entry(
            found,
            _kind(dead) + blake2b(message.message_id.encode(), digest_size=_MARK - 1).digest(),
            key_of(message.message_id),
            check_name(message.actor_name, "an actor's name"),
            self._priority(message.actor_name, options.get("broker_priority")),
            _whole(min(eta, now + MAX_DELAY)) if isinstance(eta, (int, float)) else None,
            min(_whole(message.message_timestamp), now),
            min(_whole(retries), 2**31 - 2) + 1 if isinstance(retries, int) else 1,
            (found.died_at if found.died_at is not None else now) if dead else None,
            trace.replace("\0", "") if isinstance(trace, str) else None,
            found.payload,
        )
        return entry, "group_completion_uuid" in options

    def _priority(self, actor_name: str, own: Any) -> int:
        """As a send would have it: RabbitMQ's (the higher goes first), or else the actor's (the lower does)."""
        if own and isinstance(own, int):
            return max(-(2**31), min(-own, 2**31 - 1))
        actor = self.actors.get(actor_name)
        return actor.priority if actor is not None else 0


class _Journal:
    """What was stored and may still be at the source."""

    def __init__(self, broker: DurableBroker, source: UUID, stream_id: int) -> None:
        self._broker = broker
        self._source = source
        self._stream_id = stream_id
        with broker.database.calling() as conn:
            noted = broker.procedures.import_journal(conn, source.bytes, stream_id)
        #: Marks that an import which died has left: whatever has one was stored by it.
        self._stored = {noted[n : n + _MARK] for n in range(0, len(noted), _MARK)}
        self._removed: list[bytes] = []

    def store(self, entries: Sequence[Entry]) -> int:
        """Store what was not yet; answers how many that were."""
        fresh = [entry for entry in entries if entry.mark not in self._stored]
        return sum(self._commit(fresh)) if fresh else 0

    def remove(self, entries: Iterable[Entry]) -> None:
        """These are no longer at the source; noted with the next batch."""
        self._removed.extend(entry.mark for entry in entries)

    def complete(self, *, dead: bool) -> None:
        """The source has none left, dead or alive: what the journal has of them is of no use any more."""
        self._removed.extend(mark for mark in self._stored if mark[:1] == _kind(dead))
        if self._removed:
            self._commit([])

    def _commit(self, entries: Sequence[Entry]) -> list[int]:
        operation = Import(self._source, self._stream_id, b"".join(self._removed), entries)
        answer: list[int] = self._broker.commit.submit(operation)
        self._removed.clear()
        return answer


def _kind(dead: bool) -> bytes:
    """How a mark begins."""
    return b"d" if dead else b"m"


def _parts(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries in as many parts as their bytes ask for."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        part.append(entry)
        size += len(entry.payload)
        if size >= MAX_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _whole(number: float) -> int:
    return max(0, int(number))


def _why(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = f"{type(cause).__name__}: {cause}"[:200]
    return "".join(c if c.isprintable() else " " for c in text)
