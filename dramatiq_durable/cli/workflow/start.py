"""``dramatiq-durable workflow start``."""

from __future__ import annotations

import uuid

import click

from ...durations import parse_duration
from ...operations import StartRun
from ...workflow.converter import encode_call
from ...workflow.options import WorkflowOptions, check_name, check_queue_name
from ..output import print_json
from ..target import Target, option_json
from ..values import option_call, parse, parse_call


@click.command("start")
@click.argument("name")
@click.option(
    "--queue", "queue_name", metavar="STREAM", required=True, help="The stream whose workers know the workflow."
)
@option_call
@click.option("--id", "workflow_id", metavar="WORKFLOW_ID", help="The business key; by default the run's id.")
@click.option("--id-conflict", type=click.Choice(["fail", "use_existing", "terminate_existing"]), default="fail",
              show_default=True, help="What to do when a live run has the id.")  # fmt: skip
@click.option("--id-reuse", type=click.Choice(["allow", "allow_failed", "reject"]), default="allow",
              show_default=True, help="Whether an id of closed runs may be used again.")  # fmt: skip
@click.option("--delay", metavar="DURATION", default="0s", show_default=True, help='Start later, e.g. "10 minutes".')
@click.option("--memo", metavar="JSON", help="What the run carries for people, an object.")
@option_json
@click.pass_obj
def command(
    target: Target,
    name: str,
    queue_name: str,
    args_json: str,
    kwargs_json: str,
    workflow_id: str | None,
    id_conflict: str,
    id_reuse: str,
    delay: str,
    memo: str | None,
    as_json: bool,
) -> None:
    """Start the workflow NAME; its code need not be here."""
    args, kwargs = parse_call(args_json, kwargs_json)
    try:
        delay_ms = parse_duration(delay)
    except ValueError as e:
        raise click.UsageError(f"--delay: {e}") from None
    carried = None if memo is None else parse(memo, "--memo")
    if not isinstance(carried, dict | None):
        raise click.UsageError('--memo is an object in JSON, like \'{"customer": "c-7"}\'')
    check_name(name, "a workflow's name")
    check_queue_name(queue_name)
    if workflow_id is not None:
        check_name(workflow_id, "a workflow id")
    new = uuid.uuid4()
    workflow_id = workflow_id or str(new)
    operation = StartRun(
        new.bytes,
        workflow_id,
        target.broker.stream_id(queue_name),
        name,
        target.broker.codecs.encode(encode_call(tuple(args), kwargs, None, name)),
        id_conflict,
        id_reuse,
        delay_ms,
        target.broker.codecs.seal_json(WorkflowOptions(memo=carried).facts()),
    )
    status, found = target.broker.commit.submit(operation)
    run_id = str(uuid.UUID(bytes=found))
    if as_json:
        print_json({"workflow_id": workflow_id, "run_id": run_id, "status": status})
    else:
        click.echo(f"{status} {workflow_id} (run {run_id})")
