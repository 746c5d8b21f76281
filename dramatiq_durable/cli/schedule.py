"""``dramatiq-durable schedule``: what runs at the times of a cron expression."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import click

from .. import schedules
from ..workflow.activities import ActivityStub
from ..workflow.converter import encode_call
from ..workflow.options import check_name, check_queue_name
from .output import cell, duration, print_facts, print_json, print_rows
from .target import Target, option_json
from .values import option_call, parse_call

#: How a listing and one schedule show a due time.
COLUMNS = ("name", "cron", "timezone", "target", "queue_name", "next_due", "last_due", "fired", "skipped", "missed")

#: Seconds after which a due time that nobody has fired is called late.
LATE = 3


@click.group("schedule", short_help="Schedules: what is fired at cron expressions' times.")
def group() -> None:
    """Schedules: actors and workflows that run at the times of a cron expression."""


@group.command("create")
@click.argument("name")
@click.option("--cron", required=True, metavar="EXPRESSION", help="Such as '0 6 * * MON-FRI'; six fields have seconds.")
@click.option("--timezone", default="UTC", show_default=True, metavar="ZONE", help="Such as Europe/Berlin.")
@click.option("--actor", metavar="NAME", help="The actor to send a message to.")
@click.option("--workflow", metavar="NAME", help="The workflow to start.")
@click.option("--queue", "queue_name", metavar="STREAM", required=True, help="The stream whose workers know it.")
@option_call
@click.option(
    "--catch-up", metavar="DURATION", default="1h", show_default=True, help="What is later than this is missed."
)
@click.option("--overlap", type=click.Choice(["skip", "buffer_one", "allow"]), default="skip", show_default=True,
              help="What to do while the last one has not ended.")  # fmt: skip
@click.option("--paused", is_flag=True, help="Do not begin yet.")
@click.option("--if-exists", type=click.Choice(["fail", "update", "keep"]), default="fail", show_default=True)
@click.pass_obj
def create(
    target: Target,
    name: str,
    cron: str,
    timezone: str,
    actor: str | None,
    workflow: str | None,
    queue_name: str,
    args_json: str,
    kwargs_json: str,
    catch_up: str,
    overlap: str,
    paused: bool,
    if_exists: str,
) -> None:
    """Make the schedule NAME; the code of what it fires need not be here."""
    if (actor is None) == (workflow is None):
        raise click.UsageError("say what it fires: either --actor NAME or --workflow NAME")
    args, kwargs = parse_call(args_json, kwargs_json)
    broker = target.broker
    if actor is not None:
        fires = schedules.fires_of(broker, ActivityStub(actor, queue_name), args, kwargs)
    else:
        assert workflow is not None
        check_queue_name(queue_name)
        input = broker.codecs.encode(encode_call(tuple(args), kwargs, None, workflow))
        fires = schedules.Fires("s", queue_name, check_name(workflow, "a workflow's name"), 0, input)
    schedules.save(broker, name, fires, cron, timezone, catch_up, overlap, paused, if_exists)
    click.echo(f"the schedule {name} is there")


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """All schedules, with their next due times, and whether a live worker consumes their streams (JSON: how many).

    fired, skipped, missed: how many due times were, were left out by the overlap policy, were found too late.
    """
    rows = [facts(schedule, as_json) for schedule in schedules.list(broker=target.broker)]
    columns = [*COLUMNS, *(["failure"] if any(row["failure"] for row in rows) else [])]
    print_rows(rows, columns, as_json=as_json, empty="there are no schedules")


@group.command("show")
@click.argument("name")
@option_json
@click.pass_obj
def show(target: Target, name: str, as_json: bool) -> None:
    """One schedule: what it is, when it comes, and what has become of it."""
    known = facts(schedules.describe(name, broker=target.broker), as_json)
    print_facts(known if as_json else {k: v for k, v in known.items() if v not in (None, [])}, as_json=as_json)


def facts(schedule: schedules.Schedule, as_json: bool) -> dict[str, Any]:
    """What is printed; for people, the next due time alone, how late it is and whether anybody works on its stream, or
    that there is none."""
    known = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    if as_json:
        known["catch_up"] = schedule.catch_up.total_seconds()
    elif schedule.paused:
        known["next_due"] = "paused"
    else:
        due = known["next_due"] = next(iter(schedule.next_due), None)
        late = 0.0 if due is None else (datetime.now(UTC) - due).total_seconds()
        # The workers of its stream fire it within a second; where none runs, or it is paused, this tells.
        remarks = [f"{duration(late)} late"] if late > LATE else []
        remarks += [] if schedule.workers else ["no live worker"]
        if due is not None and remarks:
            known["next_due"] = f"{cell(due)} ({', '.join(remarks)})"
    return known


@group.command("pause")
@click.argument("name")
@click.pass_obj
def pause(target: Target, name: str) -> None:
    """Fire nothing more until it is resumed."""
    schedules.pause(name, broker=target.broker)
    click.echo(f"paused {name}")


@group.command("resume")
@click.argument("name")
@click.pass_obj
def resume(target: Target, name: str) -> None:
    """Go on with the next due time; what passed meanwhile is not caught up."""
    schedules.resume(name, broker=target.broker)
    click.echo(f"resumed {name}")


@group.command("trigger")
@click.argument("name")
@option_json
@click.pass_obj
def trigger(target: Target, name: str, as_json: bool) -> None:
    """Fire it now, once, also while it is paused."""
    id = schedules.trigger(name, broker=target.broker)
    if as_json:
        print_json({"name": name, "id": id})
    else:
        click.echo(f"fired {name}: {id}")


@group.command("backfill")
@click.argument("name")
@click.argument("start")
@click.argument("end")
@option_json
@click.pass_obj
def backfill(target: Target, name: str, start: str, end: str, as_json: bool) -> None:
    """Fire it for the due times from START to END (ISO 8601, like 2026-01-31T00:00Z), both included.

    The due times that it has still to deal with by itself are left to it.
    """
    try:
        fired = schedules.backfill(name, time(start, "START"), time(end, "END"), broker=target.broker)
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    if as_json:
        print_json({"name": name, "fired": fired})
    else:
        click.echo(f"fired {name} for {len(fired)} due times{between(fired)}")


def time(value: str, what: str) -> datetime:
    """A time from the command line."""
    with suppress(ValueError):
        at = datetime.fromisoformat(value)
        if at.tzinfo is not None:
            return at
    raise click.UsageError(f"{what} is a time such as 2026-01-31T00:00Z, with its zone, not {value!r}")


def between(times: Sequence[datetime]) -> str:
    return f", {shown(times[0])} to {shown(times[-1])}" if times else ""


def shown(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@group.command("delete")
@click.argument("name")
@click.pass_obj
def delete(target: Target, name: str) -> None:
    """Forget it; what it fired goes on."""
    schedules.delete(name, broker=target.broker)
    click.echo(f"deleted {name}")
