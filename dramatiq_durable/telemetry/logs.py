"""What every record of a log says beside its text: of which run, and in which trace."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

from ..delivery import Delivery, current_delivery
from ..workflow.computing import current_local
from ..workflow.replay import current
from . import TRACE
from .context import derived_trace_id, source_of, trace_id_of, workflow_id_in
from .texts import one_line

#: The fields; None where there is nothing to say.
FIELDS: Final = ("workflow_id", "run_id", "message_id", "trace_id", "span_id")


class LogFields(logging.Filter):
    """Gives every log record the fields ``workflow_id``, ``run_id``, ``message_id``, ``trace_id`` and ``span_id``.

    Records of dramatiq_durable's own loggers and of `durable.logger` have them anyway.  Add it to a handler, and what
    actors and libraries log has them, too::

        handler.addFilter(durable.LogFields())
        handler.setFormatter(logging.Formatter("%(message)s run=%(run_id)s trace=%(trace_id)s"))

    A field is None where there is nothing to say.  Nothing is looked up in the database.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        known = fields(next((a for a in _arguments(record) if isinstance(a, Delivery)), None))
        for name in FIELDS:
            if getattr(record, name, None) is None:
                setattr(record, name, known.get(name))
        return True


def _arguments(record: logging.LogRecord) -> tuple[Any, ...]:
    return record.args if isinstance(record.args, tuple) else ()


def fields(delivery: Delivery | None = None) -> dict[str, Any]:
    """What is known of what this thread (or task) is doing, or of a delivery."""
    known: dict[str, Any] = {}
    execution = current()
    if execution is not None and delivery is None:
        known = {"workflow_id": execution.workflow_id, "run_id": execution.run_id}
        known["trace_id"] = trace_id_of(execution.facts.get(TRACE))
        if known["trace_id"] is None and execution.traced is not None:
            known["trace_id"] = f"{derived_trace_id(source_of(execution.facts, execution.run_id)):032x}"
        return _lines(known)
    local = current_local.get()
    if local is not None and delivery is None:
        known = {"workflow_id": local["workflow_id"], "run_id": local["run_id"]}
    else:
        subject = current_delivery.get() if delivery is None else delivery
        if subject is not None:
            known = _of_delivery(subject)
    if delivery is None:
        known.update(_of_span())
    return _lines(known)


def _lines(known: dict[str, Any]) -> dict[str, Any]:
    """Whoever starts a run, or sends a message, has chosen its id."""
    for name in ("workflow_id", "message_id"):
        if isinstance(known.get(name), str):
            known[name] = one_line(known[name])
    return known


def _of_delivery(delivery: Delivery) -> dict[str, Any]:
    known: dict[str, Any] = {"message_id": delivery.message_id, "run_id": delivery.run_id}
    known["trace_id"] = trace_id_of(delivery.options)
    if delivery.run_id is not None:
        known["workflow_id"] = workflow_id_in(delivery.options) or (delivery.run_id if delivery.kind == "a" else None)
        # In a test's Environment nobody runs it.
        runner = delivery.broker.runner
        run = None if runner is None else runner.cache.peek(delivery.run_id)
        # It may be dropped from memory meanwhile, by another thread.
        execution = None if run is None else run.execution
        if execution is not None:
            known["workflow_id"] = execution.workflow_id
            known["trace_id"] = known["trace_id"] or trace_id_of(execution.facts.get(TRACE))
    return known


def _of_span() -> dict[str, Any]:
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not hasattr(api, "get_current_span"):
        return {}
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


_fields = LogFields()


def install() -> None:
    """Have our own loggers say them."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("dramatiq_durable") and isinstance(logger, logging.Logger):
            logger.addFilter(_fields)
