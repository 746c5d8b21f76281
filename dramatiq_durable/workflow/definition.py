"""The decorators: ``@workflow`` and ``@activity``, and the objects that they make.

Inside a workflow their ``execute`` and ``start`` issue commands; outside, an activity is the Dramatiq actor it wraps,
and a workflow is started through the client.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import dramatiq
from dramatiq import Actor, Broker, Message
from dramatiq.middleware import Retries

from ..delivery import LIMITS
from ..durations import Duration
from ..errors import ForbiddenInWorkflow, InvalidDefinition, NotConfigured, NotInWorkflow
from . import guard
from .commands import (
    ActivityCall,
    ActivityHandle,
    Cancellation,
    ChildCall,
    ChildHandle,
    CommandFuture,
    ScheduleActivity,
    StartChild,
)
from .converter import decoders_of, encode_call, hash_arguments
from .decoders import Decoder
from .hints import remember_scope
from .interceptors import CallContext, intercept
from .local import run_locally
from .options import (
    ActivityOptions,
    Dispatch,
    WorkflowOptions,
    WorkflowOptionsGiven,
    check_call,
    check_headers,
    check_name,
    check_queue_name,
    check_retries,
    milliseconds,
)
from .primitives import require
from .replay import Execution, current
from .retry import RetryPolicy

if TYPE_CHECKING:
    from types import EllipsisType

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


def _declared_in() -> FrameType | None:
    """Where the decorator is used."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is globals():
        frame = frame.f_back
    return frame


# --- activities ----------------------------------------------------------------------------------------
def global_broker() -> Broker:
    """Dramatiq's global broker.

    Raises:
      NotConfigured: none is set.  Dramatiq then makes one for RabbitMQ or Redis; where neither is installed, it would
        complain of that, which is not what is missing.
    """
    try:
        return dramatiq.get_broker()
    except ImportError:
        raise NotConfigured(
            "no broker is set: call dramatiq.set_broker(durable.DurableBroker()) before the actors, activities and "
            "workflows are declared, and before their modules are imported."
        ) from None


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
                run_locally(self, dispatch, kind is ActivityHandle, payload, options.get("headers", {})),
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
        remember_scope(fn.fn if isinstance(fn, Actor) else fn, _declared_in())
        if not isinstance(fn, Actor):
            check_retries(actor_name or fn.__name__, {**options, **ours})
            check_name(actor_name or fn.__name__, "an activity's name")
            check_queue_name(queue_name)
            target = broker if broker is not None else global_broker()
            fn = dramatiq.actor(
                actor_name=actor_name, queue_name=queue_name, priority=priority, broker=target, **options
            )(fn)
        made: Activity[Any, Any] = Activity(fn)
        return made._with(ours) if ours else made

    return decorate if fn is None else decorate(fn)


# --- workflows -----------------------------------------------------------------------------------------
class StartedRun(Protocol[R_co]):
    """What ``workflow.start`` returns: a child's handle inside a workflow, a client's handle outside."""

    @property
    def workflow_id(self) -> str: ...

    @property
    def run_id(self) -> str: ...

    def cancel(self) -> Any: ...

    def __await__(self) -> Generator[Any, Any, R_co]:
        """Inside a workflow: wait for the result."""
        ...

    def result(self, timeout: Any = None) -> R_co:
        """Outside: wait for the result."""
        ...

    def __getattr__(self, name: str) -> Any: ...


class Workflow(Generic[P, R]):
    """A workflow's definition.

    Attributes:
      fn: the ``async def``.  ``name(str)``, ``queue_name(str)``, ``broker``.
      defaults(WorkflowOptions): what ``start`` uses.
    """

    def __init__(
        self,
        fn: Callable[P, Coroutine[Any, Any, R]],
        *,
        name: str,
        queue_name: str,
        broker: Any,
        defaults: WorkflowOptions,
    ) -> None:
        self.fn = fn
        self.name = name
        self.queue_name = queue_name
        self.broker = broker
        self.defaults = defaults
        self._decoder: Decoder | EllipsisType | None = ...
        functools.update_wrapper(cast(Any, self), fn, updated=())

    def options(self, **options: Unpack[WorkflowOptionsGiven]) -> Workflow[P, R]:
        """Return a copy with other options.

        Raises:
          TypeError: there is no such option.
          ValueError: an option's value makes no sense.
        """
        defaults = self.defaults.updated(self.name, options)
        return Workflow(self.fn, name=self.name, queue_name=self.queue_name, broker=self.broker, defaults=defaults)

    def execute(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run it as a child workflow and wait for its result; the command is issued at the call.

        Raises:
          ChildWorkflowFailed: (when awaited) it failed, was cancelled, was terminated or ran out of time.
          WorkflowAlreadyStarted: (when awaited) its id is taken.
          NotEncodable, PayloadTooLarge: an argument cannot be carried.
          NotInWorkflow: outside a workflow; there, use ``start(...).result()``.
        """
        execution = require(f"{self.name}.execute()")
        return cast(Coroutine[Any, Any, R], self._start_child(execution, ChildCall, args, kwargs))

    def start(self, *args: P.args, **kwargs: P.kwargs) -> StartedRun[R]:
        """Start a run.  Inside a workflow it is a child, and the handle is returned at once.

        Returns:
          A handle: ``await`` it inside a workflow, call its ``result()`` outside.
        """
        execution = current()
        if execution is not None:
            return cast("StartedRun[R]", self._start_child(execution, ChildHandle, args, kwargs))
        from . import client

        return cast("StartedRun[R]", client.start_run(self, args, kwargs, self.defaults))

    def send(self, *args: P.args, **kwargs: P.kwargs) -> StartedRun[R]:
        """Start a run: Dramatiq's verb, so that no caller has to change; not for use inside a workflow."""
        self._refuse_in_workflow("send")
        return self.start(*args, **kwargs)

    async def astart(self, *args: P.args, **kwargs: P.kwargs) -> StartedRun[R]:
        """Start a run without blocking the caller's event loop; not for use inside a workflow."""
        self._refuse_in_workflow("astart")
        from . import client

        return cast("StartedRun[R]", await client.astart_run(self, args, kwargs, self.defaults))

    def _refuse_in_workflow(self, verb: str) -> None:
        if current() is not None:
            raise ForbiddenInWorkflow(
                f"{self.name}.{verb}() cannot be replayed, and is refused inside a workflow: "
                f"use `await {self.name}.execute(...)`, or `{self.name}.start(...)` for a handle."
            )

    def _start_child(
        self, execution: Execution, kind: type[ChildHandle[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CommandFuture[Any]:
        headers = {**execution.headers, **(self.defaults.headers or {})}
        methods = execution.interceptors.child
        if not methods:
            return self._issue_child(execution, kind, args, kwargs, headers)
        check_call(self.fn, self.name, args, kwargs)
        return intercept(
            execution,
            methods,
            CallContext(self.name, args, kwargs, headers, execution.info, self.defaults.workflow_id),
            kind,
            lambda ctx: self._issue_child(execution, kind, ctx.args, ctx.kwargs, ctx.headers),
        )

    def _issue_child(
        self,
        execution: Execution,
        kind: type[ChildHandle[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        headers: dict[str, Any],
    ) -> ChildHandle[Any]:
        check_call(self.fn, self.name, args, kwargs)
        payload = encode_call(args, kwargs, self.fn, self.name)
        options = self.defaults
        if headers or options.headers:
            options = replace(options, headers=check_headers(self.name, headers) or None)
        command = StartChild(
            None,
            self.name,
            payload,
            hash_arguments(payload),
            self.queue_name,
            options=options.for_child(),
        )
        seq = execution.issue(command)
        workflow_id, command.run_id = execution.child_ids(seq)
        command.workflow_id = self.defaults.workflow_id or workflow_id
        if self._decoder is ...:
            self._decoder = decoders_of(self.fn).result
        future = kind(execution, command, self.defaults.cancellation, self._decoder)
        execution.expect(seq, future)
        return future

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function itself: inside another workflow, its code becomes a part of that one."""
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Workflow({self.fn!r}, name={self.name!r}, queue_name={self.queue_name!r})"


class _WorkflowDecorator(Protocol):
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]]) -> Workflow[P, R]: ...


@overload
def workflow(fn: Callable[P, Coroutine[Any, Any, R]]) -> Workflow[P, R]: ...
@overload
def workflow(
    *,
    queue_name: str = "default",
    name: str | None = None,
    broker: Any = None,
    **defaults: Unpack[WorkflowOptionsGiven],
) -> _WorkflowDecorator: ...


def workflow(
    fn: Any = None,
    *,
    queue_name: str = "default",
    name: str | None = None,
    broker: Any = None,
    **defaults: Unpack[WorkflowOptionsGiven],
) -> Any:
    """Declare a workflow: an ``async def`` whose awaits are durable.

    Parameters:
      queue_name(str): the stream of its workflow tasks.
      name(str | None): the function's name, if None.
      broker: a DurableBroker; Dramatiq's global one, if None.
      **defaults: options that ``start`` uses: see ``Workflow.options``.

    Returns:
      Workflow

    Raises:
      InvalidDefinition: the function is not ``async def``.
      InvalidName: a name is empty, too long or malformed.
      NotConfigured: the broker is no DurableBroker.
      TypeError, ValueError: an option is unknown or makes no sense.
    """

    guard.install()

    def decorate(fn: Any) -> Workflow[Any, Any]:
        if isinstance(fn, Workflow):
            return fn
        shown = getattr(fn, "__name__", None) or repr(fn)
        if not inspect.iscoroutinefunction(fn):
            raise InvalidDefinition(
                f"the workflow {shown} is not `async def`: write `async def {shown}(...)` and `await` what it calls; "
                "plain functions that do the work are activities (@durable.activity)."
            )
        remember_scope(fn, _declared_in())
        chosen = name or shown
        check_name(chosen, "a workflow's name")
        check_queue_name(queue_name)
        options = WorkflowOptions().updated(chosen, defaults)
        target = broker if broker is not None else global_broker()
        declare = getattr(target, "declare_workflow", None)
        if declare is None:
            raise NotConfigured(
                f"the workflow {chosen!r} needs a DurableBroker, and the broker is a {type(target).__name__}: set one "
                'before the workflow is declared, dramatiq.set_broker(durable.DurableBroker("postgresql://...")).'
            )
        made: Workflow[Any, Any] = Workflow(fn, name=chosen, queue_name=queue_name, broker=target, defaults=options)
        declare(made)
        return made

    return decorate if fn is None else decorate(fn)


def workflow_stub(name: str, *, queue_name: str = "default", broker: Any = None) -> Workflow[..., Any]:
    """Return a workflow whose code lives in another codebase: it can be started, also as a child, but not run here.

    Parameters:
      name(str), queue_name(str): as it is declared there.
      broker: a DurableBroker; Dramatiq's global one, if None.

    Raises:
      InvalidName: the name or queue name is empty, too long or malformed.
    """
    check_name(name, "a workflow's name")
    check_queue_name(queue_name)

    async def elsewhere(*args: Any, **kwargs: Any) -> Any:
        raise NotConfigured(
            f"the code of the workflow {name!r} is not here: start it, and a worker that has it runs it."
        )

    target = broker if broker is not None else global_broker()
    return Workflow(elsewhere, name=name, queue_name=queue_name, broker=target, defaults=WorkflowOptions())
