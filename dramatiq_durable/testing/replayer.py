"""Replaying recorded histories with the code at hand: does it still do what it did?"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import DurableError, Nondeterminism
from ..workflow.definition import Workflow
from ..workflow.events import Event
from ..workflow.export import load_history
from ..workflow.info import Info
from ..workflow.replay import Execution

#: Ends that came from outside: the code knows nothing of them.
_FROM_OUTSIDE = ("WorkflowTerminated", "WorkflowTimedOut")


class Replayer:
    """Replays exported histories: what running workflows will do when this code is deployed.

    Export histories of typical runs (``dramatiq-durable workflow export``, or ``handle.export()``), keep them beside
    the tests, and replay them in CI::

        def test_running_orders_can_follow() -> None:
            replayer = Replayer([order, ship])
            for path in Path("tests/histories").glob("*.json"):
                replayer.replay(path)

    Nothing is called but the workflows' code: no activity, no database.

    Parameters:
      workflows: the workflows that the histories are of.
    """

    def __init__(self, workflows: Iterable[Workflow[Any, Any]]) -> None:
        if isinstance(workflows, Workflow):
            workflows = [workflows]
        self._workflows: dict[str, Workflow[Any, Any]] = {}
        for workflow in workflows:
            if not isinstance(workflow, Workflow):
                raise TypeError(f"a Replayer takes workflows (@durable.workflow), not {workflow!r}.")
            self._workflows[workflow.name] = workflow

    def replay(self, history: str | PathLike[str]) -> None:
        """Replay one history.

        Parameters:
          history: the exported text, or the path of a file with it.

        Raises:
          Nondeterminism: the code does something else; ``event_id``, ``expected`` and ``got`` say where it first does.
          DurableError: the history is of a workflow that is not among these.
          ValueError: the text is no exported history.
          OSError: the file cannot be read.
        """
        if isinstance(history, str) and history.lstrip().startswith("{"):
            text, source = history, "the history"
        else:
            text, source = Path(history).read_text(encoding="utf-8"), str(history)
        try:
            info, events = load_history(text)
        except ValueError as e:
            e.add_note(f"in {source}")
            raise
        workflow = self._workflows.get(info.name)
        if workflow is None:
            known = ", ".join(map(repr, sorted(self._workflows))) or "none"
            raise DurableError(
                f"{source} is of the workflow {info.name!r}, and this Replayer knows {known}: "
                "give it that workflow, too."
            )
        try:
            replay(workflow, info, events)
        except Nondeterminism as e:
            e.add_note(f"while replaying {source}: {info.name!r}, workflow id {info.workflow_id!r}")
            raise


def replay(workflow: Workflow[Any, Any], info: Info, history: list[Event]) -> None:
    """Replay a history from its beginning.

    Raises:
      Nondeterminism: the code does something else.
    """
    if history and history[-1].type in _FROM_OUTSIDE:
        history = history[:-1]
    if len(history) <= 1:
        return  # no step was made yet
    execution = Execution(workflow.fn, info)
    try:
        execution.replay(history)
    finally:
        execution.evict()
