"""``dramatiq-durable escalation``: what workflows wait for people to do."""

from __future__ import annotations

import getpass
from typing import Any

import click

from .. import escalations
from ..durations import parse_duration
from ..errors import EscalationConflict
from ..escalations import STATUSES, Escalation
from .confirm import confirm, option_dry_run, option_yes
from .output import facts_of, print_facts, print_json, print_rows
from .target import Target, option_json, option_limit
from .values import parse

COLUMNS = (
    *("id", "role", "subject", "type", "priority", "status", "opened_at", "workflow_id"),
    *("claimed_by", "times_out_at"),
)

#: Shown where one has it.
OPTIONAL = ("subject", "type", "claimed_by", "times_out_at")


@click.group("escalation")
def group() -> None:
    """Escalations: what workflows wait for people to do."""


def option_by(command: Any) -> Any:
    """Add ``--by``."""
    return click.option(
        "--by", metavar="NAME", default=getpass.getuser, show_default="your login here", help="Who does it."
    )(command)


def option_for(command: Any) -> Any:
    """Add ``--for``: how long a claim lasts."""
    return click.option(
        "--for",
        "timeout",
        metavar="DURATION",
        help='How long it is yours, e.g. "30 minutes"; by default until released.',
    )(command)


@group.command("list")
@click.option("--role", help="Only those for this role.")
@click.option("--status", type=click.Choice(STATUSES), help="Only those that stand like this.")
@click.option("--subject", help="Only those with this subject.")
@click.option("--type", "type_", help="Only those of this type.")
@click.option("--metadata", metavar="JSON", help="Only those whose metadata have this, an object.")
@click.option("--after", metavar="ID", help="Go on behind the last one of a listing.")
@option_limit(100)
@option_json
@click.pass_obj
def list_(
    target: Target,
    role: str | None,
    status: escalations.Status | None,
    subject: str | None,
    type_: str | None,
    metadata: str | None,
    after: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Escalations, by priority (lower first) and then age."""
    found = escalations.list(
        role=role,
        status=status,
        subject=subject,
        type=type_,
        metadata=_metadata(metadata),
        limit=limit,
        after=after,
        broker=target.broker,
    )
    rows = [facts_of(e) for e in found]
    columns = [c for c in COLUMNS if c not in OPTIONAL or any(row[c] is not None for row in rows)]
    print_rows(rows, columns, as_json=as_json, empty="there are no escalations", limit=limit)


@group.command("show")
@click.argument("id", metavar="ID")
@option_json
@click.pass_obj
def show(target: Target, id: str, as_json: bool) -> None:
    """One escalation: what is asked, and how it stands."""
    _print(escalations.get(id, broker=target.broker), as_json)


@group.command("claim")
@click.argument("id", metavar="[ID]", required=False)
@click.option("--role", help="Instead of ID: the one of this role that comes first.")
@click.option("--metadata", metavar="JSON", help="With --role: only one whose metadata have this, an object.")
@option_by
@option_for
@option_json
@click.pass_obj
def claim(
    target: Target,
    id: str | None,
    role: str | None,
    metadata: str | None,
    by: str,
    timeout: str | None,
    as_json: bool,
) -> None:
    """Claim an escalation: nobody else can resolve it then."""
    if (id is None) == (role is None):
        raise click.UsageError("say which one: either ID, or --role ROLE for the one that comes first")
    if metadata is not None and role is None:
        raise click.UsageError("--metadata goes with --role")
    if timeout is not None:
        try:
            parse_duration(timeout)
        except ValueError as e:
            raise click.UsageError(f"--for: {e}") from None
    claimed: Escalation | None
    if id is not None:
        claimed = escalations.claim(id, by=by, timeout=timeout, broker=target.broker)
    else:
        assert role is not None
        wanted = _metadata(metadata)
        claimed = escalations.claim_next(role=role, by=by, timeout=timeout, metadata=wanted, broker=target.broker)
    if claimed is None:
        if as_json:
            print_json(None)
        else:
            click.echo(f"nothing waits for the role {role}")
        raise click.exceptions.Exit(1)
    _print(claimed, as_json)


@group.command("release")
@click.argument("id", metavar="ID")
@option_by
@option_json
@click.pass_obj
def release(target: Target, id: str, by: str, as_json: bool) -> None:
    """Give back what you have claimed."""
    _done("released", escalations.release(id, by=by, broker=target.broker), as_json)


@group.command("resolve")
@click.argument("id", metavar="ID")
@click.argument("payload", metavar="[JSON]", required=False)
@option_by
@option_json
@click.pass_obj
def resolve(target: Target, id: str, payload: str | None, by: str, as_json: bool) -> None:
    """Resolve an escalation, with a payload in JSON: the workflow goes on with it."""
    value = None if payload is None else parse(payload, "the payload")
    _done("resolved", escalations.resolve(id, value, by, broker=target.broker), as_json)


@group.command("cancel")
@click.argument("id", metavar="[ID]", required=False)
@click.option("--role", help="Instead of ID: all that are open for this role.")
@option_yes
@option_dry_run
@option_json
@click.pass_obj
def cancel(target: Target, id: str | None, role: str | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Cancel an escalation, whoever has claimed it: the workflow gets an error."""
    if (id is None) == (role is None):
        raise click.UsageError("say which: either ID, or --role ROLE for all that are open for it")
    if id is not None:
        if dry_run:
            _print(escalations.get(id, broker=target.broker), as_json)
        else:
            _done("cancelled", escalations.cancel(id, broker=target.broker), as_json)
        return
    before = escalations.stats(role, broker=target.broker)
    count = before.waiting + before.claimed
    if dry_run or not count:
        _count("would be cancelled" if dry_run else "cancelled", count, as_json)
        return
    confirm(f"Cancel {count} escalations for {role}?", yes=yes)
    cancelled = 0
    statuses: tuple[escalations.Status, ...] = ("waiting", "claimed")
    for status in statuses:
        while found := escalations.list(role=role, status=status, limit=1000, broker=target.broker):
            for one in found:
                try:
                    escalations.cancel(one.id, broker=target.broker)
                except EscalationConflict:
                    # Somebody was quicker.
                    continue
                cancelled += 1
    _count("cancelled", cancelled, as_json)


@group.command("reassign")
@click.argument("id", metavar="ID")
@click.option("--role", required=True, help="Who is asked from now on.")
@option_json
@click.pass_obj
def reassign(target: Target, id: str, role: str, as_json: bool) -> None:
    """Give an escalation to another role; a claim of it ends."""
    _done(f"reassigned to {role}", escalations.reassign(id, role=role, broker=target.broker), as_json)


@group.command("stats")
@click.option("--role", help="Only those for this role.")
@option_json
@click.pass_obj
def stats(target: Target, role: str | None, as_json: bool) -> None:
    """How many escalations there are of each kind."""
    print_facts(facts_of(escalations.stats(role, broker=target.broker)), as_json=as_json)


def _metadata(metadata: str | None) -> dict[str, Any] | None:
    value = None if metadata is None else parse(metadata, "--metadata")
    if value is not None and not isinstance(value, dict):
        raise click.UsageError('--metadata is an object in JSON, like \'{"region": "eu"}\'')
    return value


def _print(escalation: Escalation, as_json: bool) -> None:
    facts = facts_of(escalation)
    print_facts(facts if as_json else {k: v for k, v in facts.items() if v not in (None, {})}, as_json=as_json)


def _done(what: str, escalation: Escalation, as_json: bool) -> None:
    if as_json:
        print_json(facts_of(escalation))
    else:
        click.echo(f"{what}: {escalation.id}" + (f" ({escalation.subject})" if escalation.subject else ""))


def _count(what: str, count: int, as_json: bool) -> None:
    if as_json:
        print_json({what.replace(" ", "_"): count})
    else:
        click.echo(f"{count} escalations {what}")
