"""Dramatiq's consumer: hands a stream's deliveries to a Worker's threads, and takes their outcomes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from dramatiq import Consumer
from dramatiq.broker import MessageProxy
from dramatiq.worker import ConsumerThread

from .claimer import Claimer
from .delivery import Delivery
from .operations import Release
from .work_queue import WorkQueue

if TYPE_CHECKING:
    from .broker import DurableBroker


class IdleConsumer(Consumer):
    """A readonly broker's: it hands out nothing."""

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout / 1000
        self._closed = threading.Event()

    def __next__(self) -> MessageProxy | None:
        self._closed.wait(self.timeout)
        return None

    def close(self) -> None:
        self._closed.set()


class DurableConsumer(Consumer):
    """Hands a stream's deliveries to Dramatiq, and takes their outcomes.

    A Worker's threads are given them by the thread that claimed them.  The Worker's own thread for this consumer,
    which would do no more than carry them over, gets what is not that simple: of unknown actors, or while it is paused.
    Without a Worker, whoever iterates gets them.

    A consumer that Dramatiq restarts takes over from its predecessor: outcomes go by the lease, not by the consumer.
    Of several Workers in a process the latest is handed the messages; when it stops, the one before it has them again.
    """

    def __init__(
        self, broker: DurableBroker, claimer: Claimer, queue_name: str, stream_id: int, prefetch: int, timeout: int
    ) -> None:
        self.broker = broker
        self.claimer = claimer
        self.stream_id = stream_id
        self.prefetch = prefetch
        self.timeout = timeout / 1000
        #: Whether the last claim left nothing waiting on the stream.
        self.drained = False
        #: Whether the stream carries tasks of runs.
        self.of_runs = any(workflow.queue_name == queue_name for workflow in list(broker.workflows.values()))
        #: When a claim looked at the stream last, in claims' own counting.
        self.turn = 0
        self._predecessor: DurableConsumer | None = None
        self._closed = False
        self._ready: SimpleQueue[Delivery] = SimpleQueue()
        thread = threading.current_thread()
        #: The Worker's thread that iterates, if there is a Worker.
        self._thread = thread if isinstance(thread, ConsumerThread) else None
        #: The Worker's queue, once its thread has come to iterate: before, it could not take the outcomes.
        self._work_queue: WorkQueue | None = None

    def __next__(self) -> MessageProxy | None:
        if self._work_queue is None and self._thread is not None and isinstance(self._thread.work_queue, WorkQueue):
            self._work_queue = self._thread.work_queue
        try:
            return self._ready.get(timeout=self.timeout)
        except Empty:
            return None

    def ack(self, message: MessageProxy) -> None:
        """The message was processed: commit what that means, with the next batch.

        There is nothing to answer for in a message that was not handed out here; it is ignored.
        """
        if isinstance(message, Delivery):
            self.broker.settler.settle(message, failed=False)

    def nack(self, message: MessageProxy) -> None:
        """The message failed for good: it goes to the dead letters, or its run gets to know; otherwise as `ack`."""
        if not isinstance(message, Delivery):
            return
        if not message.settled:
            self.broker.keep_failure(message)
            self.broker.note_failure(message)
        self.broker.settler.settle(message, failed=True)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Give back what was not begun."""
        for message in messages:
            assert isinstance(message, Delivery)
            if not message.settled:
                message.settled = True
                self.broker.settler.commit_outcome(message, Release(message.key, message.lease))

    def close(self) -> None:
        self._closed = True
        for delivery in self.unoffer():
            self.claimer.give_back(delivery)
        if self.claimer.consumers.get(self.stream_id) is not self:
            return
        before = self._predecessor
        while before is not None and before._closed:
            before = before._predecessor
        if before is None:
            del self.claimer.consumers[self.stream_id]
        else:
            self.claimer.consumers[self.stream_id] = before
            self.claimer.wake()

    # --- for the claimer --------------------------------------------------------------------------------

    def take_over(self, predecessor: DurableConsumer | None) -> None:
        """Be the one that is handed the stream's messages, also those that its predecessor has not handed out."""
        self.claimer.consumers[self.stream_id] = self
        if predecessor is not None:
            self._predecessor = None if predecessor._closed else predecessor
            for delivery in predecessor.unoffer():
                self.offer(delivery)

    def offer(self, delivery: Delivery) -> None:
        """Hand a delivery over."""
        queue, thread = self._work_queue, self._thread
        if queue is not None and thread is not None and not thread.paused:
            actor = self.broker.actors.get(delivery.actor_name)
            if actor is not None:
                queue.add(actor.priority, delivery)
                return
        self._ready.put(delivery)

    def unoffer(self) -> list[Delivery]:
        """Take back what was not handed over."""
        found: list[Delivery] = []
        with suppress(Empty):
            while True:
                found.append(self._ready.get_nowait())
        return found
