"""``dramatiq-durable role``: who may do what."""

from __future__ import annotations

import click

from .target import Target, names


@click.group("role")
def group() -> None:
    """Roles: which logins of the database may use which streams."""


@group.command("grant")
@click.argument("login")
@click.option("--admin", is_flag=True, help="Every stream, and the commands for operators.")
@click.option("--consume", metavar="STREAM", multiple=True, help="May take its messages. May be repeated.")
@click.option(
    "--produce", metavar="STREAM", multiple=True, help="May send to it and start its workflows. May be repeated."
)
@click.pass_obj
def grant(target: Target, login: str, admin: bool, consume: tuple[str, ...], produce: tuple[str, ...]) -> None:
    """Let an existing LOGIN of the database use streams.

    Only adds to what it may do already.  Run it as the login that migrated the namespace.
    """
    if not (admin or consume or produce):
        raise click.UsageError("say what to grant: --admin, --consume STREAM, --produce STREAM")
    from ..roles import grant_login

    given = grant_login(target.broker.database, login, admin=admin, consume=names(consume), produce=names(produce))
    for line in given:
        click.echo(line)
