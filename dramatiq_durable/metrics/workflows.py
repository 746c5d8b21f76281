"""What is counted of runs, by the worker that takes them forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CodecFailed, Nondeterminism
from . import catalogue
from .cells import OTHER
from .recorder import Recorder

if TYPE_CHECKING:
    from ..operations import Advance
    from ..workflow.cache import CachedRun
    from ..workflow.info import Info


class WorkflowCounts:
    """Counts steps once they are committed: what is replayed is not counted again.

    Workflows are named by what this process has declared, never by a message.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def cached(self, run: CachedRun, workflow: str) -> None:
        """A run is about to be taken forward, from memory or not."""
        self._recorder.count(catalogue.CACHE, workflow, "miss" if run.execution is None else "hit")

    def replayed(self, workflow: str, events: int) -> None:
        """So many events were read and applied."""
        self._recorder.count(catalogue.REPLAYED, workflow, by=events)

    def failed_task(self, workflow: str, error: BaseException) -> None:
        """A workflow task could not be done."""
        reason = "error"
        if isinstance(error, Nondeterminism):
            reason = "nondeterminism"
            self._recorder.count(catalogue.NONDETERMINISM, workflow)
        elif isinstance(error, CodecFailed):
            reason = "codec"
        self._recorder.count(catalogue.FAILURES, workflow, reason)

    def advanced(self, info: Info | None, advance: Advance) -> None:
        """A step was committed, or was not."""
        recorder, workflow = self._recorder, OTHER if info is None else info.name
        if advance.error is not None or advance.answer != "ok":
            outcome = "failed" if advance.error is not None else advance.answer
            recorder.count(catalogue.STEPS, workflow, outcome)
            return
        course = recorder.course(workflow)
        course.recorded += 1
        for event in advance.events:
            course.events[event.type] = course.events.get(event.type, 0) + 1
        if advance.close is not None:
            course.closed[advance.close] = course.closed.get(advance.close, 0) + 1
            if info is not None and info.started_at is not None and advance.events:
                lived = advance.events[-1].at / 1000 - info.started_at.timestamp()
                recorder.observe(catalogue.LIFE, max(lived, 0.0), workflow, advance.close)
