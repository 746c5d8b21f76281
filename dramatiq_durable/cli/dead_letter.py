"""``dramatiq-durable dead-letter``: messages that will not be tried again."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from ..delivery import key_of
from ..durations import parse_duration
from .confirm import confirm, option_dry_run, option_yes
from .output import print_facts, print_json, print_rows
from .payload import call, decode, last_line
from .target import Target, option_json, option_limit

#: How many letters one transaction redrives or drops.
BATCH = 500

#: More letters than there are.
ALL = 2**31 - 1

#: Of the letters that stay, so many are named in a line; ``--json`` has all of them.
NAMED = 10


@dataclass(frozen=True)
class Filter:
    """Which dead letters a command is about; None matches all."""

    letters: list[int] | None
    messages: list[uuid.UUID] | None
    stream: str | None
    actor: str | None
    reason: str | None
    after: datetime | None
    before: datetime | None
    text: str | None

    def arguments(self) -> list[Any]:
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def __bool__(self) -> bool:
        return any(value is not None for value in self.arguments())

    @property
    def has_ids(self) -> bool:
        return self.letters is not None


def moment(ctx: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    """A time, or an age like "2h": so long ago."""
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
        return at if at.tzinfo is not None else at.astimezone()
    except ValueError:
        pass
    try:
        return datetime.now(UTC) - timedelta(milliseconds=parse_duration(value))
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f'{value!r} is neither a time like "2026-01-31 12:00" nor an age like "2h" or "3 days"'
        ) from None


def ids(values: tuple[str, ...]) -> tuple[list[int] | None, list[uuid.UUID] | None]:
    """Numbers of letters, and ids of messages."""
    if not values:
        return None, None
    letters = [int(value) for value in values if _is_number(value)]
    return letters, [uuid.UUID(bytes=key_of(value)) for value in values if not _is_number(value)]


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit() and int(value) < 2**63


def filters(command: Callable[..., Any]) -> Any:
    """Add the filters to a command, which gets them as one."""

    @functools.wraps(command)
    def filtered(
        *args: Any,
        id_: tuple[str, ...],
        stream: str | None,
        actor: str | None,
        reason: str | None,
        after: datetime | None,
        before: datetime | None,
        text: str | None,
        **kwargs: Any,
    ) -> Any:
        chosen = Filter(*ids(id_), stream, actor, reason, after, before, text)
        return command(*args, chosen=chosen, **kwargs)

    options = [
        click.argument("id_", metavar="[ID]...", nargs=-1),
        click.option("--stream", metavar="NAME", help="Only those of this stream."),
        click.option("--actor", metavar="NAME", help="Only those for this actor."),
        click.option(
            "--reason",
            type=click.Choice(["rejected", "poison", "aborted", "unsettled"]),
            help="Why: its retries ran out or it was refused; its workers died; somebody aborted it; its end could "
            "not be stored.",
        ),
        click.option("--after", metavar="WHEN", callback=moment, help="Died since then: a time, or an age like 2h."),
        click.option("--before", metavar="WHEN", callback=moment, help="Died before: a time, or an age like 2h."),
        click.option("--text", metavar="TEXT", help="This is somewhere in the failure (capitals do not matter)."),
    ]
    for option in reversed(options):
        filtered = option(filtered)
    return filtered


@click.group("dead-letter")
def group() -> None:
    """Dead letters: messages that will not be tried again.

    Their retries ran out, they kept killing workers, they were aborted, or their end could not be stored.

    ID is the number of a letter, or the id of its message.  Several filters together: all of them hold.
    """


@group.command("list")
@filters
@option_limit(100)
@option_json
@click.pass_context
def list_(ctx: click.Context, chosen: Filter, limit: int, as_json: bool) -> None:
    """The latest dead letters, newest first.

    reason: rejected (its retries ran out, or it was refused), poison (its workers died), aborted, or unsettled (its
    end, or what its hooks send, could not be stored).  JSON has all of the failure, and the arguments.
    """
    target: Target = ctx.obj
    rows = target.rows("list_dead_letters", *chosen.arguments(), limit)
    for row in rows:
        row |= decode(row["payload"], row["kind"], target.broker.codecs)
        if not as_json:
            row["arguments"] = call(row)
            row["failure"] = last_line(row["failure"])
    columns = ("dead_letter_id", "stream", "actor", "arguments", "reason", "attempt", "died_at", "failure")
    empty = "there are no dead letters" + (" like these" if chosen else "")
    print_rows(rows, columns, as_json=as_json, empty=empty, limit=limit)
    if chosen.has_ids and not rows:
        ctx.exit(1)


@group.command("show")
@click.argument("id_", metavar="ID")
@option_json
@click.pass_obj
def show(target: Target, id_: str, as_json: bool) -> None:
    """Everything about one dead letter: its arguments and options, and all of its failure."""
    rows = target.rows("list_dead_letters", *ids((id_,)), *[None] * 6, 1)
    if not rows:
        raise click.ClickException(f"there is no dead letter {id_}; `dead-letter list` shows those that are")
    facts = rows[0]
    facts |= decode(facts.pop("payload"), facts["kind"], target.broker.codecs)
    if not as_json:
        # What Dramatiq keeps of the traceback has lines of its own.
        traceback = (facts.get("options") or {}).pop("traceback", None)
        facts |= {"traceback": traceback}
    print_facts(facts if as_json else {k: v for k, v in facts.items() if v is not None}, as_json=as_json)


@group.command("redrive")
@filters
@click.option("--all", "everything", is_flag=True, help="All of them, where no filter is given.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, the oldest first.")
@option_dry_run
@option_yes
@option_json
@click.pass_context
def redrive(ctx: click.Context, /, **options: Any) -> None:
    """Bring dead letters back to their streams, due now, the oldest first.

    Each has its id, its arguments and options byte for byte, its number of attempts and its last failure; its retries
    are counted anew, and so are the deaths of workers.  One whose id or unique key a live message has stays.
    """
    _in_batches(ctx, "redrive", "redriven", **options)


@group.command("drop")
@filters
@click.option("--all", "everything", is_flag=True, help="All of them, where no filter is given.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, the oldest first.")
@option_dry_run
@option_yes
@option_json
@click.pass_context
def drop(ctx: click.Context, /, **options: Any) -> None:
    """Delete dead letters for good, the oldest first."""
    _in_batches(ctx, "drop", "dropped", **options)


def _in_batches(
    ctx: click.Context,
    verb: str,
    done: str,
    *,
    chosen: Filter,
    everything: bool,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Redrive or drop, a batch a transaction: what is done stays done when a later one fails."""
    if not chosen and not everything:
        raise click.UsageError(f"say which to {verb}: name ids, give a filter, or --all")
    if chosen and everything:
        raise click.UsageError("--all goes with no ids and no filters")
    target: Target = ctx.obj
    counted = target.rows("count_dead_letters", *chosen.arguments(), limit or ALL)
    count = sum(row["letters"] for row in counted)
    last = max((row.pop("last") for row in counted), default=0)
    summary = {"dry_run": dry_run, "matched": count, done: 0, "kept": [], "letters": counted}
    if count and not dry_run:
        confirm(f"{verb.capitalize()} {count} dead letters?", yes=yes)
        _run(target, verb, done, chosen, count, last, summary)
    if as_json:
        print_json(summary)
    elif dry_run or not count:
        print_rows(counted, ("stream", "actor", "reason", "letters"), as_json=False, empty="no dead letter matches")
    else:
        click.echo(f"{done} {summary[done]} dead letters")
        if summary["kept"]:
            named = ", ".join(map(str, summary["kept"][:NAMED])) + (", …" if len(summary["kept"]) > NAMED else "")
            click.echo(
                f"{len(summary['kept'])} stay, because a live message has their id or unique key: {named}", err=True
            )
    if chosen.has_ids and not (count if dry_run else summary[done]):
        ctx.exit(1)


def _run(target: Target, verb: str, done: str, chosen: Filter, count: int, last: int, summary: dict[str, Any]) -> None:
    above = 0
    while count > 0:
        size = min(BATCH, count)
        [row] = target.rows(f"{verb}_dead_letters", *chosen.arguments(), above, last, size)
        summary[done] += row[done]
        summary["kept"] += row.get("kept", [])
        if row["matched"] < size:
            break
        count -= size
        above = row["last"]
