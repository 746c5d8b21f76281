"""What workers do: ``dramatiq shop.work``."""

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker()  # DRAMATIQ_DURABLE_URL
dramatiq.set_broker(broker)


@durable.activity(queue_name="shop")
def set_status(order_id: int, status: str) -> None:
    with durable.transaction() as conn:  # commits together with the end of the activity
        conn.execute("UPDATE orders SET status = %s WHERE id = %s", [status, order_id])


@durable.activity(queue_name="shop")
def greet(email: str) -> None:
    print(f"Thank you for your order, {email}!", flush=True)


@durable.workflow(queue_name="orders")
async def fulfil(order_id: int) -> str:
    await set_status.execute(order_id, "confirmed")
    try:
        await durable.wait_for_signal("approval", timeout="3 days")
    except TimeoutError:
        await set_status.execute(order_id, "expired")
        return "expired"
    await set_status.execute(order_id, "shipped")
    return "shipped"
