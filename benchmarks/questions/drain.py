"""How fast are waiting messages processed?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.bench import Bench, median_ratio
from benchmarks.contenders import OURS, STUB, Contender
from benchmarks.report import Table, at_least

TARGETS = {
    "stub": 0.75,
    "redis": 5,
    "redis-400": 3,
    "rabbitmq": 3,
    "dramatiq-postgres": 7,
    "pgqueuer-100": 1,
}


def measure(bench: Bench) -> None:
    table = Table("drain", "How fast are waiting messages processed?  One process × 8 threads, no-op actors", "ratio")
    turns: dict[str, tuple[Contender, Callable[[], Any]]] = {}
    for contender in (STUB, OURS, *bench.peers):
        messages = max(100, int(bench.options.messages * contender.share))
        turns[contender.name] = (contender, partial(bench.drain, contender, "drain", messages))
    turns["two"] = (OURS, partial(bench.drain, OURS, "drain", bench.options.messages, 2))
    found = bench.rounds(table, turns)

    rates = {name: [r["n"] / r["seconds"] for r in reports] for name, reports in found.items()}

    def figures(name: str) -> dict[str, Any]:
        return {
            "per_s": statistics.median(rates[name]),
            "from": min(rates[name]),
            "to": max(rates[name]),
            "worker_CPU_µs": statistics.median(r["cpu"] / r["n"] * 1e6 for r in found[name]),
        }

    table.add("ours", None, None, **figures("ours"))
    ratio = median_ratio(rates["two"], rates["ours"])
    table.add("ours, 2 processes ÷ 1 process", ratio, at_least(1.4), **figures("two"))
    for contender in (STUB, *bench.peers):
        if contender.name in found:
            target = TARGETS.get(contender.name)
            ratio = median_ratio(rates["ours"], rates[contender.name])
            bound = None if target is None else at_least(target)
            table.add(f"ours ÷ {contender.label}", ratio, bound, **figures(contender.name))
    table.notes.append("The figures beside a ratio are of the other one; ours stand in the first line.")
    bench.report.show(table)
