"""What a run of an environment has computed on the spot: side effects, and functions that may take their time."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Interrupt, TimeLimitExceeded

from ..workflow.commands import Compute
from ..workflow.computing import OutOfTime, about_now, computed, current_local

if TYPE_CHECKING:
    from .runs import Run


class LocalCall:
    """A call of a function that may sleep: it takes time of the environment's clock, and answers when it ends."""

    def __init__(self, run: Run, command: Compute) -> None:
        self._run = run
        self._command = command
        self._late = False
        environment = run.environment
        fn, name = command.fn, command.name or ""
        if command.hopeless is not None:  # an activity, and no mere function
            fn = environment.mocked(name) or fn
            environment.calls.append((name, tuple(command.args), command.kwargs))
        self._turns = environment.turns_of(lambda: self._call(fn))
        if command.limit is not None:
            environment.at(environment.now_ms + command.limit[0], self._expire)
        self._take_turn()

    def _call(self, fn: Callable[..., Any]) -> Any:
        current_local.set(about_now(self._command, self._run.environment.now_ms))
        return fn(*self._command.args, **self._command.kwargs)

    def _take_turn(self) -> None:
        if not self._turns.ended:
            self._turns.take()
            self._after_turn()

    def _after_turn(self) -> None:
        environment = self._run.environment
        if not self._turns.ended:
            environment.at(self._turns.wakes_at, self._take_turn)
            return
        error = self._turns.error
        if error is not None and not isinstance(error, (Exception, Interrupt)):
            raise error  # the test's own
        environment.post(self._run, computed(dataclasses.replace(self._command, fn=self._outcome, args=(), kwargs={})))

    def _outcome(self) -> Any:
        error = self._turns.error
        if error is None:
            return self._turns.value
        if self._late and isinstance(error, TimeLimitExceeded):
            raise OutOfTime("".join(traceback.format_exception(error)))
        raise error

    def _expire(self) -> None:
        if not self._turns.ended:
            self._late = True
            self._turns.interrupt(TimeLimitExceeded)
            self._after_turn()
