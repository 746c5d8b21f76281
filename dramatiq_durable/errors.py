"""Every error this package raises: one hierarchy, and each message says what to do about it."""

from __future__ import annotations

from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import Interrupt


class DurableError(Exception):
    """Base class of every error of this package."""


# --- settings, schema, connections ---------------------------------------------------------------


class NotConfigured(DurableError):
    """A setting is missing or malformed; the message names the setting and an example."""


class SchemaOutOfDate(DurableError):
    """The database's schema is missing, older or newer than this package needs."""


class DatabaseUnavailable(DurableError, BrokerConnectionError):
    """Postgres cannot be reached: nothing was done.  Dramatiq's workers retry on this error."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class OutcomeUnknown(DatabaseUnavailable):
    """The connection broke around a commit and the outcome could not be looked up.

    Everything that is sent carries an id, so repeating the call is safe.
    """


class NotPermitted(DurableError):
    """The login may not do this, or the thing does not exist: the two look the same on purpose."""


class LimitReached(NotPermitted):
    """The login has as much under way as its max_live allows.  Nothing was stored; once some is done there is room."""


#: What somebody is told who names what he may not use, or what is not there: what the database says, and what to do.
FOREIGN = (
    "no such stream or workflow, or this login may not use it: correct the name, or have an administrator grant it "
    "(`dramatiq-durable role grant`, or provision the worker's role with it)"
)


class PayloadTooLarge(DurableError):
    """A payload is over the cap; keep the data elsewhere and send a reference to it."""


class NotEncodable(DurableError, TypeError):
    """A value cannot be carried by the encoder; the message names the value's place."""


class NotDecodable(DurableError, ValueError):
    """A value does not fit the annotation by which it is decoded; the message names the value's place and the type.

    Attributes:
      what(str): names the value, e.g. ``argument 1 ('order')``.
      path(str): where in the value it is, e.g. ``.items[2].price``; empty for the value itself.
      why(str): what does not fit.
    """

    def __init__(self, why: str, path: str = "") -> None:
        super().__init__(why)
        self.what = ""
        self.path = path
        self.why = why

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.what, self.path and f"at {self.path}") if part)
        return f"{place}: {self.why}" if place else self.why


class CodecFailed(DurableError):
    """A value cannot be encoded or decoded here: a codec is not known to this broker, or failed; the message names it.

    What waits for it (a workflow's task, an activity) is tried again, here or by another worker.
    """


class InvalidName(DurableError, ValueError):
    """A stream, actor or workflow name, or an id, is empty, too long or has characters that Postgres refuses."""


class InvalidFilter(DurableError, ValueError):
    """A filter (``where``) makes no sense; the message shows where.

    Attributes:
      position(int): the character that it was not understood from, counted from 0.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class ImportFailed(DurableError):
    """Another broker's messages cannot be imported (any further); nothing is lost, and the import can be run again."""


class InvalidSchedule(DurableError, ValueError):
    """A schedule's cron expression, time zone or another of its options makes no sense; the message says which."""


class ScheduleExists(DurableError):
    """There is a schedule of this name already."""


class ScheduleNotFound(DurableError):
    """There is no schedule of this name."""


class InvalidRole(DurableError, ValueError):
    """A worker's role cannot be as it was described: its kind, its streams, a limit, its end."""


class RoleExists(DurableError):
    """There is a worker's role, or a granted login, of this name already."""


class RoleNotFound(DurableError):
    """There is no worker's role of this name."""


class LeaseLost(DurableError):
    """The lease on a delivery ran out or was given to another worker: what was done under it is not recorded."""


# --- outcomes of activities and workflows ------------------------------------------------------------


class Timeout(DurableError, TimeoutError):
    """Something did not happen within the time that was given."""


class Failure(DurableError):
    """A failure that crossed the database: the original's type name, message, traceback and cause chain.

    Attributes:
      type(str): name of the original exception's class.
      message(str): the original exception's text.
      traceback(str | None): the original traceback, as text.
      retryable(bool): whether another attempt may have helped.
      timeout(str | None): which timeout of an activity ran out, if it was one: start_to_close, schedule_to_start,
        schedule_to_close or heartbeat.
    """

    timeout: str | None = None

    def __init__(
        self,
        message: str,
        *,
        type: str = "Exception",
        traceback: str | None = None,
        retryable: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.traceback = traceback
        self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class ActivityFailed(Failure):
    """An activity failed for good.

    Attributes:
      activity(str): the activity's name.
      attempt(int): the attempt that failed last, counted from 1.
      retry_after(int | None): of a local activity: the milliseconds after which the exception asked to be tried again.
    """

    activity: str = ""
    attempt: int = 1
    retry_after: int | None = None


class ChildWorkflowFailed(Failure):
    """A child workflow failed; ``.workflow_id`` names it."""

    workflow_id: str = ""


class WorkflowFailed(Failure):
    """A workflow failed; ``.workflow_id`` and ``.run_id`` name it."""

    workflow_id: str = ""
    run_id: str = ""


class WorkflowCancelled(DurableError):
    """The workflow was cancelled."""


class WorkflowTerminated(DurableError):
    """The workflow was terminated: ended from outside without a word to its code."""


class WorkflowTimedOut(DurableError):
    """The workflow ran out of its run or execution timeout."""


class WorkflowNotFound(DurableError):
    """There is no such workflow, or this login may not see it."""


class WorkflowAlreadyStarted(DurableError):
    """A live run has this workflow id; choose another id or another ``id_conflict``."""


class EscalationCancelled(DurableError):
    """Raised where a workflow awaits an escalation that was cancelled from outside."""


class EscalationConflict(DurableError):
    """An escalation is closed already, or somebody else has claimed it: this call changed nothing.

    Attributes:
      status(str): how it stands: waiting, claimed, resolved, cancelled or timed_out.
      claimed_by(str | None): who has claimed it.
    """

    def __init__(self, message: str, status: str, claimed_by: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.claimed_by = claimed_by


class EscalationNotFound(DurableError):
    """There is no escalation of this id, or this login may not see it."""


class WorkflowClosed(DurableError):
    """The run has ended and takes no more signals and updates, or ended before an update was answered."""


class QueryFailed(Failure):
    """A query's handler raised, or the workflow has none of that name."""

    def __str__(self) -> str:
        return self.message if self.type == "QueryFailed" else super().__str__()


class QueryTimedOut(Timeout):
    """No worker answered a query in time."""


class UpdateFailed(Failure):
    """An update was accepted, and its handler raised.

    Attributes:
      update_id(str): the update's id.
    """

    update_id: str = ""


class UpdateRejected(Failure):
    """An update was not accepted: its validator raised, or the workflow does not take it.  It left no history.

    Attributes:
      update_id(str): the update's id.
    """

    update_id: str = ""

    def __str__(self) -> str:
        return self.message if self.type == "UpdateRejected" else super().__str__()


class Nondeterminism(DurableError):
    """The workflow's code no longer does what its history says it did.

    The run stays open; its task is retried with backoff, so that a corrected worker can go on.

    Attributes:
      event_id(int): the first event that differs.
      expected(str): what history says.
      got(str): what the code asked for.
    """

    def __init__(self, event_id: int, expected: str, got: str) -> None:
        super().__init__(
            f"at event {event_id} the history says {expected}, but the workflow's code asked for {got}. "
            "The code was changed in a way that running workflows cannot follow: restore the old order of calls, "
            "or start new runs with the new code."
        )
        self.event_id = event_id
        self.expected = expected
        self.got = got


class ForbiddenInWorkflow(DurableError):
    """Workflow code did what cannot be replayed: I/O, a thread, a blocking call, ``actor.send()``."""


class MessageExists(DurableError):
    """A live message has the unique key, and the second was not to be skipped.

    Attributes:
      message_id(str): the live one's.
    """

    def __init__(self, text: str, message_id: str) -> None:
        super().__init__(text)
        self.message_id = message_id


class Abort(Interrupt):
    """Raised inside a running actor whose message was aborted; the message is not retried."""

    def __init__(self, message: str = "the message was aborted") -> None:
        super().__init__(message)


class ActivityCancelled(Interrupt):
    """Raised inside a running activity that was cancelled, or whose run has closed; the activity is not retried.

    In an ``async def`` it is an ``asyncio.CancelledError``, too.
    """

    def __init__(self, message: str = "the activity was cancelled") -> None:
        super().__init__(message)


class UnknownToken(DurableError):
    """No activity waits for this token of `complete_later`: it was used, its activity has ended otherwise (out of time,
    cancelled, its run closed) or begun another attempt, or it never was one."""


class RunawayWorkflow(DurableError):
    """One step of a workflow's code did not come to an end.

    The run stays open; its task is retried with backoff, so that a corrected worker can go on.
    """


class NotInWorkflow(DurableError, RuntimeError):
    """Something that only works inside a workflow was called elsewhere."""


class InvalidDefinition(DurableError, TypeError):
    """A workflow or activity is declared in a way that cannot work."""
