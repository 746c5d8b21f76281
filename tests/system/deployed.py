"""A workflow in several versions of its code, as they are deployed one after another: the environment says which."""

from __future__ import annotations

import os
from typing import Any

import dramatiq

import dramatiq_durable as durable

VERSION = os.environ.get("TEST_VERSION", "old")

broker = durable.DurableBroker(os.environ.get("TEST_URL"), reclaim_delay=2)
dramatiq.set_broker(broker)


@durable.activity(queue_name="printing")
def print_receipt(kind: str) -> str:
    return f"{kind} by {VERSION}"


if VERSION == "old":

    @durable.workflow(queue_name="shop")
    async def order() -> Any:
        first = await print_receipt.execute("plain")
        await durable.wait_for_signal("paid")
        return [first, await print_receipt.execute("plain")]

elif VERSION == "careless":

    @durable.workflow(queue_name="shop")
    async def order() -> Any:
        await print_receipt.execute("fancy")
        await print_receipt.execute("fancy")
        await durable.wait_for_signal("paid")
        return "careless"

elif VERSION == "patched":

    @durable.workflow(queue_name="shop")
    async def order() -> Any:
        first = await print_receipt.execute("fancy" if durable.patched("fancy") else "plain")
        await durable.wait_for_signal("paid")
        return [first, await print_receipt.execute("fancy" if durable.patched("fancy") else "plain")]

elif VERSION == "clean":

    @durable.workflow(queue_name="shop")
    async def order() -> Any:
        durable.deprecate_patch("fancy")
        first = await print_receipt.execute("fancy")
        await durable.wait_for_signal("paid")
        return [first, await print_receipt.execute("fancy")]
