"""``dramatiq-durable schedule``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
import pytest
from click.testing import CliRunner, Result

import dramatiq_durable as durable
from dramatiq_durable import schedules
from dramatiq_durable.cli import main
from tests.broker.conftest import Record, Rows
from tests.support import wait_until

Run = Callable[..., str]

ACTOR = ("--actor", "report", "--queue", "default")


@pytest.fixture
def attempt(database_url: str) -> Callable[..., Result]:
    def attempt(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["--url", database_url, "schedule", *arguments], catch_exceptions=False)

    return attempt


@pytest.fixture
def run(attempt: Callable[..., Result]) -> Run:
    """Run a command that has to succeed."""

    def run(*arguments: str) -> str:
        done = attempt(*arguments)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_a_schedules_life(run: Run, broker: durable.DurableBroker) -> None:
    assert run("list") == "there are no schedules\n"
    created = run(
        *("create", "morning", "--cron", "0 6 * * MON-FRI", "--timezone", "Europe/Berlin", "--overlap", "buffer_one"),
        *("--catch-up", "90 minutes", "--args", '["a", 1]', "--kwargs", '{"b": null}', *ACTOR),
    )
    assert created == "the schedule morning is there\n"
    run("create", "nightly", "--cron", "0 0 * * *", "--workflow", "order", "--queue", "orders", "--paused")

    morning, nightly = json.loads(run("list", "--json"))
    assert (morning["name"], morning["catch_up"], morning["overlap"]) == ("morning", 5400, "buffer_one")
    assert [datetime.fromisoformat(at).weekday() < 5 for at in morning["next_due"]] == [True] * 5
    assert (nightly["kind"], nightly["target"], nightly["paused"], nightly["next_due"]) == (
        "workflow",
        "order",
        True,
        [],
    )
    table = run("list")
    assert "0 6 * * MON-FRI" in table
    assert "paused" in table

    assert json.loads(run("show", "morning", "--json")) == morning
    assert "Europe/Berlin" in run("show", "morning")

    assert run("pause", "morning") == "paused morning\n"
    assert json.loads(run("show", "morning", "--json"))["paused"] is True
    assert run("resume", "morning") == "resumed morning\n"

    fired = json.loads(run("trigger", "nightly", "--json"))
    assert json.loads(run("show", "nightly", "--json"))["live"] == [fired["id"]]
    assert run("trigger", "morning").startswith("fired morning: ")

    past = run("backfill", "nightly", "2026-01-01T00:00Z", "2026-01-03T00:00+00:00", "--json")
    assert json.loads(past)["fired"] == [f"2026-01-0{n}T00:00:00+00:00" for n in (1, 2, 3)]
    assert run("backfill", "nightly", "2026-01-03T00:00Z", "2026-01-04T00:00Z") == (
        "fired nightly for 1 due times, 2026-01-04T00:00:00Z to 2026-01-04T00:00:00Z\n"
    )

    assert run("delete", "morning") == "deleted morning\n"
    assert [s.name for s in schedules.list(broker=broker)] == ["nightly"]


def test_what_it_made_runs(
    run: Run, broker: durable.DurableBroker, start_worker: Callable[..., Any], rows: Rows
) -> None:
    record = Record()

    @dramatiq.actor(broker=broker)
    def report(*args: Any, **kwargs: Any) -> None:
        record((args, kwargs))

    @durable.workflow(broker=broker)
    async def order(name: str) -> None:
        record(name)

    run("create", "r", "--cron", "* * * * * *", "--args", "[1]", "--kwargs", '{"b": 2}', *ACTOR)
    run("create", "o", "--cron", "* * * * * *", "--args", '["x"]', "--workflow", "order", "--queue", "default")
    start_worker(broker)
    record.wait(4)
    assert ((1,), {"b": 2}) in record.values
    assert "x" in record.values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "s", "--cron", "* * * * *", "--queue", "q"), "either --actor NAME or --workflow NAME"),
        (("create", "s", "--cron", "* * * *", *ACTOR), "has 4 fields, not 5 or 6"),
        (("create", "s", "--cron", "* * * * *", "--timezone", "Bonn", *ACTOR), "no time zone"),
        (("create", "s", "--cron", "* * * * *", "--args", "{}", *ACTOR), "--args is a list in JSON"),
        (("create", "s", "--cron", "* * * * *", "--kwargs", "[]", *ACTOR), "--kwargs is an object in JSON"),
        (("create", "s", "--cron", "* * * * *", "--catch-up", "soon", *ACTOR), "catch_up: 'soon' is not a duration"),
        (("create", "there", "--cron", "* * * * *", *ACTOR), "there is a schedule 'there' already"),
        (("show", "s"), "there is no schedule 's'"),
        (("pause", "s"), "there is no schedule 's'"),
        (("trigger", "s"), "there is no schedule 's'"),
        (("delete", "s"), "there is no schedule 's'"),
        (("backfill", "there", "yesterday", "2026-01-01T00:00Z"), "START is a time such as 2026-01-31T00:00Z"),
        (("backfill", "there", "2026-01-01T00:00", "2026-01-02T00:00Z"), "START is a time such as 2026-01-31T00:00Z"),
    ],
)
def test_mistakes(run: Run, attempt: Callable[..., Result], arguments: tuple[str, ...], said: str) -> None:
    run("create", "there", "--cron", "0 0 1 1 *", *ACTOR)
    done = attempt(*arguments)
    assert done.exit_code in (1, 2)
    assert said in " ".join(done.output.split())


def test_a_due_time_that_nobody_fired_is_called_late(run: Run) -> None:
    run("create", "s", "--cron", "* * * * * *", *ACTOR)
    run("create", "far", "--cron", "0 0 1 1 *", "--timezone", "Europe/Berlin", *ACTOR)
    wait_until(lambda: "s late, no live worker)" in run("show", "s"), message="it is late")
    assert "late" in run("list")
    assert re.search(r"next due +\d{4}-\d\d-\d\d \d\d:\d\d:00 \S+", run("show", "far")), "with its zone"


def test_it_says_whether_anybody_works_for_it(
    run: Run, broker: durable.DurableBroker, start_worker: Callable[..., Any], rows: Rows
) -> None:
    run("create", "s", "--cron", "0 0 1 1 *", *ACTOR)
    assert "(no live worker)" in run("list")
    assert schedules.describe("s", broker=broker).workers == 0

    @dramatiq.actor(broker=broker)
    def report() -> None: ...

    start_worker(broker)
    wait_until(lambda: schedules.describe("s", broker=broker).workers == 1)
    assert "no live worker" not in run("list") + run("show", "s")
    [known] = json.loads(run("list", "--json"))
    assert known["workers"] == 1
    # The worker beats no more.
    rows("UPDATE durable.worker SET reclaim_delay = '0', beat_at = '2000-01-01'")
    assert "(no live worker)" in run("show", "s")


def test_what_failed_is_shown(run: Run, rows: Rows) -> None:
    run("create", "s", "--cron", "0 0 1 1 *", *ACTOR)
    assert "failure" not in run("list")
    rows("UPDATE durable.schedule SET failure = 'because'")
    assert "because" in run("list")


def test_it_comes_with_the_last_due_time(run: Run, rows: Rows) -> None:
    run("create", "s", "--cron", "0 0 1 1 *", *ACTOR)
    at = datetime.now(UTC) - timedelta(hours=1)
    rows("UPDATE durable.schedule SET last_due = %s", at)
    assert datetime.fromisoformat(json.loads(run("show", "s", "--json"))["last_due"]) == at
