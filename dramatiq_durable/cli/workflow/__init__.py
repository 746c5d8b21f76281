"""``dramatiq-durable workflow``: runs, from outside and without their code."""

from __future__ import annotations

import click

from . import act, ask, files, look, start
from .lint import command as lint


@click.group("workflow", short_help="Workflows: start, look at, tell, end them.")
def group() -> None:
    """Workflows: start them, look at them, tell them something, end them.

    WORKFLOW_ID means the live run that has the id, or else the latest; --run-id means one run in particular.
    """


for command in (
    start.command,
    look.list_,
    look.show,
    look.history,
    act.signal,
    ask.query,
    ask.update,
    act.cancel,
    act.terminate,
    act.reset,
    files.export,
    files.replay,
    lint,
):
    group.add_command(command)
