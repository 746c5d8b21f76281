"""Runs by what they are: listed in pages, counted, and told something all at once.

The language of ``where`` is explained in `filters`.  A login that is no administrator sees the runs of the streams that
it has a grant for.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, overload

import dramatiq

from ..codecs import Codecs, ShownCodecs
from ..errors import InvalidFilter, WorkflowClosed, WorkflowNotFound
from ..operations import Operation, Post, Terminate
from ..procedures import from_json
from ..using import sending
from .attributes import search_values
from .client import durable_broker
from .converter import encode, loads
from .definition import global_broker
from .filters import TICK, All, Comparison, Condition, Field, compiled, parse
from .handle import WorkflowHandle, check_event, check_reason, outside_of_workflows
from .info import Parent
from .options import check_name

if TYPE_CHECKING:
    from ..broker import DurableBroker

ORDERS = ("started_at", "-started_at", "closed_at", "-closed_at")

MAX_LIMIT = 10_000
"""How many runs a page may have."""

#: How many runs a batch tells something in one transaction.
CHUNK = 500


@dataclass(frozen=True, slots=True)
class WorkflowSummary:
    """A run, as it stands in a list.

    Attributes:
      parent(Parent | None): the run that started it as its child.
      search(dict), entity(dict): what others find it by.
      history_length(int): events so far.
      task_failure(str | None): why its last workflow task failed.
    """

    workflow_id: str
    run_id: str
    name: str
    queue_name: str
    status: str
    started_at: datetime
    closed_at: datetime | None
    parent: Parent | None
    memo: dict[str, Any]
    search: dict[str, Any]
    entity: dict[str, Any]
    history_length: int
    task_failure: str | None


class WorkflowList(list[WorkflowSummary]):
    """A page of runs.

    Attributes:
      next(str | None): what to pass as ``after`` to get the next page; None where there is none.
    """

    next: str | None = None


def list_workflows(
    where: str | None = None,
    order: str = "-started_at",
    limit: int = 100,
    after: str | None = None,
    *,
    broker: dramatiq.Broker | None = None,
) -> WorkflowList:
    """A page of the runs that meet a condition.

    Parameters:
      where(str | None): the condition; None lists all.
      order(str): started_at or closed_at, with a minus in front for the latest first.  What has not ended comes, by
        closed_at, as if it ended last.
      limit(int): the most runs of a page, 10,000 at the most.
      after(str | None): ``next`` of the page before, of the same condition and order.

    Guarantee: pages are stable: no run that is there all the time is left out or comes twice, whatever is started or
    ends meanwhile (by closed_at: what ends meanwhile may).

    Raises:
      InvalidFilter: the condition makes no sense; the message shows where.
      ValueError: the order, the limit or the cursor makes no sense.
      NotPermitted: the login has no grants.
      DatabaseUnavailable: the database cannot be reached.
    """
    if order not in ORDERS:
        raise ValueError(f"order is one of {', '.join(ORDERS)}, not {order!r:.60}")
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is a whole number from 1 to {MAX_LIMIT:,}, not {limit!r:.60}")
    condition = None if where is None else parse(where)
    return _page(_broker(broker), condition, order, limit, after)


@overload
def count_workflows(
    where: str | None = None, group_by: None = None, *, broker: dramatiq.Broker | None = None
) -> int: ...
@overload
def count_workflows(
    where: str | None = None, *, group_by: str, broker: dramatiq.Broker | None = None
) -> dict[Any, int]: ...
@overload
def count_workflows(where: str | None, group_by: str, *, broker: dramatiq.Broker | None = None) -> dict[Any, int]: ...


def count_workflows(
    where: str | None = None, group_by: str | None = None, *, broker: dramatiq.Broker | None = None
) -> int | dict[Any, int]:
    """How many runs meet a condition.

    Parameters:
      where(str | None): the condition; None counts all.
      group_by(str | None): status, name, queue_name, search.NAME or entity.PATH.

    Returns:
      int; with ``group_by`` a dict of values and how many runs have each (None: those that have nothing there; a list
      of plain values is a tuple, any other structure its JSON text).

    Raises:
      as `list_workflows`.
    """
    condition = None if where is None else parse(where)
    group, path = (None, None) if group_by is None else _group(group_by)
    chosen = _broker(broker)
    filter = json.dumps(compiled(condition))
    rows = _read(chosen, lambda conn: chosen.procedures.count_workflows(conn, filter, group, path))
    if group_by is None:
        return int(sum(runs for _, runs in rows))
    counts: dict[Any, int] = {}
    for value, runs in rows:
        # Nothing there and null are one, and so are 1 and true, as ever in Python.
        key = _key(value)
        counts[key] = counts.get(key, 0) + runs
    return counts


def _group(group_by: str) -> tuple[str, list[str] | None]:
    if group_by in ("status", "name", "queue_name"):
        return group_by, None
    try:
        condition = parse(f"{group_by} = null")
    except InvalidFilter:
        condition = None
    if not isinstance(condition, Comparison) or condition.field.root not in ("search", "entity"):
        raise ValueError(
            f"group_by is one of status, name, queue_name, search.NAME and entity.PATH, not {group_by!r:.60}"
        )
    return condition.field.root, list(condition.field.path)


def _key(value: str | None) -> Any:
    if value is None:
        return None
    key = search_values({"": json.loads(value)}).get("")
    if isinstance(key, list) and not any(isinstance(item, (list, dict)) for item in key):
        return tuple(key)
    return value if isinstance(key, (list, dict)) else key


# --- telling many runs something -------------------------------------------------------------------------
def batch_signal(where: str, name: str, payload: Any = None, *, broker: dramatiq.Broker | None = None) -> int:
    """Send a signal to every running run that meets a condition.

    It goes to those that were started before the call; what ends meanwhile is left out.  Each part of a batch commits
    by itself: when this raises, some runs may have been told.

    Returns:
      int: how many it was sent to.

    Raises:
      InvalidFilter: the condition is missing or makes no sense.
      NotEncodable, PayloadTooLarge, InvalidName: the signal cannot be carried.
      NotPermitted, DatabaseUnavailable: as `list_workflows`.
    """
    check_name(name, "a signal's name")
    what = f"the payload of the signal {name!r}"
    data = None if payload is None else _broker(broker).codecs.encode(encode(payload, what), what)
    with _telling(broker, "signal", name) as trace:
        return _tell(broker, where, lambda run: Post(run, None, "SignalReceived", name, data, str(uuid.uuid4()), trace))


def batch_cancel(where: str, *, broker: dramatiq.Broker | None = None) -> int:
    """Ask every running run that meets a condition to cancel itself; otherwise as `batch_signal`."""
    with _telling(broker, "cancel", None) as trace:
        return _tell(
            broker, where, lambda run: Post(run, None, "CancelRequested", None, None, str(uuid.uuid4()), trace)
        )


def batch_terminate(where: str, reason: str | None = None, *, broker: dramatiq.Broker | None = None) -> int:
    """End every running run that meets a condition, without a word to its code; otherwise as `batch_signal`."""
    check_reason(reason)
    said = _broker(broker).codecs.encode_text(reason)
    return _tell(broker, where, lambda run: Terminate(run, None, said))


def batch_reset(where: str, to_event: int, *, broker: dramatiq.Broker | None = None) -> int:
    """Take every run that meets a condition up again at an event, closed ones too: see ``WorkflowHandle.reset``.

    Of each workflow id only the latest run; one that has no such event is left out.  Otherwise as `batch_signal`, but
    each by itself.

    Returns:
      int: how many were taken up again.
    """
    condition = _wanted(where)
    chosen = _broker(broker)
    check_event(to_event)
    done = 0
    for runs in _pages(chosen, condition, latest=True):
        for run in runs:
            with suppress(WorkflowNotFound, ValueError):
                WorkflowHandle(chosen, run.workflow_id, run.run_id).reset(to_event)
                done += 1
    return done


@contextmanager
def _telling(broker: dramatiq.Broker | None, what: str, name: str | None) -> Iterator[str | None]:
    """Around a batch: one span for all that it tells.  Gives what of it travels with each."""
    spans = _broker(broker).telemetry.spans()
    if spans is None:
        yield None
        return
    with spans.telling(what, name, None) as carrier:
        yield carrier.get("traceparent")


def _tell(broker: dramatiq.Broker | None, where: str, make: Callable[[bytes], Operation]) -> int:
    condition = _wanted(where)
    chosen = _broker(broker)
    told = 0
    for runs in _pages(chosen, All((condition, Comparison(Field("status"), "=", "running")))):
        operations = [make(uuid.UUID(run.run_id).bytes) for run in runs]
        chosen.commit.submit_many(operations)
        for operation in operations:
            if operation.error is None:
                told += 1
            elif not isinstance(operation.error, (WorkflowClosed, WorkflowNotFound)):
                raise operation.error
    return told


def _wanted(where: str) -> Condition:
    if not isinstance(where, str) or not where.strip():
        raise InvalidFilter("say which runs are meant: a batch needs a condition, such as \"status = 'running'\".", 0)
    return parse(where)


def _pages(broker: DurableBroker, condition: Condition, *, latest: bool = False) -> Iterator[WorkflowList]:
    """All runs that meet a condition, the latest first: what is started meanwhile is not among them.

    ``latest``: of each workflow id only the latest run.
    """
    after: str | None = None
    # Nobody looks at what the runs have to say.
    codecs = ShownCodecs(broker.codecs.given)
    while True:
        page = _page(broker, condition, "-started_at", CHUNK, after, latest=latest, codecs=codecs)
        if page:
            yield page
        after = page.next
        if after is None:
            return


# --- twins -----------------------------------------------------------------------------------------------
async def alist_workflows(
    where: str | None = None,
    order: str = "-started_at",
    limit: int = 100,
    after: str | None = None,
    *,
    broker: dramatiq.Broker | None = None,
) -> WorkflowList:
    """As `list_workflows`, awaited."""
    return await asyncio.to_thread(list_workflows, where, order, limit, after, broker=broker)


async def acount_workflows(
    where: str | None = None, group_by: str | None = None, *, broker: dramatiq.Broker | None = None
) -> Any:
    """As `count_workflows`, awaited."""
    return await asyncio.to_thread(count_workflows, where, group_by, broker=broker)  # type: ignore[arg-type]


async def abatch_signal(where: str, name: str, payload: Any = None, *, broker: dramatiq.Broker | None = None) -> int:
    """As `batch_signal`, awaited."""
    return await sending(lambda: batch_signal(where, name, payload, broker=broker))


async def abatch_cancel(where: str, *, broker: dramatiq.Broker | None = None) -> int:
    """As `batch_cancel`, awaited."""
    return await sending(lambda: batch_cancel(where, broker=broker))


async def abatch_terminate(where: str, reason: str | None = None, *, broker: dramatiq.Broker | None = None) -> int:
    """As `batch_terminate`, awaited."""
    return await sending(lambda: batch_terminate(where, reason, broker=broker))


async def abatch_reset(where: str, to_event: int, *, broker: dramatiq.Broker | None = None) -> int:
    """As `batch_reset`, awaited."""
    return await sending(lambda: batch_reset(where, to_event, broker=broker))


# --- pages -----------------------------------------------------------------------------------------------
def _page(
    broker: DurableBroker,
    condition: Condition | None,
    order: str,
    limit: int,
    after: str | None,
    *,
    latest: bool = False,
    codecs: Codecs | None = None,
) -> WorkflowList:
    filter = compiled(condition)
    if latest:
        filter["latest"] = True
    by_close, descending = order.endswith("closed_at"), order.startswith("-")
    at, run = (None, None) if after is None else _read_cursor(after, order)
    if at is not None and not by_close:
        # Where the page begins is a condition that the index knows.
        if descending:
            filter["before"] = min(filter.get("before", "~"), _next_tick(at))
        else:
            filter["since"] = max(filter.get("since", ""), at)
    text = json.dumps(filter)
    rows = _read(
        broker,
        lambda conn: broker.procedures.list_workflows(conn, text, by_close, descending, at, run, limit + 1),
    )
    page = WorkflowList(_summary(row, broker.codecs if codecs is None else codecs) for row in rows[:limit])
    if len(rows) > limit:
        page.next = _cursor(order, page[-1])
    return page


def _summary(row: tuple[Any, ...], codecs: Codecs) -> WorkflowSummary:
    (run_id, workflow_id, name, queue_name, status, started_at, closed_at, length, parent, memo, failure) = row[:11]
    search, entity, parent_workflow_id = row[11:]
    return WorkflowSummary(
        workflow_id=workflow_id,
        run_id=str(uuid.UUID(bytes=run_id)),
        name=name,
        queue_name=queue_name,
        status=status,
        started_at=started_at.astimezone(UTC),
        closed_at=None if closed_at is None else closed_at.astimezone(UTC),
        parent=None if parent is None else Parent(parent_workflow_id or "", str(uuid.UUID(bytes=parent))),
        memo=codecs.open_memo(memo),
        search=search_values(from_json(search) or {}),
        entity=from_json(entity) or {},
        history_length=length,
        task_failure=codecs.decode_text(failure),
    )


def _cursor(order: str, last: WorkflowSummary) -> str:
    at = last.closed_at if order.endswith("closed_at") else last.started_at
    place = [order, "infinity" if at is None else at.isoformat(timespec="microseconds"), last.run_id]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _read_cursor(after: str, order: str) -> tuple[str, bytes]:
    try:
        made_for, at, run_id = loads(base64.urlsafe_b64decode(after.encode()))
        if at != "infinity":
            at = datetime.fromisoformat(at).astimezone(UTC).isoformat(timespec="microseconds")
        run = uuid.UUID(run_id).bytes
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"after is the `.next` of the page before, not {after!r:.60}") from None
    if made_for != order:
        raise ValueError(f"the page before was ordered by {made_for!r}: this one must be, too")
    return at, run


def _next_tick(at: str) -> str:
    return (datetime.fromisoformat(at) + TICK).isoformat(timespec="microseconds")


def _read(broker: DurableBroker, call: Callable[[Any], Any]) -> Any:
    with broker.database.calling() as conn:
        return call(conn)


def _broker(broker: dramatiq.Broker | None) -> DurableBroker:
    outside_of_workflows("list, count or tell workflows something by a filter")
    return durable_broker(broker if broker is not None else global_broker())
