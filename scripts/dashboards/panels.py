"""What the panels of all dashboards have in common."""

from __future__ import annotations

from typing import NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
ONE = '{instance="$instance"}'
"""The selector of every query: dashboards show one run."""

GREEN, YELLOW, RED = "green", "orange", "red"


class Query(NamedTuple):
    """An expression and the legend of its series."""

    expression: str
    legend: str


def one(metric: str, **labels: str) -> str:
    """Returns a selector of the metric for the run that the dashboard shows."""
    more = "".join(f', {name}="{value}"' for name, value in labels.items())
    return f'{metric}{{instance="$instance"{more}}}'


def curves(
    title: str, description: str, *queries: Query, unit: str = "short", span: int = 8, stacked: bool = False
) -> timeseries.Panel:
    """A panel of curves over time. `span`: its width, of 24."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(span)
        .height(7)
        .datasource(SOURCE)
        .line_width(1)
        .fill_opacity(30 if stacked else 5)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    for number, query in enumerate(queries):
        panel = panel.with_target(_target(query, number))
    return panel


def figure(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str = "short",
    span: int = 3,
    limits: tuple[tuple[float | None, str], ...] = ((None, GREEN),),
    texts: dict[str, str] | None = None,
) -> stat.Panel:
    """A panel of one figure, coloured from each limit on; `texts` replaces values by words."""
    steps = [models.Threshold(value=value, color=color) for value, color in limits]
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(span)
        .height(4)
        .datasource(SOURCE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.BACKGROUND)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_target(query, 0))
    )
    if texts:
        results = {value: models.ValueMappingResult(text=text) for value, text in texts.items()}
        panel = panel.mappings([models.ValueMap(options=results)])
    return panel


def timeline(
    title: str, description: str, *queries: Query, texts: dict[str, tuple[str, str]], span: int = 12, height: int = 7
) -> statetimeline.Panel:
    """A panel of states over time; `texts` gives for each value its word and its colour."""
    results = {value: models.ValueMappingResult(text=text, color=color) for value, (text, color) in texts.items()}
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .span(span)
        .height(height)
        .datasource(SOURCE)
        .merge_values(merge_values=True)
        .row_height(0.8)
        .mappings([models.ValueMap(options=results)])
    )
    for number, query in enumerate(queries):
        panel = panel.with_target(_target(query, number))
    return panel


def new_dashboard(uid: str, title: str, description: str) -> builders.Dashboard:
    """An empty dashboard with the two choices that all have: the data source and the run."""
    instances: dict[str, object] = {"query": "label_values(tolaria_health_ready, instance)", "refId": "instances"}
    return (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["tolaria"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone(common.TimeZoneBrowser)
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            builders.QueryVariable("instance")
            .label("Run")
            .datasource(SOURCE)
            .query(instances)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
        .link(
            builders.DashboardLink("Tolaria")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["tolaria"])
            .keep_time(keep_time=True)
            .include_vars(include_vars=True)
        )
    )


def row(title: str) -> builders.Row:
    """The heading of the panels after it."""
    return builders.Row(title)


def _target(query: Query, number: int) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .ref_id(chr(ord("A") + number))
        .datasource(SOURCE)
        .range()
    )
