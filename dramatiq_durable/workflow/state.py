"""What workflow code calls to let others see something of its run: search attributes, the entity, topics, output."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from ..errors import PayloadTooLarge
from .attributes import check_search, merged_search
from .commands import Answered, EmitTopic, UpsertSearch, WriteOutput
from .converter import encode, hash_arguments
from .entity import Entity
from .options import check_name
from .primitives import require

#: The cap on what is emitted at once, in bytes: its message has room for what codecs make of it.
MAX_EVENT = 8 * 1024 * 1024


def upsert_search(search: dict[str, Any]) -> Coroutine[Any, Any, None]:
    """Set search attributes of the run; others stay as they are.

    Parameters:
      search(dict): names and values: str, int, float, bool, datetime (with a time zone), a list of str; None removes
        one.

    Guarantee: ``info().search`` has them at once; ``list_workflows`` finds the run by them once the step is stored.

    Raises:
      ValueError: a name or a time makes no sense.
      NotEncodable: a value is of another type.
      PayloadTooLarge: they are over 32 KiB.
    """
    execution = require("durable.upsert_search()")
    checked = check_search(search)
    merged = merged_search(execution.search, checked)
    command = UpsertSearch(None, None, None, hash_arguments(encode(checked)), checked)
    execution.issue(command)
    execution.state["search"] = merged
    return Answered(execution, command, None)


def entity() -> Entity:
    """The run's entity: a JSON document that it changes, and that others find it by.

    ``await durable.entity().set("customer.name", "Kim")``
    """
    return Entity(require("durable.entity()"))


def emit(topic: str, payload: Any = None) -> Coroutine[Any, Any, None]:
    """Give an event to every actor that is subscribed to a topic: see ``subscribe``.

    Guarantee: committed with the step.  Each subscriber is given it at least once, and the events of this run in order.

    Raises:
      InvalidName: the topic is empty, too long or no text.
      NotEncodable, PayloadTooLarge: the payload cannot be carried.
    """
    execution = require("durable.emit()")
    check_name(topic, "a topic")
    data = encode(payload, f"the payload for the topic {topic!r}")
    if len(data) > MAX_EVENT:
        raise PayloadTooLarge(
            f"the payload for the topic {topic!r} is {len(data):,} bytes, the cap is {MAX_EVENT:,}: keep "
            "the data elsewhere and pass a reference to it."
        )
    command = EmitTopic(None, topic, data, hash_arguments(data))
    execution.issue(command)
    return Answered(execution, command, None)


def output(value: Any) -> Coroutine[Any, Any, int]:
    """Append a value to the run's output, which clients follow: see ``WorkflowHandle.follow``.

    Returns:
      int: its offset, counted from 0 and on through continue-as-new.

    Raises:
      NotEncodable, PayloadTooLarge: the value cannot be carried.
    """
    execution = require("durable.output()")
    data = encode(value, "the output")
    offset: int = execution.state.get("outputs", 0)
    command = WriteOutput(None, None, data, hash_arguments(data), offset)
    execution.issue(command)
    execution.state["outputs"] = offset + 1
    return Answered(execution, command, offset)
