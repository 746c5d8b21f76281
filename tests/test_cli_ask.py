"""``dramatiq-durable workflow query`` and ``update``, with a real worker."""

from __future__ import annotations

from collections.abc import Iterator

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch
from tests.test_cli_commands import attempt, listed, refused, run, working


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


@pytest.fixture
def counter(made: Scratch) -> Iterator[Scratch]:
    """A run with the id c-1 that counts, and a worker."""
    before = dramatiq.broker.global_broker
    broker = durable.DurableBroker(made.url, middleware=[])
    dramatiq.set_broker(broker)

    @durable.workflow(queue_name="hall")
    async def count() -> int:
        total = 0

        @durable.on_query("total")
        def total_now(factor: int = 1) -> int:
            return total * factor

        @durable.on_update("add", validator=lambda n: _positive(n))
        async def add(n: int) -> dict[str, int]:
            nonlocal total
            total += n
            return {"total": total}

        await durable.wait_for_signal("end")
        return total

    with working(broker):
        count.options(workflow_id="c-1").start()
        yield made
    dramatiq.broker.global_broker = before


def _positive(n: int) -> None:
    if n <= 0:
        raise ValueError("only more")


def test_a_run_is_asked_and_told(counter: Scratch) -> None:
    assert listed(counter, "workflow", "query", "c-1", "total") == 0
    assert run(counter, "workflow", "update", "c-1", "add", "2").output == '{"total": 2}\n'
    assert listed(counter, "workflow", "update", "c-1", "add", "3", "--id", "once") == {"total": 5}
    assert listed(counter, "workflow", "update", "c-1", "add", "3", "--id", "once") == {"total": 5}
    assert run(counter, "workflow", "query", "c-1", "total", "10").output == "50\n"
    accepted = listed(counter, "workflow", "update", "c-1", "add", "1", "--wait", "accepted", "--id", "later")
    assert accepted == {"update_id": "later", "status": "accepted"}
    assert durable.get_handle("c-1").get_update("later").result(timeout=10) == {"total": 6}
    assert "only more" in refused(counter, "workflow", "update", "c-1", "add", "0")
    assert "total" in refused(counter, "workflow", "query", "c-1", "nothing")
    assert "there is no workflow" in refused(counter, "workflow", "query", "nobody", "total")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "c-1", "total", "x"), "argument 1 is no JSON"),
        (("query", "c-1", "total", "--timeout", "soon"), "--timeout: "),
        (("update", "c-1", "add", "1", "--wait", "done"), "--wait"),
        (("update", "c-1"), "NAME"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    done = attempt("postgresql://nowhere.invalid/x", "workflow", *arguments)
    assert done.exit_code == 2
    assert message in done.output
