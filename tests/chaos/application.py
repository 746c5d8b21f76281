"""What the workers of the kill tests run: every execution is recorded at once, every effect with the message's end."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import dramatiq
import psycopg

import dramatiq_durable as durable
from dramatiq_durable.delivery import current_delivery

URL = os.environ["TEST_URL"]
#: So that the kills leave something in hand, in seconds.
WORK = 0.03

# Nothing is poison here, however often its worker dies.
broker = durable.DurableBroker(URL, reclaim_delay=1, reclaim_count=10_000)
dramatiq.set_broker(broker)
_local = threading.local()


def executed(what: str) -> None:
    """Record that this message's actor has begun, whatever becomes of it."""
    delivery = current_delivery.get()
    assert delivery is not None
    if not hasattr(_local, "conn"):
        _local.conn = psycopg.connect(URL, autocommit=True)
    _local.conn.execute(
        "INSERT INTO execution (message_id, what, pid) VALUES (%s, %s, %s)", [delivery.key.hex(), what, os.getpid()]
    )


@dramatiq.actor(queue_name="messages")
def message(n: int) -> None:
    executed(f"message {n}")
    with durable.transaction() as conn:
        conn.execute("INSERT INTO effect VALUES (%s)", [f"message {n}"])
        time.sleep(WORK)


@durable.activity(queue_name="activities")
def charge(order: str) -> str:
    executed(f"charge {order}")
    with durable.transaction() as conn:
        conn.execute("INSERT INTO effect VALUES (%s)", [f"charge {order}"])
        time.sleep(WORK)
    return f"receipt {order}"


@durable.activity(queue_name="activities")
def reserve(order: str) -> int:
    executed(f"reserve {order}")
    time.sleep(WORK)
    return len(order)


@durable.workflow(queue_name="orders")
async def order(name: str) -> list[object]:
    receipt, size = await asyncio.gather(charge.execute(name), reserve.execute(name))
    await durable.sleep(0.2)
    return [receipt, size, await reserve.execute(name + "!")]
