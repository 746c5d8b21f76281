"""Middleware is told of what it listens to, whenever and however it was added."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import dramatiq
import pytest
from dramatiq.middleware import Middleware

import dramatiq_durable as durable

from .conftest import Record, Rows


class Listens(Middleware):
    def __init__(self, told: Record) -> None:
        self.told = told

    def before_ack(self, broker: Any, message: Any) -> None:
        self.told("before_ack")


def test_it_is_told_whenever_it_was_added(broker: durable.DurableBroker, rows: Rows, start_worker: Any) -> None:
    told, later, other = Record(), Record(), Record()
    broker.add_middleware(Listens(told))

    @dramatiq.actor(broker=broker)
    def work() -> None: ...

    start_worker(broker)
    work.send()
    told.wait(1)
    # By hand, in the middle of the list, and with hooks of the object's own.
    broker.middleware.insert(1, Listens(later))
    mine = Middleware()
    mine.after_ack = lambda broker, message: other("after_ack")  # type: ignore[method-assign]
    broker.middleware.append(mine)
    broker.middleware.append(Mock(spec=Middleware))
    work.send()
    assert (told.wait(2), later.wait(1), other.wait(1)) == (["before_ack"] * 2, ["before_ack"], ["after_ack"])
    rows.drained()
    assert broker.middleware[-1].before_process_message.call_count == 1  # type: ignore[attr-defined]


def test_those_that_listen_to_nothing_are_left_out(broker: durable.DurableBroker) -> None:
    assert broker.hearing("before_ack") == []
    listens = Listens(Record())
    broker.add_middleware(listens)
    assert broker.hearing("before_ack") == [listens]
    assert broker.hearing("after_ack") == []


def test_a_signal_that_dramatiq_does_not_know_fails_as_with_dramatiq(
    broker: durable.DurableBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.emit_after("something_else")
    assert "Unexpected failure in after_something_else" in caplog.text


def test_brokers_do_not_share_what_they_know(make_broker: Any) -> None:
    one, two = make_broker(middleware=[Listens(Record())]), make_broker(middleware=[])
    assert len(one.hearing("before_ack")) == 1
    assert two.hearing("before_ack") == []
