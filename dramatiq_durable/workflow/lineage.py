"""What a run derives from its own id: its random numbers, and the ids of its children.

A run that was taken up again by a reset has the beginning of another: up to there it derives what that one did.
"""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime
from typing import Any

from . import events


class Lineage:
    """Whose numbers a run follows.

    Attributes:
      run_id(str): the run that everything is derived from, at this point of the history.
      started_at(datetime | None): when that run was started, where it is another one.
    """

    __slots__ = ("_later", "run_id", "started_at")

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.started_at: datetime | None = None
        self._later = False

    def begin(self, facts: dict[str, Any]) -> None:
        """Take in the facts of a run's first event."""
        origin = facts.get("origin")
        if origin is not None:
            self.run_id = str(origin["run_id"])
            self.started_at = datetime.fromtimestamp(origin["started_at"] / 1000, UTC)
        self._later = "previous" in facts

    def reset(self, run_id: str) -> None:
        """From here on the run goes its own way."""
        self.run_id = run_id
        self._later = True

    def seed(self, name: str) -> int:
        """The seed of one of the run's sequences of random numbers."""
        return int.from_bytes(hashlib.blake2b(f"{name}:{self.run_id}".encode(), digest_size=16).digest(), "big")

    def child_ids(self, workflow_id: str, seq: int) -> tuple[str, str]:
        """Return the default workflow id and the run id of the child that command ``seq`` starts.

        Runs that follow each other have one workflow id, and each its own children, of which earlier ones may live on.
        """
        child = f"{workflow_id}.{self.run_id[:8]}.{seq}" if self._later else f"{workflow_id}.{seq}"
        if len(child) > 200:  # deep families: keep to the cap on ids, and unique
            tail = hashlib.blake2b(child.encode(), digest_size=8).hexdigest()
            child = f"{child[:183]}~{tail}"
        return child, str(uuid.UUID(bytes=events.command_id(self.run_id, seq)))
