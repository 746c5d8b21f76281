"""What random programs do beside activities and asyncio: a leaf for each feature.

What comes of a leaf is a function of its number, whoever is first and however often workers die.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment

Leaf = Callable[[int], Awaitable[Any]]

#: Of the run whose code is running: what its handlers were given, by key.
what_was_heard: ContextVar[dict[str, Any]] = ContextVar("what_was_heard")


def mocks(env: Callable[[], Environment]) -> dict[str, Callable[..., Any]]:
    """What the activities that reach runs from outside do in an environment."""

    def handle() -> Any:
        info = durable.activity_info()
        assert info is not None
        return env().get_handle(run_id=info.run_id)

    def tell(name: str, payload: Any, key: str) -> None:
        handle().signal(name, payload, id=key)

    def ask(name: str, n: int, key: str) -> None:
        handle()._request(name, (n, key), key, "accepted")

    def answer(subject: str, n: int) -> None:
        for found in env().escalations.list(subject=subject, status="waiting"):
            if n == 6:
                env().escalations.cancel(found.id)
            else:
                env().escalations.resolve(found.id, n)

    return {"tell": tell, "ask": ask, "answer": answer}


def declare(broker: durable.DurableBroker, pace: float) -> tuple[Callable[[], None], dict[str, Leaf]]:
    """Declare what the leaves need.

    Parameters:
      pace(float): seconds that a unit of time takes.

    Returns:
      What registers the handlers of a run, and the leaves by their kinds.
    """

    def handle() -> durable.WorkflowHandle[Any]:
        info = durable.activity_info()
        assert info is not None
        return durable.get_handle(run_id=info.run_id, broker=broker)

    @durable.activity(broker=broker, queue_name="work", max_retries=50, min_backoff=1, max_backoff=20)
    def tell(name: str, payload: Any, key: str) -> None:
        with contextlib.suppress(durable.WorkflowClosed):
            handle().signal(name, payload, id=key)

    @durable.activity(broker=broker, queue_name="work", max_retries=50, min_backoff=1, max_backoff=20)
    def ask(name: str, n: int, key: str) -> None:
        # All threads may be here: the workflow's task needs one.  It is asked for, whether this waits for it or not.
        with contextlib.suppress(durable.WorkflowClosed, durable.UpdateRejected, durable.Timeout):
            handle().update(name, n, key, update_id=key, wait="accepted", timeout=0.05)

    @durable.activity(broker=broker, queue_name="work", max_retries=50, min_backoff=1, max_backoff=20)
    def answer(subject: str, n: int) -> None:
        open = durable.escalations.list(subject=subject, status="waiting", broker=broker)
        for found in open:
            with contextlib.suppress(durable.EscalationConflict):
                if n == 6:
                    durable.escalations.cancel(found.id, broker=broker)
                else:
                    durable.escalations.resolve(found.id, n, broker=broker)

    @durable.activity(broker=broker, queue_name="work", max_retries=50, min_backoff=1, max_backoff=20)
    def clean(n: int) -> int:
        return n

    @durable.workflow(broker=broker, queue_name="programs")
    async def listener(n: int) -> Any:
        return [await durable.wait_for_signal("go") for _ in range(n)]

    @durable.workflow(broker=broker, queue_name="programs")
    async def chain(left: int, got: list[int]) -> list[int]:
        got.append(await durable.wait_for_signal("go"))
        if left:
            durable.continue_as_new(left - 1, got)
        return got

    @durable.workflow(broker=broker, queue_name="programs")
    async def flaky(n: int) -> int:
        await clean.execute(n)
        attempt = durable.info().attempt
        if attempt <= n % 3:
            raise ValueError(f"attempt {attempt}")
        return attempt

    @durable.workflow(broker=broker, queue_name="programs")
    async def sleeper(n: int) -> str:
        try:
            await durable.sleep("1 hour")
        except asyncio.CancelledError:
            async with durable.uncancellable():
                await clean.execute(n)
                await durable.sleep(pace)
            if n % 2:
                return "cleaned"
            raise
        return "slept"

    def begin() -> None:
        heard: dict[str, Any] = {}
        what_was_heard.set(heard)

        @durable.on_signal("heard")
        def on_heard(said: dict[str, Any]) -> None:
            heard[said["key"]] = said["n"]

        def is_small(n: int, key: str) -> None:
            if n == 7:
                raise ValueError("seven")

        @durable.on_update("add", validator=is_small)
        async def on_add(n: int, key: str) -> int:
            if n % 2:
                await durable.sleep(pace)
            heard[key] = n + 1
            return n

        @durable.on_query("heard")
        def on_query() -> int:
            return len(heard)

    def key() -> str:
        return str(durable.uuid4())

    async def handler(n: int) -> int:
        mine, heard = key(), what_was_heard.get()
        await tell.execute("heard", {"key": mine, "n": n}, mine)
        await durable.wait_condition(lambda: mine in heard)
        return int(heard[mine])

    async def update(n: int) -> Any:
        mine, heard = key(), what_was_heard.get()
        await ask.execute("add", n, mine)
        if n == 7:
            return "rejected"
        await durable.wait_condition(lambda: mine in heard)
        return heard[mine]

    async def never(n: int) -> Any:
        try:
            await durable.wait_condition(lambda: False, timeout=(n + 1) * pace)
        except durable.Timeout:
            return "timeout"

    async def unheard(n: int) -> Any:
        try:
            return await durable.wait_for_signal(f"nobody {n}", timeout=(n + 1) * pace)
        except durable.Timeout:
            return "timeout"

    async def told_child(n: int) -> Any:
        child = listener.start(n % 3 + 1)
        for each in range(n % 3):
            await child.signal("go", each)
        if n % 2:
            await child.started()
        said = child.signal("go", "last")
        result = await child
        await said
        return result

    async def long_chain(n: int) -> Any:
        child = chain.start(n % 4, [])
        for each in range(n % 4 + 1):
            await child.signal("go", each)
        return await child

    async def retried(n: int) -> Any:
        policy = durable.RetryPolicy(initial_interval=pace, maximum_attempts=2)
        try:
            return await flaky.options(retry=policy).execute(n)
        except durable.ChildWorkflowFailed as e:
            return e.message

    async def cancelled_child(n: int) -> Any:
        child = sleeper.start(n)
        if n % 4 > 1:
            await child.started()
        if n % 3:
            await durable.sleep(pace * (n % 3))
        await child.cancel()
        try:
            return await child
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            return "cancelled"

    async def entity(n: int) -> Any:
        mine = key()
        await durable.entity().set(mine, {"n": n})
        await durable.entity().increment("count", 1)
        await durable.entity().append("all", mine)
        await durable.entity().merge(mine, {"m": n * 2})
        if n == 5:
            await durable.entity().delete(mine)
        return await durable.entity().get(mine)

    async def state(n: int) -> Any:
        await durable.output({"n": n})
        await durable.upsert_search({"n": n, "odd": n % 2 == 1})
        await durable.emit("programs", n)
        return durable.patched(f"patch {n % 3}")

    async def local_failure(n: int) -> Any:
        def fail(n: int) -> int:
            if n % 2:
                raise ValueError(n)
            return n

        try:
            return await durable.local(fail, n)
        except durable.ActivityFailed as e:
            return e.type

    async def escalation(n: int) -> Any:
        subject = key()
        limit = pace * n if n in (2, 3) else None
        opened = asyncio.create_task(durable.escalate(role="tester", subject=subject, payload=n, timeout=limit))
        if limit is None:
            await durable.sleep(pace)
            await answer.execute(subject, n)
        try:
            return await opened
        except durable.Timeout:
            return "timeout"
        except durable.EscalationCancelled:
            return "taken back"

    async def message(n: int) -> Any:
        if n % 4 == 0:
            try:
                await durable.signal_workflow(f"nobody {key()}", "x", n)
            except durable.WorkflowNotFound:
                return "missing"
        mine = key()
        await durable.signal_workflow(durable.info().workflow_id, mine, n)
        return await durable.wait_for_signal(mine)

    async def sheltered(n: int) -> Any:
        async with durable.uncancellable():
            return [await clean.execute(n), await durable.sleep(pace * (n % 3))]

    async def broken_group(n: int) -> Any:
        async def part(number: int) -> int:
            if number == n % 3:
                await durable.sleep(pace * (n // 3))
                raise KeyError(number)
            await clean.execute(number)
            await durable.sleep("1 hour")
            return number

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(3):
                    group.create_task(part(number))
        except BaseExceptionGroup as e:
            return [str(each) for each in e.exceptions]

    async def nested_timeouts(n: int) -> Any:
        passed = []
        try:
            async with asyncio.timeout(pace * (n + 2)):
                try:
                    async with asyncio.timeout(pace):
                        await durable.sleep("1 hour")
                except TimeoutError:
                    passed.append("inner")
                await durable.sleep("1 hour")
        except TimeoutError:
            passed.append("outer")
        # Where nobody was there in time, both are due, and either may be first.
        return passed[-1]

    async def waited_activity(n: int) -> Any:
        task = asyncio.create_task(clean.options(cancellation="wait", delay=0).execute(n))
        await durable.sleep(pace * (n % 3))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, durable.ActivityFailed):
            await task
        return n

    return begin, {
        "handler": handler, "update": update, "never": never, "unheard": unheard, "told_child": told_child,
        "chain": long_chain, "retried": retried, "cancelled_child": cancelled_child, "entity": entity, "state": state,
        "local_failure": local_failure, "escalation": escalation, "message": message, "sheltered": sheltered,
        "broken_group": broken_group, "nested_timeouts": nested_timeouts, "waited_activity": waited_activity,
    }  # fmt: skip


#: The kinds of leaves that `declare` gives.
KINDS = (
    "handler", "update", "never", "unheard", "told_child", "chain", "retried", "cancelled_child", "entity", "state",
    "local_failure", "escalation", "message", "sheltered", "broken_group", "nested_timeouts", "waited_activity",
)  # fmt: skip
