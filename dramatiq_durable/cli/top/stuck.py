"""What is slow or stuck, from what was seen."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..payload import last_line

if TYPE_CHECKING:
    from .look import Facts, Look

#: From how many seconds on something is worth a line: a message that waits, one that waits while nothing ends, one that
#: runs, a transaction that is open.
WAITS, STANDS, RUNS, OPEN = 5, 60, 30, 60

#: How full the queue of notifications may be.
FULL = 0.5


def find(look: Look, named: list[Facts]) -> list[Facts]:
    """Lines of (bad, what, name, count, for, detail, drill), the worst first.

    Parameters:
      look(Look): what was counted.
      named(list): what `find_stuck` answered, one by one; empty for a monitor.
    """
    lines: list[Facts] = []

    def add(
        bad: bool, what: str, name: str, *, count: int | None = None, age: float | None = None, detail: str = "",
        drill: tuple[str, str] | None = None,
    ) -> None:  # fmt: skip
        lines.append(
            {"bad": bad, "what": what, "name": name, "count": count, "for": age, "detail": detail, "drill": drill}
        )

    now = datetime.now(UTC)
    first: dict[Any, Facts] = {}
    for row in named:
        if row["what"] == "ready" and (row["stream"], "ready") not in first:
            first[row["stream"], "ready"] = row
    for stream in look.streams:
        name, drill = stream["name"], ("stream", stream["name"])
        waits = {
            "count": stream["ready"],
            "age": stream["oldest"],
            "drill": drill,
            "detail": _of(first.get((name, "ready"))),
        }
        if stream["ready"] and stream["paused"]:
            add(False, "paused", name, **waits)
        elif stream["ready"] and not stream["workers"]:
            add(True, "no worker", name, **waits)
        elif (stream["oldest"] or 0) >= STANDS and not stream["out_rate"]:
            add(True, "nothing ends", name, **waits)
        elif (stream["oldest"] or 0) >= WAITS:
            add(False, "waiting", name, **waits)
        if stream["timers_overdue"] and (stream["oldest"] or 0) >= WAITS:
            add(True, "timers overdue", name, count=stream["timers_overdue"], drill=drill)
        if stream["dead_more"] and not look.sees_all:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(stream["dead_by_reason"].items()))
            add(True, "dead letters", name, count=stream["dead_more"], detail=f"new ones; now {reasons}", drill=drill)
    for worker in look.workers:
        who, drill = f"worker {worker['worker_id']}", ("worker", str(worker["worker_id"]))
        where = f"{worker['host']}, pid {worker['pid']}"
        if worker["state"] == "silent":
            add(True, "silent worker", who, count=worker["holds"], age=worker["silent"], detail=where, drill=drill)
        elif not look.sees_all and (worker["oldest"] or 0) >= RUNS:
            add(False, "long running", who, count=worker["holds"], age=worker["oldest"], detail=where, drill=drill)
    for row in named:
        age = (now - row["since"]).total_seconds()
        if row["what"] == "running" and age >= RUNS:
            worker_drill = ("worker", str(row["worker_id"]))
            detail = f"worker {row['worker_id']}, {_of(row)}"
            add(False, "long running", row["stream"], age=age, detail=detail, drill=worker_drill)
        elif row["what"] == "task_failure":
            detail = f"{row['name']}: {last_line(row['failure'])}"
            add(True, "task fails", row["id"], age=age, detail=detail, drill=("run", str(row["run_id"])))
        elif row["what"] == "dead":
            numbers: Facts = next((s["dead_by_reason"] for s in look.streams if s["name"] == row["stream"]), {})
            what = "poison" if row["kind"] == "poison" else f"dead: {row['kind']}"
            count, stream_drill = numbers.get(row["kind"]), ("stream", row["stream"])
            add(True, what, row["stream"], count=count, age=age, detail=f"the latest: {_of(row)}", drill=stream_drill)
        elif row["what"] == "escalation":
            detail = f"{row['id']} on {row['stream']}"
            add(False, "waits for", row["name"], age=age, detail=detail, drill=("run", str(row["run_id"])))
    if not look.sees_all:
        for role in look.escalations:
            if role["waiting"]:
                add(False, "waits for", role["role"], count=role["waiting"], age=role["oldest"])
    opened = look.postgres.get("oldest_transaction_seconds") or 0
    if opened >= OPEN:
        add(False, "open transaction", "Postgres", age=opened, detail="what holds a transaction, bloats all tables")
    full = look.postgres.get("notification_queue_ratio") or 0
    if full >= FULL:
        add(
            True,
            "notifications",
            "Postgres",
            detail=f"their queue is {full:.0%} full: some session listens and never reads",
        )
    lines.sort(key=lambda line: (not line["bad"], -(line["for"] or 0)))
    return lines


def _of(row: Facts | None) -> str:
    if row is None:
        return ""
    failure = last_line(row["failure"])
    said = f", {failure}" if failure else ""
    return f"{row['name']} {row['id']}, attempt {row['attempt']}{said}"
