"""``dramatiq-durable escalation`` on a real database."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest

import dramatiq_durable as durable
from dramatiq_durable import escalations
from tests.support import wait_until
from tests.support.postgres import Cluster
from tests.support.scratch import Scratch, scratch
from tests.test_cli_commands import attempt, listed, refused, run, working


@pytest.fixture
def made(cluster: Cluster) -> Iterator[Scratch]:
    with scratch(cluster, cluster.template()) as made:
        yield made


@pytest.fixture
def ask(made: Scratch) -> Iterator[durable.Workflow[Any, Any]]:
    before = dramatiq.broker.global_broker
    broker = durable.DurableBroker(made.url, middleware=[])
    dramatiq.set_broker(broker)

    @durable.workflow(queue_name="desk")
    async def ask(facts: dict[str, Any]) -> Any:
        try:
            return await durable.escalate(**facts)
        except durable.EscalationCancelled:
            return "cancelled"

    with working(broker):
        yield ask
    dramatiq.broker.global_broker = before


def opened(handle: durable.WorkflowHandle[Any]) -> str:
    return wait_until(lambda: escalations.list(run_id=handle.run_id))[0].id


def test_from_the_question_to_the_answer(made: Scratch, ask: durable.Workflow[Any, Any]) -> None:
    assert "there are no escalations" in run(made, "escalation", "list").output
    handle = ask.options(workflow_id="o-1").start(
        {"role": "clerk", "subject": "o-1", "payload": {"cents": 5}, "metadata": {"region": "eu"}, "timeout": "1 day"}
    )
    id = opened(handle)
    (row,) = listed(
        made, "escalation", "list", "--role", "clerk", "--status", "waiting", "--metadata", '{"region": "eu"}'
    )
    assert (row["id"], row["subject"], row["payload"]) == (id, "o-1", {"cents": 5})
    table = run(made, "escalation", "list").output
    assert "o-1" in table
    assert "claimed by" not in table
    assert listed(made, "escalation", "list", "--subject", "other") == []
    assert listed(made, "escalation", "list", "--type", "other") == []
    assert listed(made, "escalation", "list", "--after", id) == []
    assert '{"cents": 5}' in run(made, "escalation", "show", id).output
    assert "claimed" in run(made, "escalation", "claim", id, "--by", "ann", "--for", "1 hour").output
    assert "claimed by 'ann'" in refused(made, "escalation", "resolve", id, "1", "--by", "bob")
    assert "claimed by 'ann'" in refused(made, "escalation", "release", id, "--by", "bob")
    assert run(made, "escalation", "release", id, "--by", "ann").output == f"released: {id} (o-1)\n"
    assert listed(made, "escalation", "reassign", id, "--role", "boss")["role"] == "boss"
    assert attempt(made, "escalation", "claim", "--role", "clerk").exit_code == 1
    claimed = listed(made, "escalation", "claim", "--role", "boss", "--metadata", '{"region": "eu"}', "--by", "cy")
    assert (claimed["id"], claimed["claimed_by"], claimed["claimed_until"]) == (id, "cy", None)
    assert "claimed by" in run(made, "escalation", "list").output
    run(made, "escalation", "resolve", id, '{"ok": true}', "--by", "cy")
    assert handle.result(timeout=10) == {"ok": True}
    assert "is resolved already" in refused(made, "escalation", "cancel", id)
    assert listed(made, "escalation", "stats", "--role", "boss") == {
        "waiting": 0,
        "claimed": 0,
        "resolved": 1,
        "cancelled": 0,
        "timed_out": 0,
    }
    timeline = run(made, "workflow", "history", "o-1").output
    assert "EscalationOpened" in timeline
    assert '{"ok": true}' in timeline


def test_the_answer_is_by_whoever_is_logged_in(
    made: Scratch, ask: durable.Workflow[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "dora")
    id = opened(ask.start({"role": "clerk"}))
    assert listed(made, "escalation", "resolve", id)["resolved_by"] == "dora"


def test_cancelling_one_and_all(made: Scratch, ask: durable.Workflow[Any, Any]) -> None:
    handles = [ask.start({"role": "clerk"}) for _ in range(3)]
    ids = [opened(handle) for handle in handles]
    run(made, "escalation", "claim", ids[1])
    assert listed(made, "escalation", "cancel", ids[0])["status"] == "cancelled"
    assert run(made, "escalation", "cancel", "--role", "clerk", "--dry-run").output == (
        "2 escalations would be cancelled\n"
    )
    assert "add --yes" in attempt(made, "escalation", "cancel", "--role", "clerk").output
    assert listed(made, "escalation", "cancel", "--role", "clerk", "--yes") == {"cancelled": 2}
    assert listed(made, "escalation", "cancel", "--role", "clerk", "--yes") == {"cancelled": 0}
    assert [handle.result(timeout=10) for handle in handles] == ["cancelled"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("claim",), "either ID, or --role"),
        (("claim", "x", "--role", "r"), "either ID, or --role"),
        (("claim", "x", "--metadata", "{}"), "goes with --role"),
        (("claim", "--role", "r", "--metadata", "[]"), "an object in JSON"),
        (("claim", "--role", "r", "--for", "soon"), "--for: "),
        (("resolve", "x", "yes"), "the payload is no JSON"),
        (("cancel",), "either ID, or --role"),
        (("list", "--status", "open"), "--status"),
        (("reassign", "x"), "--role"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    done = attempt("postgresql://nowhere.invalid/x", "escalation", *arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_what_is_not_there(made: Scratch) -> None:
    for command in (("show",), ("claim",), ("resolve",), ("cancel",), ("release",), ("reassign", "--role", "r")):
        verb, *more = command
        assert "there is no escalation" in refused(made, "escalation", verb, str(uuid.uuid4()), *more)
