"""Continue-as-new: a run ends, and a new one with an empty history goes on in its place."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ..errors import ForbiddenInWorkflow
from .commands import ContinueAsNew
from .commands.closing import ContinueAsNewRequested
from .converter import encode_call, hash_arguments
from .info import STATE_FACTS
from .options import WorkflowOptions, check_call, check_options
from .primitives import require

#: What the new run may be given anew; everything else stays as it is.
_OPTIONS = ("memo", "search", "run_timeout", "retry", "delay")

#: Facts of a run that are not handed on: they are about that very run.
_OWN = ("attempt", "origin", "previous")


def continue_as_new(*args: Any, **options: Any) -> NoReturn:
    """End this run, and have a new one go on with these arguments: same workflow id, an empty history.

    Memo, search attributes, the entity, headers, the time limits and the parent stay as they are; the deadline of
    ``execution_timeout`` is that of the first run, and the output goes on where this run's ends.  Signals that nobody
    has read are given to the new run, in order.  Activities and timers of this run are dropped, its children are
    treated as their ``parent_close`` says.

    Parameters:
      *args: the workflow's arguments in the new run.
      **options: ``memo``, ``search``, ``run_timeout``, ``retry``, ``delay``: other ones for the new run.

    Raises:
      ForbiddenInWorkflow: called elsewhere than in the workflow's own coroutine, e.g. in a handler or another task.
      TypeError, ValueError: the workflow does not take these arguments, or there is no such option.
      NotEncodable, PayloadTooLarge: an argument cannot be carried.
      a control exception, a BaseException: it has to leave the workflow's coroutine; ``finally`` blocks may await.
    """
    execution = require("durable.continue_as_new()")
    if not execution.is_in_main():
        raise ForbiddenInWorkflow(
            "continue_as_new() only works in the workflow's own coroutine: have the handler or task tell it, for "
            "example by a variable that the workflow waits for with durable.wait_condition()."
        )
    info = execution.info
    check_options("continue_as_new()", options, _OPTIONS)
    checked = WorkflowOptions().updated(info.name, options)
    check_call(execution.fn, info.name, args, {})
    payload = encode_call(args, {}, execution.fn, info.name)
    facts = {name: value for name, value in execution.facts.items() if name not in (*_OWN, *STATE_FACTS)}
    facts.update({name: value for name in ("memo", "headers") if (value := getattr(info, name))})
    facts.update(json.loads(checked.facts() or "{}"))
    facts.update(dict.fromkeys((name for name, value in options.items() if value is None), None))
    # Its state is handed on as it is once the coroutine has ended.
    raise ContinueAsNewRequested(
        ContinueAsNew(None, info.name, payload, hash_arguments(payload), facts, checked.delay_ms)
    )
