"""``dramatiq-durable prune``: forget what is over for long."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import click

from ..durations import parse_duration
from .confirm import confirm, option_dry_run, option_yes
from .output import print_json, print_rows
from .target import Target, option_json

#: How many runs one transaction looks at, and how many dead letters one drops.
RUNS, LETTERS = 200, 5000

#: A transaction that has forgotten so many rows of a kind has left some.
MANY = 5000

#: What expires by itself.
EXPIRED = ("results", "waiters", "limiters", "senders")


def age(ctx: click.Context, parameter: click.Parameter, value: str | None) -> timedelta | None:
    """A duration with its unit: so many seconds are never meant, and would be too few."""
    if value is None:
        return None
    try:
        if value.strip().replace(".", "", 1).isdigit():
            raise ValueError(f'{value!r} has no unit: say "{value.strip()}d" for days, "{value.strip()}h" for hours')
        return timedelta(milliseconds=parse_duration(value))
    except (ValueError, OverflowError) as e:
        raise click.BadParameter(str(e)) from None


@click.command("prune")
@click.option("--runs", metavar="AGE", callback=age, help='Workflow runs that closed longer ago, such as "30d".')
@click.option("--dead-letters", metavar="AGE", callback=age, help="Dead letters that died longer ago.")
@option_dry_run
@option_yes
@option_json
@click.pass_obj
def command(
    target: Target, runs: timedelta | None, dead_letters: timedelta | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete what is over for long, in small transactions.

    Without an age no run and no dead letter is deleted.  What has expired always is: results, notes of who waits for
    one, keys of limiters, and what processes that are gone have noted of their last batch; workers do that by
    themselves, little by little.  A closed run stays as long as its parent or one of its children runs.
    """
    [counted] = target.rows("count_prunable", runs, dead_letters)
    runs_before, letters_before = counted.pop("runs_before"), counted.pop("letters_before")
    kept = counted.pop("kept")
    pruned: dict[str, int] = dict(counted)
    if not dry_run:
        if counted["runs"] or counted["dead_letters"]:
            what = f"{counted['runs']} runs with their histories and {counted['dead_letters']} dead letters"
            confirm(f"Delete {what} for good?", yes=yes)
        pruned = {
            "runs": 0 if runs_before is None else _prune_runs(target, runs_before),
            "dead_letters": 0 if letters_before is None else _prune_letters(target, letters_before),
            **_prune_expired(target),
        }
    if as_json:
        print_json({"dry_run": dry_run, **pruned, "kept": kept})
        return
    count = "to delete" if dry_run else "deleted"
    rows: list[dict[str, Any]] = [{"what": what.replace("_", " "), count: n} for what, n in pruned.items()]
    print_rows(rows, ("what", count), as_json=False, empty="")
    if kept:
        click.echo(f"{kept} closed runs are kept, because their parent or a child of theirs runs")


def _prune_runs(target: Target, before: datetime) -> int:
    pruned: int = 0
    at = (None, None)
    while True:
        [row] = target.rows("prune_runs", before, *at, RUNS)
        pruned += row["runs"]
        if not row["more"]:
            return pruned
        at = (row["last_closed"], row["last_run"])


def _prune_letters(target: Target, before: datetime) -> int:
    pruned: int = 0
    while True:
        [row] = target.rows("prune_dead_letters", before, LETTERS)
        pruned += row["prune_dead_letters"]
        if row["prune_dead_letters"] < LETTERS:
            return pruned


def _prune_expired(target: Target) -> dict[str, int]:
    pruned, window, windows = dict.fromkeys(EXPIRED, 0), 0, 1
    while window < windows:
        [row] = target.rows("prune_expired", window)
        for kind in EXPIRED:
            pruned[kind] += row[kind]
        windows = row["windows"]
        window += all(row[kind] < MANY for kind in EXPIRED)
    return pruned
