"""``dramatiq-durable role``: who may do what."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, get_args

import click

from ..worker_logins import Credential
from ..worker_roles import Kind
from .confirm import confirm, option_yes
from .output import cell, duration, print_facts, print_json, print_rows
from .target import Target, names, option_json, option_limit


@click.group("role")
def group() -> None:
    """Roles: which logins of the database may use which streams."""


@group.command("provision")
@click.argument("name")
@click.option("--stream", "streams", metavar="STREAM", multiple=True, help="It consumes this one. May be repeated.")
@click.option(
    "--produce",
    metavar="STREAM",
    multiple=True,
    help="It may send to this one and start its workflows. May be repeated.",
)
@click.option("--kind", type=click.Choice(get_args(Kind)), default="worker", show_default=True, help="What it is for.")
@click.option("--expires", metavar="WHEN", help='For how long, like "30 days", or until when, like 2030-01-31T12:00Z.')
@click.option("--connection-limit", type=int, metavar="N", help="The most sessions at once.")
@click.option("--max-live", type=int, metavar="N", help="The most live messages of its sending. [default: 100000]")
@click.option("--max-statement", default="30s", show_default=True, metavar="TIME", help="For a statement; or none.")
@click.option("--max-transaction", default="10s", show_default=True, metavar="TIME", help="For a transaction; or none.")
@option_json
@click.pass_obj
def provision(
    target: Target,
    name: str,
    streams: tuple[str, ...],
    produce: tuple[str, ...],
    kind: str,
    expires: str | None,
    connection_limit: int | None,
    max_live: int | None,
    max_statement: str,
    max_transaction: str,
    as_json: bool,
) -> None:
    """Make a database role for the worker NAME, and show its password: once, here.

    worker: takes all that its streams have; activity: messages and activities, never a workflow; workflow: only the
    tasks of workflows; producer: takes nothing; monitor: may look at counts.

    Run it as an administrator of the namespace who may create roles.
    """
    from ..worker_roles import provision

    made = provision(
        target.broker.database, name=name, streams=names(streams), produce=names(produce), kind=kind,
        expires=_when(expires), connection_limit=connection_limit, max_live=max_live,
        max_statement=_limit(max_statement), max_transaction=_limit(max_transaction),
    )  # fmt: skip
    _show_credential(made, as_json)


@group.command("rotate")
@click.argument("name")
@click.option(
    "--overlap", default="1h", show_default=True, metavar="TIME",
    help="For how long the old login goes on; with 0 its sessions end at once.",
)  # fmt: skip
@option_json
@click.pass_obj
def rotate(target: Target, name: str, overlap: str, as_json: bool) -> None:
    """Give the worker NAME another login, and show its password: once, here."""
    from ..worker_roles import rotate

    _show_credential(rotate(target.broker.database, name, "0s" if overlap == "0" else overlap), as_json)


@group.command("revoke")
@click.argument("name")
@option_yes
@option_json
@click.pass_obj
def revoke(target: Target, name: str, yes: bool, as_json: bool) -> None:
    """End the worker NAME: its rights, its sessions, its roles.  What it holds is handed to others."""
    from ..worker_roles import revoke

    confirm(f"Revoke {name!r}, end its sessions and drop its logins?", yes=yes)
    done = revoke(target.broker.database, name)
    if as_json:
        print_json(done)
        return
    for line in done:
        click.echo(line)


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """Who may use the namespace: workers that were provisioned, applications and administrators.

    state: live; expired; barred (the role may not log in); missing (somebody dropped the role).
    """
    rows = target.rows("list_roles")
    if not as_json:
        for row in rows:
            row["everything"] = row["kind"] == "administrator"
            row["consume"] = "every stream" if row["everything"] else row["consume"]
            row["produce"] = "every stream" if row["everything"] else row["produce"]
    columns = ("name", "kind", "consume", "produce", "login", "state", "expires_at", "sessions")
    print_rows(rows, columns, as_json=as_json, empty="nobody may use the namespace")


@group.command("show")
@click.argument("name")
@option_limit(20)
@option_json
@click.pass_obj
def show(target: Target, name: str, limit: int, as_json: bool) -> None:
    """One role: what it may do, its logins, and what was done to it, the latest first.

    What was done stays to be seen after a role was revoked.
    """
    from ..errors import RoleNotFound

    rows = [row for row in target.rows("list_roles") if row["name"] == name]
    events = target.rows("list_role_events", name, limit)
    for event in events:
        event["details"] = None if event["details"] is None else json.loads(event["details"])
    if not rows and not events:
        raise RoleNotFound(f"there is no role {name!r}: `role list` has the names")
    whole = ("name", "kind", "consume", "produce", "max_live", "max_statement", "max_transaction", "created_at")
    facts: dict[str, Any] = {column: rows[0][column] for column in whole} if rows else {"name": name, "kind": "revoked"}
    logins = [{k: v for k, v in row.items() if k not in whole} for row in rows if row["login"] is not None]
    if as_json:
        print_json(facts | {"logins": logins, "events": events})
        return
    for limited in ("max_statement", "max_transaction"):
        facts[limited] = None if facts.get(limited) is None else duration(facts[limited])
    print_facts({key: value for key, value in facts.items() if value not in (None, [])}, as_json=False)
    if rows:
        columns = ["login", "state", "login_created_at", "expires_at", "connection_limit", "sessions"]
        print_rows(logins, columns, as_json=False, empty="it has no login")
    for event in events:
        event["details"] = ", ".join(
            f"{k} {cell(v)}" for k, v in (event["details"] or {}).items() if v not in ([], False)
        )
    print_rows(
        events, ["at", "by", "action", "login", "details"], as_json=False, empty="nothing was noted", limit=limit
    )


@group.command("grant")
@click.argument("login")
@click.option("--admin", is_flag=True, help="Every stream, and the commands for operators.")
@click.option("--consume", metavar="STREAM", multiple=True, help="May take its messages. May be repeated.")
@click.option(
    "--produce", metavar="STREAM", multiple=True, help="May send to it and start its workflows. May be repeated."
)
@option_json
@click.pass_obj
def grant(
    target: Target, login: str, admin: bool, consume: tuple[str, ...], produce: tuple[str, ...], as_json: bool
) -> None:
    """Let an existing LOGIN of the database use streams.

    Only adds to what it may do already.  Run it as the login that migrated the namespace.
    """
    if not (admin or consume or produce):
        raise click.UsageError("say what to grant: --admin, --consume STREAM, --produce STREAM")
    from ..roles import grant_login

    given = grant_login(target.broker.database, login, admin=admin, consume=names(consume), produce=names(produce))
    if as_json:
        print_json(given)
        return
    for line in given:
        click.echo(line)


def _when(text: str | None) -> str | datetime | None:
    """A length of time, or a point in time."""
    if text is None or not re.match(r"\d{4}-\d\d-\d\d", text):
        return text
    try:
        return datetime.fromisoformat(text).astimezone() if len(text) > 10 else datetime.fromisoformat(text + "T00:00Z")
    except ValueError as e:
        raise click.UsageError(f"--expires {text}: {e}; write it like 2030-01-31T12:00Z") from e


def _limit(text: str) -> str | None:
    return None if text in ("none", "off") else text


def _show_credential(made: Credential, as_json: bool) -> None:
    print_facts({"role": made.role, "password": made.password, "url": made.url}, as_json=as_json)
    if not as_json:
        click.echo("This is shown once. Give the worker's process the URL as DRAMATIQ_DURABLE_URL.", err=True)
