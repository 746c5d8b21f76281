"""Handlers, updates, queries and signals between runs, without a database: what the engine alone decides."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from test_engine_support import Run, echo, ship

import dramatiq_durable as durable
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.converter import encode, encode_call, loads
from dramatiq_durable.workflow.events import Event


def update(run: Run, name: str, *args: Any, id: str = "u", more: bool = False) -> dict[str, Any] | None:
    """Give a run an update as the runner does; answers why it was rejected."""
    asked = Event(0, events.UPDATE_REQUESTED, run.now, None, name, encode_call(args, {}), {"update_id": id})
    refusal = run.execution.handlers.refusal(asked)
    if refusal is None:
        run.now += 1
        step = run.execution.step(asked._replace(type=events.UPDATE_ACCEPTED, at=run.now), more)
        run.history += step.events
        run.commands += step.commands
        run.last = step.commands
    return refusal


def outcomes(run: Run) -> dict[str, Any]:
    """The updates that were answered: results, or the types of failures."""
    found = {}
    for event in run.history:
        if event.type == events.UPDATE_COMPLETED:
            facts = event.attributes or {}
            failure = facts.get("failure")
            value = None if event.payload is None else loads(event.payload)
            found[facts["update_id"]] = failure["type"] if failure else value
    return found


def ask(run: Run, name: str, *args: Any) -> Any:
    answer, failure = run.execution.handlers.query(name, encode_call(args, {}))
    if failure is not None:
        raise durable.QueryFailed(failure["message"], type=failure["type"])
    return None if answer is None else loads(answer)


def replays_everywhere(run: Run) -> None:
    """A run that is dropped after any step and brought back goes on as if nothing had been."""
    ends = [n for n, e in enumerate(run.history) if n and e.type in events.INPUT_TYPES]
    for end in (*ends, len(run.history)):
        again = run.fresh()
        again.replay(run.history[:end])
        again.replay(run.history[end:])
        assert again.closed == run.execution.closed
        again.evict()


async def handled() -> list[Any]:
    got: list[Any] = []

    @durable.on_signal("plain")
    def plain(value: UUID | None) -> None:
        got.append(["plain", str(value)])

    at_once = len(got)

    @durable.on_signal("slow")
    async def slow(value: int) -> None:
        got.append(["begun", value])
        got.append(["echoed", await echo.execute(value)])

    @durable.on_signal("bare")
    def bare() -> None:
        got.append("bare")

    last = await durable.wait_for_signal("end")
    await durable.wait_condition(durable.all_handlers_finished)
    return [at_once, got, last]


def test_handlers_get_what_came_before_and_what_comes() -> None:
    run = Run(handled, start=False)
    run.send(events.WORKFLOW_STARTED, payload=encode_call((), {}))
    one = UUID(int=1)
    for name, value in [("plain", one), ("slow", 5), ("bare", None), ("plain", None)]:
        run.signal(name, value)
    run.signal("end", "bye")
    assert not run.execution.closed
    run.finish()
    got = [["plain", str(one)], ["begun", 5], "bare", ["plain", "None"], ["echoed", 5]]
    assert run.result == [0, got, "bye"]
    replays_everywhere(run)


def test_buffered_signals_are_given_at_registration_in_order() -> None:
    async def late() -> list[Any]:
        await durable.sleep(1)
        got: list[int] = []
        durable.on_signal("n")(got.append)
        at_once = list(got)

        async def again(n: int) -> None:
            got.append(-n)

        first = await durable.wait_for_signal("m")
        durable.on_signal("m")(again)
        assert durable.all_handlers_finished() is False
        return [at_once, first]

    run = Run(late)
    for n in range(3):
        run.signal("n", n)
        run.signal("m", n)
    run.fire(1)
    assert run.result == [[0, 1, 2], 0]
    replays_everywhere(run)


def test_a_handler_has_precedence_and_the_later_one_counts() -> None:
    async def both() -> list[Any]:
        got: list[Any] = []
        waiting = asyncio.create_task(durable.wait_for_signal("s"))
        await asyncio.sleep(0)
        durable.on_signal("s")(lambda value: got.append(["first", value]))
        await durable.wait_for_signal("go")
        durable.on_signal("s")(lambda value: got.append(["second", value]))
        await durable.wait_for_signal("go")
        assert not waiting.done()
        return got

    run = Run(both)
    run.signal("s", 1)
    run.signal("go")
    run.signal("s", 2)
    run.signal("go")
    assert run.result == [["first", 1], ["second", 2]]
    replays_everywhere(run)


def test_signals_typed_and_iterated() -> None:
    async def typed() -> list[Any]:
        got: list[Any] = [await durable.wait_for_signal("id", timeout=5, type=UUID)]
        async for id in durable.signals("id", type=UUID | None):
            if id is None:
                break
            got.append(id)
        return [[type(x).__name__ for x in got], got]

    run = Run(typed)
    for n in range(3):
        run.signal("id", UUID(int=n))
    run.send(events.SIGNAL_RECEIVED, name="id")
    assert run.result[0] == ["UUID"] * 3
    replays_everywhere(run)


def test_a_payload_that_does_not_fit_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def picky() -> list[str]:
        got: list[UUID] = []
        durable.on_signal("id")(lambda: None)

        @durable.on_signal("id")
        def id(value: UUID) -> None:
            got.append(value)

        await durable.wait_condition(lambda: got)
        return [str(x) for x in got]

    run = Run(picky)
    run.signal("id", "no uuid")
    assert "a signal 'id' is dropped" in caplog.text
    run.signal("id", UUID(int=7))
    assert run.result == [str(UUID(int=7))]
    caplog.clear()
    run.replayed()
    assert not caplog.text


def test_what_escapes_a_signals_handler_fails_the_run() -> None:
    async def fragile() -> None:
        @durable.on_signal("plain")
        def plain(value: str) -> None:
            raise ValueError(value)

        @durable.on_signal("slow")
        async def slow(value: str) -> None:
            await echo.execute(value)
            raise LookupError(value)

        await durable.wait_for_signal("never")

    run = Run(fragile)
    run.signal("plain", "a")
    assert (run.failure["type"], run.failure["message"]) == ("ValueError", "a")
    replays_everywhere(run)
    run = Run(fragile)
    run.signal("slow", "b")
    run.complete(1, "b")
    assert run.failure["type"] == "LookupError"
    replays_everywhere(run)


# --- updates ---------------------------------------------------------------------------------------------


async def account() -> int:
    balance = 0
    closed = asyncio.Event()

    def enough(amount: int) -> None:
        if amount > balance:
            raise ValueError(f"only {balance} left")

    @durable.on_update("deposit")
    async def deposit(amount: int) -> int:
        nonlocal balance
        amount = await echo.execute(amount)
        balance += amount
        return balance

    @durable.on_update("withdraw", validator=enough)
    def withdraw(amount: int) -> int:
        nonlocal balance
        balance -= amount
        return balance

    @durable.on_update("close")
    def close() -> str:
        closed.set()
        return "closed"

    @durable.on_query("balance")
    def show() -> int:
        return balance

    await closed.wait()
    return balance


def test_updates_are_answered_and_replayed() -> None:
    run = Run(account)
    assert update(run, "deposit", 100, id="d") is None
    assert outcomes(run) == {}
    rejected = update(run, "withdraw", 30, id="w0")
    assert rejected is not None
    assert (rejected["type"], rejected["message"]) == ("ValueError", "only 0 left")
    run.complete(1, 100)
    update(run, "withdraw", 30, id="w1")
    assert ask(run, "balance") == 70
    assert outcomes(run) == {"d": 100, "w1": 70}
    update(run, "close", id="c")
    assert outcomes(run)["c"] == "closed"
    assert run.result == 70
    assert [e.type for e in run.history[-3:]] == ["UpdateAccepted", "UpdateCompleted", "WorkflowCompleted"]
    replays_everywhere(run)


def test_updates_that_the_code_does_not_take_leave_it_as_it_is() -> None:
    run = Run(account)
    length = len(run.history)
    unknown = update(run, "depositt", 1)
    assert unknown is not None
    assert "it has: 'close', 'deposit', 'withdraw'" in unknown["message"]
    for args in [(), (1, 2)]:
        refused = update(run, "deposit", *args)
        assert refused is not None
        assert refused["type"] == "TypeError"
    assert len(run.history) == length
    assert not run.execution.tainted


def test_handlers_that_raise_and_results_that_cannot_be_carried() -> None:
    async def awkward() -> None:
        @durable.on_update("raise")
        async def fail() -> None:
            raise KeyError("no")

        @durable.on_update("object")
        def give() -> Any:
            return object()

        @durable.on_update("cancelled")
        async def cancelled() -> None:
            task = asyncio.create_task(asyncio.sleep(100))
            await asyncio.sleep(0)
            task.cancel()
            await task

        await durable.wait_for_signal("never")

    run = Run(awkward)
    for name in ("raise", "object", "cancelled"):
        update(run, name, id=name)
    assert outcomes(run) == {"raise": "KeyError", "object": "NotEncodable", "cancelled": "CancelledError"}
    assert not run.execution.closed
    replays_everywhere(run)


def test_validators_only_look() -> None:
    async def strict() -> None:
        def meddle() -> None:
            echo.execute(1)

        durable.on_update("u", validator=meddle)(lambda: None)
        await durable.wait_for_signal("never")

    run = Run(strict)
    refused = update(run, "u")
    assert refused is not None
    assert refused["type"] == "ForbiddenInWorkflow"
    assert "the validator of the update 'u' only looks" in refused["message"]
    assert [e.type for e in run.history] == ["WorkflowStarted"]


def test_code_that_has_ended_is_given_what_came_with_it() -> None:
    async def quick() -> int:
        count = 0

        @durable.on_update("add")
        async def add(n: int) -> int:
            nonlocal count
            count += n
            return count

        return count

    run = Run(quick, start=False)
    start = run.execution.step(Event(0, events.WORKFLOW_STARTED, run.now, payload=encode_call((), {})), True)
    run.history += start.events
    assert start.commands == []
    update(run, "add", 2, id="a", more=True)
    assert not run.execution.closed
    update(run, "add", 3, id="b")
    assert run.execution.closed
    assert outcomes(run) == {"a": 2, "b": 5}
    assert run.result == 0
    assert run.replayed().closed

    # The one that was to come was rejected: the run closes with the step before.
    run = Run(quick, start=False)
    run.history += run.execution.step(
        Event(0, events.WORKFLOW_STARTED, run.now, payload=encode_call((), {})), True
    ).events
    assert update(run, "subtract", 1) is not None
    late = run.execution.close_late()
    assert [e.type for e in late.events] == ["WorkflowCompleted"]
    assert late.events[0].event_id == 2
    run.history += late.events
    assert run.execution.close_late() == ([], [])
    assert run.replayed().closed


def test_handlers_that_are_at_work_when_the_code_ends() -> None:
    async def hasty() -> None:
        @durable.on_update("u")
        async def forever() -> None:
            await durable.wait_for_signal("never")

        @durable.on_signal("s")
        async def too() -> None:
            await asyncio.sleep(10)

        await durable.wait_for_signal("end")

    run = Run(hasty)
    update(run, "u", id="1")
    run.signal("s")
    run.signal("end")
    assert run.execution.handlers.unfinished == ["the update 'u' (1)", "the signal 's'"]
    assert outcomes(run) == {}
    replays_everywhere(run)


def test_a_run_without_its_handler_is_nondeterministic() -> None:
    run = Run(account)
    update(run, "deposit", 1)

    async def changed() -> None:
        await asyncio.Event().wait()

    with pytest.raises(durable.Nondeterminism, match=r"UpdateAccepted 'deposit'.*no such update"):
        run.replayed(changed)

    async def other() -> None:
        @durable.on_update("deposit")
        async def deposit(amount: int) -> int:
            return amount

        await asyncio.Event().wait()

    with pytest.raises(durable.Nondeterminism):
        run.replayed(other)


# --- queries ---------------------------------------------------------------------------------------------


def test_queries_answer_and_list_what_there_is() -> None:
    run = Run(account)
    length = len(run.history)
    assert ask(run, "balance") == 0
    with pytest.raises(durable.QueryFailed, match="no handler for the query 'x'; it has: 'balance'"):
        ask(run, "x")
    with pytest.raises(durable.QueryFailed, match="too many positional arguments"):
        ask(run, "balance", 1)
    assert "await closed.wait()" in ask(run, "__stack")
    assert len(run.history) == length
    assert not run.execution.tainted


def test_a_query_that_meddles_is_found_out_even_if_it_hides_it() -> None:
    async def sly() -> None:
        @durable.on_query("sly")
        def meddle() -> str:
            try:
                ship.start("x")
            except durable.DurableError:
                return "hidden"
            return "done"

        await durable.wait_for_signal("never")

    run = Run(sly)
    assert ask(run, "sly") == "hidden"
    assert run.execution.tainted
    assert [e.type for e in run.history] == ["WorkflowStarted"]


def test_what_ended_can_be_asked_when_it_is_kept() -> None:
    run = Run(account)
    update(run, "deposit", 5)
    run.complete(1, 5)
    update(run, "close", id="c")
    kept = type(run.execution)(account, run.info, keep=True)
    kept.replay(run.history)
    assert kept.closed
    assert kept.handlers.query("balance", encode_call((), {})) == (encode(5), None)
    kept.evict()
    assert kept.handlers.query("balance", encode_call((), {}))[0] is None


def test_names_and_functions_are_checked_where_they_are_given() -> None:
    async def wrong() -> list[str]:
        async def waits() -> None:
            pass

        caught = []
        attempts = [
            lambda: durable.on_signal(""),
            lambda: durable.on_signal(lambda: None),  # type: ignore[arg-type]
            lambda: durable.on_query("q")(waits),
            lambda: durable.on_update("u", validator=waits),
            lambda: durable.wait_for_signal("x" * 201),
            lambda: durable.signals("\0"),
            lambda: durable.signal_workflow("", "x"),
            lambda: durable.signal_workflow("w", "x", object()),
            lambda: durable.cancel_workflow(""),
            lambda: ship.options(with_signal=("a", 1)).start("x"),
        ]
        for attempt in attempts:
            try:
                attempt()
            except Exception as e:
                caught.append(type(e).__name__)
        return caught

    assert Run(wrong).result == [
        "InvalidName",
        "InvalidDefinition",
        "InvalidDefinition",
        "InvalidDefinition",
        "InvalidName",
        "InvalidName",
        "InvalidName",
        "NotEncodable",
        "InvalidName",
        "ValueError",
    ]
    for call in (durable.on_signal, durable.on_query, durable.on_update, durable.signals):
        with pytest.raises(durable.NotInWorkflow):
            call("x")


# --- to others -------------------------------------------------------------------------------------------


def test_messages_to_other_runs() -> None:
    async def speaks() -> list[Any]:
        heard = []
        child = ship.start("o-1")
        calls = [durable.signal_workflow("w", "hello", 1), child.signal("go"), durable.cancel_workflow("v")]
        for call in calls:
            try:
                heard.append(await call)
            except (durable.WorkflowClosed, durable.WorkflowNotFound) as e:
                heard.append(type(e).__name__)
        return heard

    run = Run(speaks)
    assert [(c.event_type, c.seq, c.name) for c in run.last] == [
        ("ChildStarted", 1, "ship"),
        ("SignalSent", 2, "hello"),
        ("SignalSent", 3, "go"),
        ("CancelSent", 4, None),
    ]
    child, _, to_child, cancel = run.last
    assert (to_child.attributes() or {})["child"] == child.seq
    assert (cancel.attributes() or {})["workflow_id"] == "v"
    run.send(events.MESSAGE_FAILED, 3, attributes={"reason": "closed"})
    run.send(events.MESSAGE_DELIVERED, 2)
    run.send(events.MESSAGE_FAILED, 4, attributes={"reason": "missing"})
    assert run.result == [None, "WorkflowClosed", "WorkflowNotFound"]
    replays_everywhere(run)
    changed = [
        e._replace(attributes={**(e.attributes or {}), "hash": "0" * 16}) if e.seq == 2 else e for e in run.history
    ]
    with pytest.raises(durable.Nondeterminism):
        run.fresh().replay(changed)


def test_unread_signals_are_known() -> None:
    async def reads() -> None:
        first = asyncio.create_task(durable.wait_for_signal("a"))
        await durable.wait_for_signal("b")
        first.cancel()
        await durable.sleep(100)

    run = Run(reads)
    run.signal("c", 1)
    run.signal("a", 2)
    run.signal("a", 3)
    run.signal("b", 4)
    run.signal("c", 5)
    kept = [e for e in run.history if e.event_id in run.execution.mailbox.unread()]
    assert [(e.name, loads(e.payload or b"")) for e in kept] == [("c", 1), ("a", 3), ("c", 5)]


def test_a_handler_that_is_about_to_begin_has_not_finished() -> None:
    """What came together with the signal that wakes the code is handled before the code goes on without it."""

    async def collect(seen: list[Any]) -> None:
        durable.on_signal("also")(seen.append)
        seen.append(await durable.wait_for_signal("n"))
        await durable.wait_condition(durable.all_handlers_finished)
        durable.continue_as_new(seen)

    run = Run(collect, [])
    run.send(events.SIGNAL_RECEIVED, name="n", payload=b"1", attributes={"with_next": True})
    run.signal("also", 2)
    (command,) = run.last
    assert command.payload is not None
    assert loads(command.payload)["args"] == [[1, 2]]
    run.replayed()
