"""What an attempt of a run has from the one before it."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from datetime import UTC
from typing import TYPE_CHECKING, Any

from . import events
from .events import Event
from .info import Info

if TYPE_CHECKING:
    from .answering import Answerer
    from .definition import Workflow

logger = logging.getLogger(__name__)


def left_unread(answerer: Answerer, workflow: Workflow[Any, Any], info: Info, start: Event) -> list[Event]:
    """The signals that the attempt before left unread, if its time was over.

    The database, which ended it, cannot know: its code is asked, as it was then.

    Parameters:
      info(Info), start(Event): of the run that has not taken its first step.
    """
    run_id, facts = info.run_id, start.attributes or {}
    while facts.get("attempt", 1) != 1:
        before = str(facts.get("previous"))
        # Nothing else that a run may be started with is believed.
        if events.command_id(before, "next") != uuid.UUID(run_id).bytes:
            return []
        row, history = answerer.as_worker(lambda conn, _, before=before: _look(answerer, conn, before))
        if row is None or row[4] != "timed_out":
            return []
        if len(history) > 2:
            info = dataclasses.replace(info, run_id=before, started_at=row[5].astimezone(UTC))
            return _unread(answerer, workflow, info, history)
        # It was over before its first step.
        run_id, facts = before, history[0].attributes or {}
    return []


def _look(answerer: Answerer, conn: Any, run_id: str) -> tuple[Any, list[Event]]:
    procedures, key = answerer.broker.procedures, uuid.UUID(run_id).bytes
    row = procedures.get_run(conn, key, None)
    ended = row is not None and row[4] == "timed_out"
    return row, procedures.get_history(conn, key) if ended else []


def _unread(answerer: Answerer, workflow: Workflow[Any, Any], info: Info, history: list[Event]) -> list[Event]:
    try:
        execution = answerer.bring_back(workflow, info, history)
    except Exception as e:
        logger.warning(
            "what the run %s had not read when its time was over is not known, nor given to the next attempt: %s: %s",
            info.run_id,
            type(e).__name__,
            e,
        )
        return []
    unread = {*execution.unread()}
    execution.evict()
    return [
        Event(0, event.type, event.at, None, event.name, event.payload, {"carried": True})
        for event in history
        if event.event_id in unread and event.type == events.SIGNAL_RECEIVED
    ]
