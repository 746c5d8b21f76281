"""Ending an actor that runs in this process from outside, by an exception in its thread.

Such an exception comes up at some later moment, wherever the thread is by then.  It must not come up when the actor has
ended: it would hit the message's hooks, kill the thread, or abort the thread's next message.  So an actor's run has a
beginning and an end of its own, inside the ``try`` of Dramatiq's worker.  Nothing is raised before the one, and the
other takes back what was raised and has not come up.

The thread says first that it has ended, and looks then whether it was interrupted; who interrupts does it the other way
round: one of the two always sees the other, and the hundreds of thousands of runs that nobody interrupts pay no lock.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from dramatiq.threading import Interrupt, current_platform, is_gevent_active, raise_thread_exception

_GEVENT = is_gevent_active()

if _GEVENT:
    from gevent import get_hub, getcurrent

    _here: Any = getcurrent
else:
    _here = threading.get_ident

#: Held while an exception is being raised into a thread, and while a thread takes one back.
_raising = threading.Lock()


class Interruptible:
    """One run of an actor, which can be ended from another thread.

    Attributes:
      begun(float | None): when the actor began, by `time.monotonic`; None before.
      interruption(type[Interrupt] | None): what it was ended with; also when the actor has caught it, or was done.
    """

    begun: float | None = None
    interruption: type[Interrupt] | None = None
    _thread: Any = None
    #: Ends an actor that runs in an event loop: an exception in its thread would only hit whoever waits for it.
    _cancel: Callable[[], Any] | None = None
    _cancelled: bool = False

    def begin(self) -> None:
        """The actor is about to run, on this thread.  Raises what it was interrupted with before."""
        self._thread = _here()
        self.begun = time.monotonic()
        if self.interruption is not None:
            raise self.interruption

    def end(self) -> None:
        """The actor has ended.  From here on nothing is raised in this thread; and nothing is left to come up."""
        self._thread = self._cancel = None
        if self.interruption is not None and not _GEVENT:
            with _raising:
                _take_back()

    def runs_in(self, cancel: Callable[[], Any]) -> None:
        """The actor has begun in an event loop: from here on this ends it."""
        with _raising:
            if self.interruption is None:
                self._cancel = cancel

    def interrupted_in_loop(self) -> BaseException | None:
        """What an actor in an event loop is to see in place of its cancellation; None if nobody interrupted it here."""
        if self.interruption is None or self._cancel is None:
            return None
        self._cancelled = True
        return _in_loop(self.interruption)()

    def raise_again(self) -> None:
        """Raise what the running actor was interrupted with, if it was: it may have caught what was raised before."""
        if self.interruption is None:
            return
        if self._cancel is not None:
            # The first time it comes with the next `await`.
            if self._cancelled:
                raise _in_loop(self.interruption)
            return
        if _GEVENT:
            # What is to be thrown into this greenlet is raised here instead.
            self._thread = None
        else:
            with _raising:
                _take_back()
        raise self.interruption

    def interrupt(self, exception: type[Interrupt]) -> None:
        """End the actor with an exception: in its thread if it runs, or as soon as it begins.  Only once."""
        with _raising:
            if self.interruption is not None:
                return
            self.interruption = exception
            thread = self._thread
            if thread is None:
                return
            if self._cancel is not None:
                self._cancel()
            elif _GEVENT:
                get_hub().loop.run_callback(self._throw, thread, exception)
            else:
                raise_thread_exception(thread, exception)

    def _throw(self, greenlet: Any, exception: type[Interrupt]) -> None:
        # Greenlets take turns: between this look and the throw nothing else runs.
        if self._thread is greenlet:
            greenlet.throw(exception)


#: Interruptions that asyncio takes for a cancellation, as it does what they stand for.
_in_loop_kinds: dict[type[Interrupt], type[Interrupt]] = {}


def _in_loop(interruption: type[Interrupt]) -> type[Interrupt]:
    made = _in_loop_kinds.get(interruption)
    if made is None:
        names = {"__module__": interruption.__module__}
        made = cast(type[Interrupt], type(interruption.__name__, (interruption, asyncio.CancelledError), names))
        _in_loop_kinds[interruption] = made
    return made


def _take_back() -> None:
    """Forget what was raised in this thread and has not come up."""
    if current_platform == "CPython":
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)
