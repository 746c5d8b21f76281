"""What an application puts around its workflows, and around what they ask for.

Interceptors are part of the workflow's code: they run in its event loop, are replayed with it, and may call activities.
Around an activity's function, on the worker, there is Dramatiq's middleware.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import DurableError
from .commands.base import Answer, Call, Command, CommandFuture
from .eager import begin
from .info import Info

if TYPE_CHECKING:
    from .replay import Execution

T = TypeVar("T")


@dataclass(slots=True)
class CallContext:
    """What is being called: a workflow's code by the engine, or something else by a workflow's code.

    Attributes:
      name(str): of the workflow, the activity, the child's workflow or the signal.
      args(tuple), kwargs(dict): the arguments; may be set.
      headers(dict): JSON values that travel beside the arguments; may be set.  Those of a run are passed on to its
        activities (``activity_info().headers``) and children (``info().headers``).
      info(Info): the run whose code calls, or is called.
      workflow_id(str | None): of the child, where it was given one, or of the run that is signalled.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    headers: dict[str, Any]
    info: Info
    workflow_id: str | None = None


class CallNext(Protocol):
    """Goes on with the call: ``await call_next(ctx)``; without an argument, with the context that came in."""

    def __call__(self, ctx: CallContext | None = None, /) -> Awaitable[Any]: ...


class WorkflowInterceptor:
    """Base of interceptors: override what is to be intercepted, and give the broker one, or many, the outermost first.

    A method may change what it is given, call on, not at all or again, and change the outcome.  It is workflow code: it
    must be deterministic, has the same primitives, and may call activities on any stream.  What ``execute_activity``,
    ``execute_child`` or ``signal`` itself calls is seen by the interceptors further in, and by no other.
    """

    async def execute_workflow(self, ctx: CallContext, call_next: CallNext) -> Any:
        """Around the code of a run."""
        return await call_next(ctx)

    async def execute_activity(self, ctx: CallContext, call_next: CallNext) -> Any:
        """Around an activity that a workflow's code runs, by ``execute`` or ``start``."""
        return await call_next(ctx)

    async def execute_child(self, ctx: CallContext, call_next: CallNext) -> Any:
        """Around a child workflow, from its start to its outcome."""
        return await call_next(ctx)

    async def signal(self, ctx: CallContext, call_next: CallNext) -> Any:
        """Around a signal to another run; ``ctx.args`` has its payload."""
        return await call_next(ctx)


Method = Callable[[CallContext, CallNext], Coroutine[Any, Any, Any]]
#: The methods of one kind that are really there, each with its interceptor's place in the order.
Methods = list[tuple[int, Method]]


class Interceptors:
    """The interceptors of a broker, outermost first; a kind of call that none of them is interested in costs nothing.

    Raises:
      TypeError: something given is no WorkflowInterceptor.
    """

    __slots__ = ("activity", "child", "signal", "workflow")

    def __init__(self, given: Sequence[Any] = ()) -> None:
        for interceptor in given:
            if not isinstance(interceptor, WorkflowInterceptor):
                hint = ": make one, with ()" if isinstance(interceptor, type) else ""
                raise TypeError(f"an interceptor is a WorkflowInterceptor, not {interceptor!r}{hint}")
        self.workflow = _methods(given, "execute_workflow")
        self.activity = _methods(given, "execute_activity")
        self.child = _methods(given, "execute_child")
        self.signal = _methods(given, "signal")


def _methods(given: Sequence[WorkflowInterceptor], name: str) -> Methods:
    return [
        (place, getattr(interceptor, name))
        for place, interceptor in enumerate(given)
        if getattr(type(interceptor), name) is not getattr(WorkflowInterceptor, name)
    ]


#: Of the calls that are made here, those interceptors hear that have this place or a later one.
_heard_from: contextvars.ContextVar[int] = contextvars.ContextVar("heard_from", default=0)


async def through(methods: Methods, ctx: CallContext, last: Callable[[CallContext], Awaitable[Any]]) -> Any:
    """Pass a call into a run through these interceptors."""
    if not methods:
        return await last(ctx)
    (_, method), rest = methods[0], methods[1:]

    def call_next(given: CallContext | None = None, /) -> Awaitable[Any]:
        return through(rest, ctx if given is None else given, last)

    return await method(ctx, call_next)


async def _out(methods: Methods, ctx: CallContext, last: Callable[[CallContext], Awaitable[Any]]) -> Any:
    """Pass a call out of a run through these interceptors."""
    if not methods:
        return await last(ctx)
    (place, method), rest = methods[0], methods[1:]

    def call_next(given: CallContext | None = None, /) -> Awaitable[Any]:
        return _out(rest, ctx if given is None else given, last)

    token = _heard_from.set(place + 1)
    try:
        return await method(ctx, call_next)
    finally:
        with contextlib.suppress(ValueError):  # the run is dropped from memory, outside of this context
            _heard_from.reset(token)


def intercept(
    execution: Execution,
    methods: Methods,
    ctx: CallContext,
    kind: type[CommandFuture[T]],
    issue: Callable[[CallContext], CommandFuture[T]],
) -> CommandFuture[T]:
    """Pass a command through interceptors; what they do before they first wait, is done at the call.

    Parameters:
      methods: those of ``execution.interceptors`` for this kind of call.
      kind: of the command's own future: for a `Call` the caller gets one, else a mere future.
      issue: issues the command as the context says, and returns its future.
    """
    heard = [method for method in methods if method[0] >= _heard_from.get()]
    if not heard:
        return issue(ctx)
    given: type[Intercepted[T]] = InterceptedCall if issubclass(kind, Call) else Intercepted
    return given(execution, heard, ctx, issue)


class Intercepted(CommandFuture[T]):
    """A call that goes through interceptors; its outcome is that of the outermost.

    It has the attributes of the command's own future (a child's ids, its ``signal``), as soon as the interceptors have
    issued the command.
    """

    __slots__ = ("_inner", "_issued", "_task")

    def __init__(
        self,
        execution: Execution,
        methods: Methods,
        ctx: CallContext,
        issue: Callable[[CallContext], CommandFuture[T]],
    ) -> None:
        super().__init__(execution, Command(name=ctx.name))
        self._inner: Any = None
        self._issued: asyncio.Future[None] = execution.loop.create_future()

        async def last(ctx: CallContext) -> T:
            inner = self._inner = issue(ctx)
            if not self._issued.done():
                self._issued.set_result(None)
            return await inner

        self._task = begin(execution.loop, _out(methods, ctx, last))
        self._task.add_done_callback(self._end)

    def cancel(self, msg: Any | None = None) -> Answer:  # type: ignore[override]
        """Cancel the call: the interceptors get a CancelledError, the command is cancelled by its policy."""
        if self.done() or self.host.loop.evicting:
            return Answer(False)
        return Answer(self._task.cancel(msg))

    async def started(self) -> Any:
        """Wait until the interceptors have started the child, and it has started."""
        await self._known()
        return None if self._inner is None else await self._inner.started()

    async def signal(self, *args: Any, **kwargs: Any) -> Any:
        """Signal the child, once the interceptors have started it."""
        await self._known()
        return await self._own("signal")(*args, **kwargs)

    async def _known(self) -> None:
        if self._inner is None:
            await asyncio.shield(self._issued)

    def _own(self, name: str) -> Any:
        if self._inner is None:
            raise DurableError(
                f"{self.command.name!r} has no {name} yet: its interceptors wait for something before they call on"
            )
        return getattr(self._inner, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._own(name)

    def _end(self, task: asyncio.Task[T]) -> None:
        if not self._issued.done():
            self._issued.set_result(None)
        if self.done():
            return
        if task.cancelled():
            self._end_cancelled()
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())


class InterceptedCall(Call[T], Intercepted[T]):
    """``await ....execute(...)`` where interceptors are."""

    __slots__ = ()
