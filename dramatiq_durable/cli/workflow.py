"""``dramatiq-durable workflow``: runs, from outside and without their code."""

from __future__ import annotations

import dataclasses
import json
import uuid
from typing import Any

import click

from ..workflow.client import get_handle
from ..workflow.handle import HistoryEvent, WorkflowHandle
from .lint import command as lint
from .output import cell, duration, make_table, print_facts, print_json, print_rows, print_table, text
from .target import Target, option_json, option_limit

STATUSES = ("running", "completed", "failed", "cancelled", "terminated", "timed_out")

#: Of a value in a timeline, so many characters are shown; ``--json`` has all of them.
SHOWN = 160


@click.group("workflow")
def group() -> None:
    """Workflows: start them, look at them, signal, cancel and terminate them.

    WORKFLOW_ID means the live run that has the id, or else the latest; --run-id means one run in particular.
    """


group.add_command(lint)


def option_run(command: Any) -> Any:
    """Add ``WORKFLOW_ID`` and ``--run-id`` to a command."""
    command = click.option("--run-id", metavar="UUID", type=click.UUID, help="One run in particular.")(command)
    return click.argument("workflow_id", required=False)(command)


def handle_of(target: Target, workflow_id: str | None, run_id: uuid.UUID | None) -> WorkflowHandle[Any]:
    """The run that a command is about."""
    if workflow_id is None and run_id is None:
        raise click.UsageError("name the workflow: WORKFLOW_ID, or --run-id UUID")
    return get_handle(workflow_id, None if run_id is None else str(run_id), broker=target.broker)


def parse(value: str, what: str) -> Any:
    """JSON from the command line."""
    try:
        return json.loads(value)
    except ValueError as e:
        raise click.UsageError(f"{what} is no JSON ({e}); text needs quotes of its own, like '\"approved\"'") from None


# --- looking ---------------------------------------------------------------------------------------------


@group.command("list")
@click.option("--name", help="Only runs of this workflow.")
@click.option("--status", type=click.Choice(STATUSES), help="Only runs with this status.")
@option_limit(100)
@option_json
@click.pass_obj
def list_(target: Target, name: str | None, status: str | None, limit: int, as_json: bool) -> None:
    """The latest runs, newest first."""
    rows = target.rows("list_runs", name, status, limit)
    for row in rows:
        row["history_length"] = row.pop("last_event")
        row["parent"] = row.pop("parent_run_id")
        row["memo"] = target.broker.codecs.open_memo(row["memo"])
        row["task_failure"] = target.broker.codecs.decode_text(row["task_failure"])
    columns = ["workflow_id", "name", "status", "queue_name", "started_at", "closed_at", "history_length"]
    if any(row["task_failure"] for row in rows):
        columns.append("task_failure")
    print_rows(rows, columns, as_json=as_json, empty="there are no runs", limit=limit)


@group.command("show")
@option_run
@option_json
@click.pass_obj
def show(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, as_json: bool) -> None:
    """One run: what it is, how it stands, and what came of it."""
    handle = handle_of(target, workflow_id, run_id)
    description = handle.describe()
    facts = dataclasses.asdict(description)
    # The history of this very run: another may have got the id in the meantime.
    events = get_handle(run_id=description.run_id, broker=target.broker).history()
    facts["input"] = events[0].attributes.get("input")
    if description.status != "running":
        facts["result"] = events[-1].attributes.get("result")
        failure = events[-1].attributes.get("failure")
        facts["failure"] = failure if as_json or not failure else f"{failure.get('type')}: {failure.get('message')}"
        facts["reason"] = events[-1].attributes.get("reason")
    print_facts(facts if as_json else {k: v for k, v in facts.items() if v not in (None, {})}, as_json=as_json)


@group.command("history")
@option_run
@option_json
@click.pass_obj
def history(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, as_json: bool) -> None:
    """Everything that happened to a run, in its one order.

    A number after # is that of a command: what asked for something and what answered it have the same one.
    """
    events = handle_of(target, workflow_id, run_id).history()
    if as_json:
        print_json([dataclasses.asdict(event) for event in events])
        return
    table = make_table(["event", "at", "after", "type", "#", "name", "details"])
    for event in events:
        seq = event.attributes.get("seq")
        table.add_row(
            str(event.event_id),
            event.at.astimezone().strftime("%H:%M:%S.%f")[:-3],
            duration((event.at - events[0].at).total_seconds()),
            text(event.type),
            "" if seq is None else str(seq),
            text(event.name or ""),
            text(details(event)),
        )
    start = events[0].at.astimezone()
    click.echo(f"{events[0].name}, started {start:%Y-%m-%d %H:%M:%S %Z}")
    print_table(table)


def details(event: HistoryEvent) -> str:
    """What an event carries, on one line."""
    parts = []
    for name, value in event.attributes.items():
        if name in ("seq", "hash"):
            continue
        if name == "ms":
            parts.append(duration(value / 1000))
        elif name == "failure" and isinstance(value, dict):
            parts.append(f"{value.get('type')}: {value.get('message')}")
        elif name == "input" and isinstance(value, dict) and set(value) == {"args", "kwargs"}:
            arguments = [cell_json(v) for v in value["args"]]
            arguments += [f"{k}={cell_json(v)}" for k, v in value["kwargs"].items()]
            parts.append(f"({', '.join(arguments)})")
        elif name in ("result", "payload"):
            parts.append(cell_json(value))
        else:
            parts.append(f"{name}={cell(value)}")
    line = " ".join("  ".join(parts).split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def cell_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# --- acting ----------------------------------------------------------------------------------------------


@group.command("start")
@click.argument("name")
@click.option(
    "--queue", "queue_name", metavar="STREAM", required=True, help="The stream whose workers know the workflow."
)
@click.option("--args", "args_json", metavar="JSON", default="[]", show_default=True, help="The arguments, a list.")
@click.option(
    "--kwargs", "kwargs_json", metavar="JSON", default="{}", show_default=True, help="The named ones, an object."
)
@click.option("--id", "workflow_id", metavar="WORKFLOW_ID", help="The business key; by default the run's id.")
@click.option("--id-conflict", type=click.Choice(["fail", "use_existing", "terminate_existing"]), default="fail",
              show_default=True, help="What to do when a live run has the id.")  # fmt: skip
@click.option("--id-reuse", type=click.Choice(["allow", "allow_failed", "reject"]), default="allow",
              show_default=True, help="Whether an id of closed runs may be used again.")  # fmt: skip
@click.option("--delay", metavar="DURATION", default="0s", show_default=True, help='Start later, e.g. "10 minutes".')
@option_json
@click.pass_obj
def start(
    target: Target,
    name: str,
    queue_name: str,
    args_json: str,
    kwargs_json: str,
    workflow_id: str | None,
    id_conflict: str,
    id_reuse: str,
    delay: str,
    as_json: bool,
) -> None:
    """Start the workflow NAME; its code need not be here."""
    from ..durations import parse_duration
    from ..operations import StartRun
    from ..workflow.converter import encode_call
    from ..workflow.options import check_name, check_queue_name

    args, kwargs = parse(args_json, "--args"), parse(kwargs_json, "--kwargs")
    if not isinstance(args, list):
        raise click.UsageError("--args is a list in JSON, like '[\"o-1\", 500]'")
    if not isinstance(kwargs, dict):
        raise click.UsageError("--kwargs is an object in JSON, like '{\"cents\": 500}'")
    try:
        delay_ms = parse_duration(delay)
    except ValueError as e:
        raise click.UsageError(f"--delay: {e}") from None
    check_name(name, "a workflow's name")
    check_queue_name(queue_name)
    if workflow_id is not None:
        check_name(workflow_id, "a workflow id")
    new = uuid.uuid4()
    workflow_id = workflow_id or str(new)
    payload = target.broker.codecs.encode(encode_call(tuple(args), kwargs, None, name))
    operation = StartRun(
        new.bytes,
        workflow_id,
        target.broker.stream_id(queue_name),
        name,
        payload,
        id_conflict,
        id_reuse,
        delay_ms,
    )
    status, found = target.broker.commit.submit(operation)
    run_id = str(uuid.UUID(bytes=found))
    if as_json:
        print_json({"workflow_id": workflow_id, "run_id": run_id, "status": status})
    else:
        click.echo(f"{status} {workflow_id} (run {run_id})")


@group.command("signal")
@click.argument("workflow_id")
@click.argument("name")
@click.argument("payload", metavar="[JSON]", required=False)
@click.option("--run-id", metavar="UUID", type=click.UUID, help="One run in particular.")
@click.option("--id", "key", metavar="KEY", help="The same key twice is one signal.")
@click.pass_obj
def signal(
    target: Target, workflow_id: str, name: str, payload: str | None, run_id: uuid.UUID | None, key: str | None
) -> None:
    """Send the signal NAME, with a payload in JSON."""
    value = None if payload is None else parse(payload, "the payload")
    handle_of(target, workflow_id, run_id).signal(name, value, id=key)
    click.echo(f"signal {name} sent to {workflow_id}")


@group.command("cancel")
@option_run
@click.pass_obj
def cancel(target: Target, workflow_id: str | None, run_id: uuid.UUID | None) -> None:
    """Ask a run to end itself: its code may clean up first."""
    handle_of(target, workflow_id, run_id).cancel()
    click.echo(f"asked {workflow_id or run_id} to cancel itself")


@group.command("terminate")
@option_run
@click.option("--reason", help="Why; it is kept in the history.")
@click.pass_obj
def terminate(target: Target, workflow_id: str | None, run_id: uuid.UUID | None, reason: str | None) -> None:
    """End a run at once, without a word to its code."""
    handle_of(target, workflow_id, run_id).terminate(reason)
    click.echo(f"terminated {workflow_id or run_id}")
