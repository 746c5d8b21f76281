"""An exported history comes back as it was, byte for byte."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from dramatiq_durable.workflow.events import Event
from dramatiq_durable.workflow.export import export_history, load_history
from dramatiq_durable.workflow.info import Info, Parent

INFO = Info(
    workflow_id="order-7",
    run_id="0197a8f2-0000-7000-8000-000000000001",
    name="order",
    queue_name="orders",
    started_at=datetime(2026, 1, 31, 12, tzinfo=UTC),
    parent=Parent("day", "0197a8f2-0000-7000-8000-000000000002"),
)


def events_of(*payloads: bytes | None) -> list[Event]:
    return [Event(n, "SignalReceived", 1_769_860_800_000 + n, None, "s", p) for n, p in enumerate(payloads, 1)]


def test_what_was_exported_is_loaded() -> None:
    events = [
        Event(
            1, "WorkflowStarted", 1_769_860_800_123, None, "order", b'{"args":["o-7"],"kwargs":{}}', {"memo": {"a": 1}}
        ),
        Event(2, "TimerStarted", 1_769_860_800_124, 1, None, None, {"ms": 5}),
    ]
    info, loaded = load_history(export_history(INFO, events, "running"))
    assert (info, loaded) == (INFO, events)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        b"null",
        b'"\xed\xa0\x80"',  # half of a surrogate pair
        '{"ä":[1.5,-0.0,1e+100,12345678901234567890123]}'.encode(),
        b'{"b":1,"a":2}',
        b'{ "spaced": 1}',
        b'{"twice":1,"twice":2}',
        b"[NaN,Infinity]",
        b"\x00\xff not JSON",
        b'"\\u0000"',
    ],
)
def test_values_come_back_byte_for_byte(payload: bytes | None) -> None:
    text = export_history(INFO, events_of(payload))
    assert load_history(text)[1][0].payload == payload
    text.encode("ascii")
    json.loads(text, parse_constant=pytest.fail)


def test_values_are_readable_where_they_can_be() -> None:
    entry = json.loads(export_history(INFO, events_of(b'{"ok":true}')))["events"][0]
    assert entry["value"] == {"ok": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no exported history"),
        ('{"format": "other"}', "no exported history"),
        ('{"format": "dramatiq-durable-history", "version": 99}', "newer"),
        ('{"format": "dramatiq-durable-history", "version": 1}', "damaged"),
        ('{"format": "dramatiq-durable-history", "version": 1, "info": {}, "events": []}', "damaged"),
    ],
)
def test_what_is_no_history_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_history(text)


def test_a_gap_is_refused() -> None:
    text = export_history(INFO, [Event(2, "SignalReceived", 1)])
    with pytest.raises(ValueError, match="in the place of 1"):
        load_history(text)
    with pytest.raises(ValueError, match="has no events"):
        load_history(export_history(INFO, []))
