"""The page on streams: what waits, what goes through, how long it takes, what died."""

from __future__ import annotations

from typing import Any

from .parts import Page, gauge, or_none, quantile, rate

WHERE = 'namespace=~"$namespace", stream=~"$stream"'
STREAM = ("namespace", "stream")
NAME = "{{namespace}}/{{stream}}"


def dashboard() -> Any:
    """The dashboard."""
    page = Page("streams", "Streams", "What waits in the streams, what goes through them, and what died.", "stream")

    page.row("Now")
    page.number(
        "Ready",
        "Messages that are due, and that no worker has. Estimated where there are more than 2,000.",
        f"sum({gauge('stream_ready_messages', STREAM, WHERE)})",
    )
    page.number("Leased", "Messages that workers hold.", f"sum({gauge('stream_leased_messages', STREAM, WHERE)})")
    page.number(
        "Oldest ready",
        "For how long the oldest message that can be claimed has been due.",
        f"max({gauge('stream_oldest_ready_seconds', STREAM, WHERE)})",
        unit="s",
        warn=60,
        bad=300,
    )
    page.number(
        "Streams without a worker",
        "Streams where messages are ready that no live worker consumes.",
        or_none(
            f"count({gauge('stream_ready_messages', STREAM, WHERE)} > 0"
            f" and {gauge('stream_workers', STREAM, WHERE)} == 0)",
            gauge("stream_workers", STREAM, WHERE),
        ),
        bad=1,
    )
    page.number(
        "Paused streams",
        "Streams from which workers get nothing because somebody has paused them.",
        f"sum({gauge('stream_paused', STREAM, WHERE)})",
        warn=1,
    )
    page.number(
        "Dead letters",
        "All that are kept, of whatever reason and age.",
        or_none(
            f"sum({gauge('stream_dead_letters', (*STREAM, 'reason'), WHERE)})",
            gauge("stream_ready_messages", STREAM, WHERE),
        ),
        warn=1,
    )

    page.row("What waits")
    page.lines(
        "Ready messages",
        "Messages that are due, and that no worker has. A line that only rises: more comes than the workers do.",
        (gauge("stream_ready_messages", STREAM, WHERE), NAME),
    )
    page.lines(
        "Age of the oldest ready message",
        "A line that rises by a second a second is one message that nobody takes: the stream is stuck.",
        (gauge("stream_oldest_ready_seconds", STREAM, WHERE), NAME),
        unit="s",
    )
    page.lines(
        "Live workers",
        "Live workers that consume the stream.",
        (gauge("stream_workers", STREAM, WHERE), NAME),
    )
    page.lines(
        "Leased messages",
        "Messages that workers hold: those that run, and those that are prefetched.",
        (gauge("stream_leased_messages", STREAM, WHERE), NAME),
    )
    page.lines(
        "Delayed messages",
        "Messages that are not due yet: sent with a delay, waiting for their retry, timers of runs.",
        (gauge("stream_delayed_messages", STREAM, WHERE), NAME),
    )
    page.lines(
        "Paused",
        "1 while a stream is paused.",
        (gauge("stream_paused", STREAM, WHERE), NAME),
        unit="bool_on_off",
        highest=1,
    )

    page.row("What goes through")
    page.lines(
        "Sent",
        "Messages a second that processes have stored. Not what SQL, schedules and using() blocks send.",
        (rate("messages_enqueued_total", STREAM, WHERE), NAME),
        unit="cps",
    )
    page.lines(
        "Claimed",
        "Messages a second that were handed out to workers; a retry counts again.",
        (rate("messages_claimed_total", STREAM, WHERE), NAME),
        unit="cps",
    )
    page.lines(
        "Done", "Messages a second that are done.", (rate("messages_acked_total", STREAM, WHERE), NAME), unit="cps"
    )
    page.lines(
        "Claimed, by kind",
        "What the messages are: plain ones, activities, events of topics, tasks of workflows, queries.",
        (rate("messages_claimed_total", ("kind",), WHERE), "{{kind}}"),
        unit="cps",
        stacked=True,
    )
    page.lines(
        "Tried again",
        "Messages a second that failed and come again later.",
        (rate("messages_retried_total", STREAM, WHERE), NAME),
        unit="cps",
    )
    page.lines(
        "Given back and refused",
        "Given back: prefetched messages of workers that stop. Refused: outcomes that came after the lease was "
        "lost, so that the message has run (or runs) elsewhere as well.",
        (rate("messages_released_total", STREAM, WHERE), f"given back {NAME}"),
        (rate("messages_stale_total", STREAM, WHERE), f"refused {NAME}"),
        unit="cps",
    )

    page.row("How long it takes")
    page.lines(
        "Wait",
        "From when a message was due until it was handed out: half of the messages waited less than p50, one in a "
        "hundred longer than p99.",
        (quantile(0.5, "message_wait_seconds", STREAM, WHERE), f"p50 {NAME}"),
        (quantile(0.99, "message_wait_seconds", STREAM, WHERE), f"p99 {NAME}"),
        unit="s",
        width=12,
    )
    page.lines(
        "Processing",
        "From when a thread took a message until its outcome was queued for the commit.",
        (quantile(0.5, "message_processing_seconds", STREAM, WHERE), f"p50 {NAME}"),
        (quantile(0.99, "message_processing_seconds", STREAM, WHERE), f"p99 {NAME}"),
        unit="s",
        width=12,
    )

    page.row("What died")
    page.lines(
        "Dead letters",
        "All that are kept. rejected: retries ran out, or it was refused; poison: it kept killing its workers; "
        "aborted: somebody aborted it; unsettled: its end could not be stored.",
        (gauge("stream_dead_letters", (*STREAM, "reason"), WHERE), NAME + " {{reason}}"),
        width=12,
    )
    page.lines(
        "Dead-lettered",
        "Messages a second that workers put among the dead letters.",
        (rate("messages_dead_lettered_total", STREAM, WHERE), NAME),
        unit="cps",
        width=12,
    )
    return page.build()
