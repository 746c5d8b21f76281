"""``dramatiq-durable top``: what happens in a namespace, as it happens."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import click
from psycopg.conninfo import conninfo_to_dict

from ...durations import parse_duration
from ...errors import DatabaseUnavailable, DurableError, NotPermitted
from ..output import print_json
from ..target import Target
from .frame import Seen, frame
from .look import Detail, Look, Looker
from .terminal import Terminal, rendered
from .view import View

#: Width of a frame that nobody looks at.
WIDTH = 120

#: How often the frame is made anew though nothing came, in seconds.
REDRAW = 1.0


def interval(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """A time like 2s."""
    try:
        ms = parse_duration(value)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    if not 100 <= ms <= 3_600_000:
        raise click.BadParameter(f"{value!r} is not from 100ms to 1h")
    return ms / 1000


@click.command("top")
@click.option(
    "--interval", metavar="DURATION", callback=interval, default="2s", show_default=True,
    help="How long from one look to the next, 100ms at least.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one frame, an interval after the command began, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print JSON.")
@click.pass_obj
def command(target: Target, interval: float, once: bool, as_json: bool) -> None:
    """Watch streams, workers, runs, and what is slow or stuck.

    Keys: arrows or j and k choose a row, tab another table, enter looks closer, q goes back and ends, ? shows all keys
    and what the columns are. It needs a monitor's login; an administrator's sees messages and runs one by one.

    Each look is a few bounded calls, however much there is; of more than 2,000 messages of a stream or runs of a status
    the number is estimated. in/s and out/s: messages that come and that end, of the last ten seconds or so.
    """
    if as_json and not once:
        raise click.UsageError("--json goes with --once")
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    if not once and not terminal:
        raise click.UsageError("this is no terminal that can show a screen: --once prints one frame")
    looker = Looker(target)
    try:
        if once:
            _once(target, looker, interval, as_json)
        else:
            _live(target, looker, interval)
    except NotPermitted as e:
        raise click.ClickException(f"{e}: `dramatiq-durable role provision NAME --kind monitor` makes one") from e
    finally:
        looker.close()


def _where(target: Target) -> str:
    parts = conninfo_to_dict(target.broker.database.conninfo)
    host = str(parts.get("host") or "localhost")
    # A socket's folder, or several hosts: what is too long for a headline says little.
    return f"{target.namespace} in {parts.get('dbname') or parts.get('user') or ''} on {Path(host).name or host}"


def _once(target: Target, looker: Looker, interval: float, as_json: bool) -> None:
    """Two looks, for the rates between them."""
    looker.look()
    time.sleep(interval)
    look = looker.look()
    if as_json:
        print_json({name: getattr(look, name) for name in Look.__slots__} | {"namespace": target.namespace})
        return
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    lines = frame(View(), Seen(_where(target), look), width, None)
    shown = rendered(lines, width) if sys.stdout.isatty() else [line.plain for line in lines]
    said = "\n".join(line.rstrip() for line in shown)
    # Names are of any alphabet, and the place where this goes may have few letters.
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(said.encode(encoding, "replace").decode(encoding))


class Reader(threading.Thread):
    """Looks once an interval, so that the keys wait for no database.

    Attributes:
      seen(Seen): what was found last; never changed, but replaced.
      view(View): what somebody looks at, which says what to read.
    """

    def __init__(self, looker: Looker, view: View, seen: Seen, interval: float, terminal: Terminal) -> None:
        super().__init__(name="top", daemon=True)
        self.seen = seen
        self.view = view
        self._looker = looker
        self._interval = interval
        self._terminal = terminal
        self._hurry = threading.Event()
        self._ended = False
        # When to look again, and when closely.
        self._next = self._closer = 0.0

    def hurry(self) -> None:
        """Look closely now."""
        self._hurry.set()

    def forget(self) -> None:
        """What was seen closely is another thing now."""
        self.seen = dataclasses.replace(self.seen, detail=None)

    def end(self) -> None:
        """Look no more."""
        self._ended = True
        self._hurry.set()
        self.join(1)

    def run(self) -> None:
        while not self._ended:
            self._hurry.clear()
            drills = list(self.view.drills)
            if self.view.paused and not (drills and self.seen.detail is None):
                self._next = time.monotonic() + self._interval
            else:
                seen = self._read(drills)
                # It may be another thing that is looked at by now.
                if self.view.drills == drills and not self._ended:
                    self.seen = seen
                    self._terminal.wake()
            self._hurry.wait(max(self._next - time.monotonic(), 0.05))

    def _read(self, drills: list[tuple[str, str]]) -> Seen:
        before = self.seen
        try:
            look = before.look
            begun = time.monotonic()
            if begun >= self._next or look is None:
                self._next = begun + self._interval
                look = self._looker.look()
                # A database that is slow is not asked all the time.
                self._next = max(self._next, 2 * time.monotonic() - begun)
            detail = self._closely(drills[-1], before.detail) if drills else None
        except Exception as e:
            # Whatever it is, it is shown, and the next look tries anew.
            trouble = str(e) if isinstance(e, DurableError) else f"{type(e).__name__}: {e}"
            since = before.since if before.trouble else time.time()
            return Seen(before.where, before.look, before.detail, trouble or type(e).__name__, since)
        return Seen(before.where, look, detail)

    def _closely(self, drill: tuple[str, str], before: Detail | None) -> Detail:
        """What takes long (runs of a status that few have) is read less often."""
        begun = time.monotonic()
        if before is not None and begun < self._closer:
            return before
        detail = self._looker.detail(*drill)
        self._closer = begun + 10 * (time.monotonic() - begun)
        return detail


def _live(target: Target, looker: Looker, interval: float) -> None:
    view, seen = View(), Seen(_where(target))
    try:
        # What will not mend itself is said before the screen is taken.
        seen.look = looker.look()
    except DatabaseUnavailable as e:
        seen.trouble, seen.since = str(e), time.time()
    with Terminal() as terminal:
        reader = Reader(looker, view, seen, interval, terminal)
        reader.start()
        try:
            while not (view.ended or terminal.ended):
                drills = list(view.drills)
                width, height = terminal.size
                terminal.show(frame(view, reader.seen, width, height))
                for key in terminal.keys(REDRAW):
                    view.press(key)
                    if view.drills != drills:
                        drills = list(view.drills)
                        reader.forget()
                        reader.hurry()
                    # The next key is about what this one has led to.
                    view.arrange(reader.seen.look, reader.seen.detail)
        finally:
            reader.end()
