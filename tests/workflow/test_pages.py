"""The examples of the pages on the life of runs, as their readers would run them."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable

import dramatiq
import pytest

import dramatiq_durable as durable
from tests.support import ROOT


@pytest.mark.parametrize("page", ["lifecycle", "children", "continue-as-new", "versioning"])
def test_the_example_of_a_page(
    broker: durable.DurableBroker, start_worker: Callable[[], dramatiq.Worker], page: str
) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    code, client = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    module = types.ModuleType(f"page_{page.replace('-', '_')}")
    sys.modules[module.__name__] = module
    exec(compile(code, page, "exec"), module.__dict__)
    start_worker()
    exec(compile(client, page, "exec"), module.__dict__)
    del sys.modules[module.__name__]
