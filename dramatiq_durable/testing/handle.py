"""Handles of an environment's runs: what `WorkflowHandle` does, without a database."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ..durations import Duration
from ..errors import (
    DurableError,
    Timeout,
    WorkflowCancelled,
    WorkflowClosed,
    WorkflowFailed,
    WorkflowNotFound,
    WorkflowTerminated,
    WorkflowTimedOut,
)
from ..workflow import events
from ..workflow.converter import decoders_of, encode
from ..workflow.descriptions import Description, HistoryEvent, public, value_of
from ..workflow.events import Event, described_failure
from ..workflow.export import export_history
from ..workflow.failures import failure_from_json
from ..workflow.handle import WorkflowHandle, outside_of_workflows
from ..workflow.options import check_name
from .asking import EnvironmentUpdate, ask, request_update
from .looking import follow, pending_of, stack_of, state_of
from .runs import Run

if TYPE_CHECKING:
    from ..workflow.definition import Workflow
    from .environment import Environment

R = TypeVar("R")


class EnvironmentHandle(WorkflowHandle[R], Generic[R]):
    """A handle of a run in an `Environment`.  What is sent with it has its effect before the call returns."""

    def __init__(
        self,
        environment: Environment,
        workflow_id: str | None,
        run_id: str | None = None,
        workflow: Workflow[Any, R] | None = None,
    ) -> None:
        super().__init__(None, workflow_id, run_id, workflow)  # type: ignore[arg-type]
        self.environment = environment

    # --- looking ------------------------------------------------------------------------------------------

    def describe(self) -> Description:
        run = self._run()
        last = run.history[-1]
        search, entity = state_of(run)
        known: dict[str, Any] = {
            "workflow_id": run.workflow_id,
            "run_id": run.run_id,
            "name": run.workflow.name,
            "queue_name": run.workflow.queue_name,
            "status": run.status,
            "started_at": run.started_at,
            "closed_at": run.closed_at,
            "parent": run.info().parent,
            "memo": dict(run.facts.get("memo") or {}),
            "search": search,
            "entity": entity,
            "history_length": len(run.history),
            "input": value_of(run.history[0]),
            "result": value_of(last) if run.status == "completed" else None,
            "failure": described_failure(last) if run.status == "failed" else None,
            "pending": pending_of(run) if run.status == "running" else [],
            "stack": stack_of(run),
        }
        told: dict[str, Any] = {f.name: known.get(f.name) for f in dataclasses.fields(Description)}
        return Description(**told)

    def history(self) -> list[HistoryEvent]:
        return [public(e) for e in self._run().history]

    def export(self) -> str:
        """The run's history as JSON text, which a `Replayer` takes."""
        run = self._run()
        return export_history(run.info(), run.history, run.status)

    def children(self) -> list[WorkflowHandle[Any]]:
        return [
            EnvironmentHandle(self.environment, child.workflow_id, child.latest().run_id, child.workflow)
            for child in self._run().children.values()
        ]

    def result(self, timeout: Any = None) -> R:
        """Return what the workflow returned, skipping time whenever everything waits.

        Parameters:
          timeout: as elsewhere, and never needed: it is real time, and none passes.

        Raises:
          Timeout: the run waits for something that nobody will bring about.
          WorkflowFailed, WorkflowCancelled, WorkflowTerminated, WorkflowTimedOut: how it ended otherwise.
        """
        outside_of_workflows("wait for a workflow through a handle")
        run = self._run()
        if not self.environment.drive(None, lambda: run.latest().status != "running"):
            run = run.latest()
            raise Timeout(
                f"the workflow {run.workflow_id!r} waits for {run.waits_for()}, and nothing else is going to happen: "
                "signal it, or let its activities end, before you ask for its result."
            )
        return self._outcome_of(run.latest())

    async def aresult(self, timeout: Any = None) -> R:
        return await asyncio.to_thread(self.result, timeout)

    def _outcome_of(self, run: Run) -> R:
        last = run.history[-1]
        what = f"the workflow {run.workflow_id!r}"
        reason = (last.attributes or {}).get("reason")
        if run.status == "completed":
            decode = decoders_of(run.workflow.fn).result
            value = value_of(last)
            return cast(R, value if decode is None else decode(value))
        if run.status == "failed":
            ids = {"workflow_id": run.workflow_id, "run_id": run.run_id}
            raise failure_from_json(described_failure(last), WorkflowFailed, **ids)
        if run.status == "cancelled":
            raise WorkflowCancelled(f"{what} was cancelled")
        if run.status == "timed_out":
            raise WorkflowTimedOut(f"{what} ran out of its time ({reason})")
        raise WorkflowTerminated(f"{what} was terminated: {reason or 'no reason given'}")

    def follow(self, offset: int = 0) -> Iterator[tuple[int, Any]]:
        return follow(self._run(), offset)

    async def afollow(self, offset: int = 0) -> AsyncIterator[tuple[int, Any]]:
        for found in self.follow(offset):
            yield found

    def query(self, name: str, *args: Any, timeout: Duration | None = 10) -> Any:
        return ask(self._run(), name, args)

    async def aquery(self, name: str, *args: Any, timeout: Duration | None = 10) -> Any:
        return self.query(name, *args)

    def get_update(self, update_id: str | None = None) -> EnvironmentUpdate:
        known = super().get_update(update_id)
        return EnvironmentUpdate(self.environment, known.workflow_id, known.run_id, known.update_id, None)

    # --- acting -------------------------------------------------------------------------------------------

    def signal(self, name: str, payload: Any = None, *, id: str | None = None) -> None:
        outside_of_workflows("signal a workflow through a handle")
        check_name(name, "a signal's name")
        data = None if payload is None else encode(payload, f"the payload of the signal {name!r}")
        run = self._open()
        if id is not None:
            if check_name(id, "a signal's id") in run.keys:
                return
            run.keys.add(id)
        self._tell(run, Event(0, events.SIGNAL_RECEIVED, 0, None, name, data))

    def cancel(self) -> None:
        outside_of_workflows("cancel a workflow through a handle")
        self._tell(self._open(), Event(0, events.CANCEL_REQUESTED, 0))

    def terminate(self, reason: str | None = None) -> None:
        outside_of_workflows("terminate a workflow through a handle")
        self._open().end("terminated", "WorkflowTerminated", reason)
        self.environment.settle()

    def reset(self, to_event: int) -> WorkflowHandle[R]:
        raise DurableError("an Environment resets no runs: test that with the fixture durable_broker.")

    # --- inside -------------------------------------------------------------------------------------------

    def _request(self, name: str, args: tuple[Any, ...], update_id: str | None, wait: str) -> EnvironmentUpdate:
        return request_update(self.environment, self._run(), name, args, update_id, wait)

    def _found(self) -> tuple[Any, ...]:
        run = self._run()
        return uuid.UUID(run.run_id).bytes, run.workflow_id, run.workflow.name, run.workflow.queue_name, run.status

    def _run(self) -> Run:
        run = self.environment.find(self._workflow_id, self.run_id)
        if run is None:
            raise WorkflowNotFound(f"there is no workflow {self._workflow_id or self.run_id!r} in this environment")
        return run

    def _open(self) -> Run:
        run = self._run().latest()
        if run.status != "running":
            raise WorkflowClosed(f"the workflow {run.workflow_id!r} has ended: it is {run.status}.")
        return run

    def _tell(self, run: Run, event: Event) -> None:
        self.environment.post(run, event)
        self.environment.settle()
