"""``make bench``: what a message and a step cost, beside Dramatiq's own cost in the same run.

Absolute figures belong to the machine and the minute; ratios and counts (commits, round trips, WAL bytes) travel.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Cost, Server, Workers

TEXT = "x" * 100

STUB = """
import time, sys
import dramatiq
import benchmarks.actors as actors
n = int(sys.argv[1])
broker = dramatiq.get_broker()
t = time.perf_counter()
for _ in range(n): actors.noop.send("x" * 100)
sent = time.perf_counter() - t
worker = dramatiq.Worker(broker, worker_timeout=200, worker_threads=8)
t = time.perf_counter()
worker.start()
broker.join("noop")
drained = time.perf_counter() - t
worker.stop()
print(n / sent, n / drained)
"""


def stub(messages: int) -> tuple[float, float]:
    """Dramatiq's StubBroker, in a process of its own: (enqueued, drained) messages a second."""
    environment = {**os.environ, "BENCHMARK_BROKER": "stub"}
    out = subprocess.run(
        [sys.executable, "-c", STUB, str(messages)], env=environment, capture_output=True, text=True, check=True
    )
    sent, drained = out.stdout.split()
    return float(sent), float(drained)


def drain(server: Server, processes: int, messages: int) -> tuple[Cost, Cost]:
    """Store messages in bulk, then drain them: (cost of storing, cost of draining)."""
    import dramatiq

    from benchmarks.actors import noop

    broker = dramatiq.get_broker()
    batch = [noop.message(TEXT) for _ in range(messages)]
    before = broker.commit.batches  # type: ignore[attr-defined]
    with server.counting() as stored:
        broker.enqueue_many(batch)  # type: ignore[attr-defined]
    stored.round_trips = broker.commit.batches - before  # type: ignore[attr-defined]
    left = "SELECT count(*) FROM durable.message WHERE kind = 'm'"
    with server.counting() as cost:
        workers = Workers(processes, server.url)
        # From the first acknowledged message on: starting Python is not what is measured.
        while (first := server.scalar(left)) == messages:
            time.sleep(0.005)
        started = time.perf_counter()
        while server.scalar(left):
            time.sleep(0.02)
        cost.seconds = (time.perf_counter() - started) * messages / max(first, 1)
        cost.cpu, cost.round_trips = workers.stop()
    return stored, cost


def enqueue(server: Server, threads: int, messages: int) -> Cost:
    """Send one by one."""
    import dramatiq

    from benchmarks.actors import noop

    broker = dramatiq.get_broker()

    def send(n: int) -> None:
        for _ in range(n):
            noop.send(TEXT)

    send(10)
    before = broker.commit.batches  # type: ignore[attr-defined]
    with server.counting() as cost:
        senders = [threading.Thread(target=send, args=(messages // threads,)) for _ in range(threads)]
        started = time.perf_counter()
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        cost.seconds = time.perf_counter() - started
    cost.round_trips = broker.commit.batches - before  # type: ignore[attr-defined]
    broker.flush("noop")
    return cost


def workflows(server: Server, processes: int, runs: int) -> Cost:
    """Start runs of ten steps, then let workers finish them."""
    from benchmarks.actors import ten_steps

    for _ in range(runs):
        ten_steps.start()
    left = "SELECT count(*) FROM durable.run WHERE status = 'running'"
    with server.counting() as cost:
        workers = Workers(processes, server.url)
        # All runs advance together: the time counts from the moment that the workers are up.
        started = time.perf_counter()
        while server.scalar(left):
            time.sleep(0.02)
        cost.seconds = time.perf_counter() - started
        cost.cpu, cost.round_trips = workers.stop()
    return cost


def alone(server: Server, runs: int) -> list[float]:
    """One run after the other, from start to result, in milliseconds."""
    from benchmarks.actors import ten_steps

    workers = Workers(1, server.url)
    times = []
    for _ in range(runs + 5):
        started = time.perf_counter()
        ten_steps.start().result(timeout=30)
        times.append((time.perf_counter() - started) * 1000)
    workers.stop()
    return times[5:]


def row(table: Table, what: str, n: int, cost: Cost, base: float, per: str) -> None:
    rate = n / cost.seconds
    table.add_row(
        what,
        f"{rate:,.0f}",
        f"{rate / base:.2f}" if base else "",
        f"{cost.commits / n:.3f}",
        f"{cost.round_trips / n:.3f}" if cost.round_trips else "",
        f"{cost.wal_bytes / n:,.0f}",
        f"{cost.cpu / n * 1e6:,.0f}" if cost.cpu else "",
        per,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=30_000)
    parser.add_argument("--runs", type=int, default=1_500)
    parser.add_argument("--url", help="a Postgres of one's own; by default an embedded one")
    parser.add_argument("--only", default="stub,enqueue,drain,workflows,alone")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    logging.basicConfig(level=logging.WARNING)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="dramatiq-durable-bench-") as folder:
        embedded_server = None
        if arguments.url is None:
            from dramatiq_durable import embedded

            Path(folder).chmod(0o755)
            embedded_server = embedded.acquire(Path(folder) / "server")
            url = embedded_server.url
        else:
            url = arguments.url
        os.environ["DRAMATIQ_DURABLE_URL"] = url
        import dramatiq

        import dramatiq_durable as durable

        durable.migrate.migrate(url)
        server = Server(url)
        n, runs = arguments.messages, arguments.runs
        table = Table(
            title=f"{n:,} messages of {len(TEXT)} characters; {runs:,} runs of ten steps; 8 threads a process"
        )
        for heading in ("", "per s", "of Stub", "commits", "round trips", "WAL bytes", "worker CPU µs", "per"):
            table.add_column(heading, justify="left" if not heading or heading == "per" else "right")
        stub_in = stub_out = 0.0
        if "stub" in only:
            stub_in, stub_out = stub(n)
            table.add_row("StubBroker: enqueue", f"{stub_in:,.0f}", "1.00", "", "", "", "", "message")
            table.add_row("StubBroker: drain, 1 process", f"{stub_out:,.0f}", "1.00", "", "", "", "", "message")
        import benchmarks.actors

        assert benchmarks.actors
        if "enqueue" in only:
            row(table, "enqueue one by one", n // 5, enqueue(server, 1, n // 5), stub_in, "message")
            row(table, "enqueue, 8 threads", n // 5, enqueue(server, 8, n // 5), stub_in, "message")
        if "drain" in only:
            for processes in (1, 2):
                stored, drained = drain(server, processes, n)
                if processes == 1:
                    row(table, "enqueue_many", n, stored, stub_in, "message")
                row(table, f"drain, {processes} process{'es' * (processes > 1)}", n, drained, stub_out, "message")
        if "workflows" in only:
            for processes in (1, 2):
                cost = workflows(server, processes, runs)
                what = f"ten-step workflows, {processes} process{'es' * (processes > 1)}"
                row(table, what, runs, cost, 0, "workflow")
                row(table, "  the same, by step", runs * 10, cost, 0, "step")
        console.print(table)
        if "alone" in only:
            times = alone(server, 60)
            console.print(
                f"a ten-step workflow alone, start to result: p50 {statistics.median(times):.1f} ms, "
                f"p95 {statistics.quantiles(times, n=20)[-1]:.1f} ms"
            )
        server.conn.close()
        dramatiq.get_broker().close()
        if embedded_server is not None:
            embedded_server.release()
            time.sleep(1.5)


if __name__ == "__main__":
    main()
