"""How fast are messages stored?"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg

from benchmarks.bench import Bench, median_ratio
from benchmarks.contenders import INSERT, OURS, STUB, Contender
from benchmarks.processes import ContenderFailed
from benchmarks.report import Table, at_least
from benchmarks.systems.bare_insert import TABLE
from benchmarks.systems.base import PAYLOAD

#: Clients of pgbench.
CLIENTS = (1, 8, 16)


def measure(bench: Bench) -> None:
    title = f"How fast are messages stored?  {PAYLOAD} bytes each, committed when send returns"
    table = Table("enqueue", title, "value")
    n = bench.options.messages
    turns: dict[str, tuple[Contender, Callable[[], Any]]] = {}
    if bench.services.pgbench:
        pgbench = Pgbench(bench)
        for clients in CLIENTS:
            turns[f"pgbench {clients}"] = (OURS, partial(pgbench.insert, clients))
    else:
        table.notes.append("pgbench was left out: install it (on Debian: apt-get install postgresql-contrib)")
    turns["ours"] = (OURS, partial(send, bench, OURS, n // 3))
    turns["threads"] = (OURS, partial(send, bench, OURS, n // 2, threads=8))
    turns["many"] = (OURS, partial(store, bench, OURS, 2 * n))
    turns["insert"] = (INSERT, partial(send, bench, INSERT, n // 3))
    turns["stub"] = (STUB, partial(send, bench, STUB, n))
    for peer in bench.peers:
        # What tunes a worker makes no other sender.
        if peer.name not in ("redis-400", "pgqueuer-10"):
            turns[peer.name] = (peer, partial(send, bench, peer, max(n // 10, 50)))
            turns[f"{peer.name} bulk"] = (peer, partial(store, bench, peer, max(n // 5, 50)))
    found = bench.rounds(table, turns)

    rates = {name: [sent.rate for sent in answers] for name, answers in found.items()}
    middle = {name: statistics.median(values) for name, values in rates.items()}

    def figures(name: str) -> dict[str, float]:
        cpu = [sent.cpu * 1e6 for sent in found[name] if sent.cpu is not None]
        return {
            "per_s": middle[name],
            **({"sender_CPU_µs": statistics.median(cpu)} if cpu else {}),
            **({"in_bulk_per_s": middle[f"{name} bulk"]} if f"{name} bulk" in middle else {}),
        }

    table.add("ours, one by one", None, None, **figures("ours"))
    if "pgbench 1" in found:
        for clients in CLIENTS:
            ratio = median_ratio(rates["ours" if clients == 1 else "threads"], rates[f"pgbench {clients}"])
            ours = "one by one" if clients == 1 else "8 threads"
            what = f"ours, {ours} ÷ pgbench's one-row INSERT, {clients} client{'s' * (clients > 1)}"
            table.add(what, ratio, at_least(0.75) if clients == 1 else None, **figures(f"pgbench {clients}"))
    ratio = median_ratio(rates["threads"], rates["ours"])
    table.add("ours, 8 threads ÷ one by one", ratio, at_least(1.7), **figures("threads"))
    table.add("ours, enqueue_many, messages a second", middle["many"], at_least(60_000))
    for contender in (INSERT, STUB, *bench.peers):
        if contender.name in found:
            ratio = median_ratio(rates["ours"], rates[contender.name])
            table.add(f"ours, one by one ÷ {contender.label}", ratio, None, **figures(contender.name))
    if (flush := bench.services.flush_seconds()) is not None:
        table.notes.append(
            f"A flush of the log takes {flush * 1e6:.0f} µs here; where it takes longer, it is more of all times."
        )
    bench.report.show(table)


@dataclass(frozen=True)
class Sent:
    """Messages stored a second, and the sender's CPU for each."""

    rate: float
    cpu: float | None = None


def send(bench: Bench, contender: Contender, n: int, *, threads: int = 1) -> Sent:
    n = n // threads * threads
    took = bench.sender(contender, "enqueue").ask("send", n=n, size=bench.size, threads=threads)
    return Sent(n / took["seconds"], took["cpu"] / n)


def store(bench: Bench, contender: Contender, n: int) -> Sent:
    return Sent(n / float(bench.sender(contender, "enqueue").ask("store", n=n, size=bench.size)))


class Pgbench:
    """The floor: Postgres' own benchmark program stores one row a transaction."""

    def __init__(self, bench: Bench) -> None:
        self._program = bench.services.pgbench or ""
        self._url = bench.services.database("pgbench")
        self._seconds = max(1, min(2, bench.options.messages // 10_000))
        self._script = bench.services.folder / "insert.sql"
        self._script.write_text(f"INSERT INTO queue (stream, payload) VALUES (1, '\\x{'7b' * PAYLOAD}');\n")
        with psycopg.connect(self._url, autocommit=True) as conn:
            conn.execute(TABLE)

    def insert(self, clients: int) -> Sent:
        options = f"-n -M prepared -T {self._seconds} -c {clients} -j {min(clients, 2)} -f {self._script}".split()
        done = subprocess.run([self._program, *options, self._url], capture_output=True, text=True, check=False)
        found = re.search(r"tps = ([\d.]+) \(without", done.stdout)
        if found is None:
            raise ContenderFailed(f"pgbench: {done.stderr.strip()}")
        return Sent(float(found[1]))
