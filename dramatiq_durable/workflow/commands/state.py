"""What a run lets others see: search attributes, its entity, topics, output.  Recorded, and answered at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from .. import events
from .base import Call, Command, CommandHost

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class UpsertSearch(Command):
    """Set search attributes: ``search``, as JSON has them; None removes one."""

    event_type: ClassVar[str] = events.SEARCH_UPSERTED
    search: dict[str, Any] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        return {"hash": self.hash, "search": self.search}


@dataclass(slots=True, eq=False)
class ChangeEntity(Command):
    """Change the entity; ``name`` is what the code called.

    Attributes:
      op(str): what that means for the document: put, merge, append, prepend (a ``value``), or drop.
      path(tuple): where.
    """

    event_type: ClassVar[str] = events.ENTITY_CHANGED
    op: str = "put"
    path: tuple[str, ...] = ()
    value: Any = None

    def attributes(self) -> dict[str, Any]:
        change = {"hash": self.hash, "op": self.op, "path": list(self.path)}
        return change if self.op == "drop" else {**change, "value": self.value}


@dataclass(slots=True, eq=False)
class EmitTopic(Command):
    """Give the payload to everybody who is subscribed to the topic ``name``."""

    event_type: ClassVar[str] = events.TOPIC_EMITTED

    def attributes(self) -> dict[str, Any]:
        return {"hash": self.hash}


@dataclass(slots=True, eq=False)
class WriteOutput(Command):
    """Append the payload to the run's output, at ``offset``."""

    event_type: ClassVar[str] = events.OUTPUT_WRITTEN
    offset: int = 0

    def attributes(self) -> dict[str, Any]:
        return {"hash": self.hash, "offset": self.offset}


class Answered(Call[T]):
    """The answer of something that needs no waiting for, to be awaited like all the others."""

    __slots__ = ()

    def __init__(self, host: CommandHost, command: Command, answer: T) -> None:
        super().__init__(host, command, "abandon")
        self.set_result(answer)
