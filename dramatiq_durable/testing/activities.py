"""Activities of an environment: called in this process, with the retries, limits and failures of production."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.middleware import TimeLimitExceeded

from ..attempt import ActivityInfo
from ..delivery import LIMITS, Delivery
from ..errors import ActivityCancelled, DurableError
from ..tokens import described
from ..workflow import events, retry
from ..workflow.commands import ScheduleActivity
from ..workflow.converter import decode_call, encode, loads
from ..workflow.events import Event
from ..workflow.failures import failure_to_json
from .attempts import Attempt, Performing, function_of
from .looking import time_of

if TYPE_CHECKING:
    from .environment import Entry, Environment
    from .runs import Run


class ScheduledActivity(Performing):
    """An activity that a run has asked for and not been told the end of."""

    def __init__(self, environment: Environment, run: Run, command: ScheduleActivity) -> None:
        assert command.seq is not None
        assert command.name is not None
        actor = run.workflow.broker.actors.get(command.name)
        call = environment.mocked(command.name)
        if call is None:
            if actor is None:
                raise DurableError(
                    f"the workflow {run.workflow.name!r} calls the activity {command.name!r}, and its code is not "
                    f"here: mock it, Environment(mocks={{{command.name!r}: function}})."
                )
            call = function_of(actor)
        self.run = run
        self.seq: int = command.seq
        self.payload = command.payload or b"{}"
        plain = loads(self.payload)
        message: Message[Any] = Message(
            command.queue_name,
            command.name,
            tuple(plain["args"]),
            plain["kwargs"],
            dict(command.options),
            str(uuid.UUID(bytes=events.command_id(run.run_id, self.seq))),
            environment.now_ms,
        )
        super().__init__(environment, actor, call, message)
        self.details: bytes | None = None
        self.token: bytes | None = None
        self.cancelled = False
        self.limits: dict[str, Any] = command.options.get(LIMITS) or {}
        self._alarms: dict[str, Entry] = {}
        self.entry = environment.at(environment.now_ms + command.delay_ms, self._begin)
        self._scheduled_at = self.entry.at
        self._arm("schedule_to_close", self._scheduled_at)

    def cancel(self) -> None:
        """Tell it that it is cancelled: one that runs gets the exception where it sleeps, one that waits has ended."""
        self.cancelled = True
        now = self.now
        if now is not None and now.waits:
            return  # for whoever has its token
        if now is None or now.turns.ended:
            self.entry.dropped = True
            failure = failure_to_json(ActivityCancelled("it was cancelled before it began"), retryable=False)
            self._answer(events.ACTIVITY_FAILED, None, {**failure, "attempt": max(1, self.attempt)})
        else:
            now.interrupt(ActivityCancelled)

    def drop(self) -> None:
        """Its run has closed: nobody waits for its end any more."""
        self.cancel()
        self._disarm()
        self.run.activities.pop(self.seq, None)

    def beat(self, details: bytes | None) -> None:
        """It has sent a heartbeat."""
        self.details = details if details is not None else self.details
        self._arm("heartbeat", self.environment.now_ms)

    def complete(self, digest: bytes, payload: bytes) -> bool:
        """End it from elsewhere; False if that is not its token."""
        if not self._has(digest):
            return False
        self._answer(events.ACTIVITY_COMPLETED, payload)
        return True

    def fail(self, digest: bytes, error: BaseException) -> bool:
        """Let it fail from elsewhere; False if that is not its token."""
        if not self._has(digest):
            return False
        policy = self.message.options.get(retry.OPTION)
        delay = None if isinstance(error, ActivityCancelled) else retry.next_delay(policy, self.attempt, error)
        if delay is None or self.cancelled:
            self._answer(events.ACTIVITY_FAILED, None, described(error, policy, self.attempt))
            return True
        self.token = None
        self._disarm("start_to_close", "heartbeat")
        self.last_failure = f"{type(error).__name__}: {error}"
        self.try_again(delay)
        return True

    def _has(self, digest: bytes) -> bool:
        return digest == self.token and self.run.activities.get(self.seq) is self

    # --- inside -------------------------------------------------------------------------------------------

    def _call(self) -> Any:
        typed_by = self.call if self.actor is None else function_of(self.actor)
        args, kwargs = decode_call(self.payload, typed_by)
        self.environment.calls.append((self.name, tuple(args), kwargs))
        return self.call(*args, **kwargs)

    def _deliver(self) -> Delivery:
        options = self.message.options
        if self.limits and self.attempt > 1 and retry.OPTION not in options:
            # Attempts that a limit ended are none that Dramatiq has counted.
            options["retries"] = max(options.get("retries", 0), self.attempt - 1)
        delivery = Delivery(
            self.message,
            self.stage,
            stream_id=0,
            key=b"",
            lease=b"",
            kind="a",
            run_id=self.run.run_id,
            seq=self.seq,
            attempt=self.attempt,
        )
        self.token = None
        now = self.environment.now_ms
        self._arm("start_to_close", now)
        self._arm("heartbeat", now)
        dues = [e.at for name, e in self._alarms.items() if name != "heartbeat"]
        info = delivery.info = ActivityInfo(delivery)
        details = None if self.details is None else loads(self.details)
        info._known = (self.run.workflow_id, details, time_of(min(dues)) if dues else None)
        return delivery

    def _arm(self, limit: str, since: int) -> None:
        alarm = self._alarms.pop(limit, None)
        if alarm is not None:
            alarm.dropped = True
        if limit in self.limits:
            self._alarms[limit] = self.environment.at(since + self.limits[limit], lambda: self._expire(limit))

    def _disarm(self, *limits: str) -> None:
        for limit in limits or tuple(self._alarms):
            alarm = self._alarms.pop(limit, None)
            if alarm is not None:
                alarm.dropped = True

    def _expire(self, limit: str) -> None:
        seconds = f"{self.limits[limit] / 1000:g} s"
        text = (
            f"{limit}: "
            + {
                "schedule_to_close": f"it did not end within {seconds} of being scheduled",
                "start_to_close": f"an attempt did not end within {seconds}",
                "heartbeat": f"it sent no heartbeat for {seconds}",
            }[limit]
        )
        again = limit in ("start_to_close", "heartbeat")
        policy = self.limits["retry"]
        cause, attempt = self.last_failure, self.attempt
        ended, self.now, self.token = self.now, None, None
        self.entry.dropped = True
        if again and not retry.is_last(policy, attempt) and not self.cancelled:
            self._disarm("start_to_close", "heartbeat")
            self.last_failure = f"Timeout: {text}"
            self.try_again(retry.delay_after(policy, attempt))
        else:
            failure = {
                "type": "Timeout",
                "message": text,
                "retryable": again,
                "attempt": max(1, attempt),
                "timeout": limit,
            }
            if cause is not None:
                type, _, message = cause.partition(": ")
                failure["cause"] = {"type": type, "message": message}
            self._answer(events.ACTIVITY_TIMED_OUT, None, failure)
        if ended is not None and not ended.turns.ended:
            ended.interrupt(TimeLimitExceeded)

    def _ended(self, attempt: Attempt) -> None:
        if attempt.delivery.deferred and attempt.turns.error is None:
            attempt.waits = True
            return
        self.token = None
        self._disarm("start_to_close", "heartbeat")
        super()._ended(attempt)

    def _completed(self, value: Any) -> None:
        self._answer(events.ACTIVITY_COMPLETED, encode(value, f"the result of {self.name!r}"))

    def _failed(self, error: BaseException, hopeless: bool) -> None:
        failure = failure_to_json(error, retryable=not hopeless)
        self._answer(events.ACTIVITY_FAILED, None, {**failure, "attempt": self.attempt})

    def _answer(self, type: str, payload: bytes | None, failure: dict[str, Any] | None = None) -> None:
        self._disarm()
        self.now = None
        self.run.activities.pop(self.seq, None)
        facts = None if failure is None else {"failure": failure}
        self.environment.post(self.run, Event(0, type, 0, self.seq, self.name, payload, facts))

    def deferred(self, digest: bytes) -> bool:
        """It is to be ended by whoever has the token of this digest."""
        self.token = digest
        return True
