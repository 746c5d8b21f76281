"""Messages on their way in: what a claimed row is, and the delivery that an actor is given of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dramatiq import Message

from . import topics
from .codecs import is_encoded
from .delivery import ALARM, DEADLINE, NOTE, TASK_KINDS, TICK, Delivery, decode_message, id_of
from .errors import CodecFailed
from .firing import take_tick
from .operations import Expire, ExpireRun, LookAgain, LookAtEnd, Operation

if TYPE_CHECKING:
    from .broker import DurableBroker

logger = logging.getLogger(__name__)


def delivery_of(broker: DurableBroker, row: tuple[Any, ...]) -> Delivery | None:
    """A claimed row as a delivery.  None for ticks of schedules and alarms of activities, which are dealt with
    without an actor, and for what cannot be decoded, which goes to the dead letters."""
    key, lease, stream_id, kind, run_id, seq, attempt, reclaimed, actor, payload = row[:10]
    if kind == TICK:
        take_tick(broker.commit, key, lease, stream_id)
        return None
    if kind == ALARM:
        broker.commit.post(Expire(key, lease))
        if broker.claimer is not None:
            # It may go off again soon.
            broker.claimer.expect(stream_id)
        return None
    if kind == NOTE:
        broker.commit.post(LookAgain(key, lease))
        return None
    if kind == DEADLINE:
        expire = ExpireRun(key, lease)
        if broker.telemetry.spans() is not None:
            expire.then = lambda e: _look_at_end(broker, run_id, e)
        broker.commit.post(expire)
        return None
    queue_name = broker.stream_names[stream_id]
    message: Message[Any]
    # What is of a workflow is encoded, whatever became of it: a dead letter, a callback of an activity.
    sealed = kind in ("a", "p") or (payload is not None and is_encoded(payload))
    try:
        if kind in TASK_KINDS:
            message = Message(queue_name, actor, (), {}, {}, id_of(key))
        elif payload.startswith(topics.MARK):
            message = topics.message_of(queue_name, actor, key, payload, broker.codecs)
        else:
            # An activity's, or one with an event that was given before, which may have become a dead letter.
            payload = broker.codecs.decode(payload, f"the message for {actor!r}")
            message = decode_message(payload, kind, queue_name, actor, key)
            # Delays are over when a message is handed out; Dramatiq would keep it in memory for its eta.
            message.options.pop("eta", None)
            if not isinstance(message.actor_name, str):
                raise TypeError(f"the actor's name is a {type(message.actor_name).__name__}")
            if message.queue_name != queue_name:
                message = message.copy(queue_name=queue_name)
    except CodecFailed as e:
        logger.error("message %s on %r goes back: %s", id_of(key), queue_name, e)
        _back(broker, broker.settler.not_for_here(key, lease, e), stream_id, kind)
        return None
    except Exception as e:
        # Whatever an encoder raises: its neighbours are handed out.
        logger.error("message %s on %r cannot be decoded and is dead-lettered: %s", id_of(key), queue_name, e)
        _back(broker, broker.settler.undecodable(key, lease, kind, attempt, e), stream_id, kind)
        return None
    return Delivery(
        message,
        broker,
        stream_id=stream_id,
        key=key,
        lease=lease,
        kind=kind,
        run_id=None if run_id is None else id_of(run_id),
        seq=seq,
        attempt=attempt,
        reclaimed=reclaimed,
        sealed=sealed,
    )


def _look_at_end(broker: DurableBroker, run_id: bytes, expired: ExpireRun) -> None:
    """The database has ended a run, now or before: its last span is written here."""

    def write(looked: LookAtEnd) -> None:
        spans = broker.telemetry.spans()
        if looked.answer is not None and spans is not None:
            *row, reason, facts = looked.answer
            spans.ended((*row, broker.codecs.decode_text(reason), facts))

    if expired.error is None and expired.answer:
        look = LookAtEnd(run_id)
        look.then = write
        broker.commit.post(look)


def _back(broker: DurableBroker, operation: Operation, stream_id: int, kind: str) -> None:
    """What cannot be delivered goes elsewhere with the next batch."""
    operation.lane = broker.commit.metrics.undelivered(stream_id, kind)
    broker.commit.post(operation)
