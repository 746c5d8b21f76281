"""What the workers of the kill tests run: what a due time does commits with its message's end."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.middleware import CurrentMessage

import dramatiq_durable as durable

# Nothing is poison here, however often its worker dies.
broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=1, reclaim_count=10_000)
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="reports")
def report() -> None:
    message = CurrentMessage.get_current_message()
    assert message is not None
    with durable.transaction() as conn:
        conn.execute("INSERT INTO effect (due) VALUES (%s)", [message.options["schedule_due"]])


@durable.activity(queue_name="activities")
def count() -> int:
    return 1


@durable.workflow(queue_name="orders")
async def order() -> int:
    return await count.execute()
