"""Every alert asks for what there is, says what to do, and has a case in which it fires and one where it does not."""

from __future__ import annotations

import re
from typing import Any

import promql_parser
import pytest
import yaml
from click import Group
from click.testing import CliRunner

from dramatiq_durable.cli import main
from tests.dashboards.reading import CASES, check, rules, selected
from tests.support import ROOT

RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

#: What is to have an alert.
WANTED = {
    "StuckStream", "DeadLettersGrowing", "PoisonMessages", "Nondeterminism", "TimersLate", "NoWorker", "Bloat",
    "XminHeld",
}  # fmt: skip

each = pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def metrics(text: str) -> set[str | None]:
    return {selector.name for selector in selected(promql_parser.parse(text))}


def test_what_is_wanted_is_there() -> None:
    names = [rule["alert"] for rule in rules()]
    assert {f"DramatiqDurable{name}" for name in WANTED} <= set(names)
    assert len(set(names)) == len(names)


@each
def test_its_query(rule: dict[str, Any]) -> None:
    check(rule["alert"], rule["expr"])


@each
def test_it_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert notes["summary"]
    assert notes["description"]
    page, _, anchor = notes["runbook_url"].partition("#")
    assert page == "docs/runbook.md"
    assert anchor in anchors(RUNBOOK)
    assert rule["alert"] in RUNBOOK
    # The labels that the text names are those that are left.
    for label in re.findall(r"\$labels\.(\w+)", notes["summary"] + notes["description"]):
        assert label in rule["expr"] or label in ("namespace", "stream", "table"), label


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    assert set(re.findall(r"DramatiqDurable\w+", RUNBOOK)) == {rule["alert"] for rule in rules()}


def commands(text: str) -> set[str]:
    """The commands of ours that a text names, with their options."""
    return {found.strip() for found in re.findall(r"dramatiq-durable ([a-z][^\n`]*)", text)}


def test_the_commands_are_there() -> None:
    said = commands(RUNBOOK)
    for rule in rules():
        text = re.sub(r"\{\{.*?\}\}", "X", rule["annotations"]["description"])
        said |= commands(text.replace("--namespace X ", ""))
    assert len(said) > 15
    for line in said:
        words = line.split()
        command: Any = main
        path = []
        while isinstance(command, Group) and words:
            path.append(words.pop(0))
            command = command.commands.get(path[-1]) or command.get_command(None, path[-1])  # type: ignore[arg-type]
            assert command is not None, line
        shown = CliRunner().invoke(main, [*path, "--help"]).output
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", shown), f"{line}: no {option}"


def test_each_has_a_firing_and_a_quiet_case() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fires: set[str] = set()
    quiet: set[str] = set()
    for case in cases:
        there = {re.split(r"[{ ]", series["series"])[0] for series in case["input_series"]}
        (test,) = case["promql_expr_test"]
        # All that fire are listed, so what is not there does not.
        assert test["expr"].startswith("count by (alertname, ")
        names = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in test["exp_samples"]}
        fires |= names
        quiet |= {rule["alert"] for rule in rules() if rule["alert"] not in names and metrics(rule["expr"]) & there}
    assert fires == quiet == {rule["alert"] for rule in rules()}
