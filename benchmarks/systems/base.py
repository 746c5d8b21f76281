"""What a player asks of a system, and the actor that is the same in all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any

#: The bytes of a message as Dramatiq's encoder makes it.
PAYLOAD = 190

#: When each message was started, in nanoseconds of the machine's monotonic clock, which all processes share.
started: list[int] = []

#: How long after their moment messages with a moment were started, in nanoseconds.
late: list[int] = []

note_start, note_late = started.append, late.append


def receive(text: str) -> None:
    """The actor: nothing but a look at the clock, so that what is measured is the machinery around it."""
    now = monotonic_ns()
    if text[0] == "@":
        note_late(now - int(text[1:21]))
    else:
        note_start(now)


def with_moment(moment: int, size: int) -> str:
    """A message's text that carries a moment, and is as long as the others."""
    return f"@{moment:020d}".ljust(size, "x")


class System:
    """A product, as one process uses it.

    Parameters:
      url(str): its server.
      streams(int): how many queues the worker consumes; the messages are on the first.
    """

    def __init__(self, url: str, streams: int) -> None:
        self.url = url
        self.streams = streams

    def prepare(self) -> None:
        """Make what has to be there once, in an empty database."""

    def send(self, text: str) -> None:
        raise NotImplementedError

    def send_each(self, texts: Sequence[str]) -> None:
        """Send one after the other, each committed before the next."""
        for text in texts:
            self.send(text)

    def send_many(self, texts: Sequence[str]) -> None:
        """Send as the product's bulk operation does, if it has one."""
        self.send_each(texts)

    def start(self, threads: int) -> None:
        """Begin to work."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the work, once everything that was started is acknowledged."""

    def counts(self) -> dict[str, Any]:
        """What the product counts by itself."""
        return {}


def option(name: str, default: str) -> str:
    """A setting of the contender, from its environment."""
    return os.environ.get(f"BENCHMARK_{name}", default)
