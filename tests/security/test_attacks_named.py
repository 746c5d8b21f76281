"""Three ways in that another engine has left open: a setting that says who the caller is, acks for what somebody else
holds, and a process that has more than the role's own credential."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from dramatiq_durable.arrays import Uuid
from tests.sql.api import Claimed, Session, Worker, new_id

from .conftest import Grant, Limited, Scoped
from .scene import ONE_TEXT, Scene, everything, refusal, set_up

PIECES = ("{victim}", "{owner}", "{admin}", "{worker}", "postgres", "0", "1", "true", "")

#: Variables by which an engine could say who calls, or switch its gate off: our own names, and another engine's.
SAID = [
    f"{space}.{what}"
    for space in ("durable", "hmsh", "hotmesh", "app", "request.jwt", "dramatiq_durable")
    for what in (
        "principal",
        "principal_id",
        "role",
        "login",
        "session_user",
        "is_admin",
        "streams",
        "allowed_streams",
        "worker",
    )
]


@pytest.fixture
def scene(db: Session, grant: Grant, limited: Limited) -> Scene:
    def make(**grants: tuple[str, ...]) -> Scoped:
        return limited(grants["consume"], grants["produce"])

    return set_up(db, make)


def doors(scene: Scene) -> list[object]:
    """What the attacker is told at the victim's doors."""
    a = scene.attacker
    return [
        refusal(lambda: a.stream("theirs")),
        refusal(lambda: a.register(scene.theirs)),
        refusal(lambda: a.enqueue(scene.theirs, b"x")),
        refusal(lambda: a.start(scene.theirs, "order-1")),
        refusal(lambda: a.post(scene.run)),
        refusal(lambda: a.terminate(scene.run)),
        refusal(lambda: a.call("get_run", Uuid(scene.run), None)),
        refusal(lambda: a.call("get_history", Uuid(scene.run), 0)),
        refusal(lambda: a.call("list_roles")),
    ]


def test_no_variable_says_who_the_caller_is(scene: Scene) -> None:
    db, attacker = scene.db, scene.attacker
    before, shut = everything(db), doors(scene)
    assert shut[0] == ("error", "DD001", ONE_TEXT, None, None)
    owner, worker, admin = db.sql("SELECT owner::text, worker::text, admin::text FROM durable.roles")[0]
    victim = db.value("SELECT login::text FROM durable.worker WHERE worker_id = %s", scene.victim.id)
    values = {p.format(owner=owner, worker=worker, admin=admin, victim=victim) for p in PIECES}
    for name in SAID:
        for value in values:
            attacker.sql("SELECT set_config(%s, %s, false)", name, value)
    assert doors(scene) == shut
    assert everything(db) == before


def test_no_other_role_can_be_taken(scene: Scene, db: Session) -> None:
    attacker = scene.attacker
    before, shut = everything(db), doors(scene)
    worker = db.value("SELECT worker::text FROM durable.roles").strip('"')
    others = [r for (r,) in db.sql("SELECT rolname::text FROM pg_roles WHERE rolname <> %s", attacker.login)]
    for other in others:
        for statement in ("SET ROLE", "SET LOCAL ROLE", "SET SESSION AUTHORIZATION"):
            told = refusal(lambda q=f'{statement} "{other}"': attacker.conn.execute(q.encode()))  # type: ignore[misc]
            # LOCAL means nothing outside of a transaction, and is not looked at then.  Before 16 a role may act as
            # the group that it is in: that has no rights but to be asked who the session is.
            if told[0] == "answer":
                assert attacker.value("SELECT current_user::text") in (attacker.login, worker)
                assert doors(scene) == shut
            attacker.sql("RESET ROLE")
    for statement in ("SET ROLE NONE", "RESET ROLE", "SET SESSION AUTHORIZATION DEFAULT", "DISCARD ALL"):
        attacker.conn.execute(statement.encode())
        assert doors(scene) == shut
    assert everything(db) == before


def forge(scene: Scene, worker: Worker) -> None:
    """Every end of what somebody else holds, with the worker's token and all that is known of the lease."""
    named: list[Claimed] = [scene.message, scene.activity, scene.task]
    for claimed in [*named, *[c._replace(lease=new_id()) for c in named]]:
        assert worker.ack(claimed) == [1]
        assert worker.release(claimed) == [1]
        assert worker.reschedule(claimed) == [1]
        assert worker.bury(claimed) == [1]
        assert worker.complete(claimed) == [1]
        assert worker.fail_settling(claimed) == [1]
        assert worker.settle("park_activities", [claimed]) == [1]
        assert worker.settle("start_activities", [claimed]) == [1]
        assert worker.settle("expire_activities", [claimed]) == [1]
        assert worker.settle("expire_runs", [claimed]) == [1]
        assert worker.settle("look_again", [claimed]) == [1]
        assert worker.leave(claimed, member=True) == [0]
        assert worker.fail_task(claimed) is False
        assert worker.call("run_of_lease", Uuid(claimed.message_id), Uuid(claimed.lease)) == []
        assert worker.call("history_of_lease", Uuid(claimed.message_id), Uuid(claimed.lease), 0) == []
        assert worker.call("activity_of_lease", Uuid(claimed.message_id), Uuid(claimed.lease)) == []
        assert worker.call("defer_activity", Uuid(claimed.message_id), Uuid(claimed.lease), b"x") == [(False,)]
        worker.look(1, acks=[claimed], done=[claimed.message_id])
        assert worker.refused == [1]
    worker.heartbeat(holding=[c.message_id for c in named])
    worker.resync(*[c.message_id for c in named])


def test_what_another_principal_holds_is_not_acked(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine)
    before = everything(scene.db), scene.db.held(scene.victim)
    forge(scene, worker)
    # Its token is of no use on another login's session.
    for token in (scene.victim.token, new_id()):
        forged = Worker(scene.attacker, token, scene.victim.id, [scene.theirs])
        for procedure in ("unregister_worker", "sweep"):
            assert refusal(lambda f=forged, p=procedure: f.call(p))[:2] == ("error", "DD002")  # type: ignore[misc]
        assert refusal(lambda f=forged: f.ack(scene.message))[:2] == ("error", "DD002")  # type: ignore[misc]
    assert (everything(scene.db), scene.db.held(scene.victim)) == before


@pytest.mark.parametrize("same_login", [True, False])
def test_what_another_worker_of_ones_own_principal_holds_is_not_acked(
    db: Session, limited: Limited, grant: Grant, same_login: bool
) -> None:
    first: Scoped
    if same_login:
        first = limited(("mine",), ("mine",))
        other: Session = Session(first.url)
    else:
        first = grant(("mine",), ("mine",), principal="team")
        other = grant(("mine",), ("mine",), principal="team")
    mine = db.stream("mine")
    holder, thief = first.register(mine), other.register(mine)
    first.enqueue(mine, b"1")
    held = holder.one()
    before = everything(db)
    assert thief.ack(held) == [1]
    assert thief.release(held) == [1]
    assert thief.bury(held) == [1]
    if not same_login:
        assert refusal(lambda: holder.over(other).ack(held))[:2] == ("error", "DD002")
    assert everything(db) == before
    # One's own finished call, repeated, does nothing.
    assert holder.ack(held) == []
    after = everything(db)
    assert holder.ack(held) == [1]
    assert everything(db) == after
    if same_login:
        other.close()


DUMP = """
import json, os, sys, gc
import dramatiq
from dramatiq_durable import DurableBroker
broker = DurableBroker(middleware=[])
dramatiq.set_broker(broker)

@dramatiq.actor(queue_name="mine")
def work() -> None: ...

work.send()
worker = dramatiq.Worker(broker, worker_threads=1)
worker.start()
maps = [line.split() for line in open("/proc/self/maps")]
found = []
needles = [n.encode() for n in json.loads(sys.stdin.read())]
with open("/proc/self/mem", "rb", 0) as memory:
    for span, rights, *rest in maps:
        if not rights.startswith("rw") or rest[-1:] == ["[vvar]"]:
            continue
        low, high = (int(part, 16) for part in span.split("-"))
        try:
            memory.seek(low)
            data = memory.read(high - low)
        except (OSError, ValueError, OverflowError):
            continue
        found += [span for needle in needles if needle[::-1] in data]
worker.stop()
broker.close()
print(json.dumps({"found": found, "environment": sorted(os.environ)}))
"""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads its own memory")
def test_the_process_has_its_own_credential_and_no_other(database_url: str, limited: Limited) -> None:
    scoped = limited(("mine",), ("mine",))
    full = conninfo_to_dict(database_url)
    # Given in reverse, so that what is looked for is not found because it is looked for.
    secret = str(full.get("password") or f"{full['user']}@/{full['dbname']}")
    own = str(conninfo_to_dict(scoped.url)["password"])

    def dump(*needles: str) -> dict[str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", DUMP],
            input=json.dumps([n[::-1] for n in needles]),
            env={"DRAMATIQ_DURABLE_URL": scoped.url, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        told: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
        return told

    assert dump(secret)["found"] == []
    assert dump(own)["found"] != [], "the search finds what is there"


def test_the_credential_is_its_own_and_says_nothing_of_another(database_url: str, limited: Limited) -> None:
    scoped = limited(("mine",), ())
    own, full = conninfo_to_dict(scoped.url), conninfo_to_dict(database_url)
    assert own["user"] != full["user"]
    assert own["password"] != full.get("password")
    assert not {"passfile", "sslkey", "service"} & set(own)
    assert scoped.sql(
        "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls FROM pg_roles "
        "WHERE rolname = session_user"
    ) == [(False,)]
