"""The second process: somebody who looks at the orders that were charged, and approves or rejects them.

It reads the shop's own table and answers with signals.  Each signal has an id, so that repeating one after an outage
of Postgres, when nobody knows whether it was taken, is still one signal.  It ends when everybody has the answer that
``orders.csv`` gives; some never get one.
"""

from __future__ import annotations

import argparse
import time

import psycopg

import dramatiq_durable as durable

from . import book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the database")
    parser.add_argument("--orders", type=int, default=None, help="how many of the orders")
    arguments = parser.parse_args()
    broker = durable.DurableBroker(arguments.url)
    open_orders = {order.order_id: order for order in book.read(arguments.orders) if order.answer != "none"}
    while open_orders:
        try:
            with psycopg.connect(arguments.url) as conn:
                charged = {order_id for (order_id,) in conn.execute("SELECT order_id FROM shop.charge")}
            for order_id in charged & open_orders.keys():
                order = open_orders[order_id]
                handle = durable.get_handle(order.workflow_id, broker=broker)
                handle.signal("approval", {"approved": order.answer == "approve"}, id="the one decision")
                del open_orders[order_id]
        except (psycopg.OperationalError, durable.DatabaseUnavailable) as error:
            print(f"the database is away, asking again: {error}", flush=True)
        time.sleep(0.2)
    broker.close()


if __name__ == "__main__":
    main()
