"""Dramatiq's own brokers on the tests' servers, and workers on them and on ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage, Retries

import dramatiq_durable as durable
from tests.support import unique_name


class Old:
    """Another broker with queues of the test's own, and what the command needs to be told of it."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind = kind
        self.url = url
        self.namespace = unique_name("ns")
        self.queue = unique_name("q")
        self.made: list[Any] = []

    def broker(self, **options: Any) -> Any:
        options.setdefault("middleware", [Retries(max_retries=0)])
        if self.kind == "redis":
            broker: Any = RedisBroker(url=self.url, namespace=self.namespace, **options)
        else:
            broker = RabbitmqBroker(url=self.url, **options)
        self.made.append(broker)
        return broker

    def actor(self, fn: Callable[..., Any], broker: Any = None, **options: Any) -> Any:
        broker = broker or self.broker()
        return dramatiq.actor(fn, actor_name="note", queue_name=self.queue, broker=broker, **options)

    def arguments(self, *more: str, all_queues: bool = False) -> list[str]:
        command = ["import", self.kind, self.url, *more]
        if self.kind == "redis":
            command += ["--namespace", self.namespace]
        if not all_queues:
            command += ["--queue", self.queue]
        return command

    def counts(self) -> tuple[int, int, int]:
        """Ready, delayed, dead, as the server has them."""
        if self.kind == "rabbitmq":
            broker = self.broker()
            try:
                return tuple(broker.get_queue_message_counts(self.queue))  # type: ignore[return-value]
            finally:
                broker.close()
        client = self.broker().client
        key = f"{self.namespace}:{self.queue}"
        return client.llen(key), client.llen(f"{key}.DQ"), client.zcard(f"{key}.XQ")

    def close(self) -> None:
        for broker in self.made:
            broker.close()
            if isinstance(broker, RedisBroker):
                broker.client.close()


@contextmanager
def working(broker: Any, *, threads: int = 2) -> Iterator[None]:
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=threads)
    worker.start()
    try:
        yield
    finally:
        worker.stop()


@contextmanager
def ours(database_url: str, old: Old, fn: Callable[..., Any], **options: Any) -> Iterator[durable.DurableBroker]:
    """A worker of ours on the queue."""
    broker = durable.DurableBroker(database_url, middleware=[CurrentMessage(), Retries()])
    dramatiq.actor(fn, actor_name="note", queue_name=old.queue, broker=broker, **options)
    try:
        with working(broker):
            yield broker
    finally:
        broker.close()
