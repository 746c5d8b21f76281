"""Ending an actor that runs in this process from outside, by an exception in its thread.

Such an exception comes up at some later moment, wherever the thread is by then.  It must not come up when the actor has
ended: it would hit the message's hooks, kill the thread, or abort the thread's next message.  So an actor's run has a
beginning and an end of its own, inside the ``try`` of Dramatiq's worker.  Nothing is raised before the one, and the
other takes back what was raised and has not come up.

The thread says first that it has ended, and looks then whether it was interrupted; who interrupts does it the other way
round: one of the two always sees the other, and the hundreds of thousands of runs that nobody interrupts pay no lock.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

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

    def begin(self) -> None:
        """The actor is about to run, on this thread.  Raises what it was interrupted with before."""
        self._thread = _here()
        self.begun = time.monotonic()
        if self.interruption is not None:
            raise self.interruption

    def end(self) -> None:
        """The actor has ended.  From here on nothing is raised in this thread; and nothing is left to come up."""
        self._thread = None
        if self.interruption is not None and not _GEVENT:
            with _raising:
                _take_back()

    def interrupt(self, exception: type[Interrupt]) -> None:
        """End the actor with an exception: in its thread if it runs, or as soon as it begins.  Only once."""
        with _raising:
            if self.interruption is not None:
                return
            self.interruption = exception
            thread = self._thread
            if thread is None:
                return
            if _GEVENT:
                get_hub().loop.run_callback(self._throw, thread, exception)
            else:
                raise_thread_exception(thread, exception)

    def _throw(self, greenlet: Any, exception: type[Interrupt]) -> None:
        # Greenlets take turns: between this look and the throw nothing else runs.
        if self._thread is greenlet:
            greenlet.throw(exception)


def _take_back() -> None:
    """Forget what was raised in this thread and has not come up."""
    if current_platform == "CPython":
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)
