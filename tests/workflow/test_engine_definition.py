"""The decorators: names, options, registration, and what an activity is outside of workflows."""

from __future__ import annotations

import inspect
import sys
from datetime import timedelta
from typing import Any

import dramatiq
import pytest
from dramatiq import Actor
from dramatiq.brokers.stub import StubBroker

from dramatiq_durable import errors
from dramatiq_durable.durations import parse_duration
from dramatiq_durable.workflow.activities import Activity, activity, activity_stub
from dramatiq_durable.workflow.client import get_handle
from dramatiq_durable.workflow.definition import Workflow, workflow
from dramatiq_durable.workflow.retry import RetryPolicy
from tests.workflow.test_engine_support import Run, WorkflowBroker, charge, echo, ship


@pytest.fixture
def broker() -> Any:
    return WorkflowBroker(middleware=[dramatiq.middleware.Retries()])


def test_an_activity_is_an_actor(broker: Any) -> None:
    @activity(broker=broker, queue_name="q", max_retries=5, priority=3)
    def add(a: int, b: int = 1) -> int:
        """Adds."""
        return a + b

    assert isinstance(add, Activity)
    assert isinstance(add, Actor)
    assert add(1, b=2) == 3
    assert (add.actor_name, add.queue_name, add.priority, add.options) == ("add", "q", 3, {"max_retries": 5})
    assert add.options["max_retries"] == 5
    assert add.broker is broker
    assert add.__doc__ == "Adds."
    assert list(inspect.signature(add.fn).parameters) == ["a", "b"]
    assert broker.get_actor("add") is add.actor
    message = add.send(1, b=2)
    assert broker.queues["q"].qsize() == 1
    assert (message.args, message.kwargs) == ((1,), {"b": 2})
    assert add.message_with_options(args=(1,), max_retries=1).options["max_retries"] == 1
    broker.declare_queue("other")
    slow = add.options(delay=1000, max_retries=2, queue_name="other")
    sent = slow.send(1)
    assert (sent.queue_name[:5], sent.options["max_retries"]) == ("other", 2)
    assert add.send(1).queue_name == "q"


def test_an_existing_actor_is_adapted(broker: Any) -> None:
    @dramatiq.actor(broker=broker, queue_name="old")
    def legacy(x: int) -> int:
        return x

    adapted = activity(legacy)
    assert adapted.actor is legacy
    assert adapted(4) == 4
    assert activity(adapted) is adapted
    assert len(broker.actors) == 1

    async def wf() -> Any:
        return await adapted.execute(4)

    run = Run(wf)
    assert run.last[0].queue_name == "old"  # type: ignore[attr-defined]


def test_an_async_activity(broker: Any) -> None:
    @activity(broker=broker)
    async def fetch(x: int) -> tuple[int, ...]:
        return (x,)

    async def wf() -> Any:
        value = await fetch.execute(1)
        return [isinstance(value, tuple), value]

    run = Run(wf)
    run.complete(1, [1])
    assert run.result == [True, [1]]


def test_options_reach_the_command() -> None:
    async def wf() -> None:
        odd = charge.options(
            queue_name="other",
            max_retries=3,
            min_backoff=timedelta(seconds=1),
            time_limit=5000,
            priority=-1,
            delay=timedelta(seconds=2),
        )
        await odd.options(max_retries=0).execute("o", cents=5)

    command: Any = Run(wf).last[0]
    assert (command.queue_name, command.priority, command.delay_ms) == ("other", -1, 2000)
    assert command.options == {"max_retries": 0, "min_backoff": 1000, "time_limit": 5000}
    assert (command.args, command.kwargs) == (("o",), {"cents": 5})
    assert command.payload == b'{"args":["o"],"kwargs":{"cents":5}}'


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nonsense": 1}, TypeError),
        ({"retry": 3}, ValueError),
        ({"retry": RetryPolicy(), "max_retries": 3}, ValueError),
        ({"local": "yes"}, ValueError),
        ({"local": True, "heartbeat": 5}, ValueError),
        ({"start_to_close": 0}, ValueError),
        ({"start_to_close": "soon"}, ValueError),
        ({"heartbeat": -1}, ValueError),
        ({"cancellation": "never"}, ValueError),
        ({"max_retries": -1}, ValueError),
        ({"delay": "3 days"}, ValueError),
        ({"priority": "high"}, ValueError),
        ({"queue_name": "with space"}, errors.InvalidName),
    ],
)
def test_wrong_options_of_activities(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        echo.options(**options)
    with pytest.raises(error):
        activity_stub("remote").options(**options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nonsense": 1}, TypeError),
        ({"run_timeout": 0}, ValueError),
        ({"execution_timeout": "soon"}, ValueError),
        ({"retry": {"attempts": 1}}, ValueError),
        ({"cancellation": "maybe"}, ValueError),
        ({"workflow_id": ""}, errors.InvalidName),
        ({"workflow_id": "x" * 201}, errors.InvalidName),
        ({"workflow_id": "a\0"}, errors.InvalidName),
        ({"id_conflict": "maybe"}, ValueError),
        ({"id_reuse": "maybe"}, ValueError),
        ({"parent_close": "maybe"}, ValueError),
        ({"memo": [1]}, ValueError),
        ({"memo": {"a": object()}}, errors.NotEncodable),
        ({"delay": -1}, ValueError),
    ],
)
def test_wrong_options_of_workflows(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ship.options(**options)


def test_unknown_options_name_the_known_ones() -> None:
    with pytest.raises(TypeError, match="max_retries"):
        echo.options(max_retrys=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="workflow_id"):
        ship.options(id=1)  # type: ignore[call-arg]


def test_a_stub_has_no_code() -> None:
    remote = activity_stub("charge", queue_name="payments")

    async def wf() -> Any:
        return await remote.options(priority=2).execute("o", 1)

    run = Run(wf)
    assert (run.last[0].name, run.last[0].queue_name) == ("charge", "payments")  # type: ignore[attr-defined]
    run.complete(1, {"any": "json"})
    assert run.result == {"any": "json"}


def test_workflows_are_declared(broker: Any) -> None:
    declared: list[Any] = []
    broker.declare_workflow = declared.append

    @workflow(queue_name="orders", broker=broker, memo={"a": 1}, delay=timedelta(seconds=1))
    async def order(order_id: str) -> int:
        """Orders."""
        return len(order_id)

    assert isinstance(order, Workflow)
    assert declared == [order]
    assert (order.name, order.queue_name, order.__doc__) == ("order", "orders", "Orders.")
    assert (order.defaults.memo, order.defaults.delay_ms) == ({"a": 1}, 1000)
    copy = order.options(workflow_id="order-1", id_conflict="use_existing")
    assert (copy.defaults.workflow_id, copy.defaults.memo, order.defaults.workflow_id) == ("order-1", {"a": 1}, None)
    assert len(declared) == 1
    assert list(inspect.signature(order).parameters) == ["order_id"]


def test_no_broker_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fine() -> None: ...

    monkeypatch.setattr("dramatiq.broker.global_broker", None)
    # Dramatiq's own choices are not installed.
    monkeypatch.setitem(sys.modules, "dramatiq.brokers.rabbitmq", None)
    monkeypatch.setitem(sys.modules, "dramatiq.brokers.redis", None)
    for declare in (activity, workflow):
        with pytest.raises(errors.NotConfigured, match=r"no broker is set: .*set_broker"):
            declare(fine)
    with pytest.raises(errors.NotConfigured, match="no broker is set"):
        activity_stub("charge").send()
    with pytest.raises(errors.NotConfigured, match="no broker is set"):
        get_handle("order-1")


def test_wrong_definitions(broker: Any) -> None:
    with pytest.raises(errors.InvalidDefinition, match="async def plain"):

        @workflow(broker=broker)  # type: ignore[arg-type]
        def plain() -> None: ...

    async def fine() -> None: ...

    with pytest.raises(errors.NotConfigured, match="set_broker"):
        workflow(broker=StubBroker(middleware=[]))(fine)
    for bad in ("", "x" * 201, "a\0b"):
        with pytest.raises(errors.InvalidName):
            workflow(broker=broker, name=bad or "\0")(fine)
        with pytest.raises(errors.InvalidName):
            activity_stub(bad)
    with pytest.raises(errors.InvalidName):
        workflow(broker=broker, queue_name="9")(fine)
    with pytest.raises(TypeError):
        workflow(broker=broker, nonsense=1)(fine)  # type: ignore[call-overload]


def test_deep_families_keep_to_the_cap_on_ids() -> None:
    async def wf() -> None:
        await ship.execute("x")

    run = Run(wf, start=False)
    run.execution._base.workflow_id = "x" * 200
    run.send("WorkflowStarted")
    workflow_id = run.last[0].workflow_id  # type: ignore[attr-defined]
    assert len(workflow_id) == 200
    assert workflow_id != "x" * 200


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (0, 0),
        (2, 2000),
        (2.5, 2500),
        (0.0001, 1),
        (0.1 + 0.2, 300),
        (timedelta(days=3), 259_200_000),
        (timedelta(microseconds=1), 1),
        ("3 days", 259_200_000),
        ("1h 30m", 5_400_000),
        ("1h30m", 5_400_000),
        ("1 hour, 30 minutes and 5 seconds", 5_405_000),
        ("250ms", 250),
        ("1.5s", 1500),
        ("2 weeks", 1_209_600_000),
        (" 10 ", 10_000),
        ("0s", 0),
    ],
)
def test_durations(value: Any, ms: int) -> None:
    assert parse_duration(value) == ms


@pytest.mark.parametrize(
    "value",
    [-1, -0.5, timedelta(-1), "-5s", "", "soon", "5 parsecs", "1h 30", "s", None, True, float("nan"), "9" * 400, "9e9"],
)
def test_wrong_durations_show_examples(value: Any) -> None:
    with pytest.raises(ValueError, match="1h 30m"):
        parse_duration(value)
