"""The proof at the end: the database against the rows of ``orders.csv``.  It believes nothing but what is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import psycopg

import dramatiq_durable as durable

from .book import Order

#: What is in the application's tables once an order has ended: charges, refunds, reserved, put back, shipments.
ROWS = {
    "shipped": (1, 0, 1, 0, 1),
    "rejected": (1, 1, 1, 1, 0),
    "expired": (1, 1, 1, 1, 0),
    "declined": (0, 0, 1, 1, 0),
}

Count = tuple[int, int, int, int, int]
NOTHING: Count = (0, 0, 0, 0, 0)


def prove(url: str, orders: Sequence[Order]) -> tuple[list[str], list[str]]:
    """Compare what the database has with what has to be there.

    Returns:
      What holds, one sentence each, and what does not.  Everything holds if the second list is empty.
    """
    broker = durable.DurableBroker(url)
    held: list[str] = []
    broken: list[str] = []

    def check(what: str, wrong: list[str]) -> None:
        if wrong:
            broken.append(f"{what}: not so for {len(wrong)}, " + "; ".join(wrong[:5]))
        else:
            held.append(what)

    try:
        with psycopg.connect(url) as conn:
            endings = Counter(order.ends for order in orders)
            check(
                f"every one of {len(orders)} orders ended as its row says ("
                + ", ".join(f"{number} {ending}" for ending, number in endings.most_common())
                + ")",
                [line for order in orders if (line := _wrong_ending(broker, order))],
            )
            counted = _rows(conn)
            twice = conn.execute(
                "SELECT order_id || ' was charged ' || count(*) || ' times' FROM shop.charge"
                " GROUP BY order_id HAVING count(*) > 1 ORDER BY 1"
            ).fetchall()
            check("no charge was recorded twice", [line for (line,) in twice])
            check(
                "each charge, refund, reservation and shipment is there as often as it has to be",
                [
                    f"{order.order_id} ({order.ends}) has {_words(counted.get(order.order_id, NOTHING))}"
                    for order in orders
                    if counted.get(order.order_id, NOTHING) != ROWS[order.ends]
                ]
                + [f"{order_id} is no order" for order_id in counted.keys() - {order.order_id for order in orders}],
            )
            expected = sum(order.cents for order in orders if order.ends == "shipped")
            (booked,) = conn.execute(
                "SELECT (SELECT coalesce(sum(cents), 0) FROM shop.charge)"
                " - (SELECT coalesce(sum(cents), 0) FROM shop.refund)"
            ).fetchone() or (None,)
            check(
                f"charges less refunds are what the shipped orders cost: {expected / 100:,.2f}",
                [] if booked == expected else [f"the tables, which say {booked / 100:,.2f}"],
            )
            left = conn.execute(
                "SELECT actor, kind::text, due_at::text, lease_token IS NOT NULL FROM durable.message"
            ).fetchall()
            (dead,) = conn.execute("SELECT count(*) FROM durable.dead_letter").fetchone() or (-1,)
            check(
                "no message is left behind, and none is dead",
                [f"{len(left)} messages ({left[:3]}) and {dead} dead letters"] if left or dead else [],
            )
    finally:
        broker.close()
    return held, broken


def _wrong_ending(broker: durable.DurableBroker, order: Order) -> str | None:
    """What is wrong with an order's run, or None."""
    handle = durable.get_handle(order.workflow_id, broker=broker)
    try:
        ending = handle.result(timeout=0)
    except durable.WorkflowFailed as error:
        ending = "declined" if _has_cause(error, "CardDeclined") else f"failed with {error}"
    except durable.DurableError as error:
        ending = f"{type(error).__name__}: {error}"
    if ending != order.ends:
        return f"{order.order_id}: {ending} instead of {order.ends}"
    # The history is the run's one order of events: each thing was recorded once in it, too.
    recorded = Counter((event.type, event.name) for event in handle.history())
    charged = recorded["ActivityCompleted", "charge"]
    closed = sum(number for (type, _), number in recorded.items() if type in ("WorkflowCompleted", "WorkflowFailed"))
    if charged != (order.ends != "declined") or closed != 1:
        return f"{order.order_id}: its history has {charged} charges and {closed} endings"
    return None


def _has_cause(error: BaseException | None, name: str) -> bool:
    while error is not None:
        if getattr(error, "type", None) == name:
            return True
        error = error.__cause__
    return False


def _rows(conn: psycopg.Connection[tuple[object, ...]]) -> dict[str, Count]:
    """How many charges, refunds, reservations, returns and shipments each order has."""
    counts: dict[str, list[int]] = {}
    queries = (
        "SELECT order_id, count(*) FROM shop.charge GROUP BY 1",
        "SELECT order_id, count(*) FROM shop.refund GROUP BY 1",
        "SELECT order_id, count(*) FROM shop.reservation WHERE pieces > 0 GROUP BY 1",
        "SELECT order_id, count(*) FROM shop.reservation WHERE pieces < 0 GROUP BY 1",
        "SELECT order_id, count(*) FROM shop.shipment GROUP BY 1",
    )
    for place, query in enumerate(queries):
        for order_id, number in conn.execute(query):
            counts.setdefault(str(order_id), [0] * 5)[place] = int(str(number))
    return {order_id: (row[0], row[1], row[2], row[3], row[4]) for order_id, row in counts.items()}


def _words(count: Count) -> str:
    return "{} charges, {} refunds, {} reservations, {} put back, {} shipments".format(*count)
