"""Which run a command is about."""

from __future__ import annotations

import uuid
from typing import Any

import click

from ...workflow.client import get_handle
from ...workflow.handle import WorkflowHandle
from ..target import Target


def option_run(command: Any) -> Any:
    """Add ``WORKFLOW_ID`` and ``--run-id`` to a command."""
    return click.argument("workflow_id", required=False)(option_run_id(command))


def option_run_id(command: Any) -> Any:
    """Add ``--run-id`` to a command."""
    return click.option("--run-id", metavar="UUID", type=click.UUID, help="One run in particular.")(command)


def handle_of(target: Target, workflow_id: str | None, run_id: uuid.UUID | None) -> WorkflowHandle[Any]:
    """The run that a command is about.

    Raises:
      UsageError: none is named.
    """
    if workflow_id is None and run_id is None:
        raise click.UsageError("name the workflow: WORKFLOW_ID, or --run-id UUID")
    return get_handle(workflow_id, None if run_id is None else str(run_id), broker=target.broker)
