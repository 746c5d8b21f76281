"""What the engine's tests share: a broker that declares anything, activities, and a driver that plays the database."""

from __future__ import annotations

from typing import Any

from dramatiq.brokers.stub import StubBroker

from dramatiq_durable.workflow import events
from dramatiq_durable.workflow.activities import activity
from dramatiq_durable.workflow.commands import Command, ScheduleActivity, StartChild, StartTimer
from dramatiq_durable.workflow.converter import encode, encode_call, loads
from dramatiq_durable.workflow.definition import workflow
from dramatiq_durable.workflow.events import Event
from dramatiq_durable.workflow.replay import Execution, Info


class WorkflowBroker(StubBroker):
    """A StubBroker that lets workflows be declared."""

    def declare_workflow(self, definition: Any) -> None:
        self.declare_queue(definition.queue_name)


broker = WorkflowBroker(middleware=[])


@activity(broker=broker)
def echo(value: Any = None) -> Any:
    return value


@activity(broker=broker, queue_name="payments")
def charge(order_id: str, cents: int) -> str:
    return f"{order_id}:{cents}"


@workflow(broker=broker, queue_name="shipping")
async def ship(order_id: str) -> str:
    return order_id


class Run:
    """Drives one execution and keeps its history, as a runner would."""

    def __init__(self, fn: Any, *args: Any, run_id: str = "run-1", start: bool = True, **options: Any) -> None:
        self.fn = getattr(fn, "fn", fn)
        self.options = options
        self.info = Info("wf-1", run_id, self.fn.__name__)
        self.history: list[Event] = []
        self.now = 1_700_000_000_000
        self.last: list[Command] = []
        self.commands: list[Command] = []
        self.execution = self.fresh()
        if start:
            self.send(events.WORKFLOW_STARTED, payload=encode_call(args, {}))

    def fresh(self) -> Execution:
        return Execution(self.fn, Info("wf-1", self.info.run_id, self.fn.__name__), **self.options)

    def send(self, type: str, seq: int | None = None, *, after_ms: int = 1, **facts: Any) -> list[Command]:
        self.now += after_ms
        step = self.execution.step(Event(0, type, self.now, seq, **facts))
        self.history += step.events
        self.last = step.commands
        self.commands += step.commands
        return step.commands

    def complete(self, seq: int, value: Any = None) -> list[Command]:
        return self.send(events.ACTIVITY_COMPLETED, seq, payload=encode(value))

    def fail(self, seq: int, type: str = "ValueError", message: str = "boom", **more: Any) -> list[Command]:
        failure = {"type": type, "message": message, "traceback": None, "retryable": True, **more}
        return self.send(events.ACTIVITY_FAILED, seq, attributes={"failure": failure})

    def fire(self, seq: int) -> list[Command]:
        return self.send(events.TIMER_FIRED, seq)

    def signal(self, name: str, value: Any = None) -> list[Command]:
        return self.send(events.SIGNAL_RECEIVED, name=name, payload=encode(value))

    def cancel(self) -> list[Command]:
        return self.send(events.CANCEL_REQUESTED)

    @property
    def types(self) -> list[str]:
        return [command.event_type for command in self.last]

    @property
    def result(self) -> Any:
        assert self.execution.closed
        closing = self.commands[-1]
        assert closing.event_type == events.WORKFLOW_COMPLETED, closing
        assert closing.payload is not None
        return loads(closing.payload)

    @property
    def failure(self) -> dict[str, Any]:
        closing = self.commands[-1]
        assert closing.event_type == events.WORKFLOW_FAILED, closing
        failure: dict[str, Any] = closing.attributes()["failure"]  # type: ignore[index]
        return failure

    def open_commands(self) -> list[Command]:
        """Return activities, timers and children that nobody has answered or cancelled."""
        answered = {e.seq for e in self.history if e.type not in _STARTS and e.seq is not None}
        return [
            c
            for c in self.commands
            if isinstance(c, (ScheduleActivity, StartTimer, StartChild)) and c.seq not in answered
        ]

    def finish(self) -> Run:
        """Answer whatever is open, oldest first, until the run closes: activities return their first argument."""
        while not self.execution.closed:
            command = self.open_commands()[0]
            assert command.seq is not None
            if isinstance(command, ScheduleActivity):
                self.complete(command.seq, command.args[0] if command.args else None)
            elif isinstance(command, StartTimer):
                self.send(events.TIMER_FIRED, command.seq, after_ms=command.ms)
            else:
                self.send(events.CHILD_COMPLETED, command.seq, payload=encode(command.name))
        return self

    def replayed(self, fn: Any = None) -> Execution:
        """Return a fresh execution that was fed this history."""
        execution = self.fresh()
        if fn is not None:
            execution = Execution(getattr(fn, "fn", fn), Info("wf-1", self.info.run_id, "f"))
        execution.replay(self.history)
        return execution


_STARTS = {events.ACTIVITY_SCHEDULED, events.TIMER_STARTED, events.CHILD_STARTED}
