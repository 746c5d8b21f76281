from dataclasses import dataclass

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker()  # DRAMATIQ_DURABLE_URL, or else a Postgres of its own
dramatiq.set_broker(broker)


@dataclass
class Item:
    sku: str
    cents: int


@durable.activity(queue_name="shop")
def reserve(sku: str) -> bool:
    return sku != "unicorn"


@durable.workflow(queue_name="carts")
async def cart(customer: str) -> dict[str, int]:
    items: dict[str, int] = {}
    ordered = False

    @durable.on_query("total")
    def total() -> int:
        return sum(items.values())

    def check(item: Item) -> None:
        if item.cents < 0:
            raise ValueError("a price is not negative")

    @durable.on_update("add", validator=check)
    async def add(item: Item) -> int:
        if not await reserve.execute(item.sku):
            raise LookupError(f"there is no {item.sku}")
        items[item.sku] = item.cents
        return total()

    @durable.on_signal("remove")
    def remove(sku: str) -> None:
        items.pop(sku, None)

    @durable.on_signal("order")
    def order() -> None:
        nonlocal ordered
        ordered = True

    await durable.wait_condition(lambda: ordered and durable.all_handlers_finished(), timeout="3 days")
    return items


if __name__ == "__main__":
    start = cart.options(workflow_id="cart-kim", with_update=("add", Item("tea", 500)), update_id="first").start
    run = start("kim")  # starts the cart, or adds to the one that there is
    print("first:", run.get_update("first").result(timeout=30))
    print("second:", run.update("add", Item("ink", 250), timeout=30))
    for refused in (Item("debt", -1), Item("unicorn", 1)):
        try:
            run.update("add", refused, timeout=30)
        except (durable.UpdateRejected, durable.UpdateFailed) as e:
            print(type(e).__name__, e)
    run.signal("remove", "ink")
    print("total:", run.query("total"))
    run.signal("order")
    print("ordered:", run.result(timeout=30))
    print("total, later:", run.query("total"))
