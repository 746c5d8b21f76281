"""How schedules fire: what becomes of a tick that this process has leased.

On the committing thread, in two steps: the schedule is looked up, and what is due of it is committed together with the
tick's next due time.  What is due is told from the database's clock, never from this machine's.
"""

from __future__ import annotations

import logging
import uuid
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any

from dramatiq import Message

from .cron import Cron
from .delivery import encode_message
from .group_commit import GroupCommit
from .operations import Due, FireSchedule, LookUpSchedule, Operation, Reschedule

logger = logging.getLogger(__name__)

#: The most due times, and bytes of their messages, that are fired at once; the tick comes back for the rest.
MOST_DUE = 100
MOST_BYTES = 8 * 1024 * 1024

#: After a long time without workers, so many missed due times are counted, and not those before them.
MOST_MISSED = 10_000

#: Milliseconds after which a schedule that could not be fired is tried again.
RETRY = 60_000


def take_tick(commit: GroupCommit, key: bytes, lease: bytes, stream_id: int) -> None:
    """Deal with a tick: look its schedule up, and fire what is due."""

    def go_on(looked_up: LookUpSchedule) -> None:
        warn(looked_up)
        if looked_up.error is None and looked_up.answer is not None:
            operation = _fire(key, lease, stream_id, *looked_up.answer)
            operation.then = warn
            commit.post(operation)

    def warn(operation: Operation) -> None:
        if operation.error is not None:
            # The heartbeat no longer names the tick: it is handed out again.
            logger.warning("a schedule could not be fired, trying again: %s", operation.error)

    operation = LookUpSchedule(key, lease)
    operation.then = go_on
    commit.post(operation)


def _fire(
    key: bytes,
    lease: bytes,
    stream_id: int,
    schedule_id: bytes,
    name: str,
    kind: str,
    template: bytes,
    cron: str,
    zone: str,
    catch_up: int,
    seen_to: int,
    waiting: int | None,
    now: int,
) -> Operation:
    try:
        times = Cron(cron, zone)
        missed, due, seen, next_due = due_times(times, from_ms(seen_to), from_ms(now), catch_up, len(template))
        if waiting is not None:
            due.insert(0, from_ms(waiting))
        if missed:
            logger.warning("the schedule %r has missed %d due times", name, missed)
        made = Maker(uuid.UUID(bytes=schedule_id), name, kind, template, now)
        fired = [made.for_due(at) for at in due]
        return FireSchedule(key, lease, to_ms(seen), missed, to_ms(next_due), stream_id, fired)
    except Exception as e:
        # An encoder that cannot read the template, a time zone that is not known here: another worker may do better.
        logger.exception("the schedule %r cannot be fired, trying again in %d s", name, RETRY // 1000)
        return Reschedule(key, lease, RETRY, failure=f"{type(e).__name__}: {e}")


def due_times(
    times: Cron, seen_to: datetime, now: datetime, catch_up: int, size: int
) -> tuple[int, list[datetime], datetime, datetime]:
    """What is due of a schedule.

    Parameters:
      seen_to(datetime): what is due up to then has been dealt with.
      catch_up(int): milliseconds after which a due time is missed.
      size(int): bytes of what is sent for each.

    Returns:
      How many due times were missed, those to be fired (in order, and no more than can be at once), up to when all are
      dealt with by that, and the next due time.
    """
    horizon = now - timedelta(milliseconds=catch_up)
    missed = 0
    if seen_to < horizon:
        missed = sum(1 for _ in islice(takewhile(lambda at: at < horizon, times.after(seen_to)), MOST_MISSED))
        seen_to = horizon - timedelta(milliseconds=1)
    limit = max(1, min(MOST_DUE, MOST_BYTES // (size + 1000)))
    due: list[datetime] = []
    next_due = now + timedelta(days=365)  # for an expression that does not come any more
    for at in times.after(seen_to):
        if at > now or len(due) == limit:
            next_due = at
            break
        due.append(at)
    return missed, due, due[-1] if len(due) == limit else now, next_due


class Maker:
    """Makes what a schedule fires.

    Parameters:
      schedule_id(UUID): ids of messages are derived from it and the due time: one that is still live is not sent again.
      template(bytes): the encoded message; runs have their input in the database.
      now(int): milliseconds since the epoch, on the database's clock.
    """

    def __init__(self, schedule_id: uuid.UUID, name: str, kind: str, template: bytes, now: int) -> None:
        self._schedule_id = schedule_id
        self._name = name
        self._now = now
        self._message: Message[Any] | None = Message.decode(template) if kind == "m" else None

    def for_due(self, at: datetime) -> Due:
        """What a due time fires."""
        if self._message is None:
            return Due(to_ms(at), uuid.uuid4().bytes, None)
        return self._send(self._message, uuid.uuid5(self._schedule_id, at.isoformat()), at, to_ms(at))

    def for_now(self) -> Due:
        """What is fired by hand."""
        id = uuid.uuid4()
        if self._message is None:
            return Due(None, id.bytes, None)
        return self._send(self._message, id, from_ms(self._now), None)

    def _send(self, template: Message[Any], id: uuid.UUID, at: datetime, due: int | None) -> Due:
        options = {"schedule": self._name, "schedule_due": at.isoformat()}
        message = template.copy(message_id=str(id), message_timestamp=self._now, options=options)
        return Due(due, id.bytes, encode_message(message, id.bytes))


def from_ms(ms: int) -> datetime:
    """Milliseconds since the epoch as a time in UTC."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)


def to_ms(at: datetime) -> int:
    """A time as milliseconds since the epoch, rounded down."""
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
