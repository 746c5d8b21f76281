"""What do traces cost?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.questions.workflows import STEPS, WITH_WORKFLOWS, work_off
from benchmarks.report import Table, at_most

#: What each process has of OpenTelemetry, and the setting.
MODES: dict[str, Mapping[str, str]] = {
    "nothing of OpenTelemetry": {},
    "its API alone": {"BENCHMARK_OPENTELEMETRY": "api"},
    "an SDK, off": {"BENCHMARK_OPENTELEMETRY": "sdk", "DRAMATIQ_DURABLE_TELEMETRY": "off"},
    "an SDK that samples nothing": {"BENCHMARK_OPENTELEMETRY": "unsampled"},
    "an SDK, info": {"BENCHMARK_OPENTELEMETRY": "sdk"},
    "an SDK, debug": {"BENCHMARK_OPENTELEMETRY": "sdk", "DRAMATIQ_DURABLE_TELEMETRY": "debug"},
}

#: Where nothing is traced, it is to cost nothing that can be measured.
FREE = ("its API alone", "an SDK, off")


def measure(bench: Bench) -> None:
    messages = Table("telemetry", "What do traces cost a worker?  Messages to no-op actors", "÷ nothing")
    _compare(bench, messages, "message", bench.options.messages, partial(_messages, bench))
    workflows = Table("telemetry of workflows", f"The same for workflows of {STEPS} steps", "÷ nothing")
    _compare(bench, workflows, "workflow", bench.options.runs, partial(_workflows, bench))


def _compare(bench: Bench, table: Table, what: str, n: int, turn: Any) -> None:
    turns = {
        mode: (OURS, partial(turn, f"{what}{i}", {**had, "BENCHMARK_INSTRUCTIONS": "on"}))
        for i, (mode, had) in enumerate(MODES.items())
    }
    found = bench.rounds(table, turns)
    # The least of all rounds: what is more was somebody else's doing, or that of a commit with less company.
    cpu = {mode: min(report["cpu"] for report in reports) / n * 1e6 for mode, reports in found.items()}
    counted = {mode: [report["instructions"] for report in reports] for mode, reports in found.items()}
    counts = all(None not in each for each in counted.values())
    thousands = {mode: min(each) / n / 1e3 for mode, each in counted.items()} if counts else {}
    costs = thousands or cpu
    for mode in found:
        figures = {f"CPU_µs_a_{what}": cpu[mode]}
        if counts:
            figures |= {f"thousand_instructions_a_{what}": thousands[mode]}
        table.add(mode, costs[mode] / costs[next(iter(MODES))], at_most(1.02) if mode in FREE else None, **figures)
    if not counts:
        table.notes.append("The processor's instructions cannot be counted here: the ratios are those of CPU time.")
    bench.report.show(table)


def _messages(bench: Bench, question: str, environment: Mapping[str, str]) -> dict[str, Any]:
    return bench.drain(OURS, question, bench.options.messages, environment=environment)


def _workflows(bench: Bench, question: str, environment: Mapping[str, str]) -> dict[str, Any]:
    environment = {**WITH_WORKFLOWS, **environment}
    bench.sender(OURS, question, environment).ask("start_runs", n=bench.options.runs)
    return work_off(bench, question, environment)[1]
