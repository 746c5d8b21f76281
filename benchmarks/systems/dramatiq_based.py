"""Whatever is a Dramatiq broker: the same actor, the same worker, Dramatiq's defaults."""

from __future__ import annotations

from typing import Any

import dramatiq

from benchmarks.systems.base import System, option, receive


class DramatiqSystem(System):
    def __init__(self, url: str, streams: int) -> None:
        super().__init__(url, streams)
        self.broker: Any = self.connect(url)
        dramatiq.set_broker(self.broker)
        queue = option("QUEUE", "noop")
        self.actors = [
            dramatiq.actor(receive, actor_name=f"noop{i or ''}", queue_name=f"{queue}{i or ''}") for i in range(streams)
        ]
        self.worker: Any = None

    def connect(self, url: str) -> Any:
        """The broker."""
        raise NotImplementedError

    def send(self, text: str) -> None:
        self.actors[0].send(text)

    def start(self, threads: int) -> None:
        # Dramatiq's default; it is also how long its threads take to end.
        timeout = int(option("WORKER_TIMEOUT", "1000"))
        self.worker = dramatiq.Worker(self.broker, worker_threads=threads, worker_timeout=timeout)
        self.worker.start()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.broker.close()
