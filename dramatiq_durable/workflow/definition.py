"""The decorator ``@workflow``, and the objects that it makes.

Inside a workflow their ``execute`` and ``start`` issue commands; outside, a workflow is started through the client.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import dramatiq
from dramatiq import Broker, Message

from ..errors import ForbiddenInWorkflow, InvalidDefinition, NotConfigured
from . import guard
from .commands import ChildCall, ChildHandle, CommandFuture, StartChild
from .converter import decoders_of, encode_call, hash_arguments
from .decoders import Decoder
from .hints import declared_in, remember_scope
from .interceptors import CallContext, intercept
from .options import (
    RUN,
    WorkflowOptions,
    WorkflowOptionsGiven,
    check_call,
    check_headers,
    check_name,
    check_queue_name,
)
from .primitives import require
from .replay import Execution, current

if TYPE_CHECKING:
    from types import EllipsisType

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


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

    def send_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: int | timedelta | None = None,
        **options: Any,
    ) -> StartedRun[R]:
        """Start a run with options, as Dramatiq's callers know it; not for use inside a workflow.

        Parameters:
          args(tuple), kwargs(dict | None): the workflow's arguments.
          delay(int | timedelta | None): milliseconds to wait before the first step.
          **options: as for ``options``, e.g. ``workflow_id``.

        Raises:
          TypeError: there is no such option; those of Dramatiq's messages (``max_retries``, ...) mean nothing to a run.
          as ``start``.
        """
        self._refuse_in_workflow("send_with_options")
        return self._with(delay, options).start(*args, **(kwargs or {}))

    async def asend_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        delay: int | timedelta | None = None,
        **options: Any,
    ) -> StartedRun[R]:
        """`send_with_options`, for async code."""
        self._refuse_in_workflow("asend_with_options")
        return await self._with(delay, options).astart(*args, **(kwargs or {}))

    def message(self, *args: P.args, **kwargs: P.kwargs) -> Message[R]:
        """A message that starts a run, to be a member of a group or a pipeline; otherwise use ``send``.

        A worker that has it starts the run, and is done with it; what comes next in a pipeline is not given the run's
        result.  The run's workflow id is the message's id, if no other is chosen.
        """
        return self.message_with_options(args=args, kwargs=kwargs)

    def message_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        pipe_ignore: bool = False,
        **options: Any,
    ) -> Message[R]:
        """`message`, with options.

        Parameters:
          args(tuple), kwargs(dict | None): the workflow's arguments.
          pipe_ignore(bool): in a pipeline, do not add the result of what comes before to the arguments.
          **options: as for ``options``, e.g. ``workflow_id``; but not ``with_signal`` and ``with_update``.

        Raises:
          TypeError: there is no such option.
          ValueError: an option's value makes no sense.
        """
        run = self._with(None, options).defaults.for_message()
        carried: dict[str, Any] = {RUN: run} if run else {}
        if pipe_ignore:
            carried["pipe_ignore"] = True
        return Message(self.queue_name, self.name, tuple(args), dict(kwargs or {}), carried)

    def _with(self, delay: int | timedelta | None, options: dict[str, Any]) -> Workflow[P, R]:
        given = options if delay is None else {**options, "delay": delay}
        return self.options(**cast(WorkflowOptionsGiven, given))

    async def astart(self, *args: P.args, **kwargs: P.kwargs) -> StartedRun[R]:
        """Start a run without blocking the caller's event loop; not for use inside a workflow."""
        self._refuse_in_workflow("astart")
        from . import client

        return cast("StartedRun[R]", await client.astart_run(self, args, kwargs, self.defaults))

    async def asend(self, *args: P.args, **kwargs: P.kwargs) -> StartedRun[R]:
        """`send`, for async code."""
        self._refuse_in_workflow("asend")
        return await self.astart(*args, **kwargs)

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
        remember_scope(fn, declared_in())
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
