"""One of several processes that start runs with the same ids: prints what became of each, as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"])
dramatiq.set_broker(broker)


@durable.workflow(queue_name="races")
async def raced() -> Any:
    return await durable.wait_for_signal("end")


def main(conflict: Any, reuse: Any, rounds: int) -> None:
    print("ready", flush=True)
    outcomes: list[list[str | None]] = []
    counts: Counter[str] = Counter()
    for n in range(rounds):
        named = raced.options(workflow_id=f"id-{n}", id_conflict=conflict, id_reuse=reuse)
        try:
            outcomes.append([f"id-{n}", named.start().run_id])
            counts["started"] += 1
        except durable.WorkflowAlreadyStarted:
            counts["exists"] += 1
    print(json.dumps({"outcomes": outcomes, "counts": counts}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
