"""The benchmark runs and judges what it finds.  Its figures mean nothing here: the counts are tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.contenders import PEERS, chosen_peers
from benchmarks.report import Table, at_least, at_most, number, percentile
from tests.support import ROOT

TINY = "--json --peers none --messages 200 --rounds 1 --probes 5 --idle 0.1 --watch 0.5 --backlog 1000 --runs 3"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DRAMATIQ_")}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    # Workers that end soon: nothing is compared here.
    environment = {**clean, "PYTHONPATH": os.fspath(ROOT), "BENCHMARK_WORKER_TIMEOUT": "50"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def tables(questions: str) -> dict[str, dict[str, Any]]:
    done = run(*TINY.split(), "--only", questions)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tables"]
    return {table["name"]: {row["what"]: row for row in table["rows"]} for table in found}


def test_throughput_is_measured_beside_the_floor() -> None:
    found = tables("drain,enqueue")
    assert any("pgbench" in what and row["value"] > 0 for what, row in found["enqueue"].items())
    drain = found["drain"]
    assert drain["ours"]["figures"]["per s"] > 0
    stub = drain["ours ÷ StubBroker (memory, no I/O)"]
    assert stub["value"] > 0
    assert stub["target"] == {"sign": "≥", "bound": 0.75}
    assert stub["met"] is (stub["value"] >= 0.75)


def test_costs_latency_and_idleness_are_counted() -> None:
    found = tables("cost,latency,idle")
    cost = found["cost"]
    assert 0 < cost["commits"]["value"] < 1
    wal = cost["bytes of WAL"]
    assert 190 < wal["value"] <= wal["figures"]["with images"]
    assert 0 < found["latency"]["ours, p50"]["value"] <= found["latency"]["ours, p99"]["value"]
    assert "statements, 200 streams" in found["idle"]


def test_traces_are_compared_with_none() -> None:
    found = tables("telemetry")
    for table in (found["telemetry"], found["telemetry of workflows"]):
        assert table["nothing of OpenTelemetry"]["value"] == 1
        assert table["an SDK, debug"]["value"] > 0
        assert table["an SDK, off"]["target"] == {"sign": "≤", "bound": 1.02}


def test_the_share_of_our_imports_is_counted() -> None:
    found = tables("imports")["imports"]
    share = found["share of ours in all imports"]
    assert 0 < share["value"] < 1
    assert share["value"] == pytest.approx(share["figures"]["ours ms"] / share["figures"]["ms"])
    assert found["modules of ours"]["value"] > 50


def test_an_unknown_question_or_peer_is_refused() -> None:
    for arguments in (["--only", "speed"], ["--peers", "celery"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert f"{arguments[1]!r}: choose among" in done.stderr


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["none"], []),
        (["all"], [peer.name for peer in PEERS]),
        (["pgqueuer", "redis"], ["redis", "redis-400", "pgqueuer-10", "pgqueuer-100"]),
    ],
)
def test_peers_are_chosen_by_the_beginning_of_their_names(names: list[str], chosen: list[str]) -> None:
    assert [peer.name for peer in chosen_peers(names)] == chosen


def test_a_row_is_judged_by_its_target() -> None:
    table = Table("t", "", "value")
    table.add("enough", 5, at_least(5))
    table.add("too much", 5.1, at_most(5))
    table.add("not judged", 1)
    assert [row.met for row in table.rows] == [True, False, None]


def test_figures_have_the_digits_that_mean_something() -> None:
    assert [number(n) for n in (None, 12345.6, 12.34, 1.234, 0.01234)] == ["", "12,346", "12.3", "1.23", "0.0123"]
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99)) == (51, 100)
