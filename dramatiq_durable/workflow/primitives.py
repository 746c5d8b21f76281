"""What workflow code calls: sleeping, time, randomness, signals, conditions, and what the run knows about itself."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random as _random
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from datetime import datetime
from typing import Any

from ..durations import Duration, parse_duration
from ..errors import NotInWorkflow, Timeout
from .commands import Command, StartTimer, TimerCall
from .loop import Evicted
from .replay import Execution, Info, Parent, current

__all__ = [
    "Info",
    "Parent",
    "info",
    "is_replaying",
    "logger",
    "now",
    "random",
    "require",
    "sleep",
    "uuid4",
    "uuid7",
    "wait_condition",
    "wait_for_signal",
]


def require(what: str) -> Execution:
    """Return the run whose code is running.

    Raises:
      NotInWorkflow: no workflow is running on this thread.
      Evicted: its run is being dropped from memory.
    """
    execution = current()
    if execution is None:
        raise NotInWorkflow(f"{what} only works inside a workflow: call it from the body of a @durable.workflow.")
    if execution.loop.evicting:
        raise Evicted
    return execution


def sleep(duration: Duration) -> Coroutine[Any, Any, None]:
    """Sleep durably: the timer starts at the call, and a sleeping run holds nothing but rows.

    Parameters:
      duration: seconds, a ``timedelta`` or text such as ``"30 days"``; 0 lets other tasks run.

    Raises:
      ValueError: the duration is negative or malformed.
    """
    execution = require("durable.sleep()")
    ms = parse_duration(duration)
    if ms == 0:
        call: TimerCall = TimerCall(execution, Command(seq=0))
        execution.loop.call_soon(_wake, call)
        return call
    command = StartTimer(ms=ms)
    seq = execution.issue(command)
    call = TimerCall(execution, command)
    execution.expect(seq, call)
    return call


def _wake(call: TimerCall) -> None:
    if not call.done():
        call.set_result(None)


def now() -> datetime:
    """Return the time of the step that is running, by history's clock: UTC, in whole milliseconds."""
    return require("durable.now()").now


def is_replaying() -> bool:
    """Return whether the code is only being brought back to where it was: what it does now was done before."""
    return require("durable.is_replaying()").is_replaying


def info() -> Info:
    """Return what the run knows about itself, as of now."""
    return require("durable.info()").info


def random() -> _random.Random:
    """Return the run's random numbers: seeded by the run id, and one sequence for the whole run."""
    return _stream(require("durable.random()"), "random")


def _stream(execution: Execution, name: str) -> _random.Random:
    known = execution.state.get(name)
    if known is None:
        seed = hashlib.blake2b(f"{name}:{execution.run_id}".encode(), digest_size=16).digest()
        known = execution.state[name] = _random.Random(int.from_bytes(seed, "big"))
    assert isinstance(known, _random.Random)
    return known


def uuid4() -> uuid.UUID:
    """Return a random UUID that is the same on replay."""
    execution = require("durable.uuid4()")
    return uuid.UUID(int=_stream(execution, "uuid").getrandbits(128), version=4)


def uuid7() -> uuid.UUID:
    """Return a UUID ordered by history's clock, the same on replay; those of one run always rise."""
    execution = require("durable.uuid7()")
    bits = _stream(execution, "uuid").getrandbits(62)
    ms = execution.loop.now_ms
    last_ms, count = execution.state.get("uuid7", (0, 0))
    # 12 bits count what is made in one millisecond; beyond them the next millisecond is borrowed.
    count = count + 1 if ms <= last_ms else 0
    ms = max(ms, last_ms)
    if count > 0xFFF:
        ms, count = ms + 1, 0
    execution.state["uuid7"] = (ms, count)
    return uuid.UUID(int=(ms & (1 << 48) - 1) << 80 | 0x7 << 76 | count << 64 | 0b10 << 62 | bits)


def wait_for_signal(name: str, timeout: Duration | None = None) -> Coroutine[Any, Any, Any]:
    """Wait for the next signal of that name; signals that came before are kept, and given out in order.

    Parameters:
      timeout: seconds, a ``timedelta`` or text; None waits for ever.

    Returns:
      What was sent with the signal.

    Raises:
      Timeout: it did not come in time.
      ValueError: the timeout is negative or malformed.
    """
    execution = require("durable.wait_for_signal()")
    ms = None if timeout is None else parse_duration(timeout)
    return _wait_for_signal(execution, name, ms)


async def _wait_for_signal(execution: Execution, name: str, ms: int | None) -> Any:
    there, value = execution.take_signal(name)
    if there:
        return value
    if ms is None:
        return await execution.next_signal(name)
    return await _within(execution.next_signal(name), ms, f"the signal {name!r}")


def wait_condition(holds: Callable[[], Any], timeout: Duration | None = None) -> Coroutine[Any, Any, None]:
    """Wait until ``holds()`` is true.  It is called whenever the run has nothing else to do, and must be quick.

    Raises:
      Timeout: it did not become true in time.
      ValueError: the timeout is negative or malformed.
    """
    execution = require("durable.wait_condition()")
    ms = None if timeout is None else parse_duration(timeout)
    return _wait_condition(execution, holds, ms)


async def _wait_condition(execution: Execution, holds: Callable[[], Any], ms: int | None) -> None:
    if holds():
        return
    future = execution.add_condition(holds)
    if ms is None:
        await future
    else:
        await _within(future, ms, "the condition")


async def _within(awaitable: Awaitable[Any], ms: int, what: str) -> Any:
    scope = asyncio.timeout(ms / 1000)
    try:
        async with scope:
            return await awaitable
    except TimeoutError:
        if not scope.expired():
            raise
        raise Timeout(f"{what} did not come within {ms / 1000:g} s.") from None


class WorkflowLogger(logging.LoggerAdapter[logging.Logger]):
    """Logs from inside a workflow: silent while replaying; every record has ``workflow_id`` and ``run_id``.

    Outside a workflow it is an ordinary logger.
    """

    def isEnabledFor(self, level: int) -> bool:
        execution = current()
        if execution is not None and (execution.is_replaying or execution.loop.evicting):
            return False
        return super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        execution = current()
        if execution is not None:
            ids = {"workflow_id": execution.workflow_id, "run_id": execution.run_id}
            kwargs["extra"] = {**ids, **(kwargs.get("extra") or {})}
        return msg, kwargs


logger = WorkflowLogger(logging.getLogger("dramatiq_durable.workflow"), {})
