"""Keeps workflow code to what can be replayed: it refuses I/O, threads, processes and blocking calls.

Clocks and random numbers are not refused but made durable: see ``substitutes``.

One audit hook for the process, and a few functions that are replaced, all of it with the first workflow.  They look
at a thread only while that thread is stepping a run; everywhere else a replaced function costs one look at an empty
dictionary, and an audited call one dictionary look-up.
"""

from __future__ import annotations

import _thread
import sys
import threading
import time
from types import FrameType, MethodType
from typing import Any

from . import several, structured, substitutes
from .deadlock import stepping
from .loop import current_host
from .substitutes import is_trusted, refuse

_ACTIVITY = "make it an activity and call it with `await activity.execute(...)`."
_SLEEP = "use `await asyncio.sleep(...)` or `await durable.sleep(...)`, which survive a restart."

_REFUSED: dict[str, tuple[str, str]] = {
    "time.sleep": ("time.sleep()", _SLEEP),
    "open": ("opening a file", _ACTIVITY),
    "builtins.input": ("input()", "wait for a signal: `await durable.wait_for_signal(...)`."),
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
            "http.client.send",
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

#: Functions that this Python does not audit yet, with the audit event that later versions raise.
_SILENT: list[tuple[Any, str]] = [
    (function, event)
    for function, event, audited_since in (
        (time.sleep, "time.sleep", (3, 13)),
        (_thread.start_new_thread, "_thread.start_new_thread", (3, 12)),
    )
    if sys.version_info < audited_since
]

_lock = threading.Lock()
_installed = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    refused = _REFUSED.get(event)
    if refused is not None and stepping and current_host() is not None:
        _check(refused, sys._getframe(1))


def _check(refused: tuple[str, str], frame: FrameType | None) -> None:
    if not is_trusted(frame):
        raise refuse(*refused)


def _guarded(event: str) -> Any:
    refused = _REFUSED[event]

    def guarded(real: Any, *args: Any, **kwargs: Any) -> Any:
        if stepping and current_host() is not None:
            _check(refused, sys._getframe(1))
        return real(*args, **kwargs)

    return guarded


def install() -> None:
    """Install the guard in this process; the first call does it, the others are free."""
    if not _installed:
        with _lock:
            _install()


def _install() -> None:
    global _installed
    if _installed:
        return
    structured.install()
    substitutes.install()
    instead = {**several.replacements(), **substitutes.replacements()}
    for function, event in _SILENT:
        instead[function] = MethodType(_guarded(event), function)
    _replace(instead)
    sys.addaudithook(_audit)
    _installed = True


def _replace(instead: dict[Any, Any]) -> None:
    """Replace functions wherever they were imported so far: `from time import sleep` made a name in another module."""
    by_id = {id(real): (real, ours) for real, ours in instead.items()}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            found = by_id.get(id(value))
            if found is not None and found[0] is value:
                names[name] = found[1]
