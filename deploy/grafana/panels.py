"""Building blocks of the dashboards: queries, panels, rows, and boards.

Knows Grafana's builders but no metric. `$__rate_interval` is Grafana's: four scrapes or more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "$__rate_interval"
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

AnyPanel = timeseries.Panel | stat.Panel | bargauge.Panel


@dataclass(frozen=True, slots=True)
class Query:
    """Args:
    legend: Grafana's template of label names; empty: the panel has only one series.
    """

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[AnyPanel]


@dataclass(frozen=True, slots=True)
class Variable:
    """A menu at the top of the dashboard, with the values of a metric's label."""

    name: str
    metric: str


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    description: str
    variables: Sequence[Variable]
    rows: Sequence[Row]

    def build(self) -> dashboard.Dashboard:
        board = (
            dashboard.Dashboard(self.title)
            .uid(self.uid)
            .description(self.description)
            .tags(["dycoke"])
            .timezone("browser")
            .refresh("10s")
            .time("now-30m", "now")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .link(_link_to_others())
            .with_variable(
                dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
            )
        )
        for variable in self.variables:
            board = board.with_variable(_choice(variable))
        ids = count(1)
        for row in self.rows:
            board = board.with_row(dashboard.Row(row.title).id(next(ids)))
            for panel in row.panels:
                board = board.with_panel(panel.id(next(ids)))
        return board


# --- queries ---


def quantile(q: float, metric: str, selector: str, *by: str) -> str:
    """A quantile of a histogram's recent observations."""
    labels = ", ".join(["le", *by])
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{selector}[{RATE}])))"


def quantiles(metric: str, selector: str) -> list[Query]:
    return [Query(quantile(q, metric, selector), name) for name, q in PERCENTILES.items()]


def mean(metric: str, selector: str, *by: str) -> str:
    """The mean of a histogram's or summary's recent observations."""
    labels = ", ".join(by)
    parts = (f"sum by ({labels}) (rate({metric}_{p}{selector}[{RATE}]))" for p in ("sum", "count"))
    return " / ".join(parts)


def rate(metric: str, selector: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}{selector}[{RATE}]))"


# --- panels ---


def graph(
    title: str,
    text: str,
    unit: str,
    queries: Sequence[Query],
    *,
    width: int = 8,
    top: float | None = None,
    is_stacked: bool = False,
) -> timeseries.Panel:
    """Series over time. `top`: the highest value that makes sense."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(DATASOURCE)
        .unit(unit)
        .min(0)
        .height(8)
        .span(width)
        .line_width(1)
        .fill_opacity(60 if is_stacked else 10)
        .show_points(options.VisibilityMode.NEVER)
        .legend(_legend())
        .tooltip(
            common.VizTooltipOptions()
            .mode(options.TooltipDisplayMode.MULTI)
            .sort(options.SortOrder.DESCENDING)
        )
    )
    if top is not None:
        panel = panel.max(top)
    if is_stacked:
        panel = panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    for ref_id, query in _lettered(queries):
        panel = panel.with_target(_target(ref_id, query))
    return panel


def number(
    title: str, text: str, unit: str, expr: str, *, no_value: str = "none", width: int = 4
) -> stat.Panel:
    """One current value, drawn over its recent history."""
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(DATASOURCE)
        .unit(unit)
        .height(4)
        .span(width)
        .no_value(no_value)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(options.BigValueGraphMode.AREA)
        .color_mode(options.BigValueColorMode.NONE)
        .with_target(_target("A", Query(expr)))
    )


def bars(
    title: str, text: str, unit: str, queries: Sequence[Query], *, width: int = 8
) -> bargauge.Panel:
    """One bar per query, in the given order, with current values."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(text)
        .datasource(DATASOURCE)
        .unit(unit)
        .min(0)
        .height(8)
        .span(width)
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    for ref_id, query in _lettered(queries):
        panel = panel.with_target(_target(ref_id, query))
    return panel


# --- details ---


def _lettered(queries: Sequence[Query]) -> list[tuple[str, Query]]:
    return [(chr(ord("A") + i), query) for i, query in enumerate(queries)]


def _target(ref_id: str, query: Query) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(ref_id)
        .datasource(DATASOURCE)
        .expr(query.expr)
        .legend_format(query.legend or "__auto")
        .range()
    )


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(options.LegendDisplayMode.TABLE)
        .placement(options.LegendPlacement.BOTTOM)
        .calcs(["lastNotNull", "max"])
    )


def _choice(variable: Variable) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.name.capitalize())
        .datasource(DATASOURCE)
        .query(f"label_values({variable.metric}, {variable.name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all"))
    )


def _link_to_others() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("DyCoke").tags(["dycoke"]).as_dropdown(True).keep_time(True)
    return link.type(DashboardLinkType.DASHBOARDS)
