"""What the importer asks of another broker."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from uuid import UUID

from ..errors import NotConfigured

#: The most bytes of payloads that are stored in one transaction, but for its last message.
MAX_BYTES = 32 * 1024 * 1024

#: Where a queue's messages are: ready to be taken, delayed until later, or dead letters.
Place = Literal["ready", "delayed", "dead"]


@dataclass(slots=True)
class Found:
    """A message at its source.

    Attributes:
      handle: what the source knows it by.
      payload(bytes | None): its bytes; None where the source has lost them.
      died_at(int | None): when it became a dead letter, in milliseconds since 1970.
    """

    handle: Any
    payload: bytes | None
    died_at: int | None = None


@dataclass(slots=True)
class Counts:
    """How many messages a queue has at its source.

    Attributes:
      ready, delayed, dead(int): in each of its places.
      in_flight(int | None): in the hands of workers; None where nobody can tell.
      readers(int): how many workers are known to read it.
    """

    ready: int = 0
    delayed: int = 0
    dead: int = 0
    in_flight: int | None = 0
    readers: int = 0


class Box(AbstractContextManager["Box"], Protocol):
    """One place of one queue.  What was taken and not settled when it is closed, and what was left, is put back."""

    def take(self, limit: int) -> list[Found]:
        """The next messages; none means that it is empty.

        While they are in our hands nobody else gets them, and when we die the next import finds them again.
        """

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        """Some were stored here: they are gone from the source when this returns.  Some cannot be: they stay there."""


class Source(Protocol):
    """Another broker.

    Attributes:
      title(str): what it is called in messages.
      lists(bool): whether it can list its queues; one that is empty is then unknown to it.
    """

    title: str
    lists: bool

    def identity(self) -> UUID:
        """What tells it from any other, however it is addressed: an import that was cut short goes on under it."""

    def queues(self, candidates: Sequence[str]) -> list[str]:
        """The queues that it has; where it cannot list them, those of the candidates that it has."""

    def count(self, queue: str) -> Counts: ...

    def open(self, queue: str, place: Place) -> Box: ...

    def close(self) -> None: ...


def library(name: str) -> Any:
    """A client library.

    Raises:
      NotConfigured: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise NotConfigured(
            f"the package {name!r} is needed for this and is not installed: pip install 'dramatiq-durable[import]'"
        ) from e


def check_scheme(url: str, title: str, schemes: Sequence[str], example: str) -> None:
    """Raises NotConfigured for the URL of something else."""
    if url.partition("://")[0] not in schemes or "://" not in url:
        raise NotConfigured(
            f"the URL of {title} begins with {' or '.join(f'{s}://' for s in schemes)}: for example {example}"
        )
