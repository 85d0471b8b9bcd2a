"""The house's rules that no off-the-shelf tool checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "service" / "tolaria").rglob("*.py"))
LINES_MAX, FUNCTION_LINES_MAX = 450, 70

# Where the user's own code is called, which may raise anything: the edge of what Tolaria can know.
BROAD_EXCEPT_ALLOWED = {"jobs/registry.py", "seeds/registry.py", "training/rig.py", "training/lane.py"}


def name(path: Path) -> str:
    """A file's place in the package."""
    return str(path.relative_to(ROOT / "service" / "tolaria"))


def nodes(path: Path) -> Iterator[ast.AST]:
    """All nodes of a file's syntax tree."""
    return ast.walk(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_small(path: Path) -> None:
    """No file over 450 lines, no function over 70, every module says what it owns."""
    text = path.read_text()
    assert text.count("\n") <= LINES_MAX
    assert ast.get_docstring(ast.parse(text)), "a module's docstring says what it owns"
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES_MAX, node.name


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_environment_is_read_in_config_only(path: Path) -> None:
    """os.environ and os.getenv belong to the settings."""
    uses = {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)} & {"environ", "getenv", "putenv"}
    assert not uses or name(path).startswith("config/")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_tasks_are_born_in_task_groups_only(path: Path) -> None:
    """No create_task or ensure_future anywhere; start_soon only beside the task group or in the service."""
    for node in nodes(path):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"create_task", "ensure_future", "run_coroutine_threadsafe"}
    if name(path) == "service.py":
        return
    text = path.read_text()
    assert ("start_soon" in text) <= ("create_task_group" in text)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_broad_excepts_stand_at_the_edge_only(path: Path) -> None:
    """`except Exception` hides mistakes, unless it raises again or stands where the user's own code is called."""
    for node in nodes(path):
        if isinstance(node, ast.ExceptHandler):
            kinds = ast.unparse(node.type) if node.type else "bare"
            broad = kinds == "bare" or {"Exception", "BaseException"} & set(kinds.strip("()").split(", "))
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or cleans_up or name(path) in BROAD_EXCEPT_ALLOWED, f"line {node.lineno}"


def test_no_machine_or_person_is_named() -> None:
    """Nothing in the repository's texts holds a path of the machine it was written on."""
    for path in [*FILES, ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "deploy").rglob("*.*")]:
        if path.is_file():
            assert "/work/" not in path.read_text(), path
