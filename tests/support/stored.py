"""Messages as they are stored, read without a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dramatiq import Message

from dramatiq_durable.delivery import decode_message


def message_in(payload: bytes) -> Message[Any]:
    """What a row's payload says of its message: arguments, options and time."""
    return decode_message(payload, "m", "", "", bytes(16))


def stored_messages(rows: Callable[[str], list[tuple[Any, ...]]]) -> list[Message[Any]]:
    """The messages that wait, whole, in the order in which they are due."""
    found = rows(
        "SELECT m.payload, m.kind::text, s.name, m.actor, m.message_id FROM durable.message m "
        "JOIN durable.stream s USING (stream_id) ORDER BY m.due_at"
    )
    return [decode_message(payload, kind, queue, actor, id.bytes) for payload, kind, queue, actor, id in found]
