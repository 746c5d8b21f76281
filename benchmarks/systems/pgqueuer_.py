"""pgqueuer on asyncpg and uvloop, as its own command runs it; asynchronous handlers, no threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import asyncpg
import uvloop
from pgqueuer import AsyncpgDriver, PgQueuer, Queries

from benchmarks.systems.base import System, option, receive


class Contender(System):
    def __init__(self, url: str, streams: int) -> None:
        super().__init__(url, streams)
        self.batch_size = int(option("BATCH", "10"))
        self._loop = uvloop.new_event_loop()
        self._queries: Any = None
        self._worker: PgQueuer | None = None
        self._thread: threading.Thread | None = None

    async def _client(self) -> Any:
        if self._queries is None:
            self._queries = Queries(AsyncpgDriver(await asyncpg.connect(self.url)))
        return self._queries

    def prepare(self) -> None:
        async def install() -> None:
            await (await self._client()).install()

        self._loop.run_until_complete(install())

    def send(self, text: str) -> None:
        self.send_each([text])

    def send_each(self, texts: Sequence[str]) -> None:
        async def send() -> None:
            queries = await self._client()
            for text in texts:
                await queries.enqueue("noop", text.encode())

        self._loop.run_until_complete(send())

    def send_many(self, texts: Sequence[str]) -> None:
        async def send() -> None:
            queries = await self._client()
            for i in range(0, len(texts), 1000):
                some = texts[i : i + 1000]
                await queries.enqueue(["noop"] * len(some), [text.encode() for text in some], [0] * len(some))

        self._loop.run_until_complete(send())

    def start(self, threads: int) -> None:
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()

    async def _run(self) -> None:
        self._worker = worker = PgQueuer(AsyncpgDriver(await asyncpg.connect(self.url)))

        @worker.entrypoint("noop")
        async def noop(job: Any) -> None:
            receive(job.payload.decode())

        await worker.run(batch_size=self.batch_size)

    def stop(self) -> None:
        if self._thread is not None and self._worker is not None:
            self._loop.call_soon_threadsafe(self._worker.shutdown.set)
            self._thread.join()
        elif self._queries is not None:
            self._loop.run_until_complete(asyncio.sleep(0))
