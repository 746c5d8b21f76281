"""The decorator ``@activity``, and the objects that it makes.

Inside a workflow their ``execute`` and ``start`` issue commands; outside, an activity is the Dramatiq actor it wraps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import dramatiq
from dramatiq import Actor, Broker, Message
from dramatiq.middleware import Retries

from .. import event_loop
from ..delivery import LIMITS
from ..durations import Duration
from ..errors import ForbiddenInWorkflow, NotInWorkflow
from .commands import ActivityCall, ActivityHandle, Cancellation, ScheduleActivity
from .converter import decoders_of, encode_call, hash_arguments
from .decoders import Decoder
from .definition import global_broker
from .hints import declared_in, remember_scope
from .interceptors import CallContext, intercept
from .local import run_locally
from .options import (
    ActivityOptions,
    Dispatch,
    check_call,
    check_headers,
    check_name,
    check_queue_name,
    check_retries,
    milliseconds,
)
from .replay import Execution, current
from .retry import RetryPolicy

if TYPE_CHECKING:
    from types import EllipsisType

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class _Schedulable(Generic[P, R]):
    """What activities and their stubs have in common: they can be scheduled by a workflow."""

    actor_name: str
    _dispatch: Dispatch
    _decoder: Decoder | EllipsisType | None

    def _function(self) -> Callable[..., Any] | None:
        return None

    def execute(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run the activity and wait for its result; the command is issued at the call.

        Raises:
          ActivityFailed: (when awaited) it failed for good.
          asyncio.CancelledError: (when awaited) what awaits it was cancelled.
          NotEncodable, PayloadTooLarge: an argument cannot be carried.
          NotInWorkflow: outside a workflow; there, use ``send``.
        """
        return cast(Coroutine[Any, Any, R], self._schedule(ActivityCall, args, kwargs))

    def start(self, *args: P.args, **kwargs: P.kwargs) -> ActivityHandle[R]:
        """Run the activity; the handle that is returned at once may be awaited or cancelled.

        Raises:
          as ``execute``.
        """
        return cast("ActivityHandle[R]", self._schedule(ActivityHandle, args, kwargs))

    def _schedule(self, kind: type[ActivityHandle[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        execution = current()
        if execution is None:
            raise NotInWorkflow(
                f"{self.actor_name}.execute() and .start() only work inside a workflow: elsewhere use "
                f"{self.actor_name}.send(...), or call it from the body of a @durable.workflow."
            )
        check_call(self._function(), self.actor_name, args, kwargs)
        methods = execution.interceptors.activity
        if not methods:
            return self._issue(execution, kind, args, kwargs, execution.headers)
        headers = {**execution.headers, **self._dispatch.message.get("headers", {})}
        return intercept(
            execution,
            methods,
            CallContext(self.actor_name, args, kwargs, headers, execution.info),
            kind,
            lambda ctx: self._issue(execution, kind, ctx.args, ctx.kwargs, ctx.headers, intercepted=True),
        )

    def _issue(
        self,
        execution: Execution,
        kind: type[ActivityHandle[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: dict[str, Any],
        intercepted: bool = False,
    ) -> ActivityHandle[Any]:
        dispatch = self._dispatch
        options = self._message_options()
        if intercepted:
            check_call(self._function(), self.actor_name, args, kwargs)
            options = {**options, "headers": check_headers(self.actor_name, headers)}
        elif headers:
            given = {**headers, **options.get("headers", {})}
            # Interceptors of the run may have put anything into them.
            options = {
                **options,
                "headers": check_headers(self.actor_name, given) if execution.interceptors.workflow else given,
            }
        payload = encode_call(args, kwargs, self._function(), self.actor_name)
        if dispatch.local:
            return cast(
                "ActivityHandle[Any]",
                run_locally(self, dispatch, kind is ActivityHandle, payload, options.get("headers") or {}),
            )
        command = ScheduleActivity(
            None,
            self.actor_name,
            payload,
            hash_arguments(payload),
            dispatch.queue_name,
            args,
            kwargs,
            options,
            dispatch.priority,
            dispatch.delay_ms,
        )
        seq = execution.issue(command)
        decoder = self._decoder
        if decoder is ...:
            fn = self._function()
            decoder = self._decoder = None if fn is None else decoders_of(fn).result
        future = kind(execution, command, dispatch.policy, decoder)
        execution.expect(seq, future)
        return future

    def _actor_options(self) -> Mapping[str, Any]:
        return {}

    def _message_options(self) -> dict[str, Any]:
        """The options of the activity's message: as the dispatch says, and its limits."""
        dispatch = self._dispatch
        if not dispatch.limits:
            return dispatch.message
        policy = dispatch.retries(self._actor_options())
        tried = {name: policy[name] for name in ("initial", "coefficient", "maximum", "attempts")}
        return {**dispatch.message, LIMITS: {**dispatch.limits, "retry": tried}}

    def _refuse_in_workflow(self, verb: str) -> None:
        if current() is not None:
            raise ForbiddenInWorkflow(
                f"{self.actor_name}{verb} cannot be replayed, and is refused inside a workflow: "
                f"use `await {self.actor_name}.execute(...)`."
            )


class _OptionsOf(dict[str, Any], Generic[P, R]):
    """An actor's options, as Dramatiq has them; called, it makes a copy of the activity with other options."""

    def __init__(self, activity: Activity[P, R]) -> None:
        super().__init__(activity.actor.options)
        self._activity = activity

    def __call__(self, **options: Unpack[ActivityOptions]) -> Activity[P, R]:
        """Return a copy of the activity with other options.

        Raises:
          TypeError: there is no such option.
          ValueError: an option's value makes no sense.
        """
        return self._activity._with(options)


class Activity(Actor[P, R], _Schedulable[P, R]):
    """A Dramatiq actor that workflows can run: everything an actor does, and ``execute``, ``start``, ``options(...)``.

    Attributes:
      actor(Actor): the actor behind it, which the broker knows.
    """

    actor: Actor[P, R]

    def __init__(self, actor: Actor[P, R], dispatch: Dispatch | None = None) -> None:
        # No super().__init__: that would declare a second actor.
        self.__dict__.update({name: value for name, value in vars(actor).items() if name != "options"})
        self.actor = actor
        check_name(actor.actor_name, "an activity's name")
        self._dispatch = dispatch or Dispatch(actor.queue_name, {})
        self._decoder = ...
        functools.update_wrapper(self, actor.fn, updated=())

    @property
    def options(self) -> _OptionsOf[P, R]:  # type: ignore[override]
        return _OptionsOf(self)

    def _with(self, options: Mapping[str, Any]) -> Activity[P, R]:
        return Activity(self.actor, self._dispatch.updated(self.actor_name, options))

    def _function(self) -> Callable[..., Any]:
        return self.actor.fn

    def _actor_options(self) -> Mapping[str, Any]:
        defaults = {}
        for middleware in self.actor.broker.middleware:
            if isinstance(middleware, Retries):
                defaults = {
                    "max_retries": middleware.max_retries,
                    "min_backoff": middleware.min_backoff,
                    "max_backoff": middleware.max_backoff,
                }
        return {**defaults, **self.actor.options}

    def message_with_options(
        self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Message[R]:
        dispatch = self._dispatch
        message = self.actor.message_with_options(args=args, kwargs=kwargs, **{**dispatch.message, **options})
        if dispatch.queue_name != message.queue_name:
            message = message.copy(queue_name=dispatch.queue_name)
        return message

    def send_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: timedelta | int | None = None,
        **options: Any,
    ) -> Message[R]:
        self._refuse_in_workflow(".send()")
        dispatch = self._dispatch
        if delay is None and dispatch.delay_ms:
            delay = dispatch.delay_ms
        if dispatch.queue_name == self.actor.queue_name:
            return self.actor.send_with_options(
                args=args, kwargs=kwargs, delay=delay, **{**dispatch.message, **options}
            )
        message = self.message_with_options(args=args, kwargs=kwargs, **options)
        return self.broker.enqueue(message, delay=None if delay is None else milliseconds("delay", delay))

    async def asend(self, *args: P.args, **kwargs: P.kwargs) -> Message[R]:
        """Send a message without blocking the caller's event loop; otherwise as ``send``."""
        return await self.asend_with_options(args=args, kwargs=kwargs)

    async def asend_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: timedelta | int | None = None,
        **options: Any,
    ) -> Message[R]:
        """Send a message without blocking the caller's event loop; otherwise as ``send_with_options``."""
        from ..using import sending

        self._refuse_in_workflow(".asend()")
        return await sending(lambda: self.send_with_options(args=args, kwargs=kwargs, delay=delay, **options))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        self._refuse_in_workflow("(...)")
        return self.actor(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Activity({self.actor.fn!r}, queue_name={self.queue_name!r}, actor_name={self.actor_name!r})"

    def __str__(self) -> str:
        return f"Activity({self.actor_name})"


class ActivityStub(_Schedulable[..., Any]):
    """An activity whose code lives in another codebase: only its name and its stream are known here."""

    def __init__(self, name: str, queue_name: str = "default", dispatch: Dispatch | None = None) -> None:
        self.actor_name = check_name(name, "an activity's name")
        self.queue_name = check_queue_name(queue_name)
        self._dispatch = dispatch or Dispatch(queue_name, {})
        self._decoder = None

    def options(self, **options: Unpack[ActivityOptions]) -> ActivityStub:
        """Return a copy with other options; raises as ``Activity.options``."""
        if options.get("local"):
            raise ValueError(
                f"{self.actor_name!r} is a stub: its code is elsewhere, and cannot be run with local=True."
            )
        return ActivityStub(self.actor_name, self.queue_name, self._dispatch.updated(self.actor_name, options))

    def send(self, *args: Any, **kwargs: Any) -> Message[Any]:
        """Enqueue a message on the global broker; somebody else's worker runs it."""
        self._refuse_in_workflow(".send()")
        dispatch = self._dispatch
        message: Message[Any] = Message(
            queue_name=dispatch.queue_name,
            actor_name=self.actor_name,
            args=args,
            kwargs=kwargs,
            options=dict(dispatch.message),
        )
        return global_broker().enqueue(message, delay=dispatch.delay_ms or None)

    async def asend(self, *args: Any, **kwargs: Any) -> Message[Any]:
        """Enqueue a message without blocking the caller's event loop; otherwise as ``send``."""
        from ..using import sending

        self._refuse_in_workflow(".asend()")
        return await sending(lambda: self.send(*args, **kwargs))

    def __repr__(self) -> str:
        return f"ActivityStub({self.actor_name!r}, queue_name={self.queue_name!r})"


def activity_stub(name: str, *, queue_name: str = "default") -> ActivityStub:
    """Return an activity that lives in another codebase.

    Raises:
      InvalidName: the name or queue name is empty, too long or malformed.
    """
    return ActivityStub(name, queue_name)


class _ActivityDecorator(Protocol):
    @overload
    def __call__(self, fn: Callable[P, Awaitable[R]]) -> Activity[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R]) -> Activity[P, R]: ...


@overload
def activity(fn: Actor[P, R]) -> Activity[P, R]: ...
@overload
def activity(fn: Callable[P, Awaitable[R]]) -> Activity[P, R]: ...
@overload
def activity(fn: Callable[P, R]) -> Activity[P, R]: ...
@overload
def activity(
    *,
    queue_name: str = "default",
    actor_name: str | None = None,
    priority: int = 0,
    broker: Broker | None = None,
    delay: int | timedelta = 0,
    cancellation: Cancellation = "try",
    retry: RetryPolicy | None = None,
    start_to_close: Duration | None = None,
    schedule_to_start: Duration | None = None,
    schedule_to_close: Duration | None = None,
    heartbeat: Duration | None = None,
    **options: Any,
) -> _ActivityDecorator: ...


def activity(
    fn: Any = None,
    *,
    queue_name: str = "default",
    actor_name: str | None = None,
    priority: int = 0,
    broker: Broker | None = None,
    delay: int | timedelta = 0,
    cancellation: Cancellation = "try",
    retry: RetryPolicy | None = None,
    start_to_close: Duration | None = None,
    schedule_to_start: Duration | None = None,
    schedule_to_close: Duration | None = None,
    heartbeat: Duration | None = None,
    **options: Any,
) -> Any:
    """Declare an activity, or adapt an actor that is declared elsewhere: ``activity(existing_actor)``.

    Parameters:
      queue_name, actor_name, priority, broker, **options: as in ``dramatiq.actor``.
      delay: milliseconds or a timedelta that a workflow's calls wait before the first attempt.
      cancellation, retry, start_to_close, schedule_to_start, schedule_to_close, heartbeat: see ``ActivityOptions``.

    Returns:
      Activity

    Raises:
      InvalidName: a name is empty, too long or malformed.
      ValueError: an option is unknown to the broker's middleware, or makes no sense.
    """
    given = {
        "delay": delay or None,
        "cancellation": None if cancellation == "try" else cancellation,
        "retry": retry,
        "start_to_close": start_to_close,
        "schedule_to_start": schedule_to_start,
        "schedule_to_close": schedule_to_close,
        "heartbeat": heartbeat,
    }
    ours = {name: value for name, value in given.items() if value is not None}

    def decorate(fn: Any) -> Activity[Any, Any]:
        if isinstance(fn, Activity):
            return fn
        remember_scope(fn.fn if isinstance(fn, Actor) else fn, declared_in())
        if not isinstance(fn, Actor):
            check_retries(actor_name or fn.__name__, {**options, **ours})
            check_name(actor_name or fn.__name__, "an activity's name")
            check_queue_name(queue_name)
            target = broker if broker is not None else global_broker()
            fn = dramatiq.actor(
                actor_name=actor_name, queue_name=queue_name, priority=priority, broker=target, **options
            )(fn)
        if inspect.iscoroutinefunction(inspect.unwrap(fn.fn)):
            event_loop.provide(fn.broker)
        made: Activity[Any, Any] = Activity(fn)
        return made._with(ours) if ours else made

    return decorate if fn is None else decorate(fn)
