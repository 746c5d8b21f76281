"""Abort: a message that waits shall not run any more, one that runs shall be interrupted."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import Literal

import dramatiq

from .delivery import key_of
from .workflow.client import durable_broker
from .workflow.definition import global_broker
from .workflow.handle import outside_of_workflows

AbortMode = Literal["abort", "cancel"]
Aborted = Literal["queued", "running", "missing"]


def abort(message_id: str, *, mode: AbortMode = "abort", broker: dramatiq.Broker | None = None) -> Aborted:
    """Abort a message that is queued, delayed, waiting for its retry, or running.

    A message that waits never runs: it fails with `Abort` as soon as a worker comes by (on a paused stream, once that
    is resumed).  In the thread that runs it `Abort` is raised, within a second or so; async actors are cancelled.
    Either way it is not retried: middleware see it fail, ``on_failure`` is called, its stored result is a failure, and
    it lies with the dead letters as ``aborted``.  An actor that catches `Abort` and returns is simply done.
    A thread in a system call, or in an extension's code, gets the exception when it comes back to Python.

    Parameters:
      message_id(str): the id that `send` answered, or the one that `dramatiq-durable stream peek` shows.
      mode(str): "abort", or "cancel" to leave alone what a worker has already taken.
      broker(Broker | None): the broker; Dramatiq's global one by default.

    Returns:
      str: "queued": it will not run; "running": a worker has it and is told (with "cancel": nothing was done);
      "missing": it is finished, was never stored, or is of a stream that this login may not use.

    Raises:
      ValueError, TypeError: the mode is neither; the id is no text.
      ForbiddenInWorkflow: called inside a workflow.
      DatabaseUnavailable: the database cannot be reached; nothing was done.
    """
    if mode not in ("abort", "cancel"):
        raise ValueError(f'a message is aborted with mode="abort" or mode="cancel", not {mode!r}')
    if not isinstance(message_id, str):
        raise TypeError(f"abort takes a message's id, like message.message_id, not a {type(message_id).__name__}")
    outside_of_workflows("abort messages")
    ours = durable_broker(broker or global_broker())
    keys = {key_of(message_id)}
    with suppress(ValueError):
        # An activity's id is the database's own, which key_of gives to no plain message.
        keys.add(uuid.UUID(message_id).bytes)
    with ours.database.calling() as conn:
        answer: Aborted = ours.procedures.abort_message(conn, list(keys), mode == "abort")
        return answer


async def aabort(message_id: str, *, mode: AbortMode = "abort", broker: dramatiq.Broker | None = None) -> Aborted:
    """`abort`, for async code."""
    outside_of_workflows("abort messages")
    return await asyncio.to_thread(abort, message_id, mode=mode, broker=broker)
