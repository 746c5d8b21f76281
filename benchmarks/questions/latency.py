"""How soon does an idle worker start a message?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.contenders import OURS, Contender
from benchmarks.processes import ContenderFailed
from benchmarks.report import Table, at_most, percentile

#: Seconds between two messages on an otherwise idle worker.
GAP = 0.03


def measure(bench: Bench) -> None:
    idle = bench.options.idle
    table = Table("latency", "How soon does an idle worker start a message?  From the call of send to the actor", "ms")
    bench.report.say(f"{table.title} ...")
    spaced, after = probe(bench, OURS, bench.options.probes, 5 if idle < 30 else 3)
    table.add("ours, p50", percentile(spaced, 50), at_most(2))
    table.add("ours, p99", percentile(spaced, 99), at_most(10))
    table.add(f"ours, after {idle:g} s of idleness, median", percentile(after, 50), at_most(2))
    table.add(f"ours, after {idle:g} s of idleness, worst of {len(after)}", after[-1], at_most(10))
    for peer in bench.peers:
        if peer.name in ("redis-400", "pgqueuer-10"):
            continue
        try:
            spaced, after = probe(bench, peer, bench.options.probes // 3, 2)
        except ContenderFailed as e:
            table.notes.append(f"{peer.label} failed: {str(e).splitlines()[-1]}")
            continue
        rest = {"p99": percentile(spaced, 99), "after_idleness": percentile(after, 50)}
        table.add(f"{peer.label}, p50", percentile(spaced, 50), None, **rest)
    bench.report.show(table)


def probe(bench: Bench, contender: Contender, spaced: int, after: int) -> tuple[list[float], list[float]]:
    """Milliseconds from send to start: of messages that come now and then, and of those that come after idleness."""
    sender = bench.sender(contender, "latency")
    with bench.working(contender, "latency") as workers:
        worker = workers.players[0]

        def late(n: int, gap: float) -> list[float]:
            known = worker.ask("progress")
            sender.tell("probe", n=n, gap=gap, size=bench.size)
            sender.answer(takes=n * gap)
            workers.wait_for(known + n)
            return sorted(nanoseconds / 1e6 for nanoseconds in worker.ask("report")["late"][known:])

        late(5, GAP)  # the first find connections unmade and statements unprepared
        return late(spaced, GAP), late(after, bench.options.idle)
