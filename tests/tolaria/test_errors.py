from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria import errors
from tolaria.cli import errors as cli_errors
from tolaria.errors import NoGradientsError, StateMismatchError, TolariaError
from tolaria.values.encoding import error_fields, error_from_fields

PACKAGE = Path(cli_errors.__file__).parents[1]
TREES = [pytest.param(errors, id="errors"), pytest.param(cli_errors, id="cli")]
NODE = re.compile(r"^(?P<branches>(?:│   |    )*)[├└]── (?P<names>\w+Error(?:[,:] +\w+Error)*)", re.MULTILINE)


def drawn(module: ModuleType) -> dict[str, str]:
    """The tree in a module's docstring: the base of each class. `Base: A, B` is a base with its leaves."""
    docstring = re.sub(r",\n[│ ]+", ", ", inspect.getdoc(module) or "")  # a list of leaves that goes on
    path, bases = ["TolariaError"], dict[str, str]()
    for node in NODE.finditer(docstring):
        depth = len(node["branches"]) // 4 + 1
        head, _, leaves = node["names"].partition(": ")
        del path[depth:]
        for name, base in [(n, path[-1]) for n in head.split(", ")] + [(n, head) for n in leaves.split(", ") if n]:
            assert name not in bases, "each class is drawn once"
            bases[name] = base
        path.append(head)
    return bases


def defined(module: ModuleType) -> dict[str, type[TolariaError]]:
    """The subclasses of TolariaError that a module defines."""
    return {
        name: found
        for name, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, TolariaError)
        and found is not TolariaError
        and f"{found.__module__}.".startswith(f"{module.__name__}.")
    }


@pytest.mark.parametrize("module", TREES)
def test_docstring_tree_matches_the_classes(module: ModuleType) -> None:
    """The tree in the module's docstring has every class, under its base, and no other name."""
    assert drawn(module) == {name: found.__base__.__name__ for name, found in defined(module).items() if found.__base__}


@pytest.mark.parametrize("module", TREES)
def test_each_class_has_a_docstring(module: ModuleType) -> None:
    """Each class describes its condition itself instead of inheriting the description of its base."""
    assert [name for name, found in defined(module).items() if not vars(found).get("__doc__")] == []


def test_errors_are_defined_in_their_trees_only() -> None:
    """No other module defines a subclass of TolariaError."""
    known = {*defined(errors), *defined(cli_errors), "TolariaError"}
    homes = {*Path(errors.__file__).parent.glob("*.py"), Path(cli_errors.__file__)}
    strays = [
        f"{file.relative_to(PACKAGE)}: {node.name}"
        for file in PACKAGE.rglob("*.py")
        if file not in homes
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and known & {ast.unparse(base) for base in node.bases}
    ]
    assert strays == []


def test_no_gradients_error_is_a_runtime_error() -> None:
    """Code that does not know Tolaria's errors can catch it as the RuntimeError that PyTorch would raise."""
    with pytest.raises(RuntimeError, match="no gradients available for aggregation"):
        raise NoGradientsError


VALUES: dict[object, st.SearchStrategy[object]] = {
    str: st.text(),
    int: st.integers(),
    int | None: st.none() | st.integers(),
}


def constructor_arguments(kind: type[TolariaError]) -> st.SearchStrategy[tuple[object, ...]]:
    """Positional arguments for the constructor of an error class, by its type hints."""
    hints = get_type_hints(kind.__init__, localns=vars(errors))
    named = [hint for name, hint in hints.items() if name not in {"return", "fields"}]
    return st.tuples(*(VALUES.get(hint, st.lists(st.text())) for hint in named))


@pytest.mark.parametrize("kind", [TolariaError, *defined(errors).values()])
@settings(max_examples=20)  # of each of a hundred classes
@given(data=st.data())
def test_error_survives_conversion_to_fields_and_back(kind: type[TolariaError], data: st.DataObject) -> None:
    """Class, message and attributes are the same, and the fields are plain, immutable values."""
    error = kind(*data.draw(constructor_arguments(kind)))  # type: ignore[arg-type] # drawn by the constructor's hints
    name, fields = error_fields(error)
    found = error_from_fields(name, fields)
    assert type(found) is type(error)
    assert str(found) == str(error)
    attributes, expected = dict(vars(found)), dict(vars(error))
    attributes.pop("fields")
    expected.pop("fields")
    assert attributes == expected
    assert error_fields(found) == (name, fields)
    assert {type(field) for field in fields} <= {str, int, type(None), tuple}
    hash(fields)


def test_lists_become_tuples() -> None:
    """Fields are immutable, and constructors accept any sequence."""
    assert error_fields(StateMismatchError(["a", "b"])) == ("StateMismatchError", (("a", "b"),))
    assert isinstance(error_from_fields("StateMismatchError", (("a", "b"),)), StateMismatchError)


@pytest.mark.parametrize("name", ["ValueError", "error_fields", "CommandFailedError", ""])
def test_unknown_error_name_raises(name: str) -> None:
    """Only errors of `tolaria.errors` can be built from fields."""
    with pytest.raises(KeyError):
        error_from_fields(name, ("message",))
