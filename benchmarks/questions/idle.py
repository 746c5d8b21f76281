"""What does an idle worker ask of Postgres?"""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.processes import Workers
from benchmarks.report import Table, at_most

STREAMS = (1, 200)


@dataclass
class Load:
    """A minute of an idle worker."""

    transactions: float
    statements: float
    cpu: float


def measure(bench: Bench) -> None:
    table = Table("idle", "What does an idle worker ask of Postgres?", "a minute")
    bench.report.say(f"{table.title} (for {bench.options.watch:g} s) ...")
    for streams in STREAMS:
        load = watch(bench, streams)
        what = f"{streams} stream{'s' * (streams > 1)}"
        table.add(f"transactions, {what}", load.transactions, at_most(90))
        if bench.counters.statements:
            table.add(f"statements, {what}", load.statements)
        table.add(f"ms of worker CPU, {what}", load.cpu * 1000, at_most(600))
    if not bench.counters.statements:
        table.notes.append("Statements are not counted: this server has not loaded pg_stat_statements.")
    bench.report.show(table)


def watch(bench: Bench, streams: int) -> Load:
    question = f"idle_{streams}"
    bench.place(OURS, question)
    database = f"benchmark_{OURS.name}_{question}"
    bench.counters.watch_statements(database)
    with bench.working(OURS, question, environment={"BENCHMARK_STREAMS": str(streams)}) as workers:
        time.sleep(min(2, bench.options.watch))  # it has settled
        return _minute(bench, workers, database)


def _minute(bench: Bench, workers: Workers, database: str) -> Load:
    """Sessions tell of their transactions now and then: the rate is taken between two such moments."""
    worker = workers.players[0]
    counters = bench.counters
    told = [(time.monotonic(), counters.transactions(database))]
    began, cpu = time.monotonic(), worker.ask("report")["cpu"]
    calls = counters.calls(database)[0] if counters.statements else 0
    while time.monotonic() < began + bench.options.watch:
        time.sleep(0.1)
        if (now := counters.transactions(database)) != told[-1][1]:
            told.append((time.monotonic(), now))
    elapsed = time.monotonic() - began
    statements = counters.calls(database)[0] - calls if counters.statements else 0
    cpu = worker.ask("report")["cpu"] - cpu
    (first, base), (last, count) = told[1 if len(told) > 2 else 0], told[-1]
    rate = (count - base) / (last - first) if last > first else 0.0
    return Load(rate * 60, statements / elapsed * 60, cpu / elapsed * 60)
