"""Ending an activity from outside, with the token of `complete_later`: from any process, whatever it may do else."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dramatiq

from .errors import ActivityCancelled
from .operations import FinishActivity
from .operations.activities import unknown_token
from .settling import text_of
from .workflow import events
from .workflow.client import durable_broker
from .workflow.converter import encode
from .workflow.definition import global_broker
from .workflow.failures import failure_to_json
from .workflow.handle import outside_of_workflows
from .workflow.retry import forbids, next_delay

if TYPE_CHECKING:
    from .broker import DurableBroker

_SECRET = 20


def _parsed(token: str) -> tuple[bytes, int, bytes]:
    """The run's id, the command's number and the secret's digest."""
    if not isinstance(token, str):
        raise TypeError(f"a token is the text that complete_later() answered, not a {type(token).__name__}")
    try:
        data = urlsafe_b64decode(token.encode())
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != 16 + 4 + _SECRET or data[16] > 127:
        raise unknown_token()
    return data[:16], int.from_bytes(data[16:20], "big"), hashlib.sha256(data[20:]).digest()


def _finish(operation: FinishActivity, broker: DurableBroker) -> None:
    codecs = broker.codecs
    operation.payload = codecs.encode(operation.payload, "the result of an activity")
    operation.attributes = codecs.seal_facts(operation.attributes)
    operation.failure = codecs.encode_text(operation.failure)
    broker.commit.submit(operation)


def described(exc: BaseException, policy: Mapping[str, Any] | None, attempt: int) -> dict[str, Any]:
    """What a workflow is told of an attempt that failed for good, where whoever had its token says so."""
    cancelled = isinstance(exc, ActivityCancelled)
    hopeless = cancelled or (policy is not None and forbids(policy, exc))
    failure = {**failure_to_json(exc, retryable=not hopeless), "attempt": attempt}
    if cancelled:
        failure["type"] = "ActivityCancelled"
    return failure


def complete_activity(token: str, value: Any = None, *, broker: dramatiq.Broker | None = None) -> None:
    """End an activity that waits for this token with a result; when this returns, it is committed.

    Parameters:
      token(str): what `complete_later` answered.  It is enough: the login needs no right on the activity's stream.
      value: any value that the converter can carry.
      broker(Broker | None): the broker; Dramatiq's global one by default.

    Raises:
      UnknownToken: nobody waits for it (any more).
      NotEncodable, PayloadTooLarge, CodecFailed: the value cannot be carried.
      ForbiddenInWorkflow: called inside a workflow.
      DatabaseUnavailable: the database cannot be reached; nothing was done.
      OutcomeUnknown: the connection broke, and whether it was ended is not known.
    """
    outside_of_workflows("end an activity")
    payload = encode(value, "the result of an activity")
    operation = FinishActivity(*_parsed(token), events.ACTIVITY_COMPLETED, payload, None)
    _finish(operation, durable_broker(broker or global_broker()))


def fail_activity(token: str, exc: BaseException, *, broker: dramatiq.Broker | None = None) -> None:
    """Let an activity that waits for this token fail.

    With a `RetryPolicy` it is tried again as that says, with another token; without one, and after the last attempt,
    the workflow gets an `ActivityFailed` with its type and text.

    Parameters:
      exc(BaseException): what it failed with; it may carry ``next_retry_delay``.  With an `ActivityCancelled` it has
        ended as cancelled.

    Raises:
      TypeError: it is no exception.
      Otherwise as `complete_activity`.
    """
    if not isinstance(exc, BaseException):
        raise TypeError(f"fail_activity takes an exception, like ValueError('declined'), not {exc!r:.60}")
    outside_of_workflows("end an activity")
    ours = durable_broker(broker or global_broker())
    run_id, seq, digest = _parsed(token)
    with ours.database.calling() as conn:
        known = ours.procedures.attempt_of_token(conn, run_id, seq, digest)
    if known is None:
        raise unknown_token()
    attempt, policy = known
    facts = {"failure": described(exc, policy, attempt)}
    delay = None if isinstance(exc, ActivityCancelled) else next_delay(policy, attempt, exc)
    _finish(FinishActivity(run_id, seq, digest, events.ACTIVITY_FAILED, None, facts, delay, text_of(exc)), ours)


def heartbeat_activity(token: str, details: Any = None, *, broker: dramatiq.Broker | None = None) -> None:
    """Say that an activity that waits for this token goes on: as `heartbeat`, from outside.

    Raises:
      ActivityCancelled: the activity was cancelled, or its run has closed.
      Otherwise as `complete_activity`.
    """
    outside_of_workflows("send heartbeats")
    ours = durable_broker(broker or global_broker())
    run_id, seq, digest = _parsed(token)
    what = "the heartbeat of an activity"
    data = None if details is None else ours.codecs.encode(encode(details, what), what)
    with ours.database.calling() as conn:
        answer = ours.procedures.beat_by_token(conn, run_id, seq, digest, data)
    if answer == "cancelled":
        raise ActivityCancelled
    if answer != "ok":
        raise unknown_token()


async def acomplete_activity(token: str, value: Any = None, *, broker: dramatiq.Broker | None = None) -> None:
    """`complete_activity`, for async code."""
    outside_of_workflows("end an activity")
    await asyncio.to_thread(complete_activity, token, value, broker=broker)


async def afail_activity(token: str, exc: BaseException, *, broker: dramatiq.Broker | None = None) -> None:
    """`fail_activity`, for async code."""
    outside_of_workflows("end an activity")
    await asyncio.to_thread(fail_activity, token, exc, broker=broker)


async def aheartbeat_activity(token: str, details: Any = None, *, broker: dramatiq.Broker | None = None) -> None:
    """`heartbeat_activity`, for async code."""
    outside_of_workflows("send heartbeats")
    await asyncio.to_thread(heartbeat_activity, token, details, broker=broker)
