"""Commands for many runs at once: ``--where`` instead of WORKFLOW_ID."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ...workflow.listing import count_workflows
from ..confirm import confirm, option_dry_run, option_yes
from ..output import print_json
from ..target import Target


def option_where(command: Any) -> Any:
    """Add ``--where``, ``--yes`` and ``--dry-run`` to a command that is about one run otherwise."""
    where = click.option(
        "--where", metavar="FILTER", help="Instead of WORKFLOW_ID: all runs that meet it, such as \"name = 'order'\"."
    )
    return where(option_yes(option_dry_run(command)))


def check_where(where: str | None, workflow_id: Any, run_id: Any, dry_run: bool) -> None:
    """Raises UsageError where runs are named in two ways, or a single one is to be a dry run."""
    if where is not None and (workflow_id is not None or run_id is not None):
        raise click.UsageError("name the runs in one way: WORKFLOW_ID, --run-id or --where")
    if where is None and dry_run:
        raise click.UsageError("--dry-run goes with --where: it says how many runs that means")


def do_batch(
    target: Target,
    where: str,
    verb: str,
    done: str,
    act: Callable[[], int],
    *,
    running: bool = True,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Say how many runs are meant, ask, and do it.

    Parameters:
      verb(str), done(str): what is done, as in "Cancel 3 runs?" and "3 runs cancelled".
      act: does it, and answers to how many runs.
      running(bool): whether only running ones are meant.
    """
    meant = f"({where}) and status = 'running'" if running else where
    # The filter by itself first: a mistake is shown at its place in what was written.
    count = count_workflows(where, broker=target.broker) and count_workflows(meant, broker=target.broker)
    which = f"{count} running {_runs(count)}" if running else f"{count} {_runs(count)}"
    if dry_run:
        if as_json:
            print_json({"runs": count, "dry_run": True})
        else:
            click.echo(f"{verb} would be done to {which}")
        return
    if count:
        confirm(f"{verb.capitalize()} {which}?", yes=yes)
    told = act() if count else 0
    if as_json:
        print_json({"runs": told})
    else:
        click.echo(f"{told} {_runs(told)} {done}")


def _runs(count: int) -> str:
    return "run" if count == 1 else "runs"
