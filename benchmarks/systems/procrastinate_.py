"""procrastinate: a synchronous task, as many at once as others have threads; finished ones are kept, as by default."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import procrastinate

from benchmarks.systems.base import System, receive


class Contender(System):
    def __init__(self, url: str, streams: int) -> None:
        super().__init__(url, streams)
        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
        self.task = self.app.task(name="noop", queue="noop")(receive)
        self._open = False
        self._loop = asyncio.new_event_loop()
        self._work: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    def _client(self) -> None:
        if not self._open:
            self.app.open()
            self._open = True

    def prepare(self) -> None:
        self._client()
        self.app.schema_manager.apply_schema()

    def send(self, text: str) -> None:
        self._client()
        self.task.defer(text=text)

    def send_many(self, texts: Sequence[str]) -> None:
        self._client()
        for i in range(0, len(texts), 1000):
            self.task.batch_defer(*({"text": text} for text in texts[i : i + 1000]))

    def start(self, threads: int) -> None:
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(threads),))
        self._thread.start()

    async def _run(self, threads: int) -> None:
        async with self.app.open_async():
            self._work = asyncio.create_task(
                self.app.run_worker_async(concurrency=threads, install_signal_handlers=False)
            )
            await asyncio.wait([self._work])

    def stop(self) -> None:
        if self._thread is not None and self._work is not None:
            self._loop.call_soon_threadsafe(self._work.cancel)
            self._thread.join()
        elif self._open:
            self.app.close()
