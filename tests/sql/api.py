"""What the tests of the procedures have in common: sessions, workers and runs, without any of the package's engine."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import psycopg

from dramatiq_durable import arrays
from dramatiq_durable.arrays import Blobs, Bools, Ints, Longs, Texts, Uuid, Uuids
from dramatiq_durable.operations import (
    Advance,
    AnswerQuery,
    ChangeEscalation,
    Child,
    ClaimEscalation,
    Context,
    ControlSchedule,
    Due,
    Enqueue,
    EnqueueKeyed,
    EnqueueOne,
    FireByHand,
    FireSchedule,
    Leave,
    LookUpSchedule,
    Operation,
    RequestUpdate,
    Result,
    SaveSchedule,
    Send,
    StartRunWith,
)
from dramatiq_durable.workflow.events import Event, command_id
from tests.support import wait_until

Rows = list[tuple[Any, ...]]


def new_id() -> bytes:
    """A fresh message's or run's id, as Dramatiq and the client make them: a uuid of version 4."""
    return uuid.uuid4().bytes


class Claimed(NamedTuple):
    """A row of claim()."""

    message_id: bytes
    lease: bytes
    stream_id: int
    kind: str
    run_id: bytes | None
    seq: int | None
    attempt: int
    reclaimed: bool
    actor: str
    payload: bytes
    waited: float


class Session:
    """A database session as some login, with the procedures as methods; every call is a transaction of its own unless
    `begin` was called."""

    def __init__(self, url: str) -> None:
        self.conn: psycopg.Connection[tuple[Any, ...]] = psycopg.connect(url, autocommit=True, connect_timeout=10)
        arrays.register(self.conn)
        self.conn.execute("SET statement_timeout = '30s'")
        self.sender = os.urandom(16)
        self.batches = count(1)

    def close(self) -> None:
        self.conn.close()

    def call(self, procedure: str, *arguments: Any) -> Rows:
        marks = ", ".join(["%s"] * len(arguments))
        return self.conn.execute(
            f"SELECT * FROM durable.{procedure}({marks})".encode(), arguments, binary=True
        ).fetchall()

    def sql(self, query: str, *arguments: Any) -> Rows:
        cursor = self.conn.execute(query.encode(), arguments, binary=True)
        return cursor.fetchall() if cursor.description else []

    def value(self, query: str, *arguments: Any) -> Any:
        return self.sql(query, *arguments)[0][0]

    def begin(self) -> None:
        self.sql("BEGIN")

    def commit(self) -> None:
        self.sql("COMMIT")

    def rollback(self) -> None:
        self.sql("ROLLBACK")

    @property
    def pid(self) -> int:
        return self.conn.info.backend_pid

    # --- procedures ---------------------------------------------------------------------------------------

    def stream(self, name: str = "s") -> int:
        return int(self.call("open_streams", Texts([name]))[0][1])

    def batch(self) -> list[Any]:
        return [Uuid(self.sender), next(self.batches)]

    def enqueue(
        self,
        stream: int | Sequence[int],
        *payloads: bytes,
        ids: Sequence[bytes] | None = None,
        priority: int | Sequence[int] = 0,
        delay: int | Sequence[int] = 0,
        actor: str = "actor",
    ) -> list[int]:
        n = len(payloads)
        every: Callable[[Any], list[Any]] = lambda v: [v] * n if isinstance(v, int) else list(v)  # noqa: E731
        return list(
            self.call(
                "enqueue_messages",
                *self.batch(),
                Ints(every(stream)),
                Uuids(ids or [new_id() for _ in payloads]),
                Texts([actor] * n),
                Ints(every(priority)),
                Longs(every(delay)),
                Blobs(payloads),
            )[0][0]
        )

    def enqueue_one(self, stream: int, *, id: bytes | None = None, delay: int = 0) -> int:
        """Store a message that is alone: 1; 0 if it is there; -1 if that is not permitted."""
        message = EnqueueOne(stream, id or new_id(), "actor", 0, delay, b"x")
        return int(
            self.call("enqueue_message", *EnqueueOne.arguments([message], Context(self.sender, self.batches)))[0][0]
        )

    def enqueue_keyed(
        self,
        stream: int,
        key: str | None,
        conflict: str = "skip",
        *,
        id: bytes | None = None,
        group: bytes | None = None,
        delay: int = 0,
    ) -> tuple[int, bytes]:
        """Store a message with a unique key; (1, its id), or (0, that of the one that is there)."""
        message = EnqueueKeyed(stream, id or new_id(), "actor", 0, delay, b"x", group, key, conflict)
        context = Context(self.sender, self.batches)
        row = self.call("enqueue_keyed", *EnqueueKeyed.arguments([message], context))[0]
        return row[0], row[1]

    def start(
        self,
        stream: int,
        workflow_id: str,
        *,
        run: bytes | None = None,
        conflict: str = "fail",
        reuse: str = "allow",
        name: str = "wf",
        delay: int = 0,
        options: str | None = None,
    ) -> tuple[str, bytes]:
        row = self.call(
            "start_runs",
            *self.batch(),
            Uuids([run or new_id()]),
            Texts([workflow_id]),
            Ints([stream]),
            Texts([name]),
            Blobs([b"[]"]),
            Texts([conflict]),
            Texts([reuse]),
            Longs([delay]),
            Texts([options]),
        )[0]
        return str(row[0]), row[1]

    def post(
        self,
        run: bytes | None,
        *,
        workflow_id: str | None = None,
        type: str = "SignalReceived",
        name: str = "go",
        payload: bytes = b"1",
        key: str | None = None,
    ) -> str:
        return str(
            self.call(
                "post",
                *self.batch(),
                Uuids([run]),
                Texts([workflow_id]),
                Texts([type]),
                Texts([name]),
                Blobs([payload]),
                Texts([key]),
            )[0][0][0]
        )

    def terminate(self, run: bytes | None, workflow_id: str | None = None) -> str:
        given = None if run is None else Uuid(run)
        return str(self.call("terminate_run", *self.batch(), given, workflow_id, "because")[0][0])

    def update(self, run: bytes | None, id: str, *, workflow_id: str | None = None, name: str = "set") -> str:
        """Ask for an update."""
        request = RequestUpdate(run, workflow_id, id, name, b'{"args":[],"kwargs":{}}')
        return str(self.operate(request)[0])

    def updates(self, run: bytes | None, *ids: str, workflow_id: str | None = None, wait: int = 0) -> list[Any]:
        """How updates stand: (status, payload, failure) each."""
        n = len(ids)
        given = Uuids([run] * n), Texts([workflow_id] * n), Texts(ids)
        channel = Uuid(new_id()) if wait else None
        return [row[1:] for row in self.call("get_updates", *given, channel, wait)]

    def start_with(self, stream: int, workflow_id: str, type: str, key: str, **options: Any) -> tuple[str, bytes]:
        """Start a run with a message."""
        start = StartRunWith(
            new_id(), workflow_id, stream, "wf", b"{}", **options,
            with_type=type, with_name="set", with_payload=b'{"args":[],"kwargs":{}}', with_key=key,
        )  # fmt: skip
        row = self.call("start_runs_with", *StartRunWith.arguments([start], Context(self.sender, self.batches)))[0]
        return row[0], row[1]

    def ask(self, run: bytes | None, *, workflow_id: str | None = None, wait: int = 60_000, heard: bool = False) -> Any:
        """Ask a query; (its id, whether the run is known, whether a worker consumes its stream, its stream)."""
        given = None if run is None else Uuid(run)
        return self.call("ask_run", given, workflow_id, "how", b"{}", Uuid(new_id()), wait, heard)[0]

    def operate(self, operation: Operation, context: Context | None = None) -> Any:
        """One operation as the group commit would call it; its answer."""
        kind = type(operation)
        rows = self.call(kind.procedure, *kind.arguments([operation], context or Context(self.sender, self.batches)))
        kind.settle([operation], rows)
        return operation.answer

    def schedule(
        self,
        name: str,
        stream: int,
        *,
        kind: str = "m",
        overlap: str = "allow",
        catch_up: int = 3_600_000,
        if_exists: str = "fail",
        paused: bool = False,
        cron: str = "* * * * * *",
        template: bytes = b"template",
    ) -> bytes:
        """Save a schedule; answers its id."""
        made = SaveSchedule(
            *(name, if_exists, paused, stream, kind, "actor", 0, template, None, cron, "UTC", catch_up, overlap)
        )
        self.operate(made)
        return bytes(self.call("list_schedules", name)[0][0])

    def control(self, name: str, verb: str) -> None:
        self.operate(ControlSchedule(name, verb))

    def escalation(self, verb: str, id: bytes, **facts: Any) -> Any:
        return self.operate(ChangeEscalation(verb, id, **facts))

    def claim_next(self, role: str, by: str = "ann", ms: int | None = None, metadata: str | None = None) -> Any:
        return self.operate(ClaimEscalation(role, metadata, by, ms))

    def by_hand(self, name: str, *due: int | None, revision: int = 1) -> list[bool]:
        """Fire a schedule for due times (milliseconds), None for now."""
        return list(self.operate(FireByHand(name, revision, [Due(at, new_id(), b"payload") for at in due], 0)))

    def register(self, *streams: int, delay: int = 1000, count: int = 3) -> Worker:
        row = self.call("register_worker", "host", os.getpid(), 8, Ints(streams), delay, count)[0]
        return Worker(self, row[0], row[1], list(streams))

    # --- looking (superuser only) -------------------------------------------------------------------------

    def messages(self, stream: int) -> int:
        return int(self.value("SELECT count(*) FROM durable.message WHERE stream_id = %s", stream))

    def held(self, worker: Worker) -> set[bytes]:
        return set(self.value("SELECT held FROM durable.worker WHERE worker_id = %s", worker.id))

    def run(self, run: bytes) -> tuple[str, int]:
        """(status, last event)"""
        status, last = self.sql("SELECT status, last_event FROM durable.run WHERE run_id = %s", Uuid(run))[0]
        return str(status), int(last)

    def inbox(self, run: bytes) -> Rows:
        return self.sql(
            "SELECT inbox_id, type, seq, name, payload, attributes FROM durable.inbox WHERE run_id = %s "
            "ORDER BY inbox_id",
            Uuid(run),
        )

    def events(self, run: bytes) -> list[str]:
        rows = self.sql("SELECT type FROM durable.event WHERE run_id = %s ORDER BY event_id", Uuid(run))
        return [str(row[0]) for row in rows]

    def silence(self, worker: Worker) -> None:
        """Make it so that a worker was silent for longer than its reclaim_delay (which may be longer than the server is
        up: time before its start does not count)."""
        self.sql(
            "UPDATE durable.worker SET beat_at = beat_at - interval '1 hour', reclaim_delay = interval '1 millisecond' "
            "WHERE worker_id = %s",
            worker.id,
        )

    def is_blocked(self, other: Session) -> bool:
        return bool(
            self.value("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s", other.pid),
        )


class Worker:
    """A registered worker; its calls go over the session that registered it, or over another one of the same login."""

    def __init__(self, session: Session, token: bytes, id: int, streams: list[int]) -> None:
        self.session, self.token, self.id, self.streams = session, token, id, streams
        #: All that it was ever handed: a superset of what it holds, which is what a heartbeat names.
        self.named: list[bytes] = []
        #: Which of the acks that the last claim carried were refused, by position.
        self.refused: list[int] | None = None

    def over(self, session: Session) -> Worker:
        twin = Worker(session, self.token, self.id, self.streams)
        twin.named = self.named
        return twin

    def call(self, procedure: str, *arguments: Any) -> Rows:
        return self.session.call(procedure, Uuid(self.token), *arguments)

    def claim(
        self,
        limit: int = 100,
        *,
        streams: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        done: Sequence[bytes | None] = (),
        wait: int = 0,
    ) -> list[Claimed]:
        return self.look(limit, streams=streams, limits=limits, done=done, wait=wait)[0]

    def look(
        self,
        limit: int = 100,
        *,
        streams: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        done: Sequence[bytes | None] = (),
        wait: int = 0,
        acks: Sequence[Claimed] = (),
    ) -> tuple[list[Claimed], int | None]:
        chosen = list(self.streams if streams is None else streams)
        acked = Uuids([c.message_id for c in acks]), Uuids([c.lease for c in acks])
        rows = self.call("claim", *acked, Ints(chosen), Ints(limits or [limit] * len(chosen)), limit, Uuids(done), wait)
        self.named += [row[0] for row in rows[:-1]]
        self.refused = rows[-1][-1]
        return [Claimed(*row[:-2]) for row in rows[:-1]], rows[-1][-2]

    def one(self) -> Claimed:
        """Claim the only message that is there."""
        (claimed,) = self.claim(2)
        return claimed

    def settle(self, procedure: str, claimed: Sequence[Claimed], *more: Any) -> list[int]:
        """Positions that were refused."""
        return list(
            self.call(procedure, Uuids([c.message_id for c in claimed]), Uuids([c.lease for c in claimed]), *more)[0][0]
        )

    def ack(self, *claimed: Claimed) -> list[int]:
        return self.settle("ack", claimed)

    def release(self, *claimed: Claimed) -> list[int]:
        return self.settle("release", claimed)

    def mark_started(self, *claimed: Claimed) -> list[int]:
        return self.settle("mark_started", claimed)

    def reschedule(
        self, *claimed: Claimed, delay: int = 0, payload: bytes | None = None, counted: bool = True
    ) -> list[int]:
        n = len(claimed)
        what = (Longs([delay] * n), Blobs([payload] * n), Texts(["no"] * n), Bools([counted] * n))
        return self.settle("reschedule", claimed, *what)

    def bury(self, *claimed: Claimed, payload: bytes | None = None) -> list[int]:
        n = len(claimed)
        return self.settle("bury", claimed, Blobs([payload] * n), Texts(["no"] * n))

    def fail_settling(self, *claimed: Claimed) -> list[int]:
        return self.settle("fail_settling", claimed, Texts(["no"] * len(claimed)))

    def leave(
        self,
        *claimed: Claimed,
        results: Sequence[Result] = (),
        sends: Sequence[Enqueue] = (),
        member: bool = False,
        callbacks: Sequence[Enqueue] = (),
    ) -> list[int]:
        """What each of them leaves behind; their statuses."""
        leaves = []
        for c in claimed:
            leave = Leave(c.message_id, c.lease)
            leave.results, leave.sends, leave.member = list(results), list(sends), member
            leave.callbacks = list(callbacks)
            leaves.append(leave)
        context = Context(self.session.sender, self.session.batches)
        context.worker = Uuid(self.token)
        return list(self.session.call("leave", *Leave.arguments(leaves, context))[0][0])

    def complete(self, *claimed: Claimed, type: str = "ActivityCompleted", payload: bytes = b"2") -> list[int]:
        n = len(claimed)
        return self.settle("complete_activities", claimed, Texts([type] * n), Blobs([payload] * n), Texts([None] * n))

    def answer(self, claimed: Claimed, payload: bytes = b"1") -> bool:
        """Answer a query; whether its lease was live."""
        return bool(self.operate(AnswerQuery(claimed.message_id, claimed.lease, payload, None)))

    def fail_task(self, claimed: Claimed, delay: int = 0) -> bool:
        return bool(self.call("fail_task", Uuid(claimed.message_id), Uuid(claimed.lease), "broken", delay)[0][0])

    def look_up(self, tick: Claimed) -> list[Any] | None:
        """(schedule id, name, kind, template, cron, timezone, catch up, seen to, waiting, now) of a leased tick."""
        found: list[Any] | None = self.operate(LookUpSchedule(tick.message_id, tick.lease))
        return found

    def fire(self, tick: Claimed, *due: int, seen: int = 0, missed: int = 0, next: int = 4_000_000_000_000) -> bool:
        """Fire due times (milliseconds) and put the tick back; whether its lease was live."""
        made = [Due(at, new_id(), b"payload") for at in due]
        return bool(self.operate(FireSchedule(tick.message_id, tick.lease, seen, missed, next, tick.stream_id, made)))

    def operate(self, operation: Operation) -> Any:
        context = Context(self.session.sender, self.session.batches)
        context.worker = Uuid(self.token)
        return self.session.operate(operation, context)

    def heartbeat(self, *, holding: Sequence[bytes | None] | None = None) -> dict[int, int]:
        """Name what the worker holds, by default all that it has; the peers' beats."""
        return {row[0]: row[1] for row in self.call("heartbeat", Uuids(self.named if holding is None else holding))}

    def resync(self, *holding: bytes | None) -> None:
        """Name what the worker holds; it has a new token from then on."""
        self.token = self.call("resync", Uuids(holding))[0][0]

    def reclaim(self, peer: Worker, beat: int | None = None) -> tuple[int, int]:
        if beat is None:
            beat = self.heartbeat()[peer.id]
        row = self.call("reclaim", peer.id, beat)[0]
        return row[0], row[1]

    def advance(self, *steps: Advance) -> list[str]:
        """One call; answers the steps' statuses, and sets ``eager`` on them."""
        context = Context(self.session.sender, self.session.batches)
        context.worker = Uuid(self.token)
        Advance.settle(steps, self.session.call("advance", *Advance.arguments(steps, context)))
        self.named += [derived(s.run_id, seq) for s in steps for seq in s.eager]
        return [step.answer for step in steps]


def step(claimed: Claimed, expected: int, *events: tuple[Any, ...], **more: Any) -> Advance:
    """A step that records ``events``, each (type, seq, name, ...) in the order of Event behind its time."""
    assert claimed.run_id is not None
    made = [Event(n, type, 1_700_000_000_000, *rest) for n, (type, *rest) in enumerate(events, expected + 1)]
    advance = Advance(claimed.message_id, claimed.lease, claimed.run_id, expected, expected + len(made))
    advance.events = made
    for name, value in more.items():
        setattr(advance, name, value)
    return advance


def send_activity(stream: int, seq: int, *, eager: bool = False, delay: int = 0) -> Send:
    return Send("a", stream, seq, "act", 0, delay, b"payload", eager)


def send_limited(stream: int, seq: int) -> Send:
    """An activity with limits: its event says which."""
    return Send("l", stream, seq, "act", 0, 0, b"payload")


def send_timer(stream: int, seq: int, delay: int = 60_000) -> Send:
    return Send("w", stream, seq, "wf", 0, delay, b"")


def start_child(stream: int, seq: int, workflow_id: str, **options: Any) -> Child:
    return Child(seq, stream, "child", workflow_id, b"[]", options)


def derived(run: bytes, seq: int) -> bytes:
    """The id of what a run's command makes."""
    return command_id(str(uuid.UUID(bytes=run)), seq)


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Run a call that may block on a thread; the answer waits for its end and has its result, or raises its error."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as e:
            outcome.append((None, e))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def join() -> Any:
        wait_until(lambda: outcome, timeout=20, message="the end of the call in the background")
        thread.join()
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return join
