"""Random workflows, and a random fate for each: which answers come, in which order, with cancels and signals between.

``python -m tests.workflow.programs FIRST COUNT`` prints a digest of the history of each.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
from collections.abc import Callable
from typing import Any

import dramatiq_durable as durable
from dramatiq_durable import errors
from dramatiq_durable.workflow import events
from tests.workflow.test_engine_support import Run, echo, ship

Program = list[Any]
MAX_EVENTS = 60

LEAVES = ("activity", "activity", "sleep", "signal", "child", "random", "yield", "fail", "local clock")
NODES = (
    *("sequence", "sequence", "gather", "gather kept", "group", "timeout", "wait_for", "wait first", "wait failed"),
    *("as_completed", "as_completed async", "cancel", "cancel early", "shield", "uncancellable", "swallow"),
    *("set", "queue", "lock", "semaphore", "condition", "cleanup"),
)


def make(rng: Any, depth: int = 3) -> Program:
    """A program: the name of an operation, a number, and the programs inside it."""
    if depth == 0 or rng.random() < 0.25:
        return [rng.choice(LEAVES), rng.randint(1, 9), []]
    return [rng.choice(NODES), rng.randint(1, 9), [make(rng, depth - 1) for _ in range(rng.randint(1, 3))]]


async def run(program: Program, state: dict[str, Any]) -> Any:
    """Interpret a program; all of it is asyncio and what workflows may call."""
    name, number, parts = program
    operation = OPERATIONS.get(name)
    state["count"] += 1
    state["trace"].append([state["count"], name])
    if operation is None:
        return await leaf(name, number)
    return await operation(number, parts, state)


async def leaf(name: str, number: int) -> Any:
    match name:
        case "activity":
            policy: Any = ("try", "wait", "abandon")[number % 3]
            return await echo.options(cancellation=policy).execute(number)
        case "sleep":
            await asyncio.sleep(number)
        case "signal":
            return await durable.wait_for_signal(f"s{number % 2}", timeout=number if number % 2 else None)
        case "child":
            return await ship.execute(str(number))
        case "random":
            return await echo.execute([random.random(), str(durable.uuid4())])
        case "yield":
            await asyncio.sleep(0)
        case "fail":
            raise ValueError(str(number))
        case "local clock":
            return asyncio.get_running_loop().time()
    return None


def tasks(parts: list[Program], state: dict[str, Any]) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(run(part, state)) for part in parts]


async def all_of(parts: list[Program], state: dict[str, Any]) -> list[Any]:
    return [await run(part, state) for part in parts]


async def sequence(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return await all_of(parts, state)


async def gather(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return await asyncio.gather(*(run(part, state) for part in parts))


async def gather_kept(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return [str(r) for r in await asyncio.gather(*(run(part, state) for part in parts), return_exceptions=True)]


async def group(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    async with asyncio.TaskGroup() as opened:
        made = [opened.create_task(run(part, state)) for part in parts]
    return [task.result() for task in made]


async def timeout(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    try:
        async with asyncio.timeout(number) as scope:
            first = await run(parts[0], state)
            if number % 2:
                scope.reschedule(asyncio.get_running_loop().time() + number * 2)
            return [first, await all_of(parts[1:], state)]
    except TimeoutError:
        return "late"


async def wait_for(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return await asyncio.wait_for(all_of(parts, state), number - 1)


async def waiting(parts: list[Program], state: dict[str, Any], when: str, within: float | None) -> Any:
    done, pending = await asyncio.wait(tasks(parts, state), return_when=when, timeout=within)
    for task in pending:
        task.cancel()
    names = [task.get_name() for task in done | pending]
    return [names, [str(r) for r in await asyncio.gather(*done, *pending, return_exceptions=True)]]


async def wait_first(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return await waiting(parts, state, asyncio.FIRST_COMPLETED, None)


async def wait_failed(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return await waiting(parts, state, asyncio.FIRST_EXCEPTION, number)


async def as_completed(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return [
        await each
        for each in asyncio.as_completed([run(p, state) for p in parts], timeout=number if number > 5 else None)
    ]


async def as_completed_async(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    return [await each async for each in asyncio.as_completed(tasks(parts, state))]  # type: ignore[attr-defined]


async def cancel(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    made = tasks(parts, state)
    await asyncio.sleep(number % 3)
    for task in made:
        task.cancel()
    return [str(r) for r in await asyncio.gather(*made, return_exceptions=True)]


async def cancel_early(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    made = tasks(parts, state)
    made[number % len(made)].cancel()
    return [str(r) for r in await asyncio.gather(*made, return_exceptions=True)]


async def shield(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    inner = asyncio.ensure_future(all_of(parts, state))
    try:
        return await asyncio.shield(inner)
    except asyncio.CancelledError:
        return await inner


async def uncancellable(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    async with durable.uncancellable():
        return await all_of(parts, state)


async def swallow(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    try:
        return await all_of(parts, state)
    except (asyncio.CancelledError, Exception) as e:
        state["trace"].append(type(e).__name__)
        return "swallowed"


async def set_of(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    made = set(tasks(parts, state)) | {asyncio.create_task(run(part, state)) for part in parts}
    for task in made:
        state["trace"].append(task.get_name())
        await asyncio.wait([task], timeout=number)
    for task in asyncio.all_tasks():
        if task in made:
            task.cancel()
    return len(made)


async def queue(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    items: asyncio.Queue[Any] = asyncio.PriorityQueue() if number % 2 else asyncio.Queue(maxsize=1)

    async def produce(n: int, part: Program) -> None:
        try:
            await run(part, state)
        finally:
            await items.put(n)

    async with asyncio.TaskGroup() as opened:
        for n, part in enumerate(parts):
            opened.create_task(produce(n, part))
        return [await items.get() for _ in parts]


def limited(limit: Callable[[int], Any]) -> Any:
    async def operation(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
        gate = limit(number)

        async def one(part: Program) -> Any:
            async with gate:
                return await run(part, state)

        return await asyncio.gather(*(one(part) for part in parts))

    return operation


async def condition(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    goal = state["count"] + number
    made = tasks(parts, state)
    try:
        await durable.wait_condition(lambda: state["count"] >= goal, timeout=number)
    except durable.Timeout:
        state["trace"].append("no condition")
    return await asyncio.gather(*made)


async def cleanup(number: int, parts: list[Program], state: dict[str, Any]) -> Any:
    try:
        return await run(parts[0], state)
    finally:
        for part in parts[1:]:
            await run(part, state)


OPERATIONS: dict[str, Any] = {
    "sequence": sequence,
    "gather": gather,
    "gather kept": gather_kept,
    "group": group,
    "timeout": timeout,
    "wait_for": wait_for,
    "wait first": wait_first,
    "wait failed": wait_failed,
    "as_completed": as_completed,
    "as_completed async": as_completed_async,
    "cancel": cancel,
    "cancel early": cancel_early,
    "shield": shield,
    "uncancellable": uncancellable,
    "swallow": swallow,
    "set": set_of,
    "queue": queue,
    "lock": limited(lambda number: asyncio.Lock()),
    "semaphore": limited(asyncio.Semaphore),
    "condition": condition,
    "cleanup": cleanup,
}


def workflow_of(program: Program) -> Any:
    async def flow() -> Any:
        state: dict[str, Any] = {"count": 0, "trace": []}
        try:
            result = str(await run(program, state))
        except (errors.DurableError, ValueError, TimeoutError, ExceptionGroup, asyncio.CancelledError) as e:
            result = type(e).__name__
        return [result, state["trace"]]

    return flow


def live(program: Program, rng: Any, between: Callable[[Run], None] = lambda run: None) -> Run:
    """Run a program to its end, or for so many events, with answers that are drawn.

    Parameters:
      between: is called before each event.
    """
    driven = Run(workflow_of(program))
    for _ in range(MAX_EVENTS):
        if driven.execution.closed:
            break
        between(driven)
        answer(driven, rng)
    return driven


def answer(driven: Run, rng: Any) -> None:
    waiting = driven.open_commands()
    chance = rng.random()
    if not waiting or chance < 0.1:
        if chance < 0.03:
            driven.cancel()
        else:
            driven.signal(f"s{rng.randint(0, 1)}", rng.randint(0, 9))
        return
    command = rng.choice(waiting)
    assert command.seq is not None
    if command.event_type == events.TIMER_STARTED:
        driven.send(events.TIMER_FIRED, command.seq, after_ms=command.ms)
    elif command.event_type == events.CHILD_STARTED:
        driven.send(events.CHILD_COMPLETED, command.seq, payload=b'"child"')
    elif chance < 0.3:
        driven.fail(command.seq)
    else:
        driven.complete(command.seq, command.seq)


def digest(driven: Run) -> str:
    """Of everything but tracebacks, which differ with the version of Python."""
    facts = [tuple(e._replace(attributes=None) if e.type == events.WORKFLOW_FAILED else e) for e in driven.history]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    for seed in range(first, first + count):
        rng = random.Random(seed)
        driven = live(make(rng, depth=4), rng)
        print(seed, len(driven.history), digest(driven))
        driven.execution.evict()


if __name__ == "__main__":
    main()
