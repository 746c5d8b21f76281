"""How fast do workflows advance?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import psycopg

from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.report import Table

STEPS = 10

WITH_WORKFLOWS = {"BENCHMARK_WORKFLOWS": "yes"}


def measure(bench: Bench) -> None:
    table = Table("workflows", f"How fast do workflows of {STEPS} steps advance?  8 threads a process", "per s")
    bench.report.say(f"{table.title} ...")
    runs = bench.options.runs
    for processes in (1, 2):
        found = finish(bench, runs, processes)
        table.add(f"workflows, {processes} process{'es' * (processes > 1)}", runs / found.pop("seconds"), None, **found)
    times = alone(bench, max(20, runs // 20))
    bench.report.show(table)
    alone_table = Table("alone", "How long does one such workflow take alone, from start to result?", "ms")
    alone_table.add("p50", statistics.median(times))
    alone_table.add("p95", statistics.quantiles(times, n=20)[-1])
    bench.report.show(alone_table)


def finish(bench: Bench, runs: int, processes: int) -> dict[str, Any]:
    """Start runs, then let workers finish them; answers costs of one step."""
    bench.sender(OURS, "workflows", WITH_WORKFLOWS).ask("start_runs", n=runs)
    with bench.counters.counting() as counted:
        seconds, report = work_off(bench, "workflows", WITH_WORKFLOWS, processes)
    steps = runs * STEPS
    found: Mapping[str, float] = {
        "commits_a_step": counted.commits / steps,
        "round_trips_a_step": report["round_trips"] / steps,
        "WAL_bytes_a_step": (counted.wal - (counted.images or 0)) / steps,
        "CPU_µs_a_step": report["cpu"] / steps * 1e6,
    }
    return {"seconds": seconds, **found}


def work_off(
    bench: Bench, question: str, environment: Mapping[str, str], processes: int = 1
) -> tuple[float, dict[str, Any]]:
    """Let workers finish the runs that were started; answers how many seconds it took, and what they report."""
    with (
        psycopg.connect(bench.place(OURS, question), autocommit=True) as conn,
        bench.working(OURS, question, processes, environment=environment) as workers,
    ):
        began = time.perf_counter()
        while _running(conn):
            time.sleep(0.02)
        return time.perf_counter() - began, workers.report()


def _running(conn: psycopg.Connection) -> bool:
    row = conn.execute("SELECT EXISTS (SELECT 1 FROM durable.run WHERE status = 'running')").fetchone()
    return row is not None and bool(row[0])


def alone(bench: Bench, runs: int) -> list[float]:
    """Milliseconds of runs, one after the other."""
    sender = bench.sender(OURS, "workflows", WITH_WORKFLOWS)
    with bench.working(OURS, "workflows", environment=WITH_WORKFLOWS) as workers:
        sender.ask("runs_alone", n=5)
        times: list[float] = sender.ask("runs_alone", n=runs)
        workers.report()
    return times
