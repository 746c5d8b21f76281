"""Every alert asks for what there is, says what to do, and has a case in which it fires and one where it does not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from click import Command, Context, Group, UsageError

from dramatiq_durable.cli import main
from tests.dashboards.reading import CASES, LABELS, check, near, rules
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


def left(expression: str) -> set[str]:
    """The labels that an expression's series have: those of what stands first in it."""
    parsed = promql_parser.parse(expression)
    while isinstance(parsed, promql_parser.BinaryExpr | promql_parser.ParenExpr | promql_parser.Call):
        if isinstance(parsed, promql_parser.BinaryExpr):
            parsed = parsed.lhs
        else:
            parsed = parsed.expr if isinstance(parsed, promql_parser.ParenExpr) else parsed.args[-1]
    if isinstance(parsed, promql_parser.AggregateExpr):
        labels = set(parsed.modifier.labels)
        return labels if "By" in str(parsed.modifier.type) else left(str(parsed.expr)) - labels
    return LABELS[parsed.name]


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
        assert label in left(rule["expr"]), label


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    assert set(re.findall(r"DramatiqDurable\w+", RUNBOOK)) == {rule["alert"] for rule in rules()}


#: What stands for what whoever reads it is to put there.
FILLED = {
    "STREAM": "payments", "ID": "7", "NAME": "it", "EVENT": "7", "ROLE": "clerk", "START": "2026-01-31T00:00Z",
    "END": "2026-02-01T00:00Z", "...": "postgresql://localhost/shop",
}  # fmt: skip


def commands(text: str) -> set[str]:
    """The commands of ours that a text names, with their options."""
    return {found.strip() for found in re.findall(r"dramatiq-durable ([a-z-][^\n`]*)", text)}


def understood(line: str) -> Context:
    """The command as the program understands it; nothing is done."""
    words = [FILLED.get(word, word) for word in shlex.split(line) if word != "--help"]
    command: Command = main
    context = Context(main, info_name="dramatiq-durable")
    while isinstance(command, Group):
        _, words, _ = command.make_parser(context).parse_args(words)
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        context = Context(command, parent=context, info_name=name)
    return command.make_context(context.info_name, words, parent=context.parent)


def test_the_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.json").touch()
    said = commands(RUNBOOK)
    for rule in rules():
        notes = commands(re.sub(r"\{\{.*?\}\}", "shop", rule["annotations"]["description"]))
        # The runbook's first lines set the namespace; who reads an alert has only that.
        assert all(line.startswith("--namespace shop ") for line in notes), rule["alert"]
        said |= notes
    assert len(said) > 40
    for line in sorted(said):
        understood(line)
    # What is refused is refused here too.
    for wrong in (
        "stream peak payments",
        "stream peek",
        "dead-letter list --reasons x",
        "dead-letter list --reason no",
    ):
        with pytest.raises(UsageError):
            understood(wrong)


def test_each_has_a_firing_and_a_quiet_case() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fires: set[str] = set()
    quiet: set[str] = set()
    for case in cases:
        (test,) = case["promql_expr_test"]
        # All that fire are listed, so what is not there does not.
        assert test["expr"].startswith("count by (alertname, ")
        names = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in test["exp_samples"]}
        fires |= names
        quiet |= {rule["alert"] for rule in rules() if rule["alert"] not in names and near(rule, case)}
    assert fires == quiet == {rule["alert"] for rule in rules()}
