"""The SQL procedures that are called by themselves: reads, and what happens once in a worker's life.

What is written under load goes through the group commit instead: see `operations`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg

from .arrays import Ints, Longs, Texts, Uuid, Uuids
from .codecs import Codecs
from .database import Connection
from .metrics import catalogue, shown
from .metrics.recorder import Recorder
from .workflow.events import Event

Rows = list[tuple[Any, ...]]

_NO_CODECS = Codecs()

#: A result's key, and the queue of its message; None where it was kept outside of any delivery.
Wanted = tuple[str, str | None]


class Procedures:
    """The calls that are made by themselves, each a function of a connection.

    Events and what queries ask are given as they are, whatever they went through on their way to the database.  Raises
    CodecFailed for what cannot be decoded.
    """

    def __init__(self, namespace: str, codecs: Codecs = _NO_CODECS, *, metrics: Recorder) -> None:
        self.schema = f'"{namespace}"'
        self.codecs = codecs
        self.metrics = metrics

    def _call(self, conn: Connection, name: str, *arguments: Any) -> Rows:
        marks = ", ".join(["%s"] * len(arguments))
        call = f"SELECT * FROM {self.schema}.{name}({marks})".encode()
        shown.look()
        begun = time.perf_counter()
        try:
            return conn.execute(call, arguments, binary=True).fetchall()
        except psycopg.Error as e:
            self.metrics.failed(e)
            raise
        finally:
            self.metrics.observe(catalogue.CALL, time.perf_counter() - begun, name)

    def open_streams(self, conn: Connection, names: Sequence[str]) -> dict[str, int]:
        """The ids of streams.  Raises NotPermitted (as DD001) for one that is missing or foreign."""
        return dict(self._call(conn, "open_streams", Texts(names)))

    def batch_outcome(self, conn: Connection, sender: bytes, batch: int) -> set[bytes] | None:
        """Of a batch that was committed, the messages with a unique key that were not stored; None for one that was not
        committed, and no longer can be."""
        committed, refused = self._call(conn, "batch_outcome", Uuid(sender), batch)[0]
        return set(refused) if committed else None

    def register_worker(
        self, conn: Connection, host: str, pid: int, threads: int, streams: list[int], delay: int, count: int
    ) -> tuple[bytes, int]:
        """Register this process; answers its token and number.  ``delay`` in milliseconds."""
        row = self._call(conn, "register_worker", host, pid, threads, Ints(streams), delay, count)[0]
        return row[0], row[1]

    def consume_streams(self, conn: Connection, worker: bytes, streams: list[int]) -> None:
        """Which streams the worker consumes now."""
        self._call(conn, "consume_streams", Uuid(worker), Ints(streams))

    def unregister_worker(self, conn: Connection, worker: bytes) -> None:
        """Give back what the worker still holds, and forget it."""
        self._call(conn, "unregister_worker", Uuid(worker))

    def heartbeat(self, conn: Connection, worker: bytes, holding: Sequence[bytes], rates: Mapping[int, float]) -> Rows:
        """Name what the worker holds, and how many messages a second it has ended lately, by the ids of the streams.

        Answers rows of (peer, beat, reclaim delay in milliseconds).
        """
        return self._call(conn, "heartbeat", Uuid(worker), Uuids(holding), Ints(rates), list(rates.values()))

    def resync(self, conn: Connection, worker: bytes, holding: Sequence[bytes]) -> bytes:
        """Give back every message that is leased to the worker and not named; answers the worker's new token."""
        return bytes(self._call(conn, "resync", Uuid(worker), Uuids(holding))[0][0])

    def reclaim(self, conn: Connection, worker: bytes, peer: int, beat: int) -> tuple[int, int]:
        """Take back what a dead peer held; answers (handed back, dead-lettered)."""
        returned, poisoned = self._call(conn, "reclaim", Uuid(worker), peer, beat)[0][:2]
        self.metrics.count(catalogue.RECLAIMED, "returned", by=returned)
        self.metrics.count(catalogue.RECLAIMED, "poisoned", by=poisoned)
        return returned, poisoned

    def report_running(
        self, conn: Connection, worker: bytes, messages: Sequence[bytes], ages: Sequence[int]
    ) -> list[bytes]:
        """Tell what runs here and for how many milliseconds; answers the leases of what is to be aborted."""
        return list(self._call(conn, "report_running", Uuid(worker), Uuids(messages), Longs(ages))[0][0])

    def doomed_activities(
        self, conn: Connection, worker: bytes, messages: Sequence[bytes], leases: Sequence[bytes]
    ) -> Rows:
        """Which of these running activities shall end: rows of (position, cancelled or gone)."""
        return self._call(conn, "doomed_activities", Uuid(worker), Uuids(messages), Uuids(leases))

    def activity_of_lease(
        self, conn: Connection, worker: bytes, message: bytes, lease: bytes
    ) -> tuple[Any, ...] | None:
        """What a running activity may know: (workflow id, details, deadline in milliseconds since the epoch)."""
        rows = self._call(conn, "activity_of_lease", Uuid(worker), Uuid(message), Uuid(lease))
        return rows[0] if rows else None

    def beat_by_token(self, conn: Connection, run_id: bytes, seq: int, token: bytes, details: bytes | None) -> str:
        """A heartbeat from whoever has an activity's token; answers ok, cancelled or missing."""
        return str(self._call(conn, "beat_by_token", Uuid(run_id), seq, token, details)[0][0])

    def attempt_of_token(self, conn: Connection, run_id: bytes, seq: int, token: bytes) -> tuple[int, Any] | None:
        """The attempt that a token is for, and the activity's policy for retries; None: nobody waits for it."""
        rows = self._call(conn, "attempt_of_token", Uuid(run_id), seq, token)
        return (rows[0][0], None if rows[0][1] is None else json.loads(rows[0][1])) if rows else None

    def pending_of(self, conn: Connection, run_id: bytes) -> Rows:
        """What a run waits for: (seq, kind, name, attempt, last failure, next attempt at, heartbeat's details)."""
        return self._call(conn, "pending_of", Uuid(run_id))

    def abort_message(self, conn: Connection, ids: Sequence[bytes], running: bool) -> Any:
        """Abort the message with one of these ids; answers queued, running or missing."""
        return self._call(conn, "abort_message", Uuids(ids), running)[0][0]

    def run_of_lease(self, conn: Connection, worker: bytes, message_id: bytes, lease: bytes) -> tuple[Any, ...] | None:
        """The run of a leased task, or None when the lease is gone."""
        rows = self._call(conn, "run_of_lease", Uuid(worker), Uuid(message_id), Uuid(lease))
        return rows[0] if rows else None

    def history_of_lease(
        self, conn: Connection, worker: bytes, message_id: bytes, lease: bytes, after: int
    ) -> tuple[list[Event], list[tuple[int, Event]]]:
        """(events after one, inbox): what a worker needs to go on with a run.  In the inbox, event ids are 0."""
        rows = self._call(conn, "history_of_lease", Uuid(worker), Uuid(message_id), Uuid(lease), after)
        history, inbox = [], []
        for event_id, inbox_id, type_, at, seq, name, payload, attributes in rows:
            event = self.codecs.open(Event(event_id or 0, type_, at, seq, name, payload, from_json(attributes)))
            if inbox_id is None:
                history.append(event)
            else:
                inbox.append((inbox_id, event))
        return history, inbox

    def get_run(self, conn: Connection, run_id: bytes | None, workflow_id: str | None) -> tuple[Any, ...] | None:
        """One run's row, or None when it is missing or foreign."""
        rows = self._call(conn, "get_run", None if run_id is None else Uuid(run_id), workflow_id)
        return rows[0] if rows else None

    def list_children(self, conn: Connection, run_id: bytes | None, workflow_id: str | None) -> Rows:
        """The children of a run, as rows of (run id, workflow id)."""
        return self._call(conn, "list_children", None if run_id is None else Uuid(run_id), workflow_id)

    def get_history(self, conn: Connection, run_id: bytes, after: int = 0, most: int | None = None) -> list[Event]:
        """A run's events after one, oldest first; at most so many."""
        rows = self._call(conn, "get_history", Uuid(run_id), after, most)
        return [
            self.codecs.open(Event(id_, type_, at, seq, name, payload, from_json(facts)))
            for id_, type_, at, seq, name, payload, facts in rows
        ]

    def get_events(self, conn: Connection, run_id: bytes, ids: Sequence[int]) -> dict[int, Event]:
        """These of a run's events, as far as they are there."""
        found = [self.get_history(conn, run_id, i - 1, 1) for i in dict.fromkeys(ids)]
        return {event.event_id: event for events in found for event in events if event.event_id in ids}

    def await_run(self, conn: Connection, run_id: bytes, channel: bytes) -> str | None:
        """Have a channel notified when the run closes; answers its status now."""
        status = self._call(conn, "await_run", Uuid(run_id), Uuid(channel))[0][0]
        return None if status is None else str(status)

    def ask_run(
        self,
        conn: Connection,
        run_id: bytes | None,
        workflow_id: str | None,
        name: str,
        payload: bytes,
        channel: bytes,
        wait: int,
        heard: bool,
    ) -> tuple[bytes | None, bool, bool, str]:
        """Ask a run; answers (the query's id, whether there is such a run, whether a worker consumes its queue, that).

        A channel is notified of the answer, which is kept for ``wait`` milliseconds.  With ``heard``, nothing is asked
        where no worker consumes the queue.
        """
        key = None if run_id is None else Uuid(run_id)
        return self._call(conn, "ask_run", key, workflow_id, name, payload, Uuid(channel), wait, heard)[0]

    def take_answers(self, conn: Connection, queries: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
        """Those of the answers to queries that are there, each once: (payload, failure), as stored."""
        rows = self._call(conn, "take_answers", Uuids(queries))
        return {query: (payload, from_json(failure)) for query, payload, failure in rows}

    def withdraw_query(self, conn: Connection, query: bytes) -> None:
        """Nobody waits for the answer any more."""
        self._call(conn, "withdraw_query", Uuid(query))

    def query_of_lease(
        self, conn: Connection, worker: bytes, message_id: bytes, lease: bytes
    ) -> tuple[str, bytes, bool, bool] | None:
        """What a leased query asks: (name, arguments, whether its run has something in its inbox, whether it
        has begun); None where nobody waits for the answer."""
        for name, payload, pending, begun in self._call(
            conn, "query_of_lease", Uuid(worker), Uuid(message_id), Uuid(lease)
        ):
            return name, self.codecs.decode(payload, f"the arguments of {name!r}"), pending, begun
        return None

    def get_updates(
        self,
        conn: Connection,
        wanted: Sequence[tuple[bytes | None, str | None, str]],
        channel: bytes | None = None,
        wait: int = 0,
    ) -> list[tuple[Any, ...]]:
        """How updates, each (run id, workflow id, update id), stand: (status, payload, failure) each, as stored.

        A channel is notified of changes for ``wait`` milliseconds.
        """
        runs, ids = Uuids([w[0] for w in wanted]), Texts([w[1] for w in wanted])
        listening = None if channel is None else Uuid(channel)
        rows = self._call(conn, "get_updates", runs, ids, Texts([w[2] for w in wanted]), listening, wait)
        return [(status, payload, from_json(failure)) for _, status, payload, failure in rows]

    def get_state(self, conn: Connection, run_id: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
        """A run's search attributes, as JSON has them, and its entity."""
        rows = self._call(conn, "get_state", Uuid(run_id))
        return (from_json(rows[0][0]) or {}, from_json(rows[0][1]) or {}) if rows else ({}, {})

    def read_output(
        self, conn: Connection, run_id: bytes, offset: int, limit: int, channel: bytes | None, wait: int
    ) -> tuple[list[tuple[int, bytes | None]], tuple[Any, ...] | None]:
        """What a run has put out from an offset on, and (status, run, next run) of the run in which that lies; None for
        one that is missing or foreign.  A channel is notified of more for ``wait`` milliseconds."""
        listening = None if channel is None else Uuid(channel)
        rows = self._call(conn, "read_output", Uuid(run_id), offset, limit, listening, wait)
        found: list[tuple[int, bytes | None]] = [(row[0], self.codecs.decode(row[1], "output")) for row in rows[:-1]]
        return found, rows[-1][2:] if rows else None

    def list_workflows(
        self,
        conn: Connection,
        filter: str,
        by_close: bool,
        descending: bool,
        at: str | None,
        run: bytes | None,
        limit: int,
    ) -> Rows:
        """A page of runs behind a time and a run's id: see `listing`."""
        behind = None if run is None else Uuid(run)
        return self._call(conn, "list_workflows", filter, by_close, descending, at, behind, limit)

    def count_workflows(self, conn: Connection, filter: str, group: str | None, path: Sequence[str] | None) -> Rows:
        """Rows of (value as JSON, how many runs)."""
        return self._call(conn, "count_workflows", filter, group, None if path is None else Texts(path))

    def subscribe(
        self,
        conn: Connection,
        topics: Sequence[str],
        streams: Sequence[int],
        actors: Sequence[str],
        priorities: Sequence[int],
    ) -> list[bool | None]:
        """Subscribe actors to topics; answers for each whether that is new, None where it is not permitted."""
        rows = self._call(conn, "subscribe", Texts(topics), Ints(streams), Texts(actors), Ints(priorities))
        return list(rows[0][0])

    def unsubscribe(self, conn: Connection, topic: str, stream_id: int, actor: str) -> bool:
        """End a subscription; answers whether there was one."""
        return bool(self._call(conn, "unsubscribe", topic, stream_id, actor)[0][0])

    def list_schedules(self, conn: Connection, name: str | None = None) -> Rows:
        """The caller's schedules, or the one of a name (with its template): see `schedules.Row`."""
        return self._call(conn, "list_schedules", name)

    def get_escalation(self, conn: Connection, id: bytes) -> str | None:
        """One escalation as JSON, or None when it is missing or foreign."""
        found = self._call(conn, "get_escalation", Uuid(id))[0][0]
        return None if found is None else str(found)

    def list_escalations(
        self,
        conn: Connection,
        role: str | None,
        status: str | None,
        subject: str | None,
        type: str | None,
        run_id: bytes | None,
        metadata: str | None,
        limit: int,
        after: bytes | None,
    ) -> list[str]:
        """Escalations as JSON, by priority and then age; those that come behind one."""
        run, behind = (None if id is None else Uuid(id) for id in (run_id, after))
        rows = self._call(conn, "list_escalations", role, status, subject, type, run, metadata, limit, behind)
        return [row[0] for row in rows]

    def count_escalations(self, conn: Connection, role: str | None) -> tuple[int, ...]:
        """How many are waiting, claimed, resolved, cancelled, timed out."""
        return self._call(conn, "count_escalations", role)[0]

    def get_results(
        self, conn: Connection, wanted: Sequence[Wanted], channel: bytes | None = None, wait: int = 0
    ) -> dict[Wanted, bytes]:
        """Those of these results that are there; a channel is notified of others for ``wait`` milliseconds."""
        keys, queues = Texts([key for key, _ in wanted]), Texts([queue for _, queue in wanted])
        listening = None if channel is None else Uuid(channel)
        return {wanted[n - 1]: value for n, value in self._call(conn, "get_results", keys, queues, listening, wait)}

    def store_result(self, conn: Connection, key: str, value: bytes, ttl: int) -> None:
        """Keep a result, outside of any delivery, for ``ttl`` milliseconds."""
        self._call(conn, "store_result", key, value, ttl)

    def sweep(self, conn: Connection, worker: bytes) -> int:
        """Forget what has expired; answers how many rows."""
        return int(self._call(conn, "sweep", Uuid(worker))[0][0])

    def limiter_add(self, conn: Connection, key: str, value: int, ttl: int) -> bool:
        """Set a limiter's key that is not there; answers whether it did."""
        return bool(self._call(conn, "limiter_add", key, value, ttl)[0][0])

    def limiter_change(
        self, conn: Connection, key: str, amount: int, minimum: int | None, maximum: int | None, ttl: int
    ) -> bool:
        """Add to a limiter's key within bounds; answers whether it did."""
        return bool(self._call(conn, "limiter_change", key, amount, minimum, maximum, ttl)[0][0])

    def limiter_change_sum(
        self, conn: Connection, anchor: str, key: str, keys: Sequence[str], amount: int, maximum: int, ttl: int
    ) -> bool:
        """Add to a limiter's key unless the sum of some would exceed a maximum; answers whether it did."""
        return bool(self._call(conn, "limiter_change_sum", anchor, key, Texts(keys), amount, maximum, ttl)[0][0])

    def stream_is_empty(self, conn: Connection, stream_id: int) -> bool:
        """Whether a stream has no message left, delayed and leased ones included."""
        return bool(self._call(conn, "stream_is_empty", stream_id)[0][0])

    def queue_counts(self, conn: Connection, stream_id: int) -> tuple[int, int, int]:
        """What a stream has: (ready, delayed, dead)."""
        ready, delayed, dead = self._call(conn, "queue_counts", stream_id)[0]
        return ready, delayed, dead

    def flush_streams(self, conn: Connection, streams: list[int]) -> None:
        """Drop what waits on streams, and their dead letters."""
        self._call(conn, "flush_streams", Ints(streams))

    def import_journal(self, conn: Connection, source: bytes, stream_id: int) -> bytes:
        """The marks of what was imported from a source and may still be there, 16 bytes each."""
        return bytes(self._call(conn, "import_journal", Uuid(source), stream_id)[0][0] or b"")


def from_json(text: str | None) -> dict[str, Any] | None:
    """The facts of an event, or the state of a run; what is JSON but no object, or too deep to be read, counts as none:
    no worker of ours writes that."""
    try:
        value = None if text is None else json.loads(text)
    except RecursionError:
        return None
    return value if isinstance(value, dict) else None
