"""What a login can make a step of its own run do to the streams and runs of others: nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from dramatiq_durable.arrays import Uuid
from dramatiq_durable.operations import Advance, Context
from tests.sql.api import Claimed, Session, Worker, derived, send_activity, send_timer, start_child, step

from .conftest import Grant
from .scene import ONE_TEXT, Scene, everything, refusal, set_up


@pytest.fixture
def scene(db: Session, grant: Grant) -> Scene:
    return set_up(db, grant)


class Own(NamedTuple):
    run: bytes
    worker: Worker
    task: Claimed


@pytest.fixture
def own(scene: Scene) -> Own:
    """A run of the attacker's own stream, whose task it has leased."""
    _, run = scene.db.start(scene.mine, "mine")
    worker = scene.attacker.register(scene.mine)
    return Own(run, worker, worker.one())


@pytest.mark.parametrize("kind", ["activity", "timer", "child"])
def test_a_step_cannot_send_to_a_foreign_stream(scene: Scene, own: Own, kind: str) -> None:
    before = everything(scene.db)
    outcomes = []
    for stream in (scene.theirs, 2**31 - 1):
        advance = step(own.task, 1, ("Sent", 1))
        if kind == "child":
            advance.children = [start_child(stream, 1, "order-1", id_conflict="terminate_existing")]
        else:
            advance.sends = [send_activity(stream, 1) if kind == "activity" else send_timer(stream, 1)]
        outcomes.append(refusal(lambda a=advance: own.worker.advance(a)))
    assert outcomes[0] == outcomes[1] == ("error", "DD001", ONE_TEXT, None, None)
    assert everything(scene.db) == before


def raw_advance(own: Own, **changes: Any) -> list[Any]:
    """The call's answer, with arrays of one's own making in the places of some."""
    context = Context(own.worker.session.sender, own.worker.session.batches)
    context.worker = Uuid(own.worker.token)
    arguments = Advance.arguments([step(own.task, 1, ("Sent", 1))], context)
    names = ARGUMENTS
    places: list[str] = []
    values: list[Any] = []
    for name, value in zip(names, arguments, strict=True):
        if name in changes:
            places.append(changes[name])
        else:
            places.append("%s")
            values.append(value)
    return own.worker.session.sql(f"SELECT * FROM durable.advance({', '.join(places)})", *values)


# fmt: off
ARGUMENTS = [
    "worker", "messages", "leases", "expected", "after", "last", "close",
    "event_step", "event_id", "event_type", "event_at", "event_seq", "event_name", "event_payload", "event_attributes",
    "inbox_step", "inbox_id",
    "send_step", "send_kind", "send_stream", "send_seq", "send_actor", "send_priority", "send_delay", "send_payload",
    "send_eager", "drop_step", "drop_seq",
    "child_step", "child_seq", "child_stream", "child_name", "child_workflow_id", "child_input", "child_options",
    "cancel_step", "cancel_seq",
]
# fmt: on


@pytest.mark.parametrize("trick", ["shifted by a send without a step", "another lower bound", "no step"])
def test_arrays_that_do_not_fit_cannot_smuggle_a_child_to_a_foreign_stream(scene: Scene, own: Own, trick: str) -> None:
    child = {
        "child_seq": "'{1}'::int[]",
        "child_name": "'{x}'::text[]",
        "child_workflow_id": "'{smuggled}'::text[]",
        "child_input": "ARRAY[''::bytea]",
        "child_options": "'{\"{}\"}'::text[]",
        "child_step": "'{1}'::int[]",
        "child_stream": f"'{{{scene.theirs}}}'::int[]",
    }
    if trick == "shifted by a send without a step":
        child["send_stream"] = f"'{{{scene.mine}}}'::int[]"
    elif trick == "another lower bound":
        child["child_stream"] = f"'[0:1]={{{scene.mine},{scene.theirs}}}'::int[]"
        child["child_step"] = "'{1,0}'::int[]"
    else:
        child["child_step"] = "'{NULL}'::int[]"
    outcome = refusal(lambda: raw_advance(own, **child))
    assert scene.db.value("SELECT count(*) FROM durable.run WHERE workflow_id = 'smuggled'") == 0
    if trick != "no step":
        assert outcome[1] == "DD001"


@pytest.mark.parametrize("trick", ["shifted", "another lower bound", "no step"])
def test_arrays_that_do_not_fit_cannot_smuggle_an_activity(scene: Scene, own: Own, trick: str) -> None:
    send = {
        "send_seq": "'{1}'::int[]",
        "send_kind": "'{a}'::text[]",
        "send_actor": "'{x}'::text[]",
        "send_priority": "'{0}'::int[]",
        "send_delay": "'{0}'::bigint[]",
        "send_payload": "ARRAY['smuggled'::bytea]",
        "send_eager": "'{f}'::boolean[]",
        "send_step": "'{1}'::int[]",
        "send_stream": f"'{{{scene.theirs}}}'::int[]",
    }
    if trick == "shifted":
        send["child_step"] = "'{0}'::int[]"
        send["child_stream"] = f"'{{{scene.mine}}}'::int[]"
    elif trick == "another lower bound":
        send["send_stream"] = f"'[-1:0]={{{scene.mine},{scene.theirs}}}'::int[]"
        send["send_step"] = "'{0,1}'::int[]"
    else:
        send["send_step"] = "'{NULL}'::int[]"
    refusal(lambda: raw_advance(own, **send))
    assert scene.db.value("SELECT count(*) FROM durable.message WHERE payload = 'smuggled'") == 0


def test_eager_is_for_streams_that_one_consumes(scene: Scene, own: Own) -> None:
    advance = step(own.task, 1, ("ActivityScheduled", 1, "act"), ("ActivityScheduled", 2, "act"))
    advance.sends = [send_activity(scene.out, 1, eager=True), send_activity(scene.mine, 2, eager=True)]
    assert own.worker.advance(advance) == ["ok"]
    assert list(advance.eager) == [2]


def test_a_step_cannot_take_or_drop_what_is_anothers(scene: Scene, own: Own) -> None:
    scene.db.post(scene.run)
    foreign = scene.db.inbox(scene.run)[0][0]
    before = everything(scene.db)[3]
    for missing in (foreign, foreign + 1000):
        assert own.worker.advance(step(own.task, 1, ("Sent", 1), inbox=[missing])) == ["refused"]
    assert own.worker.advance(step(own.task, 1, ("Sent", 1), drops=[1], cancels=[1])) == ["ok"]
    assert everything(scene.db)[3] == before
    assert scene.victim.complete(scene.activity) == []


def test_the_attackers_child_of_the_same_name_ends_no_foreign_run(scene: Scene, own: Own) -> None:
    advance = step(own.task, 1, ("ChildStarted", 1, "c"))
    advance.children = [start_child(scene.out, 1, "order-1", id_conflict="terminate_existing")]
    assert own.worker.advance(advance) == ["ok"]
    assert scene.db.run(scene.run)[0] == "running"
    scene.attacker.terminate(own.run)
    assert scene.db.run(derived(own.run, 1))[0] == "terminated"
    assert scene.db.run(scene.run)[0] == "running"


@pytest.mark.parametrize("type", ["SignalSent", "CancelSent"])
def test_a_step_reaches_no_foreign_run(scene: Scene, own: Own, type: str) -> None:
    before = [row for row in everything(scene.db)[3] if row[0] == Uuid(scene.run)]
    # A child that the run never started.
    facts = {"workflow_id": "order-1", "child": 1}
    sent = step(own.task, 1, (type, 1, "go", b"1", facts), (type, 2, "go", b"1", {"workflow_id": "order-1"}))
    sent.events.append(sent.events[0]._replace(event_id=4, seq=3, attributes={"workflow_id": "nothing"}))
    sent.last = 4
    assert own.worker.advance(sent) == ["ok"]
    told = scene.db.inbox(own.run)
    assert [(row[1], row[2], row[5]) for row in told] == [
        ("MessageFailed", seq, {"reason": "missing"}) for seq in (1, 2, 3)
    ]
    assert [row for row in everything(scene.db)[3] if row[0] == Uuid(scene.run)] == before


def test_a_step_answers_no_foreign_update(scene: Scene, own: Own) -> None:
    scene.db.update(scene.run, "u")
    said = step(own.task, 1, ("UpdateCompleted", None, "set", b"1", {"update_id": "u"}))
    assert own.worker.advance(said) == ["ok"]
    assert scene.db.updates(scene.run, "u") == [("requested", None, None)]
