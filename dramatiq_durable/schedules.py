"""Schedules: actors and workflows that run at the times of a cron expression.

``durable.schedules.create("report", cron="0 6 * * MON-FRI", target=send_report, timezone="Europe/Berlin")``

Any worker that consumes the target's stream fires it; each due time is fired once, however many there are and whenever
they die.  Every function has a twin that is awaited: ``acreate``, ``apause``, ...  Names belong to the login's
principal; administrators share theirs.
"""

from __future__ import annotations

import builtins
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any, Literal, NamedTuple

import dramatiq
from dramatiq import Actor, Message

from .broker import DurableBroker
from .cron import Cron
from .delivery import encode_message
from .durations import Duration, parse_duration
from .errors import InvalidName, InvalidSchedule, ScheduleNotFound
from .firing import MOST_BYTES, Maker, to_ms
from .operations import ControlSchedule, Due, FireByHand, SaveSchedule
from .outgoing import operation_of
from .telemetry import with_trace
from .twins import twin
from .workflow.activities import Activity, ActivityStub
from .workflow.client import durable_broker
from .workflow.converter import encode_call
from .workflow.definition import Workflow, global_broker
from .workflow.handle import outside_of_workflows
from .workflow.options import Dispatch, WorkflowOptions, check_call, check_name

Overlap = Literal["skip", "buffer_one", "allow"]
IfExists = Literal["fail", "update", "keep"]
Target = Actor[Any, Any] | ActivityStub | Workflow[Any, Any]

#: A schedule's name is part of its runs' workflow ids.
MAX_NAME = 150

#: A due time is always met a little late.
LEAST_CATCH_UP = 10_000

#: The most due times of a backfill, and of one of its transactions.
MOST_BACKFILLED = 10_000
CHUNK = 500

_NEXT = 5


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule.  Times are in UTC.

    Attributes:
      name(str), cron(str), timezone(str), overlap(str), paused(bool): as they were given.
      catch_up(timedelta): how late a due time may be fired.
      target(str), kind(str), queue_name(str): what it fires: the name of an "actor" or a "workflow", and its stream.
      next_due(list): the next five due times; none while it is paused.
      last_due(datetime | None): the due time that was fired last.
      last_id(str | None): what it became: a message id or a run id.
      fired(int): how often it was fired, by hand and backfills included.
      skipped(int): due times that the overlap policy left out.
      missed(int): due times that were found too late; after a long time without workers, only 10,000 are counted.
      live(list): what it has fired last and has not ended; ids of messages or runs.
      waiting(datetime | None): the due time that waits for the end of that (``buffer_one``).
      failure(str | None): why it could not be fired when it was tried last, or why it was paused without being asked.
      created_at(datetime)
      workers(int): how many live workers consume its stream; without any, nothing is fired.
    """

    name: str
    cron: str
    timezone: str
    catch_up: timedelta
    overlap: str
    paused: bool
    target: str
    kind: str
    queue_name: str
    next_due: builtins.list[datetime]
    last_due: datetime | None
    last_id: str | None
    fired: int
    skipped: int
    missed: int
    live: builtins.list[str]
    waiting: datetime | None
    failure: str | None
    created_at: datetime
    workers: int


class Fires(NamedTuple):
    """What a schedule fires.  ``template`` is an encoded message ('m'), or the input of runs ('s')."""

    kind: Literal["m", "s"]
    queue_name: str
    actor: str
    priority: int
    template: bytes
    facts: str | None = None


def create(
    name: str,
    *,
    cron: str,
    target: Target,
    args: builtins.list[Any] | tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    timezone: str = "UTC",
    catch_up: Duration = "1h",
    overlap: Overlap = "skip",
    paused: bool = False,
    if_exists: IfExists = "fail",
    broker: dramatiq.Broker | None = None,
) -> None:
    """Make a schedule; when this returns, it is committed.  Its first due time is the first one from now on.

    Every message has the schedule's name and the due time (ISO 8601, UTC) in its options ``schedule`` and
    ``schedule_due``; a run's workflow id is ``{name}:{due time}``.  Middleware is not asked before they are sent.

    Parameters:
      name(str): 1 to 150 characters.
      cron(str): minute, hour, day of month, month, day of week; a sixth field in front has the seconds.  What becomes
        of it when the clocks change: see `dramatiq_durable.cron`.
      target: an actor, an activity, an ``activity_stub`` or a workflow, with options if it has any.
      args, kwargs: what it is called with.
      timezone(str): in which the expression is meant: a name of the IANA database.
      catch_up: how late a due time may be fired (when no worker ran, or the stream was paused); what is older is
        dropped and counted as missed.  Seconds, a timedelta or text; at least 10 seconds.
      overlap(str): what to do while that which the schedule fired last has not ended (its message is there, retries
        included; its run is running): "skip" the due time; "buffer_one": one due time waits and is fired within a
        second of the end, others are skipped; "allow" both.
      paused(bool): do not begin yet.
      if_exists(str): "fail"; "update": change what is different, and keep its counts and whether it is paused;
        "keep" what is there.

    Raises:
      ScheduleExists: there is one of this name, and ``if_exists`` is "fail".
      InvalidSchedule: the expression, the time zone or another option makes no sense.
      InvalidName: the name is empty or too long.
      TypeError: the target is none, or does not take these arguments.
      NotEncodable, PayloadTooLarge: an argument cannot be carried.
      NotPermitted: the login may not send to the target's stream.
      DatabaseUnavailable: the database cannot be reached.
    """
    if broker is None:
        broker = getattr(target, "broker", None)
    chosen = _broker(broker)
    fires = fires_of(chosen, target, args, kwargs)
    save(chosen, name, fires, cron, timezone, catch_up, overlap, paused, if_exists)


def pause(name: str, *, broker: dramatiq.Broker | None = None) -> None:
    """Fire nothing more until ``resume``; what was fired goes on, what waits for its end (``buffer_one``) is skipped.

    Raises:
      ScheduleNotFound: there is none of this name.
    """
    _broker(broker).commit.submit(ControlSchedule(name, "pause"))


def resume(name: str, *, broker: dramatiq.Broker | None = None) -> None:
    """Go on with the next due time; those that passed while it was paused are not caught up: `backfill` is for them.

    Raises:
      ScheduleNotFound: there is none of this name.
    """
    _broker(broker).commit.submit(ControlSchedule(name, "resume"))


def delete(name: str, *, broker: dramatiq.Broker | None = None) -> None:
    """Forget a schedule; what it fired goes on.

    Raises:
      ScheduleNotFound: there is none of this name.
    """
    _broker(broker).commit.submit(ControlSchedule(name, "delete"))


def trigger(name: str, *, broker: dramatiq.Broker | None = None) -> str:
    """Fire a schedule now, once, whatever runs already, and also while it is paused.

    Later due times find what this has fired, as the overlap policy says.

    Returns:
      str: the id of the message; or of the run, whose workflow id is ``{name}:{run id}``.

    Raises:
      ScheduleNotFound: there is none of this name.
      NotPermitted: the login may not send to its stream.
    """
    chosen = _broker(broker)
    row = _one(chosen, name)
    due = _maker(row).for_now()
    chosen.commit.submit(FireByHand(name, row.revision, [due], chosen.stream_id(row.queue_name)))
    return str(uuid.UUID(bytes=due.id))


def backfill(
    name: str, start: datetime, end: datetime, *, broker: dramatiq.Broker | None = None
) -> builtins.list[datetime]:
    """Fire a schedule for the due times of the past from ``start`` to ``end``, both included, all at once.

    They are fired whether they were before or not, but for one that is still live; other due times neither wait for
    them nor are skipped because of them.  Those that the schedule has still to deal with by itself are left to it.
    When this raises, some may have been fired.

    Parameters:
      start(datetime), end(datetime): with a time zone.

    Returns:
      list[datetime]: the due times that were fired, in UTC.

    Raises:
      ScheduleNotFound: there is none of this name.
      ValueError: a time has no time zone, they are the wrong way round, or there are more than 10,000 due times.
      NotPermitted: the login may not send to its stream.
    """
    for what, at in (("start", start), ("end", end)):
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise ValueError(
                f"{what} is a datetime with a time zone, such as datetime(2026, 1, 31, tzinfo=UTC), not {at!r}"
            )
    if start > end:
        raise ValueError(f"start ({start}) is later than end ({end})")
    chosen = _broker(broker)
    row = _one(chosen, name)
    end = min(end, row.now if row.paused else row.seen_to)
    after = max(start, datetime(1970, 1, 2, tzinfo=UTC)) - timedelta(microseconds=1)
    times = takewhile(lambda at: at <= end, Cron(row.cron, row.timezone).after(after))
    due = [*islice(times, MOST_BACKFILLED + 1)]
    if len(due) > MOST_BACKFILLED:
        raise ValueError(
            f"from {start} to {end} the schedule {name!r} has more than {MOST_BACKFILLED:,} due times: "
            "backfill shorter intervals"
        )
    maker = _maker(row)
    size = max(1, min(CHUNK, MOST_BYTES // (len(row.template) + 1000)))
    stream_id = chosen.stream_id(row.queue_name)
    fired: builtins.list[datetime] = []
    for first in range(0, len(due), size):
        chunk = due[first : first + size]
        made: builtins.list[Due] = [maker.for_due(at) for at in chunk]
        answers = chosen.commit.submit(FireByHand(name, row.revision, made, stream_id))
        fired += [at for at, new in zip(chunk, answers, strict=True) if new]
    return fired


def describe(name: str, *, broker: dramatiq.Broker | None = None) -> Schedule:
    """How a schedule stands.

    Raises:
      ScheduleNotFound: there is none of this name.
    """
    return _public(_one(_broker(broker), name))


def list(*, broker: dramatiq.Broker | None = None) -> builtins.list[Schedule]:
    """All schedules of the login's principal, by name."""
    return [_public(row) for row in _rows(_broker(broker), None)]


acreate = twin(create)
apause = twin(pause)
aresume = twin(resume)
adelete = twin(delete)
atrigger = twin(trigger)
abackfill = twin(backfill)
adescribe = twin(describe)
alist = twin(list)


# --- definitions ------------------------------------------------------------------------------------------


def save(
    broker: DurableBroker,
    name: str,
    fires: Fires,
    cron: str,
    timezone: str,
    catch_up: Duration,
    overlap: str,
    paused: bool,
    if_exists: str,
) -> None:
    """Check a schedule's definition and store it; raises as `create`."""
    check_name(name, "a schedule's name")
    if len(name) > MAX_NAME:
        raise InvalidName(f"a schedule's name is 1 to {MAX_NAME} characters of text, not {len(name)}: {name[:60]!r}...")
    Cron(cron, timezone)
    try:
        late = parse_duration(catch_up)
    except ValueError as e:
        raise InvalidSchedule(f"catch_up: {e}") from None
    if late < LEAST_CATCH_UP:
        raise InvalidSchedule(
            f"catch_up is at least 10 seconds, not {catch_up!r}: a due time is always met a little late"
        )
    for what, value, allowed in (
        ("overlap", overlap, ("skip", "buffer_one", "allow")),
        ("if_exists", if_exists, ("fail", "update", "keep")),
        ("paused", paused, (True, False)),
    ):
        if value not in allowed:
            raise InvalidSchedule(f"{what} is one of {', '.join(map(repr, allowed))}, not {value!r}.")
    broker.commit.submit(
        SaveSchedule(
            name,
            if_exists,
            bool(paused),
            broker.stream_id(fires.queue_name),
            fires.kind,
            fires.actor,
            fires.priority,
            fires.template,
            fires.facts,
            cron,
            timezone,
            late,
            overlap,
        )
    )


def fires_of(broker: DurableBroker, target: Any, args: Any, kwargs: Any) -> Fires:
    if not isinstance(args, (builtins.list, tuple)):
        raise TypeError(f"args is a list or a tuple, not {args!r}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs is a dict, not {kwargs!r}")
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(target, Workflow):
        return _runs(broker, target, args, kwargs)
    dispatch: Dispatch | None
    if isinstance(target, ActivityStub):
        dispatch = target._dispatch
        message: Message[Any] = Message(dispatch.queue_name, target.actor_name, args, kwargs, dict(dispatch.message))
    elif isinstance(target, Actor):
        dispatch = target._dispatch if isinstance(target, Activity) else None
        check_call(target.fn, target.actor_name, args, kwargs)
        message = target.message_with_options(args=args, kwargs=kwargs)
    else:
        raise TypeError(
            f"a schedule's target is an actor, an activity, a workflow or an activity_stub(name, queue_name=...), "
            f"not {target!r}"
        )
    if dispatch is not None and dispatch.delay_ms:
        raise InvalidSchedule("the target has a delay: a schedule's messages are sent at its due times, leave it out")
    if (spans := broker.telemetry.spans()) is not None:
        message = message.copy(options=spans.carrier_of())
    # The same definition has the same bytes: each message gets an id and a time of its own.
    message = message.copy(message_id=str(uuid.UUID(int=0)), message_timestamp=0)
    operation = operation_of(broker, message)
    return Fires("m", message.queue_name, operation.actor, operation.priority, encode_message(message))


def _runs(broker: DurableBroker, workflow: Workflow[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fires:
    check_call(workflow.fn, workflow.name, args, kwargs)
    options, plain = workflow.defaults, WorkflowOptions()
    for option in ("workflow_id", "id_conflict", "id_reuse", "delay_ms"):
        if getattr(options, option) != getattr(plain, option):
            raise InvalidSchedule(
                f"the target has the option {option.removesuffix('_ms')!r}: a schedule's runs are started at its due "
                "times, with workflow ids that are made of its name and the due time; leave it out"
            )
    template = broker.codecs.encode(encode_call(args, kwargs, workflow.fn, workflow.name))
    spans = broker.telemetry.spans()
    facts = with_trace(options.facts(), {} if spans is None else spans.carrier_of())
    return Fires("s", workflow.queue_name, workflow.name, 0, template, broker.codecs.seal_json(facts))


# --- what is stored ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of list_schedules()."""

    schedule_id: bytes
    name: str
    revision: int
    kind: str
    actor: str
    queue_name: str
    template: bytes
    cron: str
    timezone: str
    catch_up: int
    overlap: str
    paused: bool
    failure: str | None
    created_at: datetime
    seen_to: datetime
    waiting: datetime | None
    live: builtins.list[bytes]
    fired: int
    skipped: int
    missed: int
    last_due: datetime | None
    last_id: bytes | None
    now: datetime
    workers: int


def _rows(broker: DurableBroker, name: str | None) -> builtins.list[Row]:
    with broker.database.calling() as conn:
        return [Row(*row) for row in broker.procedures.list_schedules(conn, name)]


def _one(broker: DurableBroker, name: str) -> Row:
    for row in _rows(broker, check_name(name, "a schedule's name")):
        return row
    raise ScheduleNotFound(f"there is no schedule {name!r}: schedules.list() has the names")


def _maker(row: Row) -> Maker:
    return Maker(uuid.UUID(bytes=row.schedule_id), row.name, row.kind, row.template, to_ms(row.now))


def _public(row: Row) -> Schedule:
    catch_up = timedelta(milliseconds=row.catch_up)
    due: builtins.list[datetime] = []
    failure = row.failure
    if not row.paused:
        try:
            due = [*islice(Cron(row.cron, row.timezone).after(max(row.seen_to, row.now - catch_up)), _NEXT)]
        except InvalidSchedule as e:
            # A time zone that only this machine does not know: the others are shown all the same.
            failure = failure or str(e)
    return Schedule(
        name=row.name,
        cron=row.cron,
        timezone=row.timezone,
        catch_up=catch_up,
        overlap=row.overlap,
        paused=row.paused,
        target=row.actor,
        kind="actor" if row.kind == "m" else "workflow",
        queue_name=row.queue_name,
        next_due=due,
        last_due=_utc(row.last_due),
        last_id=None if row.last_id is None else str(uuid.UUID(bytes=row.last_id)),
        fired=row.fired,
        skipped=row.skipped,
        missed=row.missed,
        live=[str(uuid.UUID(bytes=id)) for id in row.live],
        waiting=_utc(row.waiting),
        failure=failure,
        created_at=row.created_at.astimezone(UTC),
        workers=row.workers,
    )


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.astimezone(UTC)


def _broker(broker: dramatiq.Broker | None) -> DurableBroker:
    outside_of_workflows("use schedules")
    return durable_broker(broker if broker is not None else global_broker())
