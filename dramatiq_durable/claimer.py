"""The thread of a worker process that talks to the database: it commits for everybody, and claims for all streams.

It claims only what the process's threads can take, plus what they are sure to finish within a few hundredths of a
second; what it claimed and they do not get to is given back.  While there is nothing, it waits to be woken, and looks
by itself once every poll interval: notifications are an optimisation, polling is the truth.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psycopg
from dramatiq.common import iter_queue

from .arrays import Uuid
from .database import Connection
from .delivery import ALARM, DEADLINE, TASK_KINDS, TICK, Delivery
from .errors import DatabaseUnavailable, DurableError, LeaseLost, NotPermitted
from .group_commit import GroupCommit
from .leases import Membership
from .operations import Claim, Operation, Release
from .pace import Pace
from .reporting import Reports

if TYPE_CHECKING:
    from dramatiq import Worker

    from .consumer import DurableConsumer

logger = logging.getLogger(__name__)

#: How long finished messages may wait for company before they are committed, in seconds.
LINGER = 0.004

#: From so many messages of a claim on, the next claim is sent before they are handed over: see `_next_claim_first`.
MANY = 64


class Claimer(threading.Thread):
    """Commits and claims for a worker process until it is stopped.

    Parameters:
      commit(GroupCommit): what it leads.
      membership(Membership): this process as a worker.
      deliver(Callable): makes a delivery of a claimed row; None if there is nothing to deliver.
      registered(Callable): called with this worker's number once it has one; it has `look_after` called when the worker
        is told to.
      poll_interval(float): seconds between two looks without a wake-up.

    Attributes:
      threads(int): how many actors can run at once; 0 when the consumers are not driven by a Worker.
      pace(Pace): how many messages are claimed ahead of the threads.
    """

    def __init__(
        self,
        commit: GroupCommit,
        membership: Membership,
        deliver: Callable[[tuple[Any, ...]], Delivery | None],
        registered: Callable[[int], None],
        *,
        poll_interval: float,
    ) -> None:
        super().__init__(name="dramatiq-durable-claimer", daemon=True)
        self.commit = commit
        self.membership = membership
        self.deliver = deliver
        self.registered = registered
        self.poll_interval = poll_interval
        #: Every Worker of this process; the latest drives the consumers.
        self.workers: list[Worker] = []
        self.worker: Worker | None = None
        self.threads = 0
        self.consumers: dict[int, DurableConsumer] = {}
        #: What this process has leased, by lease token.
        self.held: dict[bytes, Delivery] = {}
        self.pace = Pace()
        self.reports = Reports(membership, self._as_worker, poll_interval)
        self._done: deque[bytes] = deque()
        #: Rows that were claimed and are not handed over yet; only this thread knows of them.
        self._coming: deque[tuple[Any, ...]] = deque()
        self._reserved = 0
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._asleep = False
        #: It is woken when no more than so many messages are left of those that were handed over.
        self._wake_at = 0
        #: Where there may be something to claim: on streams of runs (True), on the others (False).
        self._more = {True, False}
        self._known_streams: list[int] = []
        self._registered_wait = False
        self._second_look = False
        self._next_look = 0.0
        self._looks = 0
        self._draining = False
        self._stop_by: float | None = None

    # --- for other threads ------------------------------------------------------------------------------

    def serve(self, worker: Worker) -> None:
        """A Worker of Dramatiq's drives the consumers from now on, instead of one that did so before."""
        self.workers.append(worker)
        self._follow(worker)

    def leave(self, worker: Worker) -> None:
        """A Worker stops: where there was another one, that has its streams again; else nothing more is claimed."""
        if self.serves_others(worker):
            self.workers = [each for each in self.workers if each is not worker]
            self._follow(self.workers[-1])
        else:
            self.drain()

    def serves_others(self, worker: Worker) -> bool:
        """Whether another Worker than this one is there."""
        return any(each is not worker for each in self.workers)

    def _follow(self, worker: Worker) -> None:
        self.worker = worker
        self.threads = worker.worker_threads

    def wake(self) -> None:
        """Something may be there to claim."""
        self._more = {True, False}
        self._event.set()

    def look_after(self) -> None:
        """Something that runs here may have been aborted."""
        self.reports.told = True
        self._event.set()

    def expect(self, stream_id: int) -> None:
        """The next batch brings a message to this stream: where it is consumed here, the same batch claims it."""
        consumer = self.consumers.get(stream_id)
        if consumer is not None:
            self._more.add(consumer.of_runs)

    def urge(self) -> None:
        """Somebody waits for a commit."""
        self._event.set()

    def post(self, operation: Operation) -> None:
        """Commit an operation with the next batch, which is soon; nobody waits for it."""
        self.commit.post(operation)
        # While there is other work to do, finished messages may wait a little for company.
        if self._asleep and len(self.held) <= self._wake_at:
            self._asleep = False
            self._event.set()

    def finished(self, delivery: Delivery) -> None:
        """A delivery was settled (its operation is posted): its place is free."""
        if self._let_go(delivery):
            self.pace.finished += 1

    def _let_go(self, delivery: Delivery) -> bool:
        if self.held.pop(delivery.lease, None) is None:
            return False
        self._done.append(delivery.key)
        return True

    def post_instead(self, delivery: Delivery, operation: Operation) -> None:
        """What was to settle a delivery was refused: another operation has to, with the next batch.

        The claim that has told of the delivery as finished found it still leased: the next one tells of it again.
        """
        self.post(operation)
        self._done.append(delivery.key)

    def reserve(self, stream_id: int, *, swap: bool) -> bool:
        """Take a place for an eager delivery.  Only for a stream that this worker consumes and whose last claim left
        nothing waiting: an eager delivery overtakes nobody.

        Parameters:
          swap(bool): it takes the place of the delivery that is being finished, so that there always is one.
        """
        consumer = self.consumers.get(stream_id)
        if consumer is None or not consumer.drained or self._draining:
            return False
        if self.fixed and self._room_on(consumer) <= 0:
            return False
        with self._lock:
            if not swap and self._free() <= 0:
                return False
            self._reserved += 1
            return True

    def unreserve(self, places: int) -> None:
        """Eager deliveries have arrived, or will not."""
        with self._lock:
            self._reserved -= places

    def take(self, delivery: Delivery) -> None:
        """Hand a delivery to its stream's consumer."""
        self.held[delivery.lease] = delivery
        consumer = self.consumers.get(delivery.stream_id)
        if consumer is None or self._draining:
            # It was closed, or everything ends, while the delivery was on its way.
            self.give_back(delivery)
        else:
            consumer.offer(delivery)

    @property
    def draining(self) -> bool:
        """Whether the worker is being stopped."""
        return self._draining

    @property
    def fixed(self) -> bool:
        """Whether each consumer is given as many messages as its prefetch says, and keeps them: no Worker drives it, or
        the user has told Dramatiq how many to prefetch."""
        # What Dramatiq would prefetch unasked.
        return self.worker is None or self.worker.queue_prefetch != min(self.threads * 2, 65535)

    def capacity(self) -> int:
        """How many messages this process may hold now."""
        if self.fixed:
            return sum(c.prefetch for c in list(self.consumers.values()))
        return self.threads + self.pace.ahead

    # --- the thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        self.commit.lead_with(self.urge)
        self.commit.on_reconnect = self._reconnected
        self.commit.meanwhile = self._hand_over
        try:
            while self._stop_by is None or (self.commit.pending and not self._given_up()):
                try:
                    self._turn()
                except DatabaseUnavailable as e:
                    logger.warning("the database is away: %s", e)
                    if self._given_up():
                        break
                    # What has come is leased to this worker: nobody else may run it.
                    self._hand_over()
                    time.sleep(0.2)
                except NotPermitted as e:
                    # What it was granted can change.
                    logger.error("this worker is given nothing: it may not consume its queues. %s", e)
                    if self._given_up():
                        break
                    self._event.wait(5.0)
                    self._event.clear()
                except Exception:
                    # This thread must not die: without it the worker would hold its messages for ever.
                    logger.exception("the claimer failed, going on")
                    time.sleep(1.0)
            self._leave()
        finally:
            self.commit.lead_with(None)
            self.commit.on_reconnect = None
            self.commit.meanwhile = None
            if self.commit.pending:
                self.commit.run_batch(give_up=self._given_up)

    def _turn(self) -> None:
        self.pace.measure(self.threads)
        if self.membership.token is not None and self.membership.due_in() <= 0:
            self._beat()
        if self.reports.due():
            self._report()
        claims = self._plan()
        if claims or self.commit.due_in() <= 0:
            self.commit.run_batch(*claims, give_up=self._given_up)
        if claims:
            self._arrived(claims)
        if not self._next_claim_first():
            self._hand_over()
        self._give_back_stale()
        self._sleep()

    def _sleep(self) -> None:
        # While nothing is to be claimed, the wake-ups that ask for a claim stay unanswered.
        kinds = [of_runs for of_runs in (True, False) if self._second_look or of_runs in self._more]
        wanted = any(self._room(of_runs) > 0 for of_runs in kinds)
        if wanted and self.consumers and not self._resting():
            return
        now = time.monotonic()
        until = now + self.poll_interval
        if self.membership.token is not None:
            until = min(until, now + max(self.membership.due_in(), 0.0))
        if self._free() > 0 and self.consumers and not self._resting():
            until = min(until, self._next_look)
        self._wake_at = max(self.threads, self.capacity() // 2 - len(self._coming), 1)
        self._asleep = True
        due_in = self.commit.due_in()
        if due_in <= 0:
            # With a waiting caller, or with idle threads, the commit is due at once.
            if self.commit.urgent or len(self.held) <= self.threads // 2:
                self._asleep = False
                return
            due_in = LINGER
        self._event.wait(max(min(until - now, due_in), 0.0))
        self._event.clear()
        self._asleep = False

    def _free(self) -> int:
        return self.capacity() - len(self.held) - len(self._coming) - self._reserved

    def _room(self, of_runs: bool) -> int:
        """How many messages are worth a claim.

        Idle threads always count, the places ahead are filled by halves.  Tasks of runs have room of their own beside
        that: they are short, and slow activities must not hold up all workflows.
        """
        kinds = {c.of_runs for c in list(self.consumers.values())}
        if of_runs not in kinds:
            return 0
        free = self._free()
        if not self.fixed:
            half = self.capacity() // 2
            if len(self.held) + len(self._coming) >= max(self.threads, 1) and free < half:
                free = 0
            free = min(free, max(half, self.threads))
        if of_runs:
            kinds_held = [d.kind for d in list(self.held.values())] + [row[3] for row in self._coming]
            free = max(free, 0) + self.threads - sum(kind in TASK_KINDS for kind in kinds_held)
        return free

    def _room_on(self, consumer: DurableConsumer) -> int:
        """How many more messages a consumer may be given whose prefetch is kept."""
        return consumer.prefetch - sum(d.stream_id == consumer.stream_id for d in list(self.held.values()))

    def _resting(self) -> bool:
        """Whether nothing is to be claimed: the worker is stopping, or paused."""
        return self._draining or (
            self.worker is not None and all(c.paused for c in list(self.worker.consumers.values()))
        )

    def _plan(self) -> list[Claim]:
        if not self.consumers or self._resting() or not self._join():
            return []
        now = time.monotonic()
        everywhere = self._second_look or not self._registered_wait or now >= self._next_look
        claims = []
        for of_runs in (True, False):
            if everywhere or of_runs in self._more:
                claim = self._claim(of_runs, self._room(of_runs))
                if claim is not None:
                    self._more.discard(of_runs)
                    claims.append(claim)
        if claims:
            claims[-1].done = [self._done.popleft() for _ in range(len(self._done))]
        return claims

    def _claim(self, of_runs: bool, total: int) -> Claim | None:
        if total <= 0:
            return None
        streams, limits = [], []
        # The stream that was not looked at for longest comes first, so that a total that is used up goes round.
        for stream_id, consumer in sorted(self.consumers.copy().items(), key=lambda item: item[1].turn):
            limit = min(total, self._room_on(consumer)) if self.fixed else total
            if consumer.of_runs is of_runs and limit > 0:
                streams.append(stream_id)
                limits.append(limit)
        return Claim(streams, limits, total, [], self._wait_time(), of_runs) if streams else None

    def _wait_time(self) -> int:
        return int(max(10.0, 4 * self.poll_interval) * 1000)

    def _arrived(self, claims: list[Claim]) -> None:
        now = time.monotonic()
        self._next_look = now + self.poll_interval
        registered = self._registered_wait
        failed: BaseException | None = None
        for claim in claims:
            if claim.error is not None:
                self._done.extendleft(claim.done)
                self._more = {True, False}
                if isinstance(claim.error, LeaseLost):
                    self._declared_dead()
                    return
                failed = claim.error
                # What the others brought is leased: it is handed over all the same.
                continue
            rows, next_due = claim.answer
            self._take_stock(claim, rows)
            # A claim that brought something has cleared the wish to be woken; where it took all, the next sets it.
            self._registered_wait = not rows
            if len(rows) >= claim.total:
                self._more.add(claim.of_runs)
            if next_due is not None:
                self._next_look = min(self._next_look, now + max(next_due, 1) / 1000)
        # A message that was stored while the wish to be woken was being committed is found by a second look.
        self._second_look = self._registered_wait and not registered
        if failed is not None:
            self._hand_over()
            raise failed

    def _take_stock(self, claim: Claim, rows: list[tuple[Any, ...]]) -> None:
        """Note what a claim has brought, and what that says of its streams."""
        counts = dict.fromkeys(claim.streams, 0)
        if rows:
            self.pace.claimed()
            self.commit.metrics.claimed(rows)
            self._coming.extend(rows)
        for row in rows:
            # A tick takes nobody's place.
            counts[row[2]] += row[3] not in (TICK, ALARM, DEADLINE)
        left = claim.total
        for stream_id, limit in zip(claim.streams, claim.limits, strict=True):
            consumer = self.consumers.get(stream_id)
            # What was not looked at, because those before it took all, keeps what is known of it.
            if consumer is not None and left:
                self._looks += 1
                consumer.turn = self._looks
                consumer.drained = counts[stream_id] < min(limit, left)
            left -= counts[stream_id]

    def _next_claim_first(self) -> bool:
        """Whether what has come waits until the next claim is sent, to be handed over while that is answered.

        So neither side waits for the other: this thread, once the others have all that they can do, would come to send
        a claim only when they are done.  Nobody is kept waiting by it: as long as the others have work.
        """
        if len(self._coming) < MANY or self.fixed or self._resting():
            return False
        return any(self._room(of_runs) > 0 for of_runs in self._more) or len(self.held) > self.threads

    def _hand_over(self) -> None:
        """Give the consumers what has come.  On this thread alone: another may still lead while it begins."""
        if threading.current_thread() is not self:
            return
        while self._coming:
            row = self._coming.popleft()
            delivery = self.deliver(row)
            if delivery is not None:
                self.take(delivery)
            else:
                self._done.append(row[0])

    def _join(self) -> bool:
        """Register, or say which streams are consumed now."""
        streams = sorted(self.consumers)
        if self.membership.token is None:
            token = self.commit.call(lambda conn: self.membership.register(conn, streams, max(self.threads, 1)))
            self.commit.context.worker = Uuid(token)
            self.registered(self.membership.worker_id)
        elif streams != self._known_streams:
            self._as_worker(lambda conn, token: self.membership.procedures.consume_streams(conn, token, streams))
        self._known_streams = streams
        return True

    def _beat(self) -> None:
        try:
            self._as_worker(lambda conn, _: self.membership.beat(conn, self._holding()))
        except LeaseLost:
            self._declared_dead()

    def _report(self) -> None:
        try:
            self.reports.report(self.held)
        except LeaseLost:
            self._declared_dead()

    def _as_worker(self, call: Callable[[Connection, bytes], Any]) -> Any:
        """Make a call with this worker's token: a connection that has to be made anew brings a new one."""

        def with_token(conn: Connection) -> Any:
            if self.membership.token is None:
                raise DatabaseUnavailable("this worker has to register again")
            return call(conn, self.membership.token)

        return self.commit.call(with_token)

    def _declared_dead(self) -> None:
        logger.error(
            "this worker was declared dead after %.0f s of silence: the %d messages that it held were handed to "
            "others. It registers again",
            self.membership.reclaim_delay,
            len(self.held),
        )
        self.membership.token = None
        self._registered_wait = False
        self._coming.clear()
        # What was not begun here is begun by those who have it now.
        for delivery in self._not_begun():
            delivery.settled = True
            self._let_go(delivery)

    def _holding(self) -> list[bytes]:
        """The messages that are leased to this process, as it knows.

        In this order: what was finished is queued for its commit before it leaves ``held``.
        """
        held = [delivery.key for delivery in list(self.held.values())]
        held += [row[0] for row in self._coming]
        return held + self.commit.leased_messages()

    def _reconnected(self, conn: Connection) -> None:
        """The answer to a claim may have been lost: what is leased to this worker and unknown to it goes back."""
        self.membership.forget_peers()
        self._registered_wait = False
        self._more = {True, False}
        if self.membership.token is None:
            return
        try:
            self.membership.token = self.membership.procedures.resync(conn, self.membership.token, self._holding())
            self.commit.context.worker = Uuid(self.membership.token)
        except psycopg.Error as e:
            if e.sqlstate != "DD002":
                raise
            self._declared_dead()

    def _give_back_stale(self) -> None:
        """One slow worker does not sit on messages while others idle."""
        if self.fixed or not self.pace.stale():
            return
        for delivery in self._not_begun():
            self.give_back(delivery)
        self.pace.ahead = 0

    def _unstarted(self) -> list[Delivery]:
        found: list[Delivery] = []
        for consumer in list(self.consumers.values()):
            found.extend(consumer.unoffer())
        return found

    def give_back(self, delivery: Delivery) -> None:
        """Return a delivery that was not begun."""
        if delivery.settled:
            return
        delivery.settled = True
        release = Release(delivery.key, delivery.lease)
        release.lane = self.commit.metrics.lane(delivery)
        self.post(release)
        self._let_go(delivery)

    # --- the end ----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Claim nothing more, and give back what was not begun."""
        self._draining = True
        for delivery in self._not_begun():
            self.give_back(delivery)
        self._event.set()

    def _not_begun(self) -> list[Delivery]:
        """Every delivery that no thread has begun, Dramatiq's own queue included."""
        found = self._unstarted()
        for worker in self.workers:
            for item in iter_queue(worker.work_queue):
                if isinstance(item.message, Delivery):
                    found.append(item.message)
                worker.work_queue.task_done()
        return found

    def stop(self, timeout: float = 30.0) -> None:
        """Commit what waits, give back what is held, and end the thread."""
        self.drain()
        self._stop_by = time.monotonic() + timeout
        self._event.set()
        self.join(timeout + 5)

    def _given_up(self) -> bool:
        return self._stop_by is not None and time.monotonic() > self._stop_by

    def _leave(self) -> None:
        token, self.membership.token = self.membership.token, None
        self.commit.context.worker = None
        if token is None:
            return
        try:
            self.commit.call(lambda conn: self.membership.procedures.unregister_worker(conn, token))
        except DurableError as e:
            logger.warning("could not say good-bye to the database: %s", e)
