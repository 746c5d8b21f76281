"""What runs let others see, where others go on for them: continue-as-new, retries, resets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]


def test_state_and_output_go_on_through_continue_as_new(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def counter(turn: int) -> Any:
        e = durable.entity()
        await e.increment("turns")
        await durable.upsert_search({f"turn{turn}": True})
        await durable.output(f"{turn}a")
        await durable.output(f"{turn}b")
        if turn < 3:
            try:
                durable.continue_as_new(turn + 1)
            finally:
                await e.set(f"left.{turn}", True)
        await durable.wait_for_signal("end")
        return [await e.get(), durable.info().search, durable.info().memo]

    start_worker()
    handle = counter.options(workflow_id="c", search={"kind": "x"}, memo={"m": 1}).start(1)
    expected = [(2 * n + m, f"{n + 1}{'ab'[m]}") for n in range(3) for m in range(2)]
    follower = handle.follow()
    assert [next(follower) for _ in range(6)] == expected
    # By the workflow id it is the latest run; what lies before it is found all the same.
    for offset in (0, 1, 3, 5):
        later = durable.get_handle("c").follow(offset)
        assert [next(later) for _ in range(6 - offset)] == expected[offset:]
    wait_until(lambda: durable.count_workflows("status = 'running' and search.turn3 = true") == 1)
    (found,) = durable.list_workflows("status = 'running' and search.kind = 'x' and entity.turns = 3")
    assert found.entity == {"turns": 3, "left": {"1": True, "2": True}}
    handle.signal("end")
    result = handle.result(timeout=10)
    assert result[0] == found.entity
    assert result[1] == {"kind": "x", "turn1": True, "turn2": True, "turn3": True}
    assert result[2] == {"m": 1}
    assert list(follower) == []
    assert [value for _, value in handle.follow(4)] == ["3a", "3b"]
    assert durable.count_workflows(group_by="status") == {"continued_as_new": 2, "completed": 1}


def test_a_new_run_may_be_given_other_search_attributes(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def two(turn: int) -> Any:
        if turn == 1:
            await durable.upsert_search({"a": 1})
            durable.continue_as_new(2, search={"b": 2})
        if turn == 2:
            kept = durable.info().search
            durable.continue_as_new([kept], search=None)
        return [turn, durable.info().search]

    start_worker()
    assert two.start(1).result(timeout=10) == [[{"b": 2}], {}]


def test_output_goes_on_through_retries(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow(retry=durable.RetryPolicy(initial_interval=0.01, maximum_attempts=3))
    async def shaky() -> Any:
        attempt = durable.info().attempt
        await durable.entity().increment("attempts")
        await durable.output(attempt)
        if attempt < 3:
            await durable.output("about to fail")
            raise ValueError
        return await durable.entity().get()

    start_worker()
    handle = shaky.start()
    assert handle.result(timeout=10) == {"attempts": 1}, "each attempt begins as the first did"
    assert list(handle.follow()) == [(0, 1), (1, "about to fail"), (2, 2), (3, "about to fail"), (4, 3)]


def test_a_reset_brings_back_the_state_of_its_event(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    given: list[Any] = []

    @durable.activity
    def nothing() -> None: ...

    @durable.subscribe("t")
    @dramatiq.actor
    def listener(payload: Any) -> None:
        given.append(payload)

    @durable.workflow
    async def f() -> Any:
        e = durable.entity()
        for n in range(3):
            await e.append("list", n)
            await durable.upsert_search({"n": n})
            await durable.output(n)
            await durable.emit("t", n)
            await nothing.execute()
        await durable.wait_for_signal("end")
        return await e.get()

    start_worker()
    handle = f.options(workflow_id="r").start()
    wait_until(lambda: handle.describe().search == {"n": 2})
    wait_until(lambda: given == [0, 1, 2])
    second = [e.event_id for e in handle.history() if e.type == "ActivityCompleted"][1]
    again = handle.reset(second)
    wait_until(lambda: again.describe().search == {"n": 2})
    assert again.describe().entity == {"list": [0, 1, 2]}
    assert handle.describe().entity == {"list": [0, 1, 2]}, "what was is kept"
    wait_until(lambda: given == [0, 1, 2, 2])
    again.signal("end")
    assert again.result(timeout=10) == {"list": [0, 1, 2]}
    assert list(again.follow()) == [(0, 0), (1, 1), (2, 2)]
    assert list(handle.follow()) == [(0, 0), (1, 1), (2, 2)], "that of the run that was reset ends with it"


def test_a_batch_is_reset(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    broken = True

    @durable.workflow
    async def f(n: int) -> int:
        await durable.upsert_search({"n": n})
        if broken and n % 2:
            raise ValueError
        return n

    start_worker()
    handles = [f.options(workflow_id=f"f-{n}").start(n) for n in range(6)]
    wait_until(lambda: handles[1].status() != "running")
    older = f.options(workflow_id="f-1").start(1)  # the id was used again: only the latest run is meant
    for handle in (*handles, older):
        wait_until(lambda handle=handle: handle.status() != "running")  # type: ignore[misc]
    broken = False
    assert durable.batch_reset("status = 'failed' and search.n > 1", 1) == 2
    assert durable.batch_reset("status = 'failed' and search.n = 1", 1) == 1
    assert durable.batch_reset("status = 'failed'", 1) == 0, "others go on for them"
    assert durable.batch_reset("status = 'completed' and workflow_id = 'f-0'", 99) == 0, "it has no such event"
    for n in (1, 3, 5):
        assert durable.get_handle(f"f-{n}").result(timeout=10) == n
    assert durable.count_workflows(group_by="status") == {"completed": 6, "failed": 4}
    with pytest.raises(ValueError, match="to_event"):
        durable.batch_reset("status = 'failed'", 0)


def test_children_and_schedules_have_search_attributes(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def child() -> Any:
        return durable.info().search

    @durable.workflow(search={"from": "definition"})
    async def parent() -> Any:
        return [durable.info().search, await child.options(search={"from": "parent"}).execute()]

    start_worker()
    assert parent.start().result(timeout=10) == [{"from": "definition"}, {"from": "parent"}]
    assert [r.name for r in durable.list_workflows("search.from = 'parent'")] == ["child"]
    durable.schedules.create("s", cron="0 0 1 1 *", target=parent)
    durable.schedules.trigger("s")
    wait_until(lambda: durable.count_workflows("search.from = 'definition'") == 2)


@pytest.mark.administrator
def test_pruned_runs_leave_nothing(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @dramatiq.actor(queue_name="later")
    def listener(payload: Any) -> None: ...

    @durable.workflow(queue_name="now")
    async def f(topic: str) -> None:
        await durable.upsert_search({"a": 1})
        await durable.emit(topic, 1)
        await durable.emit(topic, 2)

    durable.subscribe("t")(listener)
    worker = dramatiq.Worker(broker, queues={"now", "later"}, worker_timeout=50)
    worker.start()
    worker.stop()
    only_runs = dramatiq.Worker(broker, queues={"now"}, worker_timeout=50)
    only_runs.start()
    try:
        for topic in ("t", "other"):
            f.start(topic).result(timeout=10)
    finally:
        only_runs.stop()
    with looking(broker) as conn:
        prune = "SELECT sum(runs) FROM durable.prune_runs(now() + interval '1 minute', NULL, NULL, 100)"
        assert conn.execute(prune).fetchone() == (1,), "the other one's events are still to be given"
        assert conn.execute("SELECT count(*) FROM durable.run_state").fetchone() == (1,)
        facts = conn.execute("SELECT payload FROM durable.message WHERE kind = 'p'").fetchone()
        assert facts is not None
        assert json.loads(facts[0].split(b"\n")[2]) == 1


def test_a_query_changes_nothing_of_it(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    @durable.workflow
    async def f() -> Any:
        e = durable.entity()
        await e.set({"n": 1})

        @durable.on_query("look")
        def look() -> Any:
            return durable.info().search, durable.info().workflow_id

        @durable.on_query("meddle")
        def meddle(what: str) -> None:
            calls: dict[str, Callable[[], Any]] = {
                "entity": lambda: e.increment("n"),
                "search": lambda: durable.upsert_search({"a": 1}),
                "emit": lambda: durable.emit("t"),
                "output": lambda: durable.output(1),
            }
            calls[what]()

        await durable.wait_for_signal("end")
        return [await e.get(), durable.info().search]

    start_worker()
    handle = f.options(workflow_id="q", search={"b": 2}).start()
    assert handle.query("look") == [{"b": 2}, "q"]
    for what in ("entity", "search", "emit", "output"):
        with pytest.raises(durable.DurableError):
            handle.query("meddle", what)
    handle.signal("end")
    assert handle.result(timeout=10) == [{"n": 1}, {"b": 2}]
    assert list(handle.follow()) == []
