"""``dramatiq-durable dead-letter``: messages that will not be tried again."""

from __future__ import annotations

import click

from .output import print_rows
from .target import Target, option_json, option_limit


@click.group("dead-letter")
def group() -> None:
    """Dead letters: messages whose retries ran out, or that kept killing workers."""


@group.command("list")
@click.option("--stream", metavar="NAME", help="Only those of this stream.")
@option_limit
@option_json
@click.pass_obj
def list_(target: Target, stream: str | None, limit: int, as_json: bool) -> None:
    """The latest dead letters, newest first.

    reason: rejected (its retries ran out, or it was refused), or poison (its workers died).  JSON has the payload.
    """
    rows = target.rows("list_dead_letters", stream, limit)
    columns = ("dead_letter_id", "stream", "actor", "reason", "attempt", "died_at", "failure")
    if not as_json:
        for row in rows:
            row["failure"] = (row["failure"] or "").strip().rpartition("\n")[2]
    print_rows(rows, columns, as_json=as_json, empty="there are no dead letters")
