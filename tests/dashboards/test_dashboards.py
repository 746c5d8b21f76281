"""The dashboards are what the code builds, ask for what there is, and say what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import grafana
from dramatiq_durable.metrics.catalogue import CATALOGUE, EXPORTER, GAUGES
from tests.dashboards.reading import DASHBOARDS, FOLDER, LABELS, check, panels, parts, queries, selected

#: Grafana's names of units.
UNITS = {"short", "s", "bytes", "cps", "percentunit", "bool_on_off", "bool_yes_no"}

each = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_what_is_committed_is_what_the_code_builds() -> None:
    built = grafana.built()
    assert {path.name for path in DASHBOARDS} == set(built)
    for path in DASHBOARDS:
        assert path.read_text() == built[path.name], f"{path.name} is not up to date: python -m grafana"


@each
def test_the_schema_has_all_that_is_there(path: Path) -> None:
    # Grafana's schema drops what it does not know, and refuses what has another type.  What its classes add by
    # themselves is taken out again.
    again = json.loads(json.dumps(Dashboard.from_json(read(path)), cls=JSONEncoder))
    assert [link.pop("placement") for link in again["links"]] == ["inControlsMenu"]
    for variable in again["templating"]["list"]:
        assert [variable.pop(name) for name in ("auto", "auto_count", "auto_min")] == [False, 30, "10s"]
    assert again == read(path)


@each
def test_every_panel_says_what_it_shows(path: Path) -> None:
    shown = panels(read(path))
    assert len({panel["title"] for panel in shown if panel["type"] == "timeseries"}) > 5
    for panel in shown:
        where = f"{path.stem}: {panel['title']}"
        assert panel["title"], where
        assert len(panel["description"]) > 5, where
        assert panel["description"].endswith("."), where
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, where
        assert defaults["noValue"], where
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, where
        assert panel["targets"], where
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), where
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], where
            # A number has no legend, a line has one that tells it from the others.
            assert ("legendFormat" in target) == (panel["type"] == "timeseries"), where
        if panel["type"] == "timeseries":
            assert defaults["min"] == 0, where
            assert panel["options"]["legend"]["showLegend"], where


@each
def test_panels_are_side_by_side(path: Path) -> None:
    everything = read(path)["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: dict[tuple[int, int], str] = {}
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} is on {taken[x, y]}"
                taken[x, y] = panel["title"]


@each
def test_its_defaults_are_sane(path: Path) -> None:
    page = read(path)
    assert page["uid"] == f"dramatiq-durable-{path.stem}"
    assert page["description"]
    assert page["title"].startswith("dramatiq_durable: ")
    assert page["time"] == {"from": "now-1h", "to": "now"}
    assert page["refresh"] == "30s"
    assert page["tags"] == ["dramatiq-durable"]
    (link,) = page["links"]
    assert link["tags"] == page["tags"]
    assert link["includeVars"]
    assert link["keepTime"]


@each
def test_variables_are_declared_and_used(path: Path) -> None:
    page = read(path)
    variables = {variable["name"]: variable for variable in page["templating"]["list"]}
    asked = " ".join(target["expr"] for panel in panels(page) for target in panel["targets"])
    used = {name for name in re.findall(r"\$\{?(\w+)", asked) if not name.startswith("__")}
    assert used | {"datasource"} == set(variables)
    assert "namespace" in used
    for name in used:
        variable = variables[name]
        assert variable["multi"]
        assert variable["includeAll"]
        assert variable["allValue"] == ".*"
        assert variable["current"]["value"] == ["$__all"]
        selector = re.fullmatch(rf"label_values\((.*), {name}\)", variable["query"]["query"])
        assert selector
        check(f"{path.stem}: ${name}", selector[1].replace('"$namespace"', '".*"'))
    # Several may be chosen: Grafana makes one regular expression of them.
    assert not re.search(r'[^~]"\$', asked)


def test_every_query_parses_and_asks_for_what_is_in_the_catalogue() -> None:
    shown = set()
    for query in queries():
        names = check(query.where, query.filled())
        shown |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
        # Of a counter its rate is asked for, over Grafana's interval.
        if any(name.endswith(("_total", "_bucket", "_sum", "_count")) for name in names):
            assert "[$__rate_interval]" in query.text or "[$__range]" in query.text, query.where
    # What is counted is to be seen somewhere.
    assert {metric.name for metric in CATALOGUE} - shown == set()


def test_figures_are_put_together_rightly() -> None:
    gauges = {metric.name for metric in (*EXPORTER, *GAUGES)}
    histograms = {metric.name + "_bucket" for metric in CATALOGUE if metric.type == "histogram"}
    for query in queries():
        expression = promql_parser.parse(query.filled())
        for inner in parts(expression):
            if isinstance(inner, promql_parser.AggregateExpr) and isinstance(inner.expr, promql_parser.VectorSelector):
                # Two exporters of a namespace say the same: it is not added up.
                assert inner.expr.name in gauges, query.where
                assert str(inner.op) in ("max", "min"), query.where
            if isinstance(inner, promql_parser.Call):
                names = {selector.name for selector in selected(inner)}
                # What grows is asked for by its rate, and what does not grow has none.
                assert names.isdisjoint(gauges), query.where
                assert inner.func.name in ("rate", "increase", "histogram_quantile", "time"), query.where
                if inner.func.name == "histogram_quantile":
                    assert names <= histograms, query.where
                    assert "le" in inner.args[1].modifier.labels, query.where
            if isinstance(inner, promql_parser.BinaryExpr) and str(inner.op) == "/":
                # Where there is nothing to divide by, there is nothing to show.
                assert str(inner.rhs).strip("()").endswith("> 0"), query.where


def test_what_is_chosen_is_asked_for_everywhere() -> None:
    for query in queries():
        page = query.where.partition(":")[0]
        for selector in selected(promql_parser.parse(query.chosen())):
            chosen = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
            assert chosen["namespace"] == "$namespace", query.where
            labels = LABELS[str(selector.name)]
            if page == "streams":
                assert chosen["stream"] == "$stream", query.where
            if page == "workflows" and "workflow" in labels and query.title != "Workflow tasks":
                assert "workflow" in chosen or "0 * count" in query.text, query.where
            if page == "workflows" and "stream" in labels:
                assert chosen["stream"] == "$stream", query.where


def test_provisioning() -> None:
    def provisioned(name: str) -> dict[str, Any]:
        (path,) = (FOLDER / "provisioning" / name).glob("*.yaml")
        return dict(yaml.safe_load(path.read_text()))

    (source,) = provisioned("datasources")["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"].startswith("http://")
    (provider,) = provisioned("dashboards")["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"] in (FOLDER.parent / "docs" / "metrics.md").read_text()
