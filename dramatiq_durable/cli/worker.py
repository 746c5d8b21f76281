"""``dramatiq-durable worker``: the processes that work."""

from __future__ import annotations

import click

from .output import duration, print_rows
from .target import Target, option_json


@click.group("worker")
def group() -> None:
    """Workers: the processes that consume streams."""


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """Every worker that is registered.

    holds: how many messages it has leased; silent: how long ago it was last heard of (JSON: seconds).
    """
    rows = target.rows("list_workers")
    if not as_json:
        for row in rows:
            row["silent"] = duration(row["silent"])
    columns = ("worker_id", "host", "pid", "login", "threads", "streams", "holds", "silent", "started_at")
    print_rows(rows, columns, as_json=as_json, empty="no worker is registered")
