"""Computes what the code asked for on the spot: side effects and local activities."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from contextvars import ContextVar
from typing import Any

from dramatiq.asyncio import get_event_loop_thread
from dramatiq.middleware import TimeLimitExceeded

from ..errors import NotEncodable, PayloadTooLarge, Timeout
from ..interrupts import Interruptible
from .commands import Compute
from .converter import encode
from .events import Event
from .failures import failure_to_json
from .retry import asked_delay

#: What is known of the local activity whose code runs here.
current_local: ContextVar[dict[str, Any] | None] = ContextVar("current_local", default=None)


def computed(command: Compute) -> Event:
    """Call the function, and return the event that answers.

    Raises:
      BaseException: what is no Exception and ended the call, e.g. the interrupt of a worker that stops; nothing is
        recorded then.
    """
    payload: bytes | None = None
    facts: dict[str, Any] = {}
    if command.hash is not None:
        facts["hash"] = command.hash
    try:
        value = _call(command)
        if value is not None:
            payload = encode(value, f"the result of {command.name!r}")
    except (NotEncodable, PayloadTooLarge) as e:
        facts["failure"] = failure_to_json(e, retryable=False)
    except OutOfTime as e:
        assert command.limit is not None
        ms, name = command.limit
        facts["failure"] = {
            **failure_to_json(Timeout(f"{name}: it did not end within {ms / 1000:g} s")),
            "timeout": name,
            "traceback": e.traceback,
        }
    except Exception as e:
        hopeless = command.hopeless is not None and command.hopeless(e)
        facts["failure"] = failure_to_json(e, retryable=not hopeless)
        delay = asked_delay(e)
        if delay is not None:
            facts["failure"]["retry_after"] = delay
    if "failure" in facts and command.slow:
        facts["failure"]["attempt"] = command.attempt
    return Event(0, command.answer, int(time.time() * 1000), command.seq, command.name, payload, facts or None)


class OutOfTime(Exception):
    """The call was ended because its time was over."""

    def __init__(self, traceback: str) -> None:
        super().__init__()
        self.traceback = traceback


def _call(command: Compute) -> Any:
    if command.limit is None:
        return _run(command)
    attempt = Interruptible()
    timer = threading.Timer(command.limit[0] / 1000, attempt.interrupt, (TimeLimitExceeded,))
    timer.daemon = True
    timer.start()
    try:
        try:
            attempt.begin()
            return _run(command)
        finally:
            attempt.end()
            timer.cancel()
    except TimeLimitExceeded:
        if attempt.interruption is None:
            raise
        raise OutOfTime(traceback.format_exc(limit=-30)) from None


def _run(command: Compute) -> Any:
    known = current_local.set(about_now(command, int(time.time() * 1000)))
    try:
        return _called(command)
    finally:
        current_local.reset(known)


def about_now(command: Compute, now_ms: int) -> dict[str, Any] | None:
    """What `activity_info()` tells the code of an attempt that begins now."""
    if command.about is None:
        return None
    return {**command.about, "deadline_ms": None if command.limit is None else now_ms + command.limit[0]}


def _called(command: Compute) -> Any:
    value = command.fn(*command.args, **command.kwargs)
    if not asyncio.iscoroutine(value):
        return value
    # Where async actors have a loop, what they keep there (clients, pools) is at hand.
    thread = get_event_loop_thread()
    return asyncio.run(value) if thread is None else thread.run_coroutine(value)
