"""What becomes of a delivery that Dramatiq has processed: the operation that ends it, and what it leaves behind.

Outcomes are queued for the group commit; only that of a ``transaction()`` is committed at once, on its own connection.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psycopg

from .delivery import EVENT, TASK_KINDS, Delivery, encode_message
from .errors import (
    CodecFailed,
    DatabaseUnavailable,
    DurableError,
    LeaseLost,
    NotEncodable,
    NotPermitted,
    PayloadTooLarge,
)
from .operations import (
    Ack,
    Beat,
    Bury,
    CompleteActivity,
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
from .workflow import events
from .workflow.converter import encode
from .workflow.failures import failure_to_json

if TYPE_CHECKING:
    from .broker import DurableBroker

logger = logging.getLogger(__name__)

#: The backoff of workflow tasks that failed, in milliseconds.
TASK_BACKOFF = (200, 60_000)


#: Of so many messages that cannot be decoded here it is remembered how often they came.
_REMEMBERED = 10_000


class Settler:
    """Answers for a broker's deliveries."""

    def __init__(self, broker: DurableBroker) -> None:
        self.broker = broker
        #: How often each message that cannot be decoded here came here.
        self._sent_back: OrderedDict[bytes, int] = OrderedDict()

    def settle(self, delivery: Delivery, *, failed: bool) -> None:
        """Answer for a delivery that Dramatiq has processed.

        Returns once the outcome is queued for the commit; the outcome of a ``transaction()`` is committed at once.
        """
        if delivery.settled:
            return
        delivery.settled = True
        if delivery.kind in TASK_KINDS:
            # Its actor settles a task by itself: this one never ran.  Some middleware was in the way, or no workflow of
            # this name is known here: another worker may know it.
            why = delivery.exception or delivery._exception
            failure = f"its task did not run here: {text_of(why) or 'a middleware was in the way'}"
            delay = backoff(delivery, TASK_BACKOFF)
            if delivery.kind == "q":
                self.commit_outcome(delivery, Reschedule(delivery.key, delivery.lease, delay, None, failure))
            else:
                self.commit_outcome(delivery, FailTask(delivery.key, delivery.lease, failure, delay))
            return
        if delivery.begun is not None and not delivery.judged and not failed:
            # An interrupt came between the actor's end and its hooks, and Dramatiq acks what no hook has seen.
            delivery.broken = delivery.broken or DurableError("an interrupt came before its hooks")
        outcome = self._outcome(delivery, failed)
        if delivery.unsaid and isinstance(outcome, (Reschedule, Release, FailSettling)):
            # The next attempt is given what this one said last.
            self.broker.commit.post(Beat(delivery.key, delivery.lease, delivery.details))
        outcome = self._encoded(delivery, outcome)
        if delivery.broken is not None:
            # It will be run again, and has its effect then; what its hooks sent is sent then, too.
            delivery.left = None
            if delivery.transaction is not None:
                delivery.transaction.roll_back()
                delivery.transaction = None
        if delivery.transaction is not None:
            self._commit_transaction(delivery, outcome)
        elif delivery.kind == "a" and isinstance(outcome, CompleteActivity) and delivery.left is None:
            self.broker.runner.advance_activity(delivery, outcome)
        else:
            self.commit_outcome(delivery, outcome)

    def _outcome(self, delivery: Delivery, failed: bool) -> Operation:
        """What the end of an actor means for its message."""
        key, lease = delivery.key, delivery.lease
        if delivery.broken is not None:
            return FailSettling(key, lease, f"its hooks failed: {text_of(delivery.broken)}")
        if delivery.released and not failed:
            return Release(key, lease)
        if delivery.retry is not None and not failed:
            if delivery.left is not None:
                # It does not end yet: it counts for its group when it does.
                delivery.left.member = False
            return Reschedule(key, lease, delivery.retry, payload_of(delivery), text_of(delivery.exception))
        if delivery.kind == "a":
            return self._activity_outcome(delivery, failed)
        if delivery.kind == "p":
            if not failed:
                return FinishEvent(key, lease)
            failure = text_of(delivery.exception or delivery._exception)
            return FinishEvent(key, lease, True, payload_of(delivery), failure)
        if failed:
            return Bury(key, lease, payload_of(delivery), text_of(delivery.exception or delivery._exception))
        return Ack(key, lease)

    def _activity_outcome(self, delivery: Delivery, failed: bool) -> Operation:
        exception = delivery.exception or delivery._exception
        hopeless = delivery.hopeless or delivery.interruption is not None or exception is None
        if exception is None and not failed:
            if delivery.deferred:
                return Park(delivery.key, delivery.lease)
            try:
                payload = encode(delivery.result, f"the result of {delivery.actor_name!r}")
                return CompleteActivity(delivery.key, delivery.lease, events.ACTIVITY_COMPLETED, payload, None)
            except (NotEncodable, PayloadTooLarge) as e:
                exception = e
        if not hopeless:
            actor = self.broker.actors.get(delivery.actor_name)
            throws = None if actor is None else actor.options.get("throws")
            hopeless = throws is not None and isinstance(exception, throws)
        failure = failure_to_json(exception or DurableError("it was rejected"), retryable=not hopeless)
        failure["attempt"] = delivery.attempt
        return CompleteActivity(delivery.key, delivery.lease, events.ACTIVITY_FAILED, None, {"failure": failure})

    def _encoded(self, delivery: Delivery, outcome: Operation) -> Operation:
        """What is stored of the outcome of an activity, or of who was given an event: its values are a workflow's."""
        codecs = self.broker.codecs
        if not codecs or not (delivery.sealed or EVENT in delivery.options):
            return outcome
        try:
            if isinstance(outcome, CompleteActivity):
                outcome.payload = codecs.encode(outcome.payload, f"the result of {delivery.actor_name!r}")
                outcome.attributes = codecs.seal_facts(outcome.attributes)
            elif isinstance(outcome, FailSettling):
                outcome.failure = codecs.encode_text(outcome.failure) or ""
            elif isinstance(outcome, (Reschedule, FinishEvent, Bury)):
                outcome.payload = codecs.encode(outcome.payload, f"the message for {delivery.actor_name!r}")
                outcome.failure = codecs.encode_text(outcome.failure)
            if delivery.left is not None and delivery.broken is None:
                self._encode_left(delivery.left)
        except PayloadTooLarge as e:
            delivery.left = None
            if delivery.kind != "a":
                # A dead letter, as it came.
                key, lease, why = delivery.key, delivery.lease, text_of(e)
                return FinishEvent(key, lease, True, None, why) if delivery.kind == "p" else Bury(key, lease, None, why)
            failure = {**failure_to_json(e, retryable=False), "attempt": delivery.attempt}
            failed = CompleteActivity(delivery.key, delivery.lease, events.ACTIVITY_FAILED, None, {"failure": failure})
            return self._encoded(delivery, failed)
        except CodecFailed as e:
            # What it did cannot be recorded now: it is done again.
            logger.error("%s cannot be settled, and is run again: %s", delivery, e)
            delivery.broken = e
            return Reschedule(delivery.key, delivery.lease, 30_000, None, text_of(e))
        return outcome

    def _encode_left(self, left: Leave) -> None:
        """The values are in what it leaves behind, too: its result for Dramatiq's back end, its callbacks."""
        for result in left.results:
            result.value = self.broker.codecs.encode(result.value, "a result")
        for send in (*left.sends, *left.callbacks):
            send.payload = self.broker.codecs.encode(send.payload, f"the message for {send.actor!r}")

    def not_for_here(self, key: bytes, lease: bytes, error: CodecFailed) -> Operation:
        """What becomes of a message that no codec here can decode: another worker's may.

        It comes again ever more rarely, and no attempt of an activity is lost by it.
        """
        times = self._sent_back.pop(key, 0) + 1
        self._sent_back[key] = times
        if len(self._sent_back) > _REMEMBERED:
            self._sent_back.popitem(last=False)
        delay = min(TASK_BACKOFF[1], TASK_BACKOFF[0] * 2 ** min(times, 20))
        return Reschedule(key, lease, delay, None, text_of(error), counted=False)

    def undecodable(self, key: bytes, lease: bytes, kind: str, attempt: int, error: Exception) -> Operation:
        """What becomes of a message that cannot be decoded: a dead letter; an activity fails in its run."""
        if kind == "a":
            failure = failure_to_json(error, retryable=False)
            failure["attempt"] = attempt
            facts = self.broker.codecs.seal_facts({"failure": failure})
            return CompleteActivity(key, lease, events.ACTIVITY_FAILED, None, facts)
        why = f"it cannot be decoded: {text_of(error)}"
        return FinishEvent(key, lease, True, None, why) if kind == "p" else Bury(key, lease, None, why)

    def commit_outcome(self, delivery: Delivery, outcome: Operation) -> None:
        """Queue an outcome, and what the message's hooks sent with it, for the next commit."""
        metrics = self.broker.commit.metrics
        lane = metrics.lanes.get((delivery.stream_id, delivery.kind, delivery.actor_name)) or metrics.lane(delivery)
        if delivery.taken:
            lane.took.append(perf_counter() - delivery.taken)
        coming = [delivery.stream_id] if isinstance(outcome, (FailSettling, Reschedule)) else []
        if delivery.left is not None:
            coming += [send.stream_id for send in (*delivery.left.sends, *delivery.left.callbacks)]
            outcome = Together([delivery.left, outcome])
            outcome.parts[1].lane = lane
        else:
            outcome.lane = lane
        outcome.then = outcome.then or self._noticed(delivery)
        claimer = self.broker.claimer
        if claimer is None:
            # The worker has left, or is about to.  Nobody waits here: a run's lock may be held, which `then` needs.
            self.broker.commit.post(outcome)
            return
        for stream_id in coming:
            claimer.expect(stream_id)
        claimer.post(outcome)
        claimer.finished(delivery)

    def _noticed(self, delivery: Delivery) -> Callable[[Any], None]:
        def then(operation: Operation) -> None:
            if operation.error is not None and not isinstance(operation.error, LeaseLost):
                if isinstance(operation.error, DatabaseUnavailable):
                    # Somebody's lock was in the way: what is done is done, it only has to be recorded.
                    logger.warning("%s waits to be settled: %s", delivery, operation.error)
                    again = replace(operation)
                    again.tries = operation.tries + 1
                    self.post_instead(delivery, again)
                elif isinstance(operation, Together) and type(operation.error) is NotPermitted:
                    # It went back by itself, in the same transaction.
                    logger.error("what follows %s cannot be stored, so it is run again: %s", delivery, operation.error)
                elif isinstance(operation, Together):
                    logger.error("what follows %s cannot be stored, so it is run again: %s", delivery, operation.error)
                    self.post_instead(delivery, self._unsettled(delivery, "what follows it", operation.error))
                elif not isinstance(operation, (FailSettling, Release)):
                    logger.error("%s was not settled and goes back: %s", delivery, operation.error)
                    self.post_instead(delivery, self._unsettled(delivery, "its end", operation.error))
                elif isinstance(operation, FailSettling):
                    logger.error("%s was not settled and goes back: %s", delivery, operation.error)
                    self.post_instead(delivery, Release(delivery.key, delivery.lease))
                else:
                    logger.error("%s could not go back: %s", delivery, operation.error)
            elif isinstance(operation, Park) and operation.error is None:
                # Its token may have been used before its actor returned.
                return
            elif not operation.retried and (operation.error is not None or operation.answer is False):
                logger.warning(
                    "the lease on %s was given to another worker: what was done here is not recorded", delivery
                )

        return then

    def _unsettled(self, delivery: Delivery, what: str, error: BaseException) -> Operation:
        """What becomes of a delivery when something of its end is refused."""
        why = f"{what} could not be stored: {text_of(error)}"
        return self._encoded(delivery, FailSettling(delivery.key, delivery.lease, why))

    def post_instead(self, delivery: Delivery, operation: Operation) -> None:
        """Settle a delivery with another operation than the one that was refused."""
        ended = operation.parts[1] if isinstance(operation, Together) else operation
        ended.lane = self.broker.commit.metrics.lane(delivery)
        claimer = self.broker.claimer
        if claimer is None:
            self.broker.commit.post(operation)
        elif not (claimer.draining and isinstance(operation, Release)):
            # A worker that ends gives back all that it has, with its good-bye.
            operation.then = self._noticed(delivery)
            claimer.post_instead(delivery, operation)

    def _commit_transaction(self, delivery: Delivery, outcome: Operation) -> None:
        """Effect, result and ack in one commit, on the actor's own connection."""
        transaction, delivery.transaction = delivery.transaction, None
        claimer = self.broker.claimer
        try:
            recorded = transaction.commit([outcome] if delivery.left is None else [delivery.left, outcome])
        except Exception as e:
            logger.error("the transaction of %s was not committed, it will be run again: %s", delivery, e)
            delivery.left = None
            again = self._unsettled(delivery, "its transaction", e)
            if isinstance(e, (DatabaseUnavailable, psycopg.OperationalError)):
                # Nothing is wrong with it: a connection was lost, or another transaction was in its way.
                again = self._encoded(delivery, Reschedule(delivery.key, delivery.lease, 1000, None, text_of(e)))
            self.commit_outcome(delivery, again)
            return
        metrics = self.broker.commit.metrics
        outcome.lane, outcome.answer = metrics.lane(delivery), recorded
        # What was to be left behind was rolled back where the lease was lost.
        metrics.settled([delivery.left, outcome] if delivery.left is not None and recorded else [outcome])
        outcome.lane.took.append(perf_counter() - delivery.taken)
        if not recorded:
            logger.warning("the lease on %s was given to another worker: its transaction is rolled back", delivery)
        if claimer is not None:
            claimer.finished(delivery)


def payload_of(delivery: Delivery) -> bytes | None:
    """The message with the options that it has now; None, as it came, where that cannot be stored.

    Options that cannot be encoded (a middleware's own objects) are left out: without the count of its retries among
    them, a message would be retried for ever.
    """

    def storable(name: str, value: Any) -> bool:
        try:
            encode_message(replace(delivery._message, args=(), kwargs={}, options={name: value}))
        except (NotEncodable, PayloadTooLarge):
            return False
        return True

    try:
        return encode_message(delivery, delivery.key)
    except (NotEncodable, PayloadTooLarge):
        options = {name: value for name, value in delivery.options.items() if storable(name, value)}
    try:
        return encode_message(replace(delivery._message, options=options), delivery.key)
    except (NotEncodable, PayloadTooLarge):
        return None


def text_of(exception: BaseException | None) -> str | None:
    """A failure as one line of text that Postgres can store."""
    if exception is None:
        return None
    text = f"{type(exception).__name__}: {exception}"[:4000].replace("\0", "\N{SYMBOL FOR NULL}")
    return text.encode("utf-8", "replace").decode()


def backoff(delivery: Delivery, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return int(min(most, least * 2 ** min(delivery.attempt - 1, 20)))
