"""Every block of Python on every page of docs/ is run.

A comment in front of a block says how::

    <!-- pytest -->               it is a file of tests, which pytest runs
    <!-- tested in FILE -->       that test runs it, and names the page
    <!-- fragment -->             it is not a program: only its syntax and its names are looked at

A block without one is either a file in examples/, word for word (a test of that file runs it), or a part of the page's
program: the blocks of a page are run one after another, with a broker on a fresh database and a worker running.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dramatiq_durable as durable
import dramatiq_durable.testing
from dramatiq_durable.settings import Settings
from tests.support import ROOT
from tests.support.processes import Processes

PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = {path.read_text(): path for path in (ROOT / "examples").rglob("*.py")}

PRELUDE = """
import asyncio, os
from datetime import timedelta

import dramatiq
import dramatiq_durable as durable

broker = durable.DurableBroker()
dramatiq.set_broker(broker)
worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=4)
worker.start()
"""
END = """
    worker.stop()
    broker.close()
"""


class Block(NamedTuple):
    """A block of Python, without the indentation of a list that it may stand in."""

    line: int
    marker: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"(?:^ *<!-- ([^\n]+?) -->\n)?^( *)```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(text.count("\n", 0, m.start(3)), m[1] or "", re.sub(f"^{m[2]}", "", m[3], flags=re.MULTILINE))
        for m in found
    ]


def program(page: Path) -> str:
    """The parts of the page's program, at the lines at which they are on the page."""
    lines: list[str] = []
    for block in blocks(page):
        if not block.marker and block.code not in EXAMPLES:
            lines += [""] * (block.line - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_exist_and_markers_are_known(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        for node in ast.walk(ast.parse(block.code, where)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "durable":
                assert hasattr(durable, node.attr), f"{where}: there is no durable.{node.attr}"
        if block.marker.startswith("tested in "):
            test = ROOT / block.marker.removeprefix("tested in ")
            assert page.name in test.read_text(), f"{where}: {test} says nothing of the page"
        else:
            assert block.marker in ("", "pytest", "fragment"), f"{where}: no such marker: {block.marker!r}"
        if block.code in EXAMPLES:
            example = EXAMPLES[block.code].relative_to(ROOT)
            module = ".".join(example.with_suffix("").parts)
            tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
            assert any(module in test or str(example) in test for test in tests), f"no test runs {example}"


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=lambda page: page.stem)
def test_the_page_runs(page: Path, run_process: Processes, database_url: str, tmp_path: Path) -> None:
    path = tmp_path / f"{page.stem.replace('-', '_')}.py"
    path.write_text(program(page))
    # The page's lines have their own numbers in tracebacks.
    run = f"exec(compile(open({str(path)!r}).read(), {page.name!r}, 'exec'))"
    code = f"{PRELUDE}\ntry:\n    {run}\nfinally:\n{END}"
    process = run_process.python(code, env={"DRAMATIQ_DURABLE_URL": database_url})
    assert process.wait(timeout=60) == 0, process.output


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.marker == "pytest" for b in blocks(page))], ids=lambda page: page.stem
)
def test_the_tests_of_the_page_pass(page: Path, run_process: Processes, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.marker == "pytest":
            name = re.match(r"# (\w+\.py)\n", block.code)
            (tmp_path / (name[1] if name else f"test_line_{block.line}.py")).write_text(block.code)
    arguments = (
        "-p",
        "pytest_dramatiq_durable",
        "-p",
        "no:cacheprovider",
        "-q",
        "-W",
        "error",
        "--rootdir",
        str(tmp_path),
    )
    process = run_process(
        sys.executable, "-m", "pytest", *arguments, str(tmp_path), env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )
    assert process.wait(timeout=100) == 0, process.output
    assert " passed" in process.output


def anchors(page: Path) -> set[str]:
    """What a forge makes of a page's titles."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]*))?\)", page.read_text()):
            leads = page.parent / target if target else page
            assert leads.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(leads), f"{page.name} links to {target}#{anchor}"


def test_every_setting_is_in_the_readme() -> None:
    code = [*(ROOT / "dramatiq_durable").rglob("*.py"), ROOT / "pytest_dramatiq_durable.py"]
    named = {name for path in code for name in re.findall(r"DRAMATIQ_DURABLE_[A-Z_]*[A-Z]", path.read_text())}
    told = set(re.findall(r"^\| `(DRAMATIQ_DURABLE_\w+)`", (ROOT / "README.md").read_text(), re.M))
    assert named <= told
    assert told >= {f"DRAMATIQ_DURABLE_{field.name.strip('_').upper()}" for field in dataclasses.fields(Settings)}


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index]
    assert not missing, f"docs/README.md does not link to {missing}"


def test_only_names_that_exist_are_said_to_be_ours() -> None:
    """The table of names of other systems: in its last column, what looks like a name of ours is one."""
    known = {*dir(durable), *dir(durable.WorkflowHandle), *dir(dramatiq_durable.testing), *dir(durable.Workflow)}
    known |= {*dir(durable.Activity), *dir(durable.schedules), *dir(durable.Info), *dir(durable.DurableBroker)}
    page = ROOT / "docs" / "coming-from.md"
    for line in page.read_text().splitlines():
        if line.startswith("| ") and not set(line) <= set("|- "):
            ours = line.rstrip("| ").rpartition("|")[2]
            for name in re.findall(r"`@?durable\.(\w+)", ours):
                assert name in known, f"{page.name} says durable.{name}"
