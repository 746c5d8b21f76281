"""The orders that the demo runs: the rows of ``orders.csv``, and what has to become of each."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

CSV = Path(__file__).with_name("orders.csv")


@dataclass(frozen=True, slots=True)
class Order:
    """One row.

    Attributes:
      order_id(str): the run's workflow id is ``order-`` and this.
      cents(int): the price.
      card(str): ``valid``, ``busy`` (the first two attempts to charge it fail) or ``declined``.
      shelf(str): ``tidy``, or ``stuck`` (the first attempt to reserve fails).
      answer(str): what the second process signals: ``approve``, ``reject`` or ``none``.
      ends(str): ``shipped``, ``rejected``, ``expired`` or ``declined``.
    """

    order_id: str
    cents: int
    card: str
    shelf: str
    answer: str
    ends: str

    @property
    def workflow_id(self) -> str:
        return f"order-{self.order_id}"


def read(limit: int | None = None) -> list[Order]:
    """Return the first ``limit`` orders, or all."""
    with CSV.open(newline="") as file:
        rows = [Order(**{**row, "cents": int(row["cents"])}) for row in csv.DictReader(file)]  # type: ignore[arg-type]
    return rows[:limit]
