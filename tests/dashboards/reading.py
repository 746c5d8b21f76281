"""Reads what Grafana and Prometheus read: dashboards, rules, and the queries in both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
import yaml

from dramatiq_durable.metrics.catalogue import CATALOGUE
from tests.support import ROOT

FOLDER = ROOT / "grafana"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
RULES = FOLDER / "alerts" / "rules.yaml"
CASES = FOLDER / "alerts" / "tests.yaml"

#: The labels of each name that may stand in a query.
LABELS: dict[str, set[str]] = {}
for metric in CATALOGUE:
    labels = {"namespace", "job", "instance", *metric.labels}
    if metric.type == "histogram":
        LABELS |= {metric.name + suffix: labels for suffix in ("_sum", "_count")}
        LABELS[metric.name + "_bucket"] = {*labels, "le"}
    else:
        LABELS[metric.name] = labels
#: What Prometheus itself says: whether it reaches a target, and which alerts there are.
LABELS["up"] = {"job", "instance"}
LABELS["ALERTS"] = {"alertname", "alertstate", "severity", *(label for metric in CATALOGUE for label in metric.labels)}
LABELS["ALERTS"] |= {"namespace", "job", "instance"}


@dataclass(frozen=True)
class Query:
    """A query of a panel.

    Attributes:
      where(str): the dashboard, and the panel.
      title(str): the panel's.
      text(str): as it is written.
      instant(bool): it is asked for one moment.
    """

    where: str
    title: str
    text: str
    instant: bool

    def chosen(self) -> str:
        """As it is parsed, with the variables of what is chosen in it."""
        return self.text.replace("$__rate_interval", "5m").replace("$__range", "1h")

    def filled(self, *, rate: str = "5m", range: str = "1h") -> str:
        """As Grafana asks it when everything is chosen."""
        text = self.text.replace("$__rate_interval", rate).replace("$__range", range)
        for name in ("namespace", "stream", "workflow"):
            text = text.replace(f'"${name}"', '".*"')
        assert "$" not in text, f"{self.where}: {text}"
        return text


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels with queries."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Those of all panels of all dashboards."""
    found = []
    for path in DASHBOARDS:
        for panel in panels(json.loads(path.read_text())):
            for target in panel["targets"]:
                where = f"{path.stem}: {panel['title']}: {target['refId']}"
                found.append(Query(where, panel["title"], target["expr"], target["instant"]))
    return found


def rules() -> list[dict[str, Any]]:
    """The alerts."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def parts(expression: promql_parser.Expr) -> list[Any]:
    """All that an expression is made of, each once."""
    found: list[Any] = []

    def visit(e: Any) -> None:
        if isinstance(e, promql_parser.MatrixSelector):
            e = e.vector_selector
        if e not in found:
            found.append(e)

    promql_parser.walk(expression, visit)
    return found


def near(rule: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether a case has something of what an alert asks for."""
    there = {re.split(r"[{ ]", series["series"])[0] for series in case["input_series"]}
    asked = {str(selector.name) for selector in selected(promql_parser.parse(rule["expr"]))} - {"up", "ALERTS"}
    return not asked.isdisjoint(there)


def selected(expression: promql_parser.Expr) -> Iterator[promql_parser.VectorSelector]:
    """What an expression selects."""
    yield from (part for part in parts(expression) if isinstance(part, promql_parser.VectorSelector))


def aggregated(expression: promql_parser.Expr) -> Iterator[promql_parser.AggregateExpr]:
    """The aggregations in an expression that name labels."""
    for part in parts(expression):
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            yield part


def check(where: str, text: str) -> set[str]:
    """A query parses, and its metrics and labels are in the catalogue.  Answers the metrics."""
    expression = promql_parser.parse(text)
    names = set()
    for selector in selected(expression):
        assert selector.name in LABELS, f"{where}: the catalogue has no {selector.name}"
        names.add(selector.name)
        for matcher in selector.matchers.matchers:
            assert matcher.name in LABELS[selector.name], f"{where}: {selector.name} has no label {matcher.name}"
    for aggregation in aggregated(expression):
        for selector in selected(aggregation.expr):
            more = set(aggregation.modifier.labels) - LABELS[selector.name]
            assert not more, f"{where}: {selector.name} has no labels {more}"
    assert names, where
    return names
