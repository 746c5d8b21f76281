"""Patches: which version of the code a run follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import events
from .base import Command


@dataclass(slots=True, eq=False)
class RecordPatch(Command):
    """The run follows the code behind ``patched(name)``.

    It has no number: code that no longer asks (``deprecate_patch``) numbers its other commands alike.
    """

    event_type: ClassVar[str] = events.PATCH_RECORDED
