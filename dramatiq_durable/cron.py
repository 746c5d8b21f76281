"""Cron expressions in a time zone: what is wrong with one, and the times that it means.

Daylight saving is dealt with as Debian's cron does.  A time of the day that does not exist on a day (the clock is put
forward over it) comes as soon as the clock has been put forward; one that exists twice comes once, the first time.
Expressions whose minute or hour begins with ``*`` mean intervals: they go on through the change in real time.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

from .errors import InvalidSchedule

#: The fields of an expression, the first of which may be left out, and what they may be.
FIELDS = {
    "second": "0 to 59",
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day of month": "1 to 31, L (the last one), LW (the last from Monday to Friday)",
    "month": "1 to 12, or JAN to DEC",
    "day of week": "0 to 7 (0 and 7 are Sunday), or SUN to SAT; 1#2 is the second Monday of a month, 1L the last",
}

#: Nothing is asked for before this time, where times of zones are a matter of history.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Cron:
    """A cron expression in a time zone.

    Parameters:
      expression(str): minute, hour, day of month, month, day of week; six fields begin with the second.
      zone(str): a name of the IANA database, such as Europe/Berlin, or UTC.

    Raises:
      InvalidSchedule: the expression or the name is malformed, or there is no such time.
    """

    def __init__(self, expression: str, zone: str = "UTC") -> None:
        from cronsim import CronSim

        self.zone = find_zone(zone)
        fields = _split(expression)
        # Seconds are added here: they would take away the care for daylight saving, and a step for each of them.
        self._seconds = sorted(CronSim(f"{fields[0]} * * * *", EPOCH).minutes)
        self._minutes = " ".join(fields[1:])
        if next(self.after(EPOCH), None) is None:
            raise InvalidSchedule(f"the cron expression {expression!r} never comes: no month has such a day.")

    def after(self, at: datetime) -> Iterator[datetime]:
        """The due times that are later than a time, in order, in UTC; whole seconds."""
        from cronsim import CronSim, CronSimError

        at = max(at.astimezone(UTC), EPOCH)
        last = at
        try:
            minutes = CronSim(self._minutes, (at - timedelta(minutes=1)).astimezone(self.zone))
        except CronSimError:
            return
        for minute in minutes:
            # What was moved out of a gap may fall together with what stands there.
            first = minute.astimezone(UTC)
            for second in self._seconds:
                due = first + timedelta(seconds=second)
                if due > last:
                    yield due
                    last = due


def find_zone(name: str) -> tzinfo:
    """A time zone by its name.

    Raises:
      InvalidSchedule: there is none of this name.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, TypeError, OSError):
        raise InvalidSchedule(
            f"{name!r} is no time zone that is known here: give its name in the IANA database, such as 'Europe/Berlin' "
            "or 'UTC' (where the system has no time zones, `pip install tzdata` brings them)."
        ) from None


def _split(expression: str) -> list[str]:
    """The six fields of an expression.  Raises InvalidSchedule, which says where it is wrong."""
    from cronsim import CronSim

    right = (
        "a right one is '*/15 9-17 * * MON-FRI': minute, hour, day of month, month, day of week; a sixth field in "
        "front has the seconds."
    )
    if not isinstance(expression, str) or len(expression) > 1000:
        raise InvalidSchedule(f"a cron expression is a text of up to 1000 characters; {right}")
    fields = expression.split()
    if len(fields) not in (5, 6):
        raise InvalidSchedule(f"the cron expression {expression!r} has {len(fields)} fields, not 5 or 6; {right}")
    fields = ["0", *fields][-6:]
    for place, (name, range_) in enumerate(FIELDS.items()):
        # The second is written as a minute is.
        place = max(place - 1, 0)
        alone = ["*"] * 5
        value = alone[place] = fields[list(FIELDS).index(name)]
        try:
            CronSim(" ".join(alone), EPOCH)
        except Exception:  # whatever it stumbles over
            raise InvalidSchedule(
                f"in the cron expression {expression!r} the {name} {value!r} is wrong: it is {range_}, or a list "
                f"(1,2), a range (1-5), a step (*/5) or *; {right}"
            ) from None
    return fields
