"""Every metric: its name, type, unit, labels and meaning.  What is shown, and the docs' table, come from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What every name begins with.
PREFIX = "dramatiq_durable_"

#: The upper bounds of histograms' buckets, in the metric's unit; the last one, infinity, is not named.
LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
CALLS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
LIVES = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0, 604800.0, 2592000.0)


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A metric of the catalogue.

    Attributes:
      name(str): as Prometheus has it, with the unit and ``_total``.
      type(str): counter, histogram or gauge.
      labels(tuple): besides ``namespace``, which all have.
      meaning(str): one line for people.
      unit(str): s, By, or what is counted in braces, as OpenTelemetry writes units.
      bounds(tuple): of a histogram's buckets.
    """

    name: str
    type: Literal["counter", "histogram", "gauge"]
    labels: tuple[str, ...]
    meaning: str
    unit: str
    bounds: tuple[float, ...] = ()

    @property
    def otel_name(self) -> str:
        """As an OpenTelemetry instrument: the unit is no part of the name."""
        name = self.name.removeprefix(PREFIX)
        for suffix in ("_total", "_seconds", "_bytes"):
            name = name.removesuffix(suffix)
        return f"dramatiq_durable.{name}"


def _counter(name: str, unit: str, labels: str, meaning: str) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", tuple(labels.split()), meaning, f"{{{unit}}}")


def _seconds(name: str, labels: str, meaning: str, bounds: tuple[float, ...] = LATENCY) -> Metric:
    return Metric(f"{PREFIX}{name}_seconds", "histogram", tuple(labels.split()), meaning, "s", bounds)


def _gauge(name: str, unit: str, labels: str, meaning: str) -> Metric:
    return Metric(PREFIX + name, "gauge", tuple(labels.split()), meaning, unit)


# --- counted by every process that sends or works ------------------------------------------------------------------

ENQUEUED = _counter(
    "messages_enqueued", "message", "stream kind",
    "Messages stored by this process: sent, left behind by another message, or activities that a workflow asked for.",
)  # fmt: skip
CLAIMED = _counter("messages_claimed", "message", "stream kind", "Messages handed out to this worker.")
ACKED = _counter(
    "messages_acked", "message", "stream kind", "Messages that are done, and said so under their live lease."
)
RETRIED = _counter("messages_retried", "message", "stream kind", "Messages that are to be tried again later.")
RELEASED = _counter("messages_released", "message", "stream kind", "Messages given back unprocessed.")
DEAD_LETTERED = _counter(
    "messages_dead_lettered", "message", "stream kind", "Messages that this worker put among the dead letters."
)
STALE = _counter(
    "messages_stale", "message", "stream kind",
    "Outcomes that were refused because the lease was no longer the live one.",
)  # fmt: skip
RECLAIMED = _counter(
    "messages_reclaimed", "message", "outcome",
    "Messages taken from dead workers by this one: returned to their streams, or dead letters because they are poison.",
)  # fmt: skip
WAIT = _seconds("message_wait", "stream kind", "From when a message was due until it was handed out.")
PROCESSING = _seconds(
    "message_processing", "stream actor",
    "From when a thread took a message (or an activity) until its outcome was queued for the commit.",
)  # fmt: skip
BATCH = Metric(
    PREFIX + "group_commit_operations", "histogram", (), "Operations in one transaction.", "{operation}", SIZES
)
COMMIT = _seconds("group_commit", "", "One transaction of a group commit: its one round trip, with the commit.", CALLS)
CALL = _seconds("database_call", "procedure", "A call of a procedure by itself, outside of the group commit.", CALLS)
TRIPS = _counter(
    "database_round_trips", "round_trip", "kind", "Round trips to the database: of group commits, and of single calls."
)
ERRORS = _counter(
    "database_errors", "error", "sqlstate_class",
    "Errors of the database by the class of their SQLSTATE (its first two characters); `none`: it has none.",
)  # fmt: skip
STARTED = _counter("workflow_runs_started", "run", "workflow", "Runs whose first task was done by this worker.")
CLOSED = _counter(
    "workflow_runs_closed", "run", "workflow status",
    "Runs that a step of this worker closed; what was terminated or ran out of time is closed by the database.",
)  # fmt: skip
LIFE = _seconds("workflow_run", "workflow status", "From the start of a run until it closed.", LIVES)
TASK = _seconds("workflow_task", "workflow", "From when a thread took a workflow task until its step was queued.")
STEPS = _counter(
    "workflow_steps", "step", "workflow outcome",
    "Steps of runs: recorded; refused, because the run went on elsewhere; stale, because the lease was lost; failed.",
)  # fmt: skip
EVENTS = _counter(
    "workflow_events", "event", "workflow type",
    "Events that steps recorded, by their type: signals, updates, timers, activities, children, escalations; and "
    "`UpdateRejected`, which leaves no history.",
)  # fmt: skip
FAILURES = _counter(
    "workflow_task_failures", "task", "workflow reason",
    "Workflow tasks that failed and come again: nondeterminism, codec, or any other error.",
)  # fmt: skip
NONDETERMINISM = _counter(
    "workflow_nondeterminism", "task", "workflow", "Workflow tasks that failed because code and history disagree."
)
REPLAYED = _counter("workflow_replayed_events", "event", "workflow", "Events read from the database and replayed.")
CACHE = _counter("workflow_cache_lookups", "lookup", "workflow result", "Whether a run was in memory: hit or miss.")
TIMERS = _seconds("timer_lateness", "stream", "From when a timer of a run was due until it was handed out.")
SCHEDULES = _seconds("schedule_lateness", "stream", "From when a schedule was due until its tick was handed out.")

#: What the processes count: from `recorder`, through Prometheus and OpenTelemetry.
COUNTED = (
    ENQUEUED, CLAIMED, ACKED, RETRIED, RELEASED, DEAD_LETTERED, STALE, RECLAIMED, WAIT, PROCESSING, BATCH, COMMIT, CALL,
    TRIPS, ERRORS, STARTED, CLOSED, LIFE, TASK, STEPS, EVENTS, FAILURES, NONDETERMINISM, REPLAYED, CACHE, TIMERS,
    SCHEDULES,
)  # fmt: skip

# --- asked of the database by the exporter ---------------------------------------------------------------------------

EXPORTER = (
    _gauge("up", "1", "", "Whether the database answered when the exporter asked it last."),
    _gauge("exporter_collected_timestamp_seconds", "s", "", "When the exporter's figures were read, in Unix time."),
    _gauge("exporter_collection_seconds", "s", "", "How long it took to read them."),
)
GAUGES = (
    _gauge("stream_ready_messages", "{message}", "stream", "Messages due and not leased. Estimated from 2,000."),
    _gauge("stream_leased_messages", "{message}", "stream", "Messages that workers hold."),
    _gauge("stream_delayed_messages", "{message}", "stream", "Messages that are not due yet. Estimated from 2,000."),
    _gauge("stream_dead_letters", "{message}", "stream reason", "Dead letters by reason. Estimated from 2,000."),
    _gauge(
        "stream_oldest_ready_seconds", "s", "stream",
        "For how long the oldest message that can be claimed has been due; 0 where there is none.",
    ),
    _gauge("stream_paused", "1", "stream", "Whether the stream is paused."),
    _gauge("stream_workers", "{worker}", "stream", "Live workers that consume the stream."),
    _gauge(
        "timers_overdue", "{timer}", "stream",
        "Timers of runs that are due and were not handed out, up to 2,000.",
    ),
    _gauge(
        "overdue_seconds", "s", "stream kind",
        "For how long the oldest timer of a run, deadline (of a run or an activity) or schedule has been due that was "
        "not handed out; 0 where there is none.",
    ),
    _gauge(
        "schedules", "{schedule}", "state",
        "Schedules: active, paused by somebody, or stopped, because whoever made it may no longer send to its stream.",
    ),
    _gauge("workflow_runs", "{run}", "status", "Runs by status; `running` are the open ones. Estimated from 2,000."),
    _gauge(
        "escalations", "{escalation}", "role status",
        "Open escalations: waiting for somebody, or claimed. Of the 2,000 that are first in line.",
    ),
    _gauge("escalation_oldest_waiting_seconds", "s", "role", "For how long the oldest that waits has been open."),
    _gauge("workers", "{worker}", "state", "Workers: live, or silent for longer than their reclaim_delay."),
    _gauge("worker_threads", "{thread}", "", "Threads of live workers."),
    _gauge("watchdog_last_look_seconds", "s", "", "How long ago the watchdog looked; absent where none ever did."),
    _gauge(
        "login_expires_seconds", "s", "",
        "In how long the first provisioned worker has no login any more; negative for a day; absent where none ends.",
    ),
    _gauge("table_bytes", "By", "table", "A table's size with its indexes and values stored apart."),
    _gauge("table_live_rows", "{row}", "table", "Rows of a table, as Postgres has counted them."),
    _gauge("table_dead_rows", "{row}", "table", "Rows of a table that a VACUUM has not removed yet."),
    _gauge(
        "oldest_xmin_age_transactions", "{transaction}", "",
        "How many transactions ago the oldest one began that a VACUUM must spare: what holds it, bloats all tables.",
    ),
    _gauge(
        "oldest_transaction_seconds", "s", "",
        "For how long the oldest transaction is open, of those that the namespace's owner may see.",
    ),
    _gauge(
        "unseen_sessions", "{session}", "",
        "Sessions whose transactions the namespace's owner may not see (GRANT pg_read_all_stats mends that).",
    ),
    _gauge("notification_queue_ratio", "1", "", "How full the queue of notifications is, from 0 to 1."),
)  # fmt: skip

CATALOGUE = (*COUNTED, *EXPORTER, *GAUGES)


def table() -> str:
    """The catalogue as a table of Markdown."""
    lines = ["| name | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for m in CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in m.labels)
        lines.append(f"| `{m.name}` | {m.type} | {m.unit} | {labels} | {m.meaning} |")
    return "\n".join(lines) + "\n"
