"""The demo's other processes, as a user would start them, and its handling of Ctrl-C: nothing outlives the demo."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).parent.parent.parent


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into a KeyboardInterrupt, but not in the middle of what has to be whole."""

    def __init__(self) -> None:
        self._deferred = 0
        self._pending = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._interrupted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._deferred:
            self._pending = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold interrupts back until the end of the block."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self._pending and not self._deferred:
            self._pending = False
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """From here on things are being cleared up: do not interrupt that."""
        self._deferred += 1


class Command:
    """A command in a process group of its own, which Ctrl-C in the terminal does not reach: `stop` ends all of it.

    Parameters:
      arguments: the command.
      env: its whole environment.
      log(Path): where its output goes, behind what is there.
      interrupts(Interrupts): a process that was begun is also known to us, or Ctrl-C would leave it behind.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], log: Path, interrupts: Interrupts) -> None:
        self._arguments = arguments
        self._env = env
        self._log = log
        self._interrupts = interrupts
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        with self._interrupts.deferred(), self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments,
                cwd=ROOT,
                env=dict(self._env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._process.poll() if self._process is not None else None

    def owns(self, pid: int) -> bool:
        """Whether a process is one of its group."""
        with contextlib.suppress(ProcessLookupError):
            return self._process is not None and os.getpgid(pid) == self._process.pid
        return False

    def stop(self, timeout: float = 15) -> None:
        """Ask it to end, wait at most so many seconds, and end what is left of its group."""
        process = self._process
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        self._kill()
        process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Start it anew, as whatever keeps a service running would."""
        self._kill()
        self.start()
