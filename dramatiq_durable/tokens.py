"""Ending an activity from outside, with the token of `complete_later`: from any process, whatever it may do else."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
from base64 import urlsafe_b64decode
from typing import Any

import dramatiq

from .errors import ActivityCancelled
from .operations import FinishActivity
from .operations.activities import unknown_token
from .workflow import events
from .workflow.client import durable_broker
from .workflow.converter import encode
from .workflow.definition import global_broker
from .workflow.failures import failure_to_json
from .workflow.handle import outside_of_workflows

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


def _finish(
    token: str, type: str, payload: bytes | None, attributes: dict[str, Any] | None, broker: dramatiq.Broker | None
) -> None:
    outside_of_workflows("end an activity")
    ours = durable_broker(broker or global_broker())
    codecs = ours.codecs
    facts = codecs.seal_facts(attributes)
    ours.commit.submit(
        FinishActivity(*_parsed(token), type, codecs.encode(payload, "the result of an activity"), facts)
    )


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
    _finish(token, events.ACTIVITY_COMPLETED, encode(value, "the result of an activity"), None, broker)


def fail_activity(token: str, exc: BaseException, *, broker: dramatiq.Broker | None = None) -> None:
    """Let an activity that waits for this token fail for good; it is not tried again.

    Parameters:
      exc(BaseException): what it failed with; the workflow gets an `ActivityFailed` that tells its type and text.  With
        an `ActivityCancelled` it has ended as cancelled.

    Raises:
      TypeError: it is no exception.
      Otherwise as `complete_activity`.
    """
    if not isinstance(exc, BaseException):
        raise TypeError(f"fail_activity takes an exception, like ValueError('declined'), not {exc!r:.60}")
    failure = failure_to_json(exc, retryable=False)
    if isinstance(exc, ActivityCancelled):
        failure["type"] = "ActivityCancelled"
    _finish(token, events.ACTIVITY_FAILED, None, {"failure": failure}, broker)


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
