"""How a worker takes runs forward: by the tasks that it is handed, and by the activities that end in it.

A step of a run is made in memory, on the thread that brought the news, and queued for the group commit together with
the end of the delivery that led to it: the outcome of an activity, the run's next step and the hand-out of its next
activity are one call in one transaction.  If the run went on elsewhere meanwhile, the step is refused, the run is
dropped from memory, and only the news is recorded: a task follows, and somebody loads the run anew.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg

from ..database import is_connection_lost, translate
from ..delivery import TASK_KINDS, Delivery, current_delivery
from ..errors import (
    CodecFailed,
    DatabaseUnavailable,
    DurableError,
    LeaseLost,
    Nondeterminism,
)
from ..incoming import delivery_of
from ..metrics.workflows import WorkflowCounts
from ..operations import (
    Ack,
    Advance,
    CompleteActivity,
    FailTask,
    Operation,
    Release,
    Reschedule,
    StartRun,
)
from ..operations.base import to_json
from ..settling import TASK_BACKOFF, backoff, text_of
from ..telemetry import TRACE
from ..telemetry.logs import fields
from . import events
from .answering import Answerer
from .attempts import left_unread
from .cache import CachedRun, RunCache
from .carrying import Carrier, now_ms
from .computing import computed
from .converter import encode_call
from .events import Event
from .info import Info, Parent
from .options import RUN
from .ordering import in_order
from .replay import Execution, Step

if TYPE_CHECKING:
    from ..broker import DurableBroker
    from .commands import Compute
    from .definition import Workflow

logger = logging.getLogger(__name__)

#: How soon a step that met another one comes again, in milliseconds.
REFUSED_BACKOFF = (5, 2_000)

#: Of how many events a replay takes so long that it is worth a second look at what is new.
LONG_HISTORY = 100


class _Slow(Exception):
    """The step comes to a local activity: an activity's outcome must not wait for it."""


class Runner:
    """Advances the runs of a broker."""

    def __init__(self, broker: DurableBroker) -> None:
        self.broker = broker
        self.cache = RunCache()
        self.counts = WorkflowCounts(broker.commit.metrics)
        self.carrier = Carrier(broker)
        self.answerer = Answerer(self)

    def advance_activity(self, delivery: Delivery, outcome: CompleteActivity) -> None:
        """An activity ended: if its run is in memory here, take the next step with it."""
        assert delivery.run_id is not None
        run = self.cache.peek(delivery.run_id)
        if run is None or run.computes or run.shared or delivery.exception is not None:
            self.broker.settler.commit_outcome(delivery, outcome)
            return
        with run.stepping():
            execution = run.execution
            # A copy that does not wait for it may be an old one: others took the run further.
            if execution is None or execution.closed or not execution.expects(delivery.seq or 0):
                self.broker.settler.commit_outcome(delivery, outcome)
                return
            try:
                event = Event(
                    0, outcome.type, now_ms(), delivery.seq, delivery.actor_name, outcome.payload, outcome.attributes
                )
                if self.broker.codecs:
                    event = self.broker.codecs.open(event)
                advance = self._step(delivery, run, execution, [event])
            except _Slow:
                # What is done is recorded before anything else is: from now on by itself, without trying.
                run.computes = True
                run.drop()
                self.broker.settler.commit_outcome(delivery, outcome)
                return
            except BaseException:
                logger.exception("the run %s could not take a step; it is loaded again", delivery.run_id)
                run.drop()
                self.broker.settler.commit_outcome(delivery, outcome)
                return
            self.counts.cached(run, execution.info.name)
            advance.then = lambda a: self._advanced(delivery, run, a, outcome)
            self.broker.settler.commit_outcome(delivery, advance)

    def entry(self, workflow: Workflow[Any, Any]) -> Callable[..., None]:
        """The function of the actor that carries a workflow's tasks.

        A plain message to it, as a pipeline or a callback sends one, starts a run.
        """

        def run_task(*args: Any, **kwargs: Any) -> None:
            delivery = current_delivery.get()
            if delivery is None or delivery.kind not in TASK_KINDS:
                self._start_from_message(workflow, delivery, args, kwargs)
            elif not delivery.settled:
                delivery.settled = True
                if delivery.kind == "q":
                    self.answerer.answer(workflow, delivery)
                else:
                    self._run_task(workflow, delivery)

        run_task.__name__ = run_task.__qualname__ = workflow.name
        return run_task

    def _start_from_message(
        self, workflow: Workflow[Any, Any], delivery: Delivery | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if delivery is None:
            raise DurableError(f"{workflow.name!r} is a workflow: start it with {workflow.name}.start(...)")
        run_id = uuid.uuid5(uuid.NAMESPACE_OID, delivery.message_id)
        payload = self.broker.codecs.encode(encode_call(args, kwargs, workflow.fn, workflow.name))
        options = delivery.options.get(RUN)
        if options is None:
            options = workflow.defaults.for_message()
        facts = options.get("facts")
        if (spans := self.broker.telemetry.spans()) is not None and (carrier := spans.carrier_of()):
            facts = {**(facts or {}), TRACE: carrier}
        self.broker.commit.submit(
            StartRun(
                run_id.bytes,
                options.get("workflow_id") or delivery.message_id[:200],
                self.broker.stream_id(workflow.queue_name),
                workflow.name,
                payload,
                options.get("id_conflict", "fail"),
                options.get("id_reuse", "allow"),
                options.get("delay_ms", 0),
                self.broker.codecs.seal_json(to_json(facts)),
            )
        )

    def _run_task(self, workflow: Workflow[Any, Any], delivery: Delivery) -> None:
        assert delivery.run_id is not None
        run = self.cache.get(delivery.run_id)
        with run.stepping():
            try:
                outcome = self._take_task(workflow, delivery, run)
            except (DatabaseUnavailable, LeaseLost) as e:
                logger.warning("the task of run %s goes back: %s", delivery.run_id, e)
                # It may have been given news that are not recorded now.
                run.drop()
                outcome = Release(delivery.key, delivery.lease)
            except BaseException as e:
                run.drop()
                outcome = self._failed_task(delivery, e)
            self.broker.settler.commit_outcome(delivery, outcome)

    def _failed_task(self, delivery: Delivery, error: BaseException) -> Operation:
        """The run stays open; the task comes again, and meanwhile shows why it failed."""
        self.counts.failed_task(delivery.actor_name, error)
        if isinstance(error, Nondeterminism):
            logger.error("run %s is nondeterministic: %s", delivery.run_id, error)
        else:
            logger.error("the task of run %s failed and is tried again", delivery.run_id, exc_info=error)
        text = text_of(error) or ""
        if not isinstance(error, CodecFailed):
            text = self.broker.codecs.encode_text(text) or ""
        return FailTask(delivery.key, delivery.lease, text, backoff(delivery, TASK_BACKOFF))

    def _take_task(self, workflow: Workflow[Any, Any], delivery: Delivery, run: CachedRun) -> Operation:
        """Bring the run up to date and give it what is new; answers the operation that ends the delivery."""
        waiting: list[tuple[int, Event]] = []
        committed = False
        execution = run.execution
        self.counts.cached(run, workflow.name)
        # A timer that the run in memory does not expect may be one that it has not come to: others took it further.
        if execution is None or run.shared or delivery.kind != "w" or not execution.expects(delivery.seq or 0):
            loaded = self._load(workflow, delivery, run)
            if loaded is None:
                self.cache.forget(str(delivery.run_id))
                return Ack(delivery.key, delivery.lease)
            execution, waiting, committed = loaded
            # A run must not close over signals that its code has not seen: they come before what may end it.
            # What an earlier step took, whose commit may be under way, is not taken again.
            run.taken.intersection_update([inbox_id for inbox_id, _ in waiting])
            waiting = [item for item in waiting if item[0] not in run.taken]
            if delivery.kind == "t" and (wait := _not_yet(waiting)):
                # It has not come to its first step; who cancels it does not wait for that.
                run.drop()
                return Reschedule(delivery.key, delivery.lease, wait)
        if delivery.kind == "w":
            assert delivery.seq is not None
            if execution.expects(delivery.seq):
                # Messages come in any order, timers fire in theirs: with this one all that are due before it.
                # Whoever has answered an escalation was first: it does not time out.
                answered = {e.seq for _, e in waiting if e.type in events.ESCALATION_ANSWERS}
                due = [seq for seq in execution.timers_until(delivery.seq) if seq not in answered]
                waiting += [(0, Event(0, execution.due(seq), now_ms(), seq)) for seq in due]
        if not execution.closed and not any(event.type == events.WORKFLOW_RESET for _, event in waiting):
            waiting += [(0, self._computed(c, execution)) for c in execution.computations()]
        # Asked for several times, and not yet told: the code is cancelled once, its cleanup is not.
        cancels = [item for item in waiting if item[1].type == events.CANCEL_REQUESTED]
        news = in_order([item for item in waiting if item not in cancels[1:]])
        if not execution.begun and all(event.type == events.UPDATE_REQUESTED for _, event in news):
            # Its interceptors wait for something before the code begins: so does an update.
            run.taken.difference_update(inbox_id for inbox_id, _ in news)
            news = []
        if not news or execution.closed:
            if committed:
                return Ack(delivery.key, delivery.lease)
            # What this is about went with a step that is on its way, and may be refused: it took what was in the inbox,
            # or does not wait for this timer any more.  This delivery goes with it, and comes again where it is not
            # recorded.
            advance = self._step(delivery, run, execution, [])
            advance.then = lambda a: self._advanced(delivery, run, a, None)
            return advance
        run.taken.update(inbox_id for inbox_id, _ in waiting if inbox_id)
        advance = self._step(delivery, run, execution, [event for _, event in news])
        # What a run that continues as new was not given any more is for the next one.
        handed_on = advance.close == "continued_as_new"
        given = advance.given if handed_on else len(news)
        left = advance.left if handed_on or advance.close is None else ()
        kept = [news[position - 1][0] for position in left]
        run.taken.difference_update(kept)
        advance.inbox = [i for i, _ in news[:given] + cancels[1:] if i and i not in kept]
        advance.then = lambda a: self._advanced(delivery, run, a, None)
        return advance

    def _load(
        self, workflow: Workflow[Any, Any], delivery: Delivery, run: CachedRun
    ) -> tuple[Execution, list[tuple[int, Event]], bool] | None:
        """The run's execution, brought up to date, what is in its inbox, and whether all of its steps are committed;
        None when there is nothing to do."""
        token = self.broker.commit.context.worker
        if token is None:
            raise LeaseLost("this worker is not registered")
        known = run.execution.last_event_id if run.execution is not None else 0
        procedures = self.broker.procedures
        with self.broker.database.connection() as conn:
            try:
                row = procedures.run_of_lease(conn, token, delivery.key, delivery.lease)
                if row is None or row[4] != "running":
                    run.drop()
                    return None
                history, inbox = procedures.history_of_lease(conn, token, delivery.key, delivery.lease, known)
                # Another worker took it further.
                run.shared = run.execution is not None and bool(history)
                if run.shared and not run.recorded:
                    # What is in memory may be ahead of its own unfinished commit.
                    run.drop()
                    history, inbox = procedures.history_of_lease(conn, token, delivery.key, delivery.lease, 0)
                # The run may have gone on, and closed, between the two looks.
                while history and history[-1].event_id > row[6]:
                    history.pop()
            except psycopg.Error as e:
                if is_connection_lost(e, conn):
                    raise DatabaseUnavailable(str(e).strip()) from e
                if token is not self.broker.commit.context.worker:
                    raise DatabaseUnavailable("the worker got a new token meanwhile") from e
                raise translate(e) from e
        if run.execution is None:
            run.info = info_of(row)
            run.execution = execution = self._new(workflow, row)
            if len(history) == 1 and row[9] and self._asks_nothing(execution, history):
                # Its first step is made, and nothing of it is in the history but this.
                self.counts.replayed(workflow.name, 1)
            elif len(history) == 1:
                if execution.evicted:
                    run.execution = execution = self._new(workflow, row)
                # A new run: its first event was stored by whoever started it, its first step is made now.
                left = left_unread(self.answerer, workflow, execution.info, history[0])
                inbox[:0] = [(0, event) for event in (history[0], *left)]
            else:
                self._recall(delivery, history)
                self.counts.replayed(workflow.name, len(history))
                execution.replay(history, more=any(event.type == events.WORKFLOW_RESET for _, event in inbox))
        elif history:
            self._recall(delivery, history)
            self.counts.replayed(workflow.name, len(history))
            run.execution.replay(history)
        if len(history) > LONG_HISTORY:
            # Meanwhile others may have taken it further.
            return self._load(workflow, delivery, run)
        committed = run.recorded and run.execution.last_event_id == row[6]
        return run.execution, inbox, committed

    def _new(self, workflow: Workflow[Any, Any], row: tuple[Any, ...]) -> Execution:
        return Execution(
            workflow.fn,
            info_of(row),
            deadlock_timeout=self.broker.settings.deadlock_timeout,
            interceptors=self.broker.interceptors,
        )

    def _asks_nothing(self, execution: Execution, history: list[Event]) -> bool:
        """Bring back a run of which there is nothing but its start; answers whether its first step asks for nothing.

        If it does ask for something, that step was not made, as where its task was purged, or by other code.
        """
        try:
            execution.replay(history)
        except Nondeterminism:
            execution.evict()
            return False
        return True

    def _step(self, delivery: Delivery, run: CachedRun, execution: Execution, news: list[Event]) -> Advance:
        """Apply events one by one, and gather what came out as one operation."""
        expected = execution.last_event_id
        # Updates that came before the code has begun wait for it, where its interceptors wait for something first.
        early: list[Event] = []
        waits = not execution.begun and expected > 0
        spans = self.broker.telemetry.spans()
        advance = Advance(delivery.key, delivery.lease, uuid.UUID(str(delivery.run_id)).bytes, expected)
        try:
            for position, event in enumerate(news, 1):
                more = bool(early) or (position < len(news) and news[position].type in events.PRECEDES_END)
                advance.given += 1
                if event.type in events.TIMER_ENDS:
                    assert event.seq is not None
                    if not execution.expects(event.seq):
                        continue  # what came before it has cancelled it
                    if event.seq != delivery.seq:
                        advance.drops.append(event.seq)
                if spans is not None:
                    execution.traced = []
                if event.type != events.UPDATE_REQUESTED:
                    step = execution.step(event, more, now_ms())
                elif execution.begun:
                    step = self._admit(event, execution, more)
                else:
                    early.append(event)
                    advance.left.add(position)
                    step = Step([], [])
                if early and execution.begun:
                    news += early
                    early = []
                elif early:
                    late = execution.close_late()
                    step = Step(step.events + late.events, step.commands + late.commands)
                if spans is not None:
                    spans.note(advance, execution, step)
                # The first event is stored already: only its commands are new.
                if event.event_id == 1:
                    advance.expected = 1
                advance.events += step.events[1:] if event.event_id == 1 else step.events
                for command in step.commands:
                    refused = self.carrier.carry_out(command, advance, execution)
                    if refused is not None and not execution.closed:
                        news.append(refused)
                if execution.closed:
                    break
                if event.type == events.WORKFLOW_RESET:
                    # The news that follows may answer what is to be computed.
                    news += self.carrier.carry_on(event, news, advance, execution)
                    continue
                for asked in execution.computations():
                    if asked.slow and delivery.kind == "a":
                        raise _Slow
                    news.append(self._computed(asked, execution))
            if execution.begun:
                advance.left.clear()
                if waits and not execution.closed:
                    advance.sends.append(self.carrier.task(execution))
            if self.broker.codecs:
                advance.events = [self.broker.codecs.seal(event) for event in advance.events]
        except BaseException:
            self._unreserve(advance)
            raise
        advance.last = execution.last_event_id
        advance.before, run.latest = run.latest, advance
        return advance

    def _computed(self, command: Compute, execution: Execution) -> Event:
        spans = self.broker.telemetry.spans()
        if spans is None or not command.slow:
            return computed(command)
        return spans.computing(command, execution, computed)

    def _recall(self, delivery: Delivery, history: list[Event]) -> None:
        spans = self.broker.telemetry.spans()
        if spans is not None and spans.debug:
            spans.recall(str(delivery.run_id), history)

    def _admit(self, event: Event, execution: Execution, more: bool) -> Step:
        """Give the code an update, or have it rejected: then there is no event, and the advance only says so."""
        failure = execution.handlers.refusal(event)
        if failure is None:
            return execution.step(event._replace(type=events.UPDATE_ACCEPTED), more, now_ms())
        attributes = {**(event.attributes or {}), "failure": failure}
        rejected = Event(0, events.UPDATE_REJECTED, event.at, None, event.name, None, attributes)
        late = Step([], []) if more else execution.close_late(now_ms())
        return Step([rejected, *late.events], late.commands)

    def _unreserve(self, advance: Advance) -> None:
        claimer = self.broker.claimer
        reserved = sum(s.eager for s in advance.sends)
        if claimer is not None and reserved:
            claimer.unreserve(reserved)

    def _advanced(self, delivery: Delivery, run: CachedRun, advance: Advance, outcome: CompleteActivity | None) -> None:
        """A step was committed, or refused."""
        claimer = self.broker.claimer
        self._unreserve(advance)
        advance.before = None
        self.counts.advanced(run.info, advance)
        if advance.answer == "ok" and advance.error is None:
            self._hand_out(delivery, advance)
            if advance.trace is not None:
                advance.trace.committed()
            if advance.close is not None:
                self._warn_of_unfinished(run)
                self.cache.forget(str(delivery.run_id))
                run.give_up()
            elif claimer is not None and any(s.kind == "l" or s.seq not in advance.eager for s in advance.sends):
                claimer.wake()
            # The run remembers its latest step, but not what was in it.
            advance.events, advance.sends, advance.children = [], [], []
            return
        if advance.error is not None:
            logger.error("a step of run %s failed: %s", delivery.run_id, advance.error, extra=fields(delivery))
        run.give_up()
        advance.trace = None
        if advance.answer == "stale" and advance.error is None:
            if not advance.retried:
                logger.warning("the lease on %s was given to another worker: its step is not recorded", delivery)
            return
        follow_up: Operation
        if isinstance(advance.error, LeaseLost):
            return
        if advance.error is not None and outcome is None:
            why = advance.error if isinstance(advance.error, DurableError) else DurableError(str(advance.error))
            follow_up = self._failed_task(delivery, why)
        elif outcome is not None:
            # The news itself is recorded; a task follows, and the run is loaded.
            follow_up = outcome
        else:
            follow_up = Reschedule(delivery.key, delivery.lease, backoff(delivery, REFUSED_BACKOFF))
        self.broker.settler.post_instead(delivery, follow_up)

    def _warn_of_unfinished(self, run: CachedRun) -> None:
        execution = run.execution
        if execution is not None and execution.handlers.unfinished:
            logger.warning(
                "the run %s of %s ended while handlers were at work: %s. Let the code await "
                "durable.wait_condition(durable.all_handlers_finished) before it ends",
                execution.run_id,
                execution.workflow_id,
                ", ".join(execution.handlers.unfinished),
            )

    def _hand_out(self, delivery: Delivery, advance: Advance) -> None:
        """Deliver the activities that were leased to this worker as they were stored."""
        claimer = self.broker.claimer
        if claimer is None:
            return
        for send in advance.sends:
            lease = advance.eager.get(send.seq)
            if lease is None:
                continue
            key = events.command_id(str(delivery.run_id), send.seq)
            row = (key, lease, send.stream_id, "a", advance.run_id, send.seq, 1, False, send.actor, send.payload)
            handed = delivery_of(self.broker, row)
            if handed is not None:
                self.broker.commit.metrics.handed(send.stream_id)
                claimer.take(handed)


def info_of(row: tuple[Any, ...]) -> Info:
    run_id, workflow_id, name, queue_name, _, started_at, _, parent_run_id, parent_workflow_id = row[:9]
    parent = None
    if parent_run_id is not None:
        parent = Parent(parent_workflow_id or "", str(uuid.UUID(bytes=parent_run_id)))
    return Info(
        workflow_id=workflow_id,
        run_id=str(uuid.UUID(bytes=run_id)),
        name=name,
        queue_name=queue_name,
        started_at=datetime.fromtimestamp(started_at / 1000, UTC),
        parent=parent,
    )


def _not_yet(waiting: list[tuple[int, Event]]) -> int:
    """In how many milliseconds the run takes its first step, if it has not, and may not now."""
    if not waiting or waiting[0][1].type != events.WORKFLOW_STARTED:
        return 0
    if any(event.type == events.CANCEL_REQUESTED for _, event in waiting):
        return 0
    return max(0, waiting[0][1].at - now_ms())
