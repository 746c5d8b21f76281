"""What does a message cost, from its sending to its acknowledgement?"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.counters import Counted
from benchmarks.report import Table, Target, at_most
from benchmarks.systems.base import PAYLOAD


def measure(bench: Bench) -> None:
    n = bench.options.messages
    table = Table("cost", "What does a message cost, from enqueue_many to its ack under load?", "a message")
    bench.report.say(f"{table.title} ...")
    sender = bench.sender(OURS, "cost")
    stored, drained, trips, cpu = live(bench, bench.size)
    table.add("commits", (stored.commits + drained.commits) / n, at_most(0.1))
    table.rows[-1].figures = {"stored": stored.commits / n, "processed": drained.commits / n}
    table.add("round trips", sum(trips) / n, None, stored=trips[0] / n, processed=trips[1] / n)
    _wal(table, "bytes of WAL", at_most(700), stored, drained, n)
    table.add("µs of worker CPU", cpu / n * 1e6, at_most(100))
    stored, drained, _, _ = live(bench, PAYLOAD)
    _wal(table, f"bytes of WAL, where the argument alone has {PAYLOAD} bytes", None, stored, drained, n)
    with bench.counters.counting() as cleaned:
        sender.ask("vacuum")
    table.add("bytes of WAL of a VACUUM afterwards", _apart(cleaned) / (2 * n))
    if not bench.counters.inspects:
        table.notes.append("Full-page images are in the bytes of WAL: without pg_walinspect they cannot be told apart.")
    bench.report.show(table)


def live(bench: Bench, size: int) -> tuple[Counted, Counted, tuple[int, int], float]:
    """Messages from their storing to their acks: what Postgres did for either, round trips, seconds of worker CPU."""
    n = bench.options.messages
    sender = bench.sender(OURS, "cost")
    before = sender.ask("counts")["round_trips"]
    with bench.counters.counting() as stored:
        sender.ask("store", n=n, size=size)
    sent = sender.ask("counts")["round_trips"] - before
    with bench.counters.counting() as drained, bench.working(OURS, "cost") as workers:
        workers.wait_for(n)
        report = workers.report()
    return stored, drained, (sent, report["round_trips"]), report["cpu"]


def _apart(counted: Counted) -> int:
    """Bytes of WAL without full-page images, which say when the last checkpoint was, and not what is done."""
    return counted.wal - (counted.images or 0)


def _wal(table: Table, what: str, target: Target | None, stored: Counted, drained: Counted, n: int) -> None:
    table.add(
        what,
        (_apart(stored) + _apart(drained)) / n,
        target,
        stored=_apart(stored) / n,
        processed=_apart(drained) / n,
        with_images=(stored.wal + drained.wal) / n,
    )
