"""The page on workflows: runs, their tasks and histories, timers, people."""

from __future__ import annotations

from typing import Any

from .parts import Page, gauge, or_none, quantile, rate, share

SPACE = 'namespace=~"$namespace"'
STREAMS = f'{SPACE}, stream=~"$stream"'
WHERE = f'{SPACE}, workflow=~"$workflow"'
HIT = f'{WHERE}, result="hit"'
STREAM = ("namespace", "stream")
FLOW = ("namespace", "workflow")
NAME = "{{namespace}}/{{workflow}}"


def dashboard() -> Any:
    """The dashboard."""
    page = Page(
        "workflows", "Workflows", "Runs: how many, how fast, what fails, what is late, who is waited for.",
        "stream", "workflow",
    )  # fmt: skip

    page.row("Now")
    open_runs = f'{SPACE}, status="running"'
    steps = rate("workflow_steps_total", ("namespace",), SPACE)
    known = gauge("workflow_runs", ("namespace",), open_runs)
    page.number(
        "Open runs",
        "Runs that have not closed. Estimated where there are more than 2,000.",
        f"sum({known})",
    )
    page.number(
        "Overdue timers",
        "Timers of runs that are due and were not handed out; up to 2,000 of a stream.",
        f"sum({gauge('timers_overdue', STREAM, STREAMS)})",
        warn=1,
        bad=100,
    )
    page.number(
        "Nondeterminism",
        "Workflow tasks in the time shown that failed because the code does something else than the history says.",
        or_none(f"sum(increase(dramatiq_durable_workflow_nondeterminism_total{{{WHERE}}}[$__range]))", steps),
        bad=1,
    )
    page.number(
        "Failed tasks",
        "Workflow tasks in the time shown that failed and come again, for whatever reason.",
        or_none(f"sum(increase(dramatiq_durable_workflow_task_failures_total{{{WHERE}}}[$__range]))", steps),
        warn=1,
    )
    waiting = f'{SPACE}, status="waiting"'
    page.number(
        "Waiting for people",
        "Open escalations that nobody has claimed.",
        or_none(f"sum({gauge('escalations', ('namespace', 'role'), waiting)})", known),
    )
    page.number(
        "Longest wait for people",
        "For how long the oldest escalation that waits has been open.",
        or_none(f"max({gauge('escalation_oldest_waiting_seconds', ('namespace', 'role'), SPACE)})", known),
        unit="s",
    )

    page.row("Runs")
    page.lines(
        "Open runs",
        "Runs that have not closed, of all workflows of the namespace.",
        (known, "{{namespace}}"),
    )
    page.lines(
        "Started",
        "Runs a second whose first task was done.",
        (rate("workflow_runs_started_total", FLOW, WHERE), NAME),
        unit="cps",
    )
    page.lines(
        "Closed",
        "Runs a second that a worker's step closed. What is terminated or runs out of time is closed by the "
        "database, and is not here.",
        (rate("workflow_runs_closed_total", (*FLOW, "status"), WHERE), NAME + " {{status}}"),
        unit="cps",
    )
    page.lines(
        "Kept runs",
        "All runs that are kept, by how they stand; `dramatiq-durable prune` deletes closed ones.",
        (gauge("workflow_runs", ("namespace", "status"), SPACE), "{{namespace}} {{status}}"),
        width=12,
    )
    page.lines(
        "Time from start to end",
        "Of runs that closed: half took less than p50, one in twenty longer than p95.",
        (quantile(0.5, "workflow_run_seconds", FLOW, WHERE), f"p50 {NAME}"),
        (quantile(0.95, "workflow_run_seconds", FLOW, WHERE), f"p95 {NAME}"),
        unit="s",
        width=12,
    )

    page.row("Tasks")
    page.lines(
        "Task latency",
        "From when a thread took a workflow task until its step was queued for the commit, replay included.",
        (quantile(0.5, "workflow_task_seconds", FLOW, WHERE), f"p50 {NAME}"),
        (quantile(0.99, "workflow_task_seconds", FLOW, WHERE), f"p99 {NAME}"),
        unit="s",
    )
    page.lines(
        "Steps, by outcome",
        "recorded: the history has it. refused: the run went on elsewhere; stale: the lease was lost.",
        (rate("workflow_steps_total", ("outcome",), WHERE), "{{outcome}}"),
        unit="cps",
        stacked=True,
    )
    page.lines(
        "Failed tasks, by reason",
        "Tasks that failed and come again, each time later. nondeterminism: code and history disagree; codec: "
        "a value cannot be decoded.",
        (rate("workflow_task_failures_total", (*FLOW, "reason"), WHERE), NAME + " {{reason}}"),
        unit="cps",
    )
    page.lines(
        "Nondeterminism",
        "Tasks a second that failed because the code does something else than the history says: the runs stand "
        "still until code comes that fits.",
        (rate("workflow_nondeterminism_total", FLOW, WHERE), NAME),
        unit="cps",
    )
    page.lines(
        "Runs found in memory",
        "The share of tasks whose run was in the worker's memory; for the others its history is read and replayed.",
        (
            share(rate("workflow_cache_lookups_total", FLOW, HIT), rate("workflow_cache_lookups_total", FLOW, WHERE)),
            NAME,
        ),
        unit="percentunit",
        highest=1,
    )
    page.lines(
        "Events replayed",
        "Events a second that were read from the database and replayed.",
        (rate("workflow_replayed_events_total", FLOW, WHERE), NAME),
        unit="cps",
    )

    page.row("Histories")
    page.lines(
        "Events, by type",
        "Events a second that were recorded in histories.",
        (rate("workflow_events_total", ("type",), WHERE), "{{type}}"),
        unit="cps",
        width=12,
    )
    page.lines(
        "Signals and updates",
        "Events a second of signals that arrived and of updates.",
        (rate("workflow_events_total", (*FLOW, "type"), WHERE + ', type=~"(Signal|Update).*"'), NAME + " {{type}}"),
        unit="cps",
        width=12,
    )

    page.row("Time and people")
    page.lines(
        "Lateness of timers",
        "From when a timer of a run was due until it was handed out.",
        (quantile(0.5, "timer_lateness_seconds", STREAM, STREAMS), "p50 {{namespace}}/{{stream}}"),
        (quantile(0.95, "timer_lateness_seconds", STREAM, STREAMS), "p95 {{namespace}}/{{stream}}"),
        unit="s",
    )
    page.lines(
        "Overdue timers",
        "Timers of runs that are due and were not handed out; up to 2,000 of a stream.",
        (gauge("timers_overdue", STREAM, STREAMS), "{{namespace}}/{{stream}}"),
    )
    page.lines(
        "Longest overdue",
        "For how long the oldest timer, deadline (of a run or an activity) or schedule has been due that nobody has "
        "taken. A line that rises by a second a second: nobody claims there.",
        (gauge("overdue_seconds", (*STREAM, "kind"), STREAMS), "{{namespace}}/{{stream}} {{kind}}"),
        unit="s",
    )
    page.lines(
        "Lateness of schedules",
        "From when a schedule was due until its tick was handed out.",
        (quantile(0.95, "schedule_lateness_seconds", STREAM, STREAMS), "p95 {{namespace}}/{{stream}}"),
        unit="s",
        width=12,
    )
    page.lines(
        "Schedules",
        "active, paused by somebody, or stopped by the database because whoever made them may no longer send there.",
        (gauge("schedules", ("namespace", "state"), SPACE), "{{namespace}} {{state}}"),
        width=12,
    )
    page.lines(
        "Open escalations",
        "What waits for somebody, and what somebody has claimed, by role.",
        (gauge("escalations", ("namespace", "role", "status"), SPACE), "{{namespace}} {{role}} {{status}}"),
        width=12,
    )
    page.lines(
        "Age of the oldest escalation that waits",
        "By role.",
        (gauge("escalation_oldest_waiting_seconds", ("namespace", "role"), SPACE), "{{namespace}} {{role}}"),
        unit="s",
        width=12,
    )
    return page.build()
