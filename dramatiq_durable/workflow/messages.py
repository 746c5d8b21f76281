"""What workflow code calls to be spoken to, and to speak to other runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..errors import InvalidDefinition
from .commands import send_cancel, send_signal
from .hints import remember_scope
from .names import check_name
from .primitives import require

F = TypeVar("F", bound=Callable[..., Any])


def on_signal(name: str) -> Callable[[F], F]:
    """Have signals of that name given to the decorated function, one after the other as they come::

        @durable.on_signal("item")
        def add(item: Item) -> None:
            items.append(item)

    Those that came before are given to it here, at once and in order (an ``async def`` begins when the code next
    awaits).  It takes the payload, typed by its annotation, or nothing; a payload that it does not take is logged and
    dropped.  A handler has precedence over ``wait_for_signal``; of two for one name the later counts.

    What escapes it fails the run.  The run does not wait for an ``async def`` that is still at work when its code ends:
    ``await durable.wait_condition(durable.all_handlers_finished)`` does.

    Raises:
      NotInWorkflow: outside of the body of a workflow.
      InvalidName: the name is empty, too long or no text.
    """
    execution = require("durable.on_signal()")
    _check_name(name, "on_signal", "a signal's name")

    def register(fn: F) -> F:
        remember_scope(fn, sys._getframe(1), execution.fn)
        execution.handlers.on_signal(name, fn)
        return fn

    return register


def on_query(name: str) -> Callable[[F], F]:
    """Answer queries of that name with what the decorated function returns::

        @durable.on_query("items")
        def count(kind: str) -> int:
            return sum(item.kind == kind for item in items)

    It is a plain function that only looks: commands, tasks and waking what waits are refused, and nothing of it enters
    the history.  Its arguments are positional, typed by its annotations.  It is called whenever somebody asks, also
    after the run has ended.

    Raises:
      NotInWorkflow: outside of the body of a workflow.
      InvalidName: the name is empty, too long or no text.
      InvalidDefinition: (of the decorated function) it is ``async def``.
    """
    execution = require("durable.on_query()")
    _check_name(name, "on_query", "a query's name")

    def register(fn: F) -> F:
        _check_plain(fn, f"the handler of the query {name!r}", "it only looks at the run; what awaits is an update")
        remember_scope(fn, sys._getframe(1), execution.fn)
        execution.handlers.on_query(name, fn)
        return fn

    return register


def on_update(name: str, *, validator: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Answer updates of that name with what the decorated function returns, or raises::

        def check(item: Item) -> None:
            if item.cents < 0:
                raise ValueError("a price is not negative")

        @durable.on_update("add", validator=check)
        async def add(item: Item) -> int:
            await reserve.execute(item.id)
            items.append(item)
            return len(items)

    It may change the run, call activities and wait.  Each update's handler is a task of its own, begun in the order in
    which the updates came.  An update that is still at work when the run's code ends is lost to its caller (who gets
    ``WorkflowClosed``): ``await durable.wait_condition(durable.all_handlers_finished)`` first.

    Parameters:
      validator: a plain function that is called with the same arguments first, and only looks; what it raises rejects
        the update, which then leaves no trace in the history.

    Raises:
      NotInWorkflow: outside of the body of a workflow.
      InvalidName: the name is empty, too long or no text.
      InvalidDefinition: the validator is ``async def``.
    """
    execution = require("durable.on_update()")
    _check_name(name, "on_update", "an update's name")
    if validator is not None:
        _check_plain(validator, f"the validator of the update {name!r}", "what awaits is for the handler")

    def register(fn: F) -> F:
        remember_scope(fn, sys._getframe(1), execution.fn)
        execution.handlers.on_update(name, fn, validator)
        return fn

    return register


def _check_name(name: Any, decorator: str, what: str) -> None:
    if callable(name):
        raise InvalidDefinition(f'@durable.{decorator} takes a name: write @durable.{decorator}("{name.__name__}").')
    check_name(name, what)


def _check_plain(fn: Any, what: str, instead: str) -> None:
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise InvalidDefinition(f"{what} is a plain function, not `async def`: {instead}.")


def all_handlers_finished() -> bool:
    """Return whether no handler of a signal or an update is at work; wait for it before the code ends::

    await durable.wait_condition(durable.all_handlers_finished)
    """
    return require("durable.all_handlers_finished()").handlers.all_finished


def signal_workflow(workflow_id: str, name: str, payload: Any = None) -> Coroutine[Any, Any, None]:
    """Send another run a signal; it is sent with this step, once, whether it is awaited or not.

    Parameters:
      workflow_id(str): the live run that has this id, on any stream that this run's worker may use.
      name(str), payload: as for a handle's ``signal``.

    Raises:
      WorkflowNotFound: (when awaited) there is none, or the worker's login may not see it.
      WorkflowClosed: (when awaited) it has ended.
      NotEncodable, PayloadTooLarge, InvalidName: the signal cannot be carried.
    """
    execution = require("durable.signal_workflow()")
    return send_signal(execution, check_name(workflow_id, "a workflow id"), None, name, payload)


def cancel_workflow(workflow_id: str) -> Coroutine[Any, Any, None]:
    """Ask another run to cancel itself; it is asked with this step, whether this is awaited or not.

    Raises:
      WorkflowNotFound: (when awaited) there is none, or the worker's login may not see it.
      WorkflowClosed: (when awaited) it has ended.
      InvalidName: the id is empty, too long or no text.
    """
    execution = require("durable.cancel_workflow()")
    check_name(workflow_id, "a workflow id")
    return send_cancel(execution, workflow_id)
