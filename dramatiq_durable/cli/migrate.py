"""``dramatiq-durable migrate``"""

from __future__ import annotations

import click

from ..migrate import migrate
from .target import Target


@click.command("migrate")
@click.pass_obj
def command(target: Target) -> None:
    """Create the namespace, or bring it up to this version.

    Safe to run at any time and from many processes at once.  The login needs CREATE on the database, and CREATEROLE
    where scoped workers are wanted.
    """
    done = migrate(target.url, target.namespace)
    for line in done or [f"the namespace {target.namespace} is up to date"]:
        click.echo(line)
