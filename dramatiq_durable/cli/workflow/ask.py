"""``dramatiq-durable workflow query`` and ``update``."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import click

from ...durations import parse_duration
from ..output import print_json
from ..target import Target, option_json
from ..values import parse, shown
from .which import handle_of, option_run_id


def option_timeout(default: str | None) -> Callable[[Any], Any]:
    """Add ``--timeout``."""
    return click.option(
        "--timeout", metavar="DURATION", default=default, show_default=default or "none", help="How long to wait."
    )


@click.command("query")
@click.argument("workflow_id")
@click.argument("name")
@click.argument("values", metavar="[JSON]...", nargs=-1)
@option_run_id
@option_timeout("10s")
@option_json
@click.pass_obj
def query(
    target: Target,
    workflow_id: str,
    name: str,
    values: tuple[str, ...],
    run_id: uuid.UUID | None,
    timeout: str,
    as_json: bool,
) -> None:
    """Ask a run the query NAME, with arguments in JSON; a worker that knows the workflow answers."""
    _check(timeout)
    _print(handle_of(target, workflow_id, run_id).query(name, *_arguments(values), timeout=timeout), as_json)


@click.command("update")
@click.argument("workflow_id")
@click.argument("name")
@click.argument("values", metavar="[JSON]...", nargs=-1)
@option_run_id
@click.option("--id", "update_id", metavar="KEY", help="The same key twice is one update.")
@click.option("--wait", type=click.Choice(["completed", "accepted"]), default="completed", show_default=True,
              help="For what to wait.")  # fmt: skip
@option_timeout(None)
@option_json
@click.pass_obj
def update(
    target: Target,
    workflow_id: str,
    name: str,
    values: tuple[str, ...],
    run_id: uuid.UUID | None,
    update_id: str | None,
    wait: str,
    timeout: str | None,
    as_json: bool,
) -> None:
    """Have a run carry out the update NAME, with arguments in JSON, and print what came of it."""
    _check(timeout)
    handle = handle_of(target, workflow_id, run_id)
    arguments = _arguments(values)
    if wait == "completed":
        _print(handle.update(name, *arguments, update_id=update_id, timeout=timeout), as_json)
        return
    accepted = handle.update(name, *arguments, update_id=update_id, wait="accepted", timeout=timeout)
    if as_json:
        print_json({"update_id": accepted.update_id, "status": "accepted"})
    else:
        click.echo(f"accepted: {accepted.update_id}")


def _arguments(values: tuple[str, ...]) -> list[Any]:
    return [parse(value, f"argument {number}") for number, value in enumerate(values, 1)]


def _check(timeout: str | None) -> None:
    if timeout is not None:
        try:
            parse_duration(timeout)
        except ValueError as e:
            raise click.UsageError(f"--timeout: {e}") from None


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(shown(value))
