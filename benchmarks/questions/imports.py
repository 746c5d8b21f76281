"""What does ``import dramatiq_durable`` cost?

A fresh interpreter imports Dramatiq and psycopg, and then ours; it says itself how long each module took (``-X
importtime``).  What is compiled is kept in a folder of this question's own, as an installer does it, so that no run but
the first, which does not count, compiles anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.report import Table, at_most

PROGRAM = "import dramatiq, psycopg; import dramatiq_durable"

RUNS = 5


@dataclass(frozen=True, order=True)
class Imported:
    """The milliseconds that one interpreter took for imports, those for our modules, and how many these are."""

    all: float
    ours: float
    modules: int


def measure(bench: Bench) -> None:
    table = Table("imports", "What does `import dramatiq_durable` cost, beside dramatiq and psycopg?", "value")
    bench.report.say(f"{table.title} ...")
    compiled = {**os.environ, "PYTHONPYCACHEPREFIX": os.fspath(bench.services.folder / "compiled")}
    compiled.pop("PYTHONDONTWRITEBYTECODE", None)
    best = min([imported(compiled) for _ in range(RUNS + 1)][1:])
    share = best.ours / best.all
    table.add("share of ours in all imports", share, at_most(0.4), ms=best.all, ours_ms=best.ours)
    table.add("modules of ours", best.modules)
    bench.report.show(table)


def imported(environment: dict[str, str]) -> Imported:
    command = [sys.executable, "-X", "importtime", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # Lines like "import time:   self [us] | cumulative | name"; the first one is that heading.
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines()[1:]]
    ours = [int(own) for own, _, name in lines if name.strip().partition(".")[0] == "dramatiq_durable"]
    return Imported(sum(int(own) for own, _, _ in lines) / 1000, sum(ours) / 1000, len(ours))
