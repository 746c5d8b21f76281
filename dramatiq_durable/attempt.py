"""What a running activity's code may ask for: what it is part of, a heartbeat, an end that comes from elsewhere."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dramatiq.errors import Retry
from dramatiq.middleware import Retries, Shutdown

from .delivery import LIMITS, Delivery, current_delivery
from .errors import DurableError, LeaseLost
from .operations import Beat, Defer
from .workflow import retry
from .workflow.computing import current_local
from .workflow.converter import encode, loads

if TYPE_CHECKING:
    from .broker import DurableBroker

logger = logging.getLogger(__name__)

#: Seconds between two heartbeats that are told to the database, at the most.
BEAT = 1.0


class ActivityInfo:
    """What a running activity is part of.

    What is kept in the database (``workflow_id``, ``heartbeat_details``, ``deadline``) is looked up once, when the code
    first asks for the info, so that it can be read when the activity has ended, too.

    Attributes:
      workflow_id(str), run_id(str): the run that scheduled it.
      activity(str): its name.
      attempt(int): counted from 1.
      headers(dict): what the run's interceptors gave it.
      heartbeat_details: what an attempt before this one said last with ``heartbeat(details)``; None if none did.
      scheduled_at(datetime): when the run asked for it, UTC.
      deadline(datetime | None): when this attempt will be out of time (``start_to_close``, ``schedule_to_close``), UTC.
      is_last_attempt(bool): if this attempt fails, so does the activity.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._known: tuple[str, Any, datetime | None] | None = None
        assert delivery.run_id is not None
        self.run_id: str = delivery.run_id
        self.activity: str = delivery.actor_name
        self.attempt: int = delivery.attempt
        self.headers: dict[str, Any] = dict(delivery.options.get("headers") or {})
        self.scheduled_at = datetime.fromtimestamp(delivery.message_timestamp / 1000, UTC)

    @property
    def workflow_id(self) -> str:
        return self._look_up()[0]

    @property
    def heartbeat_details(self) -> Any:
        return self._look_up()[1]

    @property
    def deadline(self) -> datetime | None:
        return self._look_up()[2]

    @property
    def is_last_attempt(self) -> bool:
        return is_last_attempt(self._delivery)

    def _look_up(self) -> tuple[str, Any, datetime | None]:
        if self._known is None:
            delivery = self._delivery
            broker: DurableBroker = delivery.broker
            token = broker.commit.context.worker
            if token is None:
                raise LeaseLost("this worker is not registered (any more)")
            with broker.database.calling() as conn:
                row = broker.procedures.activity_of_lease(conn, token, delivery.key, delivery.lease)
            if row is None:
                raise LeaseLost(f"the lease on {self.activity!r} was given to another worker, or its time is over")
            workflow_id, details, deadline = row
            self._known = (
                workflow_id,
                None if details is None else loads(broker.codecs.decode(details, "the heartbeat's details")),
                None if deadline is None else datetime.fromtimestamp(deadline / 1000, UTC),
            )
        return self._known

    def look_up(self) -> None:
        """Look up what is kept in the database, if that can be done now; else it is when it is used."""
        with suppress(DurableError):
            self._look_up()

    def __repr__(self) -> str:
        return f"ActivityInfo(activity={self.activity!r}, run_id={self.run_id!r}, attempt={self.attempt})"


class LocalActivityInfo(ActivityInfo):
    """The same for an activity that runs inside the workflow task."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.run_id = about["run_id"]
        self.activity = about["activity"]
        self.attempt = about["attempt"]
        self.headers = dict(about["headers"])
        self.scheduled_at = datetime.fromtimestamp(about["scheduled_ms"] / 1000, UTC)
        deadline = about["deadline_ms"]
        self._known = (
            about["workflow_id"],
            None,
            None if deadline is None else datetime.fromtimestamp(deadline / 1000, UTC),
        )
        self._is_last_attempt: bool = about["is_last_attempt"]

    @property
    def is_last_attempt(self) -> bool:
        return self._is_last_attempt


def activity_info() -> ActivityInfo | None:
    """What the running activity is part of; None outside a workflow's activity."""
    about = current_local.get()
    if about is not None:
        return LocalActivityInfo(about)
    info = _info()
    if info is not None:
        info.look_up()
    return info


def _info() -> ActivityInfo | None:
    delivery = current_delivery.get()
    if delivery is None or delivery.kind != "a" or delivery.run_id is None:
        return None
    if delivery.info is None:
        delivery.info = ActivityInfo(delivery)
    found: ActivityInfo = delivery.info
    return found


def _running(what: str) -> Delivery:
    delivery = current_delivery.get()
    if delivery is None or delivery.kind != "a" or delivery.hooks:
        raise DurableError(f"{what} works only inside a running activity of a workflow")
    return delivery


def heartbeat(details: Any = None) -> None:
    """Say that the running activity goes on, and how far it has come.

    Cheap enough for every turn of a loop: at the most one a second is told to the database (more often where the
    ``heartbeat`` limit is shorter), and nothing is waited for.  Inside a local activity it does nothing.

    Parameters:
      details: any value that the converter can carry; the next attempt, after a failure or a crash, finds the latest
        in ``activity_info().heartbeat_details``.  None leaves what was said before.

    Raises:
      ActivityCancelled: the activity was cancelled, or its run has closed.
      NotEncodable, PayloadTooLarge, CodecFailed: the details cannot be carried.
      DurableError: outside an activity of a workflow.
    """
    if current_local.get() is not None:
        # It is no longer than a step of its run: nobody would know what to do with it.
        return
    delivery = _running("heartbeat()")
    delivery.raise_again()
    if details is not None:
        info = _info()
        if delivery.details is None and info is not None and (info.attempt > 1 or delivery.reclaimed):
            # What the attempt before this one said is kept for this one before it is replaced.
            info.look_up()
        what = f"the heartbeat of {delivery.actor_name!r}"
        delivery.details = delivery.broker.codecs.encode(encode(details, what), what)
    delivery.unsaid = True
    now = time.monotonic()
    limit = (delivery.options.get(LIMITS) or {}).get("heartbeat")
    if now - delivery.said >= (BEAT if limit is None else min(BEAT, limit / 4000)):
        send_heartbeat(delivery)


def send_heartbeat(delivery: Delivery) -> None:
    """Have the latest heartbeat of a delivery told to the database with the next batch."""
    delivery.said = time.monotonic()
    delivery.unsaid = False
    beat = Beat(delivery.key, delivery.lease, delivery.details)

    def then(beat: Beat) -> None:
        if beat.error is not None:
            logger.warning("a heartbeat of %s was not recorded: %s", delivery, beat.error)
        elif beat.answer != "ok" and not delivery.settled:
            delivery.doom(beat.answer)

    beat.then = then
    claimer = delivery.broker.claimer
    if claimer is None:
        delivery.broker.commit.post(beat)
    else:
        claimer.post(beat)


def complete_later() -> str:
    """Have the running activity ended from elsewhere: what its actor returns is ignored.

    When the actor has returned, the activity waits without a worker, under its limits as before, until somebody calls
    `complete_activity` or `fail_activity` with the token.  If the actor raises instead, it has failed, and the token is
    of no use.

    Returns:
      str: the token.  Whoever has it can end this activity, once: treat it as a password.

    Raises:
      DurableError: outside an activity of a workflow.
      LeaseLost: the activity was given to another worker, or its time is over.
      DatabaseUnavailable: the database cannot be reached.
    """
    if current_local.get() is not None:
        raise DurableError("an activity that runs inside the workflow task cannot end later: run it without local=True")
    delivery = _running("complete_later()")
    assert delivery.run_id is not None
    assert delivery.seq is not None
    secret = os.urandom(20)
    token = uuid.UUID(delivery.run_id).bytes + delivery.seq.to_bytes(4, "big") + secret
    if not delivery.broker.commit.submit(Defer(delivery.key, delivery.lease, hashlib.sha256(secret).digest())):
        raise LeaseLost(f"the lease on {delivery.actor_name!r} was given to another worker, or its time is over")
    delivery.deferred = True
    return urlsafe_b64encode(token).decode()


def judge(delivery: Delivery, policy: Mapping[str, Any], exception: BaseException) -> None:
    """Decide by its policy what becomes of a message that failed, as Dramatiq's Retries does by its options."""
    actor = delivery.broker.actors.get(delivery.actor_name)
    throws = None if actor is None else actor.options.get("throws")
    if isinstance(exception, Shutdown):
        delivery.released = True
    elif retry.forbids(policy, exception) or (throws and isinstance(exception, throws)):
        delivery.hopeless = True
        delivery.fail()
    elif retry.is_last(policy, delivery.attempt):
        logger.warning("the attempts of %s are used up", delivery)
        delivery.fail()
    else:
        delay = exception.delay if isinstance(exception, Retry) else None
        delivery.retry = retry.delay_after(policy, delivery.attempt) if delay is None else delay
        logger.info("%s is tried again in %d milliseconds", delivery, delivery.retry)


def is_last_attempt(delivery: Delivery) -> bool:
    """Whether no attempt follows if this one fails."""
    policy = delivery.options.get(retry.OPTION)
    if policy:
        return retry.is_last(policy, delivery.attempt)
    broker: DurableBroker = delivery.broker
    actor = broker.actors.get(delivery.actor_name)
    options = {} if actor is None else actor.options
    for middleware in broker.middleware:
        if isinstance(middleware, Retries):
            if options.get("retry_when", middleware.retry_when) is not None:
                return False
            most = delivery.options.get("max_retries", options.get("max_retries", middleware.max_retries))
            return most is not None and delivery.options.get("retries", 0) >= most
    return True
