"""What cron expressions mean, above all when the clocks change, and what is said of those that mean nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_durable.cron import Cron, find_zone
from dramatiq_durable.errors import InvalidSchedule
from dramatiq_durable.firing import MOST_BYTES, MOST_DUE, MOST_MISSED, due_times

BERLIN = "Europe/Berlin"


def local(expression: str, after: str, count: int, zone: str = BERLIN) -> list[str]:
    """The next due times, as they are read off the clock on the wall, with its offset."""
    times = Cron(expression, zone).after(datetime.fromisoformat(after))
    return [at.astimezone(find_zone(zone)).strftime("%m-%d %H:%M:%S%z")[:-2] for at in islice(times, count)]


def test_five_fields_and_six() -> None:
    assert local("*/20 6 * * MON-FRI", "2026-01-02T05:10Z", 4) == [
        "01-02 06:20:00+01",
        "01-02 06:40:00+01",
        "01-05 06:00:00+01",
        "01-05 06:20:00+01",
    ]
    assert local("15,45 0 12 * * *", "2026-01-02T11:00:15Z", 2, "UTC") == ["01-02 12:00:15+00", "01-02 12:00:45+00"]
    assert local("*/30 * * * * *", "2026-01-02T11:00:15.5Z", 2, "UTC") == ["01-02 11:00:30+00", "01-02 11:01:00+00"]


def test_a_due_time_is_later_than_the_one_before_it() -> None:
    assert local("0 6 * * *", "2026-01-02T06:00Z", 1, "UTC") == ["01-03 06:00:00+00"]
    assert local("0 6 * * *", "2026-01-02T05:59:59.999999Z", 1, "UTC") == ["01-02 06:00:00+00"]


@pytest.mark.parametrize(
    ("expression", "due"),
    [
        # 02:00 to 03:00 does not exist.  A time of the day comes when the clock has been put forward, once.
        ("30 2 * * *", ["03-28 02:30:00+01", "03-29 03:00:00+02", "03-30 02:30:00+02"]),
        ("0 2,3 * * *", ["03-28 02:00:00+01", "03-28 03:00:00+01", "03-29 03:00:00+02", "03-30 02:00:00+02"]),
        ("10 30 2 * * *", ["03-28 02:30:10+01", "03-29 03:00:10+02", "03-30 02:30:10+02"]),
        # An interval goes on in real time.
        ("0 */2 29 3 *", ["03-29 00:00:00+01", "03-29 04:00:00+02", "03-29 06:00:00+02"]),
        ("*/30 1-3 29 3 *", ["03-29 01:00:00+01", "03-29 01:30:00+01", "03-29 03:00:00+02", "03-29 03:30:00+02"]),
    ],
)
def test_the_clock_is_put_forward(expression: str, due: list[str]) -> None:
    assert local(expression, "2026-03-27T22:00Z", len(due)) == due


@pytest.mark.parametrize(
    ("expression", "due"),
    [
        # 02:00 to 03:00 exists twice.  A time of the day comes once, the first time.
        ("30 2 * * *", ["10-24 02:30:00+02", "10-25 02:30:00+02", "10-26 02:30:00+01"]),
        ("10 30 2 * * *", ["10-24 02:30:10+02", "10-25 02:30:10+02", "10-26 02:30:10+01"]),
        # An interval goes on in real time.
        ("0 * 25 10 *", [f"10-25 {hour}" for hour in ("00:00:00+02", "01:00:00+02", "02:00:00+02", "02:00:00+01")]),
        ("*/30 2 25 10 *", [f"10-25 {t}" for t in ("02:00:00+02", "02:30:00+02", "02:00:00+01", "02:30:00+01")]),
    ],
)
def test_the_clock_is_put_back(expression: str, due: list[str]) -> None:
    assert local(expression, "2026-10-23T22:00Z", len(due)) == due


@pytest.mark.parametrize("minutes", range(-70, 130, 10))
@pytest.mark.parametrize("change", ["2026-03-29T01:00Z", "2026-10-25T01:00Z"])
@pytest.mark.parametrize("expression", ["30 2 * * *", "0 2,3 * * *", "*/15 * * * *", "0 0 * * *"])
def test_wherever_one_begins_the_times_are_the_same(expression: str, change: str, minutes: int) -> None:
    """A worker goes on from the last due time, wherever that was: none is repeated or left out."""
    cron = Cron(expression, BERLIN)
    middle = datetime.fromisoformat(change)
    begin, end = middle - timedelta(days=2), middle + timedelta(days=2)
    every = [at for at in islice(cron.after(begin), 1000) if at <= end]
    at = middle + timedelta(minutes=minutes)
    assert [t for t in islice(cron.after(at), 1000) if t <= end] == [t for t in every if t > at]


@given(
    st.sampled_from(
        ["* * * * *", "*/7 * * * *", "30 2 * * *", "0 0,12 1 * *", "59 23 L * *", "5 */6 * * 1#2", "0 3 * 3 SUN"]
    ),
    st.sampled_from(["UTC", BERLIN, "America/New_York", "Africa/Cairo", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC)),
)
def test_times_grow_and_each_leads_to_the_next(expression: str, zone: str, at: datetime) -> None:
    cron = Cron(expression, zone)
    times = [*islice(cron.after(at), 8)]
    assert len(times) == 8
    for before, after in zip([at, *times], times, strict=False):
        assert before < after
        assert next(cron.after(before)) == after
        assert (after.second, after.microsecond) == (0, 0)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("61 * * * *", "the minute '61' is wrong: it is 0 to 59"),
        ("* 24 * * *", "the hour '24' is wrong"),
        ("* * 0 * *", "the day of month '0' is wrong"),
        ("* * * 13 *", "the month '13' is wrong"),
        ("* * * * MOO", "the day of week 'MOO' is wrong"),
        ("* * * * MON#1/2", "the day of week 'MON#1/2' is wrong"),
        ("* * * * 1,MON#2/2", "the day of week"),
        ("60 * * * * *", "the second '60' is wrong"),
        ("5-1 * * * *", "the minute '5-1' is wrong"),
        ("*/0 * * * *", "the minute '\\*/0' is wrong"),
        ("@daily", "has 1 fields, not 5 or 6; a right one is"),
        ("", "has 0 fields"),
        ("* * * * * * *", "has 7 fields"),
        ("0 0 30 2 *", "never comes"),
        ("0 " * 600, "up to 1000 characters"),
        (None, "up to 1000 characters"),
    ],
)
def test_what_is_wrong_is_said(expression: str, said: str) -> None:
    with pytest.raises(InvalidSchedule, match=said):
        Cron(expression)


@pytest.mark.parametrize("zone", ["Nowhere", "Europe", "../etc/passwd", "", None, 3])
def test_a_time_zone_that_is_none(zone: str) -> None:
    with pytest.raises(InvalidSchedule, match="is no time zone that is known here: give its name"):
        Cron("* * * * *", zone)


# --- what is due ------------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOUR = 3_600_000


def test_nothing_is_due() -> None:
    assert due_times(Cron("0 13 * * *"), NOW, NOW, HOUR, 0) == (0, [], NOW, NOW + timedelta(hours=1))


def test_what_came_in_the_meantime_is_due() -> None:
    seen = NOW - timedelta(minutes=25)
    assert due_times(Cron("*/10 * * * *"), seen, NOW, HOUR, 0) == (
        0,
        [NOW - timedelta(minutes=20), NOW - timedelta(minutes=10), NOW],
        NOW,
        NOW + timedelta(minutes=10),
    )


def test_what_is_too_old_is_missed() -> None:
    seen = NOW - timedelta(minutes=25)
    missed, due, *_ = due_times(Cron("*/10 * * * *"), seen, NOW, 10 * 60_000, 0)
    assert (missed, due) == (1, [NOW - timedelta(minutes=10), NOW]), "what is just as old as that is caught up"


def test_no_more_is_due_than_can_be_fired_at_once() -> None:
    seen = NOW - timedelta(minutes=10)
    cron = Cron("* * * * * *")
    fired: list[datetime] = []
    steps = 0
    while seen < NOW:
        missed, due, seen, next_due = due_times(cron, seen, NOW, HOUR, 0)
        assert missed == 0
        assert len(due) <= MOST_DUE
        assert next_due == (due[-1] if due else NOW) + timedelta(seconds=1)
        fired += due
        steps += 1
    assert fired == [NOW - timedelta(seconds=n) for n in reversed(range(600))]
    assert steps == 600 // MOST_DUE
    _, due, *_ = due_times(cron, NOW - timedelta(minutes=10), NOW, HOUR, MOST_BYTES)
    assert len(due) == 1, "large messages"


def test_a_long_time_without_workers() -> None:
    missed, due, *_ = due_times(Cron("* * * * * *"), NOW - timedelta(days=3000), NOW, 10_000, 0)
    assert missed == MOST_MISSED
    assert due == [NOW - timedelta(seconds=n) for n in reversed(range(11))]
