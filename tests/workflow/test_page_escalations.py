"""What the page on human steps shows runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
import psycopg

import dramatiq_durable as durable
from dramatiq_durable import escalations
from tests.support import wait_until

PAGE = (Path(__file__).parents[2] / "docs" / "human-steps.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_runs(broker: durable.DurableBroker, start_worker: Callable[..., dramatiq.Worker]) -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    start_worker()
    runs = [names["refund"].start(f"o-{n}", cents) for n, cents in enumerate((500, 20_000, 90_000))]
    wait_until(lambda: escalations.stats("accounting").waiting == 2)
    names["work_off"]("ann")
    assert [run.result(timeout=10) for run in runs] == ["refunded", "refunded", "refused: too much"]


def test_so_does_the_sql(
    broker: durable.DurableBroker, start_worker: Callable[..., dramatiq.Worker], database_url: str
) -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    start_worker()
    run = names["refund"].start("o-1", 20_000)
    (asked,) = wait_until(lambda: escalations.list(subject="o-1"))
    with psycopg.connect(database_url) as conn:
        conn.execute(block("sql").replace("6f2c...", asked.id).encode())
    assert run.result(timeout=10) == "refunded"
