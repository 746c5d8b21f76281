"""Asking runs from outside: queries, which only look, and updates, which change something and are answered."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from ..durations import Duration, parse_duration
from ..errors import (
    DurableError,
    QueryFailed,
    QueryTimedOut,
    Timeout,
    UpdateFailed,
    UpdateRejected,
    WorkflowClosed,
    WorkflowNotFound,
)
from ..group_commit import riding
from ..operations import RequestUpdate
from ..procedures import Procedures
from ..watch import Watch
from .converter import encode_call, loads
from .failures import failure_from_json
from .handlers import STACK
from .names import check_name

if TYPE_CHECKING:
    from ..broker import DurableBroker
    from ..codecs import Codecs

R = TypeVar("R")

#: How an update stands while there is something to wait for.
_UNDECIDED = {"accepted": ("requested",), "completed": ("requested", "accepted")}

#: How long `describe` waits for a worker to tell where the run's code is, in seconds.
STACK_PATIENCE = 1.0


class UpdateHandle(Generic[R]):
    """An update that a run was asked for.

    Attributes:
      update_id(str): its id; the same id asks for the same update.
      workflow_id(str | None), run_id(str | None): whose.
    """

    def __init__(
        self,
        broker: DurableBroker,
        workflow_id: str | None,
        run_id: str | None,
        update_id: str,
        name: str | None = None,
    ) -> None:
        self.broker = broker
        self.workflow_id = workflow_id
        self.run_id = run_id
        self.update_id = update_id
        self._name = name

    def __repr__(self) -> str:
        return f"UpdateHandle(workflow_id={self.workflow_id!r}, run_id={self.run_id!r}, update_id={self.update_id!r})"

    def result(self, timeout: Duration | None = None) -> R:
        """Wait for the update's handler.

        Parameters:
          timeout: seconds, a timedelta or a text; None waits for ever.

        Returns:
          What the handler returned.

        Raises:
          UpdateRejected: the workflow did not accept it.
          UpdateFailed: its handler raised.
          WorkflowClosed: the run ended before its handler did.
          Timeout: it did not come to an end in time; it goes on.
          WorkflowNotFound: there is no such update, or this login may not see its workflow.
          CodecFailed: its answer cannot be decoded here.
          DatabaseUnavailable: the time is over, and the database was away at the end.
        """
        return cast(R, self._outcome(self._wait("completed", timeout)))

    async def aresult(self, timeout: Duration | None = None) -> R:
        """As `result`, awaited."""
        return cast(R, self._outcome(await self._async_wait("completed", timeout)))

    def _wait(self, stage: str, timeout: Duration | None) -> tuple[Any, ...]:
        _not_here(f"wait for the update {self.update_id!r}")
        row = Watch.of(self.broker, find_updates).wait(self._wanted(stage), _seconds(timeout))
        return self._in_time(row, stage, timeout)

    async def _async_wait(self, stage: str, timeout: Duration | None) -> tuple[Any, ...]:
        _not_here(f"wait for the update {self.update_id!r}")
        row = await Watch.of(self.broker, find_updates).async_wait(self._wanted(stage), _seconds(timeout))
        return self._in_time(row, stage, timeout)

    def _wanted(self, stage: str) -> tuple[bytes | None, str | None, str, str]:
        return _key(self.run_id), self.workflow_id, self.update_id, stage

    def _in_time(self, row: tuple[Any, ...] | None, stage: str, timeout: Duration | None) -> tuple[Any, ...]:
        if row is None:
            raise Timeout(
                f"{self._described()} was not {stage} within {_seconds(timeout):g} s. It goes on, if a worker consumes "
                f"the workflow's stream: ask again with get_update({self.update_id!r}).result()"
            )
        return row

    def _outcome(self, row: tuple[Any, ...]) -> Any:
        status, payload, failure = row
        what = f"the answer of {self._described()}"
        if status == "missing":
            raise WorkflowNotFound(
                f"there is no update {self.update_id!r} of a workflow {self.workflow_id or self.run_id!r}, or this "
                "login may not see it"
            )
        if status == "closed":
            raise WorkflowClosed(
                f"the workflow {self.workflow_id or self.run_id!r} ended before {self._described()} was answered. Let "
                "its code await durable.wait_condition(durable.all_handlers_finished) before it ends"
            )
        if failure is not None:
            failure = self._codecs.open_facts({"failure": failure})["failure"]
            kind = UpdateRejected if status == "rejected" else UpdateFailed
            raise failure_from_json(failure, kind, update_id=self.update_id)
        return None if payload is None else loads(self._codecs.decode(payload, what))

    @property
    def _codecs(self) -> Codecs:
        return self.broker.codecs

    def _described(self) -> str:
        return f"the update {self._name!r} ({self.update_id})" if self._name else f"the update {self.update_id!r}"


class Asking:
    """What a handle of a run can be asked."""

    broker: DurableBroker
    run_id: str | None
    _workflow_id: str | None
    #: The update that the run was started with.
    _update_id: str | None = None

    def query(self, name: str, *args: Any, timeout: Duration | None = 10) -> Any:
        """Ask the run's code; it may have ended, and is then brought back from its history.

        What was said to the run before is known to it; nothing of the query is recorded.

        Parameters:
          name(str): what the workflow has registered with ``@durable.on_query(name)``.
          *args: what its handler takes.
          timeout: seconds, a timedelta or a text.

        Returns:
          What the handler returned.

        Raises:
          QueryTimedOut: no worker answered in time.
          QueryFailed: the handler raised, or there is none of this name; the message lists those that there are.
          WorkflowNotFound: there is no such run, or this login may not see it.
          NotEncodable, PayloadTooLarge, CodecFailed, InvalidName: the query cannot be carried.
          DatabaseUnavailable: the database cannot be reached.
        """
        ask = _Query(self, name, args, timeout)
        self._read(ask.ask)
        return ask.outcome(Watch.of(self.broker, find_answers).wait(ask.wanted(), ask.seconds))

    async def aquery(self, name: str, *args: Any, timeout: Duration | None = 10) -> Any:
        """As `query`, awaited."""
        ask = _Query(self, name, args, timeout)
        await asyncio.to_thread(self._read, ask.ask)
        row = await Watch.of(self.broker, find_answers).async_wait(ask.wanted(), ask.seconds)
        return ask.outcome(row) if row is not None else await asyncio.to_thread(ask.outcome, row)

    @overload
    def update(
        self,
        name: str,
        *args: Any,
        update_id: str | None = None,
        wait: Literal["completed"] = "completed",
        timeout: Duration | None = None,
    ) -> Any: ...
    @overload
    def update(
        self,
        name: str,
        *args: Any,
        update_id: str | None = None,
        wait: Literal["accepted"],
        timeout: Duration | None = None,
    ) -> UpdateHandle[Any]: ...

    def update(
        self,
        name: str,
        *args: Any,
        update_id: str | None = None,
        wait: Literal["completed", "accepted"] = "completed",
        timeout: Duration | None = None,
    ) -> Any:
        """Have the run's code change something, and wait for its answer.

        Parameters:
          name(str): what the workflow has registered with ``@durable.on_update(name)``.
          *args: what its handler takes.
          update_id(str | None): the same id asks once, however often: the answer is the same, also after the run has
            ended.
          wait(str): "completed": until the handler has come to an end; "accepted": until the workflow has accepted it.
          timeout: seconds, a timedelta or a text; None waits for ever.

        Returns:
          What the handler returned; with ``wait="accepted"`` an `UpdateHandle`.

        Raises:
          UpdateRejected: its validator raised, or the workflow does not take it; it left no history.
          UpdateFailed: its handler raised.
          WorkflowClosed: the run has ended, or ended before the handler did.
          WorkflowNotFound: there is no such run, or this login may not see it.
          Timeout: it was not accepted (or completed) in time; it goes on.
          NotEncodable, PayloadTooLarge, CodecFailed, InvalidName: the update cannot be carried.
          DatabaseUnavailable: the database cannot be reached; asking again with the same id is safe.
        """
        began = time.monotonic()
        asked = self._request(name, args, update_id, wait)
        row = asked._wait(wait, _left(timeout, began))
        return asked._outcome(row) if wait == "completed" else _accepted(asked, row)

    async def aupdate(
        self,
        name: str,
        *args: Any,
        update_id: str | None = None,
        wait: Literal["completed", "accepted"] = "completed",
        timeout: Duration | None = None,
    ) -> Any:
        """As `update`, awaited."""
        began = time.monotonic()
        asked = await asyncio.to_thread(self._request, name, args, update_id, wait)
        row = await asked._async_wait(wait, _left(timeout, began))
        return asked._outcome(row) if wait == "completed" else _accepted(asked, row)

    def get_update(self, update_id: str | None = None) -> UpdateHandle[Any]:
        """A handle of an update by its id; without one, of the update that the run was started with.  Does no I/O.

        Raises:
          ValueError: no id is given, and the run was started with none.
        """
        update_id = update_id if update_id is not None else self._update_id
        if update_id is None:
            raise ValueError("get_update needs the update's id: this run was not started by with_update")
        return UpdateHandle(self.broker, self._workflow_id, self.run_id, check_name(update_id, "an update's id"))

    async def aget_update(self, update_id: str | None = None) -> UpdateHandle[Any]:
        """As `get_update`."""
        return self.get_update(update_id)

    def _request(self, name: str, args: tuple[Any, ...], update_id: str | None, wait: str) -> UpdateHandle[Any]:
        if wait not in _UNDECIDED:
            raise ValueError(f"wait is 'completed' or 'accepted', not {wait!r}.")
        check_name(name, "an update's name")
        update_id = str(uuid.uuid4()) if update_id is None else check_name(update_id, "an update's id")
        _not_here(f"ask for the update {name!r}")
        payload = self.broker.codecs.encode(encode_call(args, {}, None, name), f"the arguments of {name!r}")
        request = RequestUpdate(_key(self.run_id), self._workflow_id, update_id, name, payload)
        spans = self.broker.telemetry.spans()
        if spans is None:
            _, run_id = self.broker.commit.submit(request)
        else:
            with spans.telling("update", name, self._workflow_id or self.run_id) as carrier:
                request.trace = carrier.get("traceparent")
                _, run_id = self.broker.commit.submit(request)
        return UpdateHandle(self.broker, self._workflow_id, str(uuid.UUID(bytes=run_id)), update_id, name)

    def _stack(self) -> str | None:
        """Where the run's code waits; None where no worker tells, for whatever reason."""
        if riding.get() is not None:
            return None
        try:
            ask = _Query(self, STACK, (), STACK_PATIENCE, heard=True)
            self._read(ask.ask)
            if ask.query_id is None:
                return None
            return cast(str, ask.outcome(Watch.of(self.broker, find_answers).wait(ask.query_id, ask.seconds)))
        except DurableError:
            return None

    def _read(self, call: Callable[[Any], Any]) -> Any:
        raise NotImplementedError

    def _not_found(self) -> WorkflowNotFound:
        raise NotImplementedError


class _Query:
    """One query on its way."""

    def __init__(
        self, handle: Asking, name: str, args: tuple[Any, ...], timeout: Duration | None, heard: bool = False
    ) -> None:
        self.handle = handle
        self.name = check_name(name, "a query's name")
        self.payload = encode_call(args, {}, None, name)
        if args:  # without, there is nothing to hide: `describe` works where no codec does
            self.payload = handle.broker.codecs.encode(self.payload, f"the arguments of {name!r}")
        self.seconds = _seconds(timeout)
        self.heard = heard
        self.query_id: bytes | None = None
        self.queue_name = ""
        _not_here(f"ask the query {name!r}")
        self.channel = Watch.of(handle.broker, find_answers).channel

    def ask(self, conn: Any) -> None:
        handle = self.handle
        # Kept a little longer than is waited, so that an answer that is late is no surprise to anybody.
        wait = int(min(self.seconds, 3590) * 1000) + 5_000
        self.query_id, found, self.heard, self.queue_name = handle.broker.procedures.ask_run(
            conn, _key(handle.run_id), handle._workflow_id, self.name, self.payload, self.channel, wait, self.heard
        )
        if not found:
            raise handle._not_found()

    def wanted(self) -> bytes:
        assert self.query_id is not None
        return self.query_id

    def withdraw(self, conn: Any) -> None:
        self.handle.broker.procedures.withdraw_query(conn, self.wanted())

    def outcome(self, row: tuple[Any, ...] | None) -> Any:
        if row is None:
            self.handle._read(self.withdraw)
            why = (
                "its workers are busy, the run has not begun, or none of them knows the workflow"
                if self.heard
                else "no worker consumed it when it was asked: start one (`dramatiq your.module:broker --queues "
                f"{self.queue_name}`)"
            )
            raise QueryTimedOut(
                f"no worker answered the query {self.name!r} within {self.seconds:g} s. The workflow's stream is "
                f"{self.queue_name!r}; {why}"
            )
        payload, failure = row
        broker = self.handle.broker
        if failure is not None:
            raise failure_from_json(_opened(broker, failure) or {}, QueryFailed)
        return _value(broker, payload, f"the answer to the query {self.name!r}")


def _value(broker: DurableBroker, payload: bytes | None, what: str) -> Any:
    return None if payload is None else loads(broker.codecs.decode(payload, what))


def _opened(broker: DurableBroker, failure: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if failure is None else broker.codecs.open_facts({"failure": failure})["failure"]


def find_answers(
    procedures: Procedures, conn: Any, wanted: Sequence[bytes], channel: bytes | None, wait: int
) -> dict[bytes, tuple[Any, ...]]:
    """Those of the queries' answers that are there; their channel was told when they were asked."""
    return procedures.take_answers(conn, wanted)


def find_updates(
    procedures: Procedures, conn: Any, wanted: Sequence[tuple[Any, ...]], channel: bytes | None, wait: int
) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Those of the updates that are decided, as far as is wanted."""
    rows = procedures.get_updates(conn, [(w[0], w[1], w[2]) for w in wanted], channel, wait)
    return {w: row for w, row in zip(wanted, rows, strict=True) if row[0] not in _UNDECIDED[w[3]]}


def _accepted(asked: UpdateHandle[Any], row: tuple[Any, ...]) -> UpdateHandle[Any]:
    if row[0] in ("rejected", "closed", "missing"):
        asked._outcome(row)
    return asked


def _not_here(what: str) -> None:
    from .handle import outside_of_workflows

    outside_of_workflows(what)
    if riding.get() is not None:
        raise DurableError(
            f"inside of a using() block you cannot {what}: a run answers only what is committed. Do it after the "
            "transaction"
        )


def _key(run_id: str | None) -> bytes | None:
    return None if run_id is None else uuid.UUID(run_id).bytes


def _seconds(timeout: Duration | None) -> float:
    return float("inf") if timeout is None else parse_duration(timeout) / 1000


def _left(timeout: Duration | None, began: float) -> Duration | None:
    return None if timeout is None else max(_seconds(timeout) - (time.monotonic() - began), 0.0)
