"""What `top` shows: read in a few bounded calls, and compared with the look before."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg

from ...database import Connection, is_connection_lost, translate
from ...errors import DurableError
from ...metrics.gauges import MOST_COUNTED
from ..payload import call, decode, last_line
from ..target import Target
from .stuck import find

#: How long one call may take, in milliseconds.
TIMEOUT = 10_000

#: How many rows a closer look has.
MOST = 100

#: Over how many seconds a rate is, two heartbeats of a worker; and how many of the latest messages of a stream tell how
#: many come where more lie there than are counted.
WINDOW, LATEST = 10.0, 1_000

Facts = dict[str, Any]


def _short(text: str) -> str:
    """A column of text: of what is large the end, which says most of a failure."""
    return f"CASE WHEN octet_length({text}) <= 65536 THEN {text} ELSE right({text}, 4000) END AS {text}"


#: A column of bytes: of what is large the beginning.
_PAYLOAD = "CASE WHEN octet_length(payload) <= 65536 THEN payload ELSE substr(payload, 1, 1000) END AS payload"

#: What is read where a row may be of any size: whoever sends a message, or runs it, decides that.
_COLUMNS = {
    "find_stuck": f"what, stream, name, id, run_id, kind, worker_id, since, attempt, {_short('failure')}",
    "peek_messages": "message_id, state, actor, kind, run_id, priority, due_at, enqueued_at, attempt, deaths, "
    f"worker_id, since, unique_key, {_short('last_failure')}, {_PAYLOAD}",
    "list_dead_letters": "dead_letter_id, message_id, actor, reason, kind, priority, enqueued_at, died_at, attempt, "
    f"deaths, unique_key, {_short('failure')}, {_PAYLOAD}",
    "list_workflows": "run_id, workflow_id, name, queue_name, started_at, closed_at, last_event, "
    + _short("task_failure"),
    "get_run": "run_id, workflow_id, name, queue_name, status, started_at, closed_at, last_event, "
    + _short("task_failure"),
    "pending_of": f"seq, kind, name, attempt, {_short('last_failure')}, next_attempt_at",
}

_STREAM = {
    "stream_ready_messages": "ready",
    "stream_leased_messages": "leased",
    "stream_delayed_messages": "delayed",
    "stream_paused": "paused",
    "stream_workers": "workers",
    "timers_overdue": "timers_overdue",
}


#: A stream with nothing in it.
_NOTHING: Facts = {
    "name": "", "ready": 0, "leased": 0, "delayed": 0, "dead": 0, "dead_by_reason": {}, "oldest": None,
    "timers_overdue": 0, "paused": False, "workers": 0,
}  # fmt: skip


@dataclass(slots=True)
class Look:
    """What was found.

    Attributes:
      at(float): when, in Unix time.
      sees_all(bool): the login is an administrator's.
      rates(dict): a second, of all streams together: messages that came (in), ended (out) and became dead letters
        (dead), and runs that were started, which Postgres tells a few seconds late.  None: not known yet.
      streams, workers, escalations(list): of each what is known.
      runs(dict): how many by status.
      postgres(dict): what of the server concerns the namespace.
      stuck(list): what is slow or stuck, worst first.
    """

    at: float
    sees_all: bool
    rates: dict[str, float | None]
    streams: list[Facts]
    workers: list[Facts]
    runs: dict[str, int]
    escalations: list[Facts]
    postgres: Facts
    stuck: list[Facts] = field(default_factory=list)


@dataclass(slots=True)
class Detail:
    """A closer look at one thing: facts, and a table of what belongs to it, or why there is none."""

    facts: dict[str, Any]
    columns: tuple[str, ...] = ()
    rows: list[Facts] = field(default_factory=list)
    note: str = ""


class Looker:
    """Looks into a namespace.  For one thread.

    Parameters:
      target(Target): seen by a login that is a monitor's or an administrator's.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._schema = f'"{target.namespace}"'
        self._conn: Connection | None = None
        self._sees_all = False
        #: The looks of the last seconds: when, and what was counted.
        self._before: deque[tuple[float, dict[str, Any]]] = deque()
        self._dead_first: dict[str, float] | None = None
        #: The messages of the stream that was seen closely last.
        self._messages: dict[str, Detail] = {}

    def look(self) -> Look:
        """Look once.

        Raises:
          NotPermitted: the login is neither a monitor's nor an administrator's.
          DatabaseUnavailable, NotConfigured, SchemaOutOfDate: as `Database.connect`.
        """
        gauges = self._rows("read_gauges", MOST_COUNTED)
        clock = time.monotonic()
        workers = self._rows("list_workers")
        rates = {row["name"]: row for row in self._rows("stream_rates", WINDOW, LATEST)}
        named = self._rows("find_stuck", MOST_COUNTED) if self._sees_all else []
        started = self._started()
        streams, look = self._understood(gauges, workers)
        self._compare(look, streams, rates, started, clock)
        codecs = self._target.broker.codecs
        for row in named:
            row["failure"] = codecs.decode_text(row["failure"])
        look.stuck = find(look, named)
        return look

    def detail(self, kind: str, key: str) -> Detail:
        """Look at one thing closely.

        Raises:
          as `look`.
        """
        if not self._sees_all:
            return Detail({}, note="to see more takes an administrator of the namespace; this login is a monitor's")
        try:
            looks = {"stream": self._stream, "worker": self._worker, "runs": self._runs, "run": self._run}
            if kind == "message":
                return self._messages.get(key, Detail({}, note="it is not there any more"))
            return looks[kind](key)
        except psycopg.errors.QueryCanceled:
            return Detail({}, note=f"that took longer than {TIMEOUT // 1000} seconds: ask a command instead")

    def close(self) -> None:
        """Close the connection."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    # --- asking ------------------------------------------------------------------------------------------
    def _ask(self, statement: str, arguments: tuple[Any, ...]) -> list[Facts]:
        if self._conn is None:
            self._conn = self._target.broker.database.connect()
        conn = self._conn
        try:
            cursor = conn.execute(statement.encode(), arguments)
            names = [column.name for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        except psycopg.Error as e:
            if is_connection_lost(e, conn):
                self.close()
            if isinstance(e, psycopg.errors.QueryCanceled):
                raise
            error = translate(e)
            raise (error if isinstance(error, DurableError) else DurableError(str(e).strip())) from e

    def _rows(self, procedure: str, *arguments: Any) -> list[Facts]:
        if self._conn is None:
            # What the login may call is asked once a connection.
            found = self._ask(
                "SELECT set_config('statement_timeout', %s, false), EXISTS (SELECT FROM pg_proc p WHERE "
                "p.pronamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = %s) AND p.proname = 'find_stuck' "
                "AND has_function_privilege(p.oid, 'EXECUTE')) AS sees_all",
                (str(TIMEOUT), self._target.namespace),
            )
            self._sees_all = bool(found[0]["sees_all"])
        marks = ", ".join(["%s"] * len(arguments))
        columns = _COLUMNS.get(procedure, "*")
        return self._ask(f"SELECT {columns} FROM {self._schema}.{procedure}({marks})", arguments)

    def _started(self) -> int | None:
        """How many runs Postgres has seen started since ever; None: it does not count."""
        [row] = self._ask(
            "SELECT pg_stat_get_tuples_inserted(c.oid) AS started FROM pg_class c WHERE c.relname = 'run'"
            " AND c.relnamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = %s)",
            (self._target.namespace,),
        )
        started: int | None = row["started"]
        return started

    # --- understanding -----------------------------------------------------------------------------------
    def _understood(self, gauges: list[Facts], workers: list[Facts]) -> tuple[dict[str, Facts], Look]:
        streams: dict[str, Facts] = {}
        runs: dict[str, int] = {}
        roles: dict[str, Facts] = {}
        postgres: Facts = {}
        for row in gauges:
            what, name, value = row["metric"], row["name"], row["value"]
            if what.startswith("stream_") or what == "timers_overdue":
                stream = streams.setdefault(name, dict(_NOTHING, name=name, dead_by_reason={}))
                if what == "stream_dead_letters":
                    stream["dead"] += int(value)
                    stream["dead_by_reason"][row["kind"]] = int(value)
                elif what == "stream_oldest_ready_seconds":
                    stream["oldest"] = value or None
                else:
                    stream[_STREAM[what]] = bool(value) if what == "stream_paused" else int(value)
            elif what == "workflow_runs":
                runs[name] = int(value)
            elif what == "escalations":
                roles.setdefault(name, {"role": name, "oldest": None})[row["kind"]] = int(value)
            elif what == "escalation_oldest_waiting_seconds":
                roles.setdefault(name, {"role": name})["oldest"] = value
            elif name is None:
                postgres[what] = value
        for role in roles.values():
            role.setdefault("waiting", 0)
            role.setdefault("claimed", 0)
        found = sorted(streams.values(), key=lambda stream: stream["name"])
        by_role = sorted(roles.values(), key=lambda role: role["role"])
        return streams, Look(time.time(), self._sees_all, {}, found, workers, runs, by_role, postgres)

    def _compare(
        self, look: Look, streams: dict[str, Facts], rates: dict[str, Facts], started: int | None, clock: float
    ) -> None:
        """What moves: against a look some seconds ago, and of dead letters also against the first one."""
        now: dict[str, Any] = {
            "started": started,
            "held": {name: s["ready"] + s["leased"] + s["delayed"] for name, s in streams.items()},
            "dead": {name: s["dead"] for name, s in streams.items()},
            "estimated": {name for name, s in streams.items() if max(s["ready"], s["delayed"]) >= MOST_COUNTED},
        }
        if self._dead_first is None:
            self._dead_first = dict(now["dead"])
        while len(self._before) > 1 and clock - self._before[0][0] > WINDOW:
            self._before.popleft()
        at, then = self._before[0] if self._before else (clock, None)
        took = max(clock - at, 0.001)

        def changed(what: str, name: str) -> float | None:
            return None if then is None else (now[what][name] - then[what].get(name, 0)) / took

        for name, stream in streams.items():
            known = rates.get(name, {"ended": 0.0, "came": 0.0})
            change, out = changed("held", name), known["ended"]
            if name in now["estimated"] or (then is not None and name in then["estimated"]):
                # What is estimated is too rough for a difference: that is what comes less what goes.
                came = known["came"]
                change = came - out
            else:
                came = None if change is None else max(out + change, 0.0)
            died = changed("dead", name)
            stream.update(
                in_rate=came, out_rate=out, change_rate=change, dead_rate=None if died is None else max(died, 0.0)
            )
            stream["dead_more"] = max(stream["dead"] - self._dead_first.get(name, 0), 0)
        for name in ("in", "out", "dead"):
            found = [stream[f"{name}_rate"] for stream in streams.values()]
            look.rates[name] = None if None in found else sum(found)
        # It begins anew where the server crashed or somebody has reset it.
        before = None if then is None else then["started"]
        look.rates["runs_started"] = None if started is None or before is None else max(started - before, 0) / took
        self._before.append((clock, now))

    # --- a closer look -----------------------------------------------------------------------------------
    def _stream(self, name: str) -> Detail:
        now, rows = datetime.now(UTC), []
        self._messages = {}
        for row in self._rows("peek_messages", name, None, None, MOST):
            late = (now - row["due_at"]).total_seconds()
            rows.append(self._message(row, row["state"], row["last_failure"]))
            rows[-1]["due"] = -late if late < 0 else None
            rows[-1]["for"] = _age(row["since"] or row["due_at"], now) if late >= 0 else None
        for row in self._rows("list_dead_letters", None, None, name, None, None, None, None, None, MOST):
            rows.append(self._message(row, row["reason"], row["failure"]))
            rows[-1]["for"] = _age(row["died_at"], now)
        columns = ("message", "state", "actor", "due", "for", "attempt", "worker", "what", "last failure")
        return Detail({}, columns, rows, note="" if rows else "it is empty")

    def _message(self, row: Facts, state: str, failure: str | None) -> Facts:
        """A message, or a dead letter, as a row; kept, to be seen closely."""
        codecs = self._target.broker.codecs
        shown = {
            "message": row["message_id"], "state": state, "actor": row["actor"], "due": None, "attempt": row["attempt"],
            "worker": row.get("worker_id"), "last failure": last_line(codecs.decode_text(failure)),
        }  # fmt: skip
        if row["kind"] in ("s", "t", "w", "q"):
            return shown | {"what": f"a task of the run {row['run_id']}", "drill": ("run", str(row["run_id"]))}
        decoded = decode(row["payload"], row["kind"], codecs)
        names = (
            "message_id", "actor", "state", "reason", "attempt", "deaths", "priority", "enqueued_at", "due_at",
            "died_at", "worker_id", "unique_key", "dead_letter_id",
        )  # fmt: skip
        facts = {name: row[name] for name in names if row.get(name) is not None}
        facts |= {"arguments": call(decoded), "last_failure": codecs.decode_text(failure)}
        traceback = decoded.get("options", {}).get("traceback")
        lines = traceback.splitlines() if isinstance(traceback, str) else []
        key = f"{row['actor']} {row.get('dead_letter_id', row['message_id'])}"
        note = "none was kept"
        self._messages[key] = Detail(facts, ("traceback",), [{"traceback": line} for line in lines], note)
        return shown | {"what": facts["arguments"], "drill": ("message", key)}

    def _worker(self, key: str) -> Detail:
        now = datetime.now(UTC)
        rows = [
            {
                "message": row["message_id"], "stream": row["stream"], "actor": row["actor"], "attempt": row["attempt"],
                "for": _age(row["since"], now), "aborted": row["abort_at"] is not None, "run": row["run_id"],
                "drill": None if row["run_id"] is None else ("run", str(row["run_id"])),
            }
            for row in self._rows("worker_messages", int(key))
        ]  # fmt: skip
        columns = ("message", "stream", "actor", "attempt", "for", "aborted", "run")
        return Detail({}, columns, rows, note="" if rows else "it holds no message")

    def _runs(self, status: str) -> Detail:
        now, codecs = datetime.now(UTC), self._target.broker.codecs
        listed = self._rows("list_workflows", f'{{"status": "{status}"}}', False, True, None, None, MOST)
        rows = [
            {
                "workflow id": row["workflow_id"], "name": row["name"], "stream": row["queue_name"],
                "events": row["last_event"], "for": _age(row["started_at"], row["closed_at"] or now),
                "started": row["started_at"], "task failure": last_line(codecs.decode_text(row["task_failure"])),
                "drill": ("run", str(row["run_id"])),
            }
            for row in listed
        ]  # fmt: skip
        columns = ("workflow id", "name", "stream", "events", "for", "started", "task failure")
        return Detail({}, columns, rows, note="" if rows else "there are none")

    def _run(self, run_id: str) -> Detail:
        codecs = self._target.broker.codecs
        found = self._rows("get_run", run_id, None)
        if not found:
            return Detail({}, note="it is not there any more")
        [run] = found
        names = ("workflow_id", "run_id", "name", "queue_name", "status", "started_at", "closed_at", "last_event")
        facts = {name: run[name] for name in names}
        # Its last line, however long: that one says most.
        facts["task_failure"] = (codecs.decode_text(run["task_failure"]) or "").strip().rpartition("\n")[2][:1000]
        pending = ("number", "kind", "name", "attempt", "last failure", "next attempt")
        rows = [dict(zip(pending, row.values(), strict=False)) for row in self._rows("pending_of", run_id)]
        for row in rows:
            row["last failure"] = last_line(codecs.decode_text(row["last failure"]))
        columns = ("number", "kind", "name", "attempt", "next attempt", "last failure")
        return Detail(facts, columns, rows, note="" if rows else "it waits for nothing")


def _age(since: datetime | None, now: datetime) -> float | None:
    return None if since is None else (now - since).total_seconds()
