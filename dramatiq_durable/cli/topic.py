"""``dramatiq-durable topic``: which actors are given what runs emit."""

from __future__ import annotations

import click

from .. import topics
from ..workflow.options import check_name, check_queue_name
from .output import print_rows
from .target import Target, option_json


@click.group("topic")
def group() -> None:
    """Topics: what runs emit, and the actors that are given it."""


@group.command("list")
@option_json
@click.pass_obj
def list_(target: Target, as_json: bool) -> None:
    """All subscriptions.

    waiting: events that the actor has not dealt with yet.  everywhere: it is given what any run emits, and not only
    runs of the streams that its worker's login was granted.
    """
    rows = target.rows("list_subscriptions")
    columns = ("topic", "actor", "queue_name", "waiting", "everywhere", "created_at")
    print_rows(rows, columns, as_json=as_json, empty="nobody is subscribed to any topic")


@group.command("subscribe")
@click.argument("topic")
@click.option("--actor", required=True, metavar="NAME", help="The actor to give the events to.")
@click.option("--queue", "queue_name", required=True, metavar="STREAM", help="The stream whose workers know it.")
@click.pass_obj
def subscribe(target: Target, topic: str, actor: str, queue_name: str) -> None:
    """Give an actor every event of TOPIC from now on, before any worker of it has started."""
    check_name(topic, "a topic")
    check_name(actor, "an actor's name")
    check_queue_name(queue_name)
    (new,) = topics.register(target.broker, [(topic, queue_name, actor, 0)])
    click.echo(f"{actor} is subscribed to {topic}{'' if new else ' already'}")


@group.command("unsubscribe")
@click.argument("topic")
@click.option("--actor", required=True, metavar="NAME", help="The actor that is subscribed.")
@click.option("--queue", "queue_name", required=True, metavar="STREAM", help="Its stream.")
@click.pass_obj
def unsubscribe(target: Target, topic: str, actor: str, queue_name: str) -> None:
    """End a subscription, and drop what the actor has not been given yet.

    A worker that starts with code that still subscribes the actor subscribes it again.
    """
    if not topics.drop(target.broker, topic, queue_name, actor):
        raise click.ClickException(f"{actor} on {queue_name} is not subscribed to {topic}: see `topic list`")
    click.echo(f"{actor} is no longer subscribed to {topic}")
