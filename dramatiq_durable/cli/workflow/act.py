"""``dramatiq-durable workflow signal``, ``cancel``, ``terminate`` and ``reset``."""

from __future__ import annotations

import uuid

import click

from ..output import print_json
from ..target import Target, option_json
from ..values import parse
from .which import handle_of, option_run, option_run_id


@click.command("signal")
@click.argument("workflow_id")
@click.argument("name")
@click.argument("payload", metavar="[JSON]", required=False)
@option_run_id
@click.option("--id", "key", metavar="KEY", help="The same key twice is one signal.")
@option_json
@click.pass_obj
def signal(
    target: Target,
    workflow_id: str,
    name: str,
    payload: str | None,
    run_id: uuid.UUID | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Send the signal NAME, with a payload in JSON."""
    value = None if payload is None else parse(payload, "the payload")
    handle_of(target, workflow_id, run_id).signal(name, value, id=key)
    if as_json:
        print_json({"workflow_id": workflow_id, "signal": name})
    else:
        click.echo(f"signal {name} sent to {workflow_id}")


@click.command("cancel")
@option_run
@option_json
@click.pass_obj
def cancel(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, as_json: bool) -> None:
    """Ask a run to end itself: its code may clean up first."""
    handle_of(target, workflow_id, run_id).cancel()
    _done(f"asked {workflow_id or run_id} to cancel itself", workflow_id, run_id, as_json)


@click.command("terminate")
@option_run
@click.option("--reason", help="Why; it is kept in the history.")
@option_json
@click.pass_obj
def terminate(
    target: Target, workflow_id: str | None, run_id: uuid.UUID | None, reason: str | None, as_json: bool
) -> None:
    """End a run at once, without a word to its code."""
    handle_of(target, workflow_id, run_id).terminate(reason)
    _done(f"terminated {workflow_id or run_id}", workflow_id, run_id, as_json)


@click.command("reset")
@option_run
@click.option(
    "--to", "to_event", type=click.IntRange(1), required=True, metavar="EVENT", help="A number of the history."
)
@option_json
@click.pass_obj
def reset(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, to_event: int, as_json: bool) -> None:
    """Take a run up again at an event, as a new run.

    Its history up to there is kept, the rest is done anew with the code as it is now; whichever run has the workflow id
    ends.
    """
    handle = handle_of(target, workflow_id, run_id)
    try:
        new = handle.reset(to_event)
    except ValueError as e:
        raise click.UsageError(f"--to: {e}") from None
    if as_json:
        print_json({"workflow_id": new.workflow_id, "run_id": new.run_id})
    else:
        click.echo(f"{new.workflow_id} goes on from event {to_event} as run {new.run_id}")


def _done(line: str, workflow_id: str | None, run_id: uuid.UUID | None, as_json: bool) -> None:
    if as_json:
        print_json({"workflow_id": workflow_id, "run_id": run_id})
    else:
        click.echo(line)
