"""Some of the tests of queues and workflows again, every broker on a login that may do only what the test declares.

`make test-scoped` runs them all so.
"""

from __future__ import annotations

import pytest

from tests.support import scoped
from tests.support.processes import SCOPED


@pytest.fixture(autouse=True)
def scoped_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SCOPED, "on")
    scoped.install(monkeypatch.setattr)
