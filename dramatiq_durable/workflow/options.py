"""The options of activities and workflows, and the checks of names: everything that a caller can get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypedDict, cast

from dramatiq.middleware.retries import DEFAULT_MAX_BACKOFF, DEFAULT_MIN_BACKOFF

from ..durations import Duration, parse_duration
from ..errors import InvalidName, NotEncodable
from .attributes import check_search
from .commands import Cancellation
from .converter import encode, loads
from .names import check_call as check_call
from .names import check_name as check_name
from .retry import LONGEST, OPTION, RetryPolicy

#: What Postgres does not read in JSON: an escaped NUL, half of a surrogate pair.
_UNREADABLE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000|[\ud800-\udfff]")

_QUEUE_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9._-]*")

IdConflict = Literal["fail", "use_existing", "terminate_existing"]
IdReuse = Literal["allow", "allow_failed", "reject"]
ParentClose = Literal["terminate", "cancel", "abandon"]


# --- checks --------------------------------------------------------------------------------------------
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
    """Options of one use of an activity.

    Dramatiq's own (``max_retries, min_backoff, max_backoff, time_limit, priority, delay``) mean what they mean there,
    in milliseconds or as a timedelta.  The limits are durations: seconds, a timedelta or text.

    Attributes:
      queue_name(str): the stream that it is sent to.
      retry(RetryPolicy | None): when it is tried again, in place of ``max_retries`` and the backoffs.
      start_to_close: how long an attempt may run.
      schedule_to_start: how long it may wait for a worker.
      schedule_to_close: how long it may take in all, retries included.
      heartbeat: how long an attempt may go without ``durable.heartbeat()``.
      cancellation(str): what cancelling it means: "try" tells the activity and goes on, "wait" tells it and waits for
        its outcome, "abandon" leaves it alone.
      local(bool): run it inside the workflow task, without a message.
    """

    queue_name: str
    max_retries: int | None
    min_backoff: int | timedelta
    max_backoff: int | timedelta
    time_limit: int | timedelta
    priority: int
    delay: int | timedelta
    cancellation: Cancellation
    retry: RetryPolicy | None
    start_to_close: Duration | None
    schedule_to_start: Duration | None
    schedule_to_close: Duration | None
    heartbeat: Duration | None
    local: bool
    headers: dict[str, Any]


_ACTIVITY_OPTIONS = tuple(ActivityOptions.__annotations__)
_CANCELLATIONS = ("try", "wait", "abandon")
_LIMITS = ("start_to_close", "schedule_to_start", "schedule_to_close", "heartbeat")

#: What a RetryPolicy stands in for.
_RETRIES = ("max_retries", "min_backoff", "max_backoff", "retry_when", "on_retry_exhausted")


def check_retries(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a RetryPolicy beside Dramatiq's retry options, and what is none.

    Raises:
      ValueError: both are given, or it is no RetryPolicy.
    """
    policy = options.get("retry")
    if policy is None:
        return
    if not isinstance(policy, RetryPolicy):
        raise ValueError(f"retry of {name!r} is a durable.RetryPolicy, not {policy!r}.")
    both = [option for option in _RETRIES if option in options]
    if both:
        raise ValueError(
            f"the activity {name!r} is given a RetryPolicy and Dramatiq's {', '.join(both)}: give one or the other."
        )


@dataclass(slots=True, frozen=True)
class Dispatch:
    """How an activity's messages are sent: the checked form of ``ActivityOptions``.

    Attributes:
      message(dict): options of the message, a RetryPolicy among them.
      limits(dict): milliseconds.
    """

    queue_name: str
    message: dict[str, Any]
    priority: int | None = None
    delay_ms: int = 0
    policy: Cancellation = "try"
    limits: dict[str, int] = field(default_factory=dict)
    local: bool = False

    def updated(self, name: str, options: Mapping[str, Any]) -> Dispatch:
        check_options(f"the activity {name!r}", options, _ACTIVITY_OPTIONS)
        check_retries(name, options)
        changes: dict[str, Any] = {}
        message = dict(self.message)
        limits = dict(self.limits)
        if any(option in options for option in _RETRIES):
            message.pop(OPTION, None)
        for option, value in options.items():
            if option in _LIMITS:
                limits.pop(option, None)
                if value is not None:
                    limits[option] = min(_limit(option, value), LONGEST)
                continue
            if option == "retry":
                for replaced in (OPTION, *_RETRIES):
                    message.pop(replaced, None)
                if value is not None:
                    message[OPTION] = value.to_json()
                continue
            if option == "local":
                if not isinstance(value, bool):
                    raise ValueError(f"local is True or False, not {value!r}.")
                changes["local"] = value
                continue
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
        made = replace(self, message=message, limits=limits, **changes)
        for option in ("heartbeat", "schedule_to_start"):
            if made.local and option in limits:
                raise ValueError(
                    f"{name!r} with local=True has no {option}: it runs inside the workflow task, at once. Give it a "
                    "start_to_close, or do without local=True."
                )
        return made

    def retries(self, actor_options: Mapping[str, Any]) -> dict[str, Any]:
        """Return how it is tried again, as a RetryPolicy's JSON: its own, or Dramatiq's options as one."""
        policy = self.message.get(OPTION)
        if policy is not None:
            return cast("dict[str, Any]", policy)
        options = {**actor_options, **self.message}
        most = options.get("max_retries", 20)
        return {
            "initial": options.get("min_backoff", DEFAULT_MIN_BACKOFF),
            "coefficient": 2,
            "maximum": options.get("max_backoff", DEFAULT_MAX_BACKOFF),
            "attempts": None if most is None else most + 1,
        }


class WorkflowOptionsGiven(TypedDict, total=False):
    """Options of a workflow, as they are given; ``delay`` is milliseconds or a timedelta, as in Dramatiq."""

    workflow_id: str | None
    id_conflict: IdConflict
    id_reuse: IdReuse
    memo: dict[str, Any] | None
    search: dict[str, Any] | None
    headers: dict[str, Any] | None
    delay: int | timedelta
    parent_close: ParentClose
    run_timeout: Duration | None
    execution_timeout: Duration | None
    retry: RetryPolicy | None
    cancellation: Cancellation
    with_signal: tuple[str, Any] | None
    with_update: tuple[Any, ...] | None
    update_id: str | None


_WORKFLOW_OPTIONS = tuple(WorkflowOptionsGiven.__annotations__)

#: Under which a message that starts a run carries the run's options.
RUN = "run_options"

#: Dramatiq's, by which somebody who has called an actor so far may call a workflow.
_OF_MESSAGES = frozenset(
    [
        "max_retries",
        "min_backoff",
        "max_backoff",
        "retry_when",
        "throws",
        "on_retry_exhausted",
        "time_limit",
        "max_age",
        "priority",
        "broker_priority",
        "on_success",
        "on_failure",
        "pipe_ignore",
        "pipe_target",
        "store_results",
        "result_ttl",
        "notify_shutdown",
        "unique_key",
        "unique_conflict",
    ]
)

#: Those that the run itself knows.
_FACTS = ("memo", "search", "headers", "run_timeout", "execution_timeout", "retry")


@dataclass(slots=True, frozen=True)
class WorkflowOptions:
    """Options of a workflow, checked.

    Attributes:
      workflow_id(str | None): None means a fresh one.
      id_conflict(str): what to do when a live run has the id.
      id_reuse(str): what to do when only closed runs have it.
      memo(dict | None): JSON that the run carries for people.
      search(dict | None): search attributes that it begins with, as JSON has them.
      headers(dict | None): JSON that the run carries for its interceptors, and passes on to what it calls.
      delay_ms(int): milliseconds to wait before the first step.
      parent_close(str): what becomes of it when its parent ends first.
      run_timeout, execution_timeout(int | None): milliseconds from its first step until it ends; the latter counts for
        the runs that go on for it, too.
      retry(dict | None): when a run that failed, or ran out of its run's time, is followed by another attempt.
      cancellation(str): what becomes of a child when the parent no longer waits for it.
      with_signal(tuple | None): a signal, (name, payload), that comes in the transaction that starts the run; a live
        run that has the id gets it, too.
      with_update(tuple | None): an update, (name, *args), alike; update_id(str | None): its id.
    """

    workflow_id: str | None = None
    id_conflict: IdConflict = "fail"
    id_reuse: IdReuse = "allow"
    memo: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    headers: dict[str, Any] | None = None
    delay_ms: int = 0
    parent_close: ParentClose = "terminate"
    run_timeout: int | None = None
    execution_timeout: int | None = None
    retry: dict[str, Any] | None = None
    cancellation: Cancellation = "wait"
    with_signal: tuple[str, Any] | None = None
    with_update: tuple[Any, ...] | None = None
    update_id: str | None = None

    def updated(self, name: str, options: Mapping[str, Any]) -> WorkflowOptions:
        for option in options:
            if option in _OF_MESSAGES:
                raise TypeError(
                    f"the workflow {name!r} has no option {option!r}: that is one of Dramatiq's, for messages, and "
                    f"means nothing to a run. A run's options are {', '.join(_WORKFLOW_OPTIONS)}."
                )
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
        changes.update(self._told(changes))
        if changes.get("search") is not None:
            changes["search"] = {k: v for k, v in check_search(changes["search"]).items() if v is not None}
        if changes.get("headers") is not None:
            changes["headers"] = check_headers(name, changes["headers"])
        if "delay" in changes:
            changes["delay_ms"] = milliseconds("delay", changes.pop("delay"))
        return replace(self, **changes)

    def _told(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Check what a run is told in the transaction that starts it; answers what else follows from it."""
        signal, update = changes.get("with_signal"), changes.get("with_update")
        if changes.get("update_id") is not None:
            check_name(changes["update_id"], "an update's id")
        if signal is None and update is None:
            return {}
        if (signal or self.with_signal) is not None and (update or self.with_update) is not None:
            raise ValueError("a run is started with_signal or with_update, not with both.")
        if signal is not None:
            if not isinstance(signal, (tuple, list)) or len(signal) != 2:
                raise ValueError(f"with_signal is (name, payload), not {signal!r:.60}.")
            check_name(signal[0], "a signal's name")
        else:
            if not isinstance(update, (tuple, list)) or not update:
                raise ValueError(f"with_update is (name, *args), not {update!r:.60}.")
            check_name(update[0], "an update's name")
        # It is for the run that has the id, whether it has to be started or not, unless something else is said.
        return {} if "id_conflict" in changes or self.id_conflict != "fail" else {"id_conflict": "use_existing"}

    def facts(self) -> str | None:
        """Return what a run is started with beside its input, as JSON, or None: its first event's attributes."""
        facts = {name: value for name in _FACTS if (value := getattr(self, name)) is not None}
        if not facts:
            return None
        text = encode(facts, "the options of a workflow").decode("utf-8", "surrogatepass")
        if _UNREADABLE.search(text):
            raise NotEncodable(
                "the options of a workflow (memo, ...) have a text with a NUL or half of a surrogate pair: Postgres "
                "cannot look into such JSON. Leave it out, or give it to the workflow as an argument."
            )
        return text

    def for_child(self) -> dict[str, Any]:
        """Return those that a child's start command carries: the ones that differ from the defaults.

        Raises:
          ValueError: it is told something with its start, which only a client can do.
        """
        if self.with_signal is not None or self.with_update is not None:
            raise ValueError(
                "a child is not started with_signal or with_update: start it, and `await child.signal(name, payload)`."
            )
        return self._carried("id_conflict", "id_reuse", "delay_ms", "parent_close")

    def for_message(self) -> dict[str, Any]:
        """Return those that a message carries that starts a run: the ones that differ from the defaults.

        Raises:
          ValueError: it is told something with its start.
        """
        if self.with_signal is not None or self.with_update is not None:
            raise ValueError(
                "a message carries no with_signal and no with_update: start the run with `send(...)` or `start(...)`."
            )
        return self._carried("workflow_id", "id_conflict", "id_reuse", "delay_ms")

    def _carried(self, *names: str) -> dict[str, Any]:
        defaults = WorkflowOptions()
        options = {name: value for name in names if (value := getattr(self, name)) != getattr(defaults, name)}
        facts = self.facts()
        if facts is not None:
            options["facts"] = json.loads(facts)
        return options
