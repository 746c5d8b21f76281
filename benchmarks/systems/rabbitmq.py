"""Dramatiq on RabbitMQ, at its defaults: durable queues, persistent messages, no confirms."""

from __future__ import annotations

from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.systems.dramatiq_based import DramatiqSystem


class Contender(DramatiqSystem):
    def connect(self, url: str) -> RabbitmqBroker:
        return RabbitmqBroker(url=url)
