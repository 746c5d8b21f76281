"""The supervisor of an embedded Postgres: it waits for the last user to be gone, and stops the server.

Run as a plain script by whoever starts the server, so that it costs little: the standard library only.  What it shares
with `embedded`, which describes the locks, is here too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Seconds without any user after which the supervisor stops the server: one command after another finds it warm.
GRACE = 1.0
#: Seconds that stopping may take, in order and then by force.
STOP_TIMEOUT = 30

PORT = 5432  # names the socket's file; nothing listens on the network


def lock(path: Path, how: int) -> int | None:
    """Return a descriptor that holds the flock ``how`` on ``path``; None if ``LOCK_NB`` found it taken.

    The descriptor is not inherited by programs this process starts.  It is let go by closing it, never by LOCK_UN,
    which would let go for every process that inherited it by a fork.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int]:
    descriptor = lock(path, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Postmaster:
    pid: int
    socket_directory: Path | None
    ready: bool


def postmaster(data: Path) -> Postmaster | None:
    """Return the live server of ``data`` as its pid file tells, or None.

    After a crash the file can name a process of somebody else, which must neither be taken for the server nor be
    signalled: where /proc tells, the process has to have our data directory on its command line.
    """
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid = int(lines[0])
        os.kill(pid, 0)
        if Path("/proc/self/cmdline").exists() and os.fsencode(data) not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
    except (FileNotFoundError, ProcessLookupError, PermissionError, IndexError, ValueError):
        return None
    sockets = Path(lines[4]) if len(lines) > 4 and lines[4] else None
    return Postmaster(pid, sockets, len(lines) > 7 and lines[7].strip() == "ready")


def stop(data: Path) -> None:
    """Stop the server of ``data``, if it runs: fast, and when that takes too long, as in a crash.

    By signals: this works even when the binaries have been uninstalled while the server ran.
    """
    server = postmaster(data)
    if server is None:
        return
    for number in (signal.SIGINT, signal.SIGQUIT):
        deadline = time.monotonic() + STOP_TIMEOUT
        if postmaster(data) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, number)
        while postmaster(data) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
    if server.socket_directory is not None:
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (server.socket_directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            server.socket_directory.rmdir()


def supervise(directory: Path, supervisor: int) -> None:
    """Wait for the last user to be gone, stop the server, and return.  ``supervisor`` holds ``supervisor.lock``."""
    while True:
        with exclusive(directory / "users.lock"):
            pass
        time.sleep(GRACE)  # with the lock let go, so that a new user need not wait
        users = lock(directory / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        if users is not None:
            break
    stop(directory / "data")
    os.close(supervisor)
    os.close(users)


def main() -> None:
    """``supervisor.py DIRECTORY LOCK``: the instance directory, and the descriptor that holds ``supervisor.lock``."""
    # Our end is the users' end: whoever ends us ends them.  Before the fork, so that there is no moment without.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:  # a child of init's, so that nobody has to wait for it
        supervise(Path(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
