"""What a broker does to send: alone, within a message's processing, and many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dramatiq import Message
from dramatiq.common import current_millis

from .delivery import Delivery, current_delivery, encode_message
from .hooks import Hooks
from .outgoing import check_send, operation_of, stored, with_eta
from .queues import Queues
from .workflow.replay import current

if TYPE_CHECKING:
    from .claimer import Claimer
    from .group_commit import GroupCommit
    from .telemetry import Telemetry


class Sending(Queues, Hooks):
    """A broker's doings with what is sent."""

    commit: GroupCommit
    telemetry: Telemetry

    @property
    def claimer(self) -> Claimer | None:
        """The thread that claims for this process, while it is a worker."""
        raise NotImplementedError

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Store a message; when this returns, it is committed (inside `using`: it is part of the caller's transaction).

        Called for the message that is being processed (as the Retries middleware does), it asks for a retry: the same
        row is rescheduled, in one commit with the end of this attempt.  What a hook sends while a message is
        post-processed commits with that message's ack.

        Parameters:
          message(Message): what to send.
          delay(int | None): milliseconds to wait before it is handed out.

        Raises:
          NotEncodable: the encoder cannot carry an argument.
          PayloadTooLarge: the encoded message is over 16 MiB.
          DatabaseUnavailable: the database cannot be reached; nothing was stored.
          QueueNotFound: the queue was never declared.
          ForbiddenInWorkflow: called inside a workflow.
        """
        spans = self.telemetry.spans()
        if spans is None or isinstance(message, Delivery) or current() is not None:
            return self._enqueue(message, delay)
        with spans.sending_message(message) as message:
            return self._enqueue(message, delay)

    def _enqueue(self, message: Message[Any], delay: int | None) -> Message[Any]:
        delivery = current_delivery.get()
        if delivery is not None and delivery.broker is not self:
            # What is sent here cannot commit with another broker's message.
            delivery = None
        try:
            delay = check_send(self, message, delay)
            if isinstance(message, Delivery) and message is delivery and not delivery.settled:
                return self._ask_again(delivery, delay)
            if delay is not None:
                message = with_eta(message, delay)
            self.emit_before("enqueue", message, delay)
            operation = operation_of(self, message, delay)
            if delivery is not None and message.message_id == delivery.message_id:
                # A copy of the message that is being processed, or the same one again in a pipeline: no repetition of
                # what is stored under this id.
                operation.message_id = uuid4().bytes
                operation.payload = encode_message(message)
            if delivery is not None and delivery.hooks:
                delivery.leaving().sends.append(operation)
            else:
                if self.claimer is not None:
                    self.claimer.expect(operation.stream_id)
                self.commit.submit(operation)
                message = stored(message, operation)
        except Exception as e:
            if delivery is not None and delivery.hooks:
                # What a hook sends belongs to the message: if it cannot be stored, neither can the ack.
                delivery.broken = e
            raise
        self.emit_after("enqueue", message, delay)
        return message

    def _ask_again(self, delivery: Delivery, delay: int | None) -> Message[Any]:
        """The message that is being processed is to come again."""
        # Hooks see a message, as with Dramatiq's brokers, not its delivery; what they change of it comes again, too.
        message: Message[Any] = delivery._message
        if delay is not None:
            message.options["eta"] = current_millis() + delay
        try:
            self.emit_before("enqueue", message, delay)
            if delivery.hooks:
                delivery.retry = delay or 0
            else:
                delivery.again = delay or 0
            self.emit_after("enqueue", message, delay)
            return message.copy()
        finally:
            message.options.pop("eta", None)

    def enqueue_many(self, messages: Sequence[Message[Any]], *, delay: int | None = None) -> list[Message[Any]]:
        """Store many messages, in as few transactions as their number allows.

        When this returns all are committed; when it raises, some may be: each has its id, so that sending the rest
        (or all) again stores none twice as long as it is waiting.

        Raises:
          as `enqueue`; nothing is stored when a message cannot be encoded.
        """
        spans = self.telemetry.spans()
        if spans is None or not messages or current() is not None:
            return self._enqueue_many(messages, delay)
        with spans.sending_messages(messages) as messages:
            return self._enqueue_many(messages, delay)

    def _enqueue_many(self, messages: Sequence[Message[Any]], delay: int | None) -> list[Message[Any]]:
        delays = [check_send(self, m, delay) for m in messages]
        messages = [m if d is None else with_eta(m, d) for m, d in zip(messages, delays, strict=True)]
        if self.hearing("before_enqueue"):
            for message, due in zip(messages, delays, strict=True):
                self.emit_before("enqueue", message, due)
        operations = [operation_of(self, m, d) for m, d in zip(messages, delays, strict=True)]
        if operations:
            self.commit.submit_many(operations)
        for operation in operations:
            if operation.error is not None:
                raise operation.error
        messages = [stored(m, o) for m, o in zip(messages, operations, strict=True)]
        if self.hearing("after_enqueue"):
            for message, due in zip(messages, delays, strict=True):
                self.emit_after("enqueue", message, due)
        return messages

    def count_member(self, delivery: Delivery) -> None:
        """A member of a group has succeeded: its ack counts it, and sends the callbacks if it is the last."""
        left = delivery.leaving()
        if left.member:
            return
        try:
            for fields in delivery.options.get("group_completion_callbacks") or ():
                callback: Message[Any] = Message(**fields)
                if (spans := self.telemetry.spans()) is not None:
                    callback = callback.copy(options=spans.carrier_of())
                delay = check_send(self, callback, None)
                self.emit_before("enqueue", callback, delay)
                left.callbacks.append(operation_of(self, callback, delay))
            left.member = True
        except Exception as e:
            # Counted without its callbacks, it might be the last one, and nobody would send them.
            delivery.broken = e
            raise
