"""What the demo shows while it runs: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, fields
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

#: Seconds between two lines where there is no terminal.
LINE_EVERY = 2.0


@dataclass(frozen=True, slots=True)
class Phases:
    """How many orders have come how far; ``waiting`` is how many wait for an approval at this moment."""

    started: int = 0
    charged: int = 0
    waiting: int = 0
    shipped: int = 0
    closed: int = 0


class Display:
    """Shows phases and events; a context manager.

    Parameters:
      console(Console): where to.
      totals(Phases): what each phase comes to in the end.
    """

    def __init__(self, console: Console, totals: Phases) -> None:
        self.console = console
        self._began = time.monotonic()
        self._next_line = 0.0
        self._last = Phases()
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:>22}"), BarColumn(50), MofNCompleteColumn(), console=console
            )
            names = ("started", "charged", "waiting for approval", "shipped", "closed")
            for field, name, total in zip(fields(Phases), names, astuple(totals), strict=True):
                self._bars[field.name] = self._progress.add_task(name, total=total)

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def event(self, text: str) -> None:
        """Say what has happened, on a line that stays."""
        self.console.print(
            f"{time.monotonic() - self._began:6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )

    def update(self, phases: Phases) -> None:
        """Show how things stand."""
        if self._progress is not None:
            for name, bar in self._bars.items():
                self._progress.update(bar, completed=getattr(phases, name))
        elif phases != self._last and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            self._last = phases
            self.event(
                f"{phases.started} started, {phases.charged} charged, {phases.waiting} waiting for approval, "
                f"{phases.shipped} shipped, {phases.closed} closed"
            )
