"""Activities that run inside the workflow task: ``activity.options(local=True)``.

An attempt is computed as ``durable.local`` is; what comes between two attempts is a durable timer, so that a run that
waits for its next attempt holds nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ActivityFailed
from . import events
from .commands import Compute, ComputeCall
from .converter import decoders_of, hash_arguments, loads, typed
from .primitives import require, sleep
from .replay import Execution
from .retry import delay_after, forbids, is_last

if TYPE_CHECKING:
    from .activities import _Schedulable
    from .options import Dispatch


def run_locally(
    activity: _Schedulable[..., Any], dispatch: Dispatch, as_handle: bool, payload: bytes, headers: dict[str, Any]
) -> Any:
    """Run an activity inside the workflow task; its first attempt is asked for at the call.

    Returns:
      A coroutine; with ``as_handle`` a task.
    """
    execution = require("a local activity")
    fn = _plain(activity._function())
    actor_options = activity._actor_options()
    policy = dispatch.retries(actor_options)
    throws = actor_options.get("throws")
    limits = [(ms, name) for name, ms in dispatch.limits.items()]
    limit = min(limits) if limits else None

    misfits: list[BaseException] = []

    def hopeless(exception: BaseException) -> bool:
        told = exception in misfits or forbids(policy, exception)
        return told or bool(throws and isinstance(exception, throws))

    scheduled_ms = execution.loop.now_ms

    def call(attempt: int) -> ComputeCall[Any]:
        # Each attempt gets arguments of its own, as one from a message does.
        recorded = loads(payload)
        args, kwargs = tuple(recorded["args"]), recorded["kwargs"]
        calls = fn
        try:
            args, kwargs = typed(args, kwargs, fn)
        except Exception as e:
            # They will not fit the next time either.
            misfits.append(e)
            calls = _raising(e)
        command = Compute(
            None,
            activity.actor_name,
            None,
            hash_arguments(payload),
            fn=calls,
            args=args,
            kwargs=kwargs,
            answer=events.LOCAL_ACTIVITY_COMPLETED,
            attempt=attempt,
            hopeless=hopeless,
            limit=limit,
            about={
                "workflow_id": execution.info.workflow_id,
                "run_id": execution.info.run_id,
                "activity": activity.actor_name,
                "attempt": attempt,
                "headers": headers,
                "scheduled_ms": scheduled_ms,
                "is_last_attempt": is_last(policy, attempt),
            },
        )
        waiting: ComputeCall[Any] = ComputeCall(execution, command, "abandon", decoders_of(fn).result)
        execution.expect(execution.compute(command), waiting)
        return waiting

    until = None
    if "schedule_to_close" in dispatch.limits:
        until = execution.loop.now_ms + dispatch.limits["schedule_to_close"]
    attempts = _attempts(execution, call, call(1), policy, until)
    return execution.loop.create_task(attempts) if as_handle else attempts


def _plain(fn: Any) -> Callable[..., Any]:
    """The function as it was written: an ``async def`` actor's is wrapped for the thread of a message."""
    written = getattr(fn, "__wrapped__", None)
    return written if inspect.iscoroutinefunction(written) else fn


def _raising(error: Exception) -> Callable[..., Any]:
    """What is called in place of a function whose arguments do not fit."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error

    return refuse


async def _attempts(
    execution: Execution,
    call: Callable[[int], ComputeCall[Any]],
    first: ComputeCall[Any],
    policy: Mapping[str, Any],
    until: int | None,
) -> Any:
    attempt, waiting = 1, first
    while True:
        try:
            return await waiting
        except ActivityFailed as e:
            delay = delay_after(policy, attempt) if e.retry_after is None else e.retry_after
            if not e.retryable or is_last(policy, attempt):
                raise
            if until is not None and execution.loop.now_ms + delay >= until:
                e.timeout = "schedule_to_close"
                raise
        await sleep(delay / 1000)
        attempt += 1
        waiting = call(attempt)
