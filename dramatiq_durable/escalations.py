"""Escalations: what workflows wait for people to do (``await durable.escalate(role=...)``).

An escalation waits until somebody resolves it.  Who works on one claims it first, so that nobody else does the same;
what a claim that ran out was for is nobody's again.  Resolving it and waking its workflow is one commit.  Of two who do
something at once one wins, and the other gets an `EscalationConflict` that says how things stand.

Every function has a twin that is awaited: ``aclaim``, ``aresolve``, ...  Inside of ``with durable.using(connection)``,
on a connection that blocks, all that changes something is part of that transaction.
"""

from __future__ import annotations

import builtins
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import dramatiq

from .broker import DurableBroker
from .codecs import Codecs
from .database import Connection
from .durations import Duration, parse_duration
from .errors import DurableError, EscalationNotFound, NotPermitted
from .operations import ChangeEscalation, ClaimEscalation
from .procedures import Procedures
from .twins import twin
from .using import is_awaited
from .workflow.client import durable_broker
from .workflow.converter import encode
from .workflow.definition import global_broker
from .workflow.descriptions import readable
from .workflow.escalating import check_subject, plain_metadata
from .workflow.handle import outside_of_workflows
from .workflow.options import check_name

Status = Literal["waiting", "claimed", "resolved", "cancelled", "timed_out"]
STATUSES: tuple[Status, ...] = ("waiting", "claimed", "resolved", "cancelled", "timed_out")

#: What the run is told of.
_TELLING = ("resolve", "cancel")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Escalation:
    """An escalation as it stands.  Times are in UTC.

    Attributes:
      id(str): a UUID.
      workflow_id(str), run_id(str), workflow(str): which run waits for it, and that run's workflow.
      role(str), subject(str | None), type(str | None), priority(int), payload, metadata(dict): as it was opened; the
        role may have been reassigned.
      status(str): waiting, claimed, resolved, cancelled or timed_out.
      opened_at(datetime)
      times_out_at(datetime | None): when the workflow gives up.
      claimed_by(str | None), claimed_until(datetime | None): who works on it; None until it is released.
      closed_at(datetime | None)
      resolved_by(str | None), result: who resolved it, where that was said, and with what.
    """

    id: str
    workflow_id: str
    run_id: str
    workflow: str
    role: str
    subject: str | None
    type: str | None
    priority: int
    status: Status
    payload: Any
    metadata: dict[str, Any]
    opened_at: datetime
    times_out_at: datetime | None
    claimed_by: str | None
    claimed_until: datetime | None
    closed_at: datetime | None
    resolved_by: str | None
    result: Any


@dataclass(frozen=True, slots=True)
class Stats:
    """How many escalations there are of each kind."""

    waiting: int
    claimed: int
    resolved: int
    cancelled: int
    timed_out: int


# --- looking --------------------------------------------------------------------------------------------------


def list(
    *,
    role: str | None = None,
    status: Status | None = None,
    subject: str | None = None,
    type: str | None = None,
    run_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    limit: int = 100,
    after: str | None = None,
    broker: dramatiq.Broker | None = None,
) -> builtins.list[Escalation]:
    """Escalations that match all that is given, by priority (lower first) and then age.

    Parameters:
      role, status, subject, type, run_id: as in `Escalation`.
      metadata(dict | None): what their metadata must have, with these values.
      limit(int): at most so many, 1 to 10,000.
      after(str | None): the id of the last one of the page before; whatever has become of it, what comes behind it is
        listed.

    Raises:
      ValueError: there is no such status, or the limit makes no sense.
      EscalationNotFound: the one to go on behind is not there, or this login may not see it.
      DatabaseUnavailable: the database cannot be reached.
    """
    if status is not None and status not in STATUSES:
        raise ValueError(f"status is one of {', '.join(map(repr, STATUSES))}, not {status!r}.")
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= 10_000:
        raise ValueError(f"limit is a whole number from 1 to 10,000, not {limit!r}.")
    if role is not None:
        check_name(role, "a role")
    if type is not None:
        check_name(type, "an escalation's type")
    check_subject(subject)
    run = None if run_id is None else uuid.UUID(run_id).bytes
    wanted = _metadata(metadata)
    behind = None if after is None else _key(after)

    def look(procedures: Procedures, conn: Connection) -> builtins.list[str]:
        return procedures.list_escalations(conn, role, status, subject, type, run, wanted, limit, behind)

    try:
        found = _read(broker, look)
    except NotPermitted as e:
        if after is None:
            raise
        raise EscalationNotFound(f"there is no escalation {after} to go on behind: begin with the first page") from e
    codecs = _broker(broker).codecs
    return [_shown(text, codecs) for text in found]


def get(id: str, *, broker: dramatiq.Broker | None = None) -> Escalation:
    """One escalation.

    Raises:
      EscalationNotFound: there is none of this id, or this login may not see it.
    """
    key = _key(id)
    found = _read(broker, lambda p, conn: p.get_escalation(conn, key))
    if found is None:
        raise EscalationNotFound(f"there is no escalation {id}, or this login may not see it")
    return _shown(found, _broker(broker).codecs)


def stats(role: str | None = None, *, broker: dramatiq.Broker | None = None) -> Stats:
    """How many escalations of a role, or of all, there are of each kind."""
    if role is not None:
        check_name(role, "a role")
    return Stats(*_read(broker, lambda p, conn: p.count_escalations(conn, role)))


# --- acting ---------------------------------------------------------------------------------------------------


def claim(id: str, *, by: str, timeout: Duration | None = None, broker: dramatiq.Broker | None = None) -> Escalation:
    """Claim an escalation: only its holder may resolve it then.  Its holder's claim is prolonged.

    Parameters:
      by(str): who claims it, 1 to 200 characters.
      timeout: how long it is theirs, and then nobody's again: seconds, a timedelta or text; None: until it is released.

    Returns:
      Escalation: as it stands then.

    Raises:
      EscalationConflict: somebody else has claimed it, or it is closed.
      EscalationNotFound: there is none of this id, or this login may not see it.
      ValueError: the timeout is negative or malformed.
    """
    check_name(by, "who claims an escalation")
    return _change(broker, ChangeEscalation("claim", _key(id), by, _claim_ms(timeout)))


def claim_next(
    *,
    role: str,
    by: str,
    timeout: Duration | None = None,
    metadata: Mapping[str, Any] | None = None,
    broker: dramatiq.Broker | None = None,
) -> Escalation | None:
    """Claim the escalation of a role that comes first, by priority (lower first) and then age, and is nobody's.

    However many call this at once, each gets another one.

    Parameters:
      metadata(dict | None): what its metadata must have, with these values.
      by, timeout: as for `claim`.

    Returns:
      Escalation, or None where nothing waits.

    Raises:
      ValueError: the timeout is negative or malformed.
    """
    check_name(role, "a role")
    check_name(by, "who claims an escalation")
    operation = ClaimEscalation(role, _metadata(metadata), by, _claim_ms(timeout))
    found = _submit(broker, operation)
    return None if found is None else _shown(found, _broker(broker).codecs)


def release(id: str, *, by: str, broker: dramatiq.Broker | None = None) -> Escalation:
    """Give back what one has claimed.

    Raises:
      EscalationConflict: it is not theirs (any more): somebody else's, nobody's, or closed.
      EscalationNotFound: there is none of this id, or this login may not see it.
    """
    check_name(by, "who releases an escalation")
    return _change(broker, ChangeEscalation("release", _key(id), by))


def resolve(
    id: str, payload: Any = None, by: str | None = None, *, broker: dramatiq.Broker | None = None
) -> Escalation:
    """Resolve an escalation and wake its workflow, in one commit.

    Parameters:
      payload: what ``escalate`` returns in the workflow: any value that the converter can carry.
      by(str | None): who does it; needed where it was claimed.

    Raises:
      EscalationConflict: somebody else has claimed it, or it is closed: resolved, cancelled, timed out.
      EscalationNotFound: there is none of this id, or this login may not see it.
      NotEncodable, PayloadTooLarge, CodecFailed: the payload cannot be carried.
    """
    if by is not None:
        check_name(by, "who resolves an escalation")
    what = "the payload of a resolved escalation"
    data = None if payload is None else _broker(broker).codecs.encode(encode(payload, what), what)
    return _change(broker, ChangeEscalation("resolve", _key(id), by, payload=data))


def cancel(id: str, *, broker: dramatiq.Broker | None = None) -> Escalation:
    """Cancel an escalation, whoever has claimed it: its workflow gets an `EscalationCancelled`.

    Raises:
      EscalationConflict: it is closed.
      EscalationNotFound: there is none of this id, or this login may not see it.
    """
    return _change(broker, ChangeEscalation("cancel", _key(id)))


def reassign(id: str, *, role: str, broker: dramatiq.Broker | None = None) -> Escalation:
    """Give an escalation to another role; whoever had claimed it has it no longer.

    Raises:
      EscalationConflict: it is closed.
      EscalationNotFound: there is none of this id, or this login may not see it.
    """
    check_name(role, "a role")
    return _change(broker, ChangeEscalation("reassign", _key(id), role=role))


alist = twin(list)
aget = twin(get)
astats = twin(stats)
aclaim = twin(claim)
aclaim_next = twin(claim_next)
arelease = twin(release)
aresolve = twin(resolve)
acancel = twin(cancel)
areassign = twin(reassign)


# --- inside ---------------------------------------------------------------------------------------------------


def _broker(broker: dramatiq.Broker | None) -> DurableBroker:
    outside_of_workflows("look at or change escalations")
    return durable_broker(broker or global_broker())


def _read(broker: dramatiq.Broker | None, call: Callable[[Procedures, Connection], T]) -> T:
    chosen = _broker(broker)
    with chosen.database.calling() as conn:
        return call(chosen.procedures, conn)


def _change(broker: dramatiq.Broker | None, operation: ChangeEscalation) -> Escalation:
    spans = _broker(broker).telemetry.spans() if operation.verb in _TELLING else None
    if spans is None:
        return _shown(_submit(broker, operation), _broker(broker).codecs)
    with spans.telling("escalation", operation.verb, str(uuid.UUID(bytes=operation.escalation))) as carrier:
        operation.trace = carrier.get("traceparent")
        return _shown(_submit(broker, operation), _broker(broker).codecs)


def _submit(broker: dramatiq.Broker | None, operation: ChangeEscalation | ClaimEscalation) -> Any:
    chosen = _broker(broker)
    if is_awaited():
        raise DurableError(
            "escalations cannot be changed inside of `async with using(...)`: whether it worked would be known too "
            "late. Use a connection that blocks, or do it before or after the block"
        )
    return chosen.commit.submit(operation)


def _shown(text: str, codecs: Codecs) -> Escalation:
    facts = json.loads(text)
    for name in ("payload", "result"):
        if facts[name] is not None:
            facts[name] = readable(codecs.decode(bytes.fromhex(facts[name]), f"the {name} of an escalation"))
    for name in ("opened_at", "times_out_at", "claimed_until", "closed_at"):
        facts[name] = None if facts[name] is None else datetime.fromtimestamp(facts[name] / 1000, UTC)
    metadata = readable((facts["metadata"] or "{}").encode())
    facts["metadata"] = metadata if isinstance(metadata, dict) else {"unreadable": metadata}
    return Escalation(**facts)


def _key(id: str) -> bytes:
    try:
        return uuid.UUID(id).bytes
    except (ValueError, AttributeError, TypeError):
        raise EscalationNotFound(f"the id of an escalation is a UUID, not {id!r:.60}") from None


def _claim_ms(timeout: Duration | None) -> int | None:
    return None if timeout is None else parse_duration(timeout)


def _metadata(metadata: Mapping[str, Any] | None) -> str | None:
    plain = plain_metadata(metadata)
    return None if plain is None else json.dumps(plain)
