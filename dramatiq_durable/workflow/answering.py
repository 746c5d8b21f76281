"""Answers queries: from a run that is in memory and as history says, or from one that is brought back for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import psycopg

from ..database import is_connection_lost, translate
from ..delivery import Delivery
from ..errors import CodecFailed, DatabaseUnavailable, LeaseLost, Nondeterminism, PayloadTooLarge
from ..operations import Ack, AnswerQuery, Operation, Release, Reschedule
from ..settling import backoff
from .events import Event
from .failures import failure_to_json
from .handlers import STACK
from .replay import Execution

if TYPE_CHECKING:
    from .cache import CachedRun
    from .definition import Workflow
    from .info import Info
    from .runner import Runner

logger = logging.getLogger(__name__)

#: How soon a query comes again that found its run in the middle of something, in milliseconds.
LOOK_AGAIN = (3, 500)

#: So often it waits for a step that is under way; then it is answered with what is committed.
LOOKS = 7

#: How long it waits for whoever is stepping the run in this process, in seconds.
PATIENCE = 0.1

#: How the database ends runs by itself: no code has asked for these.
_ENDED_FROM_OUTSIDE = ("WorkflowTerminated", "WorkflowTimedOut")


class Answerer:
    """Answers the queries that this worker is handed."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.broker = runner.broker

    def answer(self, workflow: Workflow[Any, Any], delivery: Delivery) -> None:
        """Answer the query of a delivery, or have it come again soon."""
        assert delivery.run_id is not None
        run = self._runner.cache.get(delivery.run_id)
        with run.looking(PATIENCE) as held:
            try:
                outcome = self._ask(workflow, delivery, run) if held else self._later(delivery)
            except (DatabaseUnavailable, LeaseLost) as e:
                logger.warning("a query of the run %s goes back: %s", delivery.run_id, e)
                outcome = Release(delivery.key, delivery.lease)
            except Exception as e:
                outcome = self._answer(delivery, None, failure_to_json(e, retryable=False))
        self.broker.settler.commit_outcome(delivery, outcome)

    def _ask(self, workflow: Workflow[Any, Any], delivery: Delivery, run: CachedRun) -> Operation:
        found = self._read(delivery)
        if found is None:
            # The run is gone, or nobody waits for the answer any more.
            return Ack(delivery.key, delivery.lease)
        row, name, payload, pending, begun = found
        status, last_event = row[4], row[6]
        live = status == "running"
        if live and (not begun or (pending and delivery.attempt <= LOOKS)):
            # It has not begun; or what was said to it before the query is still to be given to it.
            return self._later(delivery)
        execution = run.execution
        if execution is not None and (not run.recorded or execution.last_event_id != last_event or execution.closed):
            if live and delivery.attempt <= LOOKS:
                return self._later(delivery)
            execution = None
        keep = execution is not None
        if execution is None:
            from .runner import info_of

            history = [e for e in self._history(delivery) if e.event_id <= last_event]
            execution = self.bring_back(workflow, info_of(row), history, keep=not live)
            if live and run.execution is None:
                run.execution, keep = execution, True
        if live and not execution.begun and name != STACK:
            # Its interceptors wait for something before the code begins, which has the handlers.
            if not keep:
                execution.evict()
            return self._later(delivery)
        codecs = self.broker.codecs
        answer, failure = execution.handlers.query(name, codecs.decode(payload, f"the arguments of the query {name!r}"))
        if not keep:
            execution.evict()
            if not live:
                self._runner.cache.forget(str(delivery.run_id))
        elif execution.tainted:
            run.drop()
        return self._answer(delivery, answer, failure)

    def _answer(self, delivery: Delivery, value: bytes | None, failure: dict[str, Any] | None) -> Operation:
        codecs = self.broker.codecs
        try:
            value = codecs.encode(value, "the answer to a query")
            if failure is not None:
                failure = (codecs.seal_facts({"failure": failure}) or {})["failure"]
        except (CodecFailed, PayloadTooLarge) as e:
            # It tells nothing of the values.
            value, failure = None, failure_to_json(e, retryable=False)
        return AnswerQuery(delivery.key, delivery.lease, value, failure)

    def _later(self, delivery: Delivery) -> Operation:
        return Reschedule(delivery.key, delivery.lease, backoff(delivery, LOOK_AGAIN))

    def bring_back(
        self, workflow: Workflow[Any, Any], info: Info, history: list[Event], keep: bool = False
    ) -> Execution:
        """A run as its history says, also one that was ended from outside; ``keep``: as for Execution.

        Raises:
          as Execution.replay.
        """
        if history and history[-1].type in _ENDED_FROM_OUTSIDE:
            history.pop()
        execution = Execution(
            workflow.fn,
            info,
            interceptors=self.broker.interceptors,
            deadlock_timeout=self.broker.settings.deadlock_timeout,
            keep=keep,
        )
        try:
            if len(history) == 1:
                # Nothing was asked for in its first step; or it was ended before that.
                execution.is_replaying = True
                execution.apply(history[0])
                execution.is_replaying = False
            else:
                execution.replay(history)
        except BaseException as e:
            execution.evict()
            if isinstance(e, Nondeterminism):
                e.add_note("The run could not be brought back from its history.")
            raise
        return execution

    def _read(self, delivery: Delivery) -> tuple[tuple[Any, ...], str, bytes, bool, bool] | None:
        def read(conn: Any, token: Any) -> tuple[tuple[Any, ...], str, bytes, bool, bool] | None:
            procedures = self.broker.procedures
            asked = procedures.query_of_lease(conn, token, delivery.key, delivery.lease)
            row = None if asked is None else procedures.run_of_lease(conn, token, delivery.key, delivery.lease)
            return None if asked is None or row is None else (row, *asked)

        return self.as_worker(read)  # type: ignore[no-any-return]

    def _history(self, delivery: Delivery) -> list[Event]:
        return self.as_worker(  # type: ignore[no-any-return]
            lambda conn, token: self.broker.procedures.history_of_lease(conn, token, delivery.key, delivery.lease, 0)[0]
        )

    def as_worker(self, read: Any) -> Any:
        """Have something read from the database: a function of a connection and this worker's token."""
        token = self.broker.commit.context.worker
        if token is None:
            raise LeaseLost("this worker is not registered")
        with self.broker.database.connection() as conn:
            try:
                return read(conn, token)
            except psycopg.Error as e:
                if is_connection_lost(e, conn) or token is not self.broker.commit.context.worker:
                    raise DatabaseUnavailable(str(e).strip()) from e
                raise translate(e) from e
