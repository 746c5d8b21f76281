"""Topics: what runs emit, and the actors that are given it.

``durable.subscribe("order-paid")(send_receipt)``: every worker that consumes the actor's queue registers this when it
starts.  From then on the actor is given all that any run emits to the topic, each event as a message of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from dramatiq import Actor, Message

from .codecs import Codecs
from .delivery import EVENT, current_delivery
from .errors import NotPermitted
from .telemetry import TRACE, WORKFLOW
from .telemetry.context import carried
from .workflow.client import durable_broker
from .workflow.converter import loads
from .workflow.handle import outside_of_workflows
from .workflow.options import check_name

if TYPE_CHECKING:
    from .broker import DurableBroker
    from .codecs import Codecs

A = TypeVar("A", bound="Actor[Any, Any]")

#: How the payload of an event begins as SQL writes it; behind it a line of JSON, and the value.  What an actor's retry
#: writes is a message in Dramatiq's encoding.
MARK = b"event\n"


@dataclass(frozen=True, slots=True)
class EventInfo:
    """Where an event comes from.

    Attributes:
      topic(str): what it was emitted to.
      workflow_id(str), run_id(str), workflow(str), queue_name(str): the run that emitted it, its workflow and queue.
      event_id(int): its place in the run's history.  Run id and event id together name the event for ever: one that is
        given a second time has the same.
      at(datetime): when it was emitted, by history's clock, in UTC.
      attempt(int): how often this subscriber has been given it, counted from 1.
    """

    topic: str
    workflow_id: str
    run_id: str
    workflow: str
    queue_name: str
    event_id: int
    at: datetime
    attempt: int


def event_info() -> EventInfo | None:
    """What event the running actor was given; None where it was given none."""
    delivery = current_delivery.get()
    facts = None if delivery is None else delivery.options.get(EVENT)
    if delivery is None or not isinstance(facts, dict):
        return None
    at = datetime.fromtimestamp(facts["at"] / 1000, UTC)
    return EventInfo(**{**facts, "at": at, "attempt": delivery.attempt})


def subscribe(topic: str) -> Callable[[A], A]:
    """Give an actor every event of a topic: ``durable.subscribe("order-paid")(actor)``, or as a decorator above it.

    The actor is called with the payload; ``event_info()`` tells where it comes from.  The subscription is stored when a
    worker starts that consumes the actor's queue, and stays until ``unsubscribe``, whether a worker runs or not.

    Guarantee: what is emitted from then on the actor is given at least once, the events of one run in order: one that
    is retried holds back the run's later ones, for this actor alone.  One that fails for good is a dead letter, and
    the next is given.

    Raises:
      InvalidName: the topic is empty, too long or no text.
      TypeError: what is subscribed is no actor.
      NotConfigured: (with a worker running) the actor's broker is no DurableBroker.
    """
    check_name(topic, "a topic")

    def declare(actor: A) -> A:
        if not isinstance(actor, Actor):
            raise TypeError(f"an actor (or an activity) subscribes to a topic, not {actor!r:.60}")
        durable_broker(actor.broker).declare_subscription(topic, actor)
        return actor

    return declare


def unsubscribe(topic: str, actor: Actor[Any, Any]) -> bool:
    """End a subscription; what the actor has not been given yet is dropped.

    Take ``subscribe`` out of the code first: the next worker that starts would subscribe the actor again.

    Returns:
      bool: whether there was one.

    Raises:
      NotPermitted: the login may not consume the actor's queue, or the subscription is an administrator's.
      DatabaseUnavailable: the database cannot be reached; or runs are emitting right now, try again.
    """
    outside_of_workflows("end a subscription")
    broker = durable_broker(actor.broker)
    return drop(broker, topic, actor.queue_name, actor.actor_name)


async def aunsubscribe(topic: str, actor: Actor[Any, Any]) -> bool:
    """As `unsubscribe`, awaited."""
    return await asyncio.to_thread(unsubscribe, topic, actor)


# --- for the broker and the command line ---------------------------------------------------------------------
def register(broker: DurableBroker, subscriptions: list[tuple[str, str, str, int]]) -> list[bool]:
    """Store subscriptions (topic, queue, actor, priority); answers which of them are new.

    Raises:
      NotPermitted: the login may not consume a queue.
      DatabaseUnavailable: the database cannot be reached.
    """
    streams = [broker.stream_id(queue_name) for _, queue_name, _, _ in subscriptions]
    topics, actors = [t for t, _, _, _ in subscriptions], [a for _, _, a, _ in subscriptions]
    priorities = [p for _, _, _, p in subscriptions]
    with broker.database.calling() as conn:
        answers = broker.procedures.subscribe(conn, topics, streams, actors, priorities)
    for (topic, queue_name, actor, _), new in zip(subscriptions, answers, strict=True):
        if new is None:
            raise NotPermitted(
                f"this login may not subscribe {actor!r} to {topic!r}: it may not consume the queue {queue_name!r}"
            )
    return [bool(new) for new in answers]


def drop(broker: DurableBroker, topic: str, queue_name: str, actor: str) -> bool:
    """End a subscription: see `unsubscribe`."""
    stream_id = broker.stream_id(queue_name)
    with broker.database.calling() as conn:
        return broker.procedures.unsubscribe(conn, topic, stream_id, actor)


def message_of(queue_name: str, actor: str, key: bytes, payload: bytes, codecs: Codecs) -> Message[Any]:
    """The message of an event that no actor has been given yet.

    Raises:
      CodecFailed: what was emitted cannot be decoded here.
    """
    facts, _, value = payload.removeprefix(MARK).partition(b"\n")
    described = json.loads(facts)
    options = {EVENT: described, WORKFLOW: described["workflow_id"], **carried(described.pop(TRACE, None))}
    emitted = loads(codecs.decode(value, f"what was emitted to {described['topic']!r}"))
    return Message(queue_name, actor, (emitted,), {}, options, str(UUID(bytes=key)), described["at"])
