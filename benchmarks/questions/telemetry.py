"""What do traces cost?"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.questions.workflows import STEPS, WITH_WORKFLOWS, finish
from benchmarks.report import Table, at_most

#: What each process has, and the setting.
MODES = {
    "nothing of OpenTelemetry": {},
    "OpenTelemetry's API alone": {"BENCHMARK_OPENTELEMETRY": "api"},
    "an SDK, off": {"BENCHMARK_OPENTELEMETRY": "sdk", "DRAMATIQ_DURABLE_TELEMETRY": "off"},
    "an SDK that samples nothing, info": {"BENCHMARK_OPENTELEMETRY": "unsampled"},
    "an SDK, info": {"BENCHMARK_OPENTELEMETRY": "sdk"},
    "an SDK, debug": {"BENCHMARK_OPENTELEMETRY": "sdk", "DRAMATIQ_DURABLE_TELEMETRY": "debug"},
}


def measure(bench: Bench) -> None:
    messages = Table("telemetry", "What do traces cost?  Messages: worker CPU, of the quietest round", "÷ nothing")
    turns = {
        what: (OURS, partial(bench.drain, OURS, f"telemetry{n}", bench.options.messages, environment=environment))
        for n, (what, environment) in enumerate(MODES.items())
    }
    found = {
        what: min(report["cpu"] / report["n"] for report in reports) * 1e6
        for what, reports in bench.rounds(messages, turns).items()
    }
    _show(bench, messages, found, "a_message")

    workflows = Table("traced workflows", f"Workflows of {STEPS} steps: worker CPU, of the quietest round", "÷ nothing")
    turns = {
        what: (OURS, partial(_finish, bench, f"traced{n}", {**WITH_WORKFLOWS, **environment}))
        for n, (what, environment) in enumerate(MODES.items())
    }
    _show(bench, workflows, {what: min(cpu) for what, cpu in bench.rounds(workflows, turns).items()}, "a_workflow")


def _finish(bench: Bench, question: str, environment: dict[str, str]) -> float:
    costs = finish(bench, bench.options.runs, 1, question, environment)
    return float(costs["CPU_µs_a_step"]) * STEPS


def _show(bench: Bench, table: Table, found: dict[str, float], what: str) -> None:
    first = next(iter(found.values()))
    figures: dict[str, Any]
    for mode, cost in found.items():
        free = not mode.startswith("an SDK,") or mode.endswith("off")
        figures = {f"µs_{what}": cost, "more": cost - first}
        table.add(mode, cost / first, at_most(1.02) if free and "samples" not in mode else None, **figures)
    bench.report.show(table)
