"""Are delayed messages on time, and what do those cost that are not due yet?"""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any

from benchmarks.bench import Bench, median_ratio
from benchmarks.contenders import OURS
from benchmarks.report import Table, Target, at_least, at_most, percentile

#: What the statements that claim have in them.
CLAIMS = "%claim%"

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

    def compare(what: str, figures: dict[str, list[float]], target: Target | None) -> None:
        middle = {q: statistics.median(values) for q, values in figures.items()}
        ratio = median_ratio(figures["backlog"], figures["empty"])
        table.add(what, ratio, target, beside_them=middle["backlog"], without=middle["empty"])

    rates = {q: [r["n"] / r["seconds"] for r in reports] for q, reports in found.items()}
    compare(f"beside {backlog:,} delayed ones ÷ without: messages processed a second", rates, at_least(0.9))
    if bench.counters.statements:
        for name, what, target in (
            ("pages", "the same: pages that the claims look at, a message", at_most(1.5)),
            ("µs", "the same: µs that the claims take Postgres, a message", None),
        ):
            compare(what, {q: [r[name] for r in reports] for q, reports in found.items()}, target)
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
    counters = bench.counters
    before = counters.effort(_database(question), CLAIMS) if counters.statements else (0.0, 0.0)
    report = bench.drain(OURS, question, bench.options.messages)
    if counters.statements:
        pages, milliseconds = counters.effort(_database(question), CLAIMS)
        report["pages"] = (pages - before[0]) / report["n"]
        report["µs"] = (milliseconds - before[1]) / report["n"] * 1000
    return report
