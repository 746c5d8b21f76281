"""Code that sleeps, on a clock that does not: activities run on threads of their own, one at a time.

The environment gives a turn to one call, and waits until that call sleeps or has ended.  ``time.sleep`` and
``asyncio.sleep`` in an activity end its turn, and ask for the next one at a later time of the environment's clock.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import math
import selectors
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dramatiq.middleware import Interrupt

from ..workflow import guard

_current: contextvars.ContextVar[Turns | None] = contextvars.ContextVar("current_turns", default=None)
_lock = threading.Lock()
_installed = False


class Turns:
    """One call of a function, on a thread of its own.

    Parameters:
      clock: answers the environment's time, in milliseconds.
      call: what is called; a coroutine that it returns is run on an event loop with the environment's clock.

    Attributes:
      ended(bool): it has returned or raised.
      value, error: what it returned, what it raised.
      wakes_at(int): when it wants its next turn, while it sleeps.
    """

    def __init__(self, clock: Callable[[], int], call: Callable[[], Any]) -> None:
        self.clock = clock
        self.ended = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.wakes_at = 0
        self._call = call
        self._mine = threading.Semaphore(0)
        self._theirs = threading.Semaphore(0)
        self._interruption: type[Interrupt] | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="durable-activity", daemon=True)

    def take(self) -> None:
        """Let it run until it sleeps or ends."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._mine.release()
        self._theirs.acquire()
        if self.ended:
            self._thread.join()

    def interrupt(self, interruption: type[Interrupt]) -> None:
        """End its sleep with an exception, and let it run until it sleeps again or ends."""
        self._interruption = interruption
        self.take()

    def sleep(self, ms: int) -> None:
        """End this turn; the next one comes ``ms`` milliseconds later.  Called by the thread itself."""
        self.wakes_at = self.clock() + ms
        self._theirs.release()
        self._mine.acquire()
        interruption, self._interruption = self._interruption, None
        if interruption is not None:
            raise interruption

    def is_here(self) -> bool:
        """Whether the current thread is the one that takes these turns."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        _current.set(self)
        try:
            value = self._call()
            if inspect.isawaitable(value):
                with asyncio.Runner(loop_factory=lambda: _Loop(self)) as runner:
                    value = runner.run(_outcome_of(value))
            self.value = value
        except BaseException as e:
            self.error = e
        self.ended = True
        self._theirs.release()


async def _outcome_of(value: Any) -> Any:
    return await value


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose timers follow the environment's clock; real I/O, and threads, are waited for in real time."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.outside = 0
        super().__init__(_Selector(self))
        # What is due in the same millisecond is due: the system's own resolution is lost in the floats of a year.
        self._clock_resolution = 0.0005

    def time(self) -> float:
        return self.turns.clock() / 1000

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        future = super().run_in_executor(executor, func, *args)
        self.outside += 1
        future.add_done_callback(self._is_back)
        return future

    def _is_back(self, future: Any) -> None:
        self.outside -= 1


class _Selector(selectors.DefaultSelector):
    """Where the loop would wait, its turn ends; unless something outside of it may come first."""

    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        loop = self._loop
        if timeout is None:
            return super().select(None)
        # The loop's own pipe is always registered.
        busy = loop.outside > 0 or len(self.get_map()) > 1
        ready = super().select(timeout if busy else 0)
        if not ready and timeout > 0 and loop.turns.is_here():
            loop.turns.sleep(math.ceil(round(timeout * 1000, 5)))
        return ready


def install() -> None:
    """Have ``time.sleep`` end the turn of the activity that calls it; everywhere else it stays what it is."""
    global _installed
    with _lock:
        if _installed:
            return
        guard.install()  # which has a look of its own at time.sleep: ours goes around it
        real = time.sleep

        @functools.wraps(real)
        def sleep(seconds: float) -> None:
            turns = _current.get()
            if turns is None or not turns.is_here() or not isinstance(seconds, (int, float)) or not seconds >= 0:
                real(seconds)
            else:
                turns.sleep(math.ceil(round(seconds * 1000, 5)))

        for module in list(sys.modules.values()):  # `from time import sleep` made names in other modules
            names = getattr(module, "__dict__", None)
            if isinstance(names, dict) and names is not globals():
                for name in [name for name, value in list(names.items()) if value is real]:
                    names[name] = sleep
        _installed = True
