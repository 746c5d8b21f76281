"""Every history that was ever recorded is replayed by the code at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import dramatiq_durable as durable
from dramatiq_durable.testing import Replayer

from .workflows import Feature, declare

FILES = sorted(Path(__file__).parent.glob("*.json"))


@pytest.fixture(scope="module")
def features() -> dict[str, Feature]:
    return declare(durable.DurableBroker("postgresql://nobody@127.0.0.1:1/nothing"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_history_is_replayed(path: Path, features: dict[str, Feature]) -> None:
    Replayer([features[path.stem].workflow]).replay(path)


def test_each_feature_has_its_history(features: dict[str, Feature]) -> None:
    missing = set(features) - {path.stem for path in FILES}
    assert not missing, f"record them: python -m tests.histories.record {' '.join(sorted(missing))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_difference_would_be_found(path: Path, features: dict[str, Feature]) -> None:
    """Without this, a replayer that compares nothing would pass, too."""
    text = path.read_text()
    other = re.sub(r'"hash": "\w{4}', '"hash": "0000', text, count=1)
    if other == text:
        other = re.sub(
            r'"ActivityScheduled"|"TimerStarted"|"Workflow(Completed|Failed)"', '"ChildStarted"', text, count=1
        )
    assert json.loads(other) != json.loads(text)
    with pytest.raises(durable.Nondeterminism):
        Replayer([features[path.stem].workflow]).replay(other)
