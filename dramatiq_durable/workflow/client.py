"""Workflows from outside: starting runs, and handles of those that were started."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

import dramatiq

from ..errors import DurableError, NotConfigured
from ..group_commit import riding
from ..operations import StartRun, StartRunWith
from ..telemetry import with_trace
from ..using import sending
from . import events
from .converter import encode, encode_call
from .definition import global_broker
from .handle import WorkflowHandle, outside_of_workflows
from .options import check_call, check_name

if TYPE_CHECKING:
    from ..broker import DurableBroker
    from ..codecs import Codecs
    from .definition import Workflow
    from .options import WorkflowOptions

logger = logging.getLogger(__name__)

R = TypeVar("R")


def start_run(
    workflow: Workflow[Any, R], args: tuple[Any, ...], kwargs: dict[str, Any], options: WorkflowOptions
) -> WorkflowHandle[R]:
    """Start a run; when this returns, it is committed.

    Raises:
      WorkflowAlreadyStarted: a live run has the workflow id (or a closed one, and ``id_reuse`` forbids it).
      WorkflowClosed: the run that has the id ended before it could be told what comes ``with_signal``.
      TypeError: the workflow does not take these arguments.
      NotEncodable, PayloadTooLarge, InvalidName: the input cannot be carried.
      DatabaseUnavailable: the database cannot be reached; nothing was started.
    """
    outside_of_workflows("start a workflow through a handle")
    broker = durable_broker(workflow.broker)
    check_call(workflow.fn, workflow.name, args, kwargs)
    run_id = uuid.uuid4()
    payload = broker.codecs.encode(
        encode_call(args, kwargs, workflow.fn, workflow.name), f"the arguments of {workflow.name!r}"
    )
    spans = broker.telemetry.spans()
    if spans is not None:
        attributes = {"messaging.message.id": str(run_id), "dramatiq_durable.workflow": workflow.name}
        with spans.sending(workflow.queue_name, attributes) as carrier:
            return _start_run(broker, workflow, run_id, payload, options, carrier)
    return _start_run(broker, workflow, run_id, payload, options, {})


def _start_run(
    broker: DurableBroker,
    workflow: Workflow[Any, R],
    run_id: uuid.UUID,
    payload: bytes,
    options: WorkflowOptions,
    carrier: dict[str, str],
) -> WorkflowHandle[R]:
    workflow_id = options.workflow_id or str(run_id)
    start = (
        run_id.bytes,
        workflow_id,
        broker.stream_id(workflow.queue_name),
        workflow.name,
        payload,
        options.id_conflict,
        options.id_reuse,
        options.delay_ms,
        broker.codecs.seal_json(with_trace(options.facts(), carrier)),
    )
    brought = _brought(broker.codecs, options)
    operation = (
        StartRun(*start) if brought is None else StartRunWith(*start, **brought, with_trace=carrier.get("traceparent"))
    )
    # Which run it is may be known only later (inside `async with using(...)`); until then, whichever has the id.
    handle = WorkflowHandle(
        broker, workflow_id, None if options.id_conflict == "use_existing" else str(run_id), workflow
    )

    if brought is not None and brought["with_type"] == events.UPDATE_REQUESTED:
        handle._update_id = brought["with_key"]

    def then(started: StartRun) -> None:
        if started.error is None:
            handle.run_id = str(uuid.UUID(bytes=started.answer[1]))

    operation.then = then
    broker.commit.submit(operation)
    return handle


def _brought(codecs: Codecs, options: WorkflowOptions) -> dict[str, Any] | None:
    """What a run is told in the transaction that starts it."""
    if options.with_signal is not None:
        name, payload = options.with_signal
        what = f"the payload of the signal {name!r}"
        data = None if payload is None else codecs.encode(encode(payload, what), what)
        return {
            "with_type": events.SIGNAL_RECEIVED,
            "with_name": name,
            "with_payload": data,
            "with_key": str(uuid.uuid4()),
        }
    if options.with_update is None:
        return None
    if riding.get() is not None:
        raise DurableError(
            "inside of a using() block you cannot start a workflow with an update: a run answers only what is "
            "committed. Start it there, and ask for the update after the transaction"
        )
    name, *args = options.with_update
    return {
        "with_type": events.UPDATE_REQUESTED,
        "with_name": name,
        "with_payload": codecs.encode(
            encode_call(tuple(args), {}, None, name), f"the arguments of the update {name!r}"
        ),
        "with_key": options.update_id or str(uuid.uuid4()),
    }


async def astart_run(
    workflow: Workflow[Any, R], args: tuple[Any, ...], kwargs: dict[str, Any], options: WorkflowOptions
) -> WorkflowHandle[R]:
    """As `start_run`, awaited."""
    return await sending(lambda: start_run(workflow, args, kwargs, options))


def get_handle(
    workflow_id: str | None = None, run_id: str | None = None, *, broker: dramatiq.Broker | None = None
) -> WorkflowHandle[Any]:
    """A handle of a run by its workflow id (the live run that has it, else the latest) or its run id.  Does no I/O.

    Raises:
      ValueError: neither id is given, or one of them cannot be an id.
    """
    if workflow_id is None and run_id is None:
        raise ValueError("get_handle needs a workflow id or a run id")
    if workflow_id is not None:
        check_name(workflow_id, "a workflow id")
    if run_id is not None:
        try:
            run_id = str(uuid.UUID(str(run_id)))
        except ValueError:
            raise ValueError(f"a run id is a UUID, not {run_id!r}") from None
    return WorkflowHandle(durable_broker(broker or global_broker()), workflow_id, run_id)


def durable_broker(broker: dramatiq.Broker) -> DurableBroker:
    """The broker, if it is one of ours.

    Raises:
      NotConfigured: it is not.
    """
    from ..broker import DurableBroker

    if not isinstance(broker, DurableBroker):
        raise NotConfigured(
            f"this needs a DurableBroker, and the broker is a {type(broker).__name__}: call "
            "dramatiq.set_broker(durable.DurableBroker(...)) before the module is imported"
        )
    return broker
