"""The tables of metrics and events in docs/telemetry.md, from the catalogues.

    python tests/support/catalogue.py

writes them.
"""

from __future__ import annotations

from pathlib import Path

from leyline.v1.enums_pb2 import TelemetryLevel
from tolaria.telemetry import events
from tolaria.telemetry.events import EventSpec
from tolaria.telemetry.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "telemetry.md"


def metrics_table() -> str:
    """Returns the table of metrics."""
    rows = ["| name | kind | labels | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for spec in Metrics().catalogue:
        unit = "" if spec.unit == "1" else spec.unit
        rows.append(f"| `{spec.name}` | {spec.kind} | {', '.join(spec.labels)} | {unit} | {spec.help_text} |")
    return "\n".join(rows)


def events_table() -> str:
    """Returns the table of events; those of one name at several levels are one row."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    declared = [value for value in vars(events).values() if isinstance(value, EventSpec)]
    for spec in [*declared, *events.EMERGENCY_BROADCASTS.values()]:
        level = TelemetryLevel.Name(spec.level).removeprefix("TELEMETRY_LEVEL_").lower()
        levels = found.setdefault((spec.name, spec.attributes), [])
        if level not in levels:
            levels.append(level)
    rows = ["| event | level | attributes |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {', '.join(levels)} | {', '.join(listed)} |" for (name, listed), levels in found.items()]
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """Returns the page with both tables replaced."""
    for name, table in (("metrics", metrics_table()), ("events", events_table())):
        before, _, rest = page.partition(f"<!-- {name}: ")
        comment, _, rest = rest.partition("\n")
        after = rest.partition(f"<!-- /{name} -->")[2]
        page = f"{before}<!-- {name}: {comment}\n{table}\n<!-- /{name} -->{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
