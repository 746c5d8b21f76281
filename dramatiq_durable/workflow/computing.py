"""Computes what the code asked for on the spot: side effects and local activities."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from dramatiq.asyncio import get_event_loop_thread

from ..errors import NotEncodable, PayloadTooLarge
from .commands import Compute
from .converter import encode
from .events import Event
from .failures import failure_to_json


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
    except Exception as e:
        facts["failure"] = failure_to_json(e)
    return Event(0, command.answer, int(time.time() * 1000), command.seq, command.name, payload, facts or None)


def _call(command: Compute) -> Any:
    value = command.fn(*command.args, **command.kwargs)
    if not asyncio.iscoroutine(value):
        return value
    # Where async actors have a loop, what they keep there (clients, pools) is at hand.
    thread = get_event_loop_thread()
    return asyncio.run(value) if thread is None else thread.run_coroutine(value)
