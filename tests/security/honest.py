"""A stream whose work goes on: sends a message, waits until its actor begins, and prints how long that took.

Each line is JSON: of so many messages the median and the worst, in milliseconds.  A message that does not come ends it.
"""

from __future__ import annotations

import json
import queue
import statistics
import sys
import time

import dramatiq

from dramatiq_durable import DurableBroker

WINDOW = 20


def main() -> None:
    arrived: queue.Queue[tuple[int, float]] = queue.Queue()
    broker = DurableBroker(middleware=[])
    dramatiq.set_broker(broker)

    @dramatiq.actor(queue_name="honest")
    def work(n: int) -> None:
        arrived.put((n, time.monotonic()))

    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    n = 0
    while True:
        took = []
        for _ in range(WINDOW):
            n += 1
            sent = time.monotonic()
            work.send(n)
            number, at = arrived.get(timeout=60)
            if number != n:
                sys.exit(f"message {number} came where {n} was expected")
            took.append((at - sent) * 1000)
            # The worker goes to sleep before the next: it has to be woken.
            time.sleep(0.01)
        print(json.dumps({"median": statistics.median(took), "worst": max(took)}), flush=True)


if __name__ == "__main__":
    main()
