"""``dramatiq-durable stream``: the queues."""

from __future__ import annotations

import click

from .output import duration, print_rows
from .target import Target, option_json


@click.group("stream")
def group() -> None:
    """Streams: what waits, what is being done, what failed."""


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """Every stream with its counts.

    ready: may be taken now; leased: a worker has it; delayed: due later; dead: dead letters; oldest: how long the
    first of the ready ones has been waiting (JSON: seconds).
    """
    rows = target.rows("stream_counts")
    if not as_json:
        for row in rows:
            row["oldest"] = None if row["oldest"] is None else duration(row["oldest"])
    columns = ("name", "ready", "leased", "delayed", "dead", "oldest", "paused")
    print_rows(rows, columns, as_json=as_json, empty="there are no streams yet")
