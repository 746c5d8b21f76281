"""Escalations as the engine sees them: what the code asks for, and what it gets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_engine_support import Run, echo

import dramatiq_durable as durable
from dramatiq_durable import errors
from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.converter import encode


async def ask(timeout: Any = None) -> Any:
    try:
        return await durable.escalate(
            role="clerk",
            subject="o-1",
            payload={"cents": 5},
            type="approval",
            priority=3,
            timeout=timeout,
            metadata={"region": "eu"},
        )
    except durable.Timeout as e:
        return f"late: {e}"
    except durable.EscalationCancelled as e:
        return f"cancelled: {e}"


def test_what_is_recorded() -> None:
    run = Run(ask, "2 days")
    (event,) = run.history[1:]
    assert (event.type, event.name, event.seq) == ("EscalationOpened", "clerk", 1)
    assert event.payload == b'{"cents":5}'
    facts = dict(event.attributes or {})
    assert len(facts.pop("hash")) == 16
    assert facts == {
        "subject": "o-1",
        "type": "approval",
        "priority": 3,
        "ms": 172_800_000,
        "metadata": {"region": "eu"},
    }


def test_it_is_resolved() -> None:
    run = Run(ask)
    run.send(events.ESCALATION_RESOLVED, 1, payload=encode({"ok": True}), attributes={"by": "ann"})
    assert run.result == {"ok": True}
    run.replayed()


def test_it_is_resolved_with_nothing() -> None:
    run = Run(ask)
    run.send(events.ESCALATION_RESOLVED, 1)
    assert run.result is None


def test_it_times_out() -> None:
    run = Run(ask, 1.5)
    assert run.execution.due(1) == events.ESCALATION_TIMED_OUT
    run.send(events.ESCALATION_TIMED_OUT, 1)
    assert run.result == "late: the escalation to 'clerk' (o-1) was not resolved within 1.5 s."
    run.replayed()


def test_it_is_cancelled_from_outside() -> None:
    run = Run(ask)
    run.send(events.ESCALATION_CANCELLED, 1)
    assert run.result == "cancelled: the escalation to 'clerk' (o-1) was cancelled."
    run.replayed()


def test_a_cancelled_wait_withdraws_it() -> None:
    async def hurry() -> str:
        try:
            async with asyncio.timeout(1):
                await durable.escalate(role="clerk")
        except TimeoutError:
            return "gave up"
        return "never"

    run = Run(hurry)
    assert run.execution.due(1) == events.TIMER_FIRED
    run.fire(1)
    assert [(c.event_type, c.seq) for c in run.last] == [
        ("EscalationWithdrawn", 2),
        ("WorkflowCompleted", None),
    ]
    run.replayed()
    # What comes too late is taken, and changes nothing.
    assert run.send(events.ESCALATION_RESOLVED, 2) == []


def test_what_is_withdrawn_in_the_same_step_was_never_asked() -> None:
    async def fickle() -> None:
        task = asyncio.create_task(durable.escalate(role="clerk"))  # type: ignore[arg-type]
        task.cancel()
        await echo.execute(1)

    run = Run(fickle)
    assert run.types == ["ActivityScheduled"]


def test_a_cancelled_run_withdraws_it() -> None:
    run = Run(ask)
    run.cancel()
    assert run.types == ["EscalationWithdrawn", "WorkflowCancelled"]
    run.replayed()


def test_several_at_once() -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(durable.escalate(role="a"), durable.escalate(role="b"))

    run = Run(both)
    run.send(events.ESCALATION_RESOLVED, 2, payload=encode("b"))
    run.send(events.ESCALATION_RESOLVED, 1, payload=encode("a"))
    assert run.result == ["a", "b"]
    run.replayed()


@pytest.mark.parametrize("changed", ["role", "subject", "type", "payload", "priority", "metadata"])
def test_another_question_is_another_command(changed: str) -> None:
    given: dict[str, Any] = {
        "role": "r", "subject": "s", "type": "t", "payload": 1, "priority": 1, "metadata": {"a": 1}
    }  # fmt: skip

    def asking(**facts: Any) -> Any:
        async def f() -> Any:
            return await durable.escalate(**facts)

        return f

    run = Run(asking(**given))
    other = {**given, changed: {"a": 2} if changed == "metadata" else 2 if changed in ("payload", "priority") else "x"}
    run.replayed(asking(**given))
    with pytest.raises(errors.Nondeterminism):
        run.replayed(asking(**other))


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"role": ""}, errors.InvalidName),
        ({"role": "x" * 201}, errors.InvalidName),
        ({"role": None}, errors.InvalidName),
        ({"role": "r", "type": "a\0b"}, errors.InvalidName),
        ({"role": "r", "subject": "x" * 1001}, errors.InvalidName),
        ({"role": "r", "subject": 7}, errors.InvalidName),
        ({"role": "r", "priority": "high"}, ValueError),
        ({"role": "r", "priority": True}, ValueError),
        ({"role": "r", "priority": 2**31}, ValueError),
        ({"role": "r", "timeout": -1}, ValueError),
        ({"role": "r", "timeout": "soon"}, ValueError),
        ({"role": "r", "payload": object()}, errors.NotEncodable),
        ({"role": "r", "metadata": [1]}, errors.NotEncodable),
        ({"role": "r", "metadata": {"a": "x\0y"}}, errors.NotEncodable),
        ({"role": "r", "metadata": {"a": "\ud800"}}, errors.NotEncodable),
        ({"role": "r", "metadata": {"a": float("nan")}}, errors.NotEncodable),
        ({"role": "r", "metadata": {"a": "x" * 1_048_577}}, errors.NotEncodable),
    ],
)
def test_bad_input_is_refused_at_the_call(facts: dict[str, Any], error: type[Exception]) -> None:
    async def f() -> str:
        try:
            durable.escalate(**facts)
        except Exception as e:
            return type(e).__name__
        return "taken"

    assert Run(f).result == error.__name__


def test_a_backslash_before_u0000_is_no_nul() -> None:
    async def f() -> Any:
        return await durable.escalate(role="r", metadata={"a": "\\u0000"})

    assert Run(f).types == ["EscalationOpened"]


def test_only_inside_a_workflow() -> None:
    with pytest.raises(durable.NotInWorkflow):
        durable.escalate(role="r")
