"""``dramatiq-durable stream``: the queues."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from .confirm import confirm, option_dry_run, option_yes
from .output import duration, print_json, print_rows
from .payload import call, decode, last_line
from .target import Target, option_json, option_limit

#: How many messages one transaction of a purge drops.
BATCH = 5000


@click.group("stream")
def group() -> None:
    """Streams: what waits, what is being done, what failed."""


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """Every stream with its counts.

    ready: may be taken now; leased: a worker has it; delayed: due later; dead: dead letters; oldest: how long the
    first of the ready ones has been waiting (JSON: seconds); workers: how many live ones consume it.
    """
    rows = target.rows("stream_counts")
    if not as_json:
        for row in rows:
            row["oldest"] = None if row["oldest"] is None else duration(row["oldest"])
    columns = ("name", "ready", "leased", "delayed", "dead", "oldest", "paused", "workers")
    print_rows(rows, columns, as_json=as_json, empty="there are no streams yet")


@group.command("peek")
@click.argument("stream")
@click.option("--state", type=click.Choice(["waiting", "delayed", "leased"]), help="Only these.")
@click.option("--actor", metavar="NAME", help="Only messages for this actor.")
@option_limit(20)
@option_json
@click.pass_obj
def peek(target: Target, stream: str, state: str | None, actor: str | None, limit: int, as_json: bool) -> None:
    """Messages of STREAM, in the order in which they are handed out.  Changes nothing.

    due: in how long, or for how long; for: how long its worker has been running it (known after a second or so).
    Arguments that cannot be decoded here are shown as bytes.
    """
    rows = target.rows("peek_messages", stream, state, actor, limit)
    now = datetime.now(UTC)
    for row in rows:
        payload = row.pop("payload")
        row |= decode(payload, row["kind"], target.broker.codecs) if row["kind"] not in ("s", "t", "w") else {}
        row["last_failure"] = target.broker.codecs.decode_text(row["last_failure"])
        if not as_json:
            _for_people(row, now)
    columns = [
        "message_id",
        "state",
        "actor",
        "arguments",
        "priority",
        "due",
        "attempt",
        "worker",
        "for",
        "last_failure",
    ]
    empty = "there is no such message" if state or actor else f"{stream} is empty"
    print_rows(rows, columns, as_json=as_json, empty=empty, limit=limit)


def _for_people(row: dict[str, Any], now: datetime) -> None:
    row["arguments"] = call(row) if "args" in row or "bytes" in row else f"a task of the run {row['run_id']}"
    late = (now - row["due_at"]).total_seconds()
    row["due"] = f"{duration(late)} ago" if late >= 0 else f"in {duration(-late)}"
    if row["abort_at"] is not None:
        row["state"] += ", aborted"
    if row["worker_id"] is not None:
        row["worker"] = f"{row['worker_id']} ({row['host']}, pid {row['pid']})"
    if row["since"] is not None:
        row["for"] = duration((now - row["since"]).total_seconds())
    row["last_failure"] = last_line(row["last_failure"])


@group.command("pause")
@click.argument("streams", metavar="STREAM...", nargs=-1, required=True)
@click.pass_obj
def pause(target: Target, streams: tuple[str, ...]) -> None:
    """Hand nothing out until `resume`: what runs goes on, what is sent waits.

    The few messages that a worker had taken when the pause came are done, too.
    """
    _pause(target, streams, True)


@group.command("resume")
@click.argument("streams", metavar="STREAM...", nargs=-1, required=True)
@click.pass_obj
def resume(target: Target, streams: tuple[str, ...]) -> None:
    """Hand messages out again."""
    _pause(target, streams, False)


def _pause(target: Target, streams: tuple[str, ...], paused: bool) -> None:
    is_now = "paused" if paused else "not paused"
    for stream in streams:
        [row] = target.rows("pause_stream", stream, paused)
        click.echo(f"{stream} is {is_now}" if row["pause_stream"] else f"{stream} was {is_now} already")


@group.command("purge")
@click.argument("stream")
@click.option("--actor", metavar="NAME", help="Only messages for this actor.")
@option_dry_run
@option_yes
@option_json
@click.pass_obj
def purge(target: Target, stream: str, actor: str | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Drop what waits on STREAM, delayed messages included.

    What a worker has, and what belongs to a workflow, stays.  So does what is sent after this began.
    """
    counted = target.rows("count_waiting", stream, actor)
    count = sum(row["messages"] for row in counted)
    if dry_run or not count:
        if as_json:
            print_json({"dry_run": dry_run, "dropped": 0, "matched": count, "actors": counted})
        else:
            print_rows(counted, ("actor", "messages"), as_json=False, empty=f"nothing waits on {stream}")
        return
    confirm(f"Drop {count} messages that wait on {stream!r}?", yes=yes)
    dropped = 0
    while True:
        [row] = target.rows("purge_messages", stream, actor, counted[0]["until"], BATCH)
        dropped += row["purge_messages"]
        if row["purge_messages"] < BATCH:
            break
    if as_json:
        print_json({"dry_run": False, "dropped": dropped, "matched": count, "actors": counted})
    else:
        click.echo(f"dropped {dropped} messages")
