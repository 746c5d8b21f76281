"""``dramatiq-durable exporter``: the database's gauges for Prometheus."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import click

from ..durations import parse_duration
from ..errors import DatabaseUnavailable
from ..metrics.gauges import Gauges
from .target import Target


def address(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, int]:
    """``host:port``, or ``[host]:port`` where the host is an IPv6 address."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{value!r} is no address: write it like 127.0.0.1:9192, or 0.0.0.0:9192 for all")
    return host.strip("[]"), int(port)


def seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A time like 15s."""
    try:
        return parse_duration(value) / 1000
    except ValueError as e:
        raise click.BadParameter(str(e)) from e


@click.command("exporter", short_help="Show the namespace to Prometheus.")
@click.option(
    "--listen", metavar="HOST:PORT", callback=address, default="127.0.0.1:9192", show_default=True,
    help="Where to answer; port 0 takes a free one. There is no password: let only Prometheus reach it.",
)  # fmt: skip
@click.option(
    "--interval", metavar="DURATION", callback=seconds, default="15s", show_default=True,
    help="The database is asked at most this often, however many ask here.",
)  # fmt: skip
@click.pass_obj
def command(target: Target, listen: tuple[str, int], interval: float) -> None:
    """Show what the database says of the namespace to Prometheus, on /metrics.

    Streams, runs, escalations, workers, tables: docs/metrics.md lists all of it. One is enough for a namespace. It
    needs no more than a monitor's login (`role provision NAME --kind monitor`), and ends with SIGTERM or SIGINT.  While
    the database is away, it says that.
    """
    from ..metrics.exporter import Server

    gauges = Gauges(target.broker.database, interval)
    try:
        gauges.check()
    except DatabaseUnavailable as e:
        click.echo(f"the database is away, and waited for: {e}", err=True)
    try:
        server = Server(listen, gauges)
    except OSError as e:
        gauges.close()
        raise click.ClickException(f"cannot listen on {listen[0]}:{listen[1]}: {e.strerror}") from e

    def stop(number: int, frame: FrameType | None) -> None:
        # From another thread: it waits for the loop that this one is in.
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    host, port = server.server_address[:2]
    click.echo(f"listening on http://{host!s}:{port}/metrics")
    try:
        server.serve_forever()
    finally:
        server.server_close()
