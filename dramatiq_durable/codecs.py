"""What stands between the values of workflows and the database: a chain of codecs, which encrypt or compress.

What is stored names the codecs that it went through, in the order in which it did: values from before a codec was added
stay readable, and so do those of a codec that is only kept to decode.  Nothing inside of a workflow ever sees what is
encoded: values are encoded on their way to the database, and decoded on their way from it.
"""

from __future__ import annotations

import binascii
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, overload, runtime_checkable

from .errors import CodecFailed, DurableError, InvalidName, PayloadTooLarge
from .workflow.converter import MAX_PAYLOAD, encode, loads
from .workflow.events import Event

#: No JSON begins with it, and no message of an encoder of Dramatiq's.
_MARK: Final = b"\0codec:"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TEXT = re.compile(r"<encoded by ([A-Za-z0-9._,-]+)> ([A-Za-z0-9+/]*={0,2})")

#: Facts of events that are values of the application.  The hash of what was given tells those few values apart that it
#: could have been: it is one of them.
_VALUES = ("memo", "headers", "hash")
#: Facts that have such facts inside.
_NESTS = ("options", "facts")
#: Why somebody has ended a run: a text, which the database puts into the event.
_REASON = "reason"
#: What of a failure says more than its kind.
_TELLING = ("message", "traceback", "cause")
#: The database itself reads what these events carry: people search for it.
_READABLE = ("SearchUpserted", "EntityChanged")


@runtime_checkable
class Codec(Protocol):
    """Turns bytes into other bytes and back; many threads use it at once.

    Attributes:
      name(str): what stored values call it: letters, digits, dots, dashes and underscores.
    """

    @property
    def name(self) -> str: ...

    def encode(self, data: bytes) -> bytes: ...

    def decode(self, data: bytes) -> bytes: ...


class decode_only:  # noqa: N801 - used like a function
    """A codec that is kept for what it has encoded once, and encodes nothing any more:
    ``DurableBroker(codecs=[new, decode_only(old)])``."""

    def __init__(self, codec: Codec) -> None:
        self.name = codec.name
        self.decode = codec.decode


class Codecs:
    """The codecs of a broker: what is written goes through them first to last, what is read last to first.

    It is false where nothing is encoded.

    Attributes:
      given(tuple): the codecs, as the broker was given them.

    Raises:
      InvalidName: a codec's name is malformed, or two have the same.
      TypeError: something given is no codec.
    """

    def __init__(self, codecs: Sequence[Codec | decode_only] = ()) -> None:
        self.given = tuple(codecs)
        self._known: dict[str, Callable[[bytes], bytes]] = {}
        self._chain: list[tuple[str, Callable[[bytes], bytes]]] = []
        for codec in codecs:
            name, decode = getattr(codec, "name", None), getattr(codec, "decode", None)
            if isinstance(codec, type) or not isinstance(name, str) or not callable(decode):
                raise TypeError(f"a codec is an object with a name, encode(data) and decode(data), not {codec!r}")
            if not _NAME.fullmatch(name) or name in self._known:
                raise InvalidName(
                    f"the name of a codec is 1 to 64 letters, digits, dots, dashes or underscores, and unique among a "
                    f"broker's codecs, not {name!r}"
                )
            self._known[name] = decode
            if not isinstance(codec, decode_only):
                if not callable(getattr(codec, "encode", None)):
                    raise TypeError(f"the codec {name!r} has no encode(data): wrap one that decodes in decode_only()")
                self._chain.append((name, codec.encode))
        self._names = ",".join(name for name, _ in self._chain)
        self._head = _MARK + self._names.encode() + b"\0"

    def __bool__(self) -> bool:
        return bool(self._chain)

    # --- bytes ------------------------------------------------------------------------------------------

    @overload
    def encode(self, data: bytes, what: str = ...) -> bytes: ...
    @overload
    def encode(self, data: bytes | None, what: str = ...) -> bytes | None: ...

    def encode(self, data: bytes | None, what: str = "a value") -> bytes | None:
        """What is stored of a value.

        Raises:
          CodecFailed: a codec failed.
          PayloadTooLarge: what came out is over the cap.
        """
        if data is None or not self._chain:
            return data
        data = self._head + self._through(data, what)
        if len(data) > MAX_PAYLOAD:
            raise PayloadTooLarge(
                f"{what} would be {len(data):,} bytes once encoded, the cap is {MAX_PAYLOAD:,}: "
                "keep the data elsewhere and pass a reference to it."
            )
        return data

    @overload
    def decode(self, data: bytes, what: str = ...) -> bytes: ...
    @overload
    def decode(self, data: bytes | None, what: str = ...) -> bytes | None: ...

    def decode(self, data: bytes | None, what: str = "a value") -> bytes | None:
        """The value behind what is stored.

        Raises:
          CodecFailed: it was encoded by a codec that is not known here, or a codec failed.
        """
        if data is None or not data.startswith(_MARK):
            return data
        names, _, body = data[len(_MARK) :].partition(b"\0")
        return self._back(names.decode("ascii", "replace"), body, what)

    def _through(self, data: bytes, what: str) -> bytes:
        for name, through in self._chain:
            try:
                data = _checked(through(data))
            except Exception as e:
                raise CodecFailed(f"the codec {name!r} could not encode {what}: {type(e).__name__}: {e}") from e
        return data

    def _back(self, names: str, body: bytes, what: str) -> bytes:
        for name in reversed(names.split(",")):
            decode = self._known.get(name)
            if decode is None:
                known = ", ".join(self._known) or "none"
                raise CodecFailed(
                    f"{what} was encoded by the codec {name!r}, and this broker does not know it (it knows {known}): "
                    "give DurableBroker(codecs=[...]) every codec that stored values went through, as "
                    "decode_only(codec) if it is not to be used for new ones"
                )
            try:
                body = _checked(decode(body))
            except Exception as e:
                raise CodecFailed(f"the codec {name!r} could not decode {what}: {type(e).__name__}: {e}") from e
        return body

    # --- texts ------------------------------------------------------------------------------------------

    def encode_text(self, text: str | None) -> str | None:
        """What is stored of a text that says what went wrong; where a codec fails, that is what it says."""
        if text is None or not self._chain:
            return text
        try:
            return self._as_text(text.encode("utf-8", "surrogatepass"), "a failure")
        except CodecFailed as e:
            return f"what went wrong cannot be shown: {e}"

    def decode_text(self, text: str | None) -> str | None:
        """The text behind what is stored; one that cannot be decoded here is named instead."""
        encoded = None if text is None else _TEXT.match(text)
        if text is None or encoded is None:
            return text
        body = _unpacked(encoded[2])
        try:
            opened = Codecs._back(self, encoded[1], body, "a failure").decode("utf-8", "surrogatepass")
        except CodecFailed:
            opened = placeholder(encoded[1], len(body))
        # The database counts behind it.
        return opened + text[encoded.end() :]

    def _as_text(self, data: bytes, what: str) -> str:
        return f"<encoded by {self._names}> {b64encode(self._through(data, what)).decode()}"

    def _from_text(self, encoded: re.Match[str], what: str) -> bytes:
        return self._back(encoded[1], _unpacked(encoded[2]), what)

    # --- events -----------------------------------------------------------------------------------------

    def seal(self, event: Event) -> Event:
        """What is stored of an event.  Raises as `encode`."""
        if not self._chain or event.type in _READABLE:
            return event
        return event._replace(
            payload=self.encode(event.payload, f"what {event.type} carries"),
            attributes=self.seal_facts(event.attributes),
        )

    def open(self, event: Event) -> Event:
        """The event behind what is stored.  Raises as `decode`."""
        payload, facts = event.payload, event.attributes
        if payload is not None and payload.startswith(_MARK):
            payload = self.decode(payload, f"what {event.type} carries")
        if facts:
            facts = self.open_facts(facts)
        if payload is event.payload and facts is event.attributes:
            return event
        return event._replace(payload=payload, attributes=facts)

    def seal_facts(self, facts: dict[str, Any] | None) -> dict[str, Any] | None:
        """What is stored of the facts of an event, or of those that a run is started with.  Raises as `encode`."""
        if not facts or not self._chain:
            return facts
        sealed = dict(facts)
        for name, value in facts.items():
            if name in _VALUES and value is not None:
                sealed[name] = self._as_text(encode(value), f"the {name}")
            elif name in _NESTS and isinstance(value, dict):
                sealed[name] = self.seal_facts(value)
            elif name == "failure" and isinstance(value, dict):
                sealed[name] = self._seal_failure(value)
        return sealed

    def open_facts(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts behind what is stored.  Raises as `decode`."""
        opened: dict[str, Any] = {}
        for name, value in facts.items():
            found: Any = value
            if name in _VALUES and isinstance(value, str):
                encoded = _TEXT.fullmatch(value)
                if encoded is not None:
                    found = loads(self._from_text(encoded, f"the {name}"))
            elif name == _REASON and isinstance(value, str):
                found = self.decode_text(value)
            elif name in _NESTS and isinstance(value, dict):
                found = self.open_facts(value)
            elif name == "failure" and isinstance(value, dict):
                found = self._open_failure(value)
            if found is not value:
                opened[name] = found
        return {**facts, **opened} if opened else facts

    def seal_json(self, text: str | None) -> str | None:
        """`seal_facts`, from JSON to JSON."""
        if text is None or not self._chain:
            return text
        return json.dumps(self.seal_facts(json.loads(text)))

    def open_memo(self, text: str | None) -> dict[str, Any]:
        """The memo behind the JSON that is stored of it; empty where there is none."""
        try:
            memo = json.loads(text) if text else {}
        except RecursionError:  # no client of ours writes that
            return {}
        opened: dict[str, Any] = self.open_facts({"memo": memo})["memo"]
        return opened

    def _seal_failure(self, failure: Mapping[str, Any]) -> dict[str, Any]:
        """Its kind, and whether another try may help, stay readable: operators and procedures go by it."""
        telling = {name: failure[name] for name in _TELLING if name in failure}
        sealed = {name: value for name, value in failure.items() if name not in _TELLING}
        sealed["encoded"] = self._as_text(encode(telling), "a failure")
        return sealed

    def _open_failure(self, failure: dict[str, Any]) -> dict[str, Any]:
        text = failure.get("encoded")
        encoded = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if encoded is None:
            return self._open_last(failure)
        telling = loads(self._from_text(encoded, "a failure"))
        opened = {name: value for name, value in failure.items() if name != "encoded"}
        return {**opened, **(telling if isinstance(telling, dict) else {"message": telling})}

    def _open_last(self, failure: dict[str, Any]) -> dict[str, Any]:
        """An activity whose time is over has the failure of its last attempt as the cause: it is the database that says
        so, which takes its kind from a text that it cannot read."""
        cause = failure.get("cause")
        encoded = _TEXT.match(str(cause.get("type"))) if isinstance(cause, dict) else None
        if not isinstance(cause, dict) or encoded is None:
            return failure
        said = self._from_text(encoded, "a failure").decode("utf-8", "surrogatepass")
        kind, _, message = said.partition(": ")
        rest = cause["type"][encoded.end() :]
        return {**failure, "cause": {**cause, "type": kind, "message": message + rest}}


class ShownCodecs(Codecs):
    """Codecs for people: what cannot be decoded here is named instead."""

    def _back(self, names: str, body: bytes, what: str) -> bytes:
        try:
            return super()._back(names, body, what)
        except CodecFailed:
            return encode(placeholder(names, len(body)))


def placeholder(names: str, size: int) -> str:
    """What stands for a value that cannot be decoded here."""
    return f"<encoded by {names.replace(',', ', ')}, {size:,} bytes>"


def is_encoded(data: bytes) -> bool:
    """Whether stored bytes went through a codec."""
    return data.startswith(_MARK)


def _checked(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise DurableError(f"it answered a {type(data).__name__}, not bytes")
    return data


def _unpacked(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except binascii.Error:
        # Cut off, it is what no codec can decode.
        return b""
