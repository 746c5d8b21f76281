"""What a message carries, for people: its arguments and options, or its bytes where they cannot be decoded here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dramatiq import JSONEncoder, Message

from ..codecs import Codecs, is_encoded
from ..topics import MARK, message_of
from .output import plain

#: Of a value in a table, so many characters are shown; ``--json`` has all of them.
SHOWN = 160


def decode(payload: bytes, kind: str, codecs: Codecs) -> dict[str, Any]:
    """``args``, ``kwargs`` and ``options`` (as this process's encoder reads them), or ``bytes``.  What SQL wrote (kind
    ``j``) is JSON, whatever the encoder.  An activity's or event's message that no codec here can decode is named."""
    if kind in ("a", "p") and is_encoded(payload):
        decoded = codecs.decode(payload)
        if decoded.startswith(b'"'):
            return {"bytes": json.loads(decoded)}
        payload = decoded
    try:
        if payload.startswith(MARK):
            event = message_of("-", "-", bytes(16), payload, codecs)
            return {"args": list(event.args), "kwargs": {}, "options": event.options}
        message: Message[Any] = Message(**JSONEncoder().decode(payload)) if kind == "j" else Message.decode(payload)
        return {"args": list(message.args), "kwargs": message.kwargs, "options": message.options}
    except Exception:  # whatever an encoder raises
        return {"bytes": payload.decode("utf-8", "backslashreplace")}


def call(decoded: Mapping[str, Any]) -> str:
    """The arguments in one line, as they would stand in a call."""
    if "bytes" in decoded:
        return short(decoded["bytes"])
    parts = [_json(value) for value in decoded["args"]]
    parts += [f"{name}={_json(value)}" for name, value in decoded["kwargs"].items()]
    return short(", ".join(parts))


def last_line(failure: str | None) -> str:
    """The line of a failure that says most."""
    return short((failure or "").strip().rpartition("\n")[2])


def short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _json(value: Any) -> str:
    return json.dumps(plain(value), default=str, ensure_ascii=False)
