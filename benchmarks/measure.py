"""Counting what Postgres did between two moments, and running worker processes that report their CPU time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

WORKER = """
import json, resource, sys, time
import dramatiq
import benchmarks.actors as actors
broker = dramatiq.get_broker()
worker = dramatiq.Worker(broker, worker_timeout=200, worker_threads=8, queues=None)
before = resource.getrusage(resource.RUSAGE_SELF)
worker.start()
print("ready", flush=True)
sys.stdin.readline()
after = resource.getrusage(resource.RUSAGE_SELF)
worker.stop()
batches = broker.commit.batches
broker.close()
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"cpu": cpu, "round_trips": batches}), flush=True)
"""


@dataclass
class Cost:
    """What happened between two moments."""

    seconds: float = 0.0
    commits: int = 0
    wal_bytes: int = 0
    cpu: float = 0.0
    round_trips: int = 0


class Server:
    """The measured server: its counters, as an outside observer reads them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.conn = psycopg.connect(url, autocommit=True)

    def scalar(self, query: str) -> int:
        row = self.conn.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0] or 0)

    def _counters(self) -> tuple[int, int]:
        """(transactions that wrote, bytes of WAL): exact, where sessions report their statistics when they like."""
        row = self.conn.execute(
            "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_wal_insert_lsn() - '0/0'"
        ).fetchone()
        assert row is not None
        return int(row[0]), int(row[1])

    @contextmanager
    def counting(self) -> Iterator[Cost]:
        """Measure the block.  Right after a checkpoint: the full-page images that follow one are in the WAL."""
        cost = Cost()
        self.conn.execute("CHECKPOINT")
        before = self._counters()
        started = time.perf_counter()
        yield cost
        cost.seconds = cost.seconds or time.perf_counter() - started
        after = self._counters()
        cost.commits, cost.wal_bytes = (b - a for a, b in zip(before, after, strict=True))


class Workers:
    """Real worker processes, eight threads each."""

    def __init__(self, processes: int, url: str) -> None:
        environment = {**os.environ, "DRAMATIQ_DURABLE_URL": url, "dramatiq_prom_port": "0"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for _ in range(processes)
        ]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()

    def stop(self) -> tuple[float, int]:
        """End them; answers their CPU seconds and their round trips."""
        cpu, trips = 0.0, 0
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            report = json.loads(process.stdout.readline() or '{"cpu": 0, "round_trips": 0}')
            cpu += report["cpu"]
            trips += report["round_trips"]
            process.wait(30)
        return cpu, trips
