"""What the page on workflow code shows runs, and replays; what it says of the lint is what the lint says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dramatiq_durable as durable
from dramatiq_durable.workflow.lint import lint_paths
from tests.workflow.test_engine_asyncio import check
from tests.workflow.test_engine_support import Run, WorkflowBroker

broker: Any = WorkflowBroker(middleware=[])
PAGE = (Path(__file__).parents[2] / "docs" / "workflow-code.md").read_text()


@durable.activity(broker=broker)
def charge(order_id: str, cents: int) -> str: ...


@durable.activity(broker=broker)
def reserve(order_id: str) -> bool: ...


@durable.activity(broker=broker)
def refund(receipt: str) -> None: ...


def example() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1].replace('queue_name="orders"', "broker=broker")


def test_the_example_runs_and_replays() -> None:
    names: dict[str, Any] = {**globals(), "durable": durable}
    exec(example(), names)
    run = Run(names["order"], "o-1")
    run.complete(1, "r-1")
    run.complete(2, True)
    assert [(c.event_type, c.attributes()) for c in run.last] == [("TimerStarted", {"ms": 259_200_000})]
    run.fire(3)
    assert [c.name for c in run.last] == ["refund"]
    run.cancel()
    run.complete(4)
    assert run.last[-1].event_type in ("WorkflowCancelled", "WorkflowCompleted")
    check(run)


def test_the_lint_says_what_the_page_says(tmp_path: Path) -> None:
    file = tmp_path / "orders.py"
    file.write_text(
        "import requests\nimport dramatiq_durable as durable\n"
        + "\n" * 7
        + """
@durable.workflow
async def order(x):
    print(           requests.get(x))
""".lstrip("\n")
    )
    (finding,) = lint_paths([file])
    shown = re.search(r"^shop/orders.py:\d+:\d+: (.*)$", PAGE, re.MULTILINE)
    assert shown is not None
    assert shown[1] == f"{finding.what} (workflow {finding.workflow}): {finding.instead}"


def test_the_lint_has_nothing_to_say_about_the_example(tmp_path: Path) -> None:
    file = tmp_path / "order.py"
    file.write_text("import dramatiq_durable as durable\n" + example())
    assert lint_paths([file]) == []
