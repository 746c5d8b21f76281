"""``dramatiq-durable ui``: a page that shows the namespace in a browser."""

from __future__ import annotations

import os
import secrets
import signal
import socket

import click

from .exporter import address
from .target import Target

#: Who looks has to know it; it is no option, because options are seen by everybody on the machine.
TOKEN = "DRAMATIQ_DURABLE_UI_TOKEN"


@click.command("ui", short_help="Show the namespace in a browser.")
@click.option(
    "--listen", metavar="HOST:PORT", callback=address, default="127.0.0.1:9193", show_default=True,
    help="Where to answer; port 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--allow-actions",
    is_flag=True,
    help="Offer to pause streams, redrive or drop dead letters, claim and resolve escalations.",
)
@click.pass_obj
def command(target: Target, listen: tuple[str, int], allow_actions: bool) -> None:
    """Show runs, streams, dead letters, workers, schedules and escalations in a browser.

    It changes nothing unless it may (--allow-actions).  On another address than this machine's own it asks for a
    token, 16 characters or more from DRAMATIQ_DURABLE_UI_TOKEN; without that, it makes one and says it.  Where the
    variable is set, it always asks.  It speaks plain HTTP: put TLS in front of it where others listen.

    \b
    It takes an extra: pip install 'dramatiq-durable[ui]'
    """
    try:
        import uvicorn

        from ..ui.app import create_app, is_loopback
    except ModuleNotFoundError as e:
        if e.name not in ("starlette", "uvicorn"):
            raise
        raise click.ClickException(f"{e.name} is missing: pip install 'dramatiq-durable[ui]'") from e
    host, port = listen
    token = os.environ.get(TOKEN) or None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
        click.echo(f"the token is {token}", err=True)
    try:
        app = create_app(target, host=host, token=token, allow_actions=allow_actions)
    except ValueError as e:
        raise click.UsageError(f"{TOKEN}: {e}") from None
    # What is wrong with the database is said now, and not to whoever looks first.
    with target.broker.database.calling() as conn:
        conn.execute("SELECT 1")
    try:
        listening = socket.create_server(listen, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        raise click.ClickException(f"cannot listen on {host}:{port}: {e.strerror}") from e
    # Uvicorn sends itself the signal that ended it once more.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"listening on http://{shown}:{listening.getsockname()[1]}/")
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, proxy_headers=False)
    uvicorn.Server(config).run(sockets=[listening])
