"""Asking the runs of an environment: queries and updates."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..codecs import Codecs
from ..durations import Duration
from ..errors import QueryFailed, QueryTimedOut, Timeout, WorkflowClosed
from ..workflow import events
from ..workflow.asking import _UNDECIDED, UpdateHandle
from ..workflow.converter import encode_call, loads
from ..workflow.events import Event
from ..workflow.failures import failure_from_json
from ..workflow.handle import outside_of_workflows
from ..workflow.options import check_name
from .looking import looked_at

if TYPE_CHECKING:
    from .environment import Environment
    from .runs import Run


@dataclass
class Update:
    """An update that a run was asked for.

    Attributes:
      run(Run): which has it: one that goes on for another takes along what was not accepted.
      status(str): requested, accepted, completed or rejected.
      payload(bytes | None), failure(dict | None): the answer.
    """

    run: Run
    status: str = "requested"
    payload: bytes | None = None
    failure: dict[str, Any] | None = None


class EnvironmentUpdate(UpdateHandle[Any]):
    """A handle of an update in an `Environment`: waiting skips time."""

    def __init__(
        self, environment: Environment, workflow_id: str | None, run_id: str | None, update_id: str, name: str | None
    ) -> None:
        super().__init__(None, workflow_id, run_id, update_id, name)  # type: ignore[arg-type]
        self._environment = environment

    @property
    def _codecs(self) -> Codecs:
        return Codecs()

    def _wait(self, stage: str, timeout: Duration | None) -> tuple[Any, ...]:
        outside_of_workflows(f"wait for the update {self.update_id!r}")
        environment = self._environment
        if not environment.drive(None, lambda: self._row()[0] not in _UNDECIDED[stage]):
            run = environment.find(self.workflow_id, self.run_id)
            waits = "nothing" if run is None else run.latest().waits_for()
            raise Timeout(
                f"{self._described()} is not {stage}: the workflow {self.workflow_id!r} waits for {waits}, and nothing "
                "else is going to happen."
            )
        return self._row()

    async def _async_wait(self, stage: str, timeout: Duration | None) -> tuple[Any, ...]:
        return self._wait(stage, timeout)

    def _row(self) -> tuple[Any, ...]:
        """How it stands, as `dramatiq_durable.workflow.asking.find_updates` says it."""
        run = self._environment.find(self.workflow_id, self.run_id)
        update = None if run is None else run.updates.get(self.update_id)
        if update is None:
            return "missing", None, None
        if update.status in ("requested", "accepted") and update.run.status != "running":
            return "closed", None, None
        return update.status, update.payload, update.failure


def request_update(
    environment: Environment, run: Run, name: str, args: tuple[Any, ...], update_id: str | None, wait: str
) -> EnvironmentUpdate:
    """Ask a run for an update; as `dramatiq_durable.workflow.asking.Asking.update` raises."""
    if wait not in _UNDECIDED:
        raise ValueError(f"wait is 'completed' or 'accepted', not {wait!r}.")
    check_name(name, "an update's name")
    update_id = str(uuid.uuid4()) if update_id is None else check_name(update_id, "an update's id")
    outside_of_workflows(f"ask for the update {name!r}")
    event = Event(
        0, events.UPDATE_REQUESTED, 0, None, name, encode_call(args, {}, None, name), {"update_id": update_id}
    )
    post_update(environment, run, event)
    environment.settle()
    return EnvironmentUpdate(environment, run.workflow_id, run.run_id, update_id, name)


def post_update(environment: Environment, run: Run, event: Event) -> None:
    """Have a run given an update, unless it was asked for before.

    Raises:
      WorkflowClosed: the run has ended.
    """
    run = run.latest()
    update_id = (event.attributes or {})["update_id"]
    if update_id in run.updates:
        return
    if run.status != "running":
        raise WorkflowClosed(f"the workflow {run.workflow_id!r} has ended: it is {run.status}.")
    run.updates[update_id] = Update(run)
    environment.post(run, event)


def ask(run: Run, name: str, args: tuple[Any, ...]) -> Any:
    """Ask a run's code a query; as `dramatiq_durable.workflow.asking.Asking.query` raises."""
    check_name(name, "a query's name")
    payload = encode_call(args, {}, None, name)
    outside_of_workflows(f"ask the query {name!r}")
    if run.status == "running" and not (run.begun and run.execution.begun):
        raise QueryTimedOut(f"no worker answered the query {name!r}: the run has not begun. Let time pass first.")
    with looked_at(run) as execution:
        answer, failure = execution.handlers.query(name, payload)
    if failure is not None:
        raise failure_from_json(failure, QueryFailed)
    return None if answer is None else loads(answer)
