"""The broker: Dramatiq's contract on one side, deliveries and operations on the other.

Besides, only `processing` knows both.  Dramatiq calls ``ack`` and ``nack`` on its worker threads, once a message was
processed and its hooks have run; they only queue the outcome, which the claimer commits with its next batch.  What the
hooks of a message send (a retry, the next of a pipeline, a callback) is held back and commits with its ack.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dramatiq import Actor, Consumer, Middleware
from dramatiq.errors import QueueNotFound

from . import time_limits, topics
from .claimer import Claimer
from .codecs import Codec, Codecs, decode_only
from .consumer import DurableConsumer, IdleConsumer
from .credentials import Credentials, check_alone, is_scoped, url_of
from .database import Database, translate
from .delivery import LIMITS, TASK_KINDS, Delivery, current_delivery
from .durations import parse_duration
from .errors import DatabaseUnavailable, NotConfigured, NotPermitted, WorkflowAlreadyStarted
from .group_commit import GroupCommit
from .incoming import delivery_of
from .leases import Membership
from .procedures import Procedures
from .processing import Processing
from .sending import Sending
from .settings import Settings, check_url
from .settling import Settler
from .telemetry import Telemetry, logs
from .wakeup import Listener
from .work_queue import WorkQueue
from .workflow.carrying import TASK_PRIORITY
from .workflow.interceptors import Interceptors, WorkflowInterceptor
from .workflow.options import check_name
from .workflow.runner import Runner

if TYPE_CHECKING:
    from dramatiq import Worker

    from .workflow.definition import Workflow
    from .workflow.waiting import Waiters

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DurableBroker(Sending, Processing):
    """A Dramatiq broker that keeps its queues in Postgres.

    The constructor does no I/O: the broker connects at first use, also after a fork.

    Parameters:
      url(str | None): the database, like postgresql://user:password@host/database.  By default
        ``DRAMATIQ_DURABLE_URL``; without that, the embedded Postgres.
      namespace(str | None): the schema that holds everything; ``DRAMATIQ_DURABLE_NAMESPACE`` or "durable".
      middleware(list | None): as Dramatiq's own brokers take it.
      interceptors: `WorkflowInterceptor` objects, around every workflow and what it calls; the first one is outermost.
      codecs: what every value of a workflow goes through on its way to the database and back; the first one encodes
        first.  Plain messages have Dramatiq's encoder.
      worker_credentials: what a scoped worker logs in with, in place of ``url``: what `provision_worker_role` or
        `rotate_worker_role` returned, its ``url``, or a mapping of ``url``, ``role`` and ``password``.  No other login
        is used then, and none may be in the settings.
      readonly(bool): the broker takes no message, and is no worker: it sends, starts, signals, queries and reads.
        A `Worker` on it is given nothing.
      reclaim_delay: how long a silent worker is given before its messages are handed to others: seconds, a timedelta
        or a text like "30s".
      reclaim_count(int): a message under which so many workers died is poison, and is dead-lettered.
      fail_fast_default(bool): for tests that run a worker in their own process: `join` raises what a message failed
        with, as it does with Dramatiq's StubBroker.

    Raises:
      NotConfigured: the URL or a setting is malformed; or there are credentials beside ``worker_credentials``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str | None = None,
        middleware: list[Middleware] | None = None,
        interceptors: Sequence[WorkflowInterceptor] = (),
        codecs: Sequence[Codec | decode_only] | Codecs = (),
        worker_credentials: Credentials | None = None,
        readonly: bool = False,
        reclaim_delay: Any = None,
        reclaim_count: int = 3,
        fail_fast_default: bool = False,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(middleware=middleware)
        self.settings = settings or Settings.from_env()
        self.telemetry = Telemetry(self.settings.telemetry)
        logs.install()
        if worker_credentials is not None:
            if url is not None:
                raise NotConfigured(
                    "the broker has a url and worker_credentials: give one of them. A scoped worker's process holds "
                    "its own credentials and no other"
                )
            self._url: str | None = url_of(worker_credentials)
        else:
            self._url = check_url(url, name="the broker's url") if url is not None else self.settings.url
        if self._url is not None and (worker_credentials is not None or is_scoped(self._url)):
            check_alone(self._url, self.settings)
        self.readonly = readonly
        if not isinstance(reclaim_count, int) or reclaim_count < 1:
            raise ValueError(f"reclaim_count is a whole number from 1 on, not {reclaim_count!r}")
        self.reclaim_count = reclaim_count
        self.reclaim_delay = (
            self.settings.reclaim_delay if reclaim_delay is None else parse_duration(reclaim_delay) / 1000
        )
        self.namespace = namespace or self.settings.namespace
        self.database = Database(self._conninfo, self.namespace, prepared=self.settings.prepared_statements)
        self.codecs = codecs if isinstance(codecs, Codecs) else Codecs(codecs)
        self.commit = GroupCommit(self.database)
        self.procedures = Procedures(self.namespace, self.codecs, metrics=self.commit.metrics)
        self.fail_fast_default = fail_fast_default
        self.failures = {}
        self.watched = []
        self.queues = {}
        self.workflows: dict[str, Workflow[Any, Any]] = {}
        #: Which actors subscribe to which topics: (topic, queue, actor, priority), and which are stored already.
        self.subscriptions: list[tuple[str, str, str, int]] = []
        self._subscribed: set[tuple[str, str, str, int]] = set()
        self.interceptors = Interceptors(interceptors)
        self.runner = Runner(self)
        self.settler = Settler(self)
        self._embedded: Any = None
        self._streams: dict[str, int] = {}
        self.stream_names: dict[int, str] = {}
        self.commit.metrics.stream_names = self.stream_names
        self.commit.metrics.instrumented = self.settings.telemetry != "off"
        self._claimer: Claimer | None = None
        self._listener: Listener | None = None
        #: Where this process's clients wait for runs to close.
        self.waiters: Waiters | None = None
        self._shared: dict[str, Any] = {}
        self._pid = os.getpid()
        self._lock = threading.RLock()

    def _conninfo(self) -> str:
        if self._url is not None:
            return self._url
        from . import embedded

        self._embedded = embedded.acquire(self.settings.embedded_dir)
        from .migrate import migrate

        migrate(self._embedded.url, self.namespace)
        return str(self._embedded.url)

    # --- declarations -----------------------------------------------------------------------------------

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue: a stream of the same name.  Idempotent; does no I/O."""
        if queue_name in self.queues:
            return
        check_name(queue_name, "a queue's name")
        self.emit_before("declare_queue", queue_name)
        self.queues[queue_name] = queue_name
        self.emit_after("declare_queue", queue_name)

    def declare_actor(self, actor: Actor[Any, Any]) -> None:
        check_name(actor.actor_name, "an actor's name")
        super().declare_actor(actor)

    def declare_workflow(self, workflow: Workflow[Any, Any]) -> None:
        """Make a workflow known: its tasks come as messages to an actor of its name.

        The actor's options keep every middleware's hands off the tasks: none may expire or interrupt one.
        """
        options = {"max_age": None, "time_limit": float("inf"), "max_retries": None, "throws": WorkflowAlreadyStarted}
        if workflow.name not in self.actors:
            # Known before the queue is: a running worker consumes it at once, as one that carries runs.
            self.workflows[workflow.name] = workflow
        Actor(
            self.runner.entry(workflow),
            broker=self,
            actor_name=workflow.name,
            queue_name=workflow.queue_name,
            priority=TASK_PRIORITY,
            options=options,
        )

    def declare_subscription(self, topic: str, actor: Actor[Any, Any]) -> None:
        """Have an actor given a topic's events: stored once this process consumes the actor's queue."""
        self.subscriptions.append((topic, actor.queue_name, actor.actor_name, actor.priority))
        if self._claimer is not None:
            self._subscribe(lambda queue_name: queue_name in self._consumed())

    def _consumed(self) -> list[str]:
        consumers = [] if self._claimer is None else list(self._claimer.consumers)
        return [self.stream_names[stream_id] for stream_id in consumers]

    def _subscribe(self, consumes: Callable[[str], bool]) -> None:
        """Store the subscriptions of actors whose queues this process consumes."""
        new = [s for s in self.subscriptions if s not in self._subscribed and consumes(s[1])]
        if new:
            topics.register(self, new)
            self._subscribed.update(new)

    def stream_id(self, queue_name: str) -> int:
        """The id of a stream.

        Raises:
          NotPermitted: the login may not use it, or it does not exist.
        """
        self._after_fork()
        try:
            return self._streams[queue_name]
        except KeyError:
            pass
        with self._lock:
            if queue_name not in self._streams:
                with self.database.connection() as conn:
                    self._learn_streams(conn, queue_name)
            return self._streams[queue_name]

    def _learn_streams(self, conn: Any, queue_name: str) -> None:
        import psycopg

        # All declared ones at once; where the login may not use some of them, only the one that is asked for.
        for names in ([*self.queues, queue_name], [queue_name]):
            try:
                found = self.procedures.open_streams(conn, list(dict.fromkeys(names)))
            except psycopg.Error as e:
                if e.sqlstate == "DD001" and len(names) > 1:
                    continue
                error = translate(e)
                raise NotPermitted(f"{queue_name!r}: {error}") if isinstance(error, NotPermitted) else error from e
            self._streams.update(found)
            self.stream_names.update({i: n for n, i in found.items()})
            return

    # --- receiving --------------------------------------------------------------------------------------

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30000) -> Consumer:
        """An iterator over a queue's messages.

        Parameters:
          queue_name(str): the queue.
          prefetch(int): how many messages it hands out before one of them is acked.
          timeout(int): milliseconds after which it answers None when there is nothing.

        Raises:
          QueueNotFound: the queue was never declared.
          BrokerConnectionError: the database cannot be reached.
        """
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        if self.readonly:
            return IdleConsumer(timeout)
        stream_id = self.stream_id(queue_name)
        self._subscribe(queue_name.__eq__)
        with self._lock:
            claimer = self._ensure_claimer()
            consumer = DurableConsumer(self, claimer, queue_name, stream_id, max(1, prefetch), timeout)
            consumer.take_over(claimer.consumers.get(stream_id))
            self._ensure_listener().listen(f"{self.namespace}:s{stream_id}", self._wake_claimer)
        claimer.wake()
        return consumer

    def _wake_claimer(self) -> None:
        if self._claimer is not None:
            self._claimer.wake()

    def _ensure_claimer(self) -> Claimer:
        self._after_fork()
        if self._claimer is None:
            self._claimer = Claimer(
                self.commit,
                Membership(self.procedures, self.reclaim_delay, self.reclaim_count),
                partial(delivery_of, self),
                self._listen_for_worker,
                poll_interval=self.settings.poll_interval,
            )
            self._claimer.start()
        return self._claimer

    def _listen_for_worker(self, worker_id: int) -> None:
        if self._claimer is not None:
            self.listen(f"{self.namespace}:w{worker_id}", self._claimer.look_after)

    def _ensure_listener(self) -> Listener:
        self._after_fork()
        with self._lock:
            if self._listener is None:
                self._listener = Listener(self._connect_listener)
                self._listener.start()
            return self._listener

    def listen(self, channel: str, callback: Callable[[], None]) -> None:
        """Have a function called when a channel of the database is notified."""
        self._ensure_listener().listen(channel, callback)

    def _connect_listener(self) -> Any:
        import psycopg

        if self.settings.listen_url is not None:
            return psycopg.connect(self.settings.listen_url, autocommit=True)
        return self.database.connect()

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What this process has one of; a forked child makes its own."""
        self._after_fork()
        with self._lock:
            if name not in self._shared:
                self._shared[name] = make()
            return cast(T, self._shared[name])

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it keeps its messages: brokers with the same place share them."""
        return self._url or str(self.settings.embedded_dir), self.namespace

    @property
    def claimer(self) -> Claimer | None:
        """The thread that claims for this process, while it is a worker."""
        return self._claimer

    # --- processing: Dramatiq's signals ---------------------------------------------------------------------

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if signal == "process_message":
            delivery = args[0]
            if isinstance(delivery, Delivery):
                current_delivery.set(delivery)
                delivery.taken = perf_counter()
                if delivery.kind not in TASK_KINDS:
                    if (spans := self.telemetry.spans()) is not None:
                        spans.begin_attempt(delivery)
                    if delivery.reclaimed:
                        self._record_start(delivery)
                    if delivery.kind == "a" and LIMITS in delivery.options:
                        self._begin_limited(delivery)
                    self._before_process(delivery)
                    delivery.calling = True
                    return
        elif signal == "worker_boot":
            self._check_database(args[0])
            if self.readonly:
                logger.warning(
                    "the broker is readonly: this worker is given nothing; make its broker without readonly=True"
                )
            else:
                args[0].work_queue = WorkQueue()
                time_limits.unlock(self.middleware)
                with self._lock:
                    self._ensure_claimer().serve(args[0])
        elif signal == "worker_shutdown" and self._claimer is not None:
            self._claimer.leave(args[0])
        if self.hearing("before_" + signal):
            super().emit_before(signal, *args, **kwargs)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        if signal == "process_message" and isinstance(args[0], Delivery):
            self._after_process(args[0], **kwargs)
            return
        if signal == "skip_message" and isinstance(args[0], Delivery):
            self._after_skip(args[0])
            return
        if self.hearing("after_" + signal):
            super().emit_after(signal, *args, **kwargs)
        if signal == "worker_shutdown" and self._claimer is not None and not self._claimer.serves_others(args[0]):
            self._stop_claimer()

    def _check_database(self, worker: Worker) -> None:
        """A worker that can never work says so at once; one that is early waits for its database.  Subscriptions are
        stored before the first message is claimed, whose run may emit."""
        try:
            with self.database.connection():
                pass
            if not self.readonly:
                self._subscribe(lambda queue_name: queue_name in (worker.consumer_whitelist or self.queues))
        except DatabaseUnavailable as e:
            logger.warning("the database is away, waiting for it: %s", e)
        except NotPermitted as e:
            logger.error("subscriptions to topics are not stored: %s", e)

    # --- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit what waits, give back what is held, and close all connections."""
        if self._pid != os.getpid():
            return
        self._stop_claimer()
        listener, self._listener = self._listener, None
        self.waiters = None
        self._shared.clear()
        if listener is not None:
            listener.stop()
        self.commit.close()
        self.database.close()
        self.runner.cache.clear()
        if self._embedded is not None:
            self._embedded.release()
            self._embedded = None

    def _stop_claimer(self) -> None:
        claimer, self._claimer = self._claimer, None
        if claimer is not None:
            claimer.stop()

    def _after_fork(self) -> None:
        """Threads and connections belong to the process that made them."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self.commit.after_fork()
            self._lock = threading.RLock()
            self._claimer = None
            self._listener = None
            self.waiters = None
            self._shared.clear()
