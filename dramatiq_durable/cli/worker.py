"""``dramatiq-durable worker``: the processes that work."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from .output import duration, print_facts, print_json, print_rows
from .target import Target, option_json


@click.group("worker")
def group() -> None:
    """Workers: the processes that consume streams."""


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """Every worker that is registered.

    state: live, or silent for longer than its reclaim_delay (others will take back what it holds); silent: how long ago
    it was last heard of; holds: how many messages it has leased; oldest: for how long it has been running the one that
    it began first (JSON: seconds).
    """
    rows = target.rows("list_workers")
    if not as_json:
        for row in rows:
            row["silent"] = duration(row["silent"])
            row["oldest"] = None if row["oldest"] is None else duration(row["oldest"])
    columns = (
        "worker_id", "state", "host", "pid", "login", "threads", "streams", "holds", "oldest", "silent", "started_at",
    )  # fmt: skip
    print_rows(rows, columns, as_json=as_json, empty="no worker is registered")


@group.command("show")
@click.argument("worker_id", type=int)
@option_json
@click.pass_obj
def show(target: Target, worker_id: int, as_json: bool) -> None:
    """One worker, and the messages that it holds.

    for: how long it has been running the message; known for what has been running for a second or so.
    """
    facts = next((row for row in target.rows("list_workers") if row["worker_id"] == worker_id), None)
    if facts is None:
        raise click.ClickException(f"no worker {worker_id} is registered; `worker list` shows those that are")
    messages = target.rows("worker_messages", worker_id)
    if as_json:
        print_json(facts | {"messages": messages})
        return
    for name in ("silent", "oldest", "reclaim_delay"):
        facts[name] = None if facts[name] is None else duration(facts[name])
    now = datetime.now(UTC)
    for row in messages:
        row["for"] = None if row["since"] is None else duration((now - row["since"]).total_seconds())
        row["aborted"] = row["abort_at"] is not None
    print_facts(facts, as_json=False)
    columns = ["message_id", "stream", "actor", "attempt", "for", "aborted"]
    print_rows(messages, columns, as_json=False, empty="it holds no message")
