"""The deterministic event loop that workflow code runs on.

It is an asyncio loop without a selector, threads or a clock of its own: a FIFO queue of handles, history's clock, and
timers that are commands of the run.  Everything that asyncio builds from futures, tasks and timers works; everything
that reaches outside is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import logging
import math
import sys
from asyncio import tasks as asyncio_tasks
from asyncio.events import _get_running_loop, _set_running_loop
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from threading import get_ident
from typing import Any, Protocol

from ..errors import ForbiddenInWorkflow, RunawayWorkflow
from . import deadlock
from .deadlock import Overdue, stepping
from .tasks import Future, Task

MAX_HANDLES = 1_000_000
"""How many callbacks one step may run before it is taken for an endless loop."""

FOR_EVER = 1000 * 366 * 86_400
"""A delay of so many seconds is none that comes to an end."""

MAX_LATE = 1000
"""How often the code of a run that is dropped is told so, before it is left waiting."""

log = logging.getLogger(__name__)

_swap_current_task: Callable[[Any, Any], Any] | None = getattr(asyncio_tasks, "_swap_current_task", None)


class Evicted(GeneratorExit):
    """Raised by whatever a coroutine calls while its run is dropped from memory.

    It is a GeneratorExit, so that it leaves a closing coroutine without a sound.
    """


class Host(Protocol):
    """What the loop needs of the run that owns it."""

    reading: str | None

    @property
    def is_replaying(self) -> bool: ...

    def change_refused(self) -> ForbiddenInWorkflow: ...

    @property
    def info(self) -> Any: ...

    def start_timer(self, ms: int, entry: TimerHandle) -> int: ...

    def cancel_timer(self, seq: int) -> None: ...


class Ending(Protocol):
    """What comes to an end, as a task does."""

    def done(self) -> bool: ...


class Handle:
    """A callback in the ready queue."""

    __slots__ = ("args", "callback", "context", "is_cancelled")

    def __init__(
        self, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled


class TimerHandle(Handle):
    """A callback that a durable timer puts into the ready queue."""

    __slots__ = ("_loop", "_when", "seq")

    def __init__(
        self,
        loop: WorkflowLoop,
        when: float,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:
        super().__init__(callback, args, context)
        self._loop = loop
        self._when = when
        self.seq = 0

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self._loop.cancel_timer(self.seq)

    def when(self) -> float:
        return self._when

    def resolve(self, event: Any) -> None:
        """Answer TimerFired."""
        self._loop.ready.append(self)


class WorkflowLoop(asyncio.AbstractEventLoop):
    """One run's event loop.  It is stepped by the run; nothing here ever blocks.

    Parameters:
      host: the run.
      seed(str): keeps the numbers of different runs apart.
      max_handles(int): how many callbacks one step may run.
      deadlock_timeout(float | None): how many seconds one step may take; None: as many as it likes.

    Attributes:
      ready(deque): handles, first in, first out.
      now_ms(int): history's clock, in milliseconds since the epoch.
      evicting(bool): the run is being dropped: nothing that is asked for happens any more.
      thread(int | None): the thread that is stepping the run.
    """

    def __init__(
        self, host: Host, seed: str, max_handles: int = MAX_HANDLES, deadlock_timeout: float | None = None
    ) -> None:
        self.host = host
        self.ready: deque[Handle] = deque()
        self.now_ms = 0
        self.evicting = False
        self.max_handles = self.left = max_handles
        self.deadlock_timeout = deadlock_timeout
        self.thread: int | None = None
        # Tasks and commands are counted apart from other futures: how many of those asyncio makes for itself is not
        # the same in all versions of Python.
        self._number = 0
        self._futures = 0
        # Tasks of all runs meet in sets of asyncio's own.  The seed keeps equal numbers of different runs apart there;
        # the low bits stay the number, so that a small set iterates in the order of creation.
        self._salt = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=5).digest(), "big") << 20
        self._tasks: dict[int, Task[Any]] = {}
        self._prune_at = 64
        self._late = 0
        self._reported = False

    # --- running ---------------------------------------------------------------------------------------
    def drain(self, main: Ending) -> None:
        """Run callbacks until none is ready or the main task (or whatever it is) is done; the caller sets ``left`` for
        each step.

        Raises:
          RunawayWorkflow: the step does not come to an end.
          BaseException: KeyboardInterrupt and SystemExit of user code.
        """
        ready = self.ready
        ended = main.done
        while ready:
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            try:
                if handle.context is None:
                    handle.callback(*handle.args)
                else:
                    handle.context.run(handle.callback, *handle.args)
            except Exception as e:
                self.call_exception_handler({"message": f"Exception in callback {handle.callback!r}", "exception": e})
            if ended():
                return
            self.left -= 1
            if self.left <= 0:
                if self.left < -self.max_handles:
                    raise Overdue
                raise RunawayWorkflow(
                    f"one step of the workflow ran {self.max_handles:,} callbacks without waiting for anything "
                    "durable: look for a loop around `await asyncio.sleep(0)`; wait with `durable.wait_condition`, "
                    "a signal or a sleep of some length instead."
                )

    def stop_soon(self) -> None:
        """End the step as overdue as soon as the callback that is running returns; called by the watchdog."""
        self.left = -2 * self.max_handles

    def refuse_late(self) -> None:
        """Called for whatever is asked for while the run is dropped: nothing comes of it, and the code is told so.

        After many times the code is not told any more, and waits for what never comes: code that swallows everything
        and tries again would not end otherwise.

        Raises:
          Evicted: not too often yet.
        """
        self._late += 1
        if self._late <= MAX_LATE:
            raise Evicted

    def number(self) -> int:
        """Return the hash of the next task, or of the next command's future.

        Raises:
          Evicted: the run is being dropped from memory.
          ForbiddenInWorkflow: the garbage collector asks, on behalf of an object that only happens to go now.
        """
        if self.evicting or is_collecting():
            self._refuse_chance()
        self._number += 1
        return self._salt + self._number

    def number_future(self) -> int:
        """Return the hash of the next of all other futures; raises as ``number``."""
        if self.evicting or is_collecting():
            self._refuse_chance()
        self._futures += 1
        return self._salt + (1 << 19) + self._futures

    def _refuse_chance(self) -> None:
        if is_collecting():
            raise _forbidden(*_COLLECTED)
        self.refuse_late()

    def pending_tasks(self) -> list[Task[Any]]:
        """Return the tasks that have not ended, oldest first."""
        return [task for task in self._tasks.values() if not task.done()]

    def drop(self) -> None:
        """Forget everything that could run."""
        self.ready.clear()
        self._tasks.clear()

    # --- what asyncio asks of a loop -------------------------------------------------------------------
    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        pass

    def is_running(self) -> bool:
        return _get_running_loop() is self

    def is_closed(self) -> bool:
        return self.evicting

    def time(self) -> float:
        """Return history's clock in seconds since the epoch."""
        return self.now_ms / 1000

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        if self.evicting or is_collecting():
            return Handle(callback, args, context)
        if self.thread != get_ident():
            raise _forbidden("call_soon() from outside of the run's own code", "send the run a signal instead.")
        handle = Handle(callback, args, contextvars.copy_context() if context is None else context)
        self.ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        if not delay < FOR_EVER:
            if delay != delay:
                raise ValueError("a delay is a number of seconds, not NaN")
            return TimerHandle(self, delay, callback, args, context)  # it never fires: nothing is to be recorded
        # Clocks of asyncio's users are floats: what is less than 10 microseconds over a millisecond is rounding noise.
        ms = math.ceil(round(delay * 1000, 2))
        if ms <= 0:
            return self.call_soon(callback, *args, context=context)
        if self.evicting or is_collecting():
            self._refuse_chance()
            return self.call_soon(callback, *args, context=context)
        handle = TimerHandle(
            self, (self.now_ms + ms) / 1000, callback, args, contextvars.copy_context() if context is None else context
        )
        handle.seq = self.host.start_timer(ms, handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_later(when - self.now_ms / 1000, callback, *args, context=context)

    def cancel_timer(self, seq: int) -> None:
        if not self.evicting:
            self.host.cancel_timer(seq)

    def create_future(self) -> Any:
        return Future[Any](self)

    def create_task(
        self, coro: Any, *, name: object = None, context: contextvars.Context | None = None, **options: Any
    ) -> Any:
        if self.evicting:
            coro.close()
        if options.pop("eager_start", None):
            coro.close()
            raise _forbidden("an eagerly started task", "create the task without eager_start.")
        return self.make_task(coro, name, context)

    def make_task(
        self, coro: Coroutine[Any, Any, Any], name: object = None, context: contextvars.Context | None = None
    ) -> Task[Any]:
        """Make a task and remember it."""
        if self.host.reading is not None:
            coro.close()
            raise self.host.change_refused()
        hash = self.number()
        task: Task[Any] = Task(
            coro, hash, loop=self, name=f"Task-{self._number}" if name is None else str(name), context=context
        )
        # A strong reference until the task has ended: one that only the collector can reach would run its `finally`
        # blocks at a time that no replay repeats.
        self._tasks[hash] = task
        if len(self._tasks) >= self._prune_at:
            self._tasks = {number: task for number, task in self._tasks.items() if not task.done()}
            self._prune_at = 2 * len(self._tasks) + 64
        return task

    async def shutdown_asyncgens(self) -> None:
        pass

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        pass

    def get_task_factory(self) -> None:
        return None

    def get_exception_handler(self) -> None:
        return None

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log what asyncio has nobody to tell, once for each run and never on replay."""
        if self.evicting or self._reported or self.host.is_replaying:
            return
        message = context.get("message") or "Unhandled exception in a workflow"
        if message.startswith("Task was destroyed"):
            return  # a parked run left memory: nothing was lost
        self._reported = True
        log.error("%s", message, exc_info=context.get("exception"))

    # --- asynchronous generators -------------------------------------------------------------------------
    def finalize_asyncgen(self, agen: AsyncGenerator[Any, Any]) -> None:
        """Close an asynchronous generator that was left early, if it was left by the code of this very step.

        One that the garbage collector found is dropped as it is: its cleanup would run at a time of chance.
        """
        if _get_running_loop() is self and not self.evicting and not is_collecting():
            self.create_task(agen.aclose())


class Scope:
    """Makes a run's loop the running one of this thread for one step, whatever loop was running there before.

    Attributes:
      overdue(str | None): the step took too long; what it was doing.
    """

    __slots__ = ("_before", "_hooks", "_ident", "_outer", "_outer_task", "loop", "overdue")

    def __init__(self, loop: WorkflowLoop) -> None:
        self.loop = loop
        self.overdue: str | None = None
        self._ident: int | None = None

    def __enter__(self) -> None:
        loop = self.loop
        self._outer = _get_running_loop()
        if self._outer is not None and _swap_current_task is not None:
            # From Python 3.14 on the current task belongs to the thread, not to the loop.
            self._outer_task = _swap_current_task(self._outer, None)
        self._hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=None, finalizer=loop.finalize_asyncgen)
        ident = loop.thread = self._ident = get_ident()
        self._before = stepping.get(ident)
        stepping[ident] = self
        if loop.deadlock_timeout is not None and not deadlock.watching:
            deadlock.watch()
        _set_running_loop(loop)

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def leave(self) -> str | None:
        """Leave the step, if that was not done: the watchdog's ``Overdue`` may come on the very way out.

        Returns:
          What was said if the step was overdue.
        """
        ident = self._ident
        if ident is None:
            return self.overdue
        if self._before is None:
            stepping.pop(ident, None)
        else:
            stepping[ident] = self._before
        if self.overdue is not None:
            deadlock.recall(ident)
        self.loop.thread = None
        _set_running_loop(self._outer)
        sys.set_asyncgen_hooks(*self._hooks)
        if self._outer is not None and _swap_current_task is not None:
            _swap_current_task(self._outer, self._outer_task)
        self._ident = None
        return self.overdue


def current_host() -> Any:
    """Return the run that this thread is stepping, or None.

    What the garbage collector runs (``__del__``) belongs to no run: it comes at a time of chance.
    """
    loop = _get_running_loop()
    return loop.host if type(loop) is WorkflowLoop and not is_collecting() else None


_collecting: int | None = None


def is_collecting() -> bool:
    """Return whether this thread is in the middle of a garbage collection."""
    return _collecting is not None and _collecting == get_ident()


def _note_collection(phase: str, info: dict[str, int]) -> None:
    global _collecting
    _collecting = get_ident() if phase == "start" else None


gc.callbacks.append(_note_collection)


# --- what a workflow cannot do --------------------------------------------------------------------------
def _forbidden(what: str, instead: str) -> ForbiddenInWorkflow:
    return ForbiddenInWorkflow(f"{what} cannot be replayed, and is refused inside a workflow: {instead}")


_COLLECTED = ("what the garbage collector runs (`__del__`)", "clean up in a `finally` block, or `async with`.")

_REFUSED = {
    "make it an activity and call it with `await activity.execute(...)`.": (
        "run_in_executor set_default_executor create_connection create_server create_unix_connection "
        "create_unix_server create_datagram_endpoint connect_accepted_socket sendfile start_tls connect_read_pipe "
        "connect_write_pipe subprocess_shell subprocess_exec add_reader remove_reader add_writer remove_writer "
        "sock_recv sock_recv_into sock_recvfrom sock_recvfrom_into sock_sendall sock_sendto sock_connect sock_accept "
        "sock_sendfile getaddrinfo getnameinfo"
    ),
    "send the run a signal instead.": "call_soon_threadsafe add_signal_handler remove_signal_handler",
    "the engine runs this loop: use `await`.": "run_forever run_until_complete stop close",
    "leave the loop as it is.": "set_task_factory set_exception_handler",
}


def _refuse(name: str, instead: str) -> Callable[..., Any]:
    def refuse(self: WorkflowLoop, *args: Any, **kwargs: Any) -> Any:
        raise _forbidden(f"{name}()", instead)

    refuse.__name__ = name
    return refuse


for _instead, _names in _REFUSED.items():
    for _name in _names.split():
        setattr(WorkflowLoop, _name, _refuse(_name, _instead))
