"""Activities of an environment: called in this process, with the arguments, retries and failures of production."""

from __future__ import annotations

import inspect
import random
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.middleware import Interrupt, Retries

from ..delivery import Delivery, current_delivery
from ..errors import ActivityCancelled, DurableError, NotEncodable, PayloadTooLarge
from ..workflow import events
from ..workflow.commands import ScheduleActivity
from ..workflow.converter import decode_call, encode, loads
from ..workflow.events import Event
from ..workflow.failures import failure_to_json
from .turns import Turns

if TYPE_CHECKING:
    from .environment import Entry, Environment
    from .runs import Run


class ScheduledActivity:
    """An activity that a run has asked for and not been told the end of."""

    def __init__(self, environment: Environment, run: Run, command: ScheduleActivity) -> None:
        assert command.seq is not None
        assert command.name is not None
        self.environment = environment
        self.run = run
        self.seq: int = command.seq
        self.name: str = command.name
        self.attempt = 0
        self.last_failure: str | None = None
        self.actor = run.workflow.broker.actors.get(self.name)
        self.call = environment.mocked(self.name)
        if self.call is None:
            if self.actor is None:
                raise DurableError(
                    f"the workflow {run.workflow.name!r} calls the activity {self.name!r}, and its code is not here: "
                    f"mock it, Environment(mocks={{{self.name!r}: function}})."
                )
            self.call = function_of(self.actor)
        self.payload = command.payload or b"{}"
        self.turns: Turns | None = None
        plain = loads(self.payload)
        message: Message[Any] = Message(
            command.queue_name,
            self.name,
            tuple(plain["args"]),
            plain["kwargs"],
            dict(command.options),
            str(uuid.UUID(bytes=events.command_id(run.run_id, self.seq))),
            environment.now_ms,
        )
        self.stage = Stage(self)
        self.delivery = Delivery(
            message, self.stage, stream_id=0, key=b"", lease=b"", kind="a", run_id=run.run_id, seq=self.seq
        )
        self.entry: Entry = environment.at(environment.now_ms + command.delay_ms, self._begin)

    def cancel(self) -> None:
        """Tell it that it is cancelled: one that runs gets the exception where it sleeps, one that waits has ended."""
        self.entry.dropped = True
        if self.turns is None or self.turns.ended:
            failure = failure_to_json(ActivityCancelled("it was cancelled before it began"), retryable=False)
            self._answer(events.ACTIVITY_FAILED, None, {**failure, "attempt": max(1, self.attempt)})
        else:
            self.delivery.interruption = ActivityCancelled
            self.turns.interrupt(ActivityCancelled)
            self._after_turn()

    # --- inside -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.attempt += 1
        self.delivery.attempt = self.attempt
        self.turns = Turns(lambda: self.environment.now_ms, self._run)
        self._take_turn()

    def _run(self) -> Any:
        """Call the function, on the thread of its turns."""
        assert self.call is not None
        current_delivery.set(self.delivery)
        typed_by = self.call if self.actor is None else function_of(self.actor)
        args, kwargs = decode_call(self.payload, typed_by)
        self.environment.calls.append((self.name, tuple(args), kwargs))
        return self.call(*args, **kwargs)

    def _take_turn(self) -> None:
        assert self.turns is not None
        self.turns.take()
        self._after_turn()

    def _after_turn(self) -> None:
        turns = self.turns
        assert turns is not None
        if not turns.ended:
            self.entry = self.environment.at(turns.wakes_at, self._take_turn)
            return
        error = turns.error
        if error is None:
            try:
                payload = encode(turns.value, f"the result of {self.name!r}")
                self._answer(events.ACTIVITY_COMPLETED, payload)
                return
            except (NotEncodable, PayloadTooLarge) as e:
                error = e
        if not isinstance(error, (Exception, Interrupt)):
            raise error  # the test's own: it has failed, or was skipped or interrupted
        self.last_failure = f"{type(error).__name__}: {error}"
        delay, hopeless = self._judge(error)
        if delay is None:
            failure = failure_to_json(error, retryable=not hopeless)
            self._answer(events.ACTIVITY_FAILED, None, {**failure, "attempt": self.attempt})
        else:
            self.entry = self.environment.at(self.environment.now_ms + delay, self._begin)

    def _judge(self, error: BaseException) -> tuple[int | None, bool]:
        """In how many milliseconds it is tried again, if at all; and whether it has failed for good."""
        delivery = self.delivery
        if delivery.interruption is not None:
            return None, True
        delivery.retry = None
        delivery.failed = False
        chance = random.getstate()
        random.seed(f"{self.run.run_id}:{self.seq}:{self.attempt}")  # Dramatiq's backoff is random: not in a test
        try:
            for each in self.stage.middleware:
                if isinstance(each, Retries):
                    try:
                        raise error  # the middleware formats the exception that is being handled
                    except BaseException:
                        each.after_process_message(self.stage, delivery, exception=error)
        finally:
            random.setstate(chance)
        return delivery.retry, delivery.failed

    def _answer(self, type: str, payload: bytes | None, failure: dict[str, Any] | None = None) -> None:
        self.run.activities.pop(self.seq, None)
        facts = None if failure is None else {"failure": failure}
        self.environment.post(self.run, Event(0, type, 0, self.seq, self.name, payload, facts))


class Stage:
    """What a delivery of an environment has for a broker: enough to decide on retries."""

    claimer = None

    def __init__(self, activity: ScheduledActivity) -> None:
        self._activity = activity
        actor = activity.actor
        self.middleware = [Retries()] if actor is None else actor.broker.middleware

    @property
    def actors(self) -> dict[str, Any]:
        return {self._activity.name: self._activity.actor}

    def get_actor(self, name: str) -> Any:
        actor = self._activity.actor
        return actor if name == self._activity.name and actor is not None else _Elsewhere()

    def enqueue(self, delivery: Any, *, delay: int | None = None) -> Any:
        delivery.retry = delay or 0
        return delivery

    def __getattr__(self, name: str) -> Any:
        raise DurableError(
            "a test's Environment has no database: mock the activity that needs one, or test it with the fixtures "
            f"durable_broker and durable_worker (it asked for {name!r})."
        )


class _Elsewhere:
    """An actor whose code is not here, or that is only told of a failure."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def send(self, *args: Any, **kwargs: Any) -> None:
        pass


def function_of(actor: Any) -> Callable[..., Any]:
    """The function behind an actor: the ``async def`` itself, where Dramatiq has put one into a plain function."""
    fn: Callable[..., Any] = actor.fn
    inner = getattr(fn, "__wrapped__", None)
    return inner if inner is not None and inspect.iscoroutinefunction(inner) else fn
