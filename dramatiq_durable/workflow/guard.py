"""Refuses, while workflow code runs, what cannot be replayed: I/O, threads, processes and blocking calls.

One audit hook for the process, installed with the first run.  It looks at a thread only while that thread is stepping a
run; everywhere else it costs one dictionary look-up for each audited call.
"""

from __future__ import annotations

import _thread
import functools
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import ForbiddenInWorkflow
from .loop import WorkflowLoop, current_host, is_collecting

_ACTIVITY = "make it an activity and call it with `await activity.execute(...)`."
_SLEEP = "use `await asyncio.sleep(...)` or `await durable.sleep(...)`, which survive a restart."

_REFUSED: dict[str, tuple[str, str]] = {
    "time.sleep": ("time.sleep()", _SLEEP),
    "open": ("opening a file", _ACTIVITY),
    "sqlite3.connect": ("a database connection", _ACTIVITY),
    **dict.fromkeys(
        ("_thread.start_new_thread", "_thread.start_joinable_thread"),
        ("starting a thread", "use `asyncio.create_task(...)`, or " + _ACTIVITY),
    ),
    **dict.fromkeys(
        (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.fork",
            "os.forkpty",
            "os.posix_spawn",
            "os.spawn",
            "os.startfile",
            "pty.spawn",
        ),
        ("starting a process", _ACTIVITY),
    ),
    **dict.fromkeys(
        (
            "socket.__new__",
            "socket.connect",
            "socket.bind",
            "socket.sendto",
            "socket.sendmsg",
            "socket.getaddrinfo",
            "socket.getnameinfo",
            "socket.gethostbyname",
            "socket.gethostbyaddr",
            "http.client.connect",
            "urllib.Request",
            "ftplib.connect",
            "smtplib.connect",
            "imaplib.open",
            "poplib.connect",
        ),
        ("network I/O", _ACTIVITY),
    ),
    **dict.fromkeys(
        (
            "os.listdir",
            "os.scandir",
            "os.mkdir",
            "os.remove",
            "os.rename",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
            "os.chmod",
            "os.chown",
            "os.utime",
            "tempfile.mkstemp",
            "tempfile.mkdtemp",
            "glob.glob",
        ),
        ("touching the file system", _ACTIVITY),
    ),
}

#: Packages that may read or write behind the code's back: imports, tracebacks, log handlers, time zones, debuggers.
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
    }
)
_TOP = WorkflowLoop.drain.__code__

#: Functions that this Python does not audit yet, with the audit event that later versions raise.
_SILENT: list[tuple[Any, str, str]] = [
    (module, name, event)
    for module, name, event, audited_since in (
        (time, "sleep", "time.sleep", (3, 13)),
        (_thread, "start_new_thread", "_thread.start_new_thread", (3, 12)),
    )
    if sys.version_info < audited_since
]

_lock = threading.Lock()
_installed = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    refused = _REFUSED.get(event)
    if refused is None or current_host() is None:
        return
    _check(refused, sys._getframe(1))


def _check(refused: tuple[str, str], frame: FrameType | None) -> None:
    if is_collecting():
        return  # the finalizer of an object that only happens to be collected now
    while frame is not None and frame.f_code is not _TOP:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _TRUSTED:
            return
        frame = frame.f_back
    what, instead = refused
    raise ForbiddenInWorkflow(f"{what} cannot be replayed, and is refused inside a workflow: {instead}")


def install() -> None:
    """Install the guard in this process; the first call does it, the others are free."""
    if not _installed:
        with _lock:
            _install()


def _install() -> None:
    global _installed
    if _installed:
        return
    for module, name, event in _SILENT:
        _guard_function(getattr(module, name), event)
    sys.addaudithook(_audit)
    _installed = True


def _guard_function(real: Callable[..., Any], event: str) -> None:
    """Replace a function that is not audited, wherever it was imported so far, by one that looks first."""

    @functools.wraps(real)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if current_host() is not None:
            _check(_REFUSED[event], sys._getframe(1))
        return real(*args, **kwargs)

    for module in list(sys.modules.values()):  # `from time import sleep` made names in other modules
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            for name in [name for name, value in list(names.items()) if value is real]:
                names[name] = guarded
