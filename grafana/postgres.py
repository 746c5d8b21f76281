"""The page on Postgres: whether it answers, what holds a VACUUM up, how large the tables are."""

from __future__ import annotations

from typing import Any

from .parts import Page, gauge, quantile, rate

WHERE = 'namespace=~"$namespace"'
SPACE = ("namespace",)
TABLE = ("namespace", "table")
NAME = "{{namespace}}.{{table}}"


def dashboard() -> Any:
    """The dashboard."""
    page = Page("postgres", "Postgres health", "Whether the database answers, what bloats it, and what holds it up.")

    page.row("Now")
    page.number(
        "Up",
        "Whether the database answered each exporter when it was asked last; 0 where one of them got no answer.",
        f"min(dramatiq_durable_up{{{WHERE}}})",
        unit="bool_yes_no",
        low_is_bad=True,
        bad=1,
    )
    page.number(
        "Age of these figures",
        "For how long the exporter has not read the database; it looks at most once an interval (15 s).",
        f"time() - min({gauge('exporter_collected_timestamp_seconds', SPACE, WHERE)})",
        unit="s",
        warn=60,
        bad=300,
    )
    page.number(
        "Oldest transaction",
        "For how long it is open. While it is, no VACUUM removes what was deleted since.",
        f"max({gauge('oldest_transaction_seconds', SPACE, WHERE)})",
        unit="s",
        warn=300,
        bad=1800,
    )
    page.number(
        "Oldest xmin",
        "How many transactions ago the oldest one began that a VACUUM must spare.",
        f"max({gauge('oldest_xmin_age_transactions', SPACE, WHERE)})",
        warn=100_000,
        bad=1_000_000,
    )
    page.number(
        "Queue of notifications",
        "How full it is. Full: every NOTIFY of the whole server fails; ours stop before that, and workers poll.",
        f"max({gauge('notification_queue_ratio', SPACE, WHERE)})",
        unit="percentunit",
        warn=0.1,
        bad=0.5,
    )
    page.number(
        "Sessions unseen",
        "Sessions whose transactions the namespace's owner may not see: both figures about the oldest may miss them.",
        f"max({gauge('unseen_sessions', SPACE, WHERE)})",
        warn=1,
    )

    page.row("What bloats the tables")
    page.lines(
        "Size of the tables",
        "With indexes and values stored apart; the twelve largest.",
        (f"topk(12, {gauge('table_bytes', TABLE, WHERE)})", NAME),
        unit="bytes",
    )
    page.lines(
        "Rows",
        "As Postgres has counted them; the twelve largest.",
        (f"topk(12, {gauge('table_live_rows', TABLE, WHERE)})", NAME),
    )
    page.lines(
        "Dead rows",
        "Rows that a VACUUM has not removed yet; the twelve largest. A saw is healthy, a line that only rises is not.",
        (f"topk(12, {gauge('table_dead_rows', TABLE, WHERE)})", NAME),
    )
    page.lines(
        "Oldest xmin",
        "How many transactions ago the oldest one began that a VACUUM must spare: a transaction, a replica, a prepared "
        "transaction.",
        (gauge("oldest_xmin_age_transactions", SPACE, WHERE), "{{namespace}}"),
    )
    page.lines(
        "Oldest transaction",
        "For how long it is open, of those that the namespace's owner may see.",
        (gauge("oldest_transaction_seconds", SPACE, WHERE), "{{namespace}}"),
        unit="s",
    )
    page.lines(
        "Queue of notifications",
        "How full it is. What fills it is a session that listens and stays in a transaction.",
        (gauge("notification_queue_ratio", SPACE, WHERE), "{{namespace}}"),
        unit="percentunit",
    )

    page.row("How it answers")
    page.lines(
        "Group commit",
        "One transaction of a group commit: its one round trip, with the commit. This is what the disk of the "
        "write-ahead log takes, and the network.",
        (quantile(0.5, "group_commit_seconds", SPACE, WHERE), "p50 {{namespace}}"),
        (quantile(0.99, "group_commit_seconds", SPACE, WHERE), "p99 {{namespace}}"),
        unit="s",
    )
    page.lines(
        "Transactions",
        "Group commits a second.",
        (rate("group_commit_seconds", SPACE, WHERE, "_count"), "{{namespace}}"),
        unit="cps",
    )
    page.lines(
        "Errors",
        "A second, by the class of their SQLSTATE.",
        (rate("database_errors_total", ("namespace", "sqlstate_class"), WHERE), "{{namespace}} {{sqlstate_class}}"),
        unit="cps",
    )
    page.lines(
        "The exporter's look",
        "How long it took to read these figures.",
        (gauge("exporter_collection_seconds", SPACE, WHERE), "{{namespace}}"),
        unit="s",
    )
    page.lines(
        "The watchdog's last look",
        "How long ago the watchdog looked; nothing where none ever did. It looks every second.",
        (gauge("watchdog_last_look_seconds", SPACE, WHERE), "{{namespace}}"),
        unit="s",
    )
    page.lines(
        "The next end of a login",
        "In how long the first of the provisioned workers has no login any more; nothing where none ends.",
        (f"min by (namespace) (dramatiq_durable_login_expires_seconds{{{WHERE}}})", "{{namespace}}"),
        unit="s",
    )
    return page.build()
