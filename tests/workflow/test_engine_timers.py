"""Which timers fire together, and when they are due."""

from __future__ import annotations

import asyncio

from test_engine_support import Run

import dramatiq_durable as durable
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.events import Event


async def several() -> None:
    async def ask() -> None:
        await durable.escalate(role="people", timeout=0.02)

    left = asyncio.ensure_future(durable.sleep(0.01))
    tasks = [asyncio.ensure_future(durable.sleep(ms / 1000)) for ms in (40, 20, 30, 20)]
    for task in [*tasks, asyncio.ensure_future(ask())]:
        task.add_done_callback(lambda _: None)
    left.cancel()
    await durable.wait_for_signal("go")
    await durable.sleep(0.005)


def test_timers_fire_with_those_that_are_due_before_them() -> None:
    run = Run(several)
    numbers = {c.seq: getattr(c, "ms", None) for c in run.commands}
    assert list(numbers.values()) == [40, 20, 30, 20, 20]
    a, b, c, d, e = numbers
    for execution in (run.execution, run.replayed()):
        assert execution.timers_until(b) == [b]
        assert execution.timers_until(d) == [b, d]
        assert execution.timers_until(a) == [b, d, e, c, a]
    run.fire(b)
    run.signal("go")
    (late,) = (command.seq for command in run.last)
    for execution in (run.execution, run.replayed()):
        assert execution.timers_until(c) == [late, d, e, c]
        assert execution.timers_until(a) == [late, d, e, c, a]


def test_a_step_that_waited_starts_its_timers_when_it_is_taken() -> None:
    run = Run(several)
    step = run.execution.step(Event(0, events.SIGNAL_RECEIVED, run.now, None, "go", b"1"), now=run.now + 1000)
    run.history += step.events
    assert [e.at - run.now for e in step.events] == [0, 1000]
    late = step.commands[0].seq
    assert late is not None
    for execution in (run.execution, run.replayed()):
        assert execution.timers_until(late)[-1] == late
        assert len(execution.timers_until(late)) == 6
    # History's clock goes on from there, whatever the next one's clock says.
    run.send(events.TIMER_FIRED, late)
    assert sorted(e.at for e in run.history) == [e.at for e in run.history]
