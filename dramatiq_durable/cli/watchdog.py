"""``dramatiq-durable watchdog``: ends what is over its limits."""

from __future__ import annotations

import dataclasses
import json
import signal
from datetime import UTC, datetime
from types import FrameType

import click

from ..watchdog import Ended, Watchdog
from .output import plain
from .target import Target, option_json


class _Stop(BaseException):
    """The process is to end."""


@click.command("watchdog", short_help="End what provisioned logins do for too long.")
@click.option("--once", is_flag=True, help="Look once, and end.")
@option_json
@click.pass_obj
def command(target: Target, once: bool, as_json: bool) -> None:
    """End the sessions of provisioned logins that are over their limits.

    Looks every second until it is stopped (SIGTERM, SIGINT), as an administrator of the namespace, and prints one line
    for each session that it has ended: who, why, for how long.  Only logins made by `role provision` are concerned:
    those that have expired or were revoked, and what takes longer than their max_statement or max_transaction.  Run one
    for each namespace, on a host that no such login can reach.
    """
    watchdog = Watchdog(target.broker.database)
    try:
        if once:
            for ended in watchdog.look():
                show(ended, as_json)
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        for ended in watchdog.watch():
            show(ended, as_json)
    except _Stop:
        return
    finally:
        watchdog.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop


def show(ended: Ended, as_json: bool) -> None:
    """One line, at once."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    if as_json:
        click.echo(json.dumps({"at": now, **dataclasses.asdict(ended)}))
    else:
        click.echo(f"{now} {' '.join(str(plain(str(ended))).split())}")
