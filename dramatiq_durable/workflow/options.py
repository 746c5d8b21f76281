"""The options of activities and workflows, and the checks of names: everything that a caller can get wrong."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypedDict

from ..durations import Duration, parse_duration
from ..errors import InvalidName
from .commands import Cancellation
from .converter import encode, loads
from .retry import RetryPolicy

MAX_NAME = 200
"""The cap on names and ids, in characters."""

_QUEUE_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9._-]*")

IdConflict = Literal["fail", "use_existing", "terminate_existing"]
IdReuse = Literal["allow", "allow_failed", "reject"]
ParentClose = Literal["terminate", "cancel", "abandon"]


# --- checks --------------------------------------------------------------------------------------------
def check_name(name: str, what: str) -> str:
    """Return the name, if it is 1 to 200 characters without NUL.

    Raises:
      InvalidName: it is not.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not _storable(name):
        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "..."
        raise InvalidName(f"{what} is 1 to {MAX_NAME} characters of text without NUL, not {shown}.")
    return name


def check_call(fn: Callable[..., Any] | None, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the function does not take, at the call: a worker would only fail on them later.

    Raises:
      TypeError: there is one too many, too few, or one of another name.
    """
    if fn is not None:
        try:
            _signature(fn).bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{name}(): {e}") from None


@functools.lru_cache(maxsize=1024)
def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(fn)


def _storable(text: str) -> bool:
    """Whether Postgres can keep it: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def check_queue_name(name: str) -> str:
    """Return the name of a stream, if Dramatiq takes it.

    Raises:
      InvalidName: it does not.
    """
    check_name(name, "a queue name")
    if not _QUEUE_NAME.fullmatch(name):
        raise InvalidName(
            f"{name!r} is no queue name: it starts with a letter or an underscore, "
            "followed by letters, digits, dashes, dots or underscores."
        )
    return name


def milliseconds(name: str, value: Any) -> int:
    if isinstance(value, timedelta):
        value = int(value.total_seconds() * 1000)
    return _integer(name, value, "milliseconds (or a timedelta)")


def _integer(name: str, value: Any, what: str = "a whole number") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {what}, at least 0, not {value!r}.")
    return value


def _limit(name: str, value: Any) -> int:
    try:
        ms = parse_duration(value)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    if ms < 1:
        raise ValueError(f"{name} is a time, longer than nothing: {value!r}.")
    return ms


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}.")
    return value


def check_options(what: str, options: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in options:
        if name not in allowed:
            raise TypeError(f"{what} has no option {name!r}; its options are {', '.join(allowed)}.")


def check_headers(name: str, headers: Any) -> dict[str, Any]:
    """Return a copy of headers, as plain JSON.

    Raises:
      ValueError: they are no dict with keys of text.
      NotEncodable: a value cannot be carried.
    """
    if not isinstance(headers, dict) or not all(isinstance(key, str) for key in headers):
        raise ValueError(f"headers is a dict whose keys are text, not {headers!r}.")
    copy: dict[str, Any] = loads(encode(headers, f"the headers of {name!r}"))
    return copy


class ActivityOptions(TypedDict, total=False):
    """Options of one use of an activity; times are milliseconds or a timedelta, as in Dramatiq."""

    queue_name: str
    max_retries: int | None
    min_backoff: int | timedelta
    max_backoff: int | timedelta
    time_limit: int | timedelta
    priority: int
    delay: int | timedelta
    cancellation: Cancellation
    headers: dict[str, Any]


_ACTIVITY_OPTIONS = tuple(ActivityOptions.__annotations__)
_CANCELLATIONS = ("try", "wait", "abandon")


@dataclass(slots=True, frozen=True)
class Dispatch:
    """How an activity's messages are sent: the checked form of ``ActivityOptions``."""

    queue_name: str
    message: dict[str, Any]
    priority: int | None = None
    delay_ms: int = 0
    policy: Cancellation = "try"

    def updated(self, name: str, options: Mapping[str, Any]) -> Dispatch:
        check_options(f"the activity {name!r}", options, _ACTIVITY_OPTIONS)
        changes: dict[str, Any] = {}
        message = dict(self.message)
        for option, value in options.items():
            if option == "queue_name":
                changes["queue_name"] = check_queue_name(value)
            elif option == "delay":
                changes["delay_ms"] = milliseconds(option, value)
            elif option == "priority":
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(f"priority is a whole number, not {value!r}.")
                changes["priority"] = value
            elif option == "cancellation":
                changes["policy"] = _one_of(option, value, _CANCELLATIONS)
            elif option == "headers":
                message[option] = check_headers(name, value)
            elif option == "max_retries":
                message[option] = None if value is None else _integer(option, value)
            else:
                message[option] = milliseconds(option, value)
        return replace(self, message=message, **changes)


class WorkflowOptionsGiven(TypedDict, total=False):
    """Options of a workflow, as they are given; ``delay`` is milliseconds or a timedelta, as in Dramatiq."""

    workflow_id: str | None
    id_conflict: IdConflict
    id_reuse: IdReuse
    memo: dict[str, Any] | None
    headers: dict[str, Any] | None
    delay: int | timedelta
    parent_close: ParentClose
    run_timeout: Duration | None
    execution_timeout: Duration | None
    retry: RetryPolicy | None
    cancellation: Cancellation


_WORKFLOW_OPTIONS = tuple(WorkflowOptionsGiven.__annotations__)

#: Those that the run itself knows.
_FACTS = ("memo", "headers", "run_timeout", "execution_timeout", "retry")


@dataclass(slots=True, frozen=True)
class WorkflowOptions:
    """Options of a workflow, checked.

    Attributes:
      workflow_id(str | None): None means a fresh one.
      id_conflict(str): what to do when a live run has the id.
      id_reuse(str): what to do when only closed runs have it.
      memo(dict | None): JSON that the run carries for people.
      headers(dict | None): JSON that the run carries for its interceptors, and passes on to what it calls.
      delay_ms(int): milliseconds to wait before the first step.
      parent_close(str): what becomes of it when its parent ends first.
      run_timeout, execution_timeout(int | None): milliseconds from its first step until it ends; the latter counts for
        the runs that go on for it, too.
      retry(dict | None): when a run that failed, or ran out of its run's time, is followed by another attempt.
      cancellation(str): what becomes of a child when the parent no longer waits for it.
    """

    workflow_id: str | None = None
    id_conflict: IdConflict = "fail"
    id_reuse: IdReuse = "allow"
    memo: dict[str, Any] | None = None
    headers: dict[str, Any] | None = None
    delay_ms: int = 0
    parent_close: ParentClose = "terminate"
    run_timeout: int | None = None
    execution_timeout: int | None = None
    retry: dict[str, Any] | None = None
    cancellation: Cancellation = "wait"

    def updated(self, name: str, options: Mapping[str, Any]) -> WorkflowOptions:
        check_options(f"the workflow {name!r}", options, _WORKFLOW_OPTIONS)
        changes: dict[str, Any] = dict(options)
        if changes.get("workflow_id") is not None:
            check_name(changes["workflow_id"], "a workflow id")
        if "id_conflict" in changes:
            _one_of("id_conflict", changes["id_conflict"], ("fail", "use_existing", "terminate_existing"))
        if "id_reuse" in changes:
            _one_of("id_reuse", changes["id_reuse"], ("allow", "allow_failed", "reject"))
        if "parent_close" in changes:
            _one_of("parent_close", changes["parent_close"], ("terminate", "cancel", "abandon"))
        if "cancellation" in changes:
            _one_of("cancellation", changes["cancellation"], _CANCELLATIONS)
        for limit in ("run_timeout", "execution_timeout"):
            if changes.get(limit) is not None:
                changes[limit] = _limit(limit, changes[limit])
        if changes.get("retry") is not None:
            if not isinstance(changes["retry"], RetryPolicy):
                raise ValueError(f"retry is a durable.RetryPolicy(...), not {changes['retry']!r}.")
            changes["retry"] = changes["retry"].to_json()
        if changes.get("memo") is not None:
            if not isinstance(changes["memo"], dict):
                raise ValueError(f"memo is a dict, not {changes['memo']!r}.")
            encode(changes["memo"], f"the memo of {name!r}")
        if changes.get("headers") is not None:
            changes["headers"] = check_headers(name, changes["headers"])
        if "delay" in changes:
            changes["delay_ms"] = milliseconds("delay", changes.pop("delay"))
        return replace(self, **changes)

    def facts(self) -> str | None:
        """Return what a run is started with beside its input, as JSON, or None: its first event's attributes."""
        facts = {name: value for name in _FACTS if (value := getattr(self, name)) is not None}
        return encode(facts, "the options of a workflow").decode() if facts else None

    def for_child(self) -> dict[str, Any]:
        """Return those that a child's start command carries: the ones that differ from the defaults."""
        defaults = WorkflowOptions()
        options = {
            name: value
            for name in ("id_conflict", "id_reuse", "delay_ms", "parent_close")
            if (value := getattr(self, name)) != getattr(defaults, name)
        }
        facts = self.facts()
        if facts is not None:
            options["facts"] = json.loads(facts)
        return options
