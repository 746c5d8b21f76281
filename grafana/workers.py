"""The page on workers: who is there, how busy they are, and what they ask of the database."""

from __future__ import annotations

from typing import Any

from .parts import Page, gauge, or_none, quantile, rate, share

SPACE = 'namespace=~"$namespace"'
WHERE = f'{SPACE}, stream=~"$stream"'
SPACES = ("namespace",)
ACTOR = ("namespace", "actor")
LIVE = f'{SPACE}, state="live"'
SILENT = f'{SPACE}, state="silent"'


def dashboard() -> Any:
    """The dashboard."""
    page = Page("workers", "Workers", "Who works, how busy they are, and what they ask of the database.", "stream")

    # Of all streams: the threads are.  Both take threads, and the labels of one are not those of the other.
    busy = (
        f"sum by (namespace) (rate(dramatiq_durable_message_processing_seconds_sum{{{SPACE}}}[$__rate_interval])"
        f" or rate(dramatiq_durable_workflow_task_seconds_sum{{{SPACE}}}[$__rate_interval]))"
    )
    threads = gauge("worker_threads", SPACES, SPACE)
    trips = rate("database_round_trips_total", SPACES, SPACE)

    page.row("Now")
    page.number(
        "Live workers",
        "Workers whose heartbeat is not older than their reclaim_delay.",
        f"sum({gauge('workers', SPACES, LIVE)})",
        low_is_bad=True,
        bad=1,
    )
    page.number(
        "Silent workers",
        "Workers that were not heard of for longer than their reclaim_delay. Others take back what they hold.",
        f"sum({gauge('workers', SPACES, SILENT)})",
        warn=1,
    )
    page.number("Threads", "Threads of live workers.", f"sum({threads})")
    page.number(
        "Busy threads",
        "The share of the threads' time that goes into messages and workflow tasks. Near 100 %: more workers help.",
        share(f"sum({busy})", f"sum({threads})"),
        unit="percentunit",
        warn=0.8,
        bad=0.95,
        instant=False,
    )
    page.number(
        "Round trips a message",
        "Round trips to the database for each message that is done; below 1 where there is much to do, because a group "
        "commit takes many.",
        share(f"sum({trips})", f"sum({rate('messages_acked_total', SPACES, SPACE)})"),
        instant=False,
    )
    page.number(
        "Errors of the database",
        "In the time shown, of all classes.",
        or_none(f"sum(increase(dramatiq_durable_database_errors_total{{{SPACE}}}[$__range]))", trips),
        warn=1,
    )

    page.row("Who is there")
    page.lines(
        "Workers",
        "live, or silent for longer than their reclaim_delay.",
        (gauge("workers", ("namespace", "state"), SPACE), "{{namespace}} {{state}}"),
    )
    page.lines(
        "Threads, and how many of them are busy",
        "Busy ones are counted by the time that messages and workflow tasks took.",
        (threads, "{{namespace}} threads"),
        (busy, "{{namespace}} busy"),
    )
    page.lines(
        "Taken from dead workers",
        "Messages a second. returned: they run again elsewhere. Otherwise they are dead letters, because they "
        "are poison: they have killed too many workers.",
        (rate("messages_reclaimed_total", ("namespace", "outcome"), SPACE), "{{namespace}} {{outcome}}"),
        unit="cps",
    )

    page.row("What they do, on the chosen streams")
    page.lines(
        "Messages processed, by actor",
        "Messages and activities a second, failed ones included; the twenty busiest.",
        (f"topk(20, {rate('message_processing_seconds', ACTOR, WHERE, '_count')})", "{{namespace}} {{actor}}"),
        unit="cps",
    )
    page.lines(
        "Processing time, by actor",
        "The time that 95 of 100 messages of an actor do not exceed; the twenty slowest.",
        (f"topk(20, {quantile(0.95, 'message_processing_seconds', ACTOR, WHERE)})", "{{namespace}} {{actor}}"),
        unit="s",
    )
    page.lines(
        "Threads in use, by actor",
        "How many threads each actor keeps busy on average; the twenty that take most.",
        (f"topk(20, {rate('message_processing_seconds', ACTOR, WHERE, '_sum')})", "{{namespace}} {{actor}}"),
    )
    page.lines(
        "Tried again, and dead-lettered",
        "Messages a second that failed.",
        (rate("messages_retried_total", SPACES, WHERE), "{{namespace}} tried again"),
        (rate("messages_dead_lettered_total", SPACES, WHERE), "{{namespace}} dead-lettered"),
        unit="cps",
    )
    page.lines(
        "Outcomes refused",
        "A worker was done with a message when the lease was no longer its own: it was frozen or cut off for "
        "longer than its reclaim_delay.",
        (rate("messages_stale_total", SPACES, WHERE), "{{namespace}}"),
        unit="cps",
    )
    page.lines(
        "Given back",
        "Messages a second that were prefetched and not begun, of workers that stop.",
        (rate("messages_released_total", SPACES, WHERE), "{{namespace}}"),
        unit="cps",
    )

    page.row("What they ask of the database")
    page.lines(
        "Group commit",
        "One transaction of a group commit: its one round trip, with the commit.",
        (quantile(0.5, "group_commit_seconds", SPACES, SPACE), "p50 {{namespace}}"),
        (quantile(0.99, "group_commit_seconds", SPACES, SPACE), "p99 {{namespace}}"),
        unit="s",
    )
    page.lines(
        "Operations in a group commit",
        "The mean. More at once cost less each.",
        (
            share(
                rate("group_commit_operations", SPACES, SPACE, "_sum"),
                rate("group_commit_operations", SPACES, SPACE, "_count"),
            ),
            "{{namespace}}",
        ),
    )
    page.lines(
        "Round trips",
        "Round trips a second to the database: of group commits, and of single calls.",
        (rate("database_round_trips_total", ("namespace", "kind"), SPACE), "{{namespace}} {{kind}}"),
        unit="cps",
    )
    page.lines(
        "Single calls",
        "The time that 95 of 100 calls of a procedure do not exceed, outside of the group commit; the twenty slowest.",
        (
            f"topk(20, {quantile(0.95, 'database_call_seconds', ('namespace', 'procedure'), SPACE)})",
            "{{namespace}} {{procedure}}",
        ),
        unit="s",
        width=12,
    )
    page.lines(
        "Errors of the database",
        "A second, by the class of their SQLSTATE. none, 08, 57: connections that broke; 53: out of resources; "
        "DD: refused by a procedure of ours.",
        (rate("database_errors_total", ("namespace", "sqlstate_class"), SPACE), "{{namespace}} {{sqlstate_class}}"),
        unit="cps",
        width=12,
    )
    return page.build()
