"""What does an idle worker ask of Postgres?

Sessions tell of their transactions now and then, and at their end.  So a short life of a worker is compared with a
longer one: what the longer one has more is what it did while it was idle.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.report import Table, at_most

STREAMS = (1, 200)

#: How long the short life is, in seconds.
SETTLED = 2.0


@dataclass
class Life:
    """What a worker did, from its start to its end."""

    seconds: float
    transactions: int
    statements: int
    cpu: float


def measure(bench: Bench) -> None:
    table = Table("idle", "What does an idle worker ask of Postgres?", "a minute")
    bench.report.say(f"{table.title} (for {bench.options.watch:g} s) ...")
    live(bench, 0)  # the first ever declares its streams
    short, long = live(bench, SETTLED), live(bench, SETTLED + bench.options.watch)
    for streams in STREAMS:
        a, b = short[streams], long[streams]
        minutes = (b.seconds - a.seconds) / 60
        what = f"{streams} stream{'s' * (streams > 1)}"
        counted = bench.counters.statements
        transactions = (b.transactions - a.transactions) / minutes
        table.add(f"transactions, {what}", transactions, None if counted else at_most(90))
        if counted:
            table.add(f"statements, {what}", (b.statements - a.statements) / minutes, at_most(90))
        table.add(f"ms of worker CPU, {what}", (b.cpu - a.cpu) * 1000 / minutes, at_most(600))
    if not bench.counters.statements:
        table.notes.append("Statements are not counted: this server has not loaded pg_stat_statements.")
    table.notes.append("Transactions include those of autovacuum, where it came by.")
    bench.report.show(table)


def live(bench: Bench, seconds: float) -> dict[int, Life]:
    """Idle workers with few and with many streams, beside each other, for some seconds."""
    counters = bench.counters
    databases = {}
    for streams in STREAMS:
        bench.place(OURS, f"idle_{streams}")
        databases[streams] = f"benchmark_{OURS.name}_idle_{streams}"
        counters.watch_statements(databases[streams])
    before = {streams: counters.done(database) for streams, database in databases.items()}
    lives = {}
    with ExitStack() as stack:
        workers = {}
        for streams in STREAMS:
            environment = {"BENCHMARK_STREAMS": str(streams)}
            workers[streams] = stack.enter_context(
                bench.working(OURS, f"idle_{streams}", environment=environment)
            ).players[0]
        began = time.monotonic()
        time.sleep(seconds)
        for streams, worker in workers.items():
            lives[streams] = Life(time.monotonic() - began, 0, 0, worker.ask("report")["cpu"])
    for streams, database in databases.items():
        counters.wait_until_left(database)
        transactions, statements = counters.done(database)
        lives[streams].transactions = transactions - before[streams][0]
        lives[streams].statements = statements - before[streams][1]
    return lives
