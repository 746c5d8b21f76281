"""Real processes for tests: output is captured as it comes, and nothing outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from . import ROOT

#: Chooses that brokers get logins with grants; see `tests.support.scoped`.
SCOPED = "DRAMATIQ_DURABLE_TEST_SCOPED"


def scoped_environment() -> dict[str, str]:
    """What makes the brokers of a process scoped, where those of the test are."""
    if os.environ.get(SCOPED) != "on":
        return {}
    site = Path(__file__).parent / "scoped_site"
    return {SCOPED: "on", "PYTHONPATH": os.pathsep.join([os.fspath(site), os.fspath(ROOT)])}


class Process:
    """A program under test, in a session of its own.

    Attributes:
      pid(int): of the program; its children are in the same process group.
    """

    def __init__(self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DRAMATIQ_", "PG", "dramatiq_"))}
        self._process = subprocess.Popen(
            [os.fspath(part) for part in command],
            cwd=cwd or ROOT,
            env={
                **inherited,
                # As in an activated environment: a worker that reloads itself looks for its Python there.
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
                "PYTHONPATH": os.fspath(ROOT),
                **scoped_environment(),
                "PYTHONUNBUFFERED": "1",
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._output: list[str] = []
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._more:
                self._output.append(line)
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    @property
    def output(self) -> str:
        """Everything it has printed so far, to either stream."""
        with self._more:
            return "".join(self._output)

    def wait_for(self, text: str, *, timeout: float = 30, count: int = 1) -> str:
        """Wait until ``text`` was printed on ``count`` lines, and return the last of these lines.

        Raises:
          AssertionError: the program ended first, or the time (seconds) is over; the message has its output.
        """
        deadline = time.monotonic() + timeout
        with self._more:
            while True:
                lines = [line for line in self._output if text in line]
                if len(lines) >= count:
                    return lines[count - 1].rstrip("\n")
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "ended" if self._ended else f"ran for {timeout} s"
                    raise AssertionError(f"{self._process.args} {why} without {text!r}:\n{''.join(self._output)}")
                self._more.wait(left)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the program, or to all of its process group."""
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self.pid, number)
            else:
                self._process.send_signal(number)

    def kill(self) -> None:
        """End it and its children by SIGKILL, and wait for it: what a crash looks like."""
        self.signal(signal.SIGKILL, group=True)
        self.wait()

    def stop(self, *, timeout: float = 30) -> int:
        """Ask it to end (SIGTERM), wait, and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout=timeout)

    def wait(self, *, timeout: float = 30) -> int:
        """Wait for its end and return its exit code; negative is the signal that ended it."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._process.args} still runs after {timeout} s:\n{self.output}") from None
        self._reader.join(1)
        return code

    def close(self) -> None:
        """Leave nothing of it behind."""
        self.signal(signal.SIGKILL, group=True)
        self._process.wait()
        self._reader.join(5)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


class Processes:
    """Starts programs; called like a function.  The fixture ``run_process`` is one of these."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def __call__(self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
        """Start ``command`` in ``cwd`` (default: the repository), with ``env`` added to a clean environment."""
        process = Process(*command, env=env, cwd=cwd)
        self._started.append(process)
        return process

    def python(self, code: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Process:
        """Start a Python program given as text."""
        return self(sys.executable, "-c", code, *arguments, env=env)

    def dramatiq(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
        """Start a worker: ``dramatiq`` with ``arguments``."""
        return self(sys.executable, "-m", "dramatiq", *arguments, env=env, cwd=cwd)

    def close(self) -> None:
        for process in self._started:
            process.close()
