"""What the dashboards are made of: pages, rows, panels and variables with our defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

#: What all of them have, so that each links to the others.
TAG = "dramatiq-durable"

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

#: The variables that a page may have, and where their values come from.
VARIABLES = {
    "stream": 'label_values(dramatiq_durable_stream_ready_messages{namespace=~"$namespace"}, stream)',
    "workflow": 'label_values(dramatiq_durable_workflow_steps_total{namespace=~"$namespace"}, workflow)',
}

#: A query, and how its series are called.
Query = tuple[str, str]


class Page:
    """A dashboard under construction: rows of panels, each row filled from the left.

    Parameters:
      uid(str): what it has in links.
      title(str): of the page.
      description(str): what it is for.
      variables(str): of `VARIABLES`, besides the data source and the namespace.
    """

    def __init__(self, uid: str, title: str, description: str, *variables: str) -> None:
        self._dashboard = (
            builders.Dashboard(f"dramatiq_durable: {title}")
            .uid(f"dramatiq-durable-{uid}")
            .description(description)
            .tags([TAG])
            .time("now-1h", "now")
            .refresh("30s")
            .timezone("browser")
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .readonly()
            .link(
                builders.DashboardLink("dramatiq_durable")
                .type(models.DashboardLinkType.DASHBOARDS)
                .tags([TAG])
                .as_dropdown(True)
                .include_vars(True)
                .keep_time(True)
            )
            .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_variable("namespace", "label_values(dramatiq_durable_up, namespace)"))
        )
        for name in variables:
            self._dashboard.with_variable(_variable(name, VARIABLES[name]))
        self._panels = 0
        self._x = self._y = self._height = 0

    def row(self, title: str) -> None:
        """Begin a row with a heading."""
        self._y += self._height
        self._dashboard.with_row(
            builders.Row(title).id(self._next()).grid_pos(models.GridPos(h=1, w=24, x=0, y=self._y))
        )
        self._x, self._y, self._height = 0, self._y + 1, 0

    def number(
        self,
        title: str,
        description: str,
        query: str,
        *,
        unit: str = "short",
        warn: float | None = None,
        bad: float | None = None,
        low_is_bad: bool = False,
        instant: bool = True,
    ) -> None:
        """One number, as it is now; from ``warn`` on yellow, from ``bad`` on red."""
        first, last = ("red", "green") if low_is_bad else ("green", "red")
        steps = [models.Threshold(None, first)]
        if warn is not None:
            steps.append(models.Threshold(warn, "yellow"))
        if bad is not None:
            steps.append(models.Threshold(bad, last))
        target = _target(0, (query, ""))
        panel = (
            stat.Panel()
            .thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
            .color_mode(common.BigValueColorMode.VALUE)
            .graph_mode(common.BigValueGraphMode.NONE if instant else common.BigValueGraphMode.AREA)
            .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
            .with_target(target.instant() if instant else target.range())
        )
        self._add(panel, title, description, unit, width=4, height=4)

    def lines(
        self,
        title: str,
        description: str,
        *queries: Query,
        unit: str = "short",
        width: int = 8,
        stacked: bool = False,
        highest: float | None = None,
    ) -> None:
        """Lines over time; with the last and the greatest value of each in the legend."""
        panel = (
            timeseries.Panel()
            .draw_style(common.GraphDrawStyle.LINE)
            .line_width(1)
            .fill_opacity(20 if stacked else 5)
            .show_points(common.VisibilityMode.AUTO)
            .min(0)
            .legend(
                common_builders.VizLegendOptions()
                .display_mode(common.LegendDisplayMode.TABLE)
                .placement(common.LegendPlacement.BOTTOM)
                .show_legend(True)
                .calcs(["lastNotNull", "max"])
                .sort_by("Max")
                .sort_desc(True)
            )
            .tooltip(
                common_builders.VizTooltipOptions()
                .mode(common.TooltipDisplayMode.MULTI)
                .sort(common.SortOrder.DESCENDING)
            )
            .targets([_target(n, query).range() for n, query in enumerate(queries)])
        )
        if stacked:
            panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
        if highest is not None:
            panel.max(highest)
        self._add(panel, title, description, unit, width=width, height=8)

    def build(self) -> models.Dashboard:
        """The dashboard."""
        return self._dashboard.build()

    def _add(self, panel: Any, title: str, description: str, unit: str, *, width: int, height: int) -> None:
        if self._x + width > 24:
            self._x, self._y, self._height = 0, self._y + self._height, 0
        place = models.GridPos(h=height, w=width, x=self._x, y=self._y)
        self._x, self._height = self._x + width, max(self._height, height)
        self._dashboard.with_panel(
            panel.id(self._next())
            .title(title)
            .description(description)
            .datasource(SOURCE)
            .unit(unit)
            .no_value("nothing")
            .grid_pos(place)
        )

    def _next(self) -> int:
        self._panels += 1
        return self._panels


def rate(metric: str, by: Sequence[str], where: str, suffix: str = "") -> str:
    """How often something is counted a second, by labels."""
    return f"sum by ({', '.join(by)}) (rate(dramatiq_durable_{metric}{suffix}{{{where}}}[$__rate_interval]))"


def quantile(q: float, metric: str, by: Sequence[str], where: str) -> str:
    """A quantile of a histogram, by labels."""
    return f"histogram_quantile({q}, {rate(metric, [*by, 'le'], where, '_bucket')})"


def gauge(metric: str, by: Sequence[str], where: str) -> str:
    """A gauge of the exporter, by labels; two exporters of the same namespace say it once."""
    return f"max by ({', '.join(by)}) (dramatiq_durable_{metric}{{{where}}})"


def share(part: str, whole: str) -> str:
    """One query by another, on the same labels; nothing where there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


def or_none(query: str, known: str) -> str:
    """0 where a query finds nothing, as long as something is known at all: missing figures are no good news."""
    return f"{query} or 0 * count({known})"


def _variable(name: str, query: str) -> Any:
    return (
        builders.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query({"query": query, "refId": "variable"})
        .definition(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text=["All"], value=["$__all"], selected=True))
    )


def _target(n: int, query: Query) -> Any:
    expression, legend = query
    target = prometheus.Dataquery().expr(expression).ref_id("ABCDEFGH"[n]).datasource(SOURCE)
    return target.legend_format(legend) if legend else target
