"""Importing the package is cheap, and gives every public name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dramatiq_durable as durable
from tests.support import ROOT

#: What a client or a worker may need later, and an import may not cost.
HEAVY = (
    "django",
    "sqlalchemy",
    "psycopg2",
    "prometheus_client",
    "opentelemetry",
    "rich",
    "click",
    "cronsim",
    "psycopg_pool",
    "pydantic",
    "starlette",
    "dramatiq_durable.cli",
    "dramatiq_durable.embedded",
    "dramatiq_durable.testing",
)


def loaded_by(*statements: str) -> set[str]:
    """The modules that a fresh interpreter has after these statements."""
    code = "; ".join([*statements, "import sys", "print(' '.join(sys.modules))"])
    command = [sys.executable, "-W", "error", "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


@pytest.fixture(scope="module")
def modules() -> set[str]:
    return loaded_by("import dramatiq_durable")


@pytest.mark.parametrize("name", HEAVY)
def test_nothing_heavy_is_imported(modules: set[str], name: str) -> None:
    assert not any(m == name or m.startswith(name + ".") for m in modules)


def test_it_costs_little_more_than_dramatiq_and_psycopg(modules: set[str]) -> None:
    base = loaded_by("import dramatiq", "import psycopg")
    more = {m for m in modules - base if not m.startswith("dramatiq_durable")}
    # Small modules of the standard library and of psycopg; a new dependency shows up here.
    assert {m.split(".")[0] for m in more} <= set(sys.stdlib_module_names) | {"psycopg", "psycopg_binary"}
    assert len(more) < 25, sorted(more)


def test_every_public_name_is_there() -> None:
    assert len(set(durable.__all__)) == len(durable.__all__)
    for name in durable.__all__:
        assert hasattr(durable, name), name
    for name in [
        *("DurableBroker", "workflow", "activity", "activity_stub", "activity_info", "transaction", "get_handle"),
        *("sleep", "now", "random", "uuid4", "uuid7", "info", "is_replaying", "logger"),
        *("wait_for_signal", "wait_condition", "DurableError", "Timeout"),
    ]:
        assert name in durable.__all__


def test_every_error_is_public() -> None:
    from dramatiq_durable import errors

    made_here = {n for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == errors.__name__}
    assert made_here <= set(durable.__all__)


def test_the_package_only_exports() -> None:
    tree = ast.parse((ROOT / "dramatiq_durable" / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}


def test_the_migrate_module_is_not_hidden_by_a_function() -> None:
    from dramatiq_durable.migrate import migrate

    assert callable(migrate)
    assert Path(durable.__file__).with_name("py.typed").exists()
