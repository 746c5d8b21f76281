"""The replayer: exported histories against the code at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Environment, Replayer


def declare(*, tax: bool = False) -> durable.Workflow[Any, Any]:
    """A workflow, as it was and as it was changed."""

    broker = durable_broker()

    @durable.activity(actor_name="charge", broker=broker)
    def charge(cents: int) -> str:
        return f"receipt-{cents}"

    @durable.workflow(name="order", broker=broker)
    async def order(cents: int) -> str:
        await durable.sleep(60)
        return await charge.execute(cents + 19 if tax else cents)

    return order


def durable_broker() -> durable.DurableBroker:
    """A broker for one version of the code."""
    return durable.DurableBroker("postgresql://nobody@127.0.0.1:1/nothing")


@pytest.fixture
def exported() -> str:
    with Environment() as env:
        handle = env.start(declare(), 500)
        handle.result()
        return handle.export()


def test_text_and_path(exported: str, tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    path.write_text(exported)
    replayer = Replayer([declare()])
    replayer.replay(exported)
    replayer.replay(path)
    replayer.replay(str(path))


def test_the_first_difference_is_shown(exported: str, tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    path.write_text(exported)
    with pytest.raises(durable.Nondeterminism) as error:
        Replayer([declare(tax=True)]).replay(path)
    e = error.value
    assert e.event_id == 4
    assert e.expected.startswith("ActivityScheduled 'charge' with arguments")
    assert e.got.startswith("ActivityScheduled 'charge' with arguments")
    assert e.expected != e.got
    assert "at event 4 the history says ActivityScheduled 'charge'" in str(e)
    workflow_id = json.loads(exported)["info"]["workflow_id"]
    assert e.__notes__ == [f"while replaying {path}: 'order', workflow id {workflow_id!r}"]


def test_histories_of_runs_that_are_open_or_ended_from_outside() -> None:
    order = declare()
    with Environment() as env:
        new = env.start(order.options(delay=1000), 500)
        waits = env.start(order, 500)
        replayer = Replayer([order])
        replayer.replay(waits.export())
        waits.terminate("enough")
        replayer.replay(waits.export())
        env.advance(0)
        replayer.replay(new.export())


def test_what_is_no_history(exported: str, tmp_path: Path) -> None:
    replayer = Replayer([declare()])
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no exported history") as error:
        replayer.replay(path)
    assert error.value.__notes__ == [f"in {path}"]
    with pytest.raises(FileNotFoundError):
        replayer.replay(tmp_path / "missing.json")
    with pytest.raises(durable.DurableError, match="of the workflow 'order', and this Replayer knows none"):
        Replayer([]).replay(exported)
    with pytest.raises(TypeError, match="takes workflows"):
        Replayer([lambda: None])  # type: ignore[list-item]
