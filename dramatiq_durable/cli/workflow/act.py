"""``dramatiq-durable workflow signal``, ``cancel``, ``terminate`` and ``reset``."""

from __future__ import annotations

import functools
import uuid

import click

from ...workflow.listing import batch_cancel, batch_reset, batch_signal, batch_terminate
from ..output import print_json
from ..target import Target, option_json
from ..values import parse
from .batch import check_where, do_batch, option_where
from .which import handle_of, option_run, option_run_id


@click.command("signal")
@click.argument("words", metavar="[WORKFLOW_ID] NAME [JSON]", nargs=-1, required=True)
@option_run_id
@click.option("--id", "key", metavar="KEY", help="The same key twice is one signal.")
@option_where
@option_json
@click.pass_obj
def signal(
    target: Target,
    words: tuple[str, ...],
    run_id: uuid.UUID | None,
    key: str | None,
    where: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send the signal NAME, with a payload in JSON: to one run, or to all running ones that meet --where."""
    check_where(where, None, run_id, dry_run)
    many = where is not None
    if not (1 <= len(words) <= 2 if many else 2 <= len(words) <= 3):
        raise click.UsageError("it is WORKFLOW_ID NAME [JSON]; with --where, it is NAME [JSON]")
    workflow_id = None if many else words[0]
    name, *rest = words if many else words[1:]
    value = parse(rest[0], "the payload") if rest else None
    if where is not None:
        if key is not None:
            raise click.UsageError("--id goes with one run: with --where, each gets a signal of its own")
        send = functools.partial(batch_signal, where, name, value, broker=target.broker)
        do_batch(target, where, f"signal {name} to", f"sent the signal {name}", send,
                 yes=yes, dry_run=dry_run, as_json=as_json)  # fmt: skip
        return
    handle_of(target, workflow_id, run_id).signal(name, value, id=key)
    if as_json:
        print_json({"workflow_id": workflow_id, "signal": name})
    else:
        click.echo(f"signal {name} sent to {workflow_id}")


@click.command("cancel")
@option_run
@option_where
@option_json
@click.pass_obj
def cancel(
    target: Target,
    workflow_id: str | None,
    run_id: uuid.UUID | None,
    where: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Ask a run, or all running ones that meet --where, to end itself: its code may clean up first."""
    check_where(where, workflow_id, run_id, dry_run)
    if where is not None:
        act = functools.partial(batch_cancel, where, broker=target.broker)
        do_batch(target, where, "cancel", "asked to cancel themselves", act,
                 yes=yes, dry_run=dry_run, as_json=as_json)  # fmt: skip
        return
    handle_of(target, workflow_id, run_id).cancel()
    _done(f"asked {workflow_id or run_id} to cancel itself", workflow_id, run_id, as_json)


@click.command("terminate")
@option_run
@click.option("--reason", help="Why; it is kept in the history.")
@option_where
@option_json
@click.pass_obj
def terminate(
    target: Target,
    workflow_id: str | None,
    run_id: uuid.UUID | None,
    reason: str | None,
    where: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """End a run, or all running ones that meet --where, at once and without a word to its code."""
    check_where(where, workflow_id, run_id, dry_run)
    if where is not None:
        act = functools.partial(batch_terminate, where, reason, broker=target.broker)
        do_batch(target, where, "terminate", "terminated", act, yes=yes, dry_run=dry_run, as_json=as_json)
        return
    handle_of(target, workflow_id, run_id).terminate(reason)
    _done(f"terminated {workflow_id or run_id}", workflow_id, run_id, as_json)


@click.command("reset")
@option_run
@click.option(
    "--to", "to_event", type=click.IntRange(1), required=True, metavar="EVENT", help="A number of the history."
)
@option_where
@option_json
@click.pass_obj
def reset(
    target: Target,
    workflow_id: str | None,
    run_id: uuid.UUID | None,
    to_event: int,
    where: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take a run up again at an event, as a new run; with --where, the latest run of each workflow id that meets it.

    Its history up to there is kept, the rest is done anew with the code as it is now; whichever run has the workflow id
    ends.
    """
    check_where(where, workflow_id, run_id, dry_run)
    if where is not None:
        act = functools.partial(batch_reset, where, to_event, broker=target.broker)
        do_batch(target, where, f"reset to event {to_event}", f"taken up again at event {to_event}", act,
                 running=False, yes=yes, dry_run=dry_run, as_json=as_json)  # fmt: skip
        return
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
