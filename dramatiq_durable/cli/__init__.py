"""The command ``dramatiq-durable``: one module for each group of commands, imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

import click

#: Where each command is: a module of this package, and what is called in it.
COMMANDS = {
    "check": "check:command",
    "dead-letter": "dead_letter:group",
    "escalation": "escalation:group",
    "exporter": "exporter:command",
    "import": "import_:group",
    "message": "message:group",
    "migrate": "migrate:command",
    "prune": "prune:command",
    "role": "role:group",
    "schedule": "schedule:group",
    "stream": "stream:group",
    "top": "top:command",
    "topic": "topic:group",
    "ui": "ui:command",
    "watchdog": "watchdog:command",
    "worker": "worker:group",
    "workflow": "workflow:group",
}


class Commands(click.Group):
    """Knows the names of its commands, and imports only the one that is run.  Our errors become one clear line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        assert isinstance(found, click.Command)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        import psycopg

        from ..database import translate
        from ..errors import DurableError

        try:
            return super().invoke(ctx)
        except (DurableError, psycopg.Error) as e:
            error = translate(e) if isinstance(e, psycopg.Error) else e
            raise click.ClickException(" ".join(str(error).split())) from e


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", metavar="URL", help="The database. Default: DRAMATIQ_DURABLE_URL, else the embedded Postgres.")
@click.option(
    "--namespace", metavar="NAME", help="The Postgres schema. Default: DRAMATIQ_DURABLE_NAMESPACE, or durable."
)
@click.option(
    "--app", metavar="MODULE[:BROKER]", envvar="DRAMATIQ_DURABLE_APP",
    help="Your application, for its broker's codecs: values are shown decoded. Default: DRAMATIQ_DURABLE_APP.",
)  # fmt: skip
@click.version_option(package_name="dramatiq-durable")
@click.pass_context
def main(ctx: click.Context, url: str | None, namespace: str | None, app: str | None) -> None:
    """Look into, and look after, the queues and workflows of dramatiq-durable."""
    from .target import Target

    target = ctx.obj = Target(url, namespace, app)
    ctx.call_on_close(target.close)
