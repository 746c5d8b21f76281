"""The order pipeline: two workflows and their activities.  A worker runs it with

    DRAMATIQ_DURABLE_IMPORT=examples.orders.pipeline dramatiq dramatiq_durable.app

Each activity writes its effect through ``durable.transaction()``: the row, the activity's result and the ack of its
message are one commit, so the row is there exactly once, whatever dies in between.  The outside world is another
matter: it may be called twice, as ``ORDERS_CALLS`` (a file with one line a call) shows.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

import dramatiq_durable as durable


class Busy(Exception):
    """The other side could not answer just now: worth another attempt."""


class CardDeclined(Exception):
    """The bank says no: another attempt would not help."""


def call(activity: str, order_id: str, failing_attempts: int = 0) -> None:
    """Pretend to call another system: it takes a while, and its first attempts fail if they are told to."""
    info = durable.activity_info()
    attempt = info.attempt if info is not None else 1
    fails = attempt <= failing_attempts
    if path := os.environ.get("ORDERS_CALLS"):
        line = {"at": time.time(), "pid": os.getpid(), "activity": activity, "order": order_id, "fails": fails}
        calls = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(calls, json.dumps(line).encode() + b"\n")
        finally:
            os.close(calls)
    time.sleep(random.uniform(0.1, 0.3))
    if fails:
        raise Busy(f"{activity} of {order_id}: no answer, attempt {attempt}")


@durable.activity(queue_name="payments", throws=CardDeclined, max_retries=20, min_backoff=200, max_backoff=2_000)
def charge(order_id: str, cents: int, card: str) -> str:
    call("charge", order_id, failing_attempts=2 if card == "busy" else 0)
    if card == "declined":
        raise CardDeclined(f"the card of {order_id} was declined")
    with durable.transaction() as conn:
        conn.execute("INSERT INTO shop.charge (order_id, cents) VALUES (%s, %s)", [order_id, cents])
    return f"receipt-{order_id}"


@durable.activity(queue_name="payments", max_retries=20, min_backoff=200, max_backoff=2_000)
def refund(order_id: str, cents: int) -> None:
    call("refund", order_id)
    with durable.transaction() as conn:
        conn.execute("INSERT INTO shop.refund (order_id, cents) VALUES (%s, %s)", [order_id, cents])


@durable.activity(queue_name="warehouse", max_retries=20, min_backoff=200, max_backoff=2_000)
def reserve(order_id: str, shelf: str) -> None:
    call("reserve", order_id, failing_attempts=1 if shelf == "stuck" else 0)
    with durable.transaction() as conn:
        conn.execute("INSERT INTO shop.reservation (order_id, pieces) VALUES (%s, 1)", [order_id])


@durable.activity(queue_name="warehouse", max_retries=20, min_backoff=200, max_backoff=2_000)
def put_back(order_id: str) -> None:
    call("put_back", order_id)
    with durable.transaction() as conn:
        conn.execute("INSERT INTO shop.reservation (order_id, pieces) VALUES (%s, -1)", [order_id])


@durable.activity(queue_name="warehouse", max_retries=20, min_backoff=200, max_backoff=2_000)
def hand_over(order_id: str) -> str:
    call("hand_over", order_id)
    with durable.transaction() as conn:
        conn.execute("INSERT INTO shop.shipment (order_id) VALUES (%s)", [order_id])
    return f"parcel-{order_id}"


@durable.workflow(queue_name="shipping")
async def ship(order_id: str) -> str:
    """Wait for the van, and give it the parcel."""
    await durable.sleep(0.5)
    return await hand_over.execute(order_id)


@durable.workflow(queue_name="orders")
async def order(order_id: str, cents: int, card: str, shelf: str, patience: str) -> str:
    """One order, from the payment to its end: shipped, rejected or expired; a declined card fails it."""
    paid, reserved = await asyncio.gather(
        charge.execute(order_id, cents, card), reserve.execute(order_id, shelf), return_exceptions=True
    )
    if isinstance(reserved, BaseException):
        raise reserved
    if isinstance(paid, BaseException):
        await put_back.execute(order_id)
        raise paid

    await durable.sleep("1s")
    try:
        decision = await durable.wait_for_signal("approval", timeout=patience)
        ending = "shipped" if decision["approved"] else "rejected"
    except TimeoutError:
        ending = "expired"

    if ending == "shipped":
        await ship.options(workflow_id=f"ship-{order_id}").execute(order_id)
    else:
        await asyncio.gather(refund.execute(order_id, cents), put_back.execute(order_id))
    return ending
