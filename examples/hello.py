import asyncio

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker()  # DRAMATIQ_DURABLE_URL, or else a Postgres of its own
dramatiq.set_broker(broker)


@durable.activity(queue_name="shop", max_retries=5)  # a dramatiq actor, and more
def charge(order_id: str, cents: int) -> str:
    return f"receipt-{order_id}"


@durable.activity(queue_name="shop")
def reserve(order_id: str) -> int:
    return 1


@durable.workflow(queue_name="orders")
async def order(order_id: str, cents: int) -> str:
    receipt, pieces = await asyncio.gather(charge.execute(order_id, cents), reserve.execute(order_id))
    await durable.sleep("1s")  # or "30 days": a sleeping run is nothing but rows
    decision = await durable.wait_for_signal("approval", timeout="3 days")
    return f"{receipt}: {pieces} on the way, approved by {decision['by']}"


if __name__ == "__main__":
    run = order.options(workflow_id="order-o-1").start("o-1", 500)
    run.signal("approval", {"by": "Kim"})
    print(run.result(timeout=60))
