"""The manifests of Kubernetes that carry the rules of Prometheus and the dashboards."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

ROOT: Final = Path(__file__).parents[2]
OVERLAY: Final = ROOT / "deploy" / "kubernetes" / "overlays" / "monitoring"
RULES: Final = ROOT / "deploy" / "prometheus" / "rules"
_LABELS: Final = {"app.kubernetes.io/name": "tolaria"}
_HEAD: Final = (
    "# Written by `python scripts/dashboards` from deploy/prometheus/rules and scripts/dashboards: change those.\n"
)


def manifests(dashboards: Mapping[str, str]) -> dict[str, str]:
    """Returns the content of the files by their name; `dashboards` are the JSON texts by file name."""
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in YAML(typ="safe").load(path)["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tolaria", "labels": _LABELS},
        "spec": {"groups": groups},
    }
    boards = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        # The label that the sidecar of Grafana's chart looks for.
        "metadata": {"name": "tolaria-dashboards", "labels": {**_LABELS, "grafana_dashboard": "1"}},
        "data": {f"tolaria-{name}": LiteralScalarString(text) for name, text in dashboards.items()},
    }
    return {"prometheus-rule.yaml": _text(rule), "dashboards.yaml": _text(boards)}


def _text(manifest: Mapping[str, Any]) -> str:
    yaml, out = YAML(), io.StringIO()
    yaml.width = 1000
    yaml.default_flow_style = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(dict(manifest), out)
    return _HEAD + out.getvalue()
