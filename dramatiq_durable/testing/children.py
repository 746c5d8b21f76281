"""Children of an environment's runs whose workflows are mocked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..workflow import events
from ..workflow.commands import StartChild
from ..workflow.converter import decode_call, encode
from ..workflow.events import Event
from ..workflow.failures import failure_to_json

if TYPE_CHECKING:
    from ..workflow.definition import Workflow
    from .runs import Run


def start_mocked(
    run: Run, command: StartChild, mock: Callable[..., Any], workflow: Workflow[Any, Any] | None, payload: bytes
) -> None:
    """Call a mock instead of starting a child, and tell the run how it ends."""
    environment, seq = run.environment, command.seq
    assert seq is not None
    args, kwargs = decode_call(payload, mock if workflow is None else workflow.fn)
    environment.calls.append((command.name or "", tuple(args), kwargs))
    turns = run.mocks[seq] = environment.turns_of(lambda: mock(*args, **kwargs))

    def take_turn() -> None:
        if seq not in run.mocks:
            return
        turns.take()
        if not turns.ended:
            environment.at(turns.wakes_at, take_turn)
            return
        del run.mocks[seq]
        type, value, facts = events.CHILD_COMPLETED, None, None
        if turns.error is None:
            value = encode(turns.value, f"the result of {command.name!r}")
        elif isinstance(turns.error, Exception):
            type, facts = events.CHILD_FAILED, {"failure": failure_to_json(turns.error)}
        else:
            raise turns.error
        environment.post(run, Event(0, type, 0, seq, command.name, value, facts))

    environment.at(environment.now_ms + command.options.get("delay_ms", 0), take_turn)
