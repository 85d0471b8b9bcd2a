from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_type_hints

import pytest

from tolaria.values import gradients, optimization, seeds, training

MODULES = (gradients, optimization, seeds, training)
TYPES = [
    member
    for module in MODULES
    for member in vars(module).values()
    if isinstance(member, type) and dataclasses.is_dataclass(member) and member.__module__ == module.__name__
]


def test_the_values_import_no_torch() -> None:
    """The run side imports them in a process without torch."""
    names = ", ".join(module.__name__ for module in MODULES)
    script = f"import sys, {names}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_value_is_frozen_slotted_and_has_resolvable_types(kind: type) -> None:
    """An encoder can look up the type of each field; none of them can be assigned to."""
    assert hasattr(kind, "__slots__")
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined] # dataclasses sets it
    assert get_type_hints(kind)
