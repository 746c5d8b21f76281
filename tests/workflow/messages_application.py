"""What the worker processes of the tests of messages run; they are killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dramatiq

import dramatiq_durable as durable

broker = durable.DurableBroker(os.environ["TEST_URL"], reclaim_delay=1)
dramatiq.set_broker(broker)


@durable.activity(queue_name="elsewhere")
def gate(folder: str, name: str) -> str:
    """Says that it has begun, and returns once it may."""
    (Path(folder) / f"{name}-begun").touch()
    while not (Path(folder) / "open").exists():
        time.sleep(0.01)
    return name


@durable.workflow(queue_name="elsewhere")
async def ledger(folder: str) -> list[str]:
    entries: list[str] = []

    def is_new(entry: str) -> None:
        if entry in entries:
            raise ValueError("it is there already")

    @durable.on_update("enter", validator=is_new)
    def enter(entry: str) -> int:
        entries.append(entry)
        return len(entries)

    @durable.on_update("pass_gate")
    async def pass_gate(name: str) -> str:
        return f"passed as {await gate.execute(folder, name)}"

    @durable.on_query("entries")
    def show() -> list[str]:
        return entries

    @durable.on_signal("note")
    def note(entry: str) -> None:
        entries.append(entry)

    await durable.wait_for_signal("end")
    await durable.wait_condition(durable.all_handlers_finished)
    return entries
