"""The chain of codecs by itself."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dramatiq_durable import CodecFailed, InvalidName, PayloadTooLarge, codecs, decode_only
from dramatiq_durable.codecs import Codecs, ShownCodecs, is_encoded
from dramatiq_durable.workflow.events import Event
from examples.codecs import Compress, Encrypt

OLD, NEW = os.urandom(32), os.urandom(32)


class Shift:
    """Adds to each byte."""

    def __init__(self, name: str, by: int) -> None:
        self.name = name
        self.by = by

    def encode(self, data: bytes) -> bytes:
        return bytes((b + self.by) % 256 for b in data)

    def decode(self, data: bytes) -> bytes:
        return bytes((b - self.by) % 256 for b in data)


class Broken:
    name = "broken"

    def encode(self, data: bytes) -> Any:
        raise ConnectionError("the key service is away")

    def decode(self, data: bytes) -> Any:
        return "text"


def test_the_first_encodes_first_and_the_names_stand_beside() -> None:
    chain = Codecs([Compress(), Shift("shift", 1)])
    data = b"x" * 1000
    stored = chain.encode(data)
    assert stored.startswith(b"\0codec:zlib,shift\0")
    assert len(stored) < 100
    assert chain.decode(stored) == data
    assert Codecs([Shift("shift", 1), Compress()]).decode(stored) == data


def test_without_codecs_values_stay_as_they_are() -> None:
    none = Codecs()
    assert not none
    event = Event(2, "ActivityScheduled", 0, 1, "charge", b"{}", {"hash": "ab"})
    assert none.seal(event) is event
    assert none.open(event) is event
    assert none.encode(None) is None
    assert none.encode_text("text") == "text"


def test_what_was_stored_before_a_codec_came_stays_readable() -> None:
    chain = Codecs([Shift("shift", 1)])
    assert chain.decode(b'{"a": 1}') == b'{"a": 1}'
    assert chain.decode_text("boom") == "boom"
    facts = {"memo": {"a": 1}, "hash": "0123456789abcdef", "failure": {"type": "E", "message": "boom"}}
    assert chain.open_facts(facts) is facts


def test_a_codec_that_only_decodes_is_not_used_for_what_is_new() -> None:
    stored = Codecs([Shift("old", 1)]).encode(b"value")
    rotated = Codecs([Shift("new", 2), decode_only(Shift("old", 1))])
    assert rotated.decode(stored) == b"value"
    assert rotated.encode(b"value").startswith(b"\0codec:new\0")
    retired = Codecs([decode_only(Shift("old", 1))])
    assert not retired
    assert retired.encode(b"value") == b"value"
    assert retired.decode(stored) == b"value"


def test_keys_are_rotated() -> None:
    stored = Codecs([Encrypt({"2025": OLD}, "2025")]).encode(b"value")
    assert b"value" not in stored
    assert stored != Codecs([Encrypt({"2025": OLD}, "2025")]).encode(b"value")
    both = Codecs([Encrypt({"2025": OLD, "2026": NEW}, "2026")])
    assert both.decode(stored) == b"value"
    assert both.decode(both.encode(b"value")) == b"value"
    with pytest.raises(CodecFailed, match=r"'aes-gcm' could not decode the input: LookupError: there is no key '2025'"):
        Codecs([Encrypt({"2026": NEW}, "2026")]).decode(stored, "the input")
    with pytest.raises(CodecFailed, match="InvalidTag"):
        both.decode(stored[:-1] + bytes([stored[-1] ^ 1]))


def test_an_unknown_codec_is_named() -> None:
    stored = Codecs([Shift("old", 1)]).encode(b"value")
    with pytest.raises(CodecFailed, match=r"the input was encoded by the codec 'old', .* \(it knows new\)"):
        Codecs([Shift("new", 1)]).decode(stored, "the input")


def test_a_codec_that_fails_is_named() -> None:
    with pytest.raises(CodecFailed, match="'broken' could not encode the input: ConnectionError: the key service"):
        Codecs([Broken()]).encode(b"x", "the input")
    with pytest.raises(CodecFailed, match="answered a str, not bytes"):
        Codecs([Broken()]).decode(b"\0codec:broken\0x")
    assert "the key service is away" in str(Codecs([Broken()]).encode_text("boom"))


def test_what_is_no_codec_is_refused() -> None:
    with pytest.raises(TypeError, match="a codec is an object"):
        Codecs([Compress])  # type: ignore[list-item]
    with pytest.raises(InvalidName, match="unique"):
        Codecs([Compress(), Compress()])
    with pytest.raises(InvalidName, match="'a,b'"):
        Codecs([Shift("a,b", 1)])


def test_the_cap_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MAX_PAYLOAD", 100)
    with pytest.raises(PayloadTooLarge, match="once encoded"):
        Codecs([Shift("shift", 1)]).encode(b"x" * 99)


def test_events_are_sealed_and_what_the_database_reads_stays() -> None:
    chain = Codecs([Encrypt({"k": OLD}, "k")])
    event = Event(
        5,
        "ChildStarted",
        0,
        3,
        "ship",
        b'{"args":["s3cret"],"kwargs":{}}',
        {
            "hash": "0123456789abcdef",
            "workflow_id": "w",
            "options": {
                "delay": 5,
                "facts": {"memo": {"who": "s3cret"}, "headers": {"t": "s3cret"}, "search": {"a": 1}},
            },
        },
    )
    sealed = chain.seal(event)
    assert "s3cret" not in repr(sealed)
    assert "0123456789abcdef" not in repr(sealed)
    assert sealed.attributes is not None
    assert sealed.attributes["workflow_id"] == "w"
    assert sealed.attributes["options"]["delay"] == 5
    assert sealed.attributes["options"]["facts"]["search"] == {"a": 1}
    assert isinstance(sealed.attributes["options"]["facts"]["memo"], str)
    assert chain.open(sealed) == event
    found = Event(6, "SearchUpserted", 0, None, None, b'{"a":1}', None)
    assert chain.seal(found) is found


def test_a_failure_keeps_its_kind_in_the_open() -> None:
    chain = Codecs([Encrypt({"k": OLD}, "k")])
    failure = {
        "type": "Declined",
        "message": "s3cret card",
        "traceback": "s3cret line",
        "retryable": False,
        "attempt": 2,
        "cause": {"type": "E", "message": "s3cret"},
    }
    sealed = chain.seal_facts({"failure": failure})
    assert sealed is not None
    assert "s3cret" not in repr(sealed)
    assert {k: sealed["failure"][k] for k in ("type", "retryable", "attempt")} == {
        "type": "Declined",
        "retryable": False,
        "attempt": 2,
    }
    assert chain.open_facts(sealed) == {"failure": failure}


def test_people_see_what_they_cannot_read_named() -> None:
    chain = Codecs([Compress(), Shift("shift", 1)])
    stored = chain.encode(b"{}")
    assert is_encoded(stored)
    shown = ShownCodecs()
    assert shown.decode(stored) == b'"<encoded by zlib, shift, 3 bytes>"'
    assert shown.open_memo('{"a": 1}') == {"a": 1}
    text = chain.encode_text("boom")
    assert text is not None
    assert "boom" not in text
    assert shown.decode_text(text) == "<encoded by zlib, shift, 5 bytes>" == Codecs().decode_text(text)
    assert chain.decode_text(text) == "boom"
    sealed = chain.seal_facts({"memo": {"a": 1}, "failure": {"type": "E", "message": "boom"}})
    assert sealed is not None
    opened = shown.open_facts(sealed)
    assert opened["memo"].startswith("<encoded by zlib, shift")
    assert opened["failure"]["message"].startswith("<encoded by zlib, shift")
