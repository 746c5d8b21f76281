"""What a run knows about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

#: From here on a run is advised to continue as new: replaying it costs more and more.
SUGGESTED_LENGTH = 10_000
SUGGESTED_BYTES = 16 * 1024 * 1024


#: What the first event says of the run beside its input: attributes of `Info`.
START_FACTS = ("memo", "headers", "attempt")

#: And what it says of the state that the run begins with: see `state`.
STATE_FACTS = ("search", "entity", "outputs")


@dataclass(slots=True, frozen=True)
class Parent:
    """The run that started this one as its child."""

    workflow_id: str
    run_id: str


@dataclass(slots=True)
class Info:
    """What a run knows about itself.

    Attributes:
      attempt(int): which attempt of the workflow this run is, counted from 1.
      started_at(datetime | None): UTC; the time of the first event where the caller gives none.
      parent(Parent | None): the ids of the run that started this one, or its chain, as a child; they stay when that run
        is reset.
      memo(dict), headers(dict): as given at the start.
      search(dict): the search attributes as they are now.
      history_length(int): events so far; ``history_bytes(int)``: bytes of their payloads.
      continue_as_new_suggested(bool): the history has grown long.
    """

    workflow_id: str
    run_id: str
    name: str
    queue_name: str = "default"
    attempt: int = 1
    started_at: datetime | None = None
    parent: Parent | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, Any] = field(default_factory=dict)
    history_length: int = 0
    history_bytes: int = 0
    continue_as_new_suggested: bool = False
