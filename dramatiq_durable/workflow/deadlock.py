"""A watchdog for workflow code that never awaits.

One thread of the process looks, a few times in each timeout, which steps of runs are still the ones that it saw before.
In one that was there for too long it raises ``Overdue``, on the thread that is running it.  A step that ends in time
costs nothing: it only puts itself into a dictionary, where the guard wants to find it anyway.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loop import Scope

log = logging.getLogger(__name__)

#: The steps that are being made right now, by the thread that makes them.
stepping: dict[int, Scope] = {}

#: Whether the watchdog's thread is awake.
watching = False

#: In how many looks a step has to be seen before it is overdue: a machine that stood still is not blamed on the code.
LOOKS = 4

#: After so many looks without a step the thread ends; the next step starts another.
IDLE_LOOKS = 100

#: What must not be interrupted: an import would be left half done, and a debugger has all the time in the world.
_PATIENT = frozenset({"importlib", "zipimport", "bdb", "pdb", "pydevd", "_pydevd_bundle"})

_lock = threading.Lock()


class Overdue(BaseException):
    """Raised in the middle of a step that takes too long.  No Exception: user code should not catch it by chance."""


def watch() -> None:
    """Make sure that the watchdog is awake."""
    global watching
    with _lock:
        if not watching:
            watching = True
            threading.Thread(target=_watch, name="dramatiq-durable-deadlocks", daemon=True).start()


def recall(ident: int) -> None:
    """Take back an ``Overdue`` that has not been raised yet: the step has ended after all."""
    with _lock:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)


def _watch() -> None:
    global watching
    seen: dict[int, tuple[Scope, int]] = {}
    idle = 0
    pause = 0.5
    while True:
        time.sleep(pause)
        seen = _look(seen)
        timeouts = [scope.loop.deadlock_timeout or 60.0 for scope, _ in seen.values()]
        if timeouts:
            pause = min(timeouts) / LOOKS
            idle = 0
            continue
        idle += 1
        if idle > IDLE_LOOKS:
            with _lock:
                watching = False
                if not stepping:
                    return
                # A step that has just begun saw us awake: it is ours.
                watching = True


def _look(before: dict[int, tuple[Scope, int]]) -> dict[int, tuple[Scope, int]]:
    """Look once at every step that is being made, and stop those that were seen too often."""
    seen: dict[int, tuple[Scope, int]] = {}
    for ident, scope in list(stepping.items()):
        if scope.loop.deadlock_timeout is None:
            continue
        known, looks = before.get(ident, (None, 0))
        looks = looks + 1 if known is scope else 0
        if looks >= LOOKS:
            looks = 0 if _stop(ident, scope) else looks
        seen[ident] = (scope, looks)
    return seen


def _stop(ident: int, scope: Scope) -> bool:
    frame = sys._current_frames().get(ident)
    if frame is None or _is_patient(frame):
        return False
    text = _describe(scope, frame)
    del frame
    # The step sets itself free first and looks at ``overdue`` then; here it is the other way round: whatever the two
    # do at once, either nothing is raised, or the step knows that it has to take it back.
    with _lock:
        again = scope.overdue is not None
        scope.overdue = text
        if stepping.get(ident) is not scope:
            return True
        scope.loop.stop_soon()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Overdue))
    if again:  # it caught what was raised, or is in a call that does not come back
        log.error("still running: %s", text)
    return True


def _is_patient(frame: FrameType | None) -> bool:
    while frame is not None:
        if _package(frame) in _PATIENT:
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _describe(scope: Scope, frame: FrameType) -> str:
    info = scope.loop.host.info
    return (
        f"the workflow {info.name!r} (run {info.run_id}) has been running for more than "
        f"{scope.loop.deadlock_timeout:g} s without waiting for anything durable, at {_place(frame)}: workflow code "
        "must neither block nor compute for long. Make that an activity and call it with "
        "`await activity.execute(...)`, or raise DRAMATIQ_DURABLE_DEADLOCK_TIMEOUT."
    )


def _place(frame: FrameType) -> str:
    """The line of the user's code that a thread is at, or else whatever it is at."""
    at: FrameType | None = frame
    while at is not None:
        if _package(at) not in sys.stdlib_module_names and _package(at) != _OURS:
            frame = at
            break
        at = at.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


_OURS = __name__.partition(".")[0]


def _after_fork() -> None:
    global watching, _lock
    stepping.clear()
    watching = False
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
