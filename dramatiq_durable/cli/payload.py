"""What a message carries, for people: its arguments and options, or its bytes where they cannot be decoded here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dramatiq import Message

from .. import topics
from ..codecs import Codecs, is_encoded
from ..delivery import decode_message
from .output import plain

#: Of a value in a table, so many characters are shown; ``--json`` has all of them.
SHOWN = 160


def decode(payload: bytes, kind: str, codecs: Codecs) -> dict[str, Any]:
    """``args``, ``kwargs`` and ``options`` (as this process's encoder reads them), or ``bytes``.  What SQL wrote (kind
    ``j``, and events) is JSON, whatever the encoder.  A workflow's value that no codec here can decode is named."""
    if is_encoded(payload):
        decoded = codecs.decode(payload)
        if decoded.startswith(b'"'):
            return {"bytes": json.loads(decoded)}
        payload = decoded
    message: Message[Any]
    try:
        if payload.startswith(topics.MARK):
            message = topics.message_of("", "", b"\0" * 16, payload, codecs)
        else:
            message = decode_message(payload, kind, "", "", b"\0" * 16)
        # Whoever may send to the stream has written it: it may be of any shape.
        if isinstance(message.kwargs, dict) and isinstance(message.options, dict):
            return {"args": list(message.args), "kwargs": message.kwargs, "options": message.options}
    except Exception:  # whatever an encoder raises
        pass
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
