"""Looking at the runs of an environment: their state, what they wait for, what they put out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from ..errors import DurableError, Timeout
from ..workflow import events
from ..workflow.attributes import search_values
from ..workflow.converter import loads
from ..workflow.descriptions import Pending
from ..workflow.handlers import STACK
from ..workflow.info import STATE_FACTS
from ..workflow.replay import Execution
from .replayer import bring_back

if TYPE_CHECKING:
    from .runs import Run

_CHANGES = (events.SEARCH_UPSERTED, events.ENTITY_CHANGED)


@contextmanager
def looked_at(run: Run) -> Iterator[Execution]:
    """A run's code, to be looked at: one that has ended is brought back from its history."""
    if run.stepping:
        raise DurableError(f"the workflow {run.workflow_id!r} is in the middle of a step: it cannot be looked at.")
    if run.status == "running":
        yield run.execution
        if run.execution.tainted:
            run.reload()
        return
    execution = run.fresh(keep=True)
    try:
        bring_back(execution, run.history)
        yield execution
    finally:
        execution.evict()


def state_of(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's search attributes, and its entity."""
    if not any(e.type in _CHANGES for e in run.history) and not any(fact in run.facts for fact in STATE_FACTS):
        return {}, {}
    with looked_at(run) as execution:
        return search_values(execution.search), copy.deepcopy(execution.state.get("entity", {}))


def stack_of(run: Run) -> str | None:
    """Where the run's code waits; None where it does not."""
    if run.status != "running" or not run.begun:
        return None
    with looked_at(run) as execution:
        answer, _ = execution.handlers.query(STACK, b"")
    return None if answer is None else cast(str, loads(answer))


def pending_of(run: Run) -> list[Pending]:
    """What the run waits for, in the order in which its code asked."""
    now = run.environment.now_ms
    found = [
        Pending(
            "activity",
            a.name,
            a.seq,
            a.attempt if a.now is not None else a.attempt + 1,
            a.last_failure,
            _after(now, a.entry.at),
            None if a.details is None else loads(a.details),
        )
        for a in run.activities.values()
    ]
    found += [Pending("timer", None, seq, None, None, _after(now, e.at), None) for seq, e in run.timers.items()]
    found += [
        Pending("child", child.workflow.name, seq, None, None, None, None)
        for seq, child in run.children.items()
        if child.latest().status == "running"
    ]
    return sorted(found, key=lambda pending: pending.seq)


def follow(run: Run, offset: int) -> Iterator[tuple[int, Any]]:
    """What the run, and those that go on for it, put out, until it ends; time is skipped where nothing comes.

    Raises:
      Timeout: nothing else is going to happen, and the run has not ended.
    """
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
        raise ValueError(f"an offset is a whole number, from 0, not {offset!r}.")
    environment = run.environment
    while True:
        # Each run's values begin where those of the run before it end.
        chain = [run]
        while chain[-1].next is not None:
            chain.append(chain[-1].next)
        written = [e for each in chain for e in each.history if e.type == events.OUTPUT_WRITTEN]
        values = {(e.attributes or {})["offset"]: e.payload for e in written}
        if offset in values:
            payload = values[offset]
            yield offset, None if payload is None else loads(payload)
            offset += 1
            continue
        last = chain[-1]
        if last.status != "running":
            return
        length = len(last.history)

        def changed(last: Run = last, length: int = length) -> bool:
            return len(last.history) > length or last.status != "running"

        if not environment.drive(None, changed):
            raise Timeout(f"the workflow {last.workflow_id!r} waits for {last.waits_for()}, and puts out no more.")


def _after(now: int, ms: int) -> datetime | None:
    return time_of(ms) if ms > now else None


def time_of(ms: int) -> datetime:
    """A time of the environment's clock, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC)
