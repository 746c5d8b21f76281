"""Dramatiq's RabbitmqBroker, as a source.

It keeps a queue under its name, the delayed messages under the name with ``.DQ``, the dead letters under ``.XQ``.  We
consume as a worker would, and ack what is stored here: what we have not acked when we die, RabbitMQ delivers again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid5

from ..errors import ImportFailed, NotConfigured
from .source import Counts, Found, Place, check_scheme, library

#: How long a queue that says it has messages may give us none, in seconds.
PATIENCE = 30.0


class RabbitmqSource:
    """The queues of a RabbitmqBroker.

    Parameters:
      url(str): as the RabbitmqBroker has it; several, separated by semicolons, are tried in turn.

    Raises:
      NotConfigured: pika is missing, or the URL, the login or the virtual host is wrong.
      ImportFailed: the server cannot be reached.
    """

    title = "RabbitMQ"
    lists = False

    def __init__(self, url: str) -> None:
        self._pika = library("pika")
        for one in url.split(";"):
            check_scheme(one, self.title, ("amqp", "amqps"), "amqp://user:password@localhost:5672")
        # What it logs is in the errors that it raises.
        logging.getLogger("pika").addHandler(logging.NullHandler())
        try:
            parameters = [self._pika.URLParameters(one) for one in url.split(";")]
        except ValueError as e:
            raise NotConfigured(f"the URL of RabbitMQ cannot be read: {e}") from e
        self._virtual_host = parameters[0].virtual_host
        with self.errors():
            self._connection = self._pika.BlockingConnection(parameters)
        # pika shows what the server says of itself nowhere else.
        properties = getattr(getattr(self._connection, "_impl", None), "server_properties", None) or {}
        self._cluster = properties.get("cluster_name") or parameters[0].host

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What RabbitMQ refuses, as errors that say what to do."""
        wrong = self._pika.exceptions
        try:
            yield
        except (wrong.AuthenticationError, wrong.ProbableAuthenticationError) as e:
            raise NotConfigured("RabbitMQ refused the login: check user and password in its URL") from e
        except (wrong.ProbableAccessDeniedError, wrong.ConnectionClosedByBroker) as e:
            raise NotConfigured(f"RabbitMQ refused the connection ({_said(e)}): is the virtual host right?") from e
        except (wrong.AMQPError, OSError) as e:
            raise ImportFailed(
                f"RabbitMQ failed: {_said(e)}. Is it running, and is the URL its own? It is safe to import again"
            ) from e

    def identity(self) -> UUID:
        return uuid5(NAMESPACE_OID, f"rabbitmq {self._cluster} {self._virtual_host}")

    def queues(self, candidates: Sequence[str]) -> list[str]:
        return sorted({queue for queue in candidates if any(self._look(name) for name in _names(queue))})

    def _look(self, name: str) -> tuple[int, int] | None:
        """How many messages and consumers a queue has, if it is there."""
        with self.errors():
            # A channel is closed by its first error.
            channel = self._connection.channel()
            try:
                declared = channel.queue_declare(name, passive=True).method
            except self._pika.exceptions.ChannelClosedByBroker as e:
                if e.reply_code == 404:
                    return None
                raise
            channel.close()
            return declared.message_count, declared.consumer_count

    def count(self, queue: str) -> Counts:
        ready, delayed, dead = (self._look(name) or (0, 0) for name in _names(queue))
        return Counts(ready[0], delayed[0], dead[0], None, max(ready[1], delayed[1]))

    def open(self, queue: str, place: Place) -> _Box:
        name = dict(zip(("ready", "delayed", "dead"), _names(queue), strict=True))[place]
        return _Box(self, name, missing=self._look(name) is None)

    def channel(self) -> Any:
        return self._connection.channel()

    def receive(self, seconds: float) -> None:
        """Have what arrives, within so much time, handed to those who consume."""
        with self.errors():
            self._connection.process_data_events(time_limit=seconds)

    def close(self) -> None:
        with suppress(self._pika.exceptions.AMQPError):
            self._connection.close()


class _Box:
    """One queue, as a consumer sees it."""

    def __init__(self, source: RabbitmqSource, name: str, *, missing: bool) -> None:
        self._source = source
        self._name = name
        self._missing = missing
        self._arrived: deque[Found] = deque()
        self._channels: list[Any] = []
        #: How many of the newest channel's messages were left.
        self._left = 0

    def __enter__(self) -> _Box:
        return self

    def take(self, limit: int) -> list[Found]:
        if self._missing:
            return []
        # What is left stays unacked until the end, or it would be given to us again; it takes up the channel's room.
        if not self._channels or self._left >= limit:
            self._consume(limit)
        found: list[Found] = []
        patience = time.monotonic() + PATIENCE
        while len(found) < limit:
            if not self._arrived:
                self._source.receive(0.1)
            if self._arrived:
                found.append(self._arrived.popleft())
            elif found or not self._waiting(self._channels[-1]):
                break
            elif time.monotonic() > patience:
                raise ImportFailed(
                    f"RabbitMQ has messages in {self._name!r} and gives us none: does another consumer have it for "
                    "itself? Stop the workers, and import again"
                )
        return found

    def _consume(self, limit: int) -> None:
        self._left = 0
        with self._source.errors():
            for channel in self._channels[-1:]:
                for tag in channel.consumer_tags:
                    channel.basic_cancel(tag)
            channel = self._source.channel()
            self._channels.append(channel)
            channel.basic_qos(prefetch_count=2 * limit)
            channel.basic_consume(self._name, self._receive)

    def _receive(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._arrived.append(Found((channel, method.delivery_tag), body, _died(properties.headers)))

    def _waiting(self, channel: Any) -> int:
        with self._source.errors():
            return int(channel.queue_declare(self._name, passive=True).method.message_count)

    def settle(self, moved: Sequence[Found], left: Sequence[Found]) -> None:
        self._left += len(left)
        channels = set()
        with self._source.errors():
            for channel, tag in (found.handle for found in moved):
                channel.basic_ack(tag)
                channels.add(channel)
        for channel in channels:
            # An ack is not answered; but what a channel is told is done in order.
            self._waiting(channel)

    def __exit__(self, *error: object) -> None:
        # RabbitMQ puts back what was not acked.
        for channel in self._channels:
            if channel.is_open:
                with self._source.errors():
                    channel.close()


def _names(queue: str) -> tuple[str, str, str]:
    return queue, f"{queue}.DQ", f"{queue}.XQ"


def _died(headers: dict[str, Any] | None) -> int | None:
    """When it became a dead letter, as RabbitMQ noted it on the message."""
    deaths = (headers or {}).get("x-death") or [{}]
    when = deaths[0].get("time")
    return int(when.timestamp() * 1000) if isinstance(when, datetime) else None


def _said(error: BaseException) -> str:
    """What an error of pika's says; the first one has the cause, others only its consequences."""
    text = getattr(error, "reply_text", None) or str(error) or ", ".join(str(a) for a in error.args)
    return text or repr(error)
