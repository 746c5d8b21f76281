"""``dramatiq-durable workflow list``, ``show`` and ``history``."""

from __future__ import annotations

import uuid
from typing import Any

import click

from ...errors import InvalidFilter
from ...workflow.client import get_handle
from ...workflow.filters import parse as parse_filter
from ...workflow.listing import ORDERS, list_workflows
from ..output import facts_of, print_facts, print_json, print_rows
from ..target import Target, option_json, option_limit
from .timeline import print_timeline
from .which import handle_of, option_run

STATUSES = ("running", "completed", "failed", "cancelled", "terminated", "timed_out", "continued_as_new")

#: How what a run waits for is shown.
PENDING = ("kind", "name", "seq", "attempt", "next_attempt_at", "last_failure", "heartbeat_details")


@click.command("list")
@click.option("--where", metavar="FILTER", help="Only runs that meet it, such as \"search.region = 'eu'\".")
@click.option("--name", help="Only runs of this workflow.")
@click.option("--status", type=click.Choice(STATUSES), help="Only runs with this status.")
@click.option("--order", type=click.Choice(ORDERS), default="-started_at", show_default=True)
@click.option("--after", metavar="CURSOR", help="Go on where a listing ended.")
@option_limit(100)
@option_json
@click.pass_obj
def list_(
    target: Target,
    where: str | None,
    name: str | None,
    status: str | None,
    order: str,
    after: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """The latest runs, newest first.

    \b
    A filter compares fields with values: = != < <= > >= in like, with and, or, not and parentheses.
    Fields: workflow_id, run_id, name, status, queue_name, started_at, closed_at, parent_id,
            search.NAME, entity.PATH
    """
    broker = target.broker
    if where is not None:
        # By itself first: a mistake is shown at its place in what was written.
        parse_filter(where)
    given = (f"({where})" if where is not None else None, _equals("name", name), _equals("status", status))
    condition = " and ".join(part for part in given if part is not None) or None
    try:
        page = list_workflows(condition, order, limit, after, broker=broker)
    except InvalidFilter:
        raise
    except ValueError as e:
        raise click.UsageError(f"--after: {e}") from None
    rows = [facts_of(run) for run in page]
    columns = ["workflow_id", "name", "status", "queue_name", "started_at", "closed_at", "history_length"]
    columns += [column for column in ("search", "task_failure") if any(row[column] for row in rows)]
    print_rows(rows, columns, as_json=as_json, empty="there are no runs")
    if page.next is not None:
        click.echo(f"there are more: --after {page.next}", err=True)


def _equals(field: str, value: str | None) -> str | None:
    return None if value is None else "{} = '{}'".format(field, value.replace("'", "''"))


@click.command("show")
@option_run
@option_json
@click.pass_obj
def show(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, as_json: bool) -> None:
    """One run: what it is, how it stands, what it waits for, and what came of it."""
    handle = handle_of(target, workflow_id, run_id)
    description = handle.describe()
    facts = facts_of(description)
    # The history of this very run: another may have got the id in the meantime.
    events = get_handle(run_id=description.run_id, broker=target.broker).history()
    facts["input"] = events[0].attributes.get("input")
    if description.status != "running":
        facts["result"] = events[-1].attributes.get("result")
        failure = events[-1].attributes.get("failure")
        facts["failure"] = failure if as_json or not failure else f"{failure.get('type')}: {failure.get('message')}"
        facts["reason"] = events[-1].attributes.get("reason")
    if as_json:
        print_json(facts)
        return
    pending: list[dict[str, Any]] = facts.pop("pending", [])
    print_facts({k: v for k, v in facts.items() if v not in (None, {})}, as_json=False)
    if pending:
        click.echo("waits for")
        columns = [column for column in PENDING if any(entry.get(column) is not None for entry in pending)]
        print_rows(pending, columns, as_json=False, empty="")


@click.command("history")
@option_run
@option_json
@click.pass_obj
def history(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, as_json: bool) -> None:
    """Everything that happened to a run, in its one order.

    A number after # is that of a command: what asked for something and what answered it have the same one; the bars
    show from when to when that took.
    """
    events = handle_of(target, workflow_id, run_id).history()
    if as_json:
        print_json([facts_of(event) for event in events])
    else:
        print_timeline(events)
