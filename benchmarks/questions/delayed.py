"""Are delayed messages on time, and what do those cost that are not due yet?"""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any

from benchmarks.bench import Bench, median_ratio
from benchmarks.contenders import OURS
from benchmarks.report import Table, at_least, at_most, percentile

DAY = 24 * 60 * 60 * 1000


def measure(bench: Bench) -> None:
    table = Table("delayed", "Are delayed messages on time, and what do those cost that are not due yet?", "value")
    bench.report.say(f"{table.title} ...")
    late = lateness(bench, bench.options.probes)
    table.add("lateness, p50, ms", percentile(late, 50))
    table.add("lateness, p99, ms", percentile(late, 99), at_most(250))

    backlog = bench.options.backlog // 1000 * 1000
    bench.sender(OURS, "backlog").ask("send_backlog", n=backlog, size=bench.size, delay=DAY)
    for question in ("backlog", "empty"):
        bench.sender(OURS, question)
        bench.counters.watch_statements(_database(question))
    turns = {q: (OURS, partial(_drain, bench, q)) for q in ("empty", "backlog")}
    found = bench.rounds(table, turns)
    rates = {q: [r["n"] / r["seconds"] for r in reports] for q, reports in found.items()}
    ratio = median_ratio(rates["backlog"], rates["empty"])
    figures = {f"{q}_per_s": statistics.median(rates[q]) for q in ("empty", "backlog")}
    table.add(f"drain beside {backlog:,} delayed ones ÷ without", ratio, at_least(0.9), **figures)
    if bench.counters.statements:
        costs = {q: [r["claiming"] for r in reports] for q, reports in found.items()}
        ratio = median_ratio(costs["backlog"], costs["empty"])
        figures = {f"{q}_µs": statistics.median(costs[q]) for q in ("empty", "backlog")}
        table.add("server's time of the claims, a message, the same", ratio, at_most(1.2), **figures)
    bench.report.show(table)


def lateness(bench: Bench, n: int) -> list[float]:
    """Milliseconds between when messages were due and when an idle worker started them."""
    with bench.working(OURS, "delayed") as workers:
        delays = [random.randint(500, 3000) for _ in range(n)]
        bench.sender(OURS, "delayed").ask("send_later", delays=delays, size=bench.size)
        workers.wait_for(n)
        late: list[float] = workers.report()["late"]
        return late


def _database(question: str) -> str:
    return f"benchmark_{OURS.name}_{question}"


def _drain(bench: Bench, question: str) -> dict[str, Any]:
    claims = "%claim%"
    counted = bench.counters.statements
    before = bench.counters.calls(_database(question), claims)[1] if counted else 0
    report = bench.drain(OURS, question, bench.options.messages)
    if counted:
        report["claiming"] = (bench.counters.calls(_database(question), claims)[1] - before) / report["n"] * 1000
    return report
