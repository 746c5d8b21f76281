"""Which version of the code a run follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .commands import Command, RecordPatch
from .events import Event

if TYPE_CHECKING:
    from .replay import Execution


class Patches:
    """What a run said to ``patched(name)``: what was once said is said again, wherever the code asks.

    Attributes:
      recorded(set): names that the history to be replayed has.
    """

    __slots__ = ("_deprecated", "_execution", "_known", "recorded")

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._known: dict[str, bool] = {}
        self._deprecated: set[str] = set()
        self.recorded: set[str] = set()

    def follows(self, name: str) -> bool:
        """Whether the run follows the code behind this patch."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = not self._execution.is_replaying or name in self.recorded
            if known:
                self._execution.note(name, RecordPatch(name=name))
        return known

    def deprecate(self, name: str) -> None:
        """Runs that recorded this patch and runs that did not follow the same code from here on."""
        self._deprecated.add(name)

    def are_behind(self, event: Event, asked: list[Command]) -> bool:
        """Whether a recorded patch is one that the code takes for granted by now."""
        asks = bool(asked) and isinstance(asked[0], RecordPatch) and asked[0].name == event.name
        return event.name in self._deprecated and not asks
