"""One process of a contender: it sends messages, or works on them, as it is told.

Run as ``python -m benchmarks.player SYSTEM`` with the contender's own Python.  Commands are lines of JSON on stdin,
each is answered by one on stdout; the end of stdin ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import sys
import threading
import time
import traceback
from typing import Any

from benchmarks import instructions
from benchmarks.systems.base import System, late, option, started, with_moment


class Player:
    """The commands that every system has; those of a system's own go to the system."""

    def __init__(self, system: System, counting: int | None) -> None:
        self.system = system
        self._cpu = 0.0
        self._counting = counting
        self._counted = 0

    def prepare(self) -> None:
        self.system.prepare()

    def send(self, n: int, size: int, threads: int = 1) -> dict[str, float]:
        """Send one by one, on some threads at once; answers how long it took, and how much CPU of this process."""
        # The connection is made and the statement prepared before the clock runs.
        self.system.send_each(["x" * size] * 20)
        shares = ["x" * size] * (n // threads)
        senders = [threading.Thread(target=self.system.send_each, args=(shares,)) for _ in range(threads - 1)]
        began, cpu = time.perf_counter(), cpu_seconds()
        for sender in senders:
            sender.start()
        self.system.send_each(shares)
        for sender in senders:
            sender.join()
        return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu}

    def store(self, n: int, size: int) -> float:
        """Send in bulk; answers the seconds."""
        texts = ["x" * size] * n
        began = time.perf_counter()
        self.system.send_many(texts)
        return time.perf_counter() - began

    def probe(self, n: int, gap: float, size: int) -> None:
        """Send single messages, seconds apart, each with the moment of its sending."""
        for _ in range(n):
            time.sleep(gap * random.uniform(0.5, 1.5))
            self.system.send_each([with_moment(time.monotonic_ns(), size)])

    def work(self, threads: int = 8) -> None:
        self._cpu = cpu_seconds()
        self._counted = 0 if self._counting is None else instructions.counted(self._counting)
        self.system.start(threads)

    def progress(self) -> int:
        """How many messages were started here."""
        return len(started) + len(late)

    def report(self) -> dict[str, Any]:
        """What this worker did since it began to work."""
        return {
            "n": len(started),
            "first": min(started, default=0),
            "last": max(started, default=0),
            "late": late,
            "cpu": cpu_seconds() - self._cpu,
            "instructions": None if self._counting is None else instructions.counted(self._counting) - self._counted,
            **self.system.counts(),
        }

    def stop(self) -> dict[str, Any]:
        self.system.stop()
        return self.system.counts()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Before anything that starts threads: they are counted with the thread that started them.  Only where it is asked
    # for: it makes a change from one thread to another dearer by a third.
    counting = instructions.count() if option("INSTRUCTIONS", "") else None
    system = importlib.import_module(f"benchmarks.systems.{sys.argv[1]}").Contender(
        os.environ["BENCHMARK_URL"], int(option("STREAMS", "1"))
    )
    player = Player(system, counting)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            method = getattr(player, command["do"], None) or getattr(system, command["do"])
            answer = {"answer": method(**command["with"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    # Threads of brokers may still run, and nobody is there to see them end.
    os._exit(0)


if __name__ == "__main__":
    main()
