"""Messages on their way out: may they be sent, and which operation stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from dramatiq import Message
from dramatiq.common import current_millis
from dramatiq.errors import QueueNotFound

from .delivery import Delivery, encode_message, key_of
from .errors import ForbiddenInWorkflow
from .operations import Enqueue, EnqueueKeyed
from .workflow.options import check_name
from .workflow.replay import current

if TYPE_CHECKING:
    from .queues import Queues

#: The longest delay, in milliseconds: ten years.
MAX_DELAY = 315_360_000_000

#: What may become of a second message with a unique key.
UNIQUE_CONFLICTS = ("skip", "fail", "replace")


def check_send(broker: Queues, message: Message[Any] | Delivery, delay: Any) -> int | None:
    """The delay in whole milliseconds, if this message may be sent with it; raises as `DurableBroker.enqueue`."""
    if current() is not None:
        raise ForbiddenInWorkflow(
            f"a workflow cannot send messages ({message.actor_name!r}): run it as an activity with "
            "`await durable.activity(actor).execute(...)`, so that the send is recorded and not repeated"
        )
    if message.queue_name not in broker.queues:
        raise QueueNotFound(message.queue_name)
    if delay is None and isinstance(eta := message.options.get("eta"), (int, float)):
        # Dramatiq's workers would keep it in memory until then.
        delay = min(max(eta - current_millis(), 0), MAX_DELAY)
    if delay is None:
        return None
    if not isinstance(delay, (int, float)) or not 0 <= delay <= MAX_DELAY:
        raise ValueError(f"a delay is between 0 and {MAX_DELAY} milliseconds (ten years), not {delay!r}")
    return int(delay)


def with_eta(message: Message[Any], delay: int) -> Message[Any]:
    """A message that says when it is due, as Dramatiq's brokers make it."""
    return message.copy(options={"eta": current_millis() + delay})


def operation_of(broker: Queues, message: Message[Any] | Delivery, delay: int | None = None) -> Enqueue:
    """A message as the operation that stores it; raises as `DurableBroker.enqueue`."""
    actor = broker.actors.get(message.actor_name)
    priority = actor.priority if actor is not None else 0
    if urgency := message.options.get("broker_priority"):
        if not isinstance(urgency, int):
            raise ValueError(f"broker_priority is a whole number, the highest comes first, not {urgency!r}")
        # As with RabbitMQ, where it comes from.
        priority = -urgency
    key = key_of(message.message_id)
    plain = (
        broker.stream_id(message.queue_name),
        key,
        check_name(message.actor_name, "an actor's name"),
        max(-(2**31), min(int(priority), 2**31 - 1)),
        delay or 0,
        encode_message(message, key),
    )
    unique_key, group = message.options.get("unique_key"), message.options.get("group_completion_uuid")
    if unique_key is None and group is None:
        return Enqueue(*plain)
    if unique_key is not None:
        check_name(unique_key, "a unique key")
    conflict = message.options.get("unique_conflict", "skip")
    if conflict not in UNIQUE_CONFLICTS:
        raise ValueError(f"unique_conflict is one of {', '.join(UNIQUE_CONFLICTS)}, not {conflict!r}")
    return EnqueueKeyed(*plain, None if group is None else key_of(str(group)), unique_key, conflict)


def stored(message: Message[Any], operation: Enqueue) -> Message[Any]:
    """The message that is there now: this one, or the live one that has its unique key."""
    if operation.unique_key is None or operation.answer is None:
        return message
    status, found = operation.answer
    if status or found == operation.message_id:
        return message
    return message.copy(message_id=str(UUID(bytes=found)))
