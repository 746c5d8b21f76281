"""Every procedure with every sort of nonsense in every argument, by a login that may call it.

Nothing may be an internal error, take long, tell or change what is somebody else's, or strand a message.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.sql.api import Claimed, Session, Worker, derived, new_id, send_activity, send_limited, step

from .conftest import Grant, Scoped
from .test_catalogue import MONITOR, WORKER

#: Another text here makes other nonsense.
SEED = "DRAMATIQ_DURABLE_TEST_SEED"

#: How many calls a procedure gets.
CALLS = 150

#: What else would nearly always be refused for one argument, whatever the others are.
USUAL = {"p_stream": "mine", "p_args": '["\U0001f600"]', "p_kwargs": '{"a": {"b": -0.0}}', "p_options": "{}"}

#: What a caller who passes nonsense may be told: data and integrity errors, limits, and our own refusals.
TOLD = ("22", "23", "54", "DD")


class Scene(NamedTuple):
    db: Session
    attacker: Scoped
    mine: int
    theirs: int
    worker: Worker
    run: bytes
    claimed: list[Claimed]
    victims_run: bytes
    victim: Worker


@pytest.fixture
def scene(db: Session, grant: Grant) -> Scene:
    attacker = grant(consume=("mine",), produce=("mine",))
    mine, theirs = db.stream("mine"), db.stream("theirs")
    victim = db.register(theirs)
    _, victims_run = db.start(theirs, "their-order")
    db.enqueue(theirs, b"secret", b"secret")
    victim.claim(2)
    attacker.enqueue(mine, b"1", b"2", b"3", b"4")
    _, run = attacker.start(mine, "w")
    worker = attacker.register(mine)
    claimed = worker.claim()
    task = next(c for c in claimed if c.kind == "s")
    limits = {"options": {"durable_limits": {"schedule_to_start": 1, "heartbeat": 5000}}}
    advance = step(
        task,
        1,
        ("ActivityScheduled", 1, "a"),
        ("ActivityScheduled", 2, "a"),
        ("ActivityScheduled", 3, "a", None, limits),
        ("EscalationOpened", 4, "w", b"1", {}),
    )
    advance.sends = [send_activity(mine, 1), send_activity(mine, 2), send_limited(mine, 3)]
    assert worker.advance(advance) == ["ok"]
    attacker.post(run)
    db.schedule("w", theirs)
    victim.claim(1)
    attacker.schedule("w", mine)
    claimed += worker.claim()
    return Scene(db, attacker, mine, theirs, worker, run, claimed, victims_run, victim)


def hexed(value: bytes) -> str:
    return value.hex()


def scalar(kind: str, scene: Scene, rng: random.Random) -> str:
    """The text of a value of a type; None is NULL."""
    ids = [c.message_id for c in scene.claimed] + [c.lease for c in scene.claimed] + [derived(scene.run, 4)]
    if kind == "uuid":
        return hexed(
            rng.choice(
                [*ids, *ids, scene.run, scene.victims_run, scene.worker.token, scene.victim.token, new_id(), bytes(16)]
            )
        )
    if kind in ("integer", "bigint", "smallint"):
        least, most = {
            "integer": (-(2**31), 2**31 - 1),
            "bigint": (-(2**63), 2**63 - 1),
            "smallint": (-(2**15), 2**15 - 1),
        }[kind]
        return str(
            rng.choice([0, 1, 1, 2, 3, -1, scene.mine, scene.mine, scene.theirs, 100_000, least, most, scene.victim.id])
        )
    if kind == "text":
        return rng.choice(
            [
                "",
                "w",
                "mine",
                "theirs",
                "their-order",
                "fail",
                "reject",
                "terminate_existing",
                "a",
                "ActivityCompleted",
                "SignalReceived",
                "completed",
                "running",
                "{}",
                "[1]",
                "null",
                '{"delay":"x"}',
                '{"delay":1e30}',
                '{"a":"\\u0000"}',
                "{",
                "'; SELECT 1 --",
                "x" * 201,
                "x" * 100_000,
                "\N{SNOWMAN}",
            ]
        )
    if kind == "bytea":
        return rng.choice(["", "\\x00", "\\x" + "ff" * 1000])
    if kind == "double precision":
        return rng.choice(["0", "1", "-1", "0.5", "1e308", "-1e308", "NaN", "Infinity", "-Infinity", "x"])
    if kind == "boolean":
        return rng.choice(["t", "f"])
    if kind == "jsonb":
        return rng.choice(["[]", "{}", "null", "1", '"x"', "[[[[]]]]", "[1e400]", '{"eta": "x", "": null}', "{"])
    if kind == "timestamp with time zone":
        return rng.choice(["now", "infinity", "-infinity", "2026-01-31T00:00:00Z", "294276-12-31", "soon"])
    if kind == "interval":
        return rng.choice(["0", "1 second", "-1 day", "11 years", "1e9 years", "infinity", "1 month -40 days"])
    raise AssertionError(f"a type that the fuzzer does not know: {kind}")


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def array(kind: str, scene: Scene, rng: random.Random) -> str | None:
    shape = rng.choice(["null", "empty", "one", "one", "some", "some", "some", "nulls", "square", "bounds", "huge"])
    item = lambda: quoted(scalar(kind, scene, rng))  # noqa: E731
    if shape == "null":
        return None
    if shape == "nulls":
        return "{NULL,NULL,NULL}"
    if shape == "square":
        return f"{{{{{item()},{item()}}},{{{item()},{item()}}}}}"
    if shape == "bounds":
        low = rng.choice([-1, 0, 2, -(2**31), 2**31 - 3])
        return f"[{low}:{low + 1}]={{{item()},{item()}}}"
    if shape == "huge":
        one = quoted(scalar(kind, scene, rng)[:100])
        return "{" + ",".join([one] * 20_000) + "}"
    count = {"empty": 0, "one": 1, "some": rng.choice([2, 3, 3, 5])}[shape]
    return "{" + ",".join("NULL" if rng.random() < 0.1 else item() for _ in range(count)) + "}"


#: What makes sense, where nonsense alone would hardly ever come to the point.
SENSE = {
    "p_name": ("w",),
    "p_verb": ("pause", "resume", "delete", "claim", "release", "resolve", "cancel", "reassign"),
    "p_kind": ("m", "s"),
    "p_overlap": ("skip", "buffer_one", "allow"),
    "p_if_exists": ("fail", "update", "keep"),
    "p_group": ("status", "name", "search", "entity"),
    "p_filter": (
        "{}",
        '{"status": "running"}',
        '{"names": ["w"]}',
        '{"search": "$.x == 1"}',
        '{"rest": "$.name == \\"wf\\""}',
        '{"rest": "$.** ? (@ like_regex \\"a+\\")", "uses": ["times", "parent", "search", "entity"]}',
        '{"rest": "nonsense ("}',
        '{"rest": "$x"}',
        '{"since": "soon"}',
        '{"names": 5}',
        '{"parents": ["their-order"]}',
        '{"workflow_like": "their%"}',
        '{"workflow_like": "\\\\"}',
        '{"queues": ["theirs"]}',
        '{"run_ids": ["x"]}',
    ),
}


def nonsense(kind: str, scene: Scene, rng: random.Random, name: str) -> str | None:
    if name in SENSE and rng.random() < 0.7:
        return rng.choice(SENSE[name])
    if name == "p_worker" and rng.random() < 0.95:
        return hexed(scene.worker.token)
    if name in USUAL and kind in ("text", "jsonb") and rng.random() < 0.8:
        return USUAL[name]
    if kind.endswith("[]"):
        return array(kind.removesuffix("[]"), scene, rng)
    return None if rng.random() < 0.15 else scalar(kind, scene, rng)


def victims(scene: Scene) -> list[Any]:
    return [
        scene.db.sql("SELECT * FROM durable.message WHERE stream_id <> %s ORDER BY 1", scene.mine),
        scene.db.sql("SELECT * FROM durable.run WHERE stream_id <> %s ORDER BY 1", scene.mine),
        scene.db.sql(
            "SELECT e.* FROM durable.event e JOIN durable.run r USING (run_id) WHERE r.stream_id <> %s ORDER BY 1, 2",
            scene.mine,
        ),
        scene.db.sql("SELECT * FROM durable.inbox WHERE run_id = %s", scene.victims_run.hex()),
        scene.db.sql("SELECT * FROM durable.worker WHERE worker_id = %s", scene.victim.id),
        scene.db.sql("SELECT * FROM durable.dead_letter WHERE stream_id <> %s", scene.mine),
        scene.db.sql("SELECT * FROM durable.schedule WHERE stream_id <> %s", scene.mine),
        scene.db.sql("SELECT * FROM durable.escalation WHERE stream_id <> %s", scene.mine),
        *[
            scene.db.sql(f"SELECT * FROM durable.{t} ORDER BY 1")
            for t in ("stream", "stream_grant", "login", "principal")
        ],
    ]


def stranded(scene: Scene) -> Any:
    """Messages that are leased and that no reclaim would find."""
    return scene.db.sql(
        "SELECT m.* FROM durable.message m WHERE m.lease_token IS NOT NULL AND NOT EXISTS ("
        "SELECT FROM durable.worker w WHERE w.worker_id = m.worker_id AND m.message_id = ANY (w.held))"
    )


def told(conn: psycopg.Connection[Any], query: str, values: list[str | None]) -> tuple[str, str | None]:
    """All that a caller gets to see, and the SQLSTATE of an error."""
    try:
        return repr(conn.execute(query.encode(), values).fetchall()), None
    except psycopg.Error as e:
        return f"{e} {e.diag.message_detail} {e.diag.context}", e.sqlstate or "connection lost"


@pytest.mark.parametrize("procedure", sorted(WORKER))
def test_nonsense_does_no_harm(scene: Scene, procedure: str) -> None:
    rng = random.Random(os.environ.get(SEED, "") + procedure)
    parameters = scene.db.sql(
        "SELECT u.name, format_type(u.type, NULL) FROM pg_proc p, "
        "unnest(coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargnames, p.proargmodes::text[]) "
        "u (type, name, mode) "
        "WHERE p.pronamespace = 'durable'::regnamespace AND p.proname = %s AND coalesce(u.mode, 'i') = 'i'",
        procedure,
    )
    parameters = [(name, kind) for name, kind in parameters if kind is not None]
    count = scene.db.value(
        "SELECT pronargs::int FROM pg_proc WHERE pronamespace = 'durable'::regnamespace AND proname = %s", procedure
    )
    parameters = parameters[:count]
    if procedure in MONITOR:
        scene.db.sql("UPDATE durable.principal SET kind = 'monitor' WHERE name = %s", scene.attacker.login)
    before = victims(scene)
    conn = scene.attacker.conn
    conn.execute("SET statement_timeout = '10s'")
    answered = 0
    batch = 0
    for _ in range(CALLS if parameters else 1):
        values = [nonsense(kind, scene, rng, name) for name, kind in parameters]
        if [name for name, _ in parameters[:2]] == ["p_sender", "p_batch"] and rng.random() < 0.9:
            batch += 1
            values[:2] = [scene.attacker.sender.hex(), str(1000 + batch)]
        marks = ", ".join(f"%s::text::{kind}" for _, kind in parameters)
        began = time.monotonic()
        text, sqlstate = told(conn, f"SELECT * FROM durable.{procedure}({marks})", values)
        assert sqlstate is None or sqlstate[:2] in TOLD, (sqlstate, text[:300], [v and v[:60] for v in values])
        answered += sqlstate is None
        assert "secret" not in text
        assert time.monotonic() - began < 10
        if procedure in ("unregister_worker", "resync", "reclaim") and answered:
            # The worker's token has changed, or it is gone.
            scene = scene._replace(worker=scene.attacker.register(scene.mine))
            scene.worker.claim(2)
    assert victims(scene) == before
    assert stranded(scene) == []
    assert answered, "all of it was refused: the fuzzer does not reach the procedure's inside"
