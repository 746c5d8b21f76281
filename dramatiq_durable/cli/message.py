"""``dramatiq-durable message``: single messages, by their ids."""

from __future__ import annotations

import click

from ..abort import abort as abort_message
from .output import print_json
from .target import Target, option_json


@click.group("message")
def group() -> None:
    """Messages, by their ids (`stream peek` shows them)."""


@group.command("abort")
@click.argument("message_ids", metavar="MESSAGE_ID...", nargs=-1, required=True)
@click.option("--cancel", is_flag=True, help="Leave alone what a worker has already taken.")
@option_json
@click.pass_context
def abort(ctx: click.Context, message_ids: tuple[str, ...], cancel: bool, as_json: bool) -> None:
    """Abort messages: what waits does not run, what runs is interrupted; neither is retried.

    Ends with 1 when one of them is missing (finished or unknown).  For a workflow there is `workflow cancel`.
    """
    target: Target = ctx.obj
    answers = {
        message_id: abort_message(message_id, mode="cancel" if cancel else "abort", broker=target.broker)
        for message_id in message_ids
    }
    said = {
        "queued": "it was waiting, and will not run",
        "running": "a worker has it: left alone" if cancel else "a worker has it: it is being interrupted",
        "missing": "there is no such message, or it is finished",
    }
    if as_json:
        print_json(answers)
    else:
        for message_id, answer in answers.items():
            click.echo(f"{message_id}: {said[answer]}")
    if "missing" in answers.values():
        ctx.exit(1)
