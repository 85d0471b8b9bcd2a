"""Pictures of dashboards, drawn with matplotlib from the data of a Prometheus: no package brings Grafana."""

from __future__ import annotations

import json
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLUMNS: Final = 24
_ROW_INCH: Final = 0.38
_WIDTH_INCH: Final = 15.0
_POINTS: Final = 400
_SECONDS_A_DAY: Final = 86_400.0
_COLORS: Final = {
    "green": "#3f8f4f",
    "orange": "#d98c1f",
    "red": "#c4323f",
    "blue": "#3274d9",
    "grey": "#9aa0a6",
    "transparent": "none",
}
_BACKGROUND, _PANEL, _TEXT = "#f4f5f5", "#ffffff", "#24292e"


class Series(NamedTuple):
    """One series of a query: its legend, its times in days since 1970, and its values."""

    legend: str
    days: list[float]
    values: list[float]


class Server:
    """A Prometheus, and the run and the time that are drawn."""

    def __init__(self, url: str, instance: str | None, seconds: float, until: float | None) -> None:
        self.url = url.rstrip("/")
        self.until = time.time() if until is None else until
        self.since = self.until - seconds
        self.instance = instance or self._newest_instance()

    def series(self, expression: str, legend: str) -> list[Series]:
        """Returns the series of an expression over the time that is drawn."""
        step = max(1.0, (self.until - self.since) / _POINTS)
        query = expression.replace("$instance", self.instance)
        parameters = {"query": query, "start": self.since, "end": self.until, "step": step}
        return [
            Series(
                _filled(legend, each["metric"]),
                [at / _SECONDS_A_DAY for at, _ in each["values"]],
                [float(value) for _, value in each["values"]],
            )
            for each in self._get("query_range", parameters)["result"]
        ]

    def _newest_instance(self) -> str:
        found = self._get("query", {"query": "tolaria_health_ready", "time": self.until})["result"]
        if not found:
            raise SystemExit(f"{self.url} has no run of Tolaria at that time")
        instance: str = found[-1]["metric"]["instance"]
        return instance

    def _get(self, path: str, parameters: Mapping[str, object]) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 - the user's server
            return json.load(response)["data"]


def draw(text: str, server: Server, path: Path) -> None:
    """Draws the dashboard with this JSON into a PNG file."""
    board = json.loads(text)
    panels = board["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(_WIDTH_INCH, rows * _ROW_INCH + 0.5), facecolor=_BACKGROUND)
    figure.text(
        0.01, 1 - 0.25 / figure.get_figheight(), board["title"], size=15, weight="bold", color=_TEXT, va="center"
    )
    for panel in panels:
        _draw_panel(figure, panel, server)
    figure.savefig(path, dpi=80)


def _draw_panel(figure: Figure, panel: Mapping[str, Any], server: Server) -> None:
    place = panel["gridPos"]
    height = figure.get_figheight()
    top = 1 - (0.5 + place["y"] * _ROW_INCH) / height
    left, width = place["x"] / _COLUMNS, place["w"] / _COLUMNS
    if panel["type"] == "row":
        figure.text(0.01, top - 0.2 / height, panel["title"], size=11, weight="bold", color=_TEXT, va="center")
        return
    bottom = top - place["h"] * _ROW_INCH / height
    margins = (0.028, 0.45 / height) if panel["type"] != "stat" else (0.004, 0.06 / height)
    label = 0.075 if panel["type"] == "state-timeline" else margins[0]
    box = (left + label, bottom + margins[1], width - label - 0.008, top - bottom - margins[1] - 0.32 / height)
    axes = figure.add_axes(box, facecolor=_PANEL)
    axes.set_title(panel["title"], loc="left", size=8.5, color=_TEXT, pad=3)
    found = [
        series
        for target in panel["targets"]
        for series in server.series(target["expr"], target.get("legendFormat", ""))
    ]
    {"stat": _stat, "state-timeline": _timeline}.get(panel["type"], _curves)(axes, panel, found)
    if panel["type"] != "stat":
        axes.set_xlim(server.since / _SECONDS_A_DAY, server.until / _SECONDS_A_DAY)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda day, _: time.strftime("%H:%M:%S", time.gmtime(day * _SECONDS_A_DAY)))
        axes.tick_params(labelsize=6.5, length=2, color="#9aa0a6")
    for spine in axes.spines.values():
        spine.set_color("#d0d4d8")


def _stat(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    value = found[0].values[-1] if found else math.nan
    color = _COLORS["grey"]
    for step in defaults["thresholds"]["steps"]:
        if found and (step["value"] is None or value >= step["value"]):
            color = _COLORS[step["color"]]
    texts = {key: result["text"] for key, result in _mapping(panel).items()}
    shown = texts.get(f"{value:g}", "no data" if math.isnan(value) else _short(value, defaults.get("unit", "short")))
    axes.set_facecolor(color)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, shown, transform=axes.transAxes, ha="center", va="center", size=15, color="white")


def _timeline(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series]) -> None:
    results = _mapping(panel)
    for place, series in enumerate(reversed(found)):
        for start, end, value in _spans(series):
            color = _COLORS[results.get(f"{value:g}", {}).get("color", "blue")]
            axes.broken_barh([(start, end - start)], (place - 0.4, 0.8), facecolors=color)
    axes.set_yticks(range(len(found)), [series.legend for series in reversed(found)])
    axes.set_ylim(-0.6, max(len(found), 1) - 0.4)


def _spans(series: Series) -> list[tuple[float, float, float]]:
    """Returns start, end and value of the parts of a series with one value and without a gap."""
    steps = [later - earlier for earlier, later in zip(series.days, series.days[1:], strict=False)]
    step = min(steps, default=1 / _SECONDS_A_DAY)
    spans: list[tuple[float, float, float]] = []
    for at, value in zip(series.days, series.values, strict=True):
        if spans and spans[-1][2] == value and at - spans[-1][1] < step * 0.5:
            spans[-1] = (spans[-1][0], at + step, value)
        else:
            spans.append((at, at + step, value))
    return spans


def _curves(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series]) -> None:
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
    if stacked and found:
        days = sorted({day for series in found for day in series.days})
        known = [dict(zip(series.days, series.values, strict=True)) for series in found]
        axes.stackplot(days, [[each.get(day, 0.0) for day in days] for each in known], alpha=0.75)
    else:
        for series in found:
            axes.plot(*_with_gaps(series), linewidth=1.0)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value, unit))
    axes.grid(visible=True, color="#e4e7ea", linewidth=0.6)
    axes.margins(y=0.12)
    if not found:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", size=8, color="#9aa0a6")
        return
    axes.legend(
        [*axes.lines, *axes.collections][:8],
        [series.legend for series in found][:8],
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.08),
        ncols=4,
        frameon=False,
        fontsize=6.0,
    )


def _with_gaps(series: Series) -> tuple[list[float], list[float]]:
    """Returns the points of a series with a break where it has none."""
    days: list[float] = []
    values: list[float] = []
    steps = [later - earlier for earlier, later in zip(series.days, series.days[1:], strict=False)]
    step = min(steps, default=0.0)
    for at, value in zip(series.days, series.values, strict=True):
        if days and at - days[-1] > step * 1.5:
            days.append(at)
            values.append(math.nan)
        days.append(at)
        values.append(value)
    return days, values


def _mapping(panel: Mapping[str, Any]) -> Mapping[str, Any]:
    mappings = panel["fieldConfig"]["defaults"].get("mappings") or [{"options": {}}]
    options: Mapping[str, Any] = mappings[0]["options"]
    return options


def _filled(legend: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend


def _short(value: float, unit: str) -> str:
    """Returns a value as Grafana would show it in this unit."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "bytes":
        for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
            if abs(value) >= 2**power:
                return f"{value / 2**power:.3g} {name}"
        return f"{value:.0f} B"
    if unit == "s" and value:
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "sci":
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
