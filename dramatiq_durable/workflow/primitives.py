"""What workflow code calls: sleeping, time, randomness, signals, conditions, and what the run knows about itself."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random as _random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from datetime import datetime
from typing import Any, TypeVar

from ..durations import Duration, parse_duration
from ..errors import ForbiddenInWorkflow, InvalidName, NotInWorkflow, Timeout
from . import events
from .commands import Command, Compute, ComputeCall, StartTimer, TimerCall
from .converter import decode, decoders_of, encode_call, hash_arguments
from .decoders import Decoder
from .info import Info, Parent
from .names import check_name
from .replay import Execution, current

__all__ = [
    "Info",
    "Parent",
    "deprecate_patch",
    "info",
    "is_replaying",
    "local",
    "logger",
    "now",
    "patched",
    "random",
    "require",
    "side_effect",
    "signals",
    "sleep",
    "uuid4",
    "uuid7",
    "wait_condition",
    "wait_for_signal",
]


T = TypeVar("T")


def require(what: str) -> Execution:
    """Return the run whose code is running.

    Raises:
      NotInWorkflow: no workflow is running on this thread.
      ForbiddenInWorkflow: only a query is, or the validator of an update.
      Evicted: its run is being dropped from memory.
    """
    execution = current()
    if execution is None:
        raise NotInWorkflow(f"{what} only works inside a workflow: call it from the body of a @durable.workflow.")
    if execution.loop.evicting:
        execution.loop.refuse_late()
    if execution.reading is not None and what not in _LOOKING:
        raise execution.change_refused()
    return execution


#: What a query may call, too.
_LOOKING = ("durable.now()", "durable.is_replaying()", "durable.info()", "durable.all_handlers_finished()")


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
        known = execution.state[name] = _random.Random(execution.lineage.seed(name))
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


def side_effect(fn: Callable[[], T]) -> Coroutine[Any, Any, T]:
    """Call a function once, and remember what it returned: a random number, the time, the name of this machine.

    It is called outside of the workflow's code, between two of its steps; replay gives the recorded value.

    Parameters:
      fn: plain, quick and without I/O; what does I/O is for ``local``, or an activity.

    Raises:
      ActivityFailed: (when awaited) it raised.
      ForbiddenInWorkflow: it is ``async def``.
    """
    execution = require("durable.side_effect()")
    if inspect.iscoroutinefunction(fn):
        raise ForbiddenInWorkflow("side_effect takes a plain function: what awaits is for durable.local(fn, ...).")
    return _compute(execution, Compute(name=_name_of(fn), fn=fn, answer=events.SIDE_EFFECT_RECORDED))


def local(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
    """Call a function inside the workflow task: an activity without a message of its own.

    It runs on the worker that has the run, in real time, and may do I/O; what it returns is recorded with the step.  A
    worker that dies before that has it called again.  Meanwhile the run does nothing else: keep it short.

    Parameters:
      fn: plain or ``async def``.

    Returns:
      What it returned, as the converter carries it.

    Raises:
      ActivityFailed: (when awaited) it raised.
      NotEncodable, PayloadTooLarge: an argument cannot be carried.
    """
    execution = require("durable.local()")
    payload = encode_call(args, kwargs, fn, _name_of(fn))
    command = Compute(
        None,
        _name_of(fn),
        None,
        hash_arguments(payload),
        fn=fn,
        args=args,
        kwargs=kwargs,
        answer=events.LOCAL_ACTIVITY_COMPLETED,
    )
    return _compute(execution, command, decoders_of(fn).result)


def _compute(execution: Execution, command: Compute, decode: Decoder | None = None) -> ComputeCall[Any]:
    call: ComputeCall[Any] = ComputeCall(execution, command, "abandon", decode)
    execution.expect(execution.compute(command), call)
    return call


def _name_of(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))[:200]


def patched(id: str) -> bool:
    """Return whether this run follows the code behind a patch.

    A run that was under way before the patch answers False, every other one True, and both stay with it, wherever
    they ask again::

        if durable.patched("two-receipts"):
            await print_receipts.execute(order_id)
        else:
            await print_receipt.execute(order_id)

    Once no run of the old kind is left, write ``durable.deprecate_patch("two-receipts")`` and drop the old branch.

    Raises:
      InvalidName: the id is empty, too long or no text.
    """
    return require("durable.patched()").patches.follows(_patch_id(id))


def deprecate_patch(id: str) -> None:
    """Say that every run follows the code behind a patch: the old branch is gone, runs that recorded it replay all the
    same.  Once none of those is left, drop this call, too.

    Raises:
      InvalidName: the id is empty, too long or no text.
    """
    require("durable.deprecate_patch()").patches.deprecate(_patch_id(id))


def _patch_id(id: str) -> str:
    if not isinstance(id, str) or not 1 <= len(id) <= 200 or "\0" in id:
        raise InvalidName(f"the id of a patch is 1 to 200 characters of text without NUL, not {id!r:.60}.")
    return id


def wait_for_signal(name: str, timeout: Duration | None = None, *, type: Any = Any) -> Coroutine[Any, Any, Any]:
    """Wait for the next signal of that name; signals that came before are kept, and given out in order.

    Signals that have a handler (``on_signal``) go to that.

    Parameters:
      timeout: seconds, a ``timedelta`` or text; None waits for ever.
      type: what was sent is made one of these, as an annotation says: a dataclass, ``list[UUID]``, ...

    Returns:
      What was sent with the signal.

    Raises:
      Timeout: it did not come in time.
      ValueError: the timeout is negative or malformed.
      ValueError, TypeError: (when awaited) what was sent does not fit the type.
    """
    execution = require("durable.wait_for_signal()")
    ms = None if timeout is None else parse_duration(timeout)
    return _wait_for_signal(execution, check_name(name, "a signal's name"), ms, type)


async def _wait_for_signal(execution: Execution, name: str, ms: int | None, type: Any) -> Any:
    there, payload = execution.mailbox.take(name)
    if not there:
        coming = execution.mailbox.next(name)
        payload = await (coming if ms is None else _within(coming, ms, f"the signal {name!r}"))
    return None if payload is None else decode(payload, type)


def signals(name: str, *, type: Any = Any) -> AsyncIterator[Any]:
    """Iterate over the signals of that name, those that came before first; it never ends by itself::

        async for item in durable.signals("item"):
            ...

    Parameters:
      type: as for ``wait_for_signal``.
    """
    require("durable.signals()")
    return _Signals(check_name(name, "a signal's name"), type)


class _Signals:
    """No asynchronous generator: one that is left early has nothing to clean up."""

    def __init__(self, name: str, type: Any) -> None:
        self._name = name
        self._type = type

    def __aiter__(self) -> _Signals:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Any]:
        return wait_for_signal(self._name, type=self._type)


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
