"""What workflow code calls to have somebody do something: a human step."""

from __future__ import annotations

import json
from collections.abc import Coroutine, Mapping
from typing import Any

from ..durations import Duration, parse_duration
from ..errors import InvalidName, NotEncodable
from .commands import EscalationCall, OpenEscalation
from .converter import encode, hash_arguments
from .names import check_name, storable
from .primitives import require

#: The cap on subjects, in characters, and on metadata, in bytes.
MAX_SUBJECT = 1000
MAX_METADATA = 1024 * 1024


def escalate(
    *,
    role: str,
    subject: str | None = None,
    payload: Any = None,
    type: str | None = None,
    priority: int = 0,
    timeout: Duration | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Coroutine[Any, Any, Any]:
    """Ask somebody in a role, and wait for the answer: ``durable.escalations`` is where it is claimed and resolved.

    It is a row that is written in the same commit as the step.  It is cancelled when the task that awaits it is, and
    when the run ends first.  If it is resolved in the moment in which it times out, one of the two wins, for everybody.

    Parameters:
      role(str): who is asked: 1 to 200 characters.
      subject(str | None): what it is about, at most 1,000 characters: an order's number, a question.
      payload: what one has to know to answer: any value that the converter can carry.
      type(str | None): what kind of answer is wanted: 1 to 200 characters.
      priority(int): lower comes first, then older.
      timeout: seconds, a ``timedelta`` or text; None waits for ever.
      metadata(dict | None): JSON to find it by.

    Returns:
      What it was resolved with.

    Raises:
      Timeout: (when awaited) nobody resolved it in time.
      EscalationCancelled: (when awaited) it was cancelled from outside.
      InvalidName: role, type or subject is empty, too long or no text.
      ValueError: the priority or the timeout makes no sense.
      NotEncodable, PayloadTooLarge: payload or metadata cannot be carried.
    """
    execution = require("durable.escalate()")
    check_name(role, "a role")
    if type is not None:
        check_name(type, "an escalation's type")
    check_subject(subject)
    if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**31) <= priority < 2**31:
        raise ValueError(f"priority is a whole number, not {priority!r}.")
    ms = None if timeout is None else parse_duration(timeout)
    facts = plain_metadata(metadata)
    data = None if payload is None else encode(payload, f"the payload of the escalation to {role!r}")
    hash = hash_arguments(encode([role, subject, type, priority, facts]) + (data or b""))
    command = OpenEscalation(
        None, role, data, hash, subject=subject, type=type, priority=priority, ms=ms, metadata=facts
    )
    call = EscalationCall(execution, command)
    execution.expect(execution.issue(command), call)
    return call


def check_subject(subject: str | None) -> None:
    """Raises InvalidName for one that cannot be stored."""
    if subject is not None and (not isinstance(subject, str) or len(subject) > MAX_SUBJECT or not storable(subject)):
        raise InvalidName(f"a subject is a text of at most {MAX_SUBJECT} characters without NUL, not {subject!r:.60}.")


def plain_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Metadata as the database keeps it: an object of JSON.

    Raises:
      NotEncodable: it is none, or has what the database refuses (NUL, NaN, half of a surrogate pair).
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise NotEncodable(f"metadata is a dict, not {metadata!r:.60}.")
    data = encode(dict(metadata), "the metadata of an escalation")
    try:
        # Surrogates fail here.
        text = data.decode()
        plain: dict[str, Any] = json.loads(text, parse_constant=_refuse)
    except ValueError as e:
        raise NotEncodable(f"the metadata of an escalation has a value that the database cannot keep: {e}") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise NotEncodable("the metadata of an escalation has a NUL, which the database cannot keep")
    if len(data) > MAX_METADATA:
        raise NotEncodable(f"the metadata of an escalation has {len(data)} bytes, more than {MAX_METADATA}")
    return plain


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
