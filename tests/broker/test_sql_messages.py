"""Messages that SQL wrote are JSON, whatever encoder the worker has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.encoder import PickleEncoder

import dramatiq_durable as durable
from tests.support import wait_until
from tests.support.stored import message_in

from .conftest import Record, Rows


@pytest.fixture(params=["json", "pickle"])
def encoder(request: pytest.FixtureRequest) -> Iterator[str]:
    before = dramatiq.get_encoder()
    if request.param == "pickle":
        dramatiq.set_encoder(PickleEncoder())
    yield request.param
    dramatiq.set_encoder(before)


def test_an_actor_gets_what_sql_sent(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, encoder: str
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(*args: Any, **kwargs: Any) -> None:
        got((args, kwargs))

    start_worker(broker)
    rows("""SELECT durable.enqueue('default', 'take', '[1, "\N{SNOWMAN}", [null]]', '{"rate": 1.5}')""")
    assert got.wait(1) == [((1, "\N{SNOWMAN}", [None]), {"rate": 1.5})]
    rows.drained()


def test_it_is_tried_again_as_its_options_say(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows, encoder: str
) -> None:
    """The retry has the count of its attempts in the worker's own encoding."""
    got = Record()

    @dramatiq.actor(broker=broker)
    def take(value: int) -> None:
        got(rows("SELECT kind::text FROM durable.message"))
        raise ValueError("no")

    start_worker(broker)
    rows("""SELECT durable.enqueue('default', 'take', '[1]', p_options => '{"max_retries": 2}')""")
    wait_until(rows.dead_letters)
    assert got.values == [[("j",)], [("m",)], [("m",)]]
    assert rows.dead_letters() == [("take", 3, "rejected", "ValueError: no")]
    ((payload, kind),) = rows("SELECT payload, kind::text FROM durable.dead_letter")
    assert kind == "m"
    assert message_in(payload).args == (1,)


def test_an_unknown_actor_and_nonsense_are_dead_lettered(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    broker.declare_queue("default")
    rows("SELECT durable.enqueue('default', 'nobody')")
    message = rows("SELECT durable.enqueue('default', 'nobody')")[0][0]
    rows("UPDATE durable.message SET payload = '{' WHERE message_id = %s", message)
    start_worker(broker)
    wait_until(lambda: len(rows.dead_letters()) == 2)
    rows.drained()


def test_its_start_is_recorded_when_it_was_reclaimed(
    broker: durable.DurableBroker, start_worker: Any, rows: Rows
) -> None:
    got = Record()

    @dramatiq.actor(broker=broker)
    def take() -> None:
        got(rows("SELECT started FROM durable.message"))

    broker.stream_id("default")
    rows("SELECT durable.enqueue('default', 'take')")
    rows("UPDATE durable.message SET reclaimed = true")
    start_worker(broker)
    assert got.wait(1) == [[(True,)]]


def test_a_run_that_sql_started(broker: durable.DurableBroker, start_worker: Any, rows: Rows) -> None:
    @durable.workflow(queue_name="orders", broker=broker)
    async def order(name: str, *, cents: int) -> Any:
        return [name, cents, durable.info().workflow_id]

    start_worker(broker)
    rows("SELECT durable.start_workflow('orders', 'order', '[\"o-1\"]', '{\"cents\": 5}', p_workflow_id => 'w-1')")
    assert durable.get_handle("w-1", broker=broker).result(timeout=15) == ["o-1", 5, "w-1"]
