"""Where parts of a run's life meet: resets, ends, continue-as-new, messages and children."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer
from tests.support import wait_until
from tests.support.scoped import looking

StartWorker = Callable[..., dramatiq.Worker]


def types(handle: durable.WorkflowHandle[Any]) -> list[str]:
    return [e.type for e in handle.history()]


def event(handle: durable.WorkflowHandle[Any], type: str, nth: int = 0) -> int:
    return [e.event_id for e in handle.history() if e.type == type][nth]


@pytest.mark.parametrize("how", ["signal", "cancel"])
def test_the_last_step_reaches_the_run_that_it_follows(
    broker: durable.DurableBroker, start_worker: StartWorker, how: str
) -> None:
    """A signal is sent, and a cancel, with the step that ends the run, too."""

    @durable.workflow
    async def shared() -> Any:
        return await durable.wait_for_signal("go", timeout=60)

    @durable.workflow
    async def parent() -> str:
        child = shared.options(workflow_id="shared", id_conflict="use_existing", cancellation="try").start()
        await child.started()
        await durable.wait_for_signal("end")
        if how == "signal":
            child.signal("go", "last words")
        else:
            child.cancel()
        return "ended"

    start_worker()
    other = shared.options(workflow_id="shared").start()
    handle = parent.start()
    wait_until(lambda: "ChildStartConfirmed" in types(handle))
    handle.signal("end")
    assert handle.result(timeout=10) == "ended"
    if how == "signal":
        assert other.result(timeout=10) == "last words"
    else:
        with pytest.raises(durable.WorkflowCancelled):
            other.result(timeout=10)
    with looking(broker) as conn:
        assert conn.execute("SELECT count(*) FROM durable.follower").fetchone() == (0,)


def test_a_live_run_makes_way_whatever_the_closed_ones_say(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """id_reuse is about ids that only closed runs have."""

    @durable.workflow
    async def waiting(turn: int = 0) -> Any:
        if turn == 1:
            durable.continue_as_new(2)
        return [turn, await durable.wait_for_signal("go", timeout=60)]

    start_worker()
    first = waiting.options(workflow_id="w").start()
    second = waiting.options(workflow_id="w", id_conflict="terminate_existing", id_reuse="reject").start(1)
    assert first.status() == "terminated"
    wait_until(lambda: second.status() == "continued_as_new")
    live = durable.get_handle("w").describe().run_id
    same = waiting.options(workflow_id="w", id_conflict="use_existing", id_reuse="reject").start(9)
    assert same.run_id == live
    with pytest.raises(durable.WorkflowAlreadyStarted):
        waiting.options(workflow_id="w", id_reuse="reject").start(9)
    third = waiting.options(workflow_id="w", id_conflict="terminate_existing", id_reuse="reject").start(3)
    third.signal("go", "x")
    assert third.result(timeout=10) == [3, "x"]
    with pytest.raises(durable.WorkflowAlreadyStarted):
        waiting.options(workflow_id="w", id_conflict="terminate_existing", id_reuse="reject").start(4)
    with pytest.raises(durable.WorkflowAlreadyStarted):
        waiting.options(workflow_id="w", id_conflict="use_existing", id_reuse="allow_failed").start(4)


def test_a_reset_at_a_message_that_came_when_the_code_had_ended(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """It is given the message again, before it ends: what ended the code was its first step, or a step before."""

    @durable.workflow
    async def work(waits: bool) -> list[Any]:
        seen: list[Any] = []

        @durable.on_update("enter")
        def enter(what: str) -> int:
            seen.append(what)
            return len(seen)

        durable.on_signal("note")(seen.append)
        if waits:
            await durable.wait_for_signal("go")
        return seen

    at_once = work.options(with_signal=("note", "n")).start(False)
    updated = work.options(with_update=("enter", "u")).start(False)
    both = work.options(with_signal=("go", None)).start(True)
    both.signal("note", "with it")
    # Its code ends with one signal, and an update comes with it.
    later = work.options(with_signal=("go", None)).start(True)
    asking = threading.Thread(target=lambda: later.update("enter", "late", wait="accepted", timeout=20))
    asking.start()
    wait_until(lambda: _waits(broker, "UpdateRequested") == 2)
    start_worker()
    asking.join()
    assert at_once.result(timeout=10) == ["n"]
    assert updated.result(timeout=10) == ["u"]
    assert both.result(timeout=10) == ["with it"]
    assert later.result(timeout=10) == ["late"]
    assert types(later) == [
        "WorkflowStarted", "SignalReceived", "UpdateAccepted", "UpdateCompleted", "WorkflowCompleted"
    ]  # fmt: skip
    for handle, type, result in (
        (at_once, "SignalReceived", ["n"]),
        (updated, "UpdateAccepted", ["u"]),
        (later, "UpdateAccepted", ["late"]),
        (both, "SignalReceived", ["with it"]),
    ):
        again = handle.reset(event(handle, type, -1))
        assert again.result(timeout=10) == result
        assert types(again)[-1] == "WorkflowCompleted"
        # It is so for a worker that loads it, too, and after another reset.
        broker.runner.cache.clear()
        third = again.reset(event(again, type, -1))
        assert third.result(timeout=10) == result
        Replayer([work]).replay(third.export())


def _waits(broker: durable.DurableBroker, type: str) -> int:
    with looking(broker) as conn:
        row = conn.execute("SELECT count(*) FROM durable.inbox WHERE type = %s", [type]).fetchone()
    return int(row[0]) if row else 0


def _recorded(broker: durable.DurableBroker) -> dict[str, int]:
    with broker.database.connection() as conn:
        rows = conn.execute("SELECT type, count(*) FROM durable.event WHERE name IS NOT NULL GROUP BY 1").fetchall()
    return {str(type): int(count) for type, count in rows}


def test_a_reset_of_an_earlier_run_gives_what_its_followers_were_sent(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """Signals that came after the event come again, also those that the runs after it took; each once."""

    @durable.workflow
    async def collect(seen: list[Any], rounds: int) -> list[Any]:
        await durable.wait_for_signal("turn")
        if rounds < 2:
            durable.continue_as_new(seen, rounds + 1)
        while True:
            seen = [*seen, await durable.wait_for_signal("n")]
            if seen[-1] == "end":
                return seen

    worker = start_worker()
    handle = collect.options(workflow_id="c").start([], 0)
    runs = [handle]
    for n in range(3):
        durable.get_handle("c").signal("n", n)  # unread, so far
        wait_until(lambda n=n: types(durable.get_handle("c")).count("SignalReceived") == n + 1)
        if n < 2:
            durable.get_handle("c").signal("turn")
            wait_until(lambda: durable.get_handle("c").describe().run_id != runs[-1].run_id)
            run_id = durable.get_handle("c").describe().run_id
            runs.append(durable.get_handle(run_id=run_id))
            wait_until(lambda n=n: types(runs[-1]).count("SignalReceived") == n + 1)
    worker.stop()
    durable.get_handle("c").signal("n", 3)  # its run has not been given it
    again = handle.reset(1)
    # "turn" was said twice: the third run of its own waits for it.
    durable.get_handle("c").signal("turn")
    durable.get_handle("c").signal("n", "end")
    start_worker()
    assert again.result(timeout=10) == [0, 1, 2, 3, "end"]
    assert handle.result(timeout=10) == [0, 1, 2, 3, "end"]


def test_a_reset_of_an_earlier_attempt_keeps_what_the_next_one_was_to_be_given(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    broken = True

    @durable.workflow
    async def work() -> list[Any]:
        seen: list[Any] = []

        @durable.on_update("add")
        def add(n: int) -> int:
            seen.append(n)
            return len(seen)

        durable.on_signal("n")(seen.append)
        await durable.wait_for_signal("go")
        if broken:
            raise ValueError("a bug")
        await durable.wait_condition(lambda: len(seen) >= 4)
        return seen

    start_worker()
    handle = work.options(workflow_id="w", retry=durable.RetryPolicy(initial_interval=3600)).start()
    handle.signal("n", 1)
    handle.signal("go")
    wait_until(lambda: handle.status() == "failed")
    by_id = durable.get_handle("w")
    handle.signal("n", 2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(handle.update, "add", 3, timeout=20)
        wait_until(lambda: _waits(broker, "UpdateRequested") == 1)
        handle.signal("n", 4)
        broken = False
        again = handle.reset(event(handle, "SignalReceived", 1))
        assert answer.result() == 3
    assert again.result(timeout=10) == [1, 2, 3, 4]
    assert by_id.describe().run_id == again.run_id


def test_the_step_of_the_event_comes_first_after_a_reset(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """Before the signals that came later, and before the ends of children."""

    @durable.activity
    def nothing() -> None: ...

    @durable.workflow
    async def kid() -> None:
        await durable.wait_for_signal("go")

    @durable.workflow
    async def parent() -> list[str]:
        order: list[str] = []
        durable.on_signal("note")(order.append)
        child = kid.options(workflow_id="kid").start()
        child.add_done_callback(lambda _: order.append("child"))
        await nothing.execute()
        order.append("activity")
        await durable.wait_condition(lambda: len(order) >= 3)
        return order

    start_worker()
    handle = parent.start()
    wait_until(lambda: "ActivityCompleted" in types(handle))
    handle.signal("note", "note")
    wait_until(lambda: "SignalReceived" in types(handle))
    durable.get_handle("kid").signal("go")
    assert handle.result(timeout=10) == ["activity", "note", "child"]
    again = handle.reset(event(handle, "ActivityCompleted"))
    assert again.result(timeout=10) == ["activity", "note", "child"]


def test_an_update_that_ended_with_its_run_is_not_the_next_ones(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """It was never given to the code: a reset does not bring it back, and whoever asks for it is told so at once."""

    @durable.workflow
    async def work() -> None:
        durable.on_update("u")(lambda: None)
        await durable.wait_for_signal("end")

    worker = start_worker()
    handle = work.start()
    wait_until(lambda: handle.describe().history_length == 1 and _waits(broker, "WorkflowStarted") == 0)
    worker.stop()
    with pytest.raises(durable.Timeout):
        handle.update("u", update_id="u", timeout=0.2)
    handle.terminate()
    again = handle.reset(1)
    with pytest.raises(durable.WorkflowClosed):
        again.get_update("u").result(timeout=5)
    start_worker()
    assert again.update("u", timeout=10) is None


def test_a_child_that_a_reset_starts_again_has_its_own_id(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    @durable.workflow
    async def kid() -> Any:
        return await durable.wait_for_signal("go")

    @durable.workflow
    async def parent() -> Any:
        child = kid.options(workflow_id="kid", id_reuse="reject").start()
        await durable.wait_for_signal("first")
        return await child

    start_worker()
    handle = parent.start()
    handle.signal("first")
    wait_until(lambda: "SignalReceived" in types(handle) and len(handle.children()) == 1)
    handle.terminate()
    again = handle.reset(event(handle, "SignalReceived"))
    wait_until(lambda: durable.get_handle("kid").status() == "running")
    durable.get_handle("kid").signal("go", "late")
    assert again.result(timeout=10) == "late"


def test_what_no_handler_has_begun_with_goes_to_the_next_run(
    broker: durable.DurableBroker, start_worker: StartWorker
) -> None:
    """The signal that ends the code comes together with what its handlers are for."""

    @durable.workflow
    async def work(seen: list[Any], rounds: int) -> list[Any]:
        durable.on_signal("also")(seen.append)

        @durable.on_signal("later")
        async def later(what: Any) -> None:
            seen.append(what)

        @durable.on_update("enter")
        def enter(what: Any) -> list[int]:
            seen.append(what)
            return [rounds, len(seen)]

        await durable.wait_for_signal("go")
        if rounds == 0:
            durable.continue_as_new([*seen], 1)
        if durable.info().attempt == 1:
            raise ValueError("again")
        await durable.wait_condition(lambda: len(seen) >= 1)
        return seen

    worker = start_worker()
    options = {"workflow_id": "w", "retry": durable.RetryPolicy(initial_interval=0.01, maximum_attempts=2)}
    handle = work.options(**options).start([], 0)
    wait_until(lambda: handle.describe().history_length == 1 and _waits(broker, "WorkflowStarted") == 0)
    worker.stop()
    for name, value in (("go", None), ("also", 1), ("later", 2)):
        durable.get_handle("w").signal(name, value)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(handle.update, "enter", 3, update_id="e", timeout=20)
        wait_until(lambda: _waits(broker, "UpdateRequested") == 1)
        # The first one ends its run, and the attempt after that.
        for value in ("go", "go", "also"):
            durable.get_handle("w").signal(value, 4)
        start_worker()
        assert answer.result() == [1, 3]
    assert handle.result(timeout=10) == [4]
    # All of it is given to a run that is taken up again, each once; the update keeps its answer.
    given = _recorded(broker)
    again = handle.reset(1)
    assert again.result(timeout=10) == [4]
    assert {type: 2 * n for type, n in given.items()} == _recorded(broker)
    assert again.get_update("e").result(timeout=10) == [1, 3]
    Replayer([work]).replay(handle.export())


def test_a_childs_parent_is_the_run_that_started_it(broker: durable.DurableBroker, start_worker: StartWorker) -> None:
    """Also after that was reset: a child that passes it on replays."""

    @durable.activity
    def note(run_id: str) -> str:
        return run_id

    @durable.workflow
    async def kid(rounds: int) -> list[str]:
        def parent() -> str:
            found = durable.info().parent
            assert found is not None
            return f"{found.workflow_id} {found.run_id}"

        before = await note.execute(parent())
        await durable.wait_for_signal("go")
        if rounds == 0:
            durable.continue_as_new(1)
        return [before, await note.execute(parent())]

    @durable.workflow
    async def parent() -> Any:
        child = kid.options(workflow_id="kid").start(0)
        await durable.wait_for_signal("first")
        return await child

    start_worker()
    handle = parent.options(workflow_id="parent").start()
    handle.signal("first")
    wait_until(lambda: "SignalReceived" in types(handle) and len(handle.children()) == 1)
    child = durable.get_handle("kid")
    wait_until(lambda: "ActivityCompleted" in types(child))
    first = child.describe().run_id
    again = handle.reset(event(handle, "SignalReceived"))
    broker.runner.cache.clear()
    child.signal("go")
    wait_until(lambda: child.describe().run_id != first and "ActivityCompleted" in types(child))
    broker.runner.cache.clear()
    child.signal("go")
    assert again.result(timeout=10) == [f"parent {handle.run_id}"] * 2
    described = durable.get_handle("kid").describe().parent
    assert described is not None
    assert described.run_id == again.run_id
