"""The terminal: keys as they are pressed, a screen of its own, and everything as it was in the end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from io import StringIO
from types import FrameType, TracebackType
from typing import Any

#: A screen of its own, without a cursor; and back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"

#: For how many seconds the rest of a key may be under way.
PATIENCE = 0.05

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_KEYS = {
    b"A": "up", b"B": "down", b"C": "right", b"D": "left", b"H": "home", b"F": "end", b"Z": "back",
    b"1~": "home", b"4~": "end", b"5~": "page up", b"6~": "page down", b"7~": "home", b"8~": "end",
}  # fmt: skip
_PLAIN = {"\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "delete", "\x08": "delete", "\x15": "clear", "\x04": "q"}


class Terminal:
    """The terminal of this process, while it is entered.

    It is given back as it was however that ends, also where the process is suspended meanwhile.  Signals raise nothing:
    whoever waits for keys is woken, and looks at ``ended``.

    Attributes:
      ended(bool): it is to end: a signal came, or the terminal has gone.
    """

    def __init__(self) -> None:
        self.ended = False
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._wake, self._woken = -1, -1
        self._handlers: dict[int, Any] = {}
        self._before: list[Any] = []
        self._wakeup = -1
        self._suspended = False
        self._rest = b""

    def __enter__(self) -> Terminal:
        self._before = termios.tcgetattr(self._in)
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (*ENDS, signal.SIGTSTP, signal.SIGWINCH):
            self._handlers[number] = signal.signal(number, self._signalled)
        try:
            self._take()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._give_back()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            ends, self._wake, self._woken = (self._wake, self._woken), -1, -1
            for end in ends:
                os.close(end)

    def _take(self) -> None:
        tty.setcbreak(self._in, termios.TCSADRAIN)
        self._write(ENTER)

    def _give_back(self) -> None:
        try:
            self._write(LEAVE)
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)
        except (OSError, termios.error):  # it has gone
            self.ended = True

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if number in ENDS:
            self.ended = True
        elif number == signal.SIGTSTP:
            self._suspended = True

    def _suspend(self) -> None:
        """Stop, as Ctrl-Z asks for; go on where the process does."""
        self._suspended = False
        self._give_back()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self._take()

    @property
    def size(self) -> tuple[int, int]:
        """(columns, lines)."""
        try:
            columns, lines = os.get_terminal_size(self._out)
        except OSError:
            self.ended = True
            return 80, 24
        return columns or 80, lines or 24

    def wake(self) -> None:
        """Have `keys` return.  From any thread."""
        # Full: it is awake; closed: nobody waits.
        with contextlib.suppress(OSError):
            os.write(self._wake, b"\0")

    def keys(self, timeout: float) -> list[str]:
        """Wait until a key is pressed, a signal comes, `wake` is called or so many seconds are over."""
        try:
            ready, _, _ = select.select([self._in, self._woken], [], [], timeout)
        except InterruptedError:
            ready = []
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        if self._suspended:
            self._suspend()
        return self._read() if self._in in ready and not self.ended else []

    def _read(self) -> list[str]:
        data = self._more()
        keys, self._rest = parse(self._rest + data)
        # The rest of a key comes at once, or never.
        while self._rest and not self.ended and select.select([self._in], [], [], PATIENCE)[0]:
            more, self._rest = parse(self._rest + self._more())
            keys += more
        if self._rest:
            keys, self._rest = [*keys, *(["escape"] if self._rest.startswith(b"\x1b") else [])], b""
        return keys

    def _more(self) -> bytes:
        try:
            data = os.read(self._in, 1024)
        except OSError:
            data = b""
        self.ended = self.ended or not data
        return data

    def show(self, lines: Sequence[Any]) -> None:
        """Show these lines (of rich), and nothing else."""
        width, height = self.size
        out = "\r\n".join(f"{line}\x1b[0m\x1b[K" for line in rendered(lines[:height], width))
        try:
            self._write(f"\x1b[H{out}\x1b[J")
        except OSError:
            self.ended = True

    def _write(self, text: str) -> None:
        data = text.encode(sys.stdout.encoding or "utf-8", "replace")
        while data:
            data = data[os.write(self._out, data) :]


def rendered(lines: Sequence[Any], width: int) -> list[str]:
    """Lines of rich with what makes them look as they should in this terminal."""
    from rich.console import Console

    file = StringIO()
    console = Console(file=file, force_terminal=True, width=width, highlight=False, legacy_windows=False)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop", crop=True, soft_wrap=False)
    return file.getvalue().split("\n")[: len(lines)]


def parse(data: bytes) -> tuple[list[str], bytes]:
    """What was pressed, and what may be the beginning of a key.  A character stands for itself."""
    keys: list[str] = []
    while data:
        if data[:1] == b"\x1b":
            if data[1:2] not in (b"[", b"O"):
                if len(data) == 1:
                    return keys, data
                keys.append("escape")
                data = data[1:]
                continue
            end = next((n for n in range(2, len(data)) if 0x40 <= data[n] <= 0x7E), None)
            if end is None:
                return keys, data
            key = _KEYS.get(data[2 : end + 1])
            if key is not None:
                keys.append(key)
            data = data[end + 1 :]
            continue
        size = 1 if data[0] < 0xC0 else 2 if data[0] < 0xE0 else 3 if data[0] < 0xF0 else 4
        if len(data) < size:
            return keys, data
        character = data[:size].decode("utf-8", "ignore")
        data = data[size:]
        if character in _PLAIN or (character.isprintable() and character):
            keys.append(_PLAIN.get(character, character))
    return keys, b""
