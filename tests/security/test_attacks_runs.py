"""What a scoped role says of its own runs, messages and groups opens nobody else's, also on streams that it shares."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dramatiq_durable.arrays import Blobs, Ints, Longs, Texts, Uuid, Uuids
from dramatiq_durable.operations import Context, Due, EnqueueKeyed, FireSchedule, SaveSchedule
from tests.sql.api import Session, Worker, new_id, send_activity, send_limited, start_child, step

from .conftest import Grant, Limited, Scoped
from .scene import ONE_TEXT, everything, refusal

NOBODY = ("error", "DD001", ONE_TEXT, None, None)


@pytest.fixture
def attacker(limited: Limited) -> Scoped:
    return limited(("mine",), ("out", "mine"))


def out(db: Session) -> tuple[int, Worker, bytes]:
    """The stream that the attacker sends to, its worker, and somebody else's run there, which has put something out."""
    stream = db.stream("out")
    worker = db.register(stream)
    _, run = db.start(stream, "order-1")
    assert worker.advance(step(worker.one(), 1, ("OutputWritten", 1, None, b"secret", {"offset": 0}))) == ["ok"]
    return stream, worker, run


@pytest.mark.parametrize("facts", [{"outputs": 5}, {"outputs": 2147483647}, {"outputs": 1, "origin": {"run_id": "x"}}])
def test_a_run_that_says_what_came_before_it_reads_no_other(
    db: Session, attacker: Scoped, facts: dict[str, Any]
) -> None:
    stream, _, run = out(db)
    assert attacker.start(stream, "order-1") == ("exists", run)
    said = json.dumps({**facts, "previous": run.hex()})
    _, own = attacker.start(stream, "own", options=said)
    rows = attacker.call("read_output", Uuid(own), 0, 10, Uuid(new_id()), 60_000)
    assert rows == [(None, None, "running", own, None)]
    assert db.sql("SELECT run_id FROM durable.waiter") == [(own,)]
    assert attacker.call("read_output", Uuid(run), 0, 10, None, 0) == []


def test_output_goes_on_along_the_chain(db: Session, attacker: Scoped) -> None:
    stream = db.stream("mine")
    worker = attacker.register(stream)
    _, run = attacker.start(stream, "w")
    again = ("WorkflowContinuedAsNew", None, None, b"{}", {"facts": {"outputs": 1}, "unread": []})
    first = ("OutputWritten", 1, None, b"1", {"offset": 0})
    assert worker.advance(step(worker.one(), 1, first, again, close="continued_as_new")) == ["ok"]
    following = attacker.call("get_run", Uuid(run), None)[0][-1]
    assert attacker.call("read_output", Uuid(following), 0, 10, None, 0)[0][:2] == (0, b"1")


@pytest.mark.parametrize(
    "facts",
    [
        {"retry": {"initial": "-Infinity"}},
        {"retry": {"initial": "NaN"}},
        {"retry": {"initial": "x"}},
        {"retry": {"initial": {}}},
        {"retry": {"initial": 1, "attempts": "x"}},
        {"retry": {"initial": 1, "coefficient": 1e308, "maximum": -1e300}},
        {"retry": {"initial": 1e308, "coefficient": [], "maximum": "1"}},
        {"retry": {"initial": 5}, "attempt": "x"},
        {"retry": {"initial": 5}, "attempt": -1e99},
        {"retry": {"initial": 5}, "attempt": 2147483647},
        {"retry": {"initial": 5}, "outputs": "x"},
        {"retry": {"initial": 5}, "run_timeout": "NaN"},
        {"retry": {"initial": 5}, "run_timeout": 0},
        {"retry": [], "previous": 5, "first": "x"},
    ],
    ids=json.dumps,
)
def test_no_fact_of_a_run_keeps_its_worker_from_ending_it(db: Session, attacker: Scoped, facts: dict[str, Any]) -> None:
    stream = db.stream("out")
    worker = db.register(stream)
    if refusal(lambda: attacker.start(stream, "poison", options=json.dumps(facts)))[0] == "error":
        # Whoever says it is told.
        assert db.sql("SELECT * FROM durable.run") == []
        return
    claimed = worker.claim()
    deadlines = [c for c in claimed if c.kind == "e"]
    (task,) = [c for c in claimed if c.kind == "s"]
    if deadlines:
        assert worker.settle("expire_runs", deadlines) == []
    else:
        failure = {"failure": {"type": "X", "message": "m", "retryable": True}}
        assert worker.advance(step(task, 1, ("WorkflowFailed", None, None, None, failure), close="failed")) == ["ok"]
    assert db.sql("SELECT * FROM durable.run WHERE run_id = %s AND status = 'running'", Uuid(task.run_id or b"")) == []


@pytest.mark.parametrize(
    "facts",
    [
        '{"memo": {"a": "\\u0000"}}',
        '{"a": "\\ud800"}',
        '{"run_timeout": "x"}',
        '{"execution_timeout": []}',
        '{"search": {"a": 1e999999}}',
        '{"search": {"a": "\\u0000"}}',
        '{"entity": [[[]]]}',
        '{"memo": 1, "memo": 2, "search": {}, "search": {"a": "b"}}',
        "[1, 2]",
        '"text"',
        "[" * 5000 + "]" * 5000,
    ],
    ids=lambda facts: facts[:30],
)
def test_no_schedule_keeps_the_stream_from_firing_others(db: Session, attacker: Scoped, facts: str) -> None:
    stream = db.stream("out")
    saved = SaveSchedule(
        "bad", "fail", False, stream, "s", "w", 0, b"[]", facts, "* * * * * *", "UTC", 3_600_000, "allow"
    )
    attacker.operate(saved)
    db.schedule("good", stream)
    worker = db.register(stream)
    ticks = worker.claim()
    assert len(ticks) == 2
    db.sql("UPDATE durable.schedule SET seen_to = seen_to - interval '1 minute'")
    now = int(db.value("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")) // 1000 * 1000
    context = Context(worker.session.sender, worker.session.batches)
    context.worker = Uuid(worker.token)
    due = now + 60_000
    fires = [FireSchedule(t.message_id, t.lease, now, 0, due, t.stream_id, [Due(now, new_id(), b"x")]) for t in ticks]
    FireSchedule.settle(fires, worker.session.call("fire_schedules", *FireSchedule.arguments(fires, context)))
    assert [f.answer for f in fires] == [True, True]
    assert db.value("SELECT fired FROM durable.schedule WHERE name = 'good'") == 1
    assert [c.actor for c in worker.claim() if c.kind == "m"] == ["actor"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("[1]", False),
        ('"text"', False),
        ("null", False),
        ('{"failure": ' + "[" * 3000 + "]" * 3000 + "}", False),
        ('{"failure": ' + '{"cause":' * 101 + "1" + "}" * 101 + "}", False),
        ('{"failure": ' + '{"cause":' * 50 + "1" + "}" * 50 + "}", True),
        ('{"failure": {"message": "' + '[{\\"' * 5000 + '"}}', True),
        ('{"failure": {"message": "\\u0000"}}', True),
    ],
    ids=lambda said: str(said)[:24],
)
@pytest.mark.parametrize("how", ["lease", "token"])
def test_no_failure_of_an_activity_makes_a_history_unreadable(
    db: Session, attacker: Scoped, said: str, kept: bool, how: str
) -> None:
    theirs, mine = db.stream("theirs"), db.stream("mine")
    victim, worker = db.register(theirs), attacker.register(mine)
    _, run = db.start(theirs, "order-1")
    advance = step(victim.one(), 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(mine, 1)]
    assert victim.advance(advance) == ["ok"]
    activity = worker.one()
    if how == "lease":
        ended = Texts(["ActivityFailed"]), Blobs([None]), Texts([said])
        assert worker.settle("complete_activities", [activity], *ended) == []
    else:
        worker.call("defer_activity", Uuid(activity.message_id), Uuid(activity.lease), b"digest")
        ended = Texts(["ActivityFailed"]), Blobs([None]), Texts([said])
        token = Uuids([run]), Ints([1]), Blobs([b"digest"])
        told = attacker.call("finish_activities", *attacker.batch(), *token, *ended, Longs([None]), Texts([None]))
        assert told == [(["ok"],)]
    ((_, type, _, _, _, attributes),) = db.inbox(run)
    assert type == "ActivityFailed"
    (text,) = db.sql("SELECT attributes::text FROM durable.inbox WHERE run_id = %s", Uuid(run))[0]
    assert attributes is not None
    assert isinstance(json.loads(text)["failure"], dict)
    assert (text == said) is kept


def member(stream: int, group: bytes) -> EnqueueKeyed:
    return EnqueueKeyed(stream, new_id(), "actor", 0, 0, b"x", group, None, "skip")


def barrier(db: Session, group: bytes) -> int:
    key = db.value("SELECT %s::text", Uuid(group))
    return int(db.value("SELECT value FROM durable.limiter WHERE key = %s AND space = 0", key))


def test_a_member_of_a_group_counts_once(db: Session, attacker: Scoped) -> None:
    mine, group = db.stream("mine"), new_id()
    db.call("limiter_add", db.value("SELECT %s::text", Uuid(group)), 3, 60_000)
    db.enqueue_keyed(mine, None, group=group)
    worker = attacker.register(mine)
    one = worker.one()
    for _ in range(5):
        assert worker.leave(one, member=True) == [1]
    assert barrier(db, group) == 2
    assert worker.ack(one) == []
    assert barrier(db, group) == 2


def test_what_a_role_sends_itself_counts_for_no_group_of_others(db: Session, attacker: Scoped) -> None:
    mine, group = db.stream("mine"), new_id()
    db.call("limiter_add", db.value("SELECT %s::text", Uuid(group)), 3, 60_000)
    key = db.value("SELECT %s::text", Uuid(group))
    attacker.call("limiter_add", key, 1, 60_000)
    worker = attacker.register(mine)
    attacker.enqueue_keyed(mine, None, group=group)
    attacker.enqueue_keyed(mine, "unique", group=group)
    for one in worker.claim():
        # One that goes on for it counts for as little.
        assert worker.leave(one, sends=[member(mine, group), member(mine, group)]) == [1]
        worker.ack(one)
    for one in worker.claim():
        worker.leave(one, member=True)
        worker.ack(one)
    assert barrier(db, group) == 3


def test_a_pipeline_in_a_group_of_others_goes_on_counting_and_no_more_than_once(db: Session, attacker: Scoped) -> None:
    mine, group = db.stream("mine"), new_id()
    db.call("limiter_add", db.value("SELECT %s::text", Uuid(group)), 3, 60_000)
    db.enqueue_keyed(mine, None, group=group)
    worker = attacker.register(mine)
    one = worker.one()
    for _ in range(3):
        worker.leave(one, sends=[member(mine, group), member(mine, group)])
    worker.ack(one)
    for following in worker.claim():
        worker.leave(following, member=True)
        worker.ack(following)
    assert barrier(db, group) == 2


def test_no_lock_on_a_run_by_its_activity(db: Session, attacker: Scoped) -> None:
    theirs, mine = db.stream("theirs"), db.stream("mine")
    victim, worker = db.register(theirs), attacker.register(mine)
    _, run = db.start(theirs, "order-1")
    advance = step(victim.one(), 1, ("ActivityScheduled", 1, "act"))
    advance.sends = [send_activity(mine, 1)]
    assert victim.advance(advance) == ["ok"]
    activity = worker.one()
    before = everything(db)
    attacker.begin()
    assert worker.advance(step(activity, 2, ("TimerStarted", 9), close="failed")) == ["refused"]
    db.sql("SET statement_timeout = '1800ms'")
    assert db.sql("SELECT 1 FROM durable.run WHERE run_id = %s FOR UPDATE SKIP LOCKED", Uuid(run)) == [(1,)]
    attacker.commit()
    assert everything(db) == before
    assert worker.call("run_of_lease", Uuid(activity.message_id), Uuid(activity.lease)) == []
    assert worker.call("history_of_lease", Uuid(activity.message_id), Uuid(activity.lease), 0) == []


def test_an_alarm_is_taken_where_no_worker_takes_activities(db: Session, grant: Grant) -> None:
    flows, acts = db.stream("flows"), db.stream("acts")
    runs = grant(consume=("flows",), produce=("acts",), kind="workflow").register(flows)
    _, run = db.start(flows, "w")
    limits = {"options": {"durable_limits": {"schedule_to_start": 1}}}
    advance = step(runs.one(), 1, ("ActivityScheduled", 1, "act", None, limits))
    advance.sends = [send_limited(acts, 1)]
    assert runs.advance(advance) == ["ok"]
    deadline = time.monotonic() + 10
    alarms = []
    while not alarms and time.monotonic() < deadline:
        alarms = runs.claim()
    assert [c.kind for c in alarms] == ["d"]
    assert runs.settle("expire_activities", alarms) == []
    assert [row[1] for row in db.inbox(run)] == ["ActivityTimedOut"]


@pytest.mark.parametrize("field", ["workflow_like", "name_like"])
@pytest.mark.parametrize("call", ["list_workflows", "count_workflows"])
def test_a_pattern_fails_wherever_it_would(db: Session, attacker: Scoped, field: str, call: str) -> None:
    theirs = db.stream("theirs")
    db.start(theirs, "order-1", name="order-1")
    more = (False, True, None, None, 10) if call == "list_workflows" else ("name", None)

    def told(pattern: str) -> Any:
        return refusal(lambda: attacker.call(call, json.dumps({field: pattern}), *more))

    for conforming in ("on", "off"):
        attacker.sql(f"SET standard_conforming_strings = {conforming}")
        for end in ("\\", "\\\\\\", "%\\", "\\\\%\\"):
            assert (
                told(f"order{end}")
                == told(f"none{end}")
                == ("error", "22023", "this filter cannot be read", None, None)
            )
        for end in ("%", "\\\\", "%\\\\", "\\%"):
            assert told(f"order{end}") == told(f"none{end}") == ("answer", [])


SLOW = '($.x == 1) && ($.text like_regex "(a*)*(a*)*b")'


def test_no_condition_is_tried_on_a_foreign_run(db: Session, attacker: Scoped) -> None:
    """How long it takes would tell what that one has."""
    theirs = db.stream("theirs")
    for n in range(20):
        search = {"search": {"x": 1, "text": "a" * 2000}}
        db.start(theirs, f"order-{n}", options=json.dumps(search))
    for rows in ({"search": SLOW}, {"entity": SLOW}, {"rest": SLOW.replace("$.", "$.search."), "uses": ["search"]}):
        attacker.sql("SET statement_timeout = '5s'")
        assert attacker.call("list_workflows", json.dumps(rows), False, True, None, None, 10) == []
        assert attacker.call("count_workflows", json.dumps(rows), "name", None) == []


def test_what_goes_wrong_with_a_child_elsewhere_is_told_there(db: Session, attacker: Scoped) -> None:
    mine, theirs = db.stream("mine"), db.stream("theirs")
    _, run = db.start(mine, "w")
    colleague, victim = db.register(mine), db.register(theirs)
    advance = step(colleague.one(), 1, ("ChildStarted", 1, "child"))
    advance.children = [start_child(theirs, 1, "their-child")]
    assert colleague.advance(advance) == ["ok"]
    victim.fail_task(victim.one())
    (row,) = attacker.call("pending_of", Uuid(run))
    assert row[:3] == (1, "child", "child")
    assert row[4] is None
    assert db.call("pending_of", Uuid(run))[0][4] == "broken"


@pytest.mark.parametrize("state", ["monitor", "expired", "stranger"])
def test_whoever_has_no_rights_leaves_nothing_behind(db: Session, grant: Grant, state: str) -> None:
    db.stream("mine")
    login = grant(kind="monitor") if state == "monitor" else grant(("mine",), ("mine",), kind="worker")
    if state == "expired":
        db.sql("UPDATE durable.login SET expires_at = now() WHERE login = %s", login.login)
    elif state == "stranger":
        db.sql("DELETE FROM durable.login WHERE login = %s", login.login)
    before = db.sql("SELECT * FROM durable.sender")
    assert refusal(lambda: login.call("batch_outcome", *login.batch())) == NOBODY
    assert refusal(lambda: login.start(1, "w")) == NOBODY
    assert refusal(lambda: login.terminate(new_id())) == NOBODY
    assert refusal(lambda: login.enqueue(1, b"x")) == NOBODY
    assert refusal(lambda: login.call("enqueue_message", *login.batch(), 1, Uuid(new_id()), "a", 0, 0, b"x")) == (
        "answer",
        [(-1,)],
    )
    assert db.sql("SELECT * FROM durable.sender") == before


def raw(session: Session, procedure: str, **values: tuple[str, str | None]) -> Any:
    """A call with arguments as texts, so that their bounds and dimensions are ours to choose."""
    marks = ", ".join(f"{name} => %s::text::{kind}" for name, (kind, _) in values.items())
    query = f"SELECT * FROM durable.{procedure}({marks})"
    return refusal(lambda: session.conn.execute(query.encode(), [v for _, v in values.values()]).fetchall())


SHAPES = (
    "{{{own},{foreign}}}",
    "{{{foreign},{own}}}",
    "[0:1]={{{foreign},{own}}}",
    "[2:3]={{{own},{foreign}}}",
    "[-1:1]={{{own},{own},{foreign}}}",
    "{{{{{own},{foreign}}}}}",
    "{{{{{own}}},{{{foreign}}}}}",
    "{{{own},NULL,{foreign}}}",
    "{{NULL,{foreign}}}",
    "{{{foreign}}}",
    "{{}}",
)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_arrays_pairs_an_item_with_anothers_right(db: Session, attacker: Scoped, shape: str) -> None:
    mine, theirs = db.stream("mine"), db.stream("theirs")
    worker = attacker.register(mine)
    _, victims = db.start(theirs, "order-1")
    _, own = attacker.start(mine, "w")
    task = worker.one()
    db.enqueue(theirs, b"secret")
    streams = shape.format(own=mine, foreign=theirs)
    runs = shape.format(own=own.hex(), foreign=victims.hex())

    def theirs_all() -> Any:
        return [
            db.sql("SELECT * FROM durable.message WHERE stream_id = %s ORDER BY 1", theirs),
            db.sql("SELECT * FROM durable.run WHERE stream_id = %s ORDER BY 1", theirs),
            db.sql("SELECT * FROM durable.inbox WHERE run_id = %s", Uuid(victims)),
            db.sql("SELECT * FROM durable.subscription WHERE stream_id = %s", theirs),
            db.sql("SELECT * FROM durable.worker WHERE %s = ANY (stream_ids)", theirs),
        ]

    before = theirs_all()
    for lengths in (1, 2, 3):
        for low in (1, 0, 2):
            at = "" if low == 1 else f"[{low}:{low + lengths - 1}]="

            def many(value: str, at: str = at, n: int = lengths) -> str:
                return at + "{" + ",".join([value] * n) + "}"

            ids = at + "{" + ",".join(new_id().hex() for _ in range(lengths)) + "}"
            batch = {"p_sender": ("uuid", None), "p_batch": ("bigint", None)}
            common = {
                "p_streams": ("int[]", streams),
                "p_messages": ("uuid[]", ids),
                "p_actors": ("text[]", many("a")),
                "p_priorities": ("int[]", many("0")),
                "p_delays": ("bigint[]", many("0")),
                "p_payloads": ("bytea[]", many("x")),
            }
            raw(attacker, "enqueue_messages", **batch, **common)
            raw(
                attacker,
                "enqueue_messages",
                **{**batch, "p_sender": ("uuid", new_id().hex()), "p_batch": ("bigint", "1")},
                **common,
            )
            nulls = {
                "p_groups": ("uuid[]", many("NULL")),
                "p_keys": ("text[]", many("k")),
                "p_conflicts": ("text[]", many("replace")),
            }
            raw(attacker, "enqueue_keyed", **batch, **common, **nulls)
            starts = {
                "p_runs": ("uuid[]", ids),
                "p_workflow_ids": ("text[]", many("order-1")),
                "p_streams": ("int[]", streams),
                "p_names": ("text[]", many("w")),
                "p_inputs": ("bytea[]", many("x")),
                "p_conflicts": ("text[]", many("terminate_existing")),
                "p_reuses": ("text[]", many("allow")),
                "p_delays": ("bigint[]", many("0")),
                "p_options": ("text[]", many("NULL")),
            }
            raw(attacker, "start_runs", **batch, **starts)
            withs = {
                "p_with_types": ("text[]", many("SignalReceived")),
                "p_with_names": ("text[]", many("n")),
                "p_with_payloads": ("bytea[]", many("x")),
                "p_with_keys": ("text[]", many("NULL")),
            }
            raw(attacker, "start_runs_with", **batch, **starts, **withs)
            raw(
                attacker,
                "post",
                **batch,
                p_runs=("uuid[]", runs),
                p_workflow_ids=("text[]", many("order-1")),
                p_types=("text[]", many("SignalReceived")),
                p_names=("text[]", many("n")),
                p_payloads=("bytea[]", many("x")),
                p_keys=("text[]", many("NULL")),
            )
            raw(
                attacker,
                "request_updates",
                **batch,
                p_runs=("uuid[]", runs),
                p_workflow_ids=("text[]", many("order-1")),
                p_ids=("text[]", many("u")),
                p_names=("text[]", many("n")),
                p_payloads=("bytea[]", many("x")),
            )
            raw(
                attacker,
                "subscribe",
                p_topics=("text[]", many("t")),
                p_streams=("int[]", streams),
                p_actors=("text[]", many("a")),
                p_priorities=("int[]", many("0")),
            )
            token = {"p_worker": ("uuid", worker.token.hex())}
            raw(attacker, "consume_streams", **token, p_streams=("int[]", streams))
            raw(
                attacker,
                "register_worker",
                p_host=("text", "h"),
                p_pid=("int", "1"),
                p_threads=("int", "1"),
                p_streams=("int[]", streams),
                p_reclaim_delay=("bigint", "1000"),
                p_reclaim_count=("int", "1"),
            )
            told = raw(
                attacker,
                "claim",
                **token,
                p_acked=("uuid[]", "{}"),
                p_acked_leases=("uuid[]", "{}"),
                p_streams=("int[]", streams),
                p_limits=("int[]", many("5")),
                p_total=("int", "10"),
                p_done=("uuid[]", runs),
                p_wait=("int", "0"),
            )
            assert "secret" not in repr(told)
            send = {
                "p_send_of": ("int[]", many("1")),
                "p_send_last": ("boolean[]", many("f")),
                "p_send_stream": ("int[]", streams),
                "p_send_message": ("uuid[]", ids),
                "p_send_actor": ("text[]", many("a")),
                "p_send_priority": ("int[]", many("0")),
                "p_send_delay": ("bigint[]", many("0")),
                "p_send_payload": ("bytea[]", many("x")),
                "p_send_group": ("uuid[]", many("NULL")),
                "p_send_key": ("text[]", many("NULL")),
                "p_send_conflict": ("text[]", many("NULL")),
            }
            none = {
                "p_result_of": ("int[]", "{}"),
                "p_result_key": ("text[]", "{}"),
                "p_result_value": ("bytea[]", "{}"),
                "p_result_ttl": ("bigint[]", "{}"),
            }
            attacker.begin()
            raw(
                attacker,
                "leave",
                **token,
                p_messages=("uuid[]", "{" + task.message_id.hex() + "}"),
                p_leases=("uuid[]", "{" + task.lease.hex() + "}"),
                p_member=("boolean[]", "{f}"),
                **none,
                **send,
            )
            assert theirs_all() == before
            attacker.sql("COMMIT")
    assert theirs_all() == before


@pytest.mark.parametrize("bounds", ["[0:0]", "[2:2]", "[0:1]"])
def test_a_step_is_stored_as_it_was_looked_at(db: Session, attacker: Scoped, bounds: str) -> None:
    """Whoever closes a run over what it has not read would do so with arrays that begin elsewhere."""
    mine = db.stream("mine")
    worker = attacker.register(mine)
    _, run = attacker.start(mine, "w")
    task = worker.one()
    attacker.post(run)
    close = bounds + ("={completed}" if bounds[1] == bounds[3] else "={NULL,completed}")
    kinds = dict(
        db.sql(
            "SELECT u.name, format_type(u.type, NULL) FROM pg_proc p, "
            "unnest(p.proargtypes::oid[], p.proargnames[:p.pronargs]) u (type, name) "
            "WHERE p.pronamespace = 'durable'::regnamespace AND p.proname = 'advance'"
        )
    )
    values: dict[str, tuple[str, str | None]] = {name: (kind, "{}") for name, kind in kinds.items()}
    values |= {
        "p_worker": ("uuid", worker.token.hex()),
        "p_messages": ("uuid[]", "{" + task.message_id.hex() + "}"),
        "p_leases": ("uuid[]", "{" + task.lease.hex() + "}"),
        "p_expected": ("int[]", "{1}"),
        "p_after": ("int[]", "{0}"),
        "p_last": ("int[]", "{1}"),
        "p_close": ("text[]", close),
    }
    assert raw(attacker, "advance", **values)[:2] == ("error", "22023")
    assert db.run(run) == ("running", 1)
