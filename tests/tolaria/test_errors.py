from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from tolaria import errors
from tolaria.cli import errors as cli_errors
from tolaria.errors import TolariaError

PACKAGE = Path(errors.__file__).parents[1]
TREES = [pytest.param(errors, id="errors"), pytest.param(cli_errors, id="cli")]
ROW = re.compile(r"^(?P<branches>(?:│   |    )*)[├└]── (?P<name>\w+)", re.MULTILINE)


def drawn(module: ModuleType) -> dict[str, str]:
    """The tree in a module's docstring: each class with its base."""
    path, bases = ["TolariaError"], {}
    for row in ROW.finditer(inspect.getdoc(module) or ""):
        depth = len(row["branches"]) // 4 + 1
        del path[depth:]
        assert row["name"] not in bases, "a class stands once in the tree"
        bases[row["name"]] = path[-1]
        path.append(row["name"])
    return bases


def defined(module: ModuleType) -> dict[str, type[TolariaError]]:
    """The errors that a module or its files define, without the root."""
    return {
        name: found
        for name, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, TolariaError)
        and found is not TolariaError
        and found.__module__.startswith(module.__name__)
    }


@pytest.mark.parametrize("module", TREES)
def test_the_drawn_tree_is_the_real_one(module: ModuleType) -> None:
    """Every class stands in the docstring's tree, under its own base, and nothing else does."""
    assert drawn(module) == {name: found.__base__.__name__ for name, found in defined(module).items() if found.__base__}


@pytest.mark.parametrize("module", TREES)
def test_every_error_says_when_it_is_raised(module: ModuleType) -> None:
    """Each class has a docstring of its own: when it is raised, or what it is the base of."""
    families = set(drawn(module).values())
    for name, found in defined(module).items():
        said = vars(found).get("__doc__") or ""
        raised = said.startswith("Raised ")
        assert raised or (name in families and said.startswith("Base of ")), name


def test_all_that_is_defined_is_exported() -> None:
    """Whatever a file of the package defines can be imported from the package."""
    files = (PACKAGE / "errors").glob("*.py")
    named = {node.name for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
    assert named == {*defined(errors), "TolariaError"} == set(errors.__all__)


def test_errors_are_defined_in_their_trees_only() -> None:
    """No room has an error of Tolaria's that the trees do not show."""
    known = {*defined(errors), *defined(cli_errors), "TolariaError"}
    homes = {*(PACKAGE / "errors").glob("*.py"), PACKAGE / "cli" / "errors.py"}
    strays = [
        f"{file.relative_to(PACKAGE)}: {node.name}"
        for file in PACKAGE.rglob("*.py")
        if file not in homes
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and known & {ast.unparse(base) for base in node.bases}
    ]
    assert strays == []
