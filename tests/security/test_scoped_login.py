"""A login that may consume ``mine`` and produce to ``out``, against what belongs to others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dramatiq_durable.arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from tests.sql.api import Session, Worker, derived, new_id, send_activity, step

from .conftest import Grant
from .scene import ONE_TEXT, Scene, everything, refusal, set_up
from .test_catalogue import WORKER


@pytest.fixture
def scene(db: Session, grant: Grant) -> Scene:
    return set_up(db, grant)


# --- tables, roles, settings ------------------------------------------------------------------------------


def test_no_table_and_no_sequence_can_be_touched(scene: Scene) -> None:
    relations = scene.db.sql(
        "SELECT c.relname::text, c.relkind::text FROM pg_class c "
        "WHERE relnamespace = 'durable'::regnamespace AND relkind IN ('r', 'S')"
    )
    assert len(relations) > 10
    for name, kind in relations:
        statements = [f"SELECT * FROM durable.{name}", f"COPY durable.{name} TO STDOUT"]
        if kind == "r":
            statements += [
                f"DELETE FROM durable.{name}",
                f"TRUNCATE durable.{name}",
                f"DO 'BEGIN LOCK TABLE durable.{name} IN ACCESS SHARE MODE; END'",
                f"INSERT INTO durable.{name} DEFAULT VALUES",
                f"CREATE INDEX ON durable.{name} ((1))",
            ]
        else:
            statements += [f"SELECT nextval('durable.{name}')", f"SELECT setval('durable.{name}', 1)"]
        for statement in statements:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                scene.attacker.sql(statement)


def test_nothing_can_be_made_in_the_schema(scene: Scene) -> None:
    for statement in (
        "CREATE TABLE durable.t (x int)",
        "CREATE FUNCTION durable.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE OR REPLACE FUNCTION durable.caller(OUT principal_id int, OUT is_admin boolean) LANGUAGE sql "
        "AS 'SELECT 1, true'",
        "ALTER FUNCTION durable.caller() OWNER TO CURRENT_USER",
        "DROP FUNCTION durable.caller()",
        "ALTER SCHEMA durable RENAME TO x",
        "CREATE TRIGGER t BEFORE INSERT ON durable.message EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            scene.attacker.sql(statement)


def test_only_the_workers_procedures_can_be_called(scene: Scene) -> None:
    functions = scene.db.sql(
        "SELECT p.proname::text, (SELECT coalesce(array_agg(format_type(t, NULL) ORDER BY n), '{}') "
        "FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY u (t, n)) "
        "FROM pg_proc p WHERE p.pronamespace = 'durable'::regnamespace"
    )
    refused = []
    for name, types in functions:
        arguments = ", ".join(f"NULL::{t}" for t in types)
        try:
            scene.attacker.sql(f"SELECT * FROM durable.{name}({arguments})")
        except psycopg.errors.InsufficientPrivilege:
            refused.append(name)
        except psycopg.Error:
            pass
    assert set(refused) == {name for name, _ in functions} - WORKER


@pytest.mark.parametrize(
    "statement",
    [
        'SET ROLE "{owner}"',
        'SET ROLE "{admin}"',
        "SET ROLE {superuser}",
        "SET SESSION AUTHORIZATION {superuser}",
        'SET SESSION AUTHORIZATION "{owner}"',
        "SELECT set_config('session_authorization', '{superuser}', false)",
        "SELECT set_config('role', '{owner}', false)",
        'GRANT "{owner}" TO CURRENT_USER',
        'GRANT "{admin}" TO CURRENT_USER',
        'ALTER ROLE "{owner}" LOGIN',
        'GRANT "{worker}" TO "{other}"',
    ],
)
def test_no_other_role_can_be_had(scene: Scene, grant: Grant, statement: str) -> None:
    owner, worker, admin = scene.db.sql("SELECT owner::text, worker::text, admin::text FROM durable.roles")[0]
    superuser = scene.db.value("SELECT session_user::text")
    other = grant(consume=("theirs",)).login
    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidGrantOperation)):
        scene.attacker.sql(statement.format(owner=owner, worker=worker, admin=admin, superuser=superuser, other=other))


def test_the_workers_role_helps_nobody(scene: Scene) -> None:
    """SET ROLE is allowed there; who is asked is session_user."""
    worker = scene.db.value("SELECT worker::text FROM durable.roles")
    scene.attacker.sql(f'SET ROLE "{worker}"')
    assert scene.attacker.stream("mine") == scene.mine
    assert refusal(lambda: scene.attacker.stream("theirs")) == ("error", "DD001", ONE_TEXT, None, None)


def test_an_ungranted_login_is_nobody(
    scene: Scene, logins: Callable[[], tuple[str, str]], connect: Callable[..., Session]
) -> None:
    name, url = logins()
    session = connect(url)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.stream("mine")
    worker = scene.db.value("SELECT worker::text FROM durable.roles")
    scene.db.sql(f'GRANT "{worker}" TO "{name}"')
    for call in (
        lambda: session.stream("mine"),
        lambda: session.enqueue(scene.mine, b""),
        lambda: session.register(scene.mine),
        lambda: session.post(scene.run),
        lambda: session.terminate(scene.run),
        lambda: session.call("get_run", Uuid(scene.run), None),
        lambda: session.sql("SELECT durable.enqueue('mine', 'a')"),
        lambda: session.sql("SELECT durable.start_workflow('mine', 'wf')"),
    ):
        assert refusal(call) == ("error", "DD001", ONE_TEXT, None, None)


def test_an_expired_login_is_nobody(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine)
    scene.db.sql("UPDATE durable.login SET expires_at = clock_timestamp() WHERE login = %s", scene.attacker.login)
    assert refusal(lambda: scene.attacker.stream("mine"))[1] == "DD001"
    assert refusal(worker.claim)[1] == "DD002"
    assert refusal(worker.heartbeat)[1] == "DD002"


def test_temporary_objects_and_search_paths_shadow_nothing(scene: Scene) -> None:
    attacker = scene.attacker
    for table in ("login", "principal", "stream", "stream_grant", "message", "worker", "run"):
        attacker.sql(
            f"CREATE TEMP TABLE {table} (login name, principal_id int, stream_id int, name text, is_admin boolean)"
        )
    attacker.sql("INSERT INTO login VALUES (session_user, 1, 1, 'x', true)")
    attacker.sql(
        "CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql "
        "AS 'SELECT ''infinity''::timestamptz'"
    )
    attacker.sql("CREATE FUNCTION pg_temp.cardinality(int[]) RETURNS int LANGUAGE sql AS 'SELECT 99'")
    attacker.sql("CREATE FUNCTION pg_temp.evil(name, name) RETURNS boolean LANGUAGE sql AS 'SELECT true'")
    attacker.sql("CREATE OPERATOR pg_temp.= (LEFTARG = name, RIGHTARG = name, FUNCTION = pg_temp.evil)")
    attacker.sql("CREATE DOMAIN pg_temp.uuid AS text")
    for path in ("pg_temp, durable, pg_catalog", "durable", "''"):
        attacker.sql(f"SET search_path = {path}")
        rows = attacker.conn.execute(b"SELECT * FROM durable.open_streams(ARRAY['mine']::pg_catalog.text[])").fetchall()
        assert rows == [("mine", scene.mine)]
        with pytest.raises(psycopg.Error) as error:
            attacker.conn.execute(b"SELECT * FROM durable.open_streams(ARRAY['theirs']::pg_catalog.text[])")
        assert error.value.sqlstate == "DD001"


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_isolation = 'repeatable read'",
        "transform_null_equals = on",
        "array_nulls = off",
        "bytea_output = 'escape'",
        "DateStyle = 'German'",
        "TimeZone = 'Asia/Kathmandu'",
        "IntervalStyle = 'sql_standard'",
        "standard_conforming_strings = off",
        "plan_cache_mode = 'force_generic_plan'",
        "enable_indexscan = off",
        "row_security = off",
        "lock_timeout = '1ms'",
        "client_encoding = 'LATIN1'",
    ],
)
def test_a_sessions_settings_change_nothing(scene: Scene, setting: str) -> None:
    attacker = scene.attacker
    attacker.sql(f"SET {setting}")
    before = everything(scene.db)
    assert refusal(lambda: attacker.stream("theirs")) == ("error", "DD001", ONE_TEXT, None, None)
    assert attacker.enqueue(scene.theirs, b"x") == [-1]
    assert refusal(lambda: attacker.register(scene.theirs))[1] == "DD001"
    assert everything(scene.db) == before
    worker = attacker.register(scene.mine)
    scene.db.enqueue(scene.mine, b"1", b"2")
    first, second = worker.claim()
    assert worker.ack(first, second) == []
    assert worker.claim() == []


# --- streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "procedure",
    [
        *("open_streams", "enqueue_messages", "register_worker", "consume_streams", "claim", "start_runs"),
        *("enqueue", "start_workflow"),
    ],
)
def test_a_foreign_and_a_missing_stream_look_the_same(scene: Scene, procedure: str) -> None:
    attacker = scene.attacker
    worker = attacker.register(scene.mine)
    missing = 2**31 - 1
    calls: dict[str, Callable[[int], Any]] = {
        "open_streams": lambda s: attacker.stream("theirs" if s == scene.theirs else "nothing"),
        "enqueue_messages": lambda s: attacker.enqueue(s, b"x"),
        "register_worker": lambda s: attacker.register(s),
        "consume_streams": lambda s: worker.call("consume_streams", Ints([s])),
        "claim": lambda s: worker.look(streams=[s]),
        "start_runs": lambda s: attacker.start(s, "order-1"),
        "enqueue": lambda s: attacker.sql(
            "SELECT durable.enqueue(%s, 'a')", "theirs" if s == scene.theirs else "nothing"
        ),
        "start_workflow": lambda s: attacker.sql(
            "SELECT durable.start_workflow(%s, 'wf', p_workflow_id => 'order-1', p_id_conflict => 'use_existing')",
            "theirs" if s == scene.theirs else "nothing",
        ),
    }
    before = everything(scene.db)
    foreign = refusal(lambda: calls[procedure](scene.theirs))
    assert foreign == refusal(lambda: calls[procedure](missing))
    assert foreign[0] == "answer" or foreign[1:3] == ("DD001", ONE_TEXT)
    assert everything(scene.db) == before


def test_a_consumer_may_not_send_and_a_producer_may_not_consume(scene: Scene) -> None:
    attacker = scene.attacker
    assert attacker.enqueue([scene.mine, scene.out, scene.theirs], b"1", b"2", b"3") == [-1, 1, -1]
    assert attacker.value("SELECT durable.enqueue('out', 'a')") is not None
    assert refusal(lambda: attacker.sql("SELECT durable.enqueue('mine', 'a')"))[1:3] == ("DD001", ONE_TEXT)
    assert refusal(lambda: attacker.register(scene.out))[1] == "DD001"
    assert refusal(lambda: attacker.register(scene.mine, scene.out))[1] == "DD001"
    worker = attacker.register(scene.mine)
    assert worker.claim(streams=[scene.out, scene.theirs, scene.mine]) == []
    assert refusal(lambda: worker.call("consume_streams", Ints([scene.mine, scene.theirs])))[1] == "DD001"


# --- workers and leases -----------------------------------------------------------------------------------


CALLS = [
    *("claim", "heartbeat", "resync", "ack", "reschedule", "release", "bury", "mark_started", "complete", "fail_task"),
    *("advance", "run_of_lease", "history_of_lease", "unregister_worker", "reclaim"),
    "report_running",
]


@pytest.mark.parametrize("call", CALLS)
def test_another_logins_worker_is_as_good_as_a_forged_one(scene: Scene, call: str) -> None:
    def attack(worker: Worker) -> Any:
        return {
            "claim": worker.claim,
            "heartbeat": worker.heartbeat,
            "resync": worker.resync,
            "fail_task": lambda: worker.fail_task(scene.task),
            "advance": lambda: worker.advance(step(scene.task, 2, ("WorkflowCompleted", None), close="completed")),
            "run_of_lease": lambda: worker.call("run_of_lease", Uuid(scene.task.message_id), Uuid(scene.task.lease)),
            "history_of_lease": lambda: worker.call(
                "history_of_lease", Uuid(scene.task.message_id), Uuid(scene.task.lease), 0
            ),
            "unregister_worker": lambda: worker.call("unregister_worker"),
            "reclaim": lambda: worker.call("reclaim", scene.victim.id, 0),
            "report_running": lambda: worker.call("report_running", Uuids([scene.message.message_id]), Longs([1000])),
            "complete": lambda: worker.complete(scene.activity),
        }.get(call, lambda: getattr(worker, call)(scene.message))()

    before = everything(scene.db)
    stolen = Worker(scene.attacker, scene.victim.token, scene.victim.id, scene.victim.streams)
    forged = Worker(scene.attacker, new_id(), scene.victim.id, scene.victim.streams)
    outcome = refusal(lambda: attack(stolen))
    assert outcome == refusal(lambda: attack(forged))
    assert outcome[1] == "DD002"
    assert everything(scene.db) == before


def test_no_worker_is_registered_for_ever(scene: Scene) -> None:
    """Who registers and is silent is forgotten one day, whatever it says."""
    silent = scene.attacker.register(scene.mine, delay=2**62)
    delay = "SELECT reclaim_delay = interval '1 day' FROM durable.worker WHERE worker_id = %s"
    assert scene.db.value(delay, silent.id) is True


def test_another_workers_leases_are_useless(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine)
    before = everything(scene.db)
    for call in ("ack", "reschedule", "release", "bury", "mark_started", "complete"):
        for lease in (scene.message, scene.activity, scene.task):
            assert getattr(worker, call)(lease) == [1], call
    assert worker.fail_task(scene.task) is False
    assert worker.advance(step(scene.task, 2, ("WorkflowCompleted", None), close="completed")) == ["stale"]
    assert worker.advance(step(scene.activity, 2, ("ActivityCompleted", 1))) == ["stale"]
    arguments = Uuid(scene.task.message_id), Uuid(scene.task.lease)
    assert worker.call("run_of_lease", *arguments) == []
    assert worker.call("history_of_lease", *arguments, 0) == []
    assert everything(scene.db) == before


def test_a_foreign_message_cannot_be_aborted_and_looks_like_a_missing_one(scene: Scene) -> None:
    scene.victim.release(scene.message)
    scene.db.enqueue(scene.mine, b"own", ids=[own := new_id()])
    before = everything(scene.db)
    for running in (True, False):
        for theirs in (scene.message, scene.activity, scene.task):
            asked = scene.attacker.call("abort_message", Uuids([theirs.message_id]), running)
            assert asked == scene.attacker.call("abort_message", Uuids([new_id()]), running) == [("missing",)]
    assert everything(scene.db) == before
    assert scene.attacker.call("abort_message", Uuids([own, scene.message.message_id]), True) == [("queued",)]
    assert scene.db.value("SELECT count(*) FROM durable.message WHERE abort_at IS NOT NULL") == 1


def test_nobody_learns_of_another_workers_aborts(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine)
    assert scene.db.call("abort_message", Uuids([scene.message.message_id]), True) == [("running",)]
    assert worker.call("report_running", Uuids([scene.message.message_id]), Longs([1000])) == [([],)]
    assert scene.victim.call("report_running", Uuids([]), Longs([])) == [([scene.message.lease],)]


def test_a_foreign_dead_worker_cannot_be_taken_back(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine)
    assert worker.heartbeat() == {}
    scene.db.silence(scene.victim)
    beat = scene.db.value("SELECT beat FROM durable.worker WHERE worker_id = %s", scene.victim.id)
    before = everything(scene.db)
    assert worker.reclaim(scene.victim, beat) == worker.reclaim(Worker(scene.db, b"", 2**40, []), 0) == (0, 0)
    assert everything(scene.db) == before


def test_what_a_worker_says_that_it_gets_done_counts_on_its_own_streams(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine, delay=60_000)
    worker.call("heartbeat", Uuids([]), Ints([scene.theirs, scene.mine, scene.out]), [5.0, 2.0, 7.0])
    told = {name: ended for name, ended, _ in scene.db.call("stream_rates", 10.0, 100)}
    assert {name for name, ended in told.items() if ended} == {"mine"}
    assert told["mine"] == 2.0


def test_naming_foreign_messages_in_a_claim_or_a_resync_frees_nothing(scene: Scene) -> None:
    worker = scene.attacker.register(scene.mine)
    before = everything(scene.db)
    theirs = [scene.message.message_id, scene.activity.message_id]
    worker.claim(done=theirs, wait=1000)
    assert scene.db.held(worker) == set()
    worker.resync(*theirs)
    assert scene.db.held(worker) == set(), "else a reclaim of this worker would look at them"
    worker.call("unregister_worker")
    assert everything(scene.db) == before


def test_poison_of_a_chosen_id_buries_no_foreign_message(scene: Scene) -> None:
    """Ids of messages are no secret: the attacker sends one of the victim's id to itself, and lets it kill workers."""
    scene.victim.release(scene.message)
    producer = scene.db
    producer.enqueue(scene.mine, b"killer", ids=[scene.message.message_id])
    peer = scene.attacker.register(scene.mine)
    for _ in range(2):
        worker = scene.attacker.register(scene.mine, delay=1, count=1)
        worker.mark_started(*worker.claim())
        scene.db.silence(worker)
        peer.reclaim(worker)
    assert scene.db.sql("SELECT stream_id FROM durable.dead_letter") == [(scene.mine,)]
    assert [c.payload for c in scene.victim.claim()] == [b"secret"]


# --- runs -------------------------------------------------------------------------------------------------


def _asked(run: bytes | None, workflow_id: str | None) -> tuple[Any, ...]:
    return Uuids([run]), Texts([workflow_id]), Texts(["u"]), Texts(["set"]), Blobs([b"{}"])


def test_a_foreign_query_is_neither_read_nor_answered_nor_withdrawn(scene: Scene) -> None:
    query = scene.db.ask(scene.run)[0]
    asked = scene.victim.claim(10)[0]
    attacker = scene.attacker.register(scene.mine)
    before = everything(scene.db)
    assert attacker.call("query_of_lease", Uuid(asked.message_id), Uuid(asked.lease)) == []
    assert not attacker.answer(asked)
    assert scene.attacker.start_with(scene.theirs, "w", "SignalReceived", "k")[0] == "denied"
    assert everything(scene.db) == before
    # Without its id, which nobody can guess, there is nothing to take.
    assert scene.attacker.call("take_answers", Uuids([new_id()])) == []
    assert scene.victim.answer(asked)
    assert [row[1] for row in scene.db.call("take_answers", Uuids([query]))] == [b"1"]


@pytest.mark.parametrize("by", ["run id", "workflow id"])
@pytest.mark.parametrize(
    "procedure",
    [
        *("post", "terminate_run", "get_run", "get_history", "await_run", "list_children", "reset_run"),
        *("request_updates", "get_updates", "ask_run"),
    ],
)
def test_a_foreign_and_a_missing_run_look_the_same(scene: Scene, procedure: str, by: str) -> None:
    def attack(run: bytes, workflow_id: str) -> Any:
        given, name = (run, None) if by == "run id" else (None, workflow_id)
        if procedure == "post":
            return scene.attacker.post(given, workflow_id=name)
        if procedure == "request_updates":
            return scene.attacker.call("request_updates", *scene.attacker.batch(), *_asked(given, name))
        if procedure == "get_updates":
            return scene.attacker.updates(given, "u", workflow_id=name, wait=1000)
        if procedure == "ask_run":
            return scene.attacker.ask(given, workflow_id=name)
        if procedure == "terminate_run":
            return scene.attacker.terminate(given, name)
        if procedure == "list_children":
            return scene.attacker.call("list_children", given and Uuid(given), name)
        if procedure == "reset_run":
            return scene.attacker.call(
                "reset_run",
                *scene.attacker.batch(),
                given and Uuid(given),
                name,
                1,
                Uuid(new_id()),
                Texts(["WorkflowStarted"]),
            )[0][0]
        if procedure == "get_run":
            return scene.attacker.call("get_run", given and Uuid(given), name)
        if procedure == "get_history":
            return scene.attacker.call("get_history", given and Uuid(given), 0)
        return scene.attacker.call("await_run", given and Uuid(given), Uuid(new_id()))

    before = everything(scene.db)
    foreign = refusal(lambda: attack(scene.run, "order-1"))
    assert foreign == refusal(lambda: attack(new_id(), "nothing"))
    assert foreign[0] == "answer"
    nothing = ("missing", [], [(None,)], [("missing", None)], [("missing", None, None)], (None, False, None, None))
    assert foreign[1] in nothing
    assert everything(scene.db) == before


def test_how_a_foreign_run_ended_is_not_seen(scene: Scene) -> None:
    assert scene.db.terminate(scene.run) == "ok"
    assert scene.db.call("get_closing", Uuid(scene.run))[0][7] == "because"
    assert scene.attacker.call("get_closing", Uuid(scene.run)) == []
    assert scene.attacker.call("get_closing", Uuid(new_id())) == []


def test_the_same_workflow_id_elsewhere_is_another_run(scene: Scene) -> None:
    status, run = scene.attacker.start(scene.out, "order-1", conflict="terminate_existing")
    assert status == "started"
    assert scene.db.run(scene.run)[0] == "running"
    assert scene.attacker.terminate(None, "order-1") == "ok"
    assert scene.db.run(run)[0] == "terminated"
    assert scene.db.run(scene.run)[0] == "running"


def test_a_foreign_runs_id_cannot_be_taken_nor_its_childrens(scene: Scene) -> None:
    before = everything(scene.db)
    status, found = scene.attacker.start(scene.out, "w", run=scene.run)
    assert (status, found) == ("busy", scene.run)
    assert scene.attacker.start(scene.out, "w", run=derived(scene.run, 2))[0] == "denied"
    assert scene.attacker.enqueue(scene.out, b"x", ids=[derived(scene.run, 2)]) == [-1]
    assert everything(scene.db) == before


def test_an_activities_worker_sees_nothing_of_the_run(scene: Scene, grant: Grant) -> None:
    """It holds a lease on an activity of a run whose stream it has no right to."""
    activities = scene.db.stream("activities")
    worker_login = grant(consume=("activities",))
    advance = step(scene.task, 2, ("ActivityScheduled", 2, "act"))
    advance.sends = [send_activity(activities, 2)]
    assert scene.victim.advance(advance) == ["ok"]
    worker = worker_login.register(activities)
    activity = worker.one()
    assert activity.run_id == scene.run
    lease = Uuid(activity.message_id), Uuid(activity.lease)
    assert worker.call("run_of_lease", *lease) == []
    assert worker.call("history_of_lease", *lease, 0) == []
    for close in (None, "completed"):
        advance = step(activity, 3, ("ActivityCompleted", 2), close=close)
        assert worker.advance(advance) == ["refused"]
    assert worker_login.post(scene.run) == "missing"
    assert worker_login.terminate(scene.run) == "missing"
    assert worker.fail_task(activity) is False
    assert scene.db.run(scene.run) == ("running", 3)
    assert worker.complete(activity) == []
    assert [row[1:3] for row in scene.db.inbox(scene.run)][-1] == ("ActivityCompleted", 2)


def test_another_logins_batches_tell_nothing(scene: Scene) -> None:
    scene.db.enqueue(scene.theirs, b"x")
    asked = scene.attacker.call("batch_outcome", Uuid(scene.db.sender), 10)
    assert asked == scene.attacker.call("batch_outcome", Uuid(new_id()), 10) == [(False, None)]
    assert scene.db.enqueue(scene.theirs, b"y") == [1], "and nothing was given up"


def test_listening_tells_no_data(scene: Scene) -> None:
    attacker = scene.attacker
    attacker.sql(f'LISTEN "durable:s{scene.theirs}"')
    assert scene.victim.claim(wait=60_000) == []
    scene.db.enqueue(scene.theirs, b"secret")
    assert [n.payload for n in attacker.conn.notifies(timeout=5, stop_after=1)] == [""]
