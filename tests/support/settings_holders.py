"""Which objects hold settings that are not those in force."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import BaseModel

from tolaria.config import Settings, is_live


def stale_holders(root: object, in_force: Settings) -> set[str]:
    """Returns attributes, as `Class.attribute`, of all objects that can be reached, with other live settings."""
    found, seen, waiting = set[str](), set[int](), [("root", root)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, BaseModel):
            if _is_stale(value, in_force):
                found.add(name)
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += _parts(name, value)
    return found


def _is_stale(value: BaseModel, in_force: Settings) -> bool:
    if isinstance(value, Settings):
        return any(_is_stale(section, in_force) for _, section in value)
    present = [section for _, section in in_force if type(section) is type(value)]
    return bool(present) and _live(value) not in [_live(section) for section in present]


def _live(section: BaseModel) -> dict[str, Any]:
    return {name: value for name, value in section if is_live(type(section), name)}


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case types.MethodType():
            yield name, value.__self__
        case types.FunctionType():
            for free, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
                yield f"{value.__qualname__}.{free}", cell.cell_contents
        case partial():
            yield from ((name, part) for part in (value.func, value.args, value.keywords))
        case dict():
            yield from ((name, item) for item in value.values())
        case list() | tuple() | set() | frozenset():
            yield from ((name, item) for item in value)
        case _ if not isinstance(value, type) and type(value).__module__.startswith(("tolaria", "support")):
            yield from _attributes(value)


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    slots = [slot for base in kind.__mro__ for slot in getattr(base, "__slots__", ())]
    for name in [*getattr(value, "__dict__", ()), *slots]:
        if hasattr(value, name):
            yield f"{kind.__name__}.{name}", getattr(value, name)
