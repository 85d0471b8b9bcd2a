"""The guides name only what exists, and the paths they describe stay short."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from support.catalogue import PAGE, with_tables
from tolaria.config import Settings, is_live
from tolaria.run.packet_telemetry import BOUNDARY, CHECKPOINT, EPOCH, LANE_RESTART, ROLLBACK

ROOT = Path(__file__).parents[1]
SERVICE = ROOT / "service" / "tolaria"
GUIDE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Returns the text of a section of the guide."""
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def steps(title: str) -> list[str]:
    """Returns the file that each numbered step of a section begins with."""
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section(title), re.MULTILINE)


def test_files_of_the_guide_exist() -> None:
    """Each file is a path in the service or in the repository; a name without a folder is some module's."""
    named = sorted(set(re.findall(r"`([\w./]+\.(?:py|proto|yaml|toml))`", GUIDE)))

    missing = [name for name in named if not ((SERVICE / name).is_file() or (ROOT / name).is_file())]
    assert [name for name in missing if "/" in name or not any(SERVICE.rglob(name))] == []


def test_modules_of_the_packages_exist() -> None:
    """Each module that is listed for a package is a file of that package."""
    packages = re.findall(r"^\*\*`(\w+)/`\*\*: (.*?)(?=\n\n)", section("Packages"), re.MULTILINE | re.DOTALL)
    missing = [
        f"{package}/{name}.py"
        for package, text in packages
        for names in re.findall(r"((?:`[a-z_]+`(?:,\s+)?)+):", text)
        for name in re.findall(r"`([a-z_]+)`", names)
        if not (SERVICE / package / f"{name}.py").is_file()
    ]

    assert {package for package, _ in packages} == {path.parent.name for path in SERVICE.glob("*/__init__.py")}
    assert missing == []


@pytest.mark.parametrize(
    ("title", "files_max"),
    [("The life of a batch", 12), ("The life of a rollback", 15), ("The life of a seed", 15)],
)
def test_paths_are_short(title: str, files_max: int) -> None:
    """A batch, a rollback and a seed pass few files, each listed once."""
    files = steps(title)

    assert 10 < len(files) <= files_max
    assert len(set(files)) == len(files)


def test_layers_are_those_of_import_linter() -> None:
    """The guide shows the layers that pyproject.toml enforces."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (contract for contract in linter["contracts"] if contract["type"] == "layers")
    shown = section("Layers").split("```\n")[1].splitlines()

    assert shown == [layer.replace("(", "").replace(")", "") for layer in contract["layers"]]


def test_paths_of_the_readme_exist() -> None:
    """Each path and each link of the README leads somewhere in the repository."""
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    paths = re.findall(r"`((?:service|tests|deploy|scripts|proto|docs)/[\w./-]*)`", README)

    assert [path for path in [*links, *paths] if not (ROOT / path).exists()] == []
    assert "docs/architecture.md" in links


def test_the_tables_of_telemetry_are_those_of_the_catalogues() -> None:
    """`python tests/support/catalogue.py` writes them."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page)
    assert "tolaria.telemetry.dropped_total" in page
    assert "epoch_hook_latency_high" in page


def test_the_spans_of_telemetry_are_those_that_are_recorded() -> None:
    """Each span of a run has a row."""
    page = PAGE.read_text(encoding="utf-8")
    names = (EPOCH, BOUNDARY, ROLLBACK, CHECKPOINT, LANE_RESTART)
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_operations_lists_the_live_settings() -> None:
    """Each section with settings that a reload changes has a row, which names them in their order."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | {', '.join(f'`{field}`' for field in live)} |"
        for name, section in Settings()
        if (live := [field for field in type(section).model_fields if is_live(type(section), field)])
    ]
    assert page.split("<!-- live -->\n")[1].split("<!-- /live -->")[0].splitlines()[2:] == rows
