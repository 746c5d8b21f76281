"""`dramatiq-durable top` in a terminal of its own: keys go in, frames come out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping

from dramatiq_durable.cli.top.terminal import ENTER, LEAVE
from tests.support import ROOT, wait_until

#: Takes the terminal, so that its keys and its size make signals, and becomes the program.
_TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"

#: As a shell does: it has the terminal, gives it to the program, and lets that go on once it was stopped.
_SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if not child:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    os.execv(sys.executable, sys.argv[1:])
while True:
    _, status = os.waitpid(child, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpid())
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    print("stopped, by lines:", termios.tcgetattr(0)[3] & termios.ICANON > 0, flush=True)
    os.tcsetpgrp(0, child)
    os.kill(child, signal.SIGCONT)
"""

_LOOKS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Screen:
    """A program in a terminal."""

    def __init__(
        self,
        *command: str,
        width: int = 200,
        height: int = 50,
        shell: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(self.theirs)
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("DRAMATIQ_", "PG", "COLUMNS", "LINES"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SHELL if shell else _TAKE, sys.executable, *command],
            cwd=ROOT,
            env={**ours, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **(environment or {})},
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
        )
        self._data = b""
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._ended.is_set():
            if select.select([self.ours], [], [], 0.05)[0]:
                self._data += os.read(self.ours, 65536)

    @property
    def output(self) -> str:
        return self._data.decode("utf-8", "replace")

    @property
    def frame(self) -> list[str]:
        """The lines of the last whole frame."""
        parts = self.output.split("\x1b[H")
        whole = next((part for part in reversed(parts[1:]) if "\x1b[J" in part), "")
        return [_LOOKS.sub("", line).rstrip() for line in whole.partition("\x1b[J")[0].split("\r\n")]

    @property
    def text(self) -> str:
        return "\n".join(self.frame)

    def shows(self, *texts: str, timeout: float = 40) -> str:
        """Wait until all of these are in one frame."""
        found: list[str] = []

        def seen() -> bool:
            shown = self.text
            found[:] = [shown]
            return all(text in shown for text in texts)

        try:
            wait_until(seen, timeout=timeout)
        except AssertionError:
            raise AssertionError(f"{texts} was not shown, but\n{found[0]}\nof {self.output[-2000:]!r}") from None
        return found[0]

    def line(self, text: str) -> str:
        """The line that has this in it."""
        return next((line for line in self.frame if text in line), "")

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(30)

    def is_as_before(self) -> bool:
        """Whether the terminal is as it was: its settings, its screen and its cursor."""
        entered, left = self.output.count(ENTER), self.output.count(LEAVE)
        return termios.tcgetattr(self.theirs) == self.before and entered == left == 1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._ended.set()
        self._reader.join()
        os.close(self.ours)
        os.close(self.theirs)
