"""How fast are messages stored?"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Callable
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
            turns[f"pgbench {clients}"] = (OURS, partial(pgbench.inserts_per_second, clients))
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

    middle = {name: statistics.median(rates) for name, rates in found.items()}
    table.add("ours, one by one", None, None, per_s=middle["ours"])
    if "pgbench 1" in found:
        for clients in CLIENTS:
            ratio = median_ratio(found["ours" if clients == 1 else "threads"], found[f"pgbench {clients}"])
            ours = "one by one" if clients == 1 else "8 threads"
            what = f"ours, {ours} ÷ pgbench's one-row INSERT, {clients} client{'s' * (clients > 1)}"
            table.add(what, ratio, at_least(0.75) if clients == 1 else None, per_s=middle[f"pgbench {clients}"])
    ratio = median_ratio(found["threads"], found["ours"])
    table.add("ours, 8 threads ÷ one by one", ratio, at_least(1.7), per_s=middle["threads"])
    table.add("ours, enqueue_many, messages a second", middle["many"], at_least(60_000), per_s=middle["many"])
    for contender in (INSERT, STUB, *bench.peers):
        if contender.name in found:
            ratio = median_ratio(found["ours"], found[contender.name])
            in_bulk = middle.get(f"{contender.name} bulk")
            bulk = {} if in_bulk is None else {"in_bulk_per_s": in_bulk}
            table.add(f"ours, one by one ÷ {contender.label}", ratio, None, per_s=middle[contender.name], **bulk)
    if (flush := bench.services.flush_seconds()) is not None:
        table.notes.append(
            f"A flush of the log takes {flush * 1e6:.0f} µs here; where it takes longer, it is more of all times."
        )
    bench.report.show(table)


def send(bench: Bench, contender: Contender, n: int, *, threads: int = 1) -> float:
    sender = bench.sender(contender, "enqueue")
    return n // threads * threads / float(sender.ask("send", n=n, size=bench.size, threads=threads))


def store(bench: Bench, contender: Contender, n: int) -> float:
    return n / float(bench.sender(contender, "enqueue").ask("store", n=n, size=bench.size))


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

    def inserts_per_second(self, clients: int) -> float:
        options = f"-n -M prepared -T {self._seconds} -c {clients} -j {min(clients, 2)} -f {self._script}".split()
        done = subprocess.run([self._program, *options, self._url], capture_output=True, text=True, check=False)
        found = re.search(r"tps = ([\d.]+) \(without", done.stdout)
        if found is None:
            raise ContenderFailed(f"pgbench: {done.stderr.strip()}")
        return float(found[1])
