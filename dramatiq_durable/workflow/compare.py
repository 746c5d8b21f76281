"""What the code asks for, held against what history says."""

from __future__ import annotations

from ..errors import Nondeterminism
from . import events
from .commands import Command, FailWorkflow, StartChild
from .events import Event


def describe(command: Command) -> str:
    """Name a command to people."""
    text = events.describe(command.event_type, command.name)
    if isinstance(command, FailWorkflow):
        text += f" ({command.failure.get('type')}: {command.failure.get('message')})"
    return text


def compare(event: Event, command: Command) -> None:
    """Compare a command with the event that recorded it.

    Raises:
      Nondeterminism: they differ.
    """
    facts = event.attributes or {}
    if event.type != command.event_type or event.name != command.name:
        raise Nondeterminism(event.event_id, events.describe(event.type, event.name), describe(command))
    text = describe(command)
    if event.seq != command.seq:
        raise Nondeterminism(event.event_id, f"{text} as command {event.seq}", f"{text} as command {command.seq}")
    if command.hash is not None and facts.get("hash") != command.hash:
        raise Nondeterminism(
            event.event_id, f"{text} with arguments {facts.get('hash')}", f"{text} with arguments {command.hash}"
        )
    if isinstance(command, StartChild) and facts.get("workflow_id", command.workflow_id) != command.workflow_id:
        raise Nondeterminism(
            event.event_id,
            f"{text} with the id {facts['workflow_id']!r}",
            f"{text} with the id {command.workflow_id!r}",
        )
