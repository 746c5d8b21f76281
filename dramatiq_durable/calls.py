"""Calling an actor for one delivery: it can be interrupted while it runs, and neither before nor after."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine, Generator
from typing import Any

from dramatiq import Actor
from dramatiq.asyncio import async_to_sync, get_event_loop_thread

from .delivery import Delivery
from .workflow.converter import typed


async def _nothing() -> None:
    pass


#: What Dramatiq makes of every ``async def`` actor.
_ASYNC = async_to_sync(_nothing).__code__


class Call:
    """An actor, for one delivery.

    An activity's arguments are given as the actor's annotations say, and its result is kept from Dramatiq, which would
    warn that nobody stores it.
    """

    def __init__(self, actor: Actor[Any, Any], delivery: Delivery) -> None:
        self._actor = actor
        self._delivery = delivery

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        delivery = self._delivery
        if delivery.kind != "a":
            try:
                delivery.begin()
                return self._actor(*args, **kwargs)
            finally:
                delivery.end()
        try:
            args, kwargs = typed(args, kwargs, self._actor.fn)
        except Exception as e:
            # They will not fit the next time either.
            delivery.hopeless = True
            e.add_note(f"while decoding the arguments of {delivery.actor_name!r}")
            raise
        try:
            delivery.begin()
            delivery.result = self._run(args, kwargs)
        finally:
            delivery.end()
        return None

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fn: Any = self._actor.fn
        thread = get_event_loop_thread()
        if thread is None or getattr(fn, "__code__", None) is not _ASYNC:
            return self._actor(*args, **kwargs)
        try:
            return thread.run_coroutine(_InLoop(fn.__wrapped__(*args, **kwargs), self._delivery))
        except concurrent.futures.CancelledError:
            if self._delivery.interruption is None:
                raise
            raise self._delivery.interruption from None

    @property
    def options(self) -> dict[str, Any]:
        """The actor's; an interruption, which somebody asked for, is an exception to be expected: no traceback."""
        options, interruption = self._actor.options, self._delivery.interruption
        if interruption is None:
            return options
        throws = options.get("throws") or ()
        return {**options, "throws": (*(throws if isinstance(throws, tuple) else (throws,)), interruption)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


class _InLoop:
    """An activity's coroutine, in the event loop of async actors: interrupted, its task is cancelled, and its code gets
    the interruption where it awaits.  What it does then is up to it, as in a thread."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], delivery: Delivery) -> None:
        self._coroutine = coroutine
        self._delivery = delivery

    def __await__(self) -> Generator[Any, Any, Any]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._delivery.runs_in(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            return (yield from self._driven())
        finally:
            self._coroutine.close()

    def _driven(self) -> Generator[Any, Any, Any]:
        raised: BaseException | None = None
        value: Any = None
        while True:
            try:
                waits_for = self._coroutine.send(value) if raised is None else self._coroutine.throw(raised)
            except StopIteration as e:
                return e.value
            raised = None
            try:
                value = yield waits_for
            except asyncio.CancelledError as e:
                raised = self._delivery.interrupted_in_loop() or e
            except BaseException as e:
                raised = e
