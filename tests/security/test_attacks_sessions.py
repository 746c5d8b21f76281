"""Sessions that were right once, ids that tell nothing, and every procedure by every kind of role."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable import provision_worker_role, revoke_worker_role, rotate_worker_role
from dramatiq_durable.arrays import Texts
from tests.sql.api import Session, new_id
from tests.support import unique_name

from .conftest import Grant, Limited, Scoped
from .scene import ONE_TEXT, Scene, everything, refusal, set_up
from .test_catalogue import WORKER

NOBODY = ("error", "DD001", ONE_TEXT, None, None)


@pytest.fixture
def scene(db: Session, limited: Limited) -> Scene:
    def make(**grants: tuple[str, ...]) -> Scoped:
        return limited(grants["consume"], grants["produce"])

    return set_up(db, make)


ISOLATION = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


@pytest.mark.parametrize("isolation", ISOLATION)
def test_a_session_ends_with_the_role_whatever_it_had_begun(db: Session, database_url: str, isolation: str) -> None:
    """A snapshot from before still shows the grants: so the session itself has to end."""
    name = unique_name("worker")
    made = provision_worker_role(database_url, name=name, streams=["mine"], produce=["mine"])
    mine = db.stream("mine")
    session = Session(made.url)
    worker = session.register(mine)
    session.enqueue(mine, b"1")
    held = worker.one()
    session.conn.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
    session.enqueue(mine, b"of the transaction that is open")
    assert "1 sessions were ended" in revoke_worker_role(name, url=database_url)
    for call in (lambda: worker.ack(held), lambda: session.enqueue(mine, b"2"), session.commit, worker.heartbeat):
        with pytest.raises(psycopg.OperationalError):
            call()
    session.close()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(made.url, connect_timeout=10)
    # What it held is there for others, under another lease; what it had not committed never was.
    assert [c.payload for c in db.register(mine).claim()] == [b"1"]
    assert db.sql("SELECT * FROM durable.worker WHERE login = %s", made.role) == []


def test_an_expired_session_may_do_nothing(scene: Scene, db: Session) -> None:
    attacker = scene.attacker
    worker = attacker.register(scene.mine)
    db.enqueue(scene.mine, b"mine")
    held = worker.one()
    db.sql("UPDATE durable.login SET expires_at = clock_timestamp() WHERE login = %s", attacker.login)
    before = everything(db)
    assert refusal(lambda: attacker.stream("mine")) == NOBODY
    assert refusal(lambda: attacker.start(scene.out, "w")) == NOBODY
    assert refusal(lambda: attacker.call("list_schedules", None)) == NOBODY
    assert attacker.enqueue_one(scene.out) == -1
    for call in (lambda: worker.ack(held), worker.claim, worker.heartbeat, lambda: worker.call("unregister_worker")):
        assert refusal(call)[:2] == ("error", "DD002")
    assert everything(db) == before


def test_a_rotated_login_ends_when_it_is_said(db: Session, database_url: str) -> None:
    name = unique_name("worker")
    old = provision_worker_role(database_url, name=name, streams=["mine"], produce=["mine"])
    mine = db.stream("mine")
    first = Session(old.url)
    worker = first.register(mine)
    db.enqueue(mine, b"1")
    held = worker.one()
    new = rotate_worker_role(name, "1h", url=database_url)
    twin = Session(new.url)
    # One principal, and yet neither has the other's leases.
    other = twin.register(mine)
    assert other.ack(held) == [1]
    assert refusal(lambda: worker.over(twin).ack(held))[:2] == ("error", "DD002")
    for login, its_own in ((old, first), (new, twin)):
        for role in (old.role, new.role):
            if role != login.role:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    its_own.conn.execute(f'SET ROLE "{role}"'.encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        first.sql("SELECT pg_terminate_backend(%s)", twin.pid)
    rotate_worker_role(name, "0s", url=database_url)
    assert refusal(lambda: worker.ack(held))[:1] == ("error",)
    first.close()
    twin.close()
    revoke_worker_role(name, url=database_url)


NAMES = (
    "dd_x",
    'a"; DROP SCHEMA durable CASCADE; --',
    "a'; DROP SCHEMA durable CASCADE; --",
    "%s %(x)s {0} {schema}",
    "\\' OR 1=1 --",
    "$$; SELECT 1; $$",
    "x" * 200,
    "\N{SNOWMAN}" * 60,
    "../../etc",
    "public",
    "a/b/05",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_worker_is_taken_for_sql(db: Session, database_url: str, name: str) -> None:
    made = provision_worker_role(database_url, name=name, streams=["mine"], produce=["out"])
    try:
        assert made.role.startswith("dd_")
        assert len(made.role.encode()) <= 63
        comment = db.value("SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = %s", made.role)
        assert comment == db.value("SELECT durable.worker_mark(%s)", name)
        session = Session(made.url)
        assert session.value("SELECT session_user::text") == made.role
        session.stream("mine")
        session.close()
    finally:
        revoke_worker_role(name, url=database_url)
    assert db.sql("SELECT 1 FROM pg_roles WHERE rolname = %s", made.role) == []
    assert db.value("SELECT count(*) FROM durable.stream") == 2


def test_nobody_provokes_the_end_of_anothers_session(db: Session, limited: Limited) -> None:
    one, other = limited(("mine",), (), max_statement=1), limited(("theirs",), (), max_statement=1)
    one.sql("SELECT set_config('application_name', %s, false)", other.login)
    for statement in (f'SET ROLE "{other.login}"', f'SET SESSION AUTHORIZATION "{other.login}"'):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            one.conn.execute(statement.encode())
    # Who registers workers, or holds what another waits for, says nothing of that one's session.
    one.register(db.stream("mine"))
    assert db.sql("SELECT * FROM durable.end_sessions('host', 1, '{}')") == []
    for call in (
        "end_sessions",
        "end_worker_sessions",
        "disable_worker",
        "give_back_of_worker",
        "forget_worker_logins",
    ):
        marks = {"end_sessions": "'h', 1, '{}'", "forget_worker_logins": "'x', '{}'"}.get(call, "'x'")
        assert refusal(lambda c=call, m=marks: one.sql(f"SELECT durable.{c}({m})"))[1] == "42501"  # type: ignore[misc]
    assert other.value("SELECT 1") == 1


def fuzzed(rng: random.Random) -> str:
    letters = string.ascii_letters + string.digits + "._-'\"\\%$;:/ \t\n\x01\x7f\u00e9\u2603\U0001f600\u202e\ufeff"
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(
            (
                "theirs",
                "Theirs",
                "theirs ",
                " theirs",
                "theirs\u200b",
                "thei\\u0072s",
                "th%",
                "th_irs",
                "theirs;",
                "theirs.DQ",
            )
        )
    if kind == 1:
        return rng.choice("'\"\\$%") * rng.randrange(1, 50)
    return "".join(rng.choice(letters) for _ in range(rng.randrange(0, 260)))


def test_five_thousand_names(scene: Scene) -> None:
    attacker, rng = scene.attacker, random.Random("names")
    before = everything(scene.db)
    by_id: list[Callable[[str], Any]] = [
        lambda n: attacker.call("open_streams", Texts([n])),
        lambda n: attacker.value("SELECT durable.enqueue(%s, 'a')", n),
        lambda n: attacker.value("SELECT durable.start_workflow(%s, 'w')", n),
        lambda n: attacker.call("get_run", None, n),
        lambda n: attacker.post(None, workflow_id=n),
        lambda n: attacker.terminate(None, n),
        lambda n: attacker.update(None, "u", workflow_id=n),
        lambda n: attacker.ask(None, workflow_id=n),
        lambda n: attacker.call("list_schedules", n),
        lambda n: attacker.call("get_results", Texts([n]), Texts([n]), None, 0),
        lambda n: attacker.call("list_escalations", n, n, n, n, None, None, 9),
    ]
    told: dict[int, set[str]] = {}
    for _ in range(5000):
        name = fuzzed(rng)
        if name in ("mine", "out"):
            continue
        which = rng.randrange(len(by_id))
        answer = refusal(lambda w=which, n=name: by_id[w](n))  # type: ignore[misc]
        if answer[0] == "error" and answer[1] == "22023":
            # What no stream can be called is said to be so.
            answer = ("error", "22023")
        told.setdefault(which, set()).add(repr(answer))
    assert all(len(answers) <= 2 for answers in told.values()), told
    assert told[0] == {repr(NOBODY)}
    assert everything(scene.db) == before


KINDS = {
    "worker": (("mine",), ("out",)),
    "activity": (("mine",), ("out",)),
    "workflow": (("mine",), ("out",)),
    "producer": ((), ("out",)),
    "monitor": ((), ()),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_procedure_by_every_kind(db: Session, limited: Limited, grant: Grant, kind: str) -> None:
    """With the victim's ids, and with such as nobody has: they are answered alike, and nothing of his changes."""
    consume, produce = KINDS[kind]
    made: list[Scoped] = []

    def make(**_: Any) -> Scoped:
        made.append(limited(consume, produce, kind=kind))
        return made[0]

    db.stream("mine"), db.stream("out")
    scene = set_up(db, make)
    attacker = made[0]
    before = everything(db)
    signatures = db.sql(
        "SELECT p.proname::text, ARRAY(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) t), "
        "p.proargnames[:p.pronargs]::text[] FROM pg_proc p WHERE p.pronamespace = 'durable'::regnamespace ORDER BY 1"
    )
    told: dict[str, list[str]] = {}
    scheme = (
        {"uuid": scene.run.hex(), "integer": str(scene.theirs), "bigint": str(scene.victim.id), "text": "theirs"},
        {
            "uuid": new_id().hex(),
            "integer": str(scene.theirs + 1000),
            "bigint": str(scene.victim.id + 1000),
            "text": "nowhere",
        },
    )
    for name, types, names in signatures:
        for facts in scheme:
            values = []
            for argument, type in zip(names or [], types, strict=True):
                base = type.removesuffix("[]")
                value = {
                    "bytea": "x",
                    "boolean": "t",
                    "jsonb": "{}",
                    "timestamp with time zone": "now",
                    "interval": "0",
                    "json": "{}",
                    "double precision": "0",
                    '"char"': "m",
                }.get(base)
                value = facts.get(base, value)
                if argument in ("p_limit", "p_wait", "p_delay", "p_delays", "p_ttl", "p_amount", "p_items", "p_most"):
                    value = "1"
                elif argument in ("p_sender", "p_batch", "p_channel", "p_new") and base in ("uuid", "bigint"):
                    value = {"uuid": new_id().hex(), "bigint": "1"}[base]
                elif argument in ("p_filter", "p_metadata"):
                    value = "{}"
                elif argument == "p_worker" and base == "uuid":
                    value = facts["uuid"] if facts is scheme[1] else scene.victim.token.hex()
                elif argument == "p_messages":
                    value = facts["uuid"] if facts is scheme[1] else scene.message.message_id.hex()
                elif argument == "p_leases":
                    value = facts["uuid"] if facts is scheme[1] else scene.message.lease.hex()
                values.append(value if not type.endswith("[]") or value is None else "{" + f'"{value}"' + "}")
            marks = ", ".join(f"%s::text::{type}" for type in types)
            query = f"SELECT durable.{name}({marks})"
            attacker.begin()
            answer = refusal(lambda q=query, v=values: attacker.conn.execute(q.encode(), v).fetchall())  # type: ignore[misc]
            attacker.rollback()
            told.setdefault(name, []).append(repr(answer).replace(facts["text"], "name"))
    # A rollback would hide it.
    allowed = {name for name, answers in told.items() if "'42501'" not in answers[0]}
    assert allowed == WORKER
    # What is new each time, or names what was asked for.
    own = {
        "start_runs",
        "save_schedule",
        "subscribe",
        "list_schedules",
        "limiter_add",
        "limiter_change",
        "namespace_identity",
        "schema_version",
    }
    if kind != "monitor":
        differ = {name for name in allowed - own if told[name][0] != told[name][1]}
        assert differ <= {"enqueue_keyed", "start_runs_with", "get_results", "list_workflows"}, {
            name: told[name] for name in differ
        }
    else:
        counts = {"stream_counts", "stream_is_empty", "list_workers", "queue_counts", "read_gauges", "stream_rates"}
        for name in allowed - counts - {"schema_version", "namespace_identity"}:
            assert told[name][0].startswith("('error'") or told[name][0] == "('answer', [(-1,)])", (name, told[name])
        # Counts, and neither payloads nor arguments.
        assert "secret" not in repr([told[name] for name in counts])
    assert everything(db) == before
