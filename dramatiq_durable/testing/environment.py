"""An environment for tests: workflows run in memory, on a clock that skips what nobody has to wait for."""

from __future__ import annotations

import heapq
import json
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dramatiq import Actor
from dramatiq.middleware import Shutdown

from ..codecs import Codec, Codecs, decode_only
from ..durations import Duration, parse_duration
from ..errors import DurableError, WorkflowAlreadyStarted
from ..operations.activities import unknown_token
from ..tokens import _parsed
from ..workflow.activities import ActivityStub
from ..workflow.client import _brought
from ..workflow.converter import encode, encode_call
from ..workflow.definition import Workflow
from ..workflow.events import UPDATE_REQUESTED, Event
from ..workflow.interceptors import Interceptors, WorkflowInterceptor
from ..workflow.options import WorkflowOptions, check_call
from . import turns
from .asking import Update, post_update
from .handle import EnvironmentHandle
from .looking import time_of
from .people import Escalations
from .runs import Run
from .subscribers import Subscribers

if TYPE_CHECKING:
    from types import TracebackType


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(order=True, slots=True)
class Entry:
    """Something that is due at a time of the environment's clock."""

    at: int
    order: int
    act: Callable[[], None] = field(compare=False)
    dropped: bool = field(default=False, compare=False)


class Environment:
    """Runs workflows in memory: no database, no worker, and no time passes but on a clock of its own.

    Activities are called in this process, with the arguments, results, retries and failures of production; those that
    sleep (``time.sleep``, ``asyncio.sleep``) take time of the environment's clock only.  Everything happens in one
    order, the same in every run of the test::

        with Environment(mocks={charge: lambda order_id, cents: "receipt"}) as env:
            handle = env.start(order, "o-1", 500)
            env.advance("2 days")
            handle.signal("approval", {"ok": True})
            assert handle.result() == "shipped"

    Parameters:
      mocks: what is called instead of activities and child workflows, by the activity, actor, stub, workflow or its
        name.  A mock is a function, plain or ``async def``, and takes the same arguments.  What is not mocked runs.
      interceptors: in place of those of the workflows' brokers, around every workflow and what it calls.
      codecs: in place of those of the workflows' brokers; everything that history records goes through them and back.
      replay(bool): replay each run from its beginning when it has ended, and the others at the environment's end, so
        that code that is not deterministic is found here and not in production.

    Attributes:
      escalations: what workflows ask people (``durable.escalate``): ``list``, ``resolve`` and ``cancel`` them.
      calls(list): every call of an activity, a subscriber or a mock: (name, args, kwargs), in order, retries included.
    """

    def __init__(
        self,
        mocks: Mapping[Any, Callable[..., Any]] | None = None,
        *,
        interceptors: Sequence[WorkflowInterceptor] | None = None,
        codecs: Sequence[Codec | decode_only] | None = None,
        replay: bool = True,
    ) -> None:
        self._mocks = {_name_of(what): _checked(what, mock) for what, mock in (mocks or {}).items()}
        self._replay = replay
        self.interceptors = None if interceptors is None else Interceptors(interceptors)
        self.codecs = None if codecs is None else Codecs(codecs)
        self._agenda: list[Entry] = []
        self._order = 0
        self._driving = False
        self._random = random.Random(0)
        self._runs: dict[str, Run] = {}
        self._turns: list[turns.Turns] = []
        self.now_ms = int(time.time() * 1000)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.escalations = Escalations(self)
        self.subscribers = Subscribers(self)
        turns.install()

    def __enter__(self) -> Environment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(check=error is None)

    def close(self, *, check: bool = True) -> None:
        """End everything that is open, and drop it.  ``with`` does it.

        Raises:
          Nondeterminism: a run that is open cannot be replayed.
        """
        runs = list(self._runs.values())
        try:
            if check and self._replay:
                for run in runs:
                    if run.status == "running":
                        run.replayed()
        finally:
            self._agenda.clear()
            for one in self._turns:
                if one.sleeps:
                    one.interrupt(Shutdown)
            for run in runs:
                run.execution.evict()

    # --- what tests do --------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """The time of the environment's clock, in UTC."""
        return time_of(self.now_ms)

    def start(self, workflow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> EnvironmentHandle[R]:
        """Start a run, and let everything happen that is due at once; no time passes.

        Parameters:
          workflow: a workflow; options are given with ``workflow.options(...)``.

        Returns:
          A handle, as ``workflow.start(...)`` gives one.

        Raises:
          WorkflowAlreadyStarted, TypeError, NotEncodable, PayloadTooLarge: as ``workflow.start``.
        """
        if not isinstance(workflow, Workflow):
            raise TypeError(f"an environment starts workflows (@durable.workflow), not {workflow!r}.")
        check_call(workflow.fn, workflow.name, args, kwargs)
        options = workflow.defaults
        payload = encode_call(args, kwargs, workflow.fn, workflow.name)
        told = _told(options)
        run = None
        if options.workflow_id is not None:
            run = self.place(options.workflow_id, options.id_conflict, options.id_reuse)
        if run is None:
            run_id = self.new_id()
            facts = options.facts()
            run = Run(
                self,
                workflow,
                options.workflow_id or run_id,
                run_id,
                payload,
                {} if facts is None else json.loads(facts),
                delay_ms=options.delay_ms,
                early=[] if told is None else [told],
            )
            if told is not None and told.type == UPDATE_REQUESTED:
                run.updates[(told.attributes or {})["update_id"]] = Update(run)
        elif told is not None and told.type == UPDATE_REQUESTED:
            post_update(self, run, told)
        elif told is not None:
            self.post(run, told)
        self.settle()
        handle = EnvironmentHandle(self, run.workflow_id, run.run_id, workflow)
        if told is not None:
            handle._update_id = (told.attributes or {}).get("update_id")
        return handle

    def run(self, workflow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Start a run and return its result, skipping time whenever everything waits.

        Raises:
          WorkflowFailed, WorkflowCancelled, WorkflowTerminated, WorkflowTimedOut: how it ended otherwise.
          Timeout: it waits for something that nobody will bring about, e.g. a signal.
          Nondeterminism: it cannot be replayed.
          as ``start``.
        """
        return self.start(workflow, *args, **kwargs).result()

    def advance(self, duration: Duration) -> None:
        """Let time pass, and everything happen that is due in it.

        Parameters:
          duration: seconds, a ``timedelta`` or text such as ``"3 days"``.
        """
        until = self.now_ms + parse_duration(duration)
        self.drive(until)
        self.now_ms = max(self.now_ms, until)

    def get_handle(self, workflow_id: str | None = None, run_id: str | None = None) -> EnvironmentHandle[Any]:
        """A handle of a run, e.g. of a child, as ``durable.get_handle`` gives one."""
        if workflow_id is None and run_id is None:
            raise ValueError("get_handle needs a workflow id or a run id")
        return EnvironmentHandle(self, workflow_id, run_id)

    def complete_activity(self, token: str, value: Any = None) -> None:
        """End an activity that waits for this token: what `durable.complete_activity` does elsewhere.

        Raises:
          UnknownToken: nobody waits for it (any more).
          NotEncodable, PayloadTooLarge: the value cannot be carried.
        """
        payload = encode(value, "the result of an activity")
        self._finish(token, lambda activity, digest: activity.complete(digest, payload))

    def fail_activity(self, token: str, exc: BaseException) -> None:
        """Let an activity that waits for this token fail: as `durable.fail_activity`.

        Raises:
          TypeError: it is no exception.
          UnknownToken: nobody waits for it (any more).
        """
        if not isinstance(exc, BaseException):
            raise TypeError(f"fail_activity takes an exception, like ValueError('declined'), not {exc!r:.60}")
        self._finish(token, lambda activity, digest: activity.fail(digest, exc))

    def _finish(self, token: str, end: Callable[[Any, bytes], bool]) -> None:
        run_id, seq, digest = _parsed(token)
        run = self._runs.get(str(uuid.UUID(bytes=run_id)))
        activity = None if run is None else run.activities.get(seq)
        if activity is None or not end(activity, digest):
            raise unknown_token()
        self.settle()

    # --- what runs and handles do ----------------------------------------------------------------------------

    def at(self, ms: int, act: Callable[[], None]) -> Entry:
        """Have something happen at a time, after whatever else is due then."""
        self._order += 1
        entry = Entry(ms, self._order, act)
        heapq.heappush(self._agenda, entry)
        return entry

    def post(self, run: Run, event: Event) -> None:
        """Have a run given an event."""
        self.at(self.now_ms, lambda: run.take(event))

    def turns_of(self, call: Callable[[], Any]) -> turns.Turns:
        """The turns of a call that may sleep."""
        made = turns.Turns(lambda: self.now_ms, call)
        self._turns = [*(one for one in self._turns if not one.ended), made]
        return made

    def settle(self) -> None:
        """Let everything happen that is due now; not while it is happening."""
        if not self._driving:
            self.drive(self.now_ms)

    def drive(self, until: int | None, ended: Callable[[], bool] = lambda: False) -> bool:
        """Let things happen, one after another, until a time or an end.

        Returns:
          bool: whether ``ended()``.

        Raises:
          DurableError: it is called by an activity, or by whatever else is happening.
        """
        if self._driving:
            raise DurableError(
                "inside of an activity nothing can be waited for in an Environment: it moves on when the activity ends."
            )
        self._driving = True
        agenda = self._agenda
        try:
            while not ended():
                while agenda and agenda[0].dropped:
                    heapq.heappop(agenda)
                if not agenda or (until is not None and agenda[0].at > until):
                    return False
                entry = heapq.heappop(agenda)
                self.now_ms = max(self.now_ms, entry.at)
                entry.act()
            return True
        finally:
            self._driving = False

    def mocked(self, name: str) -> Callable[..., Any] | None:
        """What is called instead of the activity or workflow of that name."""
        return self._mocks.get(name)

    def workflow_named(self, name: str, broker: Any) -> Workflow[Any, Any] | None:
        """The workflow of that name that a worker of the broker would run."""
        found: Workflow[Any, Any] | None = broker.workflows.get(name)
        return found

    def place(self, workflow_id: str, id_conflict: str, id_reuse: str) -> Run | None:
        """Make place for a run with an id; answers the live run that is to be used instead, if one is.

        Raises:
          WorkflowAlreadyStarted: the id is taken.
        """
        live = self.find(workflow_id, None)
        if live is None:
            return None
        if live.status == "running":
            if id_conflict == "use_existing":
                return live
            if id_conflict == "terminate_existing":
                live.end("terminated", "WorkflowTerminated", "another run took the workflow id")
                return None
        elif id_reuse == "allow" or (id_reuse == "allow_failed" and live.status != "completed"):
            return None
        raise WorkflowAlreadyStarted(
            f"a run with the workflow id {workflow_id!r} exists: choose another id, or another id_conflict or id_reuse."
        )

    def new_id(self) -> str:
        """A run id: the same in every run of the test."""
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def add(self, run: Run) -> None:
        self._runs[run.run_id] = run

    def find(self, workflow_id: str | None, run_id: str | None) -> Run | None:
        """The run with a run id; else the live one, or the latest one, with the workflow id."""
        if run_id is not None:
            return self._runs.get(run_id)
        runs = [run for run in self._runs.values() if run.workflow_id == workflow_id]
        return next((run for run in runs if run.status == "running"), runs[-1] if runs else None)

    def stepped(self, run: Run) -> None:
        """A run waits again; for tests of the engine itself."""

    def closed(self, run: Run) -> None:
        """A run has ended by its own code."""
        if self._replay:
            run.replayed()


def _told(options: WorkflowOptions) -> Event | None:
    """What a run is told with its start."""
    brought = _brought(Codecs(), options)
    if brought is None:
        return None
    type, key = brought["with_type"], brought["with_key"]
    facts = {"update_id": key} if type == UPDATE_REQUESTED else None
    return Event(0, type, 0, None, brought["with_name"], brought["with_payload"], facts)


def _name_of(what: Any) -> str:
    if isinstance(what, str):
        return what
    if isinstance(what, (Actor, ActivityStub)):
        return what.actor_name
    if isinstance(what, Workflow):
        return what.name
    raise TypeError(f"mocks are for activities, actors, stubs, workflows and their names, not for {what!r}.")


def _checked(what: Any, mock: Any) -> Callable[..., Any]:
    if not callable(mock):
        raise TypeError(f"the mock of {_name_of(what)!r} is a function, not {mock!r}: write lambda *args: ...")
    return mock  # type: ignore[no-any-return]
