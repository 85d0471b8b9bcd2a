"""Checks of project rules that no off-the-shelf tool provides; each takes sources and returns the violations."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

LINES_MAX, LINES_MIN, FUNCTION_LINES_MAX = 450, 30, 70
CONSTRUCTOR_PARAMETERS_MAX = 8
LEVELS_MAX = 9

BANNED = (
    "told", "nobody", "whoever", "whom", "somebody", "anybody", "stands", "heart", "hearts", "errand", "chronicle",
    "laps", "conduct", "reception", "must not know", "so many", "of its own", "of their own",
)  # fmt: skip
"""Words that do not belong in the code: none is a standard term of the field."""

_FIXED = ("emergency_told_later", "told later:")
"""Log events and journal texts that are an interface and therefore remain unchanged."""

_BANNED = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Module:
    """A module of the package: its path below the package's root, such as `run/health.py`, and its source."""

    place: str
    source: str
    package: str = "tolaria"

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source)

    @property
    def name(self) -> str:
        """The dotted name."""
        parts = [self.package, *self.place.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return self.place.rsplit("/", 1)[-1].removesuffix(".py")

    @property
    def is_marker(self) -> bool:
        """Whether it is an `__init__` or a `__main__`."""
        return self.stem in {"__init__", "__main__"}

    def nodes(self) -> Iterator[ast.AST]:
        """All nodes of the syntax tree."""
        return ast.walk(self.tree)

    def classes(self) -> Iterator[ast.ClassDef]:
        """All classes at the module's top level."""
        return (node for node in self.tree.body if isinstance(node, ast.ClassDef))


def modules_of(root: Path, package: str = "tolaria") -> list[Module]:
    """Returns all modules below `root`, the folder of `package`."""
    paths = sorted(root.rglob("*.py"))
    return [Module(str(path.relative_to(root)), path.read_text(encoding="utf-8"), package) for path in paths]


# -- rule 1: modules have standard names ---------------------------------------------------------------------------


def sizes(module: Module) -> list[str]:
    """Files without a docstring or of other than 30 to 450 lines; functions and constructors that are too long."""
    found = []
    lines = module.source.count("\n")
    if lines > LINES_MAX:
        found.append(f"{module.place}: {lines} lines")
    if lines < LINES_MIN and not module.is_marker:
        found.append(f"{module.place}: only {lines} lines")
    if not ast.get_docstring(module.tree):
        found.append(f"{module.place}: no docstring")
    for node in module.nodes():
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        if length > FUNCTION_LINES_MAX:
            found.append(f"{module.place}:{node.lineno} {node.name}: {length} lines")
        if node.name == "__init__":
            arguments = node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
            if count > CONSTRUCTOR_PARAMETERS_MAX:
                found.append(f"{module.place}:{node.lineno} a constructor with {count} parameters")
    return found


def unknown_names(modules: Iterable[Module], glossary: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules whose name is not in the glossary of their subpackage."""
    found = []
    for module in modules:
        subpackage, _, _ = module.place.rpartition("/")
        if not module.is_marker and module.stem not in glossary.get(subpackage, ()):
            found.append(f"{module.place}: not in the glossary of {subpackage or 'the package'}")
    return found


# -- rule 2: standard terms -----------------------------------------------------------------------------------------


def banned_words(module: Module) -> list[str]:
    """Lines with a banned word in a name, string, comment or docstring."""
    found = []
    for number, line in enumerate(module.source.splitlines(), 1):
        if any(fixed in line for fixed in _FIXED):
            continue
        if match := _BANNED.search(line.replace("_", " ")):
            found.append(f"{module.place}:{number} {match[0]!r}")
    return found


# -- rule 3: protocols and data -------------------------------------------------------------------------------------


def duplicate_classes(modules: Iterable[Module]) -> list[str]:
    """Class names that occur in several modules, and dataclasses with the same two or more fields."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    shapes: defaultdict[frozenset[tuple[str, str]], list[str]] = defaultdict(list)
    for module in modules:
        for node in module.classes():
            if not node.name.startswith("_"):
                names[node.name].append(module.place)
            if _is_dataclass(node) and len(fields := _fields(node)) > 1:
                shapes[frozenset(fields)].append(f"{module.place} {node.name}")
    found = [f"{name}: in {', '.join(places)}" for name, places in names.items() if len(places) > 1]
    return found + [f"the same fields: {', '.join(places)}" for places in shapes.values() if len(places) > 1]


def single_implementer_protocols(modules: Iterable[Module], exempt: Iterable[str]) -> list[str]:
    """Protocols with fewer than two implementers, except those in `exempt`."""
    known = list(modules)
    implementers = [_members(node) for module in known for node in module.classes() if not _is_protocol(node)]
    found = []
    for module in known:
        for node in module.classes():
            if not _is_protocol(node) or node.name in exempt:
                continue
            wanted = _members(node)
            if sum(wanted <= members for members in implementers) < 2:
                found.append(f"{module.place} {node.name}: a protocol with fewer than two implementers")
    return found


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_protocol(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).split("[")[0] == "Protocol" for base in node.bases)


def _fields(node: ast.ClassDef) -> list[tuple[str, str]]:
    return [
        (ast.unparse(item.target), ast.unparse(item.annotation))
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    ]


def _members(node: ast.ClassDef) -> set[str]:
    methods = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return methods | {name for name, _ in _fields(node)}


# -- rule 4: one mechanism, one default -----------------------------------------------------------------------------


def repeated_defaults(modules: Iterable[Module], settings: Iterable[str]) -> list[str]:
    """Parameters named like a setting that have a numeric default: defaults of settings belong in `config`."""
    names, found = set(settings), []
    for module in modules:
        if module.place.startswith("config/"):
            continue
        for node in module.nodes():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found += [
                    f"{module.place}:{node.lineno} {node.name}({name}=...): a default of a setting"
                    for name in _numeric_defaults(node)
                    if name in names
                ]
    return found


def _numeric_defaults(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True))
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    for argument, default in pairs:
        number = isinstance(default, ast.Constant) and type(default.value) in {int, float} and default.value
        if number:
            yield argument.arg


# -- imports --------------------------------------------------------------------------------------------------------


@dataclass
class ImportGraph:
    """Which module of the package imports which."""

    edges: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, modules: Iterable[Module]) -> ImportGraph:
        """Returns the graph of the modules; imports under TYPE_CHECKING count as well."""
        known = {module.name: module for module in modules}
        return cls({name: set(_imported(module, known)) - {name} for name, module in known.items()})

    def cycles(self) -> list[str]:
        """Modules that import themselves, directly or through others."""
        return sorted(name for name in self.edges if name in self._reachable(name))

    def levels(self, subpackage: str) -> int:
        """Length of the longest chain of imports inside a subpackage."""
        inside = {name for name in self.edges if name.startswith(f"{subpackage}.")}
        depth: dict[str, int] = {}

        def height(name: str) -> int:
            if name not in depth:
                depth[name] = 0  # `cycles` reports cycles
                depth[name] = 1 + max((height(other) for other in self.edges[name] & inside), default=0)
            return depth[name]

        return max((height(name) for name in inside), default=0)

    def _reachable(self, start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(self.edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += self.edges.get(name, ())
        return seen


def _imported(module: Module, known: Mapping[str, Module]) -> Iterator[str]:
    for node in module.nodes():
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in submodules if name in known]
            yield from found
            if node.module in known and len(found) < len(submodules):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def longest(counts: Mapping[str, int]) -> str:
    """Returns the largest entries, for a message."""
    return ", ".join(f"{name} {count}" for name, count in Counter(counts).most_common(5))
