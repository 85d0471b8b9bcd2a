"""deploy/grafana: dashboards that are generated from code, whose queries are checked, and their provisioning."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dashboards.generate import FOLDER, texts
from support.prometheus import ROOT, read_yaml, tool, unknown_labels, unknown_names

GRAFANA = ROOT / "deploy" / "grafana"


@cache
def boards() -> dict[str, dict[str, Any]]:
    """The dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def panels() -> list[tuple[str, dict[str, Any]]]:
    """All panels that show data, with their names."""
    return [
        (f"{name}: {panel['title']}", panel)
        for name, board in boards().items()
        for panel in board["panels"]
        if panel["type"] != "row"
    ]


def queries() -> dict[str, str]:
    """The expressions of all panels by their name."""
    return {f"{name} {target['refId']}": target["expr"] for name, panel in panels() for target in panel["targets"]}


def test_files_are_what_the_code_makes() -> None:
    """`python scripts/dashboards` changes nothing."""
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*")} == texts()


def test_every_metric_and_label_is_in_the_catalogue() -> None:
    """And so are the recording rules."""
    unknown = {name: unknown_names(text) | unknown_labels(text) for name, text in queries().items()}

    assert queries()
    assert {name: found for name, found in unknown.items() if found} == {}


def test_queries_are_valid(tmp_path: Path) -> None:
    """Prometheus parses each, as the expression of a rule."""
    rules = [
        {"record": f"query:{number}", "expr": text.replace("$instance", "a")}
        for number, text in enumerate(queries().values())
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))

    done = subprocess.run(
        [tool(3, "promtool"), "check", "rules", tmp_path / "rules.yml"], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_every_query_is_of_the_run_that_is_chosen() -> None:
    """Two runs of one Prometheus are not mixed."""
    assert [name for name, text in queries().items() if 'instance="$instance"' not in text] == []


@pytest.mark.parametrize(("name", "panel"), panels(), ids=[name for name, _ in panels()])
def test_panel_is_explained(name: str, panel: dict[str, Any]) -> None:
    """It has a sentence, a legend for each query, and the data source that the dashboard chooses."""
    assert panel["description"].endswith(".")
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("name", sorted(boards()))
def test_panels_lie_side_by_side(name: str) -> None:
    """None is on top of another, and none is wider than the page."""
    taken: set[tuple[int, int]] = set()
    for panel in boards()[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_there_are_an_overview_and_one_of_seeds_with_a_picture() -> None:
    """The pictures are in the documentation, and the two dashboards have ids that links can rely on."""
    assert {name: board["uid"] for name, board in boards().items()} == {
        "overview.json": "tolaria-overview",
        "seeds.json": "tolaria-seeds",
    }
    for name in boards():
        picture = ROOT / "docs" / "dashboards" / name.replace(".json", ".png")
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_provisioning_finds_the_dashboards_and_the_server() -> None:
    """The paths and the address are those of docker-compose.yml."""
    services = read_yaml(ROOT / "docker-compose.yml")["services"]
    mounted = dict(volume.removesuffix(":ro").split(":") for volume in services["grafana"]["volumes"])
    (source,) = read_yaml(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    (provider,) = read_yaml(GRAFANA / "provisioning" / "dashboards" / "tolaria.yml")["providers"]

    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert Path(home).name in boards()
