"""Random workflows: programs are trees of what workflows do, and one workflow runs any of them."""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from typing import Any

import dramatiq_durable as durable

from . import features

Program = list[Any]

#: What ends at once or after a while, and what has parts; the latter with how many.
LEAVES = ("activity", "sleep", "signal", "local", "side", "condition", *features.KINDS)
TREES = {"sequence": 4, "gather": 4, "group": 3, "shield": 1, "child": 1, "attempt": 1, "queue": 3, "sheltered_tree": 1}
#: What depends on who is first (the clock decides) or on the run's id.
RACY_LEAVES = ("random", "fail")
RACES = {"wait_for": 1, "race": 3, "cancel": 1, "as_completed": 3, "timeouts": 2, "cancelled_child_tree": 1}


class Zipped:
    """A codec."""

    name = "zipped"

    def encode(self, data: bytes) -> bytes:
        return zlib.compress(data)

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data)


def generate(seed: int, *, races: bool = True, depth: int = 4) -> Program:
    """A program, the same for each seed; without races, what comes of it is, too."""
    source = random.Random(seed)
    trees = {**TREES, **RACES} if races else TREES
    leaves = (*LEAVES, *RACY_LEAVES) if races else LEAVES
    numbers = 8 if races else 7  # the activity fails with 7

    def node(depth: int) -> Program:
        if depth == 0 or source.random() < 0.15:
            kind = source.choice(leaves)
            return [kind, source.randrange(numbers)]
        kind = source.choice(sorted(trees))
        most = trees[kind]
        parts = [node(depth - 1) for _ in range(1 if most == 1 else source.randint(1, most))]
        return [kind, source.randrange(8), *parts]

    return ["sequence", 0, *[["attempt", 0, node(depth)] for _ in range(4)]]


def declare(broker: durable.DurableBroker, pace: float) -> Any:
    """Declare the workflow that runs programs.

    Parameters:
      pace(float): seconds that a unit of time takes.
    """

    @durable.activity(broker=broker, queue_name="work", max_retries=1, min_backoff=1, max_backoff=2)
    def work(n: int) -> int:
        time.sleep(n * pace / 4)
        if n == 7:
            raise ValueError("seven")
        return n * 10

    begin, leaves = features.declare(broker, pace)
    tell = durable.activity(broker.actors["tell"])

    def local_work(n: int) -> int:
        return n * 100

    async def run(node: Program) -> Any:
        kind, n, *parts = node
        if kind in leaves:
            return await leaves[kind](n)
        if kind == "activity":
            return await work.execute(n)
        if kind == "sleep":
            return await durable.sleep(n * pace)
        if kind == "signal":
            # Nobody outside knows of the children: each run is told by its own activity.
            await tell.execute(f"s{n % 2}", None, str(durable.uuid4()))
            return await durable.wait_for_signal(f"s{n % 2}")
        if kind == "local":
            return await durable.local(local_work, n)
        if kind == "side":
            return await durable.side_effect(lambda: n)
        if kind == "random":
            return durable.random().randrange(100) >= 0 and await work.execute(durable.random().randrange(6))
        if kind == "fail":
            raise ValueError(f"fail {n}")
        if kind == "condition":
            state = {"n": 0}

            async def count() -> None:
                await durable.sleep(pace)
                state["n"] = 1

            task = asyncio.create_task(count())
            await durable.wait_condition(lambda: state["n"] == 1)
            return await task
        if kind == "sequence":
            return [await run(part) for part in parts]
        if kind == "gather":
            done = await asyncio.gather(*[run(part) for part in parts], return_exceptions=n % 2 == 0)
            return [str(type(each).__name__) if isinstance(each, BaseException) else each for each in done]
        if kind == "group":
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(part)) for part in parts]
            return [task.result() for task in tasks]
        if kind == "shield":
            return await asyncio.shield(run(parts[0]))
        if kind == "child":
            return await program.execute(parts[0])
        if kind == "attempt":
            try:
                return await run(parts[0])
            except Exception as e:
                return type(e).__name__
        if kind == "queue":
            queue: asyncio.Queue[Any] = asyncio.Queue(1)
            lock = asyncio.Lock()

            async def put(part: Program) -> None:
                try:
                    async with lock:
                        await queue.put(await run(part))
                except Exception as e:
                    await queue.put(type(e).__name__)

            tasks = [asyncio.create_task(put(part)) for part in parts]
            got = [await queue.get() for _ in parts]
            await asyncio.wait(tasks)
            return got
        if kind == "wait_for":
            try:
                return await asyncio.wait_for(run(parts[0]), (n + 0.5) * pace)
            except TimeoutError:
                return "timeout"
        if kind == "race":
            tasks = [asyncio.create_task(run(part)) for part in parts]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return len(done)
        if kind == "cancel":
            task = asyncio.create_task(run(parts[0]))
            await durable.sleep(n * pace)
            task.cancel()
            try:
                return await task
            except asyncio.CancelledError:
                return "cancelled"
        if kind == "as_completed":
            got = []
            for next_one in asyncio.as_completed([run(part) for part in parts]):
                try:
                    got.append(await next_one)
                except Exception as e:
                    got.append(type(e).__name__)
            return got
        if kind == "sheltered_tree":
            async with durable.uncancellable():
                return await run(parts[0])
        if kind == "timeouts":
            passed: list[Any] = []
            try:
                async with asyncio.timeout((n + 1) * pace):
                    for part in parts:
                        try:
                            async with asyncio.timeout((n / 2 + 0.5) * pace):
                                passed.append(await run(part))
                        except TimeoutError:
                            passed.append("inner")
            except TimeoutError:
                passed.append("outer")
            return passed
        if kind == "cancelled_child_tree":
            child = program.start(parts[0])
            await durable.sleep(n * pace)
            await child.cancel()
            try:
                return await child
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
                return "cancelled"
        raise AssertionError(kind)

    @durable.workflow(broker=broker, queue_name="programs")
    async def program(node: Program) -> Any:
        begin()
        return await run(node)

    return program
