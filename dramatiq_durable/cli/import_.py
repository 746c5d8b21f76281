"""``dramatiq-durable import``: messages that wait in another broker."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import dramatiq
from rich.console import Console

from .output import print_rows
from .target import Target, names, option_json

if TYPE_CHECKING:
    from ..importing.importer import Report
    from ..importing.source import Source


@click.group("import", short_help="Import: move what waits in another broker here.")
def group() -> None:
    """Import: move the messages that wait in another broker of Dramatiq into the streams.

    Stop the workers of the other broker first: what they hold is left to them.  An import that was cut short is run
    again: nothing is lost and nothing is doubled.
    """


def options(command: Any) -> Any:
    """What every import takes."""
    for option in reversed(
        [
            click.option("--queue", metavar="NAME", multiple=True, help="Only this queue. May be repeated."),
            click.option("--dead-letters", is_flag=True, help="Move the dead letters too."),
            click.option("--dry-run", is_flag=True, help="Only count; change nothing."),
            click.option(
                "--import",
                "modules",
                metavar="MODULE",
                multiple=True,
                help="Import this module first: it sets the encoder, or has actors. May be repeated.",
            ),
            click.option(
                "--batch",
                type=click.IntRange(1, 5000),
                default=500,
                show_default=True,
                help="How many messages are moved at once.",
            ),
            option_json,
        ]
    ):
        command = option(command)
    return command


@group.command("redis")
@click.argument("url")
@click.option(
    "--namespace", metavar="NAME", default="dramatiq", show_default=True, help="The namespace of the RedisBroker."
)
@options
@click.pass_obj
def redis(target: Target, /, url: str, namespace: str, **given: Any) -> None:
    """From the RedisBroker at URL, like redis://localhost:6379/0"""
    from ..importing.redis import RedisSource

    run(target, lambda: RedisSource(url, namespace), **given)


@group.command("rabbitmq")
@click.argument("url")
@options
@click.pass_obj
def rabbitmq(target: Target, /, url: str, **given: Any) -> None:
    """From the RabbitmqBroker at URL, like amqp://user:password@localhost:5672

    RabbitMQ does not list its queues: without --queue those are looked for that the actors of the imported modules
    have, and the streams that are here.
    """
    from ..importing.rabbitmq import RabbitmqSource

    run(target, lambda: RabbitmqSource(url), **given)


@group.command("postgres")
@click.argument("url")
@click.option(
    "--schema", metavar="NAME", default="dramatiq", show_default=True, help="The schema of the PostgresBroker."
)
@click.option("--prefix", metavar="TEXT", default="", help="The prefix of the PostgresBroker's tables.")
@options
@click.pass_obj
def postgres(target: Target, /, url: str, schema: str, prefix: str, **given: Any) -> None:
    """From dramatiq-pg's or dramatiq-postgres's tables at URL, like postgresql://user:password@localhost/database"""
    from ..importing.postgres import PostgresSource

    run(target, lambda: PostgresSource(url, schema, prefix), **given)


def run(
    target: Target,
    connect: Callable[[], Source],
    *,
    queue: tuple[str, ...],
    dead_letters: bool,
    dry_run: bool,
    modules: tuple[str, ...],
    batch: int,
    as_json: bool,
) -> None:
    """Move what there is, or count it, and print that."""
    from ..importing.importer import Importer

    declared = load(target, names(modules))
    source = connect()
    try:
        importer = Importer(
            target.broker, source, batch=batch, dead_letters=dead_letters, actors=declared.actors if declared else {}
        )
        reports = [importer.count(name) for name in chosen(target, source, names(queue), declared)]
        for report in [] if dry_run else reports:
            with Console(stderr=True).status("") as status:
                importer.move(report, lambda r: status.update(f"{r.queue}: {r.moved + r.already_there} of {r.found}"))
    finally:
        source.close()
    columns = ["queue", "found", "delayed", "dead", "in_flight"]
    if not dry_run:
        columns += ["moved", "already_there", "dead_moved", "undecodable"]
    rows = [dataclasses.asdict(report) for report in reports]
    print_rows(rows, columns, as_json=as_json, empty=f"{source.title} has no queue of Dramatiq's that is known here")
    for report in reports:
        for remark in remarks(report, source.title):
            click.echo(remark, err=True)


def load(target: Target, modules: list[str]) -> dramatiq.Broker | None:
    """Import modules of the application, with a broker set as in its worker; answers the broker that has its actors."""
    if not modules:
        return None
    if dramatiq.broker.global_broker is None:
        dramatiq.set_broker(target.broker)
    if "" not in sys.path:
        sys.path.insert(0, "")
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise click.UsageError(f"--import {module}: {e}") from e
    return dramatiq.get_broker()


def chosen(target: Target, source: Source, asked: list[str], declared: dramatiq.Broker | None) -> list[str]:
    """The queues to be moved."""
    streams = {row["name"] for row in target.rows("stream_counts")}
    if not asked:
        return source.queues([*streams, *(declared.get_declared_queues() if declared else ())])
    known = source.queues(asked)
    for name in asked:
        # A queue of Redis is gone with its last message: with a stream here, it is taken for one that was moved.
        if name not in known and not (source.lists and name in streams):
            there = f"it has {', '.join(known)}" if known else "nor any other of them"
            raise click.ClickException(f"{source.title} has no queue {name!r}; {there}")
    return list(dict.fromkeys(asked))


def remarks(report: Report, title: str) -> Iterator[str]:
    """What an operator should know of a queue."""
    if report.readers:
        yield (
            f"{report.queue}: {report.readers} worker(s) of {title} read it, or did a minute ago. "
            "What they hold is left to them: stop them, and import again"
        )
    elif report.in_flight:
        yield f"{report.queue}: {report.in_flight} message(s) are marked as taken by a worker, and are left to it"
    if report.undecodable:
        yield (
            f"{report.queue}: {report.undecodable} message(s) cannot be decoded and stay in {title}. "
            f"If they have another encoder, --import the module that sets it. {'; '.join(report.problems)}"
        )
    if report.members:
        yield (
            f"{report.queue}: {report.members} message(s) belong to groups with callbacks, which are counted by the "
            "limiter back end that they were sent with: let GroupCallbacks keep it until they are done"
        )
    if report.dead > report.dead_moved:
        stay = report.dead - report.dead_moved
        yield f"{report.queue}: {stay} dead letter(s) stay in {title}: --dead-letters moves them"
