"""What workflow code gets instead of clocks and random numbers, which no replay could repeat.

Inside a workflow, and for code that the workflow calls:

- ``time.time()``, ``datetime.now()``, ``utcnow()``, ``today()``, ``date.today()``, ``time.monotonic()``,
  ``perf_counter()`` and their kin answer from history's clock, which stands still during a step: what
  ``durable.now()`` says.
- ``random.random()`` and the other functions of the module ``random``, and a ``random.Random()`` without a seed, draw
  from the run's own numbers, as ``durable.random()`` does; ``uuid.uuid4()`` and ``uuid.uuid7()`` are
  ``durable.uuid4()`` and ``durable.uuid7()``.  So the default factories of dataclasses and models work as they are.
- ``os.urandom()``, ``secrets`` and ``random.SystemRandom`` are refused: what can be computed from the run's id is no
  secret.  So is ``uuid.uuid1()``, which names the machine.

The standard library's own calls, and those of loggers and tracers, are not the workflow's: they get the real thing.
So do all other threads.
They are put in place when the first workflow is declared, wherever a module knows the originals by a name.  What was
kept in other places before, say as the default factory of a field, stays the original (but for ``uuid4``): in workers,
``dramatiq_durable.app`` comes first.  Outside of a running step each of these functions costs one look at an empty
dictionary more than before.
"""

from __future__ import annotations

import datetime as _datetime
import functools
import gc
import importlib.util
import logging
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from types import FrameType, FunctionType, MethodType
from typing import Any

from ..errors import ForbiddenInWorkflow
from .deadlock import stepping
from .loop import WorkflowLoop, current_host

log = logging.getLogger(__name__)

#: Packages that look on while code runs, and may read, write and ask for the time behind its back: imports,
#: tracebacks, log handlers, time zones, debuggers, tracers.
_TRUSTED = frozenset(
    {
        "importlib",
        "zipimport",
        "linecache",
        "traceback",
        "logging",
        "zoneinfo",
        "coverage",
        "bdb",
        "pdb",
        "pydevd",
        "_pydevd_bundle",
        "structlog",
        "loguru",
        "opentelemetry",
        "sentry_sdk",
        "ddtrace",
    }
)
_NOT_THE_WORKFLOW = _TRUSTED | sys.stdlib_module_names | {__name__.partition(".")[0]}
_TOP = WorkflowLoop.drain.__code__


def package_of(frame: FrameType) -> str:
    """The package of the code that a frame runs."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def is_trusted(frame: FrameType | None) -> bool:
    """Whether the way from the workflow's code to here went through a package that may do as it likes."""
    while frame is not None and frame.f_code is not _TOP:
        if package_of(frame) in _TRUSTED:
            return True
        frame = frame.f_back
    return False


def _run_of_caller(frame: FrameType) -> Any:
    """The run whose code called, or None if it is not the workflow's code that did."""
    host = current_host()
    if host is None or host.loop.evicting:
        return None
    # What a module does while it is imported is done once in a process, whichever run comes first.
    return None if package_of(frame) in _NOT_THE_WORKFLOW or is_trusted(frame) else host


def _as_method(function: Callable[..., Any], real: Any) -> Any:
    """``function`` with ``real`` as its first argument.

    A bound method, because what it takes the place of is no function of Python's: kept as an attribute of a class, it
    must not become a method of that.
    """
    return MethodType(function, real)


def refuse(what: str, instead: str) -> ForbiddenInWorkflow:
    """Return the error that says what cannot be done, and what to do instead."""
    return ForbiddenInWorkflow(f"{what} cannot be replayed, and is refused inside a workflow: {instead}")


# --- clocks ------------------------------------------------------------------------------------------------


def _seconds(real: Any) -> Any:
    if not stepping or (run := _run_of_caller(sys._getframe(1))) is None:
        return real()
    return run.loop.now_ms / 1000


def _nanoseconds(real: Any) -> Any:
    if not stepping or (run := _run_of_caller(sys._getframe(1))) is None:
        return real()
    return run.loop.now_ms * 1_000_000


def _seconds_of(real: Any, clock: int) -> Any:
    if not stepping or (run := _run_of_caller(sys._getframe(1))) is None:
        return real(clock)
    return run.loop.now_ms / 1000


def _nanoseconds_of(real: Any, clock: int) -> Any:
    if not stepping or (run := _run_of_caller(sys._getframe(1))) is None:
        return real(clock)
    return run.loop.now_ms * 1_000_000


def _broken_down(real: Any, seconds: float | None = None, /) -> Any:
    if seconds is None and stepping and (run := _run_of_caller(sys._getframe(1))) is not None:
        seconds = run.loop.now_ms / 1000
    return real(seconds)


def _asctime(real: Any, *given: Any) -> Any:
    if not given and stepping and (run := _run_of_caller(sys._getframe(1))) is not None:
        given = (time.localtime(run.loop.now_ms / 1000),)
    return real(*given)


def _strftime(real: Any, form: str, *given: Any) -> Any:
    if not given and stepping and (run := _run_of_caller(sys._getframe(1))) is not None:
        given = (time.localtime(run.loop.now_ms / 1000),)
    return real(form, *given)


def _clocks() -> dict[Any, Any]:
    kinds: dict[Callable[..., Any], str] = {
        _seconds: "time monotonic perf_counter process_time thread_time",
        _nanoseconds: "time_ns monotonic_ns perf_counter_ns process_time_ns thread_time_ns",
        _seconds_of: "clock_gettime",
        _nanoseconds_of: "clock_gettime_ns",
        _broken_down: "localtime gmtime ctime",
        _asctime: "asctime",
        _strftime: "strftime",
    }
    found = {}
    for function, names in kinds.items():
        for name in names.split():
            real = getattr(time, name, None)
            if real is not None:
                found[real] = _as_method(function, real)
    return found


def _now(real: Any) -> Any:
    def now(cls: Any, tz: Any = None) -> Any:
        """Returns new datetime object representing current time local to tz (inside a workflow: history's)."""
        if not stepping or (run := _run_of_caller(sys._getframe(1))) is None:
            return real.__get__(None, cls)(tz)
        return cls.fromtimestamp(run.loop.now_ms / 1000, tz)

    return now


def _utcnow(real: Any) -> Any:
    def utcnow(cls: Any) -> Any:
        """Return a new datetime representing UTC day and time (inside a workflow: history's)."""
        if not stepping or (run := _run_of_caller(sys._getframe(1))) is None:
            return real.__get__(None, cls)()
        return cls.fromtimestamp(run.loop.now_ms / 1000, _datetime.UTC).replace(tzinfo=None)

    return utcnow


def _install_datetime() -> None:
    """Put ours in the place of ``datetime.now`` and ``datetime.utcnow``; ``today`` asks ``time.time``.

    The class is one of C's, which lets nobody set its attributes, so they are put into its dictionary, and the
    interpreter is told that it has changed.  An interpreter that hides the dictionary keeps its own: there, the lint is
    what finds such calls.
    """
    try:
        from ctypes import py_object, pythonapi

        attributes = gc.get_referents(_datetime.datetime.__dict__)[0]
        for name, make in (("now", _now), ("utcnow", _utcnow)):
            if type(attributes[name]).__name__ == "classmethod_descriptor":
                attributes[name] = classmethod(make(attributes[name]))
        pythonapi.PyType_Modified(py_object(_datetime.datetime))
    except Exception:
        log.debug("datetime.now() is not guarded on this interpreter", exc_info=True)


# --- random numbers ----------------------------------------------------------------------------------------


def _randoms() -> dict[Any, Any]:
    from . import primitives

    def drawn(name: str) -> Callable[..., Any]:
        def draw(real: Any, *args: Any, **kwargs: Any) -> Any:
            if not stepping or _run_of_caller(sys._getframe(1)) is None:
                return real(*args, **kwargs)
            return getattr(primitives.random(), name)(*args, **kwargs)

        return draw

    shared = random.random.__self__  # type: ignore[attr-defined]
    return {
        real: _as_method(drawn(name), real)
        for name, real in vars(random).items()
        if getattr(real, "__self__", None) is shared
    }


def _install_seed() -> None:
    from . import primitives

    real = random.Random.seed

    @functools.wraps(real)
    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        if a is None and stepping:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_globals is vars(random):
                frame = frame.f_back
            if frame is not None and _run_of_caller(frame) is not None:
                a = primitives.random().getrandbits(128)
        real(self, a, version)

    random.Random.seed = seed  # type: ignore[method-assign]


def _urandom(real: Any, size: int, /, **kwargs: Any) -> Any:
    if stepping and current_host() is not None and not is_trusted(sys._getframe(1)):
        raise refuse(
            "drawing secret random numbers (os.urandom, secrets, random.SystemRandom)",
            "use `durable.random()` or `durable.uuid4()` for numbers that need not be secret, "
            "`await durable.side_effect(...)` for a value to be remembered, or an activity.",
        )
    return real(size, **kwargs)


# --- uuids -------------------------------------------------------------------------------------------------


def _install_uuid() -> None:
    """uuid4 is often kept where no name of a module leads to it: as the default factory of a field.  It is a function
    of Python's, so that its code can be exchanged where it is."""
    from . import primitives

    for name, ours in (("uuid4", primitives.uuid4), ("uuid7", primitives.uuid7)):
        function = getattr(uuid, name, None)  # uuid7 is there from Python 3.14 on
        if isinstance(function, FunctionType) and not function.__closure__:
            real = FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
            vars(uuid)[f"_dramatiq_durable_{name}"] = _drawn_uuid(real, ours)
            names = (f"_dramatiq_durable_{name}",)
            function.__code__ = _call_of_global.__code__.replace(co_names=names, co_name=name, co_qualname=name)


def _call_of_global() -> Any:
    return _drawn_uuid()  # type: ignore[call-arg]  # another name is put in its place


def _drawn_uuid(real: Callable[[], uuid.UUID], ours: Callable[[], uuid.UUID]) -> Callable[[], uuid.UUID]:
    def draw() -> uuid.UUID:
        if not stepping or _run_of_caller(sys._getframe(2)) is None:
            return real()
        return ours()

    return draw


def _refused_uuids() -> dict[Any, Any]:
    def refused(real: Callable[..., uuid.UUID]) -> Any:
        @functools.wraps(real)
        def refuse_it(*args: Any, **kwargs: Any) -> uuid.UUID:
            if stepping and _run_of_caller(sys._getframe(1)) is not None:
                raise refuse(f"uuid.{real.__name__}()", "use `durable.uuid7()`, which is ordered by time as well.")
            return real(*args, **kwargs)

        return refuse_it

    functions = [getattr(uuid, name) for name in ("uuid1", "uuid6") if hasattr(uuid, name)]
    return {function: refused(function) for function in functions}


# --- blocking ----------------------------------------------------------------------------------------------


def _install_wait() -> None:
    """Events, queues, futures and barriers of threads all wait in ``Condition.wait``."""
    real = threading.Condition.wait

    @functools.wraps(real)
    def wait(self: threading.Condition, timeout: float | None = None) -> bool:
        blocks = timeout is None or timeout > 0
        if blocks and stepping and current_host() is not None and not is_trusted(sys._getframe(1)):
            raise refuse("waiting for another thread", "use `asyncio.Event`, `asyncio.Queue` or `await` an activity.")
        return real(self, timeout)

    threading.Condition.wait = wait  # type: ignore[method-assign]


# --- all of them -------------------------------------------------------------------------------------------


def replacements() -> dict[Any, Any]:
    """Return the functions that are replaced wherever they are known by a name, each with what takes its place."""
    found = {**_clocks(), **_randoms(), **_refused_uuids(), os.urandom: _as_method(_urandom, os.urandom)}
    if hasattr(os, "getrandom"):
        found[os.getrandom] = _as_method(_urandom, os.getrandom)
    return found


def install() -> None:
    """Change in their place the classes that are known by more than their names."""
    if importlib.util.find_spec("_time_machine") is not None:
        # It patches the real functions, whose addresses it takes from where they are when it is first used.
        import _time_machine  # type: ignore[import-not-found]

        getattr(_time_machine, "patch_if_needed", lambda: None)()
    _install_datetime()
    _install_seed()
    _install_uuid()
    _install_wait()
