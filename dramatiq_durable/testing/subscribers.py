"""Topics of an environment: subscribers are called in this process, for each run one event after the other."""

from __future__ import annotations

import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

from dramatiq import Message

from ..delivery import EVENT, Delivery
from ..workflow import events
from ..workflow.commands import EmitTopic
from ..workflow.converter import loads
from .attempts import Performing, function_of

if TYPE_CHECKING:
    from .environment import Environment
    from .runs import Run


class Subscribers:
    """The actors that are subscribed to topics, and what they have still to be given.

    Attributes:
      given(dict): what a subscriber has still to be given of a run, the one that it is being given first.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.given: dict[tuple[str, str], deque[Message[Any]]] = {}

    def emit(self, run: Run, command: EmitTopic) -> None:
        """Give an event of a run to all that are subscribed to its topic."""
        broker = run.workflow.broker
        event = next(e for e in reversed(run.history) if e.type == events.TOPIC_EMITTED and e.seq == command.seq)
        facts = {
            "topic": command.name,
            "workflow_id": run.workflow_id,
            "run_id": run.run_id,
            "workflow": run.workflow.name,
            "queue_name": run.workflow.queue_name,
            "event_id": event.event_id,
            "at": event.at,
        }
        for topic, queue_name, name, _ in broker.subscriptions:
            if topic != command.name:
                continue
            payload = None if command.payload is None else loads(command.payload)
            id = str(uuid.uuid5(uuid.UUID(run.run_id), f"{event.event_id} {name}"))
            message: Message[Any] = Message(queue_name, name, (payload,), {}, {EVENT: facts}, id, event.at)
            waiting = self.given.setdefault((run.run_id, name), deque())
            waiting.append(message)
            if len(waiting) == 1:
                GivenEvent(self._environment, broker.actors[name], waiting)


class GivenEvent(Performing):
    """The first of the events that a subscriber has still to be given of a run; when it ends, the next."""

    def __init__(self, environment: Environment, actor: Any, waiting: deque[Message[Any]]) -> None:
        message = waiting[0]
        super().__init__(environment, actor, environment.mocked(message.actor_name) or function_of(actor), message)
        self._waiting = waiting
        self.entry = environment.at(environment.now_ms, self._begin)

    def _call(self) -> Any:
        self.environment.calls.append((self.name, tuple(self.message.args), {}))
        return self.call(*self.message.args)

    def _deliver(self) -> Delivery:
        return Delivery(self.message, self.stage, stream_id=0, key=b"", lease=b"", kind="p", attempt=self.attempt)

    def _completed(self, value: Any) -> None:
        self._waiting.popleft()
        if self._waiting:
            GivenEvent(self.environment, self.actor, self._waiting)

    def _failed(self, error: BaseException, hopeless: bool) -> None:
        self._completed(None)  # elsewhere it is a dead letter
