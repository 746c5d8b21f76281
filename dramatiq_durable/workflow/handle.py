"""Handles: through which one talks to runs from outside.

Every blocking call has a twin with an ``a`` in front that is awaited instead; it runs the call on a thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from ..durations import parse_duration
from ..errors import (
    DatabaseUnavailable,
    ForbiddenInWorkflow,
    Timeout,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
    WorkflowTerminated,
    WorkflowTimedOut,
)
from ..operations import Post, ResetRun, Terminate
from ..using import sending
from .asking import Asking
from .attributes import search_values
from .converter import decoders_of, encode, fit, loads
from .descriptions import Description, HistoryEvent, Pending, public, readable, value_of
from .events import Event, described_failure
from .export import export_history
from .failures import failure_from_json
from .following import afollow, follow
from .info import Info, Parent
from .replay import current
from .waiting import Told, Waiters

if TYPE_CHECKING:
    from ..broker import DurableBroker
    from .definition import Workflow

logger = logging.getLogger(__name__)


R = TypeVar("R")

#: How often a waiting client looks by itself, in seconds: at first, and at the longest.
LOOKS = (0.05, 2.0)


class WorkflowHandle(Asking, Generic[R]):
    """One run, or whichever run has a workflow id.

    Attributes:
      workflow_id(str): the business key.
      run_id(str | None): the run, if one is meant in particular.
    """

    def __init__(
        self,
        broker: DurableBroker,
        workflow_id: str | None,
        run_id: str | None = None,
        workflow: Workflow[Any, R] | None = None,
    ) -> None:
        self.broker = broker
        self.run_id = run_id
        self._workflow_id = workflow_id
        self._workflow = workflow

    def __repr__(self) -> str:
        return f"WorkflowHandle(workflow_id={self._workflow_id!r}, run_id={self.run_id!r})"

    @property
    def workflow_id(self) -> str:
        if self._workflow_id is None:
            self._workflow_id = str(self._found()[1])
        return self._workflow_id

    # --- looking ------------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """How the run stands, and where its code waits (``stack``: a text; None where no worker tells).

        Raises:
          WorkflowNotFound: there is none, or this login may not see it.
          DatabaseUnavailable: the database cannot be reached.
        """
        return self.described(ask=True)

    def described(self, *, ask: bool) -> Description:
        """As `describe`; unless told to ``ask``, no worker is asked where the code waits."""
        procedures = self.broker.procedures

        def look(conn: Any) -> Any:
            row = procedures.get_run(conn, self._key(), self._workflow_id)
            if row is None:
                return None
            ends = procedures.get_events(conn, row[0], [1, row[7]])
            return (
                row,
                ends.get(1),
                ends.get(row[7]),
                procedures.pending_of(conn, row[0]) if row[4] == "running" else [],
            )

        found, stack = self._read(look), None
        if ask and found is not None and found[0][4] == "running":
            # What it waits for is to be as new as where.
            stack = self._stack()
            found = self._read(look)
        if found is None:
            raise self._not_found()
        row, first, last, waiting = found
        run_id, workflow_id, name, queue_name, status, started_at, closed_at, length, parent, memo, failure = row[:11]
        search, entity = self._read(lambda conn: self.broker.procedures.get_state(conn, run_id))
        return Description(
            workflow_id=workflow_id,
            run_id=str(uuid.UUID(bytes=run_id)),
            name=name,
            queue_name=queue_name,
            status=status,
            started_at=started_at.astimezone(UTC),
            closed_at=None if closed_at is None else closed_at.astimezone(UTC),
            parent=None if parent is None else Parent(row[11] or "", str(uuid.UUID(bytes=parent))),
            memo=self.broker.codecs.open_memo(memo),
            search=search_values(search),
            entity=entity,
            history_length=length,
            task_failure=self.broker.codecs.decode_text(failure),
            input=value_of(first),
            result=value_of(last) if status == "completed" else None,
            failure=described_failure(last) if status == "failed" and last is not None else None,
            pending=[
                Pending(
                    kind,
                    called,
                    seq,
                    attempt,
                    self.broker.codecs.decode_text(why),
                    None if due is None else due.astimezone(UTC),
                    None if details is None else readable(self.broker.codecs.decode(details, "the heartbeat details")),
                )
                for seq, kind, called, attempt, why, due, details in waiting
            ],
            stack=stack if status == "running" else None,
        )

    def status(self) -> str:
        """running, completed, failed, cancelled, terminated, timed_out or continued_as_new.  Raises as `describe`."""
        return str(self._found()[4])

    def history(self) -> list[HistoryEvent]:
        """Everything that happened to the run, in its one order.  Raises as `describe`."""
        run_id = uuid.UUID(self._resolve()).bytes
        events = self._read(lambda conn: self.broker.procedures.get_history(conn, run_id))
        if not events:
            # A run has one from its start.
            raise self._not_found()
        return [public(e) for e in events]

    def export(self) -> str:
        """The run's history as a JSON text, with all of its values: what `testing.Replayer` replays.

        The format is described in `dramatiq_durable.workflow.export`.  Raises as `describe`.
        """
        run_id = self._resolve()
        key = uuid.UUID(run_id).bytes
        row = self._row(key)
        events = self._read(lambda conn: self.broker.procedures.get_history(conn, key))
        if row is None or not events:
            raise self._not_found()
        info = Info(
            workflow_id=row[1],
            run_id=run_id,
            name=row[2],
            queue_name=row[3],
            started_at=row[5],
            parent=None if row[8] is None else Parent(row[11] or "", str(uuid.UUID(bytes=row[8]))),
        )
        return export_history(info, events, row[4])

    def result(self, timeout: Any = None) -> R:
        """Wait for the run to close; where another goes on for it (continue-as-new, a retry, a reset), for that one.

        Parameters:
          timeout: seconds, a timedelta or a text like "10s"; None waits for ever.

        Returns:
          What the workflow returned.

        Raises:
          Timeout: it did not close in time.
          WorkflowFailed, WorkflowCancelled, WorkflowTerminated, WorkflowTimedOut: how it closed otherwise.
          WorkflowNotFound: there is none, or this login may not see it.
          DatabaseUnavailable: the database stayed away.
        """
        deadline = _deadline(timeout)
        run_id = self._resolve()
        while True:
            end, told = _End(self, run_id, timeout, deadline), threading.Event()
            with end.waiters.waiting(run_id, told):
                while (status := end.look()) is None:
                    told.wait(end.pause())
                    told.clear()
            following = self._following(run_id, status)
            if isinstance(following, _Outcome):
                return cast(R, following.value)
            run_id = following

    async def aresult(self, timeout: Any = None) -> R:
        """As `result`, awaited: no thread waits for it."""
        deadline = _deadline(timeout)
        run_id = await asyncio.to_thread(self._resolve)
        while True:
            end, told = _End(self, run_id, timeout, deadline), Told()
            with end.waiters.waiting(run_id, told):
                while (status := await asyncio.to_thread(end.look)) is None:
                    await told.wait(end.pause())
            following = await asyncio.to_thread(self._following, run_id, status)
            if isinstance(following, _Outcome):
                return cast(R, following.value)
            run_id = following

    def _following(self, run_id: str, status: str) -> str | _Outcome:
        """The run that goes on for one that has closed, or else how that ended."""
        row = self._row(uuid.UUID(run_id).bytes)
        if row[12] is None:
            return _Outcome(self._outcome(run_id, status, row[7], row[2]))
        return str(uuid.UUID(bytes=row[12]))

    def _outcome(self, run_id: str, status: str, length: int, name: str) -> R:
        key = uuid.UUID(run_id).bytes
        last: Event = self._read(lambda conn: self.broker.procedures.get_history(conn, key, length - 1))[0]
        ids = {"workflow_id": self._workflow_id or "", "run_id": run_id}
        what = f"the workflow {self._workflow_id or run_id!r}"
        attributes = last.attributes or {}
        if status == "completed":
            value = None if last.payload is None else loads(last.payload)
            # A handle that was made of an id knows no workflow; this process may.
            workflow = self._workflow or self.broker.workflows.get(name)
            decode = None if workflow is None else decoders_of(workflow.fn).result
            return cast(R, fit(value, decode, f"the result of {what}"))
        if status == "failed":
            raise failure_from_json(described_failure(last), WorkflowFailed, **ids)
        if status == "cancelled":
            raise WorkflowCancelled(f"{what} was cancelled")
        if status == "timed_out":
            raise WorkflowTimedOut(f"{what} ran out of its time ({attributes.get('reason')})")
        raise WorkflowTerminated(f"{what} was terminated: {attributes.get('reason') or 'no reason given'}")

    def follow(self, offset: int = 0) -> Iterator[tuple[int, Any]]:
        """What the run puts out (``await durable.output(value)``), until it closes; where another goes on for it
        (continue-as-new, a retry), until that one does.

        Parameters:
          offset(int): where to begin; after a break, one more than the last offset that was seen.

        Returns:
          Pairs of (offset, value), as they are stored; offsets are counted from 0, and nothing is left out.

        Raises:
          ValueError: the offset is negative.
          WorkflowNotFound: there is no such run, or this login may not see it.
          DatabaseUnavailable: the database stayed away.
        """
        return follow(self, offset)

    def afollow(self, offset: int = 0) -> AsyncIterator[tuple[int, Any]]:
        """As `follow`, for ``async for``; a follower that waits holds no thread."""
        return afollow(self, offset)

    # --- acting -------------------------------------------------------------------------------------------

    def signal(self, name: str, payload: Any = None, *, id: str | None = None) -> None:
        """Send a signal; when this returns, it is committed and will not be lost.

        Parameters:
          name(str): what the workflow waits for with ``wait_for_signal(name)``.
          payload: any value that the converter can carry.
          id(str | None): the same id twice is one signal.

        Raises:
          WorkflowClosed: the run has ended.
          WorkflowNotFound: there is none, or this login may not see it.
          NotEncodable, PayloadTooLarge, InvalidName: the signal cannot be carried.
        """
        from .options import check_name

        check_name(name, "a signal's name")
        if id is not None:
            check_name(id, "a signal's id")
        what = f"the payload of the signal {name!r}"
        data = None if payload is None else self.broker.codecs.encode(encode(payload, what), what)
        self._post("SignalReceived", name, data, id)

    def cancel(self) -> None:
        """Ask the run to cancel itself: its code gets an ``asyncio.CancelledError`` and may clean up.

        Raises:
          WorkflowClosed: the run has ended already.
          WorkflowNotFound: there is none, or this login may not see it.
        """
        self._post("CancelRequested", None, None, None)

    def terminate(self, reason: str | None = None) -> None:
        """End the run at once, without a word to its code.  Raises as `cancel`."""
        outside_of_workflows("terminate a workflow")
        check_reason(reason)
        self.broker.commit.submit(Terminate(self._key(), self._workflow_id, self.broker.codecs.encode_text(reason)))

    def reset(self, to_event: int) -> WorkflowHandle[R]:
        """Take the run up again at an event, as a new run: its history up to there is kept, the rest is done anew.

        The step that begins with the event, or that the event is a part of, is taken again, with the code as it is now.
        What was pending is asked for again: activities are sent again, timers keep their due times, children that were
        started before are waited for, or tell how they ended.  Signals that came later come again, in order.
        Whichever run has the workflow id ends, terminated for the reason "reset".  A closed run can be reset, too.

        Parameters:
          to_event(int): a number of the run's history, from 1.

        Returns:
          WorkflowHandle: of the new run.

        Raises:
          ValueError: the run has no such event.
          WorkflowNotFound: there is no such run, or this login may not see it.
        """
        outside_of_workflows("reset a workflow")
        check_event(to_event)
        new = uuid.uuid4()
        self.broker.commit.submit(ResetRun(self._key(), self._workflow_id, to_event, new.bytes))
        return WorkflowHandle(self.broker, self._workflow_id, str(new), self._workflow)

    def children(self) -> list[WorkflowHandle[Any]]:
        """Handles of the children that the run has started, in that order; of each the run that goes on for it last.
        Raises as `describe`."""
        key = self._key()
        rows = self._read(lambda conn: self.broker.procedures.list_children(conn, key, self._workflow_id))
        if not rows:
            self.describe()  # Raises for a run that does not exist.
        return [WorkflowHandle(self.broker, workflow_id, str(uuid.UUID(bytes=run_id))) for run_id, workflow_id in rows]

    def _post(self, type: str, name: str | None, payload: bytes | None, id: str | None) -> None:
        outside_of_workflows("signal or cancel a workflow through a handle")
        key = id if id is not None else str(uuid.uuid4())
        post = Post(self._key(), self._workflow_id, type, name, payload, key)
        spans = self.broker.telemetry.spans()
        if spans is None:
            self.broker.commit.submit(post)
            return
        with spans.telling("cancel" if name is None else "signal", name, self._workflow_id or self.run_id) as carrier:
            post.trace = carrier.get("traceparent")
            self.broker.commit.submit(post)

    # --- twins --------------------------------------------------------------------------------------------

    async def adescribe(self) -> Description:
        return await asyncio.to_thread(self.describe)

    async def astatus(self) -> str:
        return await asyncio.to_thread(self.status)

    async def ahistory(self) -> list[HistoryEvent]:
        return await asyncio.to_thread(self.history)

    async def aexport(self) -> str:
        return await asyncio.to_thread(self.export)

    async def asignal(self, name: str, payload: Any = None, *, id: str | None = None) -> None:
        await sending(lambda: self.signal(name, payload, id=id))

    async def acancel(self) -> None:
        await sending(self.cancel)

    async def aterminate(self, reason: str | None = None) -> None:
        await sending(lambda: self.terminate(reason))

    async def areset(self, to_event: int) -> WorkflowHandle[R]:
        return await asyncio.to_thread(self.reset, to_event)

    async def achildren(self) -> list[WorkflowHandle[Any]]:
        return await asyncio.to_thread(self.children)

    # --- inside -------------------------------------------------------------------------------------------

    def _key(self) -> bytes | None:
        return None if self.run_id is None else uuid.UUID(self.run_id).bytes

    def _row(self, key: bytes) -> Any:
        return self._read(lambda conn: self.broker.procedures.get_run(conn, key, None))

    def _resolve(self) -> str:
        return self.run_id if self.run_id is not None else str(uuid.UUID(bytes=self._found()[0]))

    def _found(self) -> tuple[Any, ...]:
        row = self._read(lambda conn: self.broker.procedures.get_run(conn, self._key(), self._workflow_id))
        if row is None:
            raise self._not_found()
        return cast("tuple[Any, ...]", row)

    def _not_found(self) -> WorkflowNotFound:
        return WorkflowNotFound(
            f"there is no workflow {self._workflow_id or self.run_id!r} in the namespace {self.broker.namespace!r}, "
            "or this login may not see it"
        )

    def _read(self, call: Callable[[Any], Any]) -> Any:
        outside_of_workflows("look at a workflow through a handle")
        with self.broker.database.calling() as conn:
            return call(conn)


def check_event(to_event: int) -> None:
    if not isinstance(to_event, int) or isinstance(to_event, bool) or not 1 <= to_event < 2**31:
        raise ValueError(f"to_event is the number of an event, from 1 (see history()), not {to_event!r}")


def check_reason(reason: str | None) -> None:
    if reason is not None and (not isinstance(reason, str) or len(reason) > 4000 or "\0" in reason):
        raise ValueError(f"a reason is a text of at most 4000 characters without NUL, not {str(reason)[:40]!r}")


def outside_of_workflows(what: str) -> None:
    if current() is not None:
        raise ForbiddenInWorkflow(f"inside a workflow you cannot {what}: it could not be replayed. Make it an activity")


class _Outcome(NamedTuple):
    """What a workflow returned."""

    value: Any


def _deadline(timeout: Any) -> float | None:
    return None if timeout is None else time.monotonic() + parse_duration(timeout) / 1000


class _End:
    """The end of one run, while it is waited for."""

    def __init__(self, handle: WorkflowHandle[Any], run_id: str, timeout: Any, deadline: float | None) -> None:
        self.waiters = Waiters.of(handle.broker)
        self._handle = handle
        self._run_id = run_id
        self._timeout = timeout
        self._deadline = deadline
        self._pause = LOOKS[0]
        self._away_since: float | None = None

    def look(self) -> str | None:
        """The run's status, once it has closed."""
        handle, key = self._handle, uuid.UUID(self._run_id).bytes
        try:
            status = handle._read(lambda conn: handle.broker.procedures.await_run(conn, key, self.waiters.channel))
            self._away_since = None
        except DatabaseUnavailable:
            # An outage is no reason to forget what is being waited for; but not for ever.
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > 60:
                raise
            status = "running"
        if status is None:
            raise handle._not_found()
        if status != "running":
            return str(status)
        if self._deadline is not None and self._deadline <= time.monotonic():
            waited = f"{parse_duration(self._timeout or 0) / 1000:g} s"
            raise Timeout(
                f"the workflow {handle._workflow_id or self._run_id!r} did not close within {waited}: it goes on, if a "
                "worker consumes its stream"
            )
        return None

    def pause(self) -> float:
        """Seconds until the next look, if nothing is told before."""
        pause = self._pause
        self._pause = min(pause * 1.5, LOOKS[1])
        return pause if self._deadline is None else max(0, min(pause, self._deadline - time.monotonic()))
