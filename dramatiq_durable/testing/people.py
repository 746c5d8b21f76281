"""Human steps of an environment: its escalations, which the test resolves or cancels."""

from __future__ import annotations

import builtins
import dataclasses
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import EscalationConflict, EscalationNotFound
from ..escalations import Escalation, Status
from ..workflow import events
from ..workflow.commands import OpenEscalation
from ..workflow.converter import encode, loads
from ..workflow.events import Event

if TYPE_CHECKING:
    from .environment import Environment
    from .runs import Run


class Escalations:
    """``env.escalations``: what `durable.escalations` is for real ones, as far as tests need it."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._known: dict[str, tuple[Run, int, Escalation]] = {}

    def list(
        self, *, role: str | None = None, status: Status | None = None, subject: str | None = None
    ) -> builtins.list[Escalation]:
        """The escalations that fit, the most urgent first."""
        wanted = {"role": role, "status": status, "subject": subject}
        found = [
            escalation
            for _, _, escalation in self._known.values()
            if all(value is None or getattr(escalation, name) == value for name, value in wanted.items())
        ]
        return sorted(found, key=lambda escalation: escalation.priority)

    def resolve(self, id: str, payload: Any = None, by: str | None = None) -> Escalation:
        """Answer one; the run goes on.

        Raises:
          EscalationConflict: it is closed.
          EscalationNotFound: there is none.
        """
        data = None if payload is None else encode(payload, "the answer to an escalation")
        result = None if data is None else loads(data)
        return self._end(id, "resolved", events.ESCALATION_RESOLVED, data, by, result)

    def cancel(self, id: str) -> Escalation:
        """Cancel one: the run gets an `EscalationCancelled`.  Raises as `resolve`."""
        return self._end(id, "cancelled", events.ESCALATION_CANCELLED, None, None, None)

    # --- what runs do ---------------------------------------------------------------------------------------

    def open(self, run: Run, command: OpenEscalation) -> None:
        assert command.seq is not None
        now = self._environment.now()
        id = str(uuid.UUID(bytes=events.command_id(run.run_id, command.seq)))
        escalation = Escalation(
            id=id,
            workflow_id=run.workflow_id,
            run_id=run.run_id,
            workflow=run.workflow.name,
            role=command.name or "",
            subject=command.subject,
            type=command.type,
            priority=command.priority,
            status="waiting",
            payload=None if command.payload is None else loads(command.payload),
            metadata=command.metadata or {},
            opened_at=now,
            times_out_at=None if command.ms is None else now + timedelta(milliseconds=command.ms),
            claimed_by=None,
            claimed_until=None,
            closed_at=None,
            resolved_by=None,
            result=None,
        )
        self._known[id] = (run, command.seq, escalation)
        if command.ms is not None:
            self._environment.at(self._environment.now_ms + command.ms, lambda: self._time_out(id))

    def withdraw(self, run: Run, seq: int | None = None) -> None:
        """Nobody need answer it any more: the one of a command, or all of a run that has ended."""
        for id, (of, number, escalation) in self._known.items():
            if of is run and seq in (None, number) and escalation.status == "waiting":
                self._close(id, "cancelled")

    def _time_out(self, id: str) -> None:
        run, seq, escalation = self._known[id]
        if escalation.status == "waiting":
            self._close(id, "timed_out")
            run.take(Event(0, events.ESCALATION_TIMED_OUT, 0, seq, escalation.role))

    def _end(self, id: str, status: Status, type: str, data: bytes | None, by: str | None, result: Any) -> Escalation:
        if id not in self._known:
            raise EscalationNotFound(f"there is no escalation {id!r} in this environment.")
        run, seq, escalation = self._known[id]
        if escalation.status != "waiting":
            raise EscalationConflict(f"the escalation is {escalation.status} already.", escalation.status, None)
        self._close(id, status, resolved_by=by, result=result)
        facts = None if by is None else {"by": by}
        self._environment.post(run, Event(0, type, 0, seq, escalation.role, data, facts))
        self._environment.settle()
        return self._known[id][2]

    def _close(self, id: str, status: Status, **facts: Any) -> None:
        run, seq, escalation = self._known[id]
        closed = dataclasses.replace(escalation, status=status, closed_at=self._environment.now(), **facts)
        self._known[id] = (run, seq, closed)
